"""Formulas in plain torch: the tangent of the posterior mean, the normalised field, the ODE step.

The reference backend computes with them. They also replace the operators where derivatives are
needed, because torch can differentiate them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.tensors import wide_dtype
from .arithmetic import Arithmetic, chunks
from .problems import OdeStep, PosteriorMean, State, Tangents

# A field has v_z < 0 and ‖v_x‖ < √N. A network's prediction is clamped to these bounds.
_MAX_V_Z = -1e-5  # a positive v_z would reverse the flow
_MAX_NORM = 1 - 1e-6  # of v_x, over √N


def posterior_mean_tangent(
    problem: PosteriorMean, state: State, tangents: Tangents
) -> tuple[Tensor, Tensor]:
    """The tangents of mean (B, N) and log-sum-exp (B,): the part of these references, in float64.

    With ℓ̇_j the tangent of a score, they are Σ p_j ((x_j − mean) ℓ̇_j + ẋ_j) and Σ p_j ℓ̇_j. Where
    the mean is constant in x, it moves with its references alone, and the tangent of the
    log-sum-exp is NaN.

    Args:
        problem: the problem over these references, which may be a part of all.
        state: the result over all references, in float64.
        tangents: tangents of x, of these references and of radius.
    """
    x, references, radius = problem[:3]
    mean, nearest, total = state
    wide_type = mean.dtype
    by, r = Arithmetic(problem), radius.to(wide_type)[:, None]
    nearest, total = nearest[:, None], total[:, None]
    regular, constant = ~by.law.is_limit(nearest, r), by.law.is_constant(nearest, r)
    by.center(nearest)
    mean_tangent, lse_tangent = torch.zeros_like(mean), torch.zeros_like(r)
    for rows in chunks(x, references):
        chunk = by.chunk(references[rows])
        own, excess, near = by.distances(chunk, nearest)
        excess = excess + (own - nearest)
        p = torch.where(regular, by.law.log_weight(excess, nearest, r).exp() / total, 0.0)
        half = torch.zeros_like(excess)  # half of the tangent of ‖x − x_j‖²
        if tangents.x is not None:
            moved = tangents.x.to(wide_type)
            half += (moved * (by.x - by.centers)).sum(1, keepdim=True)
            half -= by.inner(moved, chunk, near)
        if tangents.references is not None:
            moved = tangents.references[rows].to(wide_type)
            half += by.inner_with(moved, chunk, near)
            mean_tangent += p @ moved
        change = torch.zeros_like(r) if tangents.radius is None else tangents.radius[:, None]
        score = by.law.change(half, change, nearest + excess, r)
        weighted = torch.where(constant | (p == 0), 0.0, p * score)
        mean_tangent += by.sums(weighted, chunk, near)
        mean_tangent -= weighted.sum(1, keepdim=True) * (mean - by.centers)
        lse_tangent += weighted.sum(1, keepdim=True)
    return mean_tangent, torch.where(constant, math.nan, lse_tangent).squeeze(1)


def normalised_field(difference: Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """v = −√N E/(‖E‖ + γ), E = (x − mean, z): v_x (B, N) and v_z (B,), differentiable."""
    dtype = wide_dtype(difference.device)
    wide, z_wide = difference.to(dtype), z.to(dtype)
    squared = wide.square().sum(1)
    # A root has no gradient at 0, so roots are taken of 1 there, and the results replaced. At E = 0
    # v is −√N E/γ, or 0 if γ is 0 too.
    at_mean = squared == 0
    at_zero = at_mean & (z_wide == 0)
    distance = squared.masked_fill(at_mean, 1.0).sqrt().masked_fill(at_mean, 0.0)
    root = distance.masked_fill(at_zero, 1.0).hypot(z_wide)  # z² may underflow
    norm = root.masked_fill(at_zero, 0.0 if gamma > 0 else math.inf)
    scale = -math.sqrt(difference.shape[1]) / (norm + gamma)
    return (scale[:, None] * wide).to(difference.dtype), (scale * z).to(difference.dtype)


def normalised_field_backward(
    grad_field_x: Tensor, grad_field_z: Tensor, difference: Tensor, z: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """The gradients of d = x − mean (B, N) and z (B,) from those of v_x and v_z.

    With E = (d, z), n = ‖E‖ and v = s E, s = −√N/(n + γ), the derivative of s in n is s²/√N:

        k = (G·d + g z) s / (√N n),   0 at E = 0
        grad_d = s G + k s d,   grad_z = s g + k s z
    """
    dtype, root_N = wide_dtype(difference.device), math.sqrt(difference.shape[1])
    wide, height = difference.to(dtype), z.to(dtype)
    G, g = grad_field_x.to(dtype), grad_field_z.to(dtype)
    norm = wide.square().sum(1).sqrt().hypot(height)  # z² may underflow
    at_zero = norm == 0
    # With γ = 0 the field has no gradient at E = 0; 0 is returned.
    scale = -root_N / (norm + gamma).masked_fill(at_zero, gamma if gamma > 0 else math.inf)
    along = (G * wide).sum(1) + g * height
    # This order avoids an overflow before the multiplication by a small number.
    k = (along / norm * scale / root_N).masked_fill(at_zero, 0.0)
    grad_difference = scale[:, None] * G + k[:, None] * (scale[:, None] * wide)
    return grad_difference.to(difference.dtype), (scale * g + k * (scale * height)).to(z.dtype)


def ode_step(step: OdeStep, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    """The step in differentiable operations, with factors in float64 and points in their dtype."""
    x, slope, history = step.x, step.slope, step.history
    z: Tensor | float
    toward: Tensor | float
    blend: Tensor | float
    if step.row_levels is None:
        z, toward, blend = step.z, step.toward, step.blend
    else:
        z, toward, blend = step.row_levels.unbind(0)
    mean: Tensor | None = None
    if step.field_z is None:
        result = _scale(1 - toward - blend, x) + _scale(toward, slope)
    else:
        mean_factor = _mean_factor(step, step.field_z, z)
        result = _scale(1 - blend, x) + _scale(toward * mean_factor, slope)
        mean = x + _scale(mean_factor, slope) if with_mean else None
    return (result if history is None else result + _scale(blend, history)), mean


def _scale(factor: Tensor | float, rows: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return factor.to(rows.dtype)[:, None] * rows
    return factor * rows


def _mean_factor(step: OdeStep, field_z: Tensor, z: Tensor | float) -> Tensor:
    """The factor t = −z/v_z in float64, with which mean = x + t v_x."""
    predicted = -z / field_z.to(wide_dtype(field_z.device)).clamp(max=_MAX_V_Z)
    if isinstance(z, Tensor):
        return torch.where(z < step.z_exp, _implied_mean_factor(step, z), predicted)
    return _implied_mean_factor(step, z) if z < step.z_exp else predicted


def _implied_mean_factor(step: OdeStep, z: Tensor | float) -> Tensor:
    """t with the v_z that ‖v_x‖ implies: (√(e_x² + z²) + γ)/√N. z cancels in this form."""
    root_N, gamma = math.sqrt(step.slope.shape[1]), step.gamma
    norm = torch.linalg.vector_norm(step.slope, dim=1, dtype=wide_dtype(step.slope.device))
    n = (norm / root_N).clamp(max=_MAX_NORM)
    if step.exact:
        rest = 1 - n.square()
        e_x = n * (gamma + (n.square() * gamma**2 + rest * z**2).sqrt()) / rest
    else:
        e_x = gamma * n / (1 - n)
    mean_factor: Tensor = ((e_x.square() + z**2).sqrt() + gamma) / root_N
    return mean_factor
