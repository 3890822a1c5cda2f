"""The posterior mean over references in chunks, which one process or several hold.

The forward pass merges the states of the chunks (:mod:`pfgm.references.merging`). In the backward
pass, let q_i be the share of chunk i in the total weight, and G and g the upstream gradients of
mean and log-sum-exp. The upstream gradients of the chunk are then

    G_i = q_i G,   g_i = q_i (G·(mean_i − mean) + g)

Σ_i q_i G·(mean_i − mean) is 0 for exact means, but not for means rounded to float32. At a small σ
the gradient multiplies this error by d/σ². On the CPU the gradients of points where it would matter
are computed in float64; such points are called steep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import formulas, requested
from ..backends.problems import PosteriorMean, State, Tangents, Upstream
from ..backends.weights import at_limit, check_singular, log_sum_exp
from ..common.tensors import wide_dtype
from ..common.transforms import forward_mode, in_torch_func, map_rows
from ..ops.posterior_mean import (
    OnceDifferentiable,
    call,
    call_backward,
    tangent_dtype,
    tangent_from_gradients,
)
from .merging import merge, merge_over_ranks, relative_weight
from .part import Part
from .ranks import Ranks

_MIN_SHARE = 1e-18  # a chunk with a smaller share of the total weight is left out of the gradient
_MAX_ERROR = 1e-5  # the rounding error of g_i/‖G‖ times (N + D) d/s; points above it are steep


def compute(
    x: Tensor, radius: Tensor, part: Part, D: float, backend: str | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Mean (B, N) and log-sum-exp (B,) over the references of all processes.

    Differentiable once in x and radius.
    """
    shared, compiled = part.processes > 1, torch.compiler.is_compiling()
    if (shared or compiled) and (forward_mode() or in_torch_func()):
        raise RuntimeError(
            f"references is a ReferenceSet {'shared between processes' if shared else 'in a graph'}"
            ", which torch.func and forward-mode differentiation do not support; allowed are "
            "backward(), torch.autograd.grad, or a tensor as references."
        )
    given = _Given(part, part.ranks(x), D, backend or requested(), precision, part.version())
    wanted = torch.is_grad_enabled() and (x.requires_grad or radius.requires_grad)
    # Without autograd the call is a tenth of a millisecond faster.
    derived = wanted or forward_mode() or in_torch_func()
    function = _PosteriorMean.apply if derived else _PosteriorMean.forward
    mean, logsumexp, *_ = function(x, radius, given)
    return mean, logsumexp


class _Given(NamedTuple):
    """The references and options of one call, for its forward and backward passes."""

    part: Part
    ranks: Ranks | None
    D: float
    backend: str | None
    precision: str
    version: object
    """Version of the rows in the forward pass."""

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """Chunks (m, N) of the rows of this process."""
        for chunk in self.part.chunks(device):
            yield chunk.flatten(1)

    def sketch(self, place: int, chunk: Tensor, x: Tensor) -> Tensor | None:
        """The sketch of a chunk (m, N)."""
        return self.part.sketch(place, chunk, x, self.backend)

    def problem(
        self, x: Tensor, chunk: Tensor, radius: Tensor, sketch: Tensor | None = None
    ) -> PosteriorMean:
        """The posterior mean over one chunk (m, N)."""
        return PosteriorMean(x, chunk, radius, self.D, self.precision, sketch)

    def state(self, problem: PosteriorMean) -> State:
        """The result over one chunk."""
        mean, _, nearest, total = call(problem, self.backend)
        return State(mean, nearest, total)

    def share(self, chunk_totals: _ChunkTotals, state: State, radius: Tensor) -> Tensor:
        """Share (B,) of a chunk in the total weight of all references."""
        N = state.mean.shape[1]
        weight = relative_weight(chunk_totals.nearest, state.nearest, radius, self.D, N)
        return weight * chunk_totals.total / state.total

    def check_version(self) -> None:
        """Raises RuntimeError if the rows are no longer those of the forward pass."""
        if self.part.version() != self.version:
            raise RuntimeError(
                "references is a ReferenceSet whose rows were changed in place after the forward "
                "pass; the gradient needs the rows of the forward pass."
            )


class _ChunkTotals(NamedTuple):
    """Nearest and total of one chunk, each (B,), or of P chunks, each (B, P)."""

    nearest: Tensor
    total: Tensor


def _stack(each: list[_ChunkTotals]) -> _ChunkTotals:
    return _ChunkTotals(*(torch.stack(values, 1) for values in zip(*each, strict=True)))


# ---- torch.autograd --------------------------------------------------------------------------


class _PosteriorMean(torch.autograd.Function):
    """(x, radius, given) → mean (B, N), lse (B,), and the values that the backward pass needs."""

    @staticmethod
    def forward(x: Tensor, radius: Tensor, given: _Given) -> tuple[Tensor, ...]:
        ranks, D = given.ranks, given.D
        all_x, all_radius = x, radius
        if ranks is not None:
            all_x, all_radius = ranks.gather(x), ranks.gather(radius)
        each: list[_ChunkTotals] = []

        def states() -> Iterator[State]:
            for place, chunk in enumerate(given.chunks(x.device)):
                sketch = given.sketch(place, chunk, x)
                state = given.state(given.problem(all_x, chunk, all_radius, sketch))
                each.append(_ChunkTotals(state.nearest, state.total))
                yield state

        merged = merge(all_x, all_radius, D, states())
        chunk_totals = _stack(each)
        if ranks is not None:
            merged = merge_over_ranks(merged, all_x, all_radius, D, ranks)
        nearest, total, column = (t[:, None] for t in (merged.nearest, merged.total, radius))
        logsumexp = log_sum_exp(nearest, total, column, D, x.shape[1]).squeeze(1)
        return merged.mean.to(x.dtype), logsumexp, merged.nearest, merged.total, *chunk_totals

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, radius, ctx.given = inputs
        mean, _, *rest = output
        ctx.save_for_backward(x, radius, mean, *rest)
        ctx.save_for_forward(x, radius)
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_mean: Tensor | None, grad_logsumexp: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        mean, nearest = ctx.saved_tensors[2:4]
        grad_mean = torch.zeros_like(mean) if grad_mean is None else grad_mean
        if grad_logsumexp is None:
            grad_logsumexp = torch.zeros_like(nearest)
        found = _Gradient.apply(  # type: ignore[no-untyped-call]
            *ctx.saved_tensors, grad_mean, grad_logsumexp, ctx.given, needs
        )
        of_x, of_radius = (g if need else None for g, need in zip(found, needs, strict=True))
        return of_x, of_radius, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, radius = ctx.saved_tensors[:2]
        found = _Tangent.apply(x, radius, *tangents[:2], ctx.given)  # type: ignore[no-untyped-call]
        return (*found, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return map_rows(_PosteriorMean.apply, info.batch_size, in_dims, arguments, shared=())


class _Gradient(OnceDifferentiable):
    """The gradients in x and radius."""

    @staticmethod
    def forward(
        x: Tensor,
        radius: Tensor,
        mean: Tensor,
        nearest: Tensor,
        total: Tensor,
        chunk_nearest: Tensor,
        chunk_total: Tensor,
        grad_mean: Tensor,
        grad_logsumexp: Tensor,
        given: _Given,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        given.check_version()
        saved = _Saved(x, radius, mean, nearest, total, grad_mean, grad_logsumexp)
        ranks, D = given.ranks, given.D
        if ranks is not None:
            # Other processes may need gradients that this one does not.
            saved, needs = _Saved(*map(ranks.gather, saved)), (True, True)
        # Each process checks the points of all. If one raised alone, the others would wait for it.
        try:
            check_singular(at_limit(saved.nearest, saved.radius, D), saved.grad_logsumexp)
        except ValueError as error:
            rows = "" if ranks is None else " Rows are numbered over all processes."
            raise ValueError(f"{error}{rows}") from error
        of_x, of_radius = _sum_of_gradients(
            saved, _ChunkTotals(chunk_nearest, chunk_total), given, needs
        )
        if ranks is not None:
            of_x, of_radius = (ranks.own(ranks.sum(each)) for each in (of_x, of_radius))
        if math.isinf(D):
            of_nearest = _of_distance(grad_logsumexp, nearest, radius)
            of_radius += torch.where(at_limit(nearest, radius, D), 0.0, of_nearest)
        return of_x.to(x.dtype), of_radius

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return map_rows(_Gradient.apply, info.batch_size, in_dims, arguments, shared=())


class _Tangent(OnceDifferentiable):
    """(x, radius, their tangents, given) → the tangents of mean and log-sum-exp."""

    @staticmethod
    def forward(
        x: Tensor,
        radius: Tensor,
        tangent_x: Tensor | None,
        tangent_radius: Tensor | None,
        given: _Given,
    ) -> tuple[Tensor, Tensor]:
        of_mean, of_lse = _sum_of_tangents(x, radius, tangent_x, tangent_radius, given)
        return of_mean.to(x.dtype), of_lse

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return map_rows(_Tangent.apply, info.batch_size, in_dims, arguments, shared=())


# ---- chunks with a share of the weight -------------------------------------------------------


class _ChunkShare(NamedTuple):
    """A chunk, and its share in the total weight of the points where this is not negligible."""

    place: int
    """Number of the chunk."""
    chunk: Tensor
    """(m, N)."""
    rows: Tensor
    """(k,), numbers of these points."""
    share: Tensor
    """(k,)."""

    def select(self, mask: Tensor) -> _ChunkShare:
        """The same chunk for only those points that the mask (B,) selects."""
        selected = mask[self.rows]
        return self._replace(rows=self.rows[selected], share=self.share[selected])


def _shares(
    x: Tensor, radius: Tensor, state: State, chunk_totals: _ChunkTotals, given: _Given
) -> Iterator[_ChunkShare]:
    """Yields the chunks of this process that matter to any point away from the limits."""
    regular = ~at_limit(state.nearest, radius, given.D)  # at a limit the mean is locally constant
    chunks = enumerate(given.chunks(x.device))
    parts = zip(chunks, chunk_totals.nearest.unbind(1), chunk_totals.total.unbind(1), strict=True)
    for (place, chunk), nearest, total in parts:
        share = given.share(_ChunkTotals(nearest, total), state, radius)
        rows = (regular & (share > _MIN_SHARE)).nonzero().squeeze(1)
        if len(rows) > 0:
            yield _ChunkShare(place, chunk, rows, share[rows])


# ---- tangents --------------------------------------------------------------------------------


def _sum_of_tangents(
    x: Tensor,
    radius: Tensor,
    tangent_x: Tensor | None,
    tangent_radius: Tensor | None,
    given: _Given,
) -> tuple[Tensor, Tensor]:
    """The tangents of mean and log-sum-exp, summed over the chunks in float64."""
    each: list[_ChunkTotals] = []

    def widened(points: Tensor, chunk: Tensor) -> Tensor:
        return points.to(tangent_dtype(x, chunk, given.backend))

    def states() -> Iterator[State]:
        for chunk in given.chunks(x.device):
            state = given.state(given.problem(widened(x, chunk), chunk, radius))
            each.append(_ChunkTotals(state.nearest, state.total))
            yield state

    state = merge(x, radius, given.D, states())
    of_mean, of_lse = torch.zeros_like(state.mean), torch.zeros_like(radius)
    by_formula = math.isinf(given.D) and tangent_radius is not None
    for _, chunk, rows, share in _shares(x, radius, state, _stack(each), given):
        of_x, of_radius = (None if t is None else t[rows] for t in (tangent_x, tangent_radius))
        tangents = Tangents(of_x, None, of_radius)
        problem = given.problem(widened(x[rows], chunk), chunk, radius[rows])
        over_all = State(*(value[rows] for value in state))
        if by_formula:
            found = formulas.posterior_mean_tangent(problem, over_all, tangents)
        else:
            own = given.state(problem)
            found = tangent_from_gradients(problem, own, over_all.mean, tangents, given.backend)
            found = (share[:, None] * found[0], share * found[1])
        of_mean.index_add_(0, rows, found[0])
        of_lse.index_add_(0, rows, found[1])
    limit = at_limit(state.nearest, radius, given.D)
    return of_mean, torch.where(limit, math.nan, of_lse)


# ---- gradients -------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """The values that the forward pass saved, and the upstream gradients."""

    x: Tensor
    radius: Tensor
    mean: Tensor
    nearest: Tensor
    total: Tensor
    grad_mean: Tensor
    grad_logsumexp: Tensor

    @property
    def state(self) -> State:
        return State(self.mean, self.nearest, self.total)

    def select(self, rows: Tensor) -> _Saved:
        """The same for only the points with these numbers."""
        return _Saved(*(each[rows] for each in self))


def _sum_of_gradients(
    saved: _Saved, chunk_totals: _ChunkTotals, given: _Given, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius, summed over the chunks of this process in float64.

    At D = ∞ the gradient in radius lacks the term g d²/σ³ with the distance d of the nearest of all
    references. The caller adds it.
    """
    of_x = torch.zeros(saved.x.shape, dtype=wide_dtype(saved.x.device), device=saved.x.device)
    of_radius = torch.zeros_like(saved.radius)
    steep = _is_steep(saved, given)
    averages = torch.zeros_like(saved.radius)
    if bool(steep.any()):
        averages = _averages(saved, chunk_totals, given, steep)
    for shared in _shares(saved.x, saved.radius, saved.state, chunk_totals, given):
        for share, wide in ((shared.select(~steep), False), (shared.select(steep), True)):
            rows = share.rows
            if len(rows) == 0:
                continue
            points = saved.select(rows)
            if wide:
                points = points._replace(x=points.x.double(), grad_mean=points.grad_mean.double())
            found_x, found_radius = _gradients_of(share, points, averages[rows], given, needs)
            if needs[0]:
                of_x.index_add_(0, rows, found_x.to(of_x.dtype))
            if needs[1]:
                of_radius.index_add_(0, rows, found_radius)
    return of_x, of_radius


def _is_steep(saved: _Saved, given: _Given) -> Tensor:
    """Mask (B,) of the steep points, whose gradients would show the rounding of the means.

    The bound is that of csrc/cpu/steep_rows.h.
    """
    N, wide = saved.x.shape[1], saved.radius.dtype
    # On a GPU the kernels compute in float32 only.
    if saved.x.device.type != "cpu" or saved.x.dtype == wide:
        return torch.zeros_like(saved.radius, dtype=torch.bool)
    if math.isinf(given.D):
        variance = saved.radius.square()
    else:
        variance = (saved.nearest + saved.radius.square()) / (N + given.D)
    distance = (saved.nearest + variance).sqrt()
    largest = saved.mean.abs().amax(1).to(wide)
    rounding = torch.finfo(saved.x.dtype).eps / 2
    error = rounding * (largest * (1 + 3 / math.sqrt(N)) + distance / math.sqrt(N))
    return (saved.total > 1) & (error * distance > _MAX_ERROR * variance)


def _averages(saved: _Saved, chunk_totals: _ChunkTotals, given: _Given, steep: Tensor) -> Tensor:
    """Σ_i q_i G·(mean_i − mean) (B,) of steep points over all chunks of all processes, in float64.

    It is not 0, because mean is rounded.
    """
    averages = torch.zeros_like(saved.radius)
    for shared in _shares(saved.x, saved.radius, saved.state, chunk_totals, given):
        _, chunk, rows, share = shared.select(steep)
        if len(rows) == 0:
            continue
        points = saved.select(rows)
        own = given.state(given.problem(points.x.double(), chunk, points.radius))
        averages.index_add_(0, rows, share * _pull(own.mean, points))
    return averages if given.ranks is None else given.ranks.sum(averages)


def _pull(chunk_mean: Tensor, saved: _Saved) -> Tensor:
    """G·(mean_i − mean) (B,) of a chunk with the mean mean_i."""
    wide = saved.radius.dtype
    return (saved.grad_mean.to(wide) * (chunk_mean.to(wide) - saved.mean.to(wide))).sum(1)


def _gradients_of(
    chunk_share: _ChunkShare,
    saved: _Saved,
    average: Tensor,
    given: _Given,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """One chunk's part of the gradients in x and radius, for the points of chunk_share."""
    place, chunk, _, share = chunk_share
    x = saved.x
    # Sketches are for points in the dtype of the forward pass.
    sketch = None if x.dtype != saved.mean.dtype else given.sketch(place, chunk, x)
    problem = given.problem(x, chunk, saved.radius, sketch)
    own = given.state(problem)
    g = share * (_pull(own.mean, saved) - average + saved.grad_logsumexp)
    upstream = Upstream((share[:, None] * saved.grad_mean).to(x.dtype), g)
    needed = [needs[0], False, needs[1]]
    of_x, _, of_radius = call_backward(problem, own, upstream, needed, given.backend)
    if needs[1] and math.isinf(given.D):
        # Σ_i g_i d_i²/σ³ is much larger than the result. The part that all chunks share, with the
        # nearest of all references, is left out here and added by the caller.
        of_radius = of_radius - _of_distance(g, own.nearest, saved.radius)
        of_radius += _of_distance(g, own.nearest - saved.nearest, saved.radius)
    return of_x, of_radius


def _of_distance(g: Tensor, squared: Tensor, sigma: Tensor) -> Tensor:
    """g d²/σ³, the gradient in σ of g times the score at the squared distance d², at D = ∞."""
    return g * (squared / sigma / sigma) / sigma
