"""PFGM++, the Poisson flow with D augmented dimensions; D = ∞ is diffusion."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common import draws
from ..common.checks import check_choice, shape_or_type, untouched
from ..common.images import is_image, warn_channels_last, warn_image_range
from ..common.numbers import LARGEST, as_number, non_negative, positive, whole
from ..common.tensors import common_device, flat_rows, per_row
from ..common.wrappers import network_within
from ..data.opening import Samples
from ..functional import posterior_mean
from ..functional.levels import Level
from ..networks.fields import FieldNetwork
from ..networks.preconditioned import INSTEAD, Preconditioned
from ..networks.registry import KINDS, build, size_of
from ..networks.wrapped import Meaning, WrappedDenoiser, WrappedModule
from ..references import References, ReferenceSet
from ..solvers import SAMPLERS, SCHEDULES, SolverFunction, as_solver, rho_grid
from .conditions import Condition, Network
from .flow import Flow
from .targets import ExactNetwork

# Below this D, the noise σ g/√(χ²_D/D) is often many times larger than σ: above 3 σ in 2 % of draws
# at D = 4 and in 26 % at D = 1.
_SMALL_D = 4
_LARGEST_CHURN = math.sqrt(2) - 1  # relative rise of the level in one step (EDM, algorithm 2)


class EmpiricalDenoiser(ExactNetwork):
    """The exact posterior mean of references as a network, which needs no training.

    ``forward`` takes x (B, *S) and sigma (B,) and returns :func:`pfgm.posterior_mean` (B, *S).
    """

    def __init__(self, references: References, D: float) -> None:
        super().__init__(references)
        self.D = D

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return posterior_mean(x, self.references, sigma=sigma, D=self.D)


class PoissonFlowPP(Flow):
    """PFGM++ (arXiv 2302.04265) with D augmented dimensions; D = ∞ is diffusion (EDM).

    A network is a denoiser: any callable ``net(x, sigma, **condition) -> mean`` with x and mean
    (B, *S) and sigma (B,). :meth:`network` makes one. All random numbers come from torch
    generators, on the device of the tensors.

    Args:
        shape: S, the shape of one sample.
        D: the number of augmented dimensions, any positive number or infinity.
        sigma_min: the lowest level at which the network is evaluated.
        sigma_max: the level of the prior.
        sigma_data: standard deviation of the data's values, for the preconditioning.
        rho: exponent of the schedule "rho" (EDM, equation 5).
        P_mean: mean of log sigma in training.
        P_std: standard deviation of log sigma in training.

    Raises:
        ValueError: an argument is out of range.

    :meth:`sample` has three options more, for the noise of EDM's algorithm 2:

    - churn: S_churn. Before each step of euler or heun (the default then) the level is raised by
      the factor 1 + min(churn/steps, √2 − 1) and noise is added, drawn from the perturbation
      kernel. This is exact for D = ∞ only.
    - churn_range: the lowest and the highest level that is raised.
    - churn_noise: S_noise, which multiplies the standard deviation of the noise.

    >>> import torch
    >>> flow = PoissonFlowPP((2,), D=16)
    >>> circle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> samples = flow.sample(flow.empirical(circle), 16, generator=torch.Generator())
    >>> bool((samples.norm(dim=1) - 1).abs().max() < 0.01)
    True
    """

    _predictions = ("residual", "mean", "noise", "score")
    _preserving = ("mean", "noise")
    _settings = ("D", "sigma_min", "sigma_max", "sigma_data", "rho", "P_mean", "P_std")

    def __init__(
        self,
        shape: Sequence[int],
        *,
        D: float,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        P_mean: float = -1.2,
        P_std: float = 1.2,
    ) -> None:
        super().__init__(shape)
        if D is None:
            raise ValueError(
                "D must be a positive number or infinity, got None. For a published file that does "
                "not say its D, give the D that it was published under, or float('inf') for a file "
                "of EDM."
            )
        value: Any = D  # a config has the text "inf", because JSON has no infinity
        self.D = math.inf if isinstance(value, str) and value == "inf" else float(as_number(value))
        if not self.D > 0:
            shown = D if math.isnan(self.D) else self.D
            raise ValueError(f"D must be a positive number or infinity, got {shown}.")
        self.sigma_min = positive("sigma_min", sigma_min)
        self.sigma_max = positive("sigma_max", sigma_max)
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, {sigma_max}, got {sigma_min}.")
        self.sigma_data = positive("sigma_data", sigma_data)
        self.rho = positive("rho", rho)
        if not 0.1 <= rho <= 1000:  # else levels^(1/rho)^rho loses digits
            raise ValueError(f"rho must be from 0.1 to 1000, got {rho}.")
        log_mean = as_number(P_mean)
        if not abs(log_mean) <= LARGEST:
            raise ValueError(f"P_mean must be a finite number, got {P_mean!r}.")
        self.P_mean, self.P_std = float(log_mean), positive("P_std", P_std)

    @classmethod
    def from_data(
        cls, data: Samples | ReferenceSet, *, D: float, **overrides: Any
    ) -> PoissonFlowPP:
        """The flow for data (n, *S), all that :class:`pfgm.ReferenceSet` takes.

        EDM's hyper-parameters are for values of root mean square 0.5 (arXiv 2206.00364, table 1).
        Here the levels are scaled to the root mean square of the data.

        Warns:
            UserWarning: data look like images with channels last, or like images that are not in
                [-1, 1]; or their spread is below a tenth of their root mean square, so that the
                levels are too high, unless levels are given.

        >>> import torch
        >>> PoissonFlowPP.from_data(torch.full((8, 1, 4, 4), 2.0), D=128).sigma_max
        320.0
        """
        references = data if isinstance(data, ReferenceSet) else ReferenceSet(data)
        warn_channels_last(references.shape[1:])
        if references.rms == 0:
            raise ValueError(
                "data must have a value other than 0, got zeros alone; a table whose rows are all "
                "equal becomes zeros."
            )
        rms = positive("the root mean square of data", references.rms)
        spread = references.measures.std
        if 0 < spread < rms / 10 and not {"sigma_min", "sigma_max"} & overrides.keys():
            warnings.warn(
                f"data have a spread of {spread:.3g} around a mean far from 0; the levels are "
                f"scaled to their root mean square, {rms:.3g}, and are too high for the spread. "
                "Subtract the mean of the data, or use PoissonFlow.from_data, which does so.",
                stacklevel=2,
            )
        scale = rms / 0.5
        scaled = {
            "sigma_min": 0.002 * scale,
            "sigma_max": 80.0 * scale,
            "sigma_data": rms,
            "P_mean": -1.2 + math.log(scale),
        }
        flow = cls(references.shape[1:], D=D, **{**scaled, **overrides})
        if is_image(references.shape[1:]) and references.dtype != torch.uint8:
            flow._warned_of_range = warn_image_range(*references.measures.range)
        return flow

    @property
    def config(self) -> dict[str, Any]:
        """Every hyper-parameter, JSON-able: ``PoissonFlowPP(**flow.config)`` is the same flow."""
        # JSON has no infinity.
        return {**super().config, "D": "inf" if math.isinf(self.D) else self.D}

    @property
    def first_level(self) -> float:
        return self.sigma_max

    @property
    def last_level(self) -> float:
        return self.sigma_min

    def with_D(self, D: float) -> PoissonFlowPP:
        """The flow with another D, and the same levels sigma and hyper-parameters.

        Posteriors of equal σ = r/√D are alike (PFGM++, section 4), so hyper-parameters that were
        tuned at one D, such as EDM's at D = ∞, suit the others too.

        >>> PoissonFlowPP((2,), D=float("inf")).with_D(64).radius(80.0)
        640.0
        """
        return PoissonFlowPP(**{**self.config, "D": D})

    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Perturbed data and their levels, ln σ ~ N(P_mean, P_std²) (EDM, table 1).

        Arguments and errors are those of :meth:`pfgm.PoissonFlow.perturb`. The result is x̃ (B, *S)
        and sigma (B,).

        >>> import torch
        >>> x_perturbed, sigma = PoissonFlowPP((2,), D=16).perturb(torch.zeros(8, 2))
        >>> x_perturbed.shape, sigma.shape
        (torch.Size([8, 2]), torch.Size([8]))
        """
        x = self._to_floating(x)
        normal = draws.normal(x.shape[:1], generator, dtype=x.dtype, device=x.device)
        sigma = (self.P_mean + self.P_std * normal).exp()
        return x + self.noise(sigma, generator), sigma

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
        """The training loss: the batch mean of λ(σ) ‖net(x̃, σ) − target‖².

        The weight λ is (σ² + σ_d²)/(σ σ_d)².

        Other arguments, the result and the errors are those of :meth:`pfgm.PoissonFlow.loss`.

        Args:
            references: None makes the clean x the target (PFGM++, equation 7). Data (M, *S), which
                must contain the rows of x, make their posterior mean the target: the stable target
                (arXiv 2302.00670), which varies less.

        Warns:
            UserWarning: D is below 4 and the network has EDM's preconditioning.

        >>> import torch
        >>> flow = PoissonFlowPP((2,), D=16)
        >>> data = torch.randn(64, 2)
        >>> float(flow.loss(flow.empirical(data), data, references=data))
        0.0
        """
        preconditioned = network_within(net, lambda each: isinstance(each, Preconditioned))
        if self.D < _SMALL_D and preconditioned is not None:
            warnings.warn(
                f"D is {self.D:g}; EDM's preconditioning expects noise of size sigma, "
                f"but at D below {_SMALL_D} the noise is often many times larger, and samples get "
                "worse. At D = 1 PoissonFlow has the same process and a network that suits it.",
                stacklevel=2,
            )
        x, condition = self._checked_batch(x, condition)
        x_perturbed, sigma = self.perturb(x, generator)
        target = x
        if references is not None:
            with torch.no_grad():
                target = posterior_mean(
                    x_perturbed,
                    references,
                    sigma=sigma,
                    D=self.D,
                    labels=condition.get("labels"),
                    reference_labels=reference_labels,
                )
        mean = _evaluate(net, x_perturbed, sigma, condition, self.D)
        wide = torch.promote_types(mean.dtype, torch.float32)
        squared = flat_rows(mean.to(wide) - target.to(wide)).square().sum(1)
        s = sigma.to(wide)
        weight = (s.square() + self.sigma_data**2) / (s * self.sigma_data).square()
        return (weight * squared).mean()

    def prior(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Points (n, *S) at sigma_max from the perturbation kernel around 0: σ_max g/√(χ²_D/D).

        >>> import torch
        >>> PoissonFlowPP((3, 8, 8), D=2048).prior(4).shape
        torch.Size([4, 3, 8, 8])
        """
        whole("n", n, 0)
        device = common_device(device, generator)
        return self.noise(torch.full((n,), self.sigma_max, device=device), generator)

    def _with_noise_of_steps(
        self,
        solver: str | SolverFunction | None,
        steps: int | None,
        schedule: str | Sequence[float] | None,
        options: dict[str, Any],
        generator: torch.Generator | None,
    ) -> tuple[str | SolverFunction | None, str | Sequence[float] | None]:
        churn_range = options.pop("churn_range", (0.0, math.inf))
        scale = positive("churn_noise", options.pop("churn_noise", 1.0))
        pair = isinstance(churn_range, (list, tuple)) and len(churn_range) == 2
        if not pair or not as_number(churn_range[0]) <= as_number(churn_range[1]):
            raise ValueError(
                f"churn_range must be two levels, the lower first, got {churn_range!r}."
            )
        churn = non_negative("churn", options.pop("churn", 0.0))
        if churn == 0:
            return solver, schedule
        solver = solver or "heun"
        if "churn" not in as_solver(solver).options:
            able = ", ".join(name for name, each in SAMPLERS.items() if "churn" in each.options)
            raise ValueError(f"solver must be one of {able} with churn, got {solver!r}.")
        if schedule is None:
            schedule = self.defaults.schedule  # levels are fitted without churn
        count = len(self.grid(steps, schedule, solver=solver)) - 1
        options["churn"] = functools.partial(
            self._churn,
            growth=min(churn / count, _LARGEST_CHURN),
            between=churn_range,
            scale=scale,
            generator=generator,
        )
        return solver, schedule

    def _churn(
        self,
        x: Tensor,
        level: float,
        *,
        growth: float,
        between: tuple[float, float],
        scale: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, float]:
        """Points with noise added and their raised level; unchanged outside the range."""
        if not between[0] <= level <= between[1]:
            return x, level
        raised = level * (1 + growth)
        added = scale * math.sqrt(raised**2 - level**2)
        return self._add_noise(x, added, generator), raised

    def empirical(self, references: References) -> EmpiricalDenoiser:
        """The exact posterior mean of references (M, *S) as a network.

        Its samples are the references.

        >>> import torch
        >>> flow = PoissonFlowPP((2,), D=16)
        >>> flow.sample(flow.empirical(torch.ones(1, 2)), 1).round(decimals=2)
        tensor([[1., 1.]])
        """
        self._check_references(references)
        return EmpiricalDenoiser(references, self.D)

    def _build(self, net: str | type[FieldNetwork], settings: dict[str, Any]) -> nn.Module:
        if isinstance(net, type):
            raise TypeError(
                f"net must be a name or a module for a PoissonFlowPP, got the class {net.__name__}."
            )
        check_choice("net", net, (*KINDS, "edm"))
        settings = {**size_of(net, self.shape), **settings}
        if net == "edm":
            return build(net, {"sigma_data": self.sigma_data, **settings})
        inner = {"network": net, "config": settings}
        return build("denoiser", {**inner, "sigma_data": self.sigma_data})

    def _wrap(self, module: WrappedModule, meaning: Meaning) -> WrappedDenoiser:
        encode, predicts, data_std, variance_preserving = meaning
        data_std = self.sigma_data if data_std is None else data_std
        return WrappedDenoiser(module, encode, predicts, data_std, variance_preserving)

    def _predict(self, net: Network, x: Tensor, level: Level, condition: Condition) -> Tensor:
        return _evaluate(net, x, per_row(level, x), condition, self.D)

    def _grid(self, schedule: str, steps: int, last: float) -> list[float]:
        """steps levels above 0, from sigma_max to ``last``, and then 0."""
        if steps == 1:
            return [self.sigma_max, 0.0]
        if schedule == "rho":
            return [*rho_grid(self.sigma_max, last, steps - 1, self.rho), 0.0]
        return [*SCHEDULES[schedule](self.sigma_max, last, steps - 1), 0.0]


def _evaluate(net: Network, x: Tensor, sigma: Tensor, condition: Condition, D: float) -> Tensor:
    """The network's mean at x and sigma, with its shape checked, and its D if it is exact."""
    exact = network_within(net, lambda each: isinstance(each, EmpiricalDenoiser))
    if isinstance(exact, EmpiricalDenoiser) and exact.D != D:
        raise ValueError(
            f"net must have the D of the flow, {D:g}, got the exact network of D = "
            f"{exact.D:g}; flow.empirical makes the network."
        )
    mean: Tensor = untouched(net, "net", ("x", "sigma"), x, sigma, **condition)
    if not isinstance(mean, Tensor) or mean.shape != x.shape:
        raise ValueError(
            f"net must return a denoiser's mean of the shape of x, {tuple(x.shape)}, got "
            f"{shape_or_type(mean)}.{INSTEAD}"
        )
    return mean
