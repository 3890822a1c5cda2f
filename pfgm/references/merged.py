"""Results over chunks that are computed on their own and merged, for every backend.

The forward pass merges the states of the chunks (:mod:`pfgm.core.merging`). In the backward
pass, let q_i be the fraction of the total weight in chunk i, and G and g the upstream gradients of
mean and log-sum-exp. The upstream gradients of the chunk are then

    G_i = q_i G,   g_i = q_i (G·(mean_i − mean) + g)

Σ_i q_i G·(mean_i − mean) is 0 for exact means, but not for means rounded to float32. At a small σ
the gradient multiplies this error by d/σ². On the CPU the gradients of points where it would matter
are computed in float64; such points are ill-conditioned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.tensors import wide_dtype
from ..core import formulas
from ..core.arithmetic import may_wait
from ..core.merging import merge, relative_weight
from ..core.problems import PosteriorMean, State, Tangents, Upstream
from ..core.weights import Law, law
from ..ops.posterior_mean import BACKWARD, FORWARD, tangent_dtype, tangent_from_gradients
from .settings import ChunkTotals, Saved, Settings

_MIN_FRACTION = 1e-18  # a chunk with a smaller fraction of the weight is left out of the gradient
_MAX_ERROR = 1e-5  # the rounding error of g_i/‖G‖ times (N + D) d/s; ill-conditioned above it


def state(
    x: Tensor, radius: Tensor, settings: Settings, *, widened: bool = False
) -> tuple[State, ChunkTotals]:
    """The state over the references of this process, and nearest and total of each chunk.

    With ``widened`` the points are in float64 where the backend computes in it.
    """
    each: list[ChunkTotals] = []

    def states() -> Iterator[State]:
        for chunk in settings.chunks(x.device):
            points = _widened(x, chunk, settings) if widened else x
            state = _state(settings.problem(points, chunk, radius), settings)
            each.append(ChunkTotals(state.nearest, state.total))
            yield state

    state = merge(x, radius, settings.D, states())
    return state, ChunkTotals(*(torch.stack(values, 1) for values in zip(*each, strict=True)))


def _widened(x: Tensor, chunk: Tensor, settings: Settings) -> Tensor:
    return x.to(tangent_dtype(x, chunk, settings.backend))


def _state(problem: PosteriorMean, settings: Settings) -> State:
    """The result over one chunk."""
    mean, _, nearest, total = FORWARD(problem, settings.backend)
    return State(mean, nearest, total)


class _WeightedChunk(NamedTuple):
    """A chunk, and its fraction of the total weight, for points where it is not negligible.

    On a GPU it holds all points, because the host would have to wait for the numbers of some.
    """

    chunk: Tensor
    """(m, N)."""
    rows: Tensor | slice
    """(k,), numbers of these points."""
    fraction: Tensor
    """(k,); 0 where it is negligible."""

    def select(self, mask: Tensor) -> _WeightedChunk:
        """The same chunk for only those points that the mask (B,) selects."""
        selected = mask[self.rows]
        return self._replace(rows=self.rows[selected], fraction=self.fraction[selected])  # type: ignore[index]

    def add(self, values: Tensor, to: Tensor) -> None:
        """Adds values (k, ...) of these points to the sums of all points (B, ...)."""
        if isinstance(self.rows, slice):
            counts = self.fraction.view(-1, *[1] * (values.ndim - 1)) > 0
            to += torch.where(counts, values, 0.0)  # the others may be NaN
        else:
            to.index_add_(0, self.rows, values.to(to.dtype))


def _weighted_chunks(
    x: Tensor, radius: Tensor, state: State, chunk_totals: ChunkTotals, settings: Settings
) -> Iterator[_WeightedChunk]:
    """Yields the chunks of this process that matter to any point whose mean changes with it."""
    regular = ~law(settings.D, x.shape[1]).is_constant(state.nearest, radius)
    totals = zip(*(values.unbind(1) for values in chunk_totals), strict=True)
    for chunk, (nearest, total) in zip(settings.chunks(x.device), totals, strict=True):
        weight = relative_weight(nearest, state.nearest, radius, settings.D, x.shape[1])
        fraction = weight * total / state.total
        counts = regular & (fraction > _MIN_FRACTION)
        if not may_wait(x.device):
            yield _WeightedChunk(chunk, slice(None), torch.where(counts, fraction, 0.0))
        elif len(rows := counts.nonzero().squeeze(1)) > 0:
            yield _WeightedChunk(chunk, rows, fraction[rows])


def tangents(
    x: Tensor,
    radius: Tensor,
    tangent_x: Tensor | None,
    tangent_radius: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The tangents of mean and log-sum-exp, summed over the chunks in float64."""
    over_all, chunk_totals = state(x, radius, settings, widened=True)
    mean_tangent, lse_tangent = torch.zeros_like(over_all.mean), torch.zeros_like(radius)
    weights = law(settings.D, x.shape[1])
    by_formula = tangent_radius is not None and not weights.adds_radius
    for weighted in _weighted_chunks(x, radius, over_all, chunk_totals, settings):
        chunk, rows, fraction = weighted
        moved_x, moved_radius = (
            None if t is None else t[rows] for t in (tangent_x, tangent_radius)
        )
        moved = Tangents(moved_x, None, moved_radius)
        problem = settings.problem(_widened(x[rows], chunk, settings), chunk, radius[rows])
        whole = State(*(value[rows] for value in over_all))
        if by_formula:
            tangent = formulas.posterior_mean_tangent(problem, whole, moved)
        else:
            own = _state(problem, settings)
            tangent = tangent_from_gradients(problem, own, whole.mean, moved, settings.backend)
            tangent = (fraction[:, None] * tangent[0], fraction * tangent[1])
        weighted.add(tangent[0], mean_tangent)
        weighted.add(tangent[1], lse_tangent)
    constant = weights.is_constant(over_all.nearest, radius)
    return mean_tangent, torch.where(constant, math.nan, lse_tangent)


def gradients(
    saved: Saved, chunk_totals: ChunkTotals, settings: Settings, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius over the references of all processes, in float64."""
    sums = _sum_of_gradients(saved, chunk_totals, settings, needs)
    grad_x, grad_radius = sums if settings.ranks is None else map(settings.ranks.sum, sums)
    weights = law(settings.D, saved.x.shape[1])
    grad_of_nearest = _gradient_of_score(saved.grad_logsumexp, saved.nearest, saved.radius, weights)
    constant = weights.is_constant(saved.nearest, saved.radius)
    grad_radius += torch.where(constant, 0.0, grad_of_nearest)
    return grad_x, grad_radius


def _sum_of_gradients(
    saved: Saved, chunk_totals: ChunkTotals, settings: Settings, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius, summed over the chunks of this process in float64.

    The gradient in radius lacks that of g times the score of the nearest of all references, which
    the caller adds.
    """
    grad_x = torch.zeros(saved.x.shape, dtype=wide_dtype(saved.x.device), device=saved.x.device)
    grad_radius = torch.zeros_like(saved.radius)
    mask = _ill_conditioned(saved, settings)
    pulls = torch.zeros_like(saved.radius)
    if mask is not None:
        pulls = _pulls(saved, chunk_totals, settings, mask)
    for weighted in _weighted_chunks(saved.x, saved.radius, saved.state, chunk_totals, settings):
        parts = [(weighted, False)]
        if mask is not None:
            parts = [(weighted.select(~mask), False), (weighted.select(mask), True)]
        for selected, in_float64 in parts:
            if len(selected.fraction) == 0:
                continue
            points = saved.select(selected.rows)
            if in_float64:
                points = points._replace(x=points.x.double(), grad_mean=points.grad_mean.double())
            average = pulls[selected.rows]
            added_x, added_radius = _gradients_of(selected, points, average, settings, needs)
            if needs[0]:
                selected.add(added_x, grad_x)
            if needs[1]:
                selected.add(added_radius, grad_radius)
    return grad_x, grad_radius


def _ill_conditioned(saved: Saved, settings: Settings) -> Tensor | None:
    """Mask (B,) of ill-conditioned points, whose gradients would show the rounding of the means.

    None if there is none. As csrc/cpu/ill_conditioned_rows.h, with a third of its limit.
    """
    N, wide = saved.x.shape[1], saved.radius.dtype
    # On a GPU the kernels compute in float32 only.
    if not may_wait(saved.x.device) or saved.x.dtype == wide:
        return None
    variance = law(settings.D, N).variance(saved.nearest, saved.radius)
    distance = (saved.nearest + variance).sqrt()
    largest = saved.mean.abs().amax(1).to(wide)
    rounding = torch.finfo(saved.x.dtype).eps / 2
    error = rounding * (largest * (1 + 3 / math.sqrt(N)) + distance / math.sqrt(N))
    # Where one reference counts alone, the mean is that reference, if its dtype is no wider.
    dtype = settings.part.source.dtype
    exact = dtype.itemsize <= saved.x.dtype.itemsize and dtype != torch.uint8
    mask = ((saved.total > 1) | (not exact)) & (error * distance > _MAX_ERROR * variance)
    return mask if bool(mask.any()) else None


def _pulls(saved: Saved, chunk_totals: ChunkTotals, settings: Settings, mask: Tensor) -> Tensor:
    """Σ_i q_i G·(mean_i − mean) (B,) of ill-conditioned points over all chunks, in float64.

    It is not 0, because mean is rounded.
    """
    pulls = torch.zeros_like(saved.radius)
    for weighted in _weighted_chunks(saved.x, saved.radius, saved.state, chunk_totals, settings):
        selected = weighted.select(mask)
        if len(selected.fraction) == 0:
            continue
        points = saved.select(selected.rows)
        own = _state(settings.problem(points.x.double(), weighted.chunk, points.radius), settings)
        selected.add(selected.fraction * _pull_of_chunk(own.mean, points), pulls)
    return pulls if settings.ranks is None else settings.ranks.sum(pulls)


def _pull_of_chunk(chunk_mean: Tensor, saved: Saved) -> Tensor:
    """G·(mean_i − mean) (B,) of a chunk with the mean mean_i."""
    wide = saved.radius.dtype
    return (saved.grad_mean.to(wide) * (chunk_mean.to(wide) - saved.mean.to(wide))).sum(1)


def _gradients_of(
    weighted: _WeightedChunk,
    saved: Saved,
    average: Tensor,
    settings: Settings,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """One chunk's part of the gradients in x and radius, for its points."""
    chunk, _, fraction = weighted
    problem = settings.problem(saved.x, chunk, saved.radius)
    own = _state(problem, settings)
    g = fraction * (_pull_of_chunk(own.mean, saved) - average + saved.grad_logsumexp)
    upstream = Upstream((fraction[:, None] * saved.grad_mean).to(saved.x.dtype), g)
    needed = [needs[0], False, needs[1]]
    grad_x, _, grad_radius = BACKWARD(upstream, own, needed, problem, settings.backend)
    # The gradient of Σ_i g_i times a score is much larger than the result. The part with the
    # nearest of all references, common to all chunks, is left out here and added by the caller.
    if needs[1]:
        radius, weights = saved.radius, law(settings.D, saved.x.shape[1])
        if weights.adds_radius:
            grad_radius = grad_radius - _gradient_of_score(g, saved.nearest, radius, weights)
        else:
            grad_radius = grad_radius - _gradient_of_score(g, own.nearest, radius, weights)
            grad_radius += _gradient_of_score(g, own.nearest - saved.nearest, radius, weights)
    return grad_x, grad_radius


def _gradient_of_score(g: Tensor, squared: Tensor, radius: Tensor, weights: Law) -> Tensor:
    """The gradient in radius of g times the score at a squared distance."""
    return weights.change(torch.zeros_like(g), g, squared, radius)
