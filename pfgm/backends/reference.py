"""The operations in plain torch on any device: ground truth and fallback.

Squared distances are sums of exact differences, weights are relative to the nearest reference and
everything is merged in float64, so that float64 input gives the oracle of the tests and float32
input an answer whose only rounding is that of its output. Workspace is bounded by chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..common.checks import check_radius, checks_values, non_finite_message
from ..common.tensors import dequantise, wide_dtype
from .problems import OdeStep
from .weights import at_limit, check_singular, log_sum_exp, log_weight

_PAIRS = 1 << 20  # (query, reference) pairs a chunk: 8 MiB for each (B, chunk) matrix
_VALUES = 1 << 22  # reference values a chunk: 32 MiB in float64


def supports(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
) -> str | None:
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def describe() -> str:
    return f"exact differences in plain torch {torch.__version__}, chunked"


def _chunks(x: Tensor, references: Tensor) -> Iterator[slice]:
    rows = min(_PAIRS // max(len(x), 1), _VALUES // max(x.shape[1], 1))
    for start in range(0, len(references), max(rows, 1)):
        yield slice(start, start + max(rows, 1))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    # Without mm: |x|² + |y|² − 2x·y cancels (spec: off by 4e-4 in the mean near ties).
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _averaged(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance of the nearest reference and total weight relative to it, both (B, 1), and
    the weighted average of what ``weigh(weights, y)`` sums over a chunk of references y."""
    nearest = torch.full_like(radius, math.inf)
    total = torch.zeros_like(radius)
    weighted: Tensor | float = 0.0
    for chunk in _chunks(x, references):
        y = dequantise(references[chunk], x.dtype)
        squared = _squared_distances(x, y)
        if checks_values(x.device) and not bool(torch.isfinite(squared).all()):
            raise ValueError(non_finite_message(x, references, "x"))
        merged = torch.minimum(nearest, squared.amin(1, keepdim=True))
        # The first chunk has nothing to rescale: inf − inf below, times a total of 0.
        relative = log_weight(nearest - merged, merged, radius, D, x.shape[1])
        kept = torch.where(total == 0, 0.0, relative.exp())
        weights = log_weight(squared - merged, merged, radius, D, x.shape[1]).exp()
        total = kept * total + weights.sum(1, keepdim=True)
        weighted = kept * weighted + weigh(weights, y)
        nearest = merged
    return nearest, total, weighted / total


def sketch(references: Tensor, dtype: torch.dtype) -> None:
    """Nothing is kept of references."""
    return None


def posterior_mean(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (B, N), log-sum-exp (B,) and what the backward pass takes up again: the squared distance
    of the nearest reference and the total weight relative to it, both (B,)."""
    if checks_values(x.device):
        check_radius(radius)
    wide = x.to(wide_dtype(x.device))
    r = radius.to(wide.dtype)[:, None]
    nearest, total, mean = _averaged(wide, references, r, D, torch.matmul)
    logsumexp = log_sum_exp(nearest, total, r, D, x.shape[1])
    return mean.to(x.dtype), logsumexp.squeeze(1), nearest.squeeze(1), total.squeeze(1)


def posterior_mean_backward(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: float,
    needs: tuple[bool, bool, bool],
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    N = x.shape[1]
    wide = x.to(wide_dtype(x.device))
    r = radius.to(wide.dtype)[:, None]
    center = mean.to(wide.dtype)
    upstream = grad_mean.to(wide.dtype)
    g = grad_logsumexp.to(wide.dtype)[:, None]
    nearest, total = nearest[:, None], total[:, None]
    regular = ~at_limit(nearest, r, D)
    check_singular(~regular, g)
    # Σ p G·y, which is G·mean before mean was rounded. p itself is found relative to the nearest:
    # the log-sum-exp, of the size of d²/σ², has no digits for it at a small σ.
    _, _, pull = _averaged(
        wide, references, r, D, lambda w, y: (w * (upstream @ y.T)).sum(1, keepdim=True)
    )
    moment = torch.zeros_like(r)  # Σ p t (s − s_min) / s, or Σ p t (d² − d_min²) / σ²
    grad_x = torch.zeros_like(wide) if needs[0] else None
    grad_references = (
        torch.empty_like(references, memory_format=torch.contiguous_format) if needs[1] else None
    )
    for chunk in _chunks(x, references):
        y = dequantise(references[chunk], wide.dtype)
        squared = _squared_distances(wide, y)
        excess = squared - nearest
        p = torch.where(regular, log_weight(excess, nearest, r, D, N).exp() / total, 0.0)
        t = upstream @ y.T - pull + g
        if math.isinf(D):
            c = torch.where(p == 0, 0.0, -p * t / r / r)
            moment -= torch.where(p == 0, 0.0, c * excess).sum(1, keepdim=True)
        else:
            s = squared + r.square()
            c = torch.where(p == 0, 0.0, -(N + D) * p * t / s)
            moment += torch.where(p == 0, 0.0, p * t * (excess / s)).sum(1, keepdim=True)
        if grad_x is not None:
            grad_x -= c @ y - c.sum(1, keepdim=True) * center
        if grad_references is not None:
            grad_references[chunk] = (p.T @ upstream - c.T @ wide + c.sum(0)[:, None] * y).to(
                references.dtype
            )
    # Σ p t = g, so that Σ c, where the t nearly cancel, is found without summing them.
    if math.isinf(D):
        sum_c = torch.where(regular, -g / r / r, 0.0)
        grad_radius = torch.where(regular, (g * (nearest / r / r) + moment) / r, 0.0)
    else:
        sum_c = torch.where(regular, -(N + D) * (g - moment) / (nearest + r.square()), 0.0)
        grad_radius = r * sum_c
    if grad_x is not None:
        grad_x += sum_c * (wide - center)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        grad_references,
        grad_radius.squeeze(1).to(radius.dtype) if needs[2] else None,
    )


def posterior_mean_tangent(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: float,
    tangent_x: Tensor | None,
    tangent_references: Tensor | None,
    tangent_radius: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What these references add to the tangents of mean (B, N) and log-sum-exp (B,), in float64.

    With the tangent ℓ̇_j of a score, those are Σ p_j ((x_j − mean) ℓ̇_j + ẋ_j) and Σ p_j ℓ̇_j. mean,
    nearest and total are those of all references, in float64. At a limit, where the mean is locally
    constant, its tangent is 0 and that of the log-sum-exp NaN.
    """
    N, wide_type = x.shape[1], mean.dtype
    wide, r = x.to(wide_type), radius.to(wide_type)[:, None]
    nearest, total = nearest[:, None], total[:, None]
    regular = ~at_limit(nearest, r, D)
    of_mean, of_lse = torch.zeros_like(mean), torch.zeros_like(r)
    for chunk in _chunks(x, references):
        y = dequantise(references[chunk], wide_type)
        squared = _squared_distances(wide, y)
        p = torch.where(regular, log_weight(squared - nearest, nearest, r, D, N).exp() / total, 0.0)
        half = torch.zeros_like(squared)  # of the tangent of ‖x − x_j‖²
        if tangent_x is not None:
            moved = tangent_x.to(wide_type)
            half += (wide * moved).sum(1, keepdim=True) - moved @ y.T
        if tangent_references is not None:
            moved = tangent_references[chunk].to(wide_type)
            half += (y * moved).sum(1) - wide @ moved.T
            of_mean += p @ moved
        change = torch.zeros_like(r) if tangent_radius is None else tangent_radius[:, None]
        if math.isinf(D):
            score = (squared * (change / r) - half) / r / r
        else:
            score = -(N + D) * (half + r * change) / (squared + r.square())
        weighted = torch.where(p == 0, 0.0, p * score)
        of_mean += weighted @ y - weighted.sum(1, keepdim=True) * mean
        of_lse += weighted.sum(1, keepdim=True)
    return of_mean, torch.where(regular, of_lse, math.nan).squeeze(1)


def normalised_field(x: Tensor, z: Tensor, mean: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """v_x (B, N) and v_z (B,) from x (B, N), z (B,) and mean (B, N), differentiable."""
    dtype = wide_dtype(x.device)
    difference = x.to(dtype) - mean.to(dtype)
    squared = difference.square().sum(1) + z.to(dtype).square()
    # The root has no gradient at E = 0. There v = −√N E/gamma, and 0 where gamma is 0 too.
    at_zero = squared == 0
    root = torch.where(at_zero, 1.0, squared).sqrt()
    norm = torch.where(at_zero, 0.0 if gamma > 0 else math.inf, root)
    scale = -math.sqrt(x.shape[1]) / (norm + gamma)
    return (scale[:, None] * difference).to(x.dtype), (scale * z).to(x.dtype)


# A field's v_z is kept below −_TINY: a positive one from a network would reverse the flow.
_TINY = 1e-5
# ‖v_x‖/√N is below 1 for every field; a network may be off.
_LARGEST_NORM = 1 - 1e-6


def ode_step(
    step: OdeStep, with_mean: bool, out: Tensor | None = None, mean_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    result, mean = ode_step_formula(step, with_mean)
    if out is not None:
        result = out.copy_(result)
    if mean is not None and mean_out is not None:
        mean = mean_out.copy_(mean)
    return result, mean


def ode_step_formula(step: OdeStep, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    """The step in differentiable operations; factors in float64, points in their own dtype."""
    x, slope, history = step.x, step.slope, step.history
    z, toward, blend = step.levels
    mean: Tensor | None = None
    if step.field_z is None:
        result = _scale(1 - toward - blend, x) + _scale(toward, slope)
    else:
        stretch = _stretch(step, step.field_z, z)
        result = _scale(1 - blend, x) + _scale(toward * stretch, slope)
        mean = x + _scale(stretch, slope) if with_mean else None
    return (result if history is None else result + _scale(blend, history)), mean


def _scale(factor: Tensor | float, rows: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return factor.to(rows.dtype)[:, None] * rows
    return factor * rows


def _stretch(step: OdeStep, field_z: Tensor, z: Tensor | float) -> Tensor:
    """t = −z/v_z in float64, by which mean = x + t v_x."""
    given = -z / field_z.to(wide_dtype(field_z.device)).clamp(max=-_TINY)
    if isinstance(z, Tensor):
        return torch.where(z < step.z_exp, _implied_stretch(step, z), given)
    return _implied_stretch(step, z) if z < step.z_exp else given


def _implied_stretch(step: OdeStep, z: Tensor | float) -> Tensor:
    """t with the v_z that ‖v_x‖ implies: (√(e_x² + z²) + γ)/√N, with no z to divide by."""
    root_N, gamma = math.sqrt(step.slope.shape[1]), step.gamma
    norm = torch.linalg.vector_norm(step.slope, dim=1, dtype=wide_dtype(step.slope.device))
    n = (norm / root_N).clamp(max=_LARGEST_NORM)
    if step.exact:
        rest = 1 - n.square()
        e_x = n * (gamma + (n.square() * gamma**2 + rest * z**2).sqrt()) / rest
    else:
        e_x = gamma * n / (1 - n)
    stretch: Tensor = ((e_x.square() + z**2).sqrt() + gamma) / root_N
    return stretch
