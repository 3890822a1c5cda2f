"""Inversion and editing: data up to the prior and back, and what can be done on the way.

The flow is an ODE, so data have latents: points at the first level that lead back to them. Latents
are interpolated and rescaled; parts of data that are known hold the rest of a run in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.checks import is_number
from ..common.tensors import wide_dtype
from ..functional import steps as ode_steps
from ..functional.steps import Field
from ..solvers import SOLVERS, Callback, Denoiser

if TYPE_CHECKING:
    from .flow import Condition, Flow, Network

__all__ = ["Projection", "interpolate"]

Projection = Callable[[Tensor, float], Tensor]
"""From points (B, *S) and their level to new points, at which the network is evaluated."""


# ---- up and down -----------------------------------------------------------------------------


def grid_above_zero(
    flow: Flow, steps: int | None, schedule: str | Sequence[float] | None
) -> list[float]:
    """The grid of :meth:`pfgm.Flow.sample`, without a step to 0: nothing leads back from there."""
    grid = flow.grid(steps, schedule)
    if grid[-1] == 0:
        grid = grid[:-1]
    if len(grid) < 2:
        raise ValueError(
            f"steps or schedule leaves {grid}; allowed are two or more levels above 0."
        )
    return grid


def carry(
    flow: Flow,
    net: Network,
    x: Tensor,
    grid: Sequence[float],
    solver: str,
    rtol: float,
    atol: float | None,
    **options: Any,
) -> tuple[Tensor, int]:
    """:meth:`pfgm.Flow.solve` from any data, none among them; the tolerances are those of rk45."""
    x = flow._floating(x).detach()
    if len(x) == 0 and solver in SOLVERS:
        return x, 0
    if solver == "rk45":
        options |= {"rtol": rtol, "atol": 2e-5 * flow.unit if atol is None else atol}
    return flow.solve(net, x, grid, solver=solver, **options)


# ---- between latents, and farther out --------------------------------------------------------


def interpolate(a: Tensor, b: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Points between latents along the sphere of the prior.

        ω = ∠(a, b),  ê ⟂ â the direction in which b lies from a
        x = ‖a‖^(1 − w) ‖b‖^w (cos(w ω) â + sin(w ω) ê)

    Directions go along the great circle (Shoemake 1985) and norms geometrically: a prior is
    isotropic, and its norms spread over orders of magnitude where D is small. A straight line would
    pass through norms that no prior has.

    Where a or b is 0, which has no direction, x = a + w (b − a). Where b points exactly away from
    a, any great circle would do: it is that toward the coordinate axis along which a is smallest,
    the first of them. A single number (N = 1) knows no way around and passes through 0.

    Args:
        a: (B, *S) latents, floating point.
        b: (B, *S) in the dtype of a, likewise.
        weights: (W,) finite numbers, 0 for a and 1 for b; beyond, the circle is followed farther.

    Returns:
        (W, B, *S) in the dtype of a, computed in float64.

    Raises:
        ValueError: shapes or devices differ, or weights is empty, not one-dimensional or not
            finite.
        TypeError: a dtype that is not floating, or that differs.

    >>> import torch
    >>> a, b = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> interpolate(a, b, [0.0, 0.5, 1.0]).norm(dim=2).round(decimals=3)
    tensor([[4.],
            [2.],
            [1.]])
    """
    _check_pair(a, b)
    wide = wide_dtype(a.device)
    w = _weights(weights).to(a.device, wide)[:, None, None]
    start, end = (v.reshape(len(a), math.prod(a.shape[1:])).to(wide) for v in (a, b))
    start_norm, end_norm = (v.norm(dim=1, keepdim=True) for v in (start, end))
    tiny = torch.finfo(wide).tiny
    from_, to = start / start_norm.clamp(min=tiny), end / end_norm.clamp(min=tiny)
    cosine = (from_ * to).sum(1, keepdim=True)
    across = to - cosine * from_
    angle = torch.atan2(across.norm(dim=1, keepdim=True), cosine)
    # Below the rounding of a's own dtype, what is left across is noise.
    opposite = (cosine < 0) & (across.norm(dim=1, keepdim=True) < 4 * torch.finfo(a.dtype).eps)
    across = torch.where(opposite, _away(from_), across)
    across = across / across.norm(dim=1, keepdim=True).clamp(min=tiny)
    direction = (w * angle).cos() * from_ + (w * angle).sin() * across
    points = start_norm ** (1 - w) * end_norm**w * direction
    straight = (start_norm == 0) | (end_norm == 0)
    points = torch.where(straight, start + w * (end - start), points)
    return points.to(a.dtype).view(len(w), *a.shape)


def _away(direction: Tensor) -> Tensor:
    """(B, N): toward the axis along which a direction is smallest, and across it; 0 at N = 1."""
    axis = torch.zeros_like(direction)
    if direction.shape[1] > 0:
        axis.scatter_(1, direction.abs().argmin(1, keepdim=True), 1.0)
    return axis - (axis * direction).sum(1, keepdim=True) * direction


def between(
    flow: Flow,
    net: Network,
    a: Tensor,
    b: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    condition: Condition | None,
    unconditional: Condition | None,
    **options: Any,
) -> Tensor:
    """Data (W, B, *S) between data a and b, by way of their latents."""
    a, b = flow._floating(a), flow._floating(b)
    _check_pair(a, b)
    own: dict[str, Any] = {"condition": condition, "unconditional": unconditional}
    start, end = (flow.encode(net, x, return_nfe=False, **own, **options) for x in (a, b))
    center = flow._center(start)
    points = interpolate(start - center, end - center, weights) + center
    own = {name: _repeated(given, len(points)) for name, given in own.items()}
    data = flow.decode(net, points.flatten(0, 1), return_nfe=False, **own, **options)
    return data.view_as(points)


def count_weights(count: int) -> Tensor:
    """count weights, evenly from 0 to 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"count is {count!r}; allowed is an integer of at least 2.")
    return torch.linspace(0, 1, count, dtype=torch.float64)


def _repeated(condition: Condition | None, times: int) -> Condition | None:
    """The condition of B rows for W × B of them."""
    if condition is None:
        return None
    return {
        name: value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
        for name, value in condition.items()
    }


def rescale(flow: Flow, latent: Tensor, temperature: float) -> Tensor:
    """Latents with their norms multiplied, within what the flow's prior clips its own to."""
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}; allowed is any finite number above 0.")
    flow._check_x(latent)
    _check_floating("latent", latent)
    center = flow._center(latent)
    away = latent - center
    norm = away.reshape(len(latent), flow.N).norm(dim=1)
    longest = norm.clamp(min=flow.largest_norm)
    return center + away * flow._rows((longest / norm).clamp(max=temperature))


# ---- inpainting ------------------------------------------------------------------------------


def projected(slope: Denoiser, project: Projection) -> Denoiser:
    """The slope at projected points, as the posterior mean there.

    A field is turned into its mean at once, for a solver would read it at the points it has.
    """

    def evaluate(x: Tensor, level: float) -> Tensor:
        points = project(x, level)
        if points.shape != x.shape or points.dtype != x.dtype:
            raise ValueError(
                f"project returned shape {tuple(points.shape)} and dtype {points.dtype}; needed "
                f"are those of x, {tuple(x.shape)} and {x.dtype}."
            )
        found = slope(points, level)
        return ode_steps.euler(points, found, level, 0.0)[0] if isinstance(found, Field) else found

    return evaluate


def inpaint(
    flow: Flow,
    net: Network,
    known: Tensor,
    mask: Tensor,
    *,
    steps: int | None,
    schedule: str | Sequence[float] | None,
    resample: int,
    resample_from: float,
    generator: torch.Generator | None,
    callback: Callback | None,
    **options: Any,
) -> tuple[Tensor, int]:
    """The completed data (B, *S) and the evaluations they took; :meth:`pfgm.Flow.inpaint`."""
    known = flow._floating(known).detach()
    _check_mask(mask, known)
    grid = flow.grid(steps, schedule)
    # What is not known may hold anything, NaN among it.
    x, total = torch.where(mask, known, flow._center(known)), 0
    for levels in (grid, *_rounds(grid, resample, resample_from)):
        noise = _unit_noise(flow, x, generator)
        x, nfe = flow.sample(
            net,
            len(x),
            x_init=x + levels[0] * noise,
            schedule=levels,
            project=_holding(known, noise, mask),
            callback=_seeing(callback, _holding(known, noise, mask)),
            generator=generator,
            return_nfe=True,
            **options,
        )
        x, total = torch.where(mask, known, x), total + nfe
    return x, total


def _rounds(grid: Sequence[float], resample: int, resample_from: float) -> list[list[float]]:
    if isinstance(resample, bool) or not isinstance(resample, int) or resample < 0:
        raise ValueError(f"resample is {resample!r}; allowed is an integer of at least 0.")
    if resample == 0:
        return []
    if not is_number(resample_from) or not grid[-1] < resample_from <= grid[0]:
        raise ValueError(
            f"resample_from is {resample_from!r}; allowed is a level above {grid[-1]} and at most "
            f"{grid[0]}."
        )
    below = [level for level in grid if level < resample_from]
    return [[float(resample_from), *below]] * resample


def _unit_noise(flow: Flow, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise (B, *S) of level 1, from the prior: its norm is clipped where the prior's is."""
    points = flow.prior(len(x), generator=generator, device=x.device)
    return (points - flow._center(points)).to(x.dtype) / flow.first_level


def _holding(known: Tensor, noise: Tensor, mask: Tensor) -> Projection:
    return lambda x, level: torch.where(mask, known + level * noise, x)


def _seeing(callback: Callback | None, project: Projection) -> Callback | None:
    """The callback, shown the points at which the network was evaluated."""
    if callback is None:
        return None
    return lambda info: callback({**info, "x": project(info["x"], info["z"])})


# ---- checks ----------------------------------------------------------------------------------


def _check_floating(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} has dtype {kind}; allowed is floating point.")


def _check_pair(a: Tensor, b: Tensor) -> None:
    _check_floating("a", a)
    _check_floating("b", b)
    if a.ndim == 0 or a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"a has shape {tuple(a.shape)} on {a.device} and b {tuple(b.shape)} on {b.device}; "
            "both must have one shape (B, *S) on one device."
        )
    if a.dtype != b.dtype:
        raise TypeError(f"a has dtype {a.dtype} and b {b.dtype}; both must have the same.")


def _weights(weights: Sequence[float] | Tensor) -> Tensor:
    values = torch.as_tensor(weights, dtype=torch.float64)
    if values.ndim != 1 or len(values) == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"weights is {weights}; allowed are one or more finite numbers, (W,).")
    return values


def _check_mask(mask: Tensor, known: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask has dtype {kind}; allowed is bool, True where known.")
    if mask.device != known.device:
        raise ValueError(
            f"mask is on {mask.device} and known on {known.device}; both must be on one."
        )
    try:
        fits = torch.broadcast_shapes(mask.shape, known.shape) == known.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; allowed is any that broadcasts to that of known, "
            f"{tuple(known.shape)}."
        )
