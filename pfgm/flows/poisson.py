"""PFGM, the Poisson flow with one augmented dimension: perturbation, loss, prior and field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..common import draws, transforms
from ..common.checks import check_choice
from ..common.hints import with_hints
from ..common.images import is_image, warn_channels_last, warn_image_range
from ..common.numbers import non_negative, positive, whole
from ..common.tensors import common_device, flat_rows, over_samples, per_row, wide_dtype
from ..data.opening import Samples
from ..functional import euler_step, field_fn
from ..functional.levels import Level
from ..functional.steps import Field
from ..networks.fields import Center, FieldNetwork
from ..networks.registry import KINDS, PUBLISHED, build, size_of
from ..networks.wrapped import Meaning, Wrapped, WrappedField, WrappedMeanField, WrappedModule
from ..references import References, ReferenceSet
from ..solvers import SCHEDULES
from .conditions import Condition, Network, as_condition
from .flow import Flow
from .poisson_networks import EmpiricalField, Weighting, default_weighting, evaluate
from .poisson_rules import (
    MEAN_NORMAL,
    checked_center,
    checked_spread,
    data_std_from_exponent,
    exponent_from_norm,
    exponent_from_z_max,
    largest_scale,
    published_rules,
    spread_rules,
)

# restrict_M multiplies m by _RESTRICTED_FRACTION where |ε_z|/σ is below _RESTRICT_BELOW (PFGM,
# appendix B.1.1).
_RESTRICT_BELOW, _RESTRICTED_FRACTION = 0.5, 0.7
_SMALLEST_Z = 1e-8  # in units of σ
_SMALLEST_NORMAL = 1e-6  # lower bound of |g₁| in the prior; 8e-7 of all draws are smaller
_FEWEST_IMAGE_VALUES = 64  # samples with fewer values take the rules with spread
_LEAST_NORM = 4.0  # of upper_norm, in units of the largest distance of the data from center


class PoissonFlow(Flow):
    """PFGM (arXiv 2209.11178): data are charges at z = 0, and samples follow field lines to them.

    A network is any callable ``net(x, z, **condition) -> (field_x, field_z)`` with x (B, *S) and
    z (B,). Its results have the shapes of x and z. All random numbers come from torch generators,
    on the device of the tensors.

    Hyper-parameters that are not given follow one of two sets of rules:

    - The published rules, with M or data_norm, are for images in [-1, 1]. Lengths are absolute, the
      prior is centred at 0, its norms are clipped, and sampling ends at z_min.
    - The rules with spread (s below) are for any data. Lengths are multiples of s, the prior is
      centred at center and not clipped, and sampling ends at z = 0, with the posterior mean at
      z_min.

    :meth:`from_data` chooses between them. Below, the default of the published rules comes first,
    then that of the rules with spread.

    Args:
        shape: S, the shape of one sample.
        M: the largest exponent of the perturbation (1 + tau)^m. One of M, data_norm and spread is
            needed; M overrides the others.
        data_norm: average norm of a sample, from which M follows (appendix B.1.1).
        spread: root mean square of the values of a sample minus center.
        center: average sample, (*S) or one number for all values. Needs spread.
        noise_std: σ, the standard deviation of the perturbation at m = 0, in the units of the data;
            0.01, or 0.02 s.
        tau: growth of the perturbation.
        gamma: softening in the field's normalisation; 5, or √N s/4 and at most 10 s.
        z_max: the level at which sampling starts; from M, or 14 √N s and at most 80 s.
        z_min: the lowest level at which the network is evaluated; 1e-3, or 2e-3 s.
        upper_norm: the largest norm that training covers; None takes it from M. The published rules
            clip the prior to it. With a spread it is a distance from center: networks are evaluated
            within it, and their posterior means lie within it.
        restrict_M: whether m is drawn from [0, 0.7 M] where |ε_z| < σ/2, as published for images;
            True, or False.
        z_exp: below this z, field_z is replaced by what field_x implies (appendix B.2.3); 5, or
            gamma.
        substitution: how field_z is replaced. "exact" inverts the normalisation, "published"
            neglects z beside ‖x − mean‖.

    Raises:
        ValueError: an argument is out of range.

    >>> import torch
    >>> circle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> flow = PoissonFlow.from_data(circle)
    >>> samples = flow.sample(flow.empirical(circle), 16, generator=torch.Generator())
    >>> bool((samples.norm(dim=1) - 1).abs().max() < 0.01)
    True
    """

    D = 1.0
    _predictions = ("residual", "mean", "noise", "score", "field")
    _settings = (
        *("M", "noise_std", "tau", "gamma", "z_max", "z_min", "upper_norm", "restrict_M"),
        *("z_exp", "substitution"),
    )

    @with_hints
    def __init__(
        self,
        shape: Sequence[int],
        *,
        M: float | None = None,
        data_norm: float | None = None,
        spread: float | None = None,
        center: Center = 0.0,
        noise_std: float | None = None,
        tau: float = 0.03,
        gamma: float | None = None,
        z_max: float | None = None,
        z_min: float | None = None,
        upper_norm: float | None = None,
        restrict_M: bool | None = None,
        z_exp: float | None = None,
        substitution: Literal["exact", "published"] = "exact",
    ) -> None:
        super().__init__(shape)
        if spread is not None and data_norm is not None:
            raise ValueError("only one of data_norm and spread may be given, got both.")
        self.spread = None if spread is None else checked_spread(spread)
        self.center = checked_center(center, self.shape, self.spread)
        self._centers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        rules = published_rules() if spread is None else spread_rules(spread, self.N)
        self.noise_std = positive("noise_std", rules.noise_std if noise_std is None else noise_std)
        self.tau = positive("tau", tau)
        self.gamma = non_negative("gamma", rules.gamma if gamma is None else gamma)
        if M is None and rules.z_max is not None:
            z_max = positive("z_max", rules.z_max if z_max is None else z_max)
            M = exponent_from_z_max(z_max, self.noise_std, self.tau)
        elif M is None:
            M = exponent_from_norm(data_norm, self.N, self.noise_std, self.tau)
        self.M = positive("M", M)
        scale = largest_scale(self.noise_std, self.tau, self.M)
        self.z_max = positive("z_max", MEAN_NORMAL * scale if z_max is None else z_max)
        self.z_min = positive("z_min", rules.z_min if z_min is None else z_min)
        if self.z_min >= self.z_max:
            raise ValueError(f"z_min must be below z_max, {self.z_max}, got {self.z_min}.")
        self.upper_norm = positive(
            "upper_norm", math.sqrt(self.N) * scale if upper_norm is None else upper_norm
        )
        if not isinstance(restrict_M, (bool, np.bool_, type(None))):
            raise ValueError(f"restrict_M must be True, False or None, got {restrict_M!r}.")
        self.restrict_M = rules.restrict_M if restrict_M is None else bool(restrict_M)
        default = self.gamma if rules.z_exp is None else rules.z_exp
        self.z_exp = non_negative("z_exp", default if z_exp is None else z_exp)
        check_choice("substitution", substitution, ("exact", "published"))
        self.substitution = substitution

    @classmethod
    def from_data(cls, data: Samples | ReferenceSet, **overrides: Any) -> PoissonFlow:
        """The flow for data (n, *S), all that :class:`pfgm.ReferenceSet` takes.

        Data are floating point, or uint8, which means u/127.5 − 1. Samples of 64 or more values
        that fill [-1, 1], as images do, take the published rules, with their average norm as
        data_norm. All other data take the rules with their center and spread, so that shifted or
        scaled data make a shifted or scaled flow. If all rows are equal, the spread is their root
        mean square.

        There is one spread for all values. Structure below a hundredth of it is lost, unless z_min
        and the steps of sampling are chosen for it or the columns are standardised first.

        Raises:
            TypeError, ValueError: as for :class:`pfgm.ReferenceSet`, or squares of data overflow.

        Warns:
            UserWarning: data look like images with channels last, or like images that are not in
                [-1, 1].

        >>> import torch
        >>> PoissonFlow.from_data(torch.rand(8, 1, 4, 4), tau=0.05).shape
        (1, 4, 4)
        >>> y = torch.randn(100, 2)
        >>> flow, larger = PoissonFlow.from_data(y), PoissonFlow.from_data(10 * y + 3)
        >>> round(larger.z_max / flow.z_max, 3)
        10.0
        """
        data = data if isinstance(data, ReferenceSet) else ReferenceSet(data)
        warn_channels_last(data.shape[1:])
        measured = data.measures
        if not math.isfinite(measured.rms):
            raise ValueError("data must have finite squares, got values too large for that.")
        defaults: dict[str, Any] = {"data_norm": measured.norm}
        are_images = measured.fills_unit and math.prod(data.shape[1:]) >= _FEWEST_IMAGE_VALUES
        if "data_norm" not in overrides and ("spread" in overrides or not are_images):
            defaults = {"spread": measured.std or measured.rms or 1.0, "center": measured.mean}
        flow = cls(data.shape[1:], **{**defaults, **overrides})
        least = _LEAST_NORM * measured.radius
        if flow.spread is not None and "upper_norm" not in overrides and least > flow.upper_norm:
            # Some rows lie far from all others; the field looks like that of one charge only
            # farther out.
            flow = cls(data.shape[1:], **{**defaults, **overrides, "upper_norm": least})
        if is_image(data.shape[1:]) and data.dtype != torch.uint8:
            flow._warned_of_range = warn_image_range(*measured.range)
        return flow

    @classmethod
    def cifar10(cls, **overrides: Any) -> PoissonFlow:
        """The published values for CIFAR-10 (appendix B): M = 291, z_max = 40, upper_norm = 3000.

        >>> PoissonFlow.cifar10().z_max
        40.0
        """
        published = {"M": 291, "z_max": 40.0, "upper_norm": 3000.0}
        return cls((3, 32, 32), **{**published, **overrides})

    @property
    def config(self) -> dict[str, Any]:
        """Every hyper-parameter, JSON-able: ``PoissonFlow(**flow.config)`` is the same flow."""
        if self.spread is None:
            return super().config
        return {**super().config, "center": self.center.tolist(), "spread": self.spread}

    @property
    def first_level(self) -> float:
        return self.z_max

    @property
    def last_level(self) -> float:
        return self.z_min

    @property
    def _unit(self) -> float:
        return 0.5 if self.spread is None else self.spread

    @property
    def _largest_norm(self) -> float:
        return self.upper_norm if self.spread is None else math.inf

    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Perturbed data and their z (Algorithm 2).

            m ~ U[0, M],  ε_z ~ N(0, σ²),  ε_x ~ N(0, σ² I)
            x̃ = x + (1 + τ)^m ε_x,  z = (1 + τ)^m |ε_z|

        The paper writes ‖ε_x‖ (1 + τ)^m u with u uniform on the sphere. This is the same, because
        the norm and the direction of a normal vector are independent.

        Args:
            x: (B, *S) clean data; uint8 means u/127.5 − 1.
            generator: on the device of x.

        Returns:
            x̃ (B, *S) and z (B,), at least 1e-8 σ.

        Raises:
            ValueError: x has another sample shape.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> x_perturbed, z = flow.perturb(torch.zeros(8, 2))
        >>> x_perturbed.shape, z.shape
        (torch.Size([8, 2]), torch.Size([8]))
        """
        x = self._to_floating(x)
        dtype, device = x.dtype, x.device
        rows = x.shape[:1]
        m = self.M * draws.uniform(rows, generator, dtype=dtype, device=device)
        noise_z = draws.normal(rows, generator, dtype=dtype, device=device)
        noise_z = self.noise_std * noise_z.abs()
        noise_x = self.noise_std * draws.normal(x.shape, generator, dtype=dtype, device=device)
        if self.restrict_M:
            m = torch.where(noise_z < _RESTRICT_BELOW * self.noise_std, _RESTRICTED_FRACTION * m, m)
        growth = (1 + self.tau) ** m
        x_perturbed = x + over_samples(growth, x) * noise_x
        return x_perturbed, (growth * noise_z).clamp(min=_SMALLEST_Z * self.noise_std)

    def loss(
        self,
        net: Network,
        x: Tensor,
        references: References | None = None,
        generator: torch.Generator | None = None,
        *,
        condition: Condition | None = None,
        reference_labels: Tensor | None = None,
        weighting: Weighting | None = None,
    ) -> Tensor:
        """The training loss: the batch mean of ½ ω ‖net(x̃, z) − v‖² (Algorithm 1).

        The square is summed over the N + 1 components of the field, as published. With
        R = √(‖x̃ − x‖² + z²) the published loss, ω = 1, weighs the posterior mean by N/(R + γ)²,
        about 1/s² at noise of level s = R/√N. The balanced loss adds the second term of EDM's
        1/s² + 1/σ_d² (arXiv 2206.00364, table 1), which teaches coarse structure and labels:

            ω = 1 + ((R + γ)/(√N σ_d))²

        with σ_d the spread of the data, 0.5 with the published rules.

        Args:
            net: the network being trained.
            x: (B, *S) clean data.
            references: (M, *S) data whose field v is the target; must contain the rows of x. None
                means x itself. With more references the target varies less between batches.
            generator: of the perturbation, on the device of x.
            condition: keyword arguments of the network. With "labels" (B,) in it, the target of
                each point is the field of the references of its label. A label below 0 means no
                label: the target is the field of all references.
            reference_labels: (M,) labels of the references; not needed if references is None or a
                set that has labels. They need "labels" in the condition.
            weighting: "published" or "balanced". None means balanced for networks that predict the
                posterior mean, such as :class:`pfgm.networks.UNet`, also inside wrappers and
                modules that hold one of them, and published for all others, because a field that
                is predicted directly has errors at all levels.

        Returns:
            A scalar of float32 or wider.

        Raises:
            ValueError: x is empty, shapes do not fit, the network's results have wrong shapes, or
                there is no such weighting.

        Warns:
            UserWarning: no weighting is given, and net is a function or a recorded graph, which
                does not show its network.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> data = torch.randn(64, 2)
        >>> float(flow.loss(flow.empirical(data), data))
        0.0
        """
        if weighting is None:
            weighting = default_weighting(net)
        check_choice("weighting", weighting, get_args(Weighting))
        x, condition = self._checked_batch(x, condition)
        labels = condition.get("labels")
        if references is None:
            references = x
            reference_labels = labels if reference_labels is None else reference_labels
        x_perturbed, z = self.perturb(x, generator)
        with torch.no_grad():
            target_x, target_z = field_fn(
                x_perturbed,
                z,
                references,
                gamma=self.gamma,
                labels=labels,
                reference_labels=reference_labels,
            )
        field_x, field_z = evaluate(net, x_perturbed, z, condition, self.gamma)
        error_x = flat_rows(field_x.to(target_x.dtype) - target_x).square().sum(1)
        error_z = (field_z.to(target_z.dtype) - target_z).square()
        squared = error_x + error_z
        if weighting == "balanced":
            noise = x_perturbed.to(squared.dtype) - x.to(squared.dtype)
            squared = squared * self._balance(noise, z.to(squared.dtype))
        return 0.5 * squared.mean()

    def _balance(self, noise: Tensor, z: Tensor) -> Tensor:
        """ω (B,) of the balanced loss for noise (B, *S) in x and z (B,)."""
        distance = torch.linalg.vector_norm(flat_rows(noise), dim=1).hypot(z)
        weight: Tensor = 1 + ((distance + self.gamma) / (math.sqrt(self.N) * self._unit)).square()
        return weight

    def prior(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        clip: bool | None = None,
    ) -> Tensor:
        """Points (n, *S) at z = z_max, where the data look like a single charge.

            x = center + z_max g / |g₁|,  g ~ N(0, I_N),  g₁ ~ N(0, 1)

        This is a multivariate Cauchy distribution, the projection of the uniform hemisphere onto
        the plane z = z_max (section 3.3). |g₁| is at least 1e-6, which bounds the norm and changes
        8 draws in 10 million.

        Args:
            n: the number of points.
            generator: on the device.
            device: of the points; None takes the device of the generator, or the CPU.
            clip: whether ‖x‖ is clipped to [1, upper_norm] with its direction kept, as published,
                because training does not cover larger norms. With thousands of values in a sample
                this changes half of the draws and does no harm. With one value it cuts off half of
                the distribution. With a spread the norm is ‖x − center‖ and has no lower bound.
                None clips with the published rules alone.

        >>> import torch
        >>> flow = PoissonFlow.cifar10()
        >>> bool(flow.prior(4).flatten(1).norm(dim=1).max() <= 3000.1)
        True
        """
        whole("n", n, 0)
        device = common_device(device, generator)
        direction = draws.normal((n, self.N), generator, device=device)
        scale = draws.normal((n, 1), generator, device=device).abs()
        norm = direction.norm(dim=1, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)
        radius = self.z_max * norm / scale.clamp(min=_SMALLEST_NORMAL)
        if clip is None:
            clip = self.spread is None
        if clip:
            radius = radius.clamp(1.0 if self.spread is None else 0.0, self.upper_norm)
        x: Tensor = (radius * (direction / norm)).view(n, *self.shape)
        return x if self.spread is None else x + self._center(x)

    def _center(self, x: Tensor) -> Tensor:
        """The center in the dtype and on the device of x, cached."""
        key = (x.dtype, x.device)
        if (
            torch.compiler.is_compiling()
            or transforms.in_torch_func()
            or torch.is_inference_mode_enabled()
        ):
            return self.center.to(x.device, x.dtype)  # may not be used outside, so it is not cached
        if key not in self._centers:
            self._centers[key] = self.center.to(x.device, x.dtype)
        return self._centers[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_centers": {}}

    def _build(self, net: str | type[FieldNetwork], settings: dict[str, Any]) -> nn.Module:
        scaling: dict[str, Any] = {"gamma": self.gamma, "data_std": self._data_std}
        if self.spread is not None:
            scaling |= {"center": self.center.tolist(), "scale": self.spread}
        if isinstance(net, type):
            return net(self.shape, **{**scaling, **settings})
        check_choice("net", net, KINDS)
        scaling = {} if net in PUBLISHED else scaling
        return build(net, {**size_of(net, self.shape), **scaling, **settings})

    def _wrap(self, module: WrappedModule, meaning: Meaning) -> Wrapped:
        encode, predicts, data_std, _ = meaning
        if predicts == "field":
            return WrappedField(module, encode)
        # A network with any other prediction was trained on samples that were not centred.
        center = self.center if predicts == "residual" else self.center.new_zeros(())
        if data_std is None:
            offset = self.center - center
            data_std = math.hypot(self._data_std, float(offset.square().mean().sqrt()))
        scaling: dict[str, Any] = {"gamma": self.gamma, "center": center, "data_std": data_std}
        return WrappedMeanField(module, encode, predicts, self.shape, **scaling)

    @property
    def _data_std(self) -> float:
        """Root mean square of the data's values around center."""
        if self.spread is not None:
            return self.spread
        return data_std_from_exponent(self.M, self.N, self.noise_std, self.tau)

    def _predict(
        self, net: Network, x: Tensor, level: Level, condition: Condition
    ) -> Field | Tensor:
        z = per_row(level, x)
        if isinstance(net, EmpiricalField):
            # Far away |v_x| rounds to √N in float32, so the field no longer determines the mean.
            return net.mean(x, z, **condition)
        if self.spread is None:
            return self.field(net, x, z, condition)
        points, z = self._move_inside(x, z)
        mean = euler_step(points, self.field(net, points, z, condition), z, 0.0)
        return self._move_inside(mean, z)[0]  # no data lie beyond upper_norm

    def field(
        self, net: Network, x: Tensor, z: Tensor, condition: Condition | None = None
    ) -> Field:
        """The field that the network predicts at points x (B, *S) and z, (B,) or (B, 1, …, 1)."""
        condition, z = as_condition("condition", condition, net, x), per_row(z, x, "z")
        field_x, field_z = evaluate(net, x, z, condition, self.gamma)
        return Field(field_x, field_z, self.gamma, self.z_exp, self.substitution)

    def _move_inside(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Points and their z. Points beyond upper_norm are moved there along their field lines.

        Far away, field lines are straight lines to (center, 0). So a network gives nearly the same
        mean at upper_norm. The means differ by (N + 1) v/upper_norm at most, where v is the largest
        variance of the data in any direction.
        """
        center = self._center(x)
        offset = (x - center).reshape(x.shape[0], self.N)
        # Squares of a large spread overflow in float32.
        norm = torch.linalg.vector_norm(offset, dim=1, dtype=wide_dtype(x.device))
        # No branch on values, which would synchronise with a GPU. At t = 1 lerp returns x exactly.
        t = (self.upper_norm / norm.clamp(min=self.upper_norm)).to(x.dtype)
        return torch.lerp(center, x, over_samples(t, x)), z * t

    def _grid(self, schedule: str, steps: int, last: float) -> list[float]:
        make_grid = SCHEDULES[schedule]
        if self.spread is not None:
            levels = [self.z_max] if steps == 1 else make_grid(self.z_max, last, steps - 1)
            return [*levels, 0.0]
        if steps == 1 or last == self.z_min:
            return make_grid(self.z_max, self.z_min, steps)
        return [*make_grid(self.z_max, last, steps - 1), self.z_min]

    def empirical(self, references: References) -> EmpiricalField:
        """The exact field of references (M, *S) as a network; its samples are the references.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> flow.sample(flow.empirical(torch.ones(1, 2)), 1, steps=20).round(decimals=2)
        tensor([[1., 1.]])
        """
        self._check_references(references)
        return EmpiricalField(references, self.gamma)
