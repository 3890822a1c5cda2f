"""Solvers of dx/dz = (x − mean(x, z))/z from z_max down to z_min, as plain functions.

:data:`SAMPLERS` holds all of them by name, with what is known of each (:class:`Solver`). They have
the signature ``solver(denoise, x, grid, callback=None) -> (x, nfe)``:

- ``denoise(x, z)`` returns the posterior mean of points x (B, *S) at the level z, a float, or the
  :class:`pfgm.Field` that implies it.
- ``grid`` holds the levels: decreasing, or rising to go from data to the prior. The last may be 0.
- ``callback`` receives a :class:`StepInfo` before each step, and stops the run by returning True.
- ``nfe`` is the number of evaluations of ``denoise``.

The equation is the same for every number of augmented dimensions (PFGM++, arXiv 2302.04265, section
3.3), so z may also be sigma.

Without gradients and without a callback, the steps after the first overwrite their points: a
``denoise`` that keeps its x must clone it. The x passed to a solver is never changed. A ``denoise``
may return the same memory at each call, but must not change x in place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from .common import transforms
from .common.checks import check_choice, untouched
from .common.numbers import is_whole, non_negative
from .common.values import checks_values
from .core.dormand_prince import dormand_prince
from .functional.steps import Field, euler_step, heun_step, implied_mean, multistep_step
from .ops.eager import all_finite

__all__ = [
    "GRID_SOLVERS",
    "SAMPLERS",
    "SCHEDULES",
    "SOLVERS",
    "Callback",
    "DenoiseFunction",
    "Solver",
    "SolverFunction",
    "SolverName",
    "StepInfo",
    "as_solver",
    "consistency",
    "euler",
    "heun",
    "log_grid",
    "multistep",
    "rho_grid",
    "rk45",
]


class StepInfo(TypedDict):
    """What a callback receives before each step."""

    step: int
    """The number of steps so far."""
    z: float
    """The level of x."""
    x: Tensor
    """(B, *S), the points at this level."""
    mean: Tensor
    """(B, *S), the posterior mean of the points: where the flow is heading."""
    nfe: int
    """The number of evaluations of the network so far."""


_LOG_MARGIN = math.log(1e3)  # how far beyond the ends of its grid rk45 may evaluate, in log z

DenoiseFunction = Callable[[Tensor, float], Tensor | Field]
"""From points (B, *S) and their level to their posterior mean, or the field that implies it."""
Callback = Callable[[StepInfo], object]
SolverFunction = Callable[..., tuple[Tensor, int]]
"""A function with the signature of this module. Keyword-only parameters are its options."""
SolverName = Literal["euler", "heun", "multistep", "rk45", "consistency"]
"""The solvers by name; consistency is for few-step models."""
Churn = Callable[[Tensor, float], tuple[Tensor, float]]
"""From points and their level to noisier points and their level, before each step."""
Noise = Callable[[Tensor, float], Tensor]
"""From data and a level to noisy data of that level."""


@dataclass(frozen=True, eq=False)
class Solver:
    """A solver, with what flows, schedulers, evaluations and tests need to know of it.

    It is called as its function is, and refuses results that cannot be those of a run. The function
    receives a copy of the points, so it may change them in place.

    >>> def half(denoise, x, grid, callback=None):
    ...     return denoise(x, grid[0]) / 2, 1
    >>> Solver(half, evaluations=1)(lambda x, z: x, torch.ones(1, 2), [2.0, 1.0])
    (tensor([[0.5000, 0.5000]]), 1)
    """

    function: SolverFunction
    order: int | None = None
    """The order of convergence; None if it is not known."""
    evaluations: int | None = None
    """Evaluations of the network in each step from one level of the grid to the next, except the
    last, which may take fewer. None if the number varies or is not known."""
    least_steps: int = 1
    """The fewest steps that a flow takes unless the caller chooses the number."""
    longest_step: float = math.inf
    """The largest ratio of two neighbouring levels above 0 at which samples are still good."""
    adaptive: bool = False
    """Whether it chooses its own steps, by the options ``rtol`` and ``atol``."""

    @cached_property
    def options(self) -> list[str]:
        """The names of its options. The flow gives some of them, if the solver has them.

        ``churn`` adds noise before a step. ``noise`` adds the noise of a level; a solver with it is
        one for few-step models.
        """
        parameters = inspect.signature(self.function).parameters.values()
        return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]

    @property
    def few_step(self) -> bool:
        """Whether it is for few-step models (:mod:`pfgm.distillation`) and solves no ODE."""
        return "noise" in self.options

    def __call__(
        self,
        denoise: DenoiseFunction,
        x: Tensor,
        grid: Sequence[float],
        callback: Callback | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """The points at the end of a run from x (B, *S), and the number of evaluations."""
        result = self.function(denoise, x.clone(), grid, callback, **options)
        _check_result(result, x)
        return result


def _check_result(result: object, x: Tensor) -> None:
    """Raises ValueError unless the result of a solver can be the end of a run from x."""
    needed, got = _described((x, 0)), _described(result)
    if got != needed:
        raise ValueError(f"solver must return points and evaluations, {needed}, got {got}.")
    points = result[0]  # type: ignore[index]
    # Once a run, so on a GPU too. A graph, a transform and the device "meta" have no values.
    unknown = points.is_meta or torch.compiler.is_compiling() or transforms.in_torch_func()
    if not unknown and not all_finite(points):
        raise ValueError(
            "solver must return finite points, got NaN or infinity. On a GPU pfgm.debug_checks() "
            "tells whether the network returned them."
        )


def _described(value: object) -> str:
    """The type of a result, with the shape, dtype and device of tensors."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype} on {value.device}"
    return "int" if is_whole(value) else type(value).__name__


def log_grid(start: float, end: float, steps: int) -> list[float]:
    """steps + 1 levels from start down to end, uniform in log z (PFGM, section 3.3).

    >>> [round(z, 3) for z in log_grid(100.0, 1.0, 2)]
    [100.0, 10.0, 1.0]
    """
    ratio = math.log(end / start)
    inner = [start * math.exp(ratio * i / steps) for i in range(1, steps)]
    return [start, *inner, end]


def rho_grid(start: float, end: float, steps: int, rho: float = 7.0) -> list[float]:
    """steps + 1 levels from start down to end, uniform in z^(1/rho) (EDM, equation 5).

    >>> [round(z, 3) for z in rho_grid(16.0, 1.0, 2, rho=2.0)]
    [16.0, 6.25, 1.0]
    """
    first, last = start ** (1 / rho), end ** (1 / rho)
    inner = [(first + (last - first) * i / steps) ** rho for i in range(1, steps)]
    return [start, *inner, end]


class _Run:
    """One run of a solver: evaluates, counts evaluations and calls the callback."""

    def __init__(self, denoise: DenoiseFunction, callback: Callback | None) -> None:
        self._denoise, self._callback = denoise, callback
        self.nfe = 0
        self.watched = callback is not None
        # A callback may keep the points it receives, and a derivative needs all of them.
        derived = torch.is_grad_enabled() or transforms.forward_mode() or transforms.in_torch_func()
        self._overwrites = not (self.watched or derived)

    def evaluate(self, x: Tensor, z: float, step: int) -> Tensor | Field:
        self.nfe += 1
        prediction = untouched(self._denoise, "denoise", ("x", "z"), x, z)
        parts = prediction[:2] if isinstance(prediction, Field) else (prediction,)
        if checks_values(x.device) and not all(all_finite(part) for part in parts):
            raise ValueError(f"the network returned NaN or infinity in step {step}, at {z:.6g}.")
        return prediction

    def mean(self, x: Tensor, z: float, step: int) -> Tensor:
        return implied_mean(x, self.evaluate(x, z, step), z)

    def own_copy(
        self, mean: Tensor | None, prediction: Tensor | Field, spare: Tensor | None = None
    ) -> Tensor | None:
        """The mean in memory that no later evaluation writes to: in ``spare`` if possible.

        The mean of a field is new memory already. A mean from ``denoise`` may be a buffer that it
        returns at each call.
        """
        if mean is None or isinstance(prediction, Field):
            return mean
        if spare is not None and self._overwrites and spare.dtype == mean.dtype:
            return spare.copy_(mean)
        return mean.clone()

    def reusable(self, spare: Tensor | None, *read: Tensor) -> Tensor | None:
        """``spare`` if a result may overwrite it, else None; ``read`` are tensors still needed."""
        if spare is None or not self._overwrites:
            return None
        memory = spare.untyped_storage().data_ptr()
        return None if any(t.untyped_storage().data_ptr() == memory for t in read) else spare

    def euler(
        self, x: Tensor, z: float, next_z: float, step: int, spare: Tensor | None
    ) -> tuple[Tensor, bool]:
        """The points after an Euler step, in ``spare`` if possible, and whether the run ends."""
        prediction = self.evaluate(x, z, step)
        moved, mean = _euler_step(x, prediction, z, next_z, self.watched, self.reusable(spare))
        return moved, self.stops(step, z, x, self.own_copy(mean, prediction))

    def stops(self, step: int, z: float, x: Tensor, mean: Tensor | None) -> bool:
        """Calls the callback before a step; True ends the run."""
        if self._callback is None:
            return False
        assert mean is not None
        return self._callback(StepInfo(step=step, z=z, x=x, mean=mean, nfe=self.nfe)) is True


def _euler_step(
    x: Tensor,
    prediction: Tensor | Field,
    z: float,
    next_z: float,
    with_mean: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The next points, and the mean if it is wanted."""
    if with_mean:
        return euler_step(x, prediction, z, next_z, return_mean=True, out=out)
    return euler_step(x, prediction, z, next_z, out=out), None


def euler(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    churn: Churn | None = None,
) -> tuple[Tensor, int]:
    """First order, one evaluation per step: the published "forward Euler" on the log grid."""
    return _euler_steps(denoise, x, grid, callback, churn, corrected=False)


def heun(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    churn: Churn | None = None,
) -> tuple[Tensor, int]:
    """Second order: an Euler step, repeated with the average of the slopes at both ends.

    This is the published "improved Euler". The last step is a plain Euler step, because a second
    evaluation there gains nothing: n steps take 2n − 1 evaluations.
    """
    return _euler_steps(denoise, x, grid, callback, churn, corrected=True)


def _euler_steps(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None,
    churn: Churn | None,
    *,
    corrected: bool,
) -> tuple[Tensor, int]:
    """A run of Euler steps, all but the last corrected to Heun steps if that is wanted."""
    run = _Run(denoise, callback)
    last = len(grid) - 2
    own: Tensor | None = None
    for step, (z, next_z) in enumerate(pairwise(grid)):
        if churn is not None:
            x, z = churn(x, z)
        moved, stopped = run.euler(x, z, next_z, step, own)
        if stopped:
            break
        if corrected and step != last:
            prediction = run.evaluate(moved, next_z, step)
            # The next x is written over the predicted point, and the old x becomes spare memory.
            start, x = x, heun_step(x, moved, prediction, z, next_z, out=run.reusable(moved))
            own = start if step > 0 else None
        else:
            x = own = moved
    return x, run.nfe


def multistep(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
) -> tuple[Tensor, int]:
    """Second order, one evaluation per step: the mean is extrapolated linearly in log z.

    With h_i = log(z_i/z_{i+1}) and q = h_{i−1}/h_i, each step is an Euler step with
    mean_i (1 + 1/(2q)) − mean_{i−1}/(2q) in place of mean_i (DPM-Solver++(2M), arXiv 2211.01095,
    algorithm 2, in the variable z). The first step, which has no history, and the last, which is
    long in log z, are plain Euler steps.
    """
    run = _Run(denoise, callback)
    last = len(grid) - 2
    own: Tensor | None = None
    earlier: tuple[Tensor, float] | None = None  # the mean of the step before, and its level
    for step, (z, next_z) in enumerate(pairwise(grid)):
        prediction = run.evaluate(x, z, step)
        needed = run.watched or step != last
        # The predicted mean may be x itself, which the next step still reads.
        read = () if isinstance(prediction, Field) else (prediction,)
        out = run.reusable(own, *read)
        if earlier is None or step == last:
            moved, mean = _euler_step(x, prediction, z, next_z, needed, out)
        else:
            earlier_mean, earlier_z = earlier
            mean_out = run.reusable(earlier_mean) if isinstance(prediction, Field) else None
            moved, mean = multistep_step(
                x, prediction, z, next_z, earlier_mean, earlier_z, out=out, mean_out=mean_out
            )
        mean = run.own_copy(mean, prediction, None if earlier is None else earlier[0])
        if run.stops(step, z, x, mean):
            break
        if mean is not None:
            earlier = mean, z
        x = own = moved
    return x, run.nfe


class _Stopped(Exception):
    """The callback has ended the run at these points."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class _Slope:
    """dx/dt = x − mean in t = log z, with the hook through which torchdiffeq reports steps."""

    def __init__(self, run: _Run, ends: tuple[float, float]) -> None:
        self._run = run
        # Where the slope is nearly 0, as on a data point, torchdiffeq tries a first step so long
        # that its level overflows. Between the ends of the grid the limits change nothing.
        self._lowest, self._highest = min(ends) - _LOG_MARGIN, max(ends) + _LOG_MARGIN
        self._evaluated: list[tuple[float, Tensor]] = []
        self.steps = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        level = math.exp(min(max(float(t), self._lowest), self._highest))
        mean = self._run.mean(x, level, self.steps)
        if self._run.watched:
            self._evaluated.append((float(t), mean))
        return x - mean

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if not self._run.watched:
            self.steps += 1
            return
        # Dormand–Prince evaluates the end of each step, so the mean at y0 is among those kept. The
        # callback needs no further evaluation.
        start = float(t0)
        mean = min(self._evaluated, key=lambda entry: abs(entry[0] - start))[1]
        self._evaluated = self._evaluated[-1:]
        if self._run.stops(self.steps, math.exp(start), y0, mean):
            raise _Stopped(y0)
        self.steps += 1


def _last_above_0(grid: Sequence[float]) -> float:
    """The level to which rk45 integrates from the first: the last, or the one before a last 0."""
    ends = () if len(grid) < 2 else (grid[0], grid[-1] if grid[-1] > 0 else grid[-2])
    if not ends or min(ends) <= 0 or math.log(ends[0]) == math.log(ends[1]):
        raise ValueError(
            "grid must have two different levels above 0 for rk45, which goes from the first level "
            f"to the last, or to the one before a last level of 0, got {list(grid)}."
        )
    return ends[1]


def rk45(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> tuple[Tensor, int]:
    """Adaptive Dormand–Prince in log z, on the device of x (torchdiffeq's dopri5).

    Only the first and the last level of the grid count. log z cannot reach 0: where the grid ends
    at 0, the last step is an Euler step from the level before to the mean. The tolerances are those
    of the published sampler, for the root mean square over the whole batch.

    Raises:
        ValueError: no step is small enough, for example because the mean is not finite; or the
            levels between which it would integrate are equal or 0; or a tolerance is negative or
            not finite, or both are 0.
    """
    rtol, atol = non_negative("rtol", rtol), non_negative("atol", atol)
    if rtol == atol == 0:
        raise ValueError("rtol or atol must be above 0, got 0 for both.")
    if len(grid) == 2 and grid[-1] == 0:
        return euler(denoise, x, grid, callback)
    run = _Run(denoise, callback)
    end = _last_above_0(grid)
    if len(x) == 0:  # no points have no error, by which torchdiffeq chooses its steps
        return x.clone(), 0
    ends = torch.tensor([grid[0], end], dtype=torch.float64, device=x.device).log()
    slope = _Slope(run, (float(ends[0]), float(ends[1])))
    try:
        x = dormand_prince(slope, x, ends, rtol, atol)
        if grid[-1] == 0:
            mean = run.mean(x, end, slope.steps)
            x = x if run.stops(slope.steps, end, x, mean) else mean
    except _Stopped as stopped:
        x = stopped.x
    return x, run.nfe


def consistency(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    noise: Noise | None = None,
) -> tuple[Tensor, int]:
    """For few-step models: each step adds noise of the next level to the mean.

    It takes one evaluation per step. The last mean is the result (consistency models, arXiv
    2303.01469, algorithm 1). A network that was not distilled (:mod:`pfgm.distillation`) gives
    averages of data.

    Raises:
        ValueError: noise is not given; only ``sample`` of a flow gives it.
    """
    if noise is None:
        raise ValueError("the solver consistency needs noise; use it in sample alone.")
    run = _Run(denoise, callback)
    for step, (z, next_z) in enumerate(pairwise(grid)):
        mean = run.mean(x, z, step)
        if run.stops(step, z, x, mean):
            break
        x = mean if step == len(grid) - 2 else noise(mean, next_z)
    return x, run.nfe


SAMPLERS: dict[str, Solver] = {
    "euler": Solver(euler, order=1, evaluations=1),
    # The least steps are those of EDM, section 3. Of 5 steps from 80 to 0.002 the longest has a
    # ratio of 85. The slope at the end of such a step is wrong by the error of the Euler step many
    # times over.
    "heun": Solver(heun, order=2, evaluations=2, least_steps=18, longest_step=25.0),
    "multistep": Solver(multistep, order=2, evaluations=1),
    "rk45": Solver(rk45, order=5, adaptive=True),
    "consistency": Solver(consistency, evaluations=1),
}
"""All solvers by name."""
SOLVERS = {name: each for name, each in SAMPLERS.items() if not each.few_step}
"""Those that solve the ODE."""
GRID_SOLVERS = {name: each for name, each in SOLVERS.items() if each.evaluations}
"""Those of them that take the steps of the grid."""
SCHEDULES: dict[str, Callable[[float, float, int], list[float]]] = {
    "log": log_grid,
    "rho": rho_grid,
}


def as_solver(solver: str | SolverFunction) -> Solver:
    """The solver of a name or of a function. A function that is not in ``SAMPLERS`` states nothing.

    Raises:
        ValueError: no solver has that name.

    >>> as_solver(heun) is as_solver("heun")
    True
    """
    if isinstance(solver, Solver):
        return solver
    if not callable(solver):
        check_choice("solver", solver, SAMPLERS)
        return SAMPLERS[solver]
    known = (each for each in SAMPLERS.values() if each.function is solver)
    return next(known, None) or Solver(solver)
