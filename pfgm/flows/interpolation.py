"""Interpolation between latents, along the sphere of a prior."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import check_floating
from ..common.numbers import finite_values
from ..common.tensors import wide_dtype


def interpolate(a: Tensor, b: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Points between latents along the sphere of the prior.

        ω = ∠(a, b),  â = a/‖a‖,  ê ⟂ â in the plane of a and b, toward b
        x = ‖a‖^(1 − w) ‖b‖^w (cos(w ω) â + sin(w ω) ê)

    Directions follow the great circle (Shoemake 1985). Norms are interpolated geometrically,
    because the norms of a prior spread over orders of magnitude where D is small. A straight line
    would pass through norms that the prior does not have.

    Special cases: If a or b is 0, it has no direction, and x = a + w (b − a). If b points exactly
    away from a, all great circles are equally short. The path then goes toward the coordinate axis
    along which a is smallest, the first such axis if there are several. In one dimension (N = 1) it
    passes through 0.

    Args:
        a: (B, *S) latents, floating point.
        b: (B, *S) latents in the dtype of a.
        weights: (W,) finite numbers, 0 for a and 1 for b. Weights outside [0, 1] extrapolate along
            the circle.

    Returns:
        (W, B, *S) in the dtype of a, computed in float64.

    Raises:
        ValueError: shapes or devices differ, or weights is empty, not one-dimensional or not
            finite.
        TypeError: a dtype is not floating point, or the dtypes differ.

    >>> import torch
    >>> a, b = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> interpolate(a, b, [0.0, 0.5, 1.0]).norm(dim=2).round(decimals=3)
    tensor([[4.],
            [2.],
            [1.]])
    """
    check_pair(a, b)
    wide, w = wide_dtype(a.device), finite_values("weights", weights)
    if w.ndim != 1 or len(w) == 0:
        raise ValueError(f"weights must be one or more finite numbers, (W,), got {weights}.")
    w = w.to(a.device, wide)[:, None, None]
    start, end = (v.reshape(len(a), math.prod(a.shape[1:])).to(wide) for v in (a, b))
    start_norm, end_norm = (v.norm(dim=1, keepdim=True) for v in (start, end))
    tiny = torch.finfo(wide).tiny
    from_, to = start / start_norm.clamp(min=tiny), end / end_norm.clamp(min=tiny)
    cosine = (from_ * to).sum(1, keepdim=True)
    across = to - cosine * from_
    angle = torch.atan2(across.norm(dim=1, keepdim=True), cosine)
    # Below the rounding of a's own dtype, the direction of ``across`` is noise.
    opposite = (cosine < 0) & (across.norm(dim=1, keepdim=True) < 4 * torch.finfo(a.dtype).eps)
    across = torch.where(opposite, _perpendicular(from_), across)
    across = across / across.norm(dim=1, keepdim=True).clamp(min=tiny)
    direction = (w * angle).cos() * from_ + (w * angle).sin() * across
    points = start_norm ** (1 - w) * end_norm**w * direction
    straight = (start_norm == 0) | (end_norm == 0)
    points = torch.where(straight, start + w * (end - start), points)
    return points.to(a.dtype).view(len(w), *a.shape)


def check_pair(a: Tensor, b: Tensor, name_a: str = "a", name_b: str = "b") -> None:
    """Raises ValueError or TypeError unless a and b have one shape, device and floating dtype."""
    check_floating(name_a, a)
    check_floating(name_b, b)
    if a.ndim == 0 or a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"{name_a} and {name_b} must have one shape (B, *S) and be on one device, got "
            f"{tuple(a.shape)} on {a.device} and {tuple(b.shape)} on {b.device}."
        )
    if a.dtype != b.dtype:
        raise TypeError(
            f"{name_a} and {name_b} must have the same dtype, got {a.dtype} and {b.dtype}."
        )


def _perpendicular(direction: Tensor) -> Tensor:
    """Vectors (B, N) perpendicular to directions, toward their smallest coordinate; 0 if N = 1."""
    axis = torch.zeros_like(direction)
    if direction.shape[1] > 0:
        axis.scatter_(1, direction.abs().argmin(1, keepdim=True), 1.0)
    return axis - (axis * direction).sum(1, keepdim=True) * direction
