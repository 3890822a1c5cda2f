"""The Poisson flow of PFGM: perturbation, loss, prior and sampling, one augmented dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .backends.reference import dequantise, wide_dtype
from .base import (
    Condition,
    Defaults,
    Flow,
    Network,
    by_label,
    check_dtype,
    common_device,
    non_negative,
    per_row,
    positive,
)
from .functional import field_fn
from .references import References, ReferenceSet
from .solvers import SCHEDULES
from .steps import Field, Level

__all__ = ["EmpiricalField", "PoissonFlow"]

# |ε_z| below which restrict_M shortens the range of m, and by how much (PFGM, appendix B.1.1).
_RESTRICT_BELOW, _RESTRICT_TO = 0.005, 0.7
_SMALLEST_Z = 1e-10


class EmpiricalField(nn.Module):
    """The exact field of the references as a network: sampling without any training.

    Forward takes x (B, *S) and z (B,) and returns (field_x, field_z) of :func:`pfgm.field_fn`.
    """

    references: References

    def __init__(self, references: References, gamma: float = 5.0) -> None:
        super().__init__()
        if isinstance(references, Tensor):
            self.register_buffer("references", references, persistent=False)
        else:
            self.references = references
        self.gamma = gamma

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return field_fn(x, z, self.references, gamma=self.gamma)


class PoissonFlow(Flow):
    """PFGM (arXiv 2209.11178): data are charges on z = 0, samples follow field lines back to it.

    A network is any callable ``net(x, z, **condition) -> (field_x, field_z)`` with x (B, *S) and
    z (B,), whose results have the shapes of x and z. All randomness comes from torch generators, on
    the device of the tensors.

    Args:
        shape: S, the shape of one sample.
        M: the largest exponent of the perturbation (1 + tau)^m. One of M and data_norm is needed;
            M goes before data_norm.
        data_norm: average norm of a sample, from which M follows (appendix B.1.1).
        sigma: standard deviation of the perturbation at m = 0, in the units of the data.
        tau: growth of the perturbation.
        gamma: softening in the field's normalisation.
        z_max: where sampling starts; from M unless given.
        z_min: where it ends.
        upper_norm: largest norm of a prior sample; from M unless given.
        restrict_M: draw m from [0, 0.7 M] where |ε_z| < 0.005 (published for images).
        z_exp: below this z, field_z is replaced by what field_x implies (appendix B.2.3).
        substitution: "exact" inverts the normalisation; "published" neglects z beside ‖x − mean‖.

    Raises:
        ValueError: an argument is out of range.

    >>> import torch
    >>> flow = PoissonFlow((2,), data_norm=1.0)
    >>> circle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> samples = flow.sample(flow.empirical(circle), 16, generator=torch.Generator())
    >>> bool((samples.norm(dim=1) - 1).abs().max() < 0.01)
    True
    """

    D = 1.0
    defaults = Defaults(solver="multistep", steps=10, schedule="rho")

    def __init__(
        self,
        shape: Sequence[int],
        *,
        M: float | None = None,
        data_norm: float | None = None,
        sigma: float = 0.01,
        tau: float = 0.03,
        gamma: float = 5.0,
        z_max: float | None = None,
        z_min: float = 1e-3,
        upper_norm: float | None = None,
        restrict_M: bool = True,
        z_exp: float = 5.0,
        substitution: Literal["exact", "published"] = "exact",
    ) -> None:
        super().__init__(shape)
        self.sigma = positive("sigma", sigma)
        self.tau = positive("tau", tau)
        self.gamma = non_negative("gamma", gamma)
        if M is None:
            M = self._exponent(data_norm)
        self.M = positive("M", M)
        growth = _growth(self.sigma, self.tau, self.M)
        self.z_max = positive("z_max", math.sqrt(2 / math.pi) * growth if z_max is None else z_max)
        self.z_min = positive("z_min", z_min)
        if self.z_min >= self.z_max:
            raise ValueError(
                f"z_min is {z_min}; allowed is less than z_max, which is {self.z_max}."
            )
        self.upper_norm = positive(
            "upper_norm", math.sqrt(self.N) * growth if upper_norm is None else upper_norm
        )
        self.restrict_M = bool(restrict_M)
        self.z_exp = non_negative("z_exp", z_exp)
        if substitution not in ("exact", "published"):
            raise ValueError(
                f"substitution is {substitution!r}; allowed are 'exact' and 'published'."
            )
        self.substitution = substitution

    def _exponent(self, data_norm: float | None) -> float:
        if data_norm is None:
            raise ValueError("neither M nor data_norm given; one of them is needed.")
        ratio = positive("data_norm", data_norm) ** 2 / (2 * math.sqrt(self.N) * self.sigma**2)
        exponent = int(0.75 * math.log(ratio) / math.log1p(self.tau)) + 1
        if exponent < 1:
            raise ValueError(
                f"data_norm is {data_norm}, too small for sigma={self.sigma}; scale the data up or "
                "sigma down."
            )
        return exponent

    @classmethod
    def from_data(cls, data: References, **overrides: Any) -> PoissonFlow:
        """The flow for data (n, *S), uint8 (u/127.5 − 1) or floating point; measures their norm.

        Data may be a :class:`pfgm.ReferenceSet`, too.

        >>> import torch
        >>> PoissonFlow.from_data(torch.ones(8, 1, 4, 4), tau=0.05).shape
        (1, 4, 4)
        """
        if data.ndim < 1 or len(data) == 0:
            raise ValueError(f"data has shape {tuple(data.shape)}; allowed is (n, *S) with n ≥ 1.")
        data_norm = data.norm if isinstance(data, ReferenceSet) else _average_norm(data)
        if not math.isfinite(data_norm):
            raise ValueError("data holds NaN or infinity; only finite values are allowed.")
        return cls(data.shape[1:], **{"data_norm": data_norm, **overrides})

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
        return {
            "shape": list(self.shape),
            "M": self.M,
            "sigma": self.sigma,
            "tau": self.tau,
            "gamma": self.gamma,
            "z_max": self.z_max,
            "z_min": self.z_min,
            "upper_norm": self.upper_norm,
            "restrict_M": self.restrict_M,
            "z_exp": self.z_exp,
            "substitution": self.substitution,
        }

    @property
    def first_level(self) -> float:
        return self.z_max

    @property
    def last_level(self) -> float:
        return self.z_min

    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Moves data off the plane z = 0 (Algorithm 2).

            m ~ U[0, M],  ε_z ~ N(0, σ²),  ε_x ~ N(0, σ² I)
            x̃ = x + (1 + τ)^m ε_x,  z = (1 + τ)^m |ε_z|

        which is the paper's ‖ε_x‖ (1 + τ)^m u with u uniform on the sphere, as norm and direction
        of a normal vector are independent.

        Args:
            x: (B, *S) clean data; uint8 means u/127.5 − 1.
            generator: on the device of x.

        Returns:
            x̃ (B, *S) and z (B,), at least 1e-10.

        Raises:
            ValueError: x has another sample shape.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> x_perturbed, z = flow.perturb(torch.zeros(8, 2))
        >>> x_perturbed.shape, z.shape
        (torch.Size([8, 2]), torch.Size([8]))
        """
        x = self._floating(x)
        dtype, device = x.dtype, x.device
        m = self.M * torch.rand(len(x), generator=generator, dtype=dtype, device=device)
        noise_z = torch.randn(len(x), generator=generator, dtype=dtype, device=device)
        noise_z = self.sigma * noise_z.abs()
        noise_x = torch.randn(x.shape, generator=generator, dtype=dtype, device=device)
        noise_x = self.sigma * noise_x
        if self.restrict_M:
            m = torch.where(noise_z < _RESTRICT_BELOW, _RESTRICT_TO * m, m)
        growth = (1 + self.tau) ** m
        x_perturbed = x + self._rows(growth) * noise_x
        return x_perturbed, (growth * noise_z).clamp(min=_SMALLEST_Z)

    def loss(
        self,
        net: Network,
        x: Tensor,
        references: References | None = None,
        generator: torch.Generator | None = None,
        *,
        condition: Condition | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """Training loss: batch mean of ½ ‖net(x̃, z) − v‖² over the N + 1 components of the field.

        (Algorithm 1; summed over the components as published.)

        Args:
            net: the network being trained.
            x: (B, *S) clean data.
            references: (M, *S) data whose field v is the target; must contain the rows of x. None
                means x itself. The larger, the less the target varies from batch to batch.
            generator: of the perturbation, on the device of x.
            condition: keyword arguments of the network. With "labels" (B,) in it, each point's
                target is the field of the references of its label, and of all where it is below 0.
            reference_labels: (M,) labels of the references; not needed where references is None.

        Returns:
            A scalar, float32 at least.

        Raises:
            ValueError: shapes do not fit, or those of the network's results.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> data = torch.randn(64, 2)
        >>> float(flow.loss(flow.empirical(data), data))
        0.0
        """
        x = self._floating(x)
        condition = condition or {}
        labels = condition.get("labels")
        if references is None:
            references, reference_labels = x, labels
        x_perturbed, z = self.perturb(x, generator)
        with torch.no_grad():
            target_x, target_z = by_label(
                self._target, x_perturbed, z, references, labels, reference_labels
            )
        field_x, field_z = _evaluate(net, x_perturbed, z, condition)
        error_x = (field_x.to(target_x.dtype) - target_x).flatten(1).square().sum(1)
        error_z = (field_z.to(target_z.dtype) - target_z).square()
        return 0.5 * (error_x + error_z).mean()

    def _target(self, x: Tensor, z: Tensor, references: References) -> tuple[Tensor, Tensor]:
        return field_fn(x, z, references, gamma=self.gamma)

    def prior(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        clip: bool = True,
    ) -> Tensor:
        """Points (n, *S) at z = z_max, where the field lines of far-away charges are all alike.

            x = z_max g / |g₁|,  g ~ N(0, I_N),  g₁ ~ N(0, 1)

        a multivariate Cauchy distribution, the projection of the uniform hemisphere onto z = z_max
        (section 3.3). ``clip`` brings ‖x‖ into [1, upper_norm], keeping the direction: larger norms
        are never trained on. It binds for about half of all draws; ``clip=False`` is the exact
        prior.

        >>> import torch
        >>> flow = PoissonFlow.cifar10()
        >>> bool(flow.prior(4).flatten(1).norm(dim=1).max() <= 3000.1)
        True
        """
        self._check_n(n)
        device = common_device(device, generator)
        direction = torch.randn(n, self.N, generator=generator, device=device)
        scale = torch.randn(n, 1, generator=generator, device=device).abs()
        norm = direction.norm(dim=1, keepdim=True)
        radius = self.z_max * norm / scale.clamp(min=torch.finfo(scale.dtype).tiny ** 0.5)
        if clip:
            radius = radius.clamp(1.0, self.upper_norm)
        x: Tensor = radius * (direction / norm)
        return x.view(n, *self.shape)

    def _slope(self, net: Network, x: Tensor, level: Level, condition: Condition) -> Field:
        field_x, field_z = _evaluate(net, x, per_row(level, x), condition)
        return Field(field_x, field_z, self.gamma, self.z_exp, self.substitution)

    def _grid(self, schedule: str, steps: int, last: float) -> list[float]:
        if steps == 1 or last == self.z_min:
            return SCHEDULES[schedule](self.z_max, self.z_min, steps)
        return [*SCHEDULES[schedule](self.z_max, last, steps - 1), self.z_min]

    def empirical(self, references: References) -> EmpiricalField:
        """The exact field of references (M, *S) as a network: samples are the references.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> flow.sample(flow.empirical(torch.ones(1, 2)), 1, steps=20).round(decimals=2)
        tensor([[1., 1.]])
        """
        self._check_references(references)
        return EmpiricalField(references, self.gamma)


def _growth(sigma: float, tau: float, M: float) -> float:
    """sigma (1 + tau)^M, where the numbers of the perturbation are those of float32."""
    most = math.log(torch.finfo(torch.float32).max)
    if max(math.log(sigma), 0.0) + M * math.log1p(tau) > most:
        raise ValueError(
            f"M is {M} with sigma {sigma} and tau {tau}; allowed is an M for which "
            "sigma (1 + tau)^M is a number of float32, at most 3.4e38."
        )
    return float(sigma * (1 + tau) ** M)


def _average_norm(data: Tensor) -> float:
    check_dtype("data", data)
    norms = [
        dequantise(rows, wide_dtype(data.device)).flatten(1).norm(dim=1)
        for rows in data.reshape(len(data), -1).split(1024)
    ]
    return float(torch.cat(norms).mean())


def _evaluate(net: Network, x: Tensor, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    found = net(x, z, **condition)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise ValueError(
            f"net returned a {type(found).__name__}; needed is (field_x, field_z), the field at x "
            "and z (a denoiser is a network of PoissonFlowPP)."
        )
    field_x, field_z = found
    if field_x.shape != x.shape or field_z.shape != z.shape:
        raise ValueError(
            f"net returned shapes {tuple(field_x.shape)} and {tuple(field_z.shape)}; needed are "
            f"those of x and z, {tuple(x.shape)} and {tuple(z.shape)}."
        )
    return field_x, field_z
