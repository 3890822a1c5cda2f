"""The operations in plain torch, on any device: ground truth and fallback.

Squared distances are sums of squared differences. Weights are relative to that of the nearest
reference. Everything is computed in float64; with float32 input only the output is rounded. Tests
compare the other backends with these results. References are read in chunks, which bounds the
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..common.checks import (
    check_radius,
    check_range,
    check_underflow,
    checks_values,
    least_square,
    non_finite_message,
    underflow_message,
)
from ..common.tensors import dequantise, wide_dtype
from . import formulas
from .formulas import chunks, squared_distances
from .problems import Needs, OdeStep, PosteriorMean, State, Upstream
from .weights import at_limit, check_singular, is_flat, log_sum_exp, log_weight


def supports(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
) -> str | None:
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def describe() -> str:
    return f"exact differences in plain torch {torch.__version__}, chunked"


def _weighted_average(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    weighted_sum: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest and total (B, 1), and a weighted average over the references.

    ``weighted_sum(weights, y)`` is the weighted sum over a chunk y of references.
    """
    nearest = torch.full_like(radius, math.inf)
    total = torch.zeros_like(radius)
    weighted: Tensor | float = 0.0
    for chunk in chunks(x, references):
        y = dequantise(references[chunk], x.dtype)
        squared = squared_distances(x, y)
        if checks_values(x.device):
            if not bool(torch.isfinite(squared).all()):
                raise ValueError(non_finite_message(x, references, "x"))
            squared = _told_apart(squared, x, y, radius)
        merged = torch.minimum(nearest, squared.amin(1, keepdim=True))
        # Before the first chunk there is nothing to rescale. relative is then NaN, from inf − inf.
        relative = log_weight(nearest - merged, merged, radius, D, x.shape[1])
        kept = torch.where(total == 0, 0.0, relative.exp())
        weights = log_weight(squared - merged, merged, radius, D, x.shape[1]).exp()
        total = kept * total + weights.sum(1, keepdim=True)
        weighted = kept * weighted + weighted_sum(weights, y)
        nearest = merged
    if checks_values(x.device):
        check_underflow(nearest, radius, x)
    return nearest, total, weighted / total


def _told_apart(squared: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Squared distances (B, M) of which only those of equal points are 0 where r = 0.

    Raises:
        ValueError: a squared distance underflows at another r that is too small for it.
    """
    least = least_square(x.shape[1], x.dtype)
    near = (squared.amin(1, keepdim=True) < least) & (radius.square() < least)
    for row in map(int, near.flatten().nonzero()):
        apart = (squared[row] < least) & (y != x[row]).any(1)
        if radius[row] > 0 and bool(apart.any()):
            raise ValueError(underflow_message(x, row))
        smallest = torch.finfo(x.dtype).tiny
        squared[row] = torch.where(apart, squared[row].clamp(min=smallest), squared[row])
    return squared


def sketch(references: Tensor, dtype: torch.dtype) -> None:
    """None: a sketch would save no work here."""
    return None


def posterior_mean(problem: PosteriorMean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, references, radius, D = problem[:4]
    if checks_values(x.device):
        check_radius(radius, D)
    wide = x.to(wide_dtype(x.device))
    r = radius.to(wide.dtype)[:, None]
    nearest, total, mean = _weighted_average(wide, references, r, D, torch.matmul)
    logsumexp = log_sum_exp(nearest, total, r, D, x.shape[1])
    result = wide - mean if problem.difference else mean
    if checks_values(x.device):
        check_range(result, x, references, problem.difference)
    return result.to(x.dtype), logsumexp.squeeze(1), nearest.squeeze(1), total.squeeze(1)


def posterior_mean_backward(
    problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, references, radius, D = problem[:4]
    N = x.shape[1]
    wide = x.to(wide_dtype(x.device))
    r = radius.to(wide.dtype)[:, None]
    center = state.mean.to(wide.dtype)
    G, g = upstream.mean.to(wide.dtype), upstream.logsumexp.to(wide.dtype)[:, None]
    nearest, total = state.nearest[:, None], state.total[:, None]
    regular = ~at_limit(nearest, r, D)
    flat = is_flat(nearest, r, D, N)
    check_singular(flat, g)
    # pull = Σ p G·y equals G·mean for a mean that is not rounded. p comes from the nearest
    # reference. From the log-sum-exp it would lose digits at a small σ, where that is near d²/σ².
    _, _, pull = _weighted_average(
        wide, references, r, D, lambda w, y: (w * (G @ y.T)).sum(1, keepdim=True)
    )
    moment = torch.zeros_like(r)  # Σ p t (s − s_min) / s, or Σ p t (d² − d_min²) / σ²
    grad_x = torch.zeros_like(wide) if needs[0] else None
    grad_references = (
        torch.empty_like(references, memory_format=torch.contiguous_format) if needs[1] else None
    )
    for chunk in chunks(x, references):
        y = dequantise(references[chunk], wide.dtype)
        squared = squared_distances(wide, y)
        excess = squared - nearest
        p = torch.where(regular, log_weight(excess, nearest, r, D, N).exp() / total, 0.0)
        t = G @ y.T - pull + g
        unmoved = flat | (p == 0)
        if math.isinf(D):
            c = torch.where(unmoved, 0.0, -p * t / r / r)
            moment -= torch.where(unmoved, 0.0, c * excess).sum(1, keepdim=True)
        else:
            s = squared + r.square()
            c = torch.where(unmoved, 0.0, -(N + D) * p * t / s)
            moment += torch.where(unmoved, 0.0, p * t * (excess / s)).sum(1, keepdim=True)
        if grad_x is not None:
            grad_x -= c @ y - c.sum(1, keepdim=True) * center
        if grad_references is not None:
            grad_references[chunk] = (p.T @ G - c.T @ wide + c.sum(0)[:, None] * y).to(
                references.dtype
            )
    # Summing c would lose digits to cancellation. Σ p t = g gives Σ c without that sum.
    if math.isinf(D):
        sum_c = torch.where(flat, 0.0, -g / r / r)
        grad_radius = torch.where(flat, 0.0, (g * (nearest / r / r) + moment) / r)
    else:
        sum_c = torch.where(flat, 0.0, -(N + D) * (g - moment) / (nearest + r.square()))
        grad_radius = r * sum_c
    if grad_x is not None:
        grad_x += sum_c * (wide - center)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        grad_references,
        grad_radius.squeeze(1).to(radius.dtype) if needs[2] else None,
    )


def normalised_field(difference: Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    return formulas.normalised_field(difference, z, gamma)


def normalised_field_backward(
    grad_field_x: Tensor, grad_field_z: Tensor, difference: Tensor, z: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    return formulas.normalised_field_backward(grad_field_x, grad_field_z, difference, z, gamma)


def ode_step(
    step: OdeStep, with_mean: bool, out: Tensor | None = None, mean_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    result, mean = formulas.ode_step(step, with_mean)
    if out is not None:
        result = out.copy_(result)
    if mean is not None and mean_out is not None:
        mean = mean_out.copy_(mean)
    return result, mean
