"""The posterior mean and its gradients in plain torch, over references in chunks.

Weights are relative to that of the nearest reference. Chunks bound the memory. How distances and
sums of one chunk are computed is left to an :class:`Arithmetic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

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
from ..core.formulas import MAX_PAIRS, MAX_VALUES, chunks, squared_distances
from ..core.problems import Needs, PosteriorMean, State, Upstream
from ..core.weights import at_limit, check_singular, is_flat, log_sum_exp, log_weight


class Chunk(NamedTuple):
    """Some references."""

    references: Tensor
    """(m, N), as in the problem."""
    placed: Tensor
    """(m, N), the same relative to the origin, wide."""


class Arithmetic:
    """Distances and products of points x (B, N) and chunks of references, as exact as can be.

    Wide is float64, or float32 on devices without float64.
    """

    max_pairs, max_values = MAX_PAIRS, MAX_VALUES  # in a chunk of references

    def __init__(self, x: Tensor, references: Tensor) -> None:
        self.x = x.to(wide_dtype(x.device)).contiguous()  # as are the results of operators
        self.origin = self.x.new_zeros(())

    def chunk(self, references: Tensor) -> Chunk:
        return Chunk(references, dequantise(references, self.x.dtype))

    def distances(self, chunk: Chunk, radius: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The squared distance (B, 1) of the nearest, and by how much others (B, m) exceed it.

        Distances that exceed the squared distances known (B, 1) need not be exact.
        """
        squared = self.squared(chunk, known)
        if checks_values(self.x.device):
            squared = _told_apart(squared, self.x, chunk.references, radius)
        nearest = squared.amin(1, keepdim=True)
        return nearest, squared - nearest

    def squared(self, chunk: Chunk, known: Tensor) -> Tensor:
        """Squared distances (B, m)."""
        return squared_distances(self.x, chunk.placed)

    def inner(self, G: Tensor, chunk: Chunk) -> Tensor:
        """Inner products (B, m) of G (B, N) and the references from the origin."""
        return G @ chunk.placed.T

    def average(self, weights: Tensor, chunk: Chunk) -> Tensor:
        """The references (B, N), summed with weights (B, m) between 0 and 1."""
        return weights @ dequantise(chunk.references, self.x.dtype)

    def sums(self, factors: Tensor, chunk: Chunk) -> Tensor:
        """The references from the origin (B, N), summed with factors (B, m) of any size."""
        return factors @ chunk.placed


def _told_apart(squared: Tensor, x: Tensor, references: Tensor, radius: Tensor) -> Tensor:
    """Squared distances (B, m), which at r = 0 are 0 between equal points only.

    Raises:
        ValueError: one underflows at an r > 0 whose square underflows too.
    """
    least = least_square(x.shape[1], x.dtype)
    near = (squared.amin(1, keepdim=True) < least) & (radius.square() < least)
    for row in map(int, near.flatten().nonzero()):
        different = dequantise(references, x.dtype) != x[row]
        apart = (squared[row] < least) & different.any(1)
        if radius[row] > 0 and bool(apart.any()):
            raise ValueError(underflow_message(x, row))
        smallest = torch.finfo(x.dtype).tiny
        squared[row] = torch.where(apart, squared[row].clamp(min=smallest), squared[row])
    return squared


def _weighted_average(
    problem: PosteriorMean,
    arithmetic: Arithmetic,
    weighted_sum: Callable[[Tensor, Chunk], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest and total (B, 1), and a weighted average over the references.

    ``weighted_sum(weights, chunk)`` is the weighted sum over a chunk of references.
    """
    x, references, radius, D = problem[:4]
    N, radius = x.shape[1], radius[:, None]
    nearest = torch.full_like(radius, math.inf)
    total = torch.zeros_like(radius)
    weighted: Tensor | float = 0.0
    for rows in chunks(arithmetic.x, references, arithmetic.max_pairs, arithmetic.max_values):
        chunk = arithmetic.chunk(references[rows])
        own, excess = arithmetic.distances(chunk, radius, nearest)
        if checks_values(x.device) and not bool(excess.amax().isfinite()):
            raise ValueError(non_finite_message(arithmetic.x, references))
        merged = torch.minimum(nearest, own)
        # Before the first chunk there is nothing to rescale. relative is then NaN, from inf − inf.
        relative = log_weight(nearest - merged, merged, radius, D, N)
        kept = torch.where(total == 0, 0.0, relative.exp())
        weights = log_weight(excess + (own - merged), merged, radius, D, N).exp()
        total = kept * total + weights.sum(1, keepdim=True)
        weighted = kept * weighted + weighted_sum(weights, chunk)
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
    # x − mean may be small beside its terms, so these are taken from the origin.
    weighted_sum = arithmetic.sums if problem.difference else arithmetic.average
    nearest, total, result = _weighted_average(problem, arithmetic, weighted_sum)
    logsumexp = log_sum_exp(nearest, total, radius[:, None], D, x.shape[1])
    if problem.difference:
        result = (arithmetic.x - arithmetic.origin) - result
    if checks_values(x.device):
        check_range(result, x, references, problem.difference)
    return result.to(x.dtype), logsumexp.squeeze(1), nearest.squeeze(1), total.squeeze(1)


def posterior_mean_backward(
    problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs, arithmetic: Arithmetic
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As in :class:`~pfgm.backends.Backend`."""
    x, references, radius, D = problem[:4]
    N, wide, r = x.shape[1], arithmetic.x, radius[:, None]
    center = state.mean.to(wide.dtype)
    G, g = upstream.grad_mean.to(wide.dtype), upstream.grad_logsumexp.to(wide.dtype)[:, None]
    nearest, total = state.nearest[:, None], state.total[:, None]
    regular = ~at_limit(nearest, r, D)
    flat = is_flat(nearest, r, D, N)
    check_singular(flat, g)
    # pull = Σ p G·y equals G·mean for a mean that is not rounded. p comes from the nearest
    # reference. From the log-sum-exp it would lose digits at a small σ, where that is near d²/σ².
    _, _, pull = _weighted_average(
        problem, arithmetic, lambda w, chunk: (w * arithmetic.inner(G, chunk)).sum(1, keepdim=True)
    )
    moment = torch.zeros_like(r)  # Σ p t (s − s_min) / s, or Σ p t (d² − d_min²) / σ²
    grad_x = torch.zeros_like(wide) if needs[0] else None
    grad_references = (
        torch.empty_like(references, memory_format=torch.contiguous_format) if needs[1] else None
    )
    for rows in chunks(wide, references, arithmetic.max_pairs, arithmetic.max_values):
        chunk = arithmetic.chunk(references[rows])
        own, excess = arithmetic.distances(chunk, r, nearest)
        excess = excess + (own - nearest)
        p = torch.where(regular, log_weight(excess, nearest, r, D, N).exp() / total, 0.0)
        t = arithmetic.inner(G, chunk) - pull + g
        unmoved = flat | (p == 0)
        if math.isinf(D):
            c = torch.where(unmoved, 0.0, -p * t / r / r)
            moment -= torch.where(unmoved, 0.0, c * excess).sum(1, keepdim=True)
        else:
            s = nearest + excess + r.square()
            c = torch.where(unmoved, 0.0, -(N + D) * p * t / s)
            moment += torch.where(unmoved, 0.0, p * t * (excess / s)).sum(1, keepdim=True)
        if grad_x is not None:
            grad_x -= arithmetic.sums(c, chunk) - c.sum(1, keepdim=True) * (
                center - arithmetic.origin
            )
        if grad_references is not None:
            from_points = p.T @ G - c.T @ (wide - arithmetic.origin)
            grad_references[rows] = (from_points + c.sum(0)[:, None] * chunk.placed).to(
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
