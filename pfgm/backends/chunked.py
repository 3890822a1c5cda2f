"""The posterior mean and its gradients in plain torch, over references in chunks.

Weights are relative to that of the nearest reference. Chunks bound the memory. How distances and
sums of one chunk are computed is left to an :class:`~pfgm.core.arithmetic.Arithmetic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..common.values import (
    check_radius,
    check_range,
    check_underflow,
    checks_values,
    non_finite_message,
)
from ..core.arithmetic import Arithmetic, Chunk, Near, chunks
from ..core.problems import Needs, PosteriorMean, State, Upstream
from ..core.weights import check_singular


def _weighted_average(
    problem: PosteriorMean,
    arithmetic: Arithmetic,
    weighted_sum: Callable[[Tensor, Chunk, Near], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest and total (B, 1), and a weighted average over the references.

    ``weighted_sum(weights, chunk, near)`` is the weighted sum over a chunk of references.
    """
    x, references = problem[:2]
    law, radius = arithmetic.law, problem.radius[:, None]
    nearest = torch.full_like(radius, math.inf)
    sums: tuple[Tensor, ...] = ()  # of the weights, and weighted
    for rows in chunks(arithmetic.x, references, arithmetic.max_pairs, arithmetic.max_values):
        chunk = arithmetic.chunk(references[rows])
        own, excess, near = arithmetic.distances(chunk, nearest)
        if checks_values(x.device) and not math.isfinite(excess.amax()):
            raise ValueError(non_finite_message(arithmetic.x, references))
        merged = torch.minimum(nearest, own)
        weights = law.log_weight(excess + (own - merged), merged, radius).exp()
        added = weights.sum(1, keepdim=True), weighted_sum(weights, chunk, near)
        if sums:
            kept = law.log_weight(nearest - merged, merged, radius).exp()
            added = kept * sums[0] + added[0], kept * sums[1] + added[1]
        sums, nearest = added, merged
    if checks_values(x.device):
        check_underflow(nearest, radius, arithmetic.x)
    return nearest, sums[0], sums[1] / sums[0]


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
    logsumexp = arithmetic.law.log_sum_exp(nearest, total, radius[:, None])
    if problem.difference:
        result = 0 - result  # where it is 0, without a sign
    if checks_values(x.device):
        check_range(result, x, references, problem.difference)
    return result.to(x.dtype), logsumexp.squeeze(1), nearest.squeeze(1), total.squeeze(1)


def posterior_mean_backward(
    problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs, arithmetic: Arithmetic
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As in :class:`~pfgm.backends.Backend`."""
    x, references, radius = problem[:3]
    law, wide, r = arithmetic.law, arithmetic.x, radius[:, None]
    arithmetic.center(state.nearest[:, None])
    mean = state.mean.to(wide.dtype)
    G, g = upstream.grad_mean.to(wide.dtype), upstream.grad_logsumexp.to(wide.dtype)[:, None]
    nearest, total = state.nearest[:, None], state.total[:, None]
    regular = ~law.is_limit(nearest, r)
    constant = law.is_constant(nearest, r)
    check_singular(constant, g)
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
        p = torch.where(regular, law.log_weight(excess, nearest, r).exp() / total, 0.0)
        t = arithmetic.inner(G, chunk, near) - pull + g
        unmoved = constant | (p == 0)
        weighted = p * t
        c = torch.where(unmoved, 0.0, -law.pull(weighted, nearest + excess, r))
        moments = weighted * law.ratio(excess, nearest, r)
        moment += torch.where(unmoved, 0.0, moments).sum(1, keepdim=True)
        if grad_x is not None:
            sums = arithmetic.sums(c, chunk, near)
            grad_x -= sums - c.sum(1, keepdim=True) * (mean - arithmetic.centers)
        if grad_references is not None:
            moved = p.T @ G + arithmetic.sums_of_points(c, chunk, near)
            grad_references[rows] = moved.to(references.dtype)
    # Summing c would lose digits to cancellation. Σ p t = g gives Σ c without that sum.
    totals = law.totals(g, moment, nearest, r)
    sum_c, grad_radius = (torch.where(constant, 0.0, value) for value in totals)
    if grad_x is not None:
        grad_x += sum_c * (wide - mean)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        grad_references,
        grad_radius.squeeze(1).to(radius.dtype) if needs[2] else None,
    )
