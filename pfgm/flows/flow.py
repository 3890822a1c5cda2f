"""What all flows share: how they sample, take conditions and check what they are given.

A flow carries a prior at its first level down to data at its last one, along

    dx/dσ = (x − mean(x, σ))/σ

the same equation for every number D of augmented dimensions, with σ = r/√D for the length r of the
augmented vector (PFGM++, arXiv 2302.04265, section 3.3). What differs is the parametrisation: a
network of :class:`pfgm.PoissonFlow` predicts the field, one of :class:`pfgm.PoissonFlowPP` the
posterior mean itself. At D = 1, σ is PFGM's z.
"""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from ..common.checks import (
    allocating,
    check_choice,
    check_dimensions,
    check_dtype,
    is_number,
    positive,
)
from ..common.messages import progress_bar
from ..common.tensors import common_device, dequantise, evaluating, network_device
from ..functional import steps as ode_steps
from ..functional.steps import Field, Level
from ..references import References, ReferenceSet
from ..solvers import SAMPLERS, SCHEDULES, Callback, StepInfo
from . import editing, likelihood

__all__ = ["Condition", "Flow", "Network"]

Network = Callable[..., Any]
Condition = Mapping[str, Any]

# Levels and scales become numbers of float32, in which points are computed.
_MOST_STEPS = 1_000_000  # all their levels are held at once; published samplers take up to 1000


class Defaults(NamedTuple):
    """How :meth:`Flow.sample` goes about it unless told otherwise."""

    solver: str
    steps: int
    schedule: str


class Flow(ABC):
    """Base of :class:`pfgm.PoissonFlow` and :class:`pfgm.PoissonFlowPP`."""

    shape: tuple[int, ...]
    """S, the shape of one sample."""
    N: int
    """The number of values in a sample."""
    D: float
    """The number of augmented dimensions; infinity for diffusion."""
    defaults: Defaults

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        check_dimensions(self.shape)
        if not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise ValueError(f"shape is {self.shape}; allowed are positive integers.")
        self.N = math.prod(self.shape)

    # ---- what a parametrisation gives ----

    @property
    @abstractmethod
    def first_level(self) -> float:
        """The level of the prior: z_max, or sigma_max."""

    @property
    @abstractmethod
    def last_level(self) -> float:
        """The level of the last evaluation of a network: z_min, or sigma_min."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Every hyper-parameter, JSON-able: ``type(flow)(**flow.config)`` is the same flow."""

    @abstractmethod
    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, *S) around data x, and their levels (B,)."""

    @abstractmethod
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
        """The loss of training, a scalar."""

    @abstractmethod
    def prior(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Points (n, *S) at the first level."""

    @abstractmethod
    def empirical(self, references: References) -> nn.Module:
        """The exact network of references (M, *S)."""

    @abstractmethod
    def _slope(self, net: Network, x: Tensor, level: Level, condition: Condition) -> Field | Tensor:
        """What the network says of points x: a field, or the posterior mean."""

    @abstractmethod
    def _grid(self, schedule: str, steps: int, last: float) -> list[float]:
        """The levels of so many steps, from the first; the last step begins no lower than last."""

    # ---- what a flow may say otherwise ----

    @property
    def largest_norm(self) -> float:
        """The largest distance of a point of the prior from its center."""
        return math.inf

    @property
    def unit(self) -> float:
        """Length of which absolute tolerances are multiples: the spread, about 0.5 for images."""
        return 0.5

    def _center(self, x: Tensor) -> Tensor | float:
        """Where the prior is centred: 0, or (*S) in the dtype and on the device of x."""
        return 0.0

    # ---- what follows ----

    def __repr__(self) -> str:
        config = {name: value for name, value in self.config.items() if name != "shape"}
        named = (f"{name}={reprlib.repr(value)}" for name, value in config.items())
        return f"{type(self).__name__}({self.shape}, {', '.join(named)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.config == other.config

    def __hash__(self) -> int:
        return hash((type(self).__name__, *map(str, self.config.items())))

    def noise(self, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws (B, *S) from the perturbation kernel at levels sigma (B,), centred at 0.

        σ g/√(χ²_D/D) with g ~ N(0, I): a multivariate Student distribution with D degrees of
        freedom, exactly p_r(x̃ | x) ∝ 1/(‖x̃ − x‖² + r²)^((N + D)/2) of PFGM++, equation 3, r = σ √D.
        """
        shape = (len(sigma), *self.shape)
        g = torch.randn(shape, generator=generator, dtype=sigma.dtype, device=sigma.device)
        if math.isfinite(self.D):
            # In float64: a small D has draws that float32 does not hold.
            half = torch.full(sigma.shape, self.D / 2, dtype=torch.float64, device=sigma.device)
            spread = torch._standard_gamma(half, generator=generator) / half
            smallest = torch.finfo(sigma.dtype).tiny
            sigma = sigma * spread.clamp(min=smallest).rsqrt().to(sigma.dtype)
        return self._rows(sigma) * g

    def _noisy(self, x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
        return x + self.noise(x.new_full((len(x),), level), generator)

    def denoise(
        self, net: Network, x: Tensor, level: Level, condition: Condition | None = None
    ) -> Tensor:
        """The posterior mean (B, *S) that the network implies at points x of a level, z or sigma.

        The level is one for all, or (B,). Differentiable in x and in the network's parameters. The
        result has memory of its own, whatever the network returns.
        """
        slope = self._slope(net, x, level, condition or {})
        return ode_steps.mean_of(x, slope, level)

    @overload
    def sample(
        self, net: Network, n: int, *, return_nfe: Literal[False] = ..., **options: Any
    ) -> Tensor: ...

    @overload
    def sample(
        self, net: Network, n: int, *, return_nfe: Literal[True], **options: Any
    ) -> tuple[Tensor, int]: ...

    def sample(
        self,
        net: Network,
        n: int,
        *,
        solver: str | None = None,
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        last: float | None = None,
        condition: Condition | None = None,
        guidance: float | None = None,
        unconditional: Condition | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        x_init: Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """Samples (n, *S): the prior carried from the first level to the last.

        Args:
            net: the network; a module is in evaluation mode while it samples.
            n: how many.
            solver: "euler", "heun", "multistep" or "rk45", or "consistency" for a few-step model
                (:mod:`pfgm.solvers`), which no network is checked to be: of another it gives
                averages of data.
            steps: solver steps; rk45 chooses its own.
            schedule: spacing of the steps, "log" (published for PFGM) or "rho", or the levels
                themselves, decreasing.
            last: level, z or sigma, from which the last step goes to the end at once. Where it is
                noise that nobody sees, fewer steps do as well.
            condition: keyword arguments of the network, such as {"labels": labels}, labels (n,).
            guidance: weight w of classifier-free guidance (arXiv 2207.12598): the posterior mean is
                mean_u + w (mean_c − mean_u), twice the evaluations. None or 1 is the condition
                alone, above 1 exaggerates it.
            unconditional: the network's keyword arguments for mean_u; none unless given.
            generator: of the prior, and of the noise that "consistency" adds.
            device: None takes that of x_init, else of the generator, else of the network's
                parameters, else the CPU.
            x_init: (n, *S), points at the first level in place of the prior.
            callback: gets a dict (step, z, x, mean, nfe) before each step; returning True stops the
                run, which then returns that x.
            progress: show a progress bar.
            return_nfe: return the number of evaluations of the network too.
            **options: of the solver, such as rtol and atol of rk45, and project of :meth:`solve`.

        Raises:
            ValueError: an argument is out of range, or the network's results have wrong shapes or
                are not finite.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> net = flow.empirical(torch.eye(2))
        >>> x, nfe = flow.sample(net, 3, solver="heun", steps=8, return_nfe=True)
        >>> x.shape, nfe
        (torch.Size([3, 2]), 15)
        """
        solver = self.defaults.solver if solver is None else solver
        grid = self.grid(steps, schedule, last)
        x, nfe = self._initial(net, n, generator, device, x_init), 0
        check_choice("solver", solver, SAMPLERS)
        if solver == "consistency":
            options["noise"] = functools.partial(self._noisy, generator=generator)
        if n > 0:
            x, nfe = self.solve(
                net,
                x,
                grid,
                solver=solver,
                condition=condition,
                guidance=guidance,
                unconditional=unconditional,
                callback=callback,
                progress=progress,
                **options,
            )
        return (x, nfe) if return_nfe else x

    def grid(
        self,
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        last: float | None = None,
    ) -> list[float]:
        """The levels of a run, from the first: ``steps`` + 1 by name, or those given, checked.

        >>> import pfgm
        >>> [round(z, 3) for z in pfgm.PoissonFlow.cifar10().grid(3, "log")]
        [40.0, 1.17, 0.034, 0.001]
        >>> [round(z, 3) for z in pfgm.PoissonFlow.cifar10().grid(3, "log", last=0.1)]
        [40.0, 2.0, 0.1, 0.001]
        """
        steps = self.defaults.steps if steps is None else steps
        schedule = self.defaults.schedule if schedule is None else schedule
        if not isinstance(schedule, str):
            if last is not None:
                raise ValueError(
                    f"last is {last}, but schedule holds all levels; give one of them."
                )
            return _checked_grid(schedule)
        check_choice("schedule", schedule, SCHEDULES)
        check_steps("steps", steps)
        if last is None:
            return self._grid(schedule, steps, self.last_level)
        if not is_number(last) or not self.last_level <= last < self.first_level:
            raise ValueError(
                f"last is {last!r}; allowed is {self.last_level} to below {self.first_level}."
            )
        return self._grid(schedule, steps, float(last))

    def solve(
        self,
        net: Network,
        x: Tensor,
        grid: Sequence[float],
        *,
        solver: str = "rk45",
        condition: Condition | None = None,
        guidance: float | None = None,
        unconditional: Condition | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        project: editing.Projection | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Carries points x (B, *S) along the flow through the levels of a grid, up or down.

        Arguments as in :meth:`sample`, and ``project``, from points and their level to the points
        at which the network is evaluated in their place, new ones of the same shape. Where it sets
        some coordinates and leaves the others alone, or projects onto any linear subspace, this is
        the same as to replace the points themselves; those returned and those that a callback sees
        are not projected.

        Returns the points at the last level of the grid and the number of evaluations of the
        network.
        """
        check_choice("solver", solver, SAMPLERS)
        self._check_x(x)
        if solver == "rk45":
            options.setdefault("atol", 2e-4 * self.unit)
        slope = self._evaluator(net, x, condition, guidance, unconditional)
        if project is not None:
            slope = editing.projected(slope, project)
        total = None if solver == "rk45" else len(grid) - 1
        center = self._center(x)
        with evaluating(net), _shown(callback, total, progress) as shown:
            if solver == "rk45" and isinstance(center, Tensor):
                # Its relative tolerance is of the distance from the data's center.
                slope, shown = _away(slope, center), _back(shown, center)
                x, nfe = SAMPLERS[solver](slope, x - center, grid, shown, **options)
                x = x + center
            else:
                x, nfe = SAMPLERS[solver](slope, x, grid, shown, **options)
        return x, nfe if guidance is None else 2 * nfe

    def log_likelihood(
        self,
        net: Network,
        x: Tensor,
        *,
        estimator: str = "rademacher",
        solver: str = "rk45",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        steps: int = 256,
        levels: int = 256,
        prior_log_prob: Callable[[Tensor], Tensor] | None = None,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
        progress: bool = False,
    ) -> likelihood.LogLikelihood:
        """Log-density of data x (B, *S) under the flow, by its ODE from data up to the prior.

            log p(x) = log p_prior(latent) + ∫ div dt,  div = N − div mean,  t = log σ

        along dx/dt = x − mean (PFGM, arXiv 2209.11178, section 3.3; arXiv 1810.01367, equation 8).
        It is the density of the flow at the last level, z_min or sigma_min: that of data with so
        much noise in them, as the network knows them.

        The prior is the perturbation kernel at the first level around one point: the center of a
        PoissonFlow with a spread, else 0. Data are not all there, so
        this alone costs 0.3 nats (root mean square, not per dimension) on digits at PFGM's z_max,
        0.06 at the sigma_max of PFGM++, whatever the network and the tolerance. Where the density
        at the first level is known, such as
        ``lambda latent: pfgm.log_density(latent, data, sigma=flow.first_level, D=flow.D)``, give it
        as prior_log_prob: with ``flow.empirical(data)`` the result is then the exact mixture at the
        last level.

        Args:
            net: the network, in evaluation mode while it runs; must treat rows separately.
            x: (B, *S), float32 or float64. Bytes and other whole numbers have no density: add
                uniform noise, x = 2 (k + u)/levels − 1 with k in 0 … levels − 1, u ~ U[0, 1).
            estimator: of the divergence. "rademacher" or "gaussian": vᵀ (∂mean/∂x) v with one probe
                v a sample, the same all along; unbiased in nats (Skilling 1989, Hutchinson 1990).
                "exact": N products with the Jacobian in each evaluation.
            solver: "rk45", or "euler" and "heun" on the flow's grid with trapezoids of divergences.
                Where x lies many σ_last from all that the network takes for data, the ODE is stiff:
                rk45 takes thousands of steps and is off all the same, a fixed grid more so. Raise
                the last level there.
            rtol, atol: of rk45, for (x_t − x)/σ_t, in units of the noise, and for the density, on
                the sample with the largest error. Steps, and with them the last digits, depend on
                the batch.
            steps: of euler and heun; rk45 chooses its own.
            levels: L, the number of levels of the data, for bits per dimension.
            prior_log_prob: from latent (B, *S) to log-densities (B,) in place of the prior.
            condition: keyword arguments of the network, such as {"labels": labels}, labels (B,).
            generator: of the probes, on the device of x.
            differentiable: keep the graph, for gradients in x and in the network's parameters:
                memory grows with the evaluations. The exact networks of :meth:`empirical` can be
                differentiated once only, which the divergence does: with them the backward pass
                raises.
            progress: show a progress bar.

        Returns:
            nats (B,), bits_per_dim (B,) = −log₂ p/N + log₂(levels/2), latent (B, *S) at the first
            level, and nfe, the number of evaluations of the network.

        Raises:
            ValueError: an argument is out of range, shapes do not fit, the result of the network or
                of prior_log_prob is not finite, or autograd sees no x in it.
            TypeError: x is not floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlowPP((2,), D=float("inf"), sigma_min=1.0)
        >>> net = flow.empirical(torch.zeros(1, 2))
        >>> flow.log_likelihood(net, torch.zeros(1, 2), estimator="exact").nats  # log(1/2π)
        tensor([-1.8379], dtype=torch.float64)
        """
        self._check_x(x)
        if not x.is_floating_point():
            raise TypeError(
                f"x has dtype {x.dtype}; allowed is floating point: whole numbers have no density, "
                "add uniform noise, 2 (x + u)/levels − 1."
            )
        check_choice("estimator", estimator, likelihood.ESTIMATORS)
        check_choice("solver", solver, likelihood.SOLVERS)
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels is {levels!r}; allowed is an integer of at least 2.")
        common_device(x.device, generator)
        slope = self._evaluator(net, x, condition, None, None)
        with evaluating(net):
            return likelihood.log_likelihood(
                slope,
                x,
                self._rising(steps),
                prior_log_prob or self._prior_log_prob,
                estimator=estimator,
                solver=solver,
                rtol=positive("rtol", rtol),
                atol=positive("atol", atol),
                levels=levels,
                generator=generator,
                differentiable=differentiable,
                progress=progress,
            )

    def _prior_log_prob(self, latent: Tensor) -> Tensor:
        away = latent - self._center(latent)
        return likelihood.centred_prior(away, self.first_level, self.D)

    def _rising(self, steps: int) -> list[float]:
        """So many steps from the last level to the first."""
        grid = self.grid(steps)
        # Where a grid goes on to 0, which no density does, that step is replaced by another.
        return (grid if grid[-1] > 0 else self.grid(steps + 1)[:-1])[::-1]

    # ---- inversion and editing ----

    @overload
    def encode(
        self, net: Network, x: Tensor, *, return_nfe: Literal[False] = ..., **options: Any
    ) -> Tensor: ...

    @overload
    def encode(
        self, net: Network, x: Tensor, *, return_nfe: Literal[True], **options: Any
    ) -> tuple[Tensor, int]: ...

    def encode(
        self,
        net: Network,
        x: Tensor,
        *,
        solver: str = "rk45",
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        rtol: float = 1e-5,
        atol: float | None = None,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """The latents (B, *S) of data: carried up to the first level, where :meth:`decode` starts.

        There and back with rk45 as it stands here comes within 1e-3 of the data, relative, wherever
        the network is smooth on the way: measured at most 5e-4 for held-out digits under a small
        trained network (float32 and float64 alike; heun with 100 steps 1e-4, multistep with 100
        3e-4, euler with 300 1e-2), and 1e-4 under the empirical network of 400 digits for points
        typical of its last level. It does not hold where a network says that no data are near:
        under the empirical one a held-out digit lies hundreds of last levels from any reference,
        where the way up is stiff, and comes back off by 0.1 to 1, or at D = ∞ takes thousands of
        evaluations. Smaller rtol and atol help. Latents may have norms beyond those that
        :meth:`prior` of :class:`PoissonFlow` is clipped to.

        Args:
            net: the network, as in :meth:`sample`.
            x: (B, *S) data, taken as points at the last level; uint8 means u/127.5 − 1. Noise of
                that level, ``x + flow.noise(level)``, makes them typical of it: data themselves lie
                in the middle of it, and their latents have smaller norms than the prior's.
            solver: as in :meth:`sample`. The others reach the accuracy of rk45 with many steps.
            steps: solver steps; rk45 chooses its own. The levels are those of :meth:`sample`; where
                its last step goes to 0 it is left out, and one fewer is taken.
            schedule: as in :meth:`sample`.
            rtol: relative tolerance of rk45, on the root mean square over the batch.
            atol: absolute tolerance of rk45; None is 1e-5, or 2e-5 times the spread of a flow that
                has one.
            return_nfe: return the number of evaluations of the network too.
            **options: of :meth:`sample`: condition, guidance, unconditional, callback, progress.

        Raises:
            ValueError: x has another shape, an argument is out of range, or the network's results
                have wrong shapes or are not finite.
            TypeError: x is neither uint8 nor floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> data = torch.eye(2)
        >>> net = flow.empirical(data)
        >>> latents = flow.encode(net, data)
        >>> flow.decode(net, latents).abs().round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
        """
        grid = editing.grid_above_zero(self, steps, schedule)[::-1]
        x, nfe = editing.carry(self, net, x, grid, solver, rtol, atol, **options)
        return (x, nfe) if return_nfe else x

    @overload
    def decode(
        self, net: Network, latent: Tensor, *, return_nfe: Literal[False] = ..., **options: Any
    ) -> Tensor: ...

    @overload
    def decode(
        self, net: Network, latent: Tensor, *, return_nfe: Literal[True], **options: Any
    ) -> tuple[Tensor, int]: ...

    def decode(
        self,
        net: Network,
        latent: Tensor,
        *,
        solver: str = "rk45",
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        rtol: float = 1e-5,
        atol: float | None = None,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """The data (B, *S) of latents: carried down to the last level, the inverse of encode.

        ``sample(net, len(latent), x_init=latent, ...)`` does the same for a :class:`PoissonFlow` by
        published rules. Otherwise it goes on from the last level to 0, to the posterior mean,
        ``denoise(net, decoded, flow.last_level)``: cleaner, and a map of many points to one, which
        nothing inverts.

        Args:
            latent: (B, *S), floating point, at the first level.
            others: as in :meth:`encode`, with the values given there.

        Raises:
            ValueError, TypeError: as :meth:`encode`.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlowPP((2,), D=16)
        >>> net = flow.empirical(torch.ones(1, 2))
        >>> flow.decode(net, flow.prior(3)).round(decimals=1)
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
        """
        self._check_x(latent)
        grid = editing.grid_above_zero(self, steps, schedule)
        x, nfe = editing.carry(self, net, latent, grid, solver, rtol, atol, **options)
        return (x, nfe) if return_nfe else x

    def interpolate(
        self,
        net: Network,
        x_a: Tensor,
        x_b: Tensor,
        *,
        count: int = 8,
        weights: Sequence[float] | Tensor | None = None,
        condition: Condition | None = None,
        unconditional: Condition | None = None,
        **options: Any,
    ) -> Tensor:
        """Data (W, B, *S) on the way from data x_a to data x_b, between their latents.

        :meth:`encode`, :func:`pfgm.interpolate` along the sphere of the prior, :meth:`decode`.

        Args:
            net: the network.
            x_a: (B, *S) data, where the way starts.
            x_b: (B, *S) data, where it ends.
            count: W, how many, evenly from x_a to x_b, both among them (as they come back).
            weights: (W,) weights of x_b in place of count, as :func:`pfgm.interpolate` takes them.
            condition: as in :meth:`sample`, with values for B rows.
            unconditional: likewise.
            **options: of :meth:`encode` and :meth:`decode` alike, such as solver and rtol.

        Raises:
            ValueError: shapes do not fit, count is below 2, or as :meth:`encode`.
            TypeError: data of a dtype that is not allowed, or of two.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> data = torch.eye(2)
        >>> way = flow.interpolate(flow.empirical(data), data[:1], data[1:], count=5)
        >>> way.shape, way[-1].abs().round(decimals=3)
        (torch.Size([5, 1, 2]), tensor([[0., 1.]]))
        """
        given = editing.count_weights(count) if weights is None else weights
        return editing.between(
            self,
            net,
            x_a,
            x_b,
            given,
            condition=condition,
            unconditional=unconditional,
            **options,
        )

    def rescale(self, latent: Tensor, temperature: float) -> Tensor:
        """Latents with norms multiplied by a temperature, directions kept.

        PFGM's temperature (arXiv 2209.11178, section 4.3): a latent moves toward the middle of the
        prior, below 1, or away from it. A :class:`PoissonFlow` by published rules clips its prior
        to upper_norm and was never trained beyond: there a norm grows up to it and no farther, and
        one beyond it stays as it is.

        Args:
            latent: (B, *S), floating point, of :meth:`prior` or :meth:`encode`.
            temperature: the factor, above 0; 1 changes nothing.

        Raises:
            ValueError: latent has another shape, temperature is out of range.
            TypeError: latent is not floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0, upper_norm=10.0)
        >>> flow.rescale(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 4.0)
        tensor([[6.0000, 8.0000],
                [1.2000, 1.6000]])
        """
        return editing.rescale(self, latent, temperature)

    @overload
    def inpaint(
        self,
        net: Network,
        known: Tensor,
        mask: Tensor,
        *,
        return_nfe: Literal[False] = ...,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def inpaint(
        self,
        net: Network,
        known: Tensor,
        mask: Tensor,
        *,
        return_nfe: Literal[True],
        **options: Any,
    ) -> tuple[Tensor, int]: ...

    def inpaint(
        self,
        net: Network,
        known: Tensor,
        mask: Tensor,
        *,
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        resample: int = 0,
        resample_from: float | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """Data (B, *S) completed where they are not known.

        Before each evaluation of the network the known part is put on the line

            x_known(σ) = known + σ n,   n ~ p_1, the perturbation kernel at level 1

        which a single charge at ``known`` would take it along, and the flow moves the rest. n is
        drawn once a run for the whole sample, so that both parts share its length, as they do under
        the kernel at a finite D (:meth:`noise`), and is the prior's draw divided by its level.
        Where the data differ in the unknown part alone, this is exactly sampling of that part given
        the other, at every D: weights 1/(‖x̃ − x‖² + Dσ²)^((N + D)/2) in which the known part
        contributes σ²‖n_known‖² are those of a flow of D + N_known dimensions, whose kernel is the
        distribution of n_unknown given n_known. In general it is an approximation, as replacement
        is in diffusion (arXiv 2011.13456, appendix I.2): far up the known part says less than it
        does of a clean one.

        Each round of ``resample`` perturbs the completed data by another n to a level at which data
        still differ, and carries them down again, so that what was decided is reconsidered with the
        known part in view (the idea of RePaint, arXiv 2201.09865, in whole runs: noise of a finite
        D cannot be added in parts). Measured: of 200 digits of which the upper half is known and
        which are among the references of an empirical network, 12 to 15 % are found again without,
        about 40 % with 8 rounds and half with 20.

        Args:
            net: the network.
            known: (B, *S) data, read where mask is True alone; uint8 means u/127.5 − 1.
            mask: bool, True where known is known; of any shape that broadcasts to (B, *S).
            steps: as in :meth:`sample`.
            schedule: as in :meth:`sample`.
            resample: how many further rounds; one takes the levels of the grid that remain.
            resample_from: where they start; None is 0.6, or 1.2 times the spread of a flow that has
                one. In the units of the data: about their standard
                deviation, as 0.6 is for images in [-1, 1]; much higher all is decided anew, much
                lower nothing is.
            generator: of the noise, on the device of known.
            callback: as in :meth:`sample`, with the known part in place; each round counts its
                steps from 0, and one that it stops is followed by the next.
            return_nfe: return the number of evaluations of the network too.
            **options: of :meth:`sample`, such as solver, condition, guidance and progress.

        Returns:
            (B, *S), where mask is True exactly as given, and with ``return_nfe`` the evaluations.

        Raises:
            ValueError: shapes do not fit, resample is below 0, or as :meth:`sample`.
            TypeError: mask is not bool, or known neither uint8 nor floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> net = flow.empirical(torch.eye(2))
        >>> known, mask = torch.tensor([[1.0, 9.0]]), torch.tensor([True, False])
        >>> flow.inpaint(net, known, mask).abs().round(decimals=2)
        tensor([[1., 0.]])
        """
        x, nfe = editing.inpaint(
            self,
            net,
            known,
            mask,
            steps=steps,
            schedule=schedule,
            resample=resample,
            resample_from=1.2 * self.unit if resample_from is None else resample_from,
            generator=generator,
            callback=callback,
            **options,
        )
        return (x, nfe) if return_nfe else x

    def _evaluator(
        self,
        net: Network,
        x: Tensor,
        condition: Condition | None,
        guidance: float | None,
        unconditional: Condition | None,
    ) -> Callable[[Tensor, float], Field | Tensor]:
        """The slope as a function of points and level, conditions and guidance in it."""
        given = _on_device(condition or {}, x.device)
        without = _on_device(unconditional or {}, x.device)
        for each in (given, without):
            _check_condition(net, each, len(x))
        if guidance is None:
            return lambda x, level: self._slope(net, x, level, given)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance is {guidance}; allowed is any finite number.")

        def guided(x: Tensor, level: float) -> Tensor:
            mean = self.denoise(net, x, level, without)
            return mean + guidance * (self.denoise(net, x, level, given) - mean)

        return guided

    def _initial(
        self,
        net: Network,
        n: int,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        x_init: Tensor | None,
    ) -> Tensor:
        if x_init is None:
            if device is None and generator is None:
                device = network_device(net)
            with allocating(f"n is {n}, and so many samples of shape {self.shape}"):
                return self.prior(n, generator=generator, device=device)
        if x_init.shape != (n, *self.shape) or not x_init.is_floating_point():
            raise ValueError(
                f"x_init has shape {tuple(x_init.shape)} and dtype {x_init.dtype}; allowed is "
                f"floating point of shape {(n, *self.shape)}."
            )
        return x_init.detach().to(device=device)

    def _check_x(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[1:] != self.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; allowed is (B, *S) with S = {self.shape}."
            )
        check_dtype("x", x)

    def _floating(self, x: Tensor) -> Tensor:
        self._check_x(x)
        return dequantise(x, torch.float32) if x.dtype == torch.uint8 else x

    def _rows(self, values: Tensor) -> Tensor:
        """(B,) so that it multiplies samples (B, *S)."""
        return values.view(-1, *[1] * len(self.shape))

    def _check_references(self, references: References) -> None:
        if references.shape[1:] != self.shape or len(references) == 0:
            raise ValueError(
                f"references has shape {tuple(references.shape)}; allowed is (M, *S) with M ≥ 1 "
                f"and S = {self.shape}."
            )

    def _check_n(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n is {n!r}; allowed is an integer of at least 0.")


# ---- targets of training ----------------------------------------------------------------------


def _selected(references: References, mask: Tensor, x: Tensor) -> Tensor:
    return references[mask.to(references.device)].to(x.device)


def by_label(
    target: Callable[[Tensor, Tensor, References], tuple[Tensor, ...]],
    x: Tensor,
    level: Tensor,
    references: References,
    labels: Tensor | None,
    reference_labels: Tensor | None,
) -> tuple[Tensor, ...]:
    """What ``target(x, level, references)`` says where a point of a label sees only the references
    of that label; a label below 0 is none, and sees all."""
    if labels is None or len(labels) == 0:
        return target(x, level, references)
    if isinstance(references, ReferenceSet):
        if references.sharded:
            raise ValueError(
                f"references is {references!r}, which has no rows of one label in all processes; "
                "with labels in the condition allowed are references that each process has."
            )
        reference_labels = references.labels if reference_labels is None else reference_labels
    if reference_labels is None or reference_labels.shape != references.shape[:1]:
        given = None if reference_labels is None else tuple(reference_labels.shape)
        raise ValueError(
            f"reference_labels has shape {given}; with labels in the condition ({len(references)},)"
            " is needed, so that each point sees the references of its label."
        )
    results: tuple[Tensor, ...] | None = None
    for label in labels.unique().tolist():
        rows = labels == label
        seen = references if label < 0 else _selected(references, reference_labels == label, x)
        if len(seen) == 0:
            raise ValueError(f"reference_labels holds no {label}, which labels does.")
        found = target(x[rows], level[rows], seen)
        if results is None:
            results = tuple(each.new_empty(len(x), *each.shape[1:]) for each in found)
        for whole, part in zip(results, found, strict=True):
            whole[rows] = part
    assert results is not None
    return results


# ---- checks -----------------------------------------------------------------------------------


def per_row(level: Level, x: Tensor) -> Tensor:
    """A level as what a network is given beside points x (B, *S): (B,), of their type."""
    return level.to(x).expand(len(x)) if isinstance(level, Tensor) else x.new_full((len(x),), level)


def check_steps(name: str, steps: object) -> None:
    """Raises ValueError unless a solver can take so many steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(
            f"{name} is {steps!r}; allowed is an integer of at least 1 and at most {_MOST_STEPS}."
        )


def _away(slope: Callable[..., Field | Tensor], center: Tensor) -> Callable[..., Tensor]:
    """The posterior mean less the center, at points that are given less the center."""

    def evaluate(x: Tensor, level: float) -> Tensor:
        points = x + center
        return ode_steps.mean_of(points, slope(points, level), level) - center

    return evaluate


def _back(callback: Callback | None, center: Tensor) -> Callback | None:
    """The callback, shown points and means where they are."""
    if callback is None:
        return None

    def shown(info: StepInfo) -> object:
        mean = None if info["mean"] is None else info["mean"] + center
        return callback({**info, "x": info["x"] + center, "mean": mean})

    return shown


def _checked_grid(levels: Sequence[float]) -> list[float]:
    grid = [float(level) for level in levels]
    inner = grid[:-1]
    if len(grid) < 2 or not all(0 < level < math.inf for level in inner) or not grid[-1] >= 0:
        raise ValueError(
            f"schedule is {grid}; allowed are two or more finite levels above 0, the last may be 0."
        )
    for i, (level, after) in enumerate(pairwise(grid)):
        if not after < level:
            raise ValueError(
                f"schedule is not decreasing: {after} at place {i + 1} follows {level}."
            )
    return grid


def _on_device(condition: Condition, device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in condition.items()
    }


def _check_condition(net: Network, condition: Condition, count: int) -> None:
    """Names that the network takes, and a value a row in every tensor."""
    taken = inspect.signature(net.forward if isinstance(net, nn.Module) else net).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    for name, value in condition.items():
        if name not in taken and inspect.Parameter.VAR_KEYWORD not in kinds:
            others = ", ".join(list(taken)[2:]) or "none"
            raise ValueError(f"condition has {name!r}; the conditions of this network: {others}.")
        if isinstance(value, Tensor) and value.shape[:1] != (count,):
            raise ValueError(
                f"condition[{name!r}] has shape {tuple(value.shape)}; its first size must be that "
                f"of x, {count}."
            )


@contextmanager
def _shown(
    callback: Callback | None, total: int | None, progress: bool
) -> Iterator[Callback | None]:
    """The callback, with a progress bar around it where one is wanted."""
    if not progress:
        yield callback
        return
    with progress_bar(total=total, desc="sampling", unit="step") as bar:

        def show(info: StepInfo) -> object:
            bar.set_postfix(z=f"{info['z']:.3g}", refresh=False)
            bar.update()
            return None if callback is None else callback(info)

        yield show
