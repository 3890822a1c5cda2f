"""Solvers of dx/dz = (x − mean(x, z))/z from z_max down to z_min, as plain functions.

All have one signature: ``solver(denoise, x, grid, callback=None) -> (x, nfe)``. ``denoise(x, z)``
is the posterior mean of points x (B, *S) at the level z, a float, or the
:class:`pfgm.functional.Field` that implies it; ``grid`` holds decreasing levels, or rising ones,
from data to the prior; ``callback`` gets a :class:`StepInfo` before each step and stops the run by
returning True; ``nfe`` counts the evaluations of ``denoise``. The equation is the same for every
number of augmented dimensions (PFGM++, arXiv 2302.04265, section 3.3), so the same solvers serve
sigma in place of z.

Where gradients are off and nobody watches, the steps after the first overwrite their points: a
``denoise`` that keeps the x it is given must clone it. The x that a solver is called with is left
alone. A ``denoise`` may return the same memory at each call, but must not change x in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from .common import transforms
from .common.checks import checks_values, untouched
from .functional import steps
from .functional.steps import Field

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "SOLVERS",
    "Callback",
    "DenoiseFunction",
    "StepInfo",
    "consistency",
    "euler",
    "heun",
    "log_grid",
    "multistep",
    "rho_grid",
    "rk45",
]


class StepInfo(TypedDict):
    """What a callback is told before a step is taken."""

    step: int
    """Steps taken so far."""
    z: float
    """The level of x."""
    x: Tensor
    """(B, *S), the points at z."""
    mean: Tensor
    """(B, *S), their posterior mean: where the flow is heading."""
    nfe: int
    """Evaluations of the network so far."""


_BEYOND = math.log(1e3)  # how far past its ends rk45 may evaluate, in log z

DenoiseFunction = Callable[[Tensor, float], Tensor | Field]
Callback = Callable[[StepInfo], object]
Solver = Callable[..., tuple[Tensor, int]]
Churn = Callable[[Tensor, float], tuple[Tensor, float]]
"""From points and their level to noisier points and theirs, before a step is taken."""
Noise = Callable[[Tensor, float], Tensor]
"""From data to points around them at a level."""


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
    """Evaluates, counts evaluations and reports steps."""

    def __init__(self, denoise: DenoiseFunction, callback: Callback | None) -> None:
        self._denoise, self._callback = denoise, callback
        self.nfe = 0
        self.watched = callback is not None
        # A callback may keep what it is shown, and a derivative needs every point.
        derived = torch.is_grad_enabled() or transforms.forward_mode() or transforms.functional()
        self._overwrites = not (self.watched or derived)

    def evaluate(self, x: Tensor, z: float, step: int) -> Tensor | Field:
        self.nfe += 1
        slope = untouched(self._denoise, "denoise", ("x", "z"), x, z)
        parts = slope[:2] if isinstance(slope, Field) else (slope,)
        if checks_values(x.device) and not all(bool(p.isfinite().all()) for p in parts):
            raise ValueError(f"the network returned NaN or infinity in step {step}, at {z:.6g}.")
        return slope

    def mean(self, x: Tensor, z: float, step: int) -> Tensor:
        return steps.mean_of(x, self.evaluate(x, z, step), z)

    def kept(
        self, mean: Tensor | None, slope: Tensor | Field, spare: Tensor | None = None
    ) -> Tensor | None:
        """The mean in memory that no later evaluation writes to; spare is such memory.

        A step computes the mean of a field, but hands on what a denoiser returned, which may be
        the same buffer at each call.
        """
        if mean is None or isinstance(slope, Field):
            return mean
        if spare is not None and self._overwrites and spare.dtype == mean.dtype:
            return spare.copy_(mean)
        return mean.clone()

    def reusable(self, spare: Tensor | None, *read: Tensor) -> Tensor | None:
        """spare as the memory of a result, unless it is needed later: by others, or as `read`."""
        if spare is None or not self._overwrites or any(_share(spare, t) for t in read):
            return None
        return spare

    def stops(self, step: int, z: float, x: Tensor, mean: Tensor | None) -> bool:
        """Whether the callback ends the run before this step."""
        if self._callback is None:
            return False
        assert mean is not None
        return self._callback(StepInfo(step=step, z=z, x=x, mean=mean, nfe=self.nfe)) is True


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def euler(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    churn: Churn | None = None,
) -> tuple[Tensor, int]:
    """First order, one evaluation a step: the published "forward Euler" on the log grid."""
    run = _Run(denoise, callback)
    own: Tensor | None = None
    for step, (z, next_z) in enumerate(pairwise(grid)):
        if churn is not None:
            x, z = churn(x, z)
        slope = run.evaluate(x, z, step)
        moved, mean = steps.euler(
            x, slope, z, next_z, return_mean=run.watched, out=run.reusable(own)
        )
        if run.stops(step, z, x, run.kept(mean, slope)):
            break
        x = own = moved
    return x, run.nfe


def heun(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    churn: Churn | None = None,
) -> tuple[Tensor, int]:
    """Second order: an Euler step, then again with the average of the slopes at both ends.

    The published "improved Euler". The last step stays an Euler step, where the slope at the end
    costs an evaluation and gains nothing: 2n − 1 evaluations for n steps.
    """
    run = _Run(denoise, callback)
    last = len(grid) - 2
    own: Tensor | None = None
    for step, (z, next_z) in enumerate(pairwise(grid)):
        if churn is not None:
            x, z = churn(x, z)
        slope = run.evaluate(x, z, step)
        # x and the predicted point change places: the next x is written where the latter is.
        moved, mean = steps.euler(
            x, slope, z, next_z, return_mean=run.watched, out=run.reusable(own)
        )
        if run.stops(step, z, x, run.kept(mean, slope)):
            break
        if step == last:
            x = moved
        else:
            slope = run.evaluate(moved, next_z, step)
            start, x = x, steps.heun(x, moved, slope, z, next_z, out=run.reusable(moved))
            own = start if step > 0 else None
    return x, run.nfe


def multistep(
    denoise: DenoiseFunction, x: Tensor, grid: Sequence[float], callback: Callback | None = None
) -> tuple[Tensor, int]:
    """Second order, one evaluation a step: the mean is extrapolated linearly in log z.

    With h_i = log(z_i/z_{i+1}) and q = h_{i−1}/h_i the step is an Euler step with
    mean_i (1 + 1/(2q)) − mean_{i−1}/(2q) in place of mean_i; the first step, which has no history,
    and the last, which is long in log z, are plain Euler steps (DPM-Solver++(2M), arXiv 2211.01095,
    algorithm 2, in the variable z).
    """
    run = _Run(denoise, callback)
    last = len(grid) - 2
    own: Tensor | None = None
    earlier: tuple[Tensor, float] | None = None
    for step, (z, next_z) in enumerate(pairwise(grid)):
        slope = run.evaluate(x, z, step)
        needed = run.watched or step != last
        # A denoiser may have returned x itself, which the next step still reads.
        given = () if isinstance(slope, Field) else (slope,)
        out = run.reusable(own, *given)
        if earlier is None or step == last:
            moved, mean = steps.euler(x, slope, z, next_z, return_mean=needed, out=out)
        else:
            earlier_mean, earlier_z = earlier
            mean_out = run.reusable(earlier_mean) if isinstance(slope, Field) else None
            moved, mean = steps.multistep(
                x,
                slope,
                z,
                next_z,
                earlier_mean,
                earlier_z,
                return_mean=needed,
                out=out,
                mean_out=mean_out,
            )
        mean = run.kept(mean, slope, None if earlier is None else earlier[0])
        if run.stops(step, z, x, mean):
            break
        if mean is not None:
            earlier = mean, z
        x = own = moved
    return x, run.nfe


class _Stopped(Exception):
    def __init__(self, x: Tensor) -> None:
        self.x = x


class _Slope:
    """dx/dt = x − mean in t = log z, with the hooks by which torchdiffeq reports its steps."""

    def __init__(self, run: _Run, keep: bool, ends: tuple[float, float]) -> None:
        self._run, self._keep = run, keep
        # Where the slope is nearly 0, as it is on a data point, the trial of a first step goes to
        # levels that no float holds. On the way from end to end nothing changes.
        self._lowest, self._highest = min(ends) - _BEYOND, max(ends) + _BEYOND
        self._evaluated: list[tuple[float, Tensor]] = []
        self.steps = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        level = math.exp(min(max(float(t), self._lowest), self._highest))
        mean = self._run.mean(x, level, self.steps)
        if self._keep:
            self._evaluated.append((float(t), mean))
        return x - mean

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if not self._keep:
            self.steps += 1
            return
        # Dormand–Prince evaluates the end of a step first thing in the next: no evaluation is
        # made for the callback, the one at y0 is among those kept.
        start = float(t0)
        mean = min(self._evaluated, key=lambda entry: abs(entry[0] - start))[1]
        self._evaluated = self._evaluated[-1:]
        if self._run.stops(self.steps, math.exp(start), y0, mean):
            raise _Stopped(y0)
        self.steps += 1


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

    Only the ends of the grid count; where it ends at 0, which log z does not, the last step is an
    Euler step from the level before, to the mean. The tolerances are those of the published
    sampler, on the root mean square over the whole batch.

    Raises:
        ValueError: no step is small enough, as where the mean is not finite.
    """
    from torchdiffeq import odeint  # here, as it imports SciPy, which takes a third of torch's time

    if grid[-1] == 0 and len(grid) == 2:
        return euler(denoise, x, grid, callback)
    run = _Run(denoise, callback)
    end = grid[-1] if grid[-1] > 0 else grid[-2]
    ends = torch.tensor([grid[0], end], dtype=torch.float64, device=x.device).log()
    slope = _Slope(run, callback is not None, (float(ends[0]), float(ends[1])))
    try:
        x = odeint(slope, x, ends, rtol=rtol, atol=atol, method="dopri5")[-1]
        if grid[-1] == 0:
            mean = run.mean(x, end, slope.steps)
            x = x if run.stops(slope.steps, end, x, mean) else mean
    except _Stopped as stopped:
        x = stopped.x
    except AssertionError as error:
        raise ValueError(
            f"rk45 found no step small enough ({error}): what the network returns is not finite, "
            "or not smooth."
        ) from error
    return x, run.nfe


def consistency(
    denoise: DenoiseFunction,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    noise: Noise | None = None,
) -> tuple[Tensor, int]:
    """For few-step models: each mean is taken for the data, and noise added to it for the next.

    One evaluation a step (consistency models, arXiv 2303.01469, algorithm 1); the end is the last
    mean. A network that has not been distilled (:mod:`pfgm.distillation`) gives averages of data.

    Raises:
        ValueError: there is no noise, as on the way up.
    """
    if noise is None:
        raise ValueError("solver is 'consistency', which adds noise; it goes with sample alone.")
    run = _Run(denoise, callback)
    for step, (z, next_z) in enumerate(pairwise(grid)):
        mean = run.mean(x, z, step)
        if run.stops(step, z, x, mean):
            break
        x = mean if step == len(grid) - 2 else noise(mean, next_z)
    return x, run.nfe


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "multistep": multistep, "rk45": rk45}
# Solvers of the ODE, and what draws samples in another way.
SAMPLERS: dict[str, Solver] = {**SOLVERS, "consistency": consistency}
SCHEDULES: dict[str, Callable[[float, float, int], list[float]]] = {
    "log": log_grid,
    "rho": rho_grid,
}
