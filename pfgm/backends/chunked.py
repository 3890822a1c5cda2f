"""The posterior mean and its gradients in plain torch, over references in chunks.

Weights are relative to that of the nearest reference. Chunks bound the memory. How distances and
sums of one chunk are computed is left to an :class:`~pfgm.core.arithmetic.Arithmetic`.
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
    non_finite_message,
)
from ..core.arithmetic import Arithmetic, Chunk, Near, chunks
from ..core.problems import Needs, PosteriorMean, State, Upstream
from ..core.weights import at_limit, check_singular, is_flat, log_sum_exp, log_weight


def _weighted_average(
    problem: PosteriorMean,
    arithmetic: Arithmetic,
    weighted_sum: Callable[[Tensor, Chunk, Near], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest and total (B, 1), and a weighted average over the references.

    ``weighted_sum(weights, chunk, near)`` is the weighted sum over a chunk of references.
    """
    x, references, radius, D = problem[:4]
    N, radius = x.shape[1], radius[:, None]
    nearest = torch.full_like(radius, math.inf)
    total = torch.zeros_like(radius)
    weighted: Tensor | float = 0.0
    for rows in chunks(arithmetic.x, references, arithmetic.max_pairs, arithmetic.max_values):
        chunk = arithmetic.chunk(references[rows])
        own, excess, near = arithmetic.distances(chunk, nearest)
        if checks_values(x.device) and not bool(excess.amax().isfinite()):
            raise ValueError(non_finite_message(arithmetic.x, references))
        merged = torch.minimum(nearest, own)
        # Before the first chunk there is nothing to rescale. relative is then NaN, from inf − inf.
        relative = log_weight(nearest - merged, merged, radius, D, N)
        kept = torch.where(total == 0, 0.0, relative.exp())
        weights = log_weight(excess + (own - merged), merged, radius, D, N).exp()
        total = kept * total + weights.sum(1, keepdim=True)
        weighted = kept * weighted + weighted_sum(weights, chunk, near)
        nearest = merged
    if checks_values(x.device):
        check_underflow(nearest, radius, arithmetic.x)
    return nearest, total, weighted / total


def posterior_mean(
    problem: PosteriorMean, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in :class:`~pfgm.backends.Backend`."""
    x, references, radius, D = problem[:4]
    if checks_values(x.device):
        check_radius(radius, D)
    nearest, total, result = _weighted_average(
        problem,
        arithmetic,
        arithmetic.sums if problem.difference else lambda w, chunk, _: arithmetic.average(w, chunk),
    )
    logsumexp = log_sum_exp(nearest, total, radius[:, None], D, x.shape[1])
    if problem.difference:
        result = 0 - result  # where it is 0, without a sign
    if checks_values(x.device):
        check_range(result, x, references, problem.difference)
    return result.to(x.dtype), logsumexp.squeeze(1), nearest.squeeze(1), total.squeeze(1)


def posterior_mean_backward(
    problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs, arithmetic: Arithmetic
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As in :class:`~pfgm.backends.Backend`."""
    x, references, radius, D = problem[:4]
    N, wide, r = x.shape[1], arithmetic.x, radius[:, None]
    arithmetic.center(state.nearest[:, None])
    mean = state.mean.to(wide.dtype)
    G, g = upstream.grad_mean.to(wide.dtype), upstream.grad_logsumexp.to(wide.dtype)[:, None]
    nearest, total = state.nearest[:, None], state.total[:, None]
    regular = ~at_limit(nearest, r, D)
    flat = is_flat(nearest, r, D, N)
    check_singular(flat, g)
    # pull = Σ p G·(y − center) equals G·(mean − center) for a mean that is not rounded. p comes
    # from the nearest reference. From the log-sum-exp it would lose digits at a small σ, where that
    # is near d²/σ².
    _, _, pull = _weighted_average(
        problem,
        arithmetic,
        lambda w, *of: (w * arithmetic.inner(G, *of)).sum(1, keepdim=True),
    )
    moment = torch.zeros_like(r)  # Σ p t (s − s_min) / s, or Σ p t (d² − d_min²) / σ²
    grad_x = torch.zeros_like(wide) if needs[0] else None
    grad_references = (
        torch.empty_like(references, memory_format=torch.contiguous_format) if needs[1] else None
    )
    for rows in chunks(wide, references, arithmetic.max_pairs, arithmetic.max_values):
        chunk = arithmetic.chunk(references[rows])
        own, excess, near = arithmetic.distances(chunk, nearest)
        excess = excess + (own - nearest)
        p = torch.where(regular, log_weight(excess, nearest, r, D, N).exp() / total, 0.0)
        t = arithmetic.inner(G, chunk, near) - pull + g
        unmoved = flat | (p == 0)
        if math.isinf(D):
            c = torch.where(unmoved, 0.0, -p * t / r / r)
            moment -= torch.where(unmoved, 0.0, c * excess).sum(1, keepdim=True)
        else:
            s = nearest + excess + r.square()
            c = torch.where(unmoved, 0.0, -(N + D) * p * t / s)
            moment += torch.where(unmoved, 0.0, p * t * (excess / s)).sum(1, keepdim=True)
        if grad_x is not None:
            sums = arithmetic.sums(c, chunk, near)
            grad_x -= sums - c.sum(1, keepdim=True) * (mean - arithmetic.centers)
        if grad_references is not None:
            moved = p.T @ G + arithmetic.sums_of_points(c, chunk, near)
            grad_references[rows] = moved.to(references.dtype)
    # Summing c would lose digits to cancellation. Σ p t = g gives Σ c without that sum.
    if math.isinf(D):
        sum_c = torch.where(flat, 0.0, -g / r / r)
        grad_radius = torch.where(flat, 0.0, (g * (nearest / r / r) + moment) / r)
    else:
        sum_c = torch.where(flat, 0.0, -(N + D) * (g - moment) / (nearest + r.square()))
        grad_radius = r * sum_c
    if grad_x is not None:
        grad_x += sum_c * (wide - mean)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        grad_references,
        grad_radius.squeeze(1).to(radius.dtype) if needs[2] else None,
    )
