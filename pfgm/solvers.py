"""Solvers of dx/dz = (x − mean(x, z))/z from z_max down to z_min, as plain functions.

All have one signature: ``solver(denoise, x, grid, callback=None) -> (x, nfe)``. ``denoise(x, z)``
is the posterior mean of points x (B, *S) at the level z, a float; ``grid`` holds decreasing levels;
``callback`` gets a :class:`StepInfo` before each step and stops the run by returning True; ``nfe``
counts the evaluations of ``denoise``. The equation is the same for every number of augmented
dimensions (PFGM++, arXiv 2302.04265, section 3.3), so the same solvers serve sigma in place of z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor
from torchdiffeq import odeint

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Callback",
    "Denoiser",
    "StepInfo",
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


Denoiser = Callable[[Tensor, float], Tensor]
Callback = Callable[[StepInfo], object]
Solver = Callable[..., tuple[Tensor, int]]


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
    """Counts evaluations and reports steps."""

    def __init__(self, denoise: Denoiser, callback: Callback | None) -> None:
        self._denoise, self._callback = denoise, callback
        self.nfe = 0

    def mean(self, x: Tensor, z: float) -> Tensor:
        self.nfe += 1
        return self._denoise(x, z)

    def stops(self, step: int, z: float, x: Tensor, mean: Tensor) -> bool:
        """Whether the callback ends the run before this step."""
        if self._callback is None:
            return False
        return self._callback(StepInfo(step=step, z=z, x=x, mean=mean, nfe=self.nfe)) is True


def _toward(x: Tensor, mean: Tensor, z: float, next_z: float) -> Tensor:
    """x at next_z if the posterior mean stayed where it is: the line from x at z to mean at 0."""
    return torch.lerp(mean, x, next_z / z)


def euler(
    denoise: Denoiser, x: Tensor, grid: Sequence[float], callback: Callback | None = None
) -> tuple[Tensor, int]:
    """First order, one evaluation a step: the published "forward Euler" on the log grid."""
    run = _Run(denoise, callback)
    for step, (z, next_z) in enumerate(pairwise(grid)):
        mean = run.mean(x, z)
        if run.stops(step, z, x, mean):
            break
        x = _toward(x, mean, z, next_z)
    return x, run.nfe


def heun(
    denoise: Denoiser, x: Tensor, grid: Sequence[float], callback: Callback | None = None
) -> tuple[Tensor, int]:
    """Second order: an Euler step, then again with the average of the slopes at both ends.

    The published "improved Euler". The last step stays an Euler step, where the slope at the end
    costs an evaluation and gains nothing: 2n − 1 evaluations for n steps.
    """
    run = _Run(denoise, callback)
    last = len(grid) - 2
    for step, (z, next_z) in enumerate(pairwise(grid)):
        mean = run.mean(x, z)
        if run.stops(step, z, x, mean):
            break
        predicted = _toward(x, mean, z, next_z)
        if step == last:
            x = predicted
        else:
            end_slope = (predicted - run.mean(predicted, next_z)) / next_z
            x = x + (next_z - z) / 2 * ((x - mean) / z + end_slope)
    return x, run.nfe


def multistep(
    denoise: Denoiser, x: Tensor, grid: Sequence[float], callback: Callback | None = None
) -> tuple[Tensor, int]:
    """Second order, one evaluation a step: the mean is extrapolated linearly in log z.

    With h_i = log(z_i/z_{i+1}) and q = h_{i−1}/h_i the step is an Euler step with
    mean_i (1 + 1/(2q)) − mean_{i−1}/(2q) in place of mean_i; the first step, which has no history,
    and the last, which is long in log z, are plain Euler steps (DPM-Solver++(2M), arXiv 2211.01095,
    algorithm 2, in the variable z).
    """
    run = _Run(denoise, callback)
    last = len(grid) - 2
    earlier: tuple[Tensor, float] | None = None
    for step, (z, next_z) in enumerate(pairwise(grid)):
        mean = run.mean(x, z)
        if run.stops(step, z, x, mean):
            break
        length = math.log(z / next_z)
        if earlier is None or step == last:
            target = mean
        else:
            earlier_mean, earlier_length = earlier
            target = torch.lerp(mean, earlier_mean, -length / (2 * earlier_length))
        x = _toward(x, target, z, next_z)
        earlier = mean, length
    return x, run.nfe


class _Stopped(Exception):
    def __init__(self, x: Tensor) -> None:
        self.x = x


class _Slope:
    """dx/dt = x − mean in t = log z, with the hooks by which torchdiffeq reports its steps."""

    def __init__(self, run: _Run, keep: bool) -> None:
        self._run, self._keep = run, keep
        self._evaluated: list[tuple[float, Tensor]] = []
        self._step = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        mean = self._run.mean(x, math.exp(float(t)))
        if self._keep:
            self._evaluated.append((float(t), mean))
        return x - mean

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if not self._keep:
            return
        # Dormand–Prince evaluates the end of a step first thing in the next: no evaluation is
        # made for the callback, the one at y0 is among those kept.
        start = float(t0)
        mean = min(self._evaluated, key=lambda entry: abs(entry[0] - start))[1]
        self._evaluated = self._evaluated[-1:]
        if self._run.stops(self._step, math.exp(start), y0, mean):
            raise _Stopped(y0)
        self._step += 1


def rk45(
    denoise: Denoiser,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> tuple[Tensor, int]:
    """Adaptive Dormand–Prince in log z, on the device of x (torchdiffeq's dopri5).

    Only the ends of the grid count. The tolerances are those of the published sampler, on the root
    mean square over the whole batch.

    Raises:
        ValueError: no step is small enough, as where the mean is not finite.
    """
    run = _Run(denoise, callback)
    ends = torch.tensor([grid[0], grid[-1]], dtype=torch.float64, device=x.device).log()
    slope = _Slope(run, keep=callback is not None)
    try:
        x = odeint(slope, x, ends, rtol=rtol, atol=atol, method="dopri5")[-1]
    except _Stopped as stopped:
        x = stopped.x
    except AssertionError as error:
        raise ValueError(
            f"rk45 found no step small enough ({error}): the network's field is not finite, or "
            "not smooth."
        ) from error
    return x, run.nfe


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "multistep": multistep, "rk45": rk45}
SCHEDULES: dict[str, Callable[[float, float, int], list[float]]] = {
    "log": log_grid,
    "rho": rho_grid,
}
