"""The base of flows: levels, noise, and the posterior mean that a network implies.

With levels σ = r/√D, where r is the length of the augmented vector, the ODE of :class:`pfgm.Flow`
is the same for every D (PFGM++, arXiv 2302.04265, section 3.3). At D = 1, σ is PFGM's z.
"""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import draws
from ..common.checks import check_dimensions, check_dtype, check_floating, check_tensor, layout_hint
from ..common.numbers import LARGEST, non_negative, whole
from ..common.tensors import dequantise, over_samples
from ..functional.levels import Level
from ..functional.steps import Field, implied_mean
from ..solvers import SolverFunction, as_solver
from .conditions import Condition, Network, as_condition


class Defaults(NamedTuple):
    """Defaults of :meth:`pfgm.Flow.sample`."""

    solver: str
    steps: int
    schedule: str


class Parametrisation(ABC):
    """Shape, levels and noise of a flow, and the meaning of its networks' output."""

    shape: tuple[int, ...]
    """S, the shape of one sample."""
    N: int
    """The number of values in a sample."""
    D: float
    """The number of augmented dimensions; infinity for diffusion."""
    fitted_levels: dict[str, dict[int, list[float]]]
    """Levels by solver and number of steps, from ``fit_levels``. Not part of ``config``."""
    _settings: tuple[str, ...]
    """The names of the hyper-parameters beside the shape."""
    _warned_of_range: bool = False
    """Whether ``from_data`` has warned that images are not in [-1, 1]."""

    def __init__(self, shape: Sequence[int]) -> None:
        if not isinstance(shape, Iterable):
            raise TypeError(f"shape must be a tuple, such as (2,) or (3, 32, 32), got {shape!r}.")
        sizes = tuple(shape)
        check_dimensions(sizes)
        self.shape = tuple(whole(f"shape[{i}]", n) for i, n in enumerate(sizes))
        self.N = math.prod(self.shape)
        self.fitted_levels = {}

    @property
    @abstractmethod
    def first_level(self) -> float:
        """The level of the prior: z_max or sigma_max."""

    @property
    @abstractmethod
    def last_level(self) -> float:
        """The lowest level at which a network is evaluated: z_min or sigma_min."""

    @abstractmethod
    def _predict(
        self, net: Network, x: Tensor, level: Level, condition: Condition
    ) -> Field | Tensor:
        """What the network predicts at points x of a level: the field or the posterior mean."""

    @property
    def _largest_norm(self) -> float:
        """The largest distance of the prior's points from its center."""
        return math.inf

    @property
    def _unit(self) -> float:
        """The unit of absolute tolerances: the data's spread, about 0.5 for images."""
        return 0.5

    def _center(self, x: Tensor) -> Tensor | float:
        """The center of the prior: 0, or a tensor (*S) in the dtype and on the device of x."""
        return 0.0

    @property
    def config(self) -> dict[str, Any]:
        """Every hyper-parameter, JSON-able: ``type(flow)(**flow.config)`` is the same flow."""
        return {"shape": list(self.shape), **{name: getattr(self, name) for name in self._settings}}

    @property
    def defaults(self) -> Defaults:
        """Solver, steps and schedule of sampling: multistep on rho.

        There are 10 steps, 20 below 64 values in a sample, and 40 for up to 16 values: with fewer,
        the spread of samples of few values would be off by more than 2 %.
        """
        return Defaults(solver="multistep", steps=self.default_steps("multistep"), schedule="rho")

    def default_steps(self, solver: str | SolverFunction) -> int:
        """The default number of steps of a solver.

        They are those of :attr:`defaults`, but at least 18 for heun, as published for EDM, and 1
        for consistency.
        """
        chosen = as_solver(solver)
        if chosen.few_step:
            return 1
        return max(40 if self.N <= 16 else 20 if self.N < 64 else 10, chosen.least_steps)

    def __repr__(self) -> str:
        named = (
            f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={reprlib.repr(value)}"
            for name, value in self.config.items()
            if name != "shape"
        )
        solver, steps, schedule = self.defaults
        return (
            f"{type(self).__name__}({self.shape}, {', '.join(named)})\n"
            f"  levels {self.first_level:.4g} to {self.last_level:.4g}, N = {self.N}, "
            f"D = {self.D:g}\n"
            f"  samples by {solver} in {steps} steps on {schedule!r}"
        )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.config == other.config

    def __hash__(self) -> int:
        return hash((type(self).__name__, *map(str, self.config.items())))

    def radius(self, sigma: float) -> float:
        """r = σ √D, the length of the augmented vector at a level; infinite for D = ∞.

        At D = 1 the level of :class:`pfgm.PoissonFlow` is z, which is r itself.
        """
        return non_negative("sigma", sigma) * math.sqrt(self.D)

    def sigma(self, radius: float) -> float:
        """σ = r/√D, the level at which the augmented vector has the length ``radius``.

        >>> import pfgm
        >>> pfgm.PoissonFlowPP((2,), D=64).sigma(640.0)
        80.0
        """
        if math.isinf(self.D):
            raise ValueError("D must be finite for levels to have a radius, got infinity.")
        return non_negative("radius", radius) / math.sqrt(self.D)

    def noise(self, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws noise (B, *S) of levels sigma (B,) from the perturbation kernel around 0.

        Levels may also have the shape (B, 1, …, 1).

        The noise is σ g/√(χ²_D/D) with g ~ N(0, I), a multivariate Student distribution with D
        degrees of freedom. That is p_r(x̃ | x) ∝ 1/(‖x̃ − x‖² + r²)^((N + D)/2) with r = σ √D
        (PFGM++, equation 3).
        """
        if not isinstance(sigma, Tensor):
            raise TypeError(f"sigma must be a torch.Tensor, (B,), got {type(sigma).__name__}.")
        if sigma.ndim == 1 + len(self.shape) and sigma.numel() == sigma.shape[0]:
            sigma = sigma.flatten()
        if sigma.ndim != 1:
            raise ValueError(
                "sigma must have shape (B,), or (B, 1, …, 1) with a 1 for each dimension of a "
                f"sample, got {tuple(sigma.shape)}."
            )
        shape = (sigma.shape[0], *self.shape)
        g = draws.normal(shape, generator, dtype=sigma.dtype, device=sigma.device)
        if self.D <= LARGEST:
            # In float64, because for a small D draws can underflow in float32.
            half = torch.full(sigma.shape, self.D / 2, dtype=torch.float64, device=sigma.device)
            spread = torch._standard_gamma(half, generator=generator) / half
            smallest = torch.finfo(sigma.dtype).tiny
            sigma = sigma * spread.clamp(min=smallest).rsqrt().to(sigma.dtype)
        return over_samples(sigma, g) * g

    def denoise(
        self, net: Network, x: Tensor, level: Level, condition: Condition | None = None
    ) -> Tensor:
        """The posterior mean (B, *S) that the network implies at points x of a level, z or sigma.

        The level is a number or a tensor (B,) or (B, 1, …, 1). The mean is differentiable in x and
        in the network's parameters. It is new memory, never that of the network's output.
        """
        condition = as_condition("condition", condition, net, x)
        prediction = self._predict(net, x, level, condition)
        return implied_mean(x, prediction, level)

    def _check_x(self, x: Tensor, name: str = "x", hint: str = "") -> None:
        """Raises an error unless x is floating point of shape (B, *S)."""
        self._check_shape(x, name)
        check_floating(name, x, hint)

    def _check_shape(self, x: Tensor, name: str) -> None:
        check_tensor(name, x)
        if x.ndim == 0 or x.shape[1:] != self.shape:
            raise ValueError(
                f"{name} must have shape (B, *S) with S = {self.shape}, got {tuple(x.shape)}."
                + layout_hint(x.shape[1:], self.shape)
            )

    def _to_floating(self, x: Tensor, name: str = "x") -> Tensor:
        """Checked data as floating point; uint8 means u/127.5 − 1."""
        self._check_shape(x, name)
        check_dtype(name, x)
        return dequantise(x, torch.float32) if x.dtype == torch.uint8 else x
