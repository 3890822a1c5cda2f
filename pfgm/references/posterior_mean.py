"""The posterior mean over references that come in parts: chunks of a file, ranks of a group.

The forward pass merges the states of the chunks (:mod:`pfgm.references.merging`). In the backward
pass, with the share q_i of chunk i in the total weight and the upstream gradients G of mean and g
of lse, the upstream gradients of a chunk are

    G_i = q_i G,   g_i = q_i (G·(mean_i − mean) + g)

Σ_i q_i G·(mean_i − mean) is 0, but not for means rounded to float32, and at a small σ the error is
multiplied by d/σ². Points where it would matter have their gradients in float64 on the CPU.
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

_LEAST_SHARE = 1e-18  # of a chunk in the total weight, below which it has no gradient
_LARGEST_ERROR = 1e-5  # of g_i relative to ‖G‖, times (N + D) d/s, that needs no float64


def compute(
    x: Tensor, radius: Tensor, part: Part, D: float, backend: str | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Mean (B, N) and log-sum-exp (B,) over all references, of which this process holds a part.

    Differentiable once in x and radius.
    """
    shared, compiled = part.processes > 1, torch.compiler.is_compiling()
    if (shared or compiled) and (forward_mode() or in_torch_func()):
        raise RuntimeError(
            f"references is a ReferenceSet {'shared between processes' if shared else 'in a graph'}"
            ", which torch.func and forward-mode differentiation do not support; allowed are "
            "backward() and torch.autograd.grad, or a tensor."
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
    """Of the rows in the forward pass."""

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

    def share(self, alone: _Alone, state: State, radius: Tensor) -> Tensor:
        """Share of a chunk in the total weight of all references."""
        N = state.mean.shape[1]
        weight = relative_weight(alone.nearest, state.nearest, radius, self.D, N)
        return weight * alone.total / state.total

    def check_version(self) -> None:
        """Raises RuntimeError where the rows are no longer those of the forward pass."""
        if self.part.version() != self.version:
            raise RuntimeError(
                "references is a ReferenceSet whose rows were changed in place after the forward "
                "pass; its gradient needs them as they were."
            )


class _Alone(NamedTuple):
    """Nearest and total of one chunk (B,), or of each of P chunks (B, P)."""

    nearest: Tensor
    total: Tensor


def _stack(each: list[_Alone]) -> _Alone:
    return _Alone(*(torch.stack(values, 1) for values in zip(*each, strict=True)))


# ---- torch.autograd --------------------------------------------------------------------------


class _PosteriorMean(torch.autograd.Function):
    """(x, radius, given) → mean (B, N), lse (B,), and what the backward pass needs."""

    @staticmethod
    def forward(x: Tensor, radius: Tensor, given: _Given) -> tuple[Tensor, ...]:
        ranks, D = given.ranks, given.D
        all_x, all_radius = x, radius
        if ranks is not None:
            all_x, all_radius = ranks.gather(x), ranks.gather(radius)
        each: list[_Alone] = []

        def states() -> Iterator[State]:
            for place, chunk in enumerate(given.chunks(x.device)):
                sketch = given.sketch(place, chunk, x)
                state = given.state(given.problem(all_x, chunk, all_radius, sketch))
                each.append(_Alone(state.nearest, state.total))
                yield state

        merged = merge(all_x, all_radius, D, states())
        alone = _stack(each)
        if ranks is not None:
            merged = merge_over_ranks(merged, all_x, all_radius, D, ranks)
        nearest, total, column = (t[:, None] for t in (merged.nearest, merged.total, radius))
        logsumexp = log_sum_exp(nearest, total, column, D, x.shape[1]).squeeze(1)
        return merged.mean.to(x.dtype), logsumexp, merged.nearest, merged.total, *alone

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
        alone_nearest: Tensor,
        alone_total: Tensor,
        grad_mean: Tensor,
        grad_logsumexp: Tensor,
        given: _Given,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        given.check_version()
        saved = _Saved(x, radius, mean, nearest, total, grad_mean, grad_logsumexp)
        ranks, D = given.ranks, given.D
        if ranks is not None:
            # Other processes may need what this one does not.
            saved, needs = _Saved(*map(ranks.gather, saved)), (True, True)
        # Points of all processes are checked: where one raises, none may wait for it below.
        try:
            check_singular(at_limit(saved.nearest, saved.radius, D), saved.grad_logsumexp)
        except ValueError as error:
            rows = "" if ranks is None else " Rows are numbered over all processes."
            raise ValueError(f"{error}{rows}") from error
        of_x, of_radius = _sum_of_gradients(saved, _Alone(alone_nearest, alone_total), given, needs)
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


class _Share(NamedTuple):
    """A chunk (m, N), the points with a share of their weight in it, and that share."""

    place: int
    chunk: Tensor
    rows: Tensor
    """Numbers of the points."""
    share: Tensor
    """One for each of them."""

    def of(self, chosen: Tensor) -> _Share:
        """The same for those of its points that are chosen (B,)."""
        own = chosen[self.rows]
        return self._replace(rows=self.rows[own], share=self.share[own])


def _shares(
    x: Tensor, radius: Tensor, state: State, alone: _Alone, given: _Given
) -> Iterator[_Share]:
    """The chunks of this process that have a share in points away from the limits."""
    regular = ~at_limit(state.nearest, radius, given.D)  # at a limit the mean is locally constant
    chunks = enumerate(given.chunks(x.device))
    parts = zip(chunks, alone.nearest.unbind(1), alone.total.unbind(1), strict=True)
    for (place, chunk), nearest, total in parts:
        share = given.share(_Alone(nearest, total), state, radius)
        rows = (regular & (share > _LEAST_SHARE)).nonzero().squeeze(1)
        if len(rows) > 0:
            yield _Share(place, chunk, rows, share[rows])


# ---- tangents --------------------------------------------------------------------------------


def _sum_of_tangents(
    x: Tensor,
    radius: Tensor,
    tangent_x: Tensor | None,
    tangent_radius: Tensor | None,
    given: _Given,
) -> tuple[Tensor, Tensor]:
    """The tangents of mean and log-sum-exp, summed over the chunks in float64."""
    each: list[_Alone] = []

    def widened(points: Tensor, chunk: Tensor) -> Tensor:
        return points.to(tangent_dtype(x, chunk, given.backend))

    def states() -> Iterator[State]:
        for chunk in given.chunks(x.device):
            state = given.state(given.problem(widened(x, chunk), chunk, radius))
            each.append(_Alone(state.nearest, state.total))
            yield state

    state = merge(x, radius, given.D, states())
    of_mean, of_lse = torch.zeros_like(state.mean), torch.zeros_like(radius)
    by_formula = math.isinf(given.D) and tangent_radius is not None
    for part in _shares(x, radius, state, _stack(each), given):
        rows = part.rows
        of_x, of_radius = (None if t is None else t[rows] for t in (tangent_x, tangent_radius))
        tangents = Tangents(of_x, None, of_radius)
        problem = given.problem(widened(x[rows], part.chunk), part.chunk, radius[rows])
        whole = State(*(value[rows] for value in state))
        if by_formula:
            found = formulas.posterior_mean_tangent(problem, whole, tangents)
        else:
            own = given.state(problem)
            found = tangent_from_gradients(problem, own, whole.mean, tangents, given.backend)
            found = (part.share[:, None] * found[0], part.share * found[1])
        of_mean.index_add_(0, rows, found[0])
        of_lse.index_add_(0, rows, found[1])
    limit = at_limit(state.nearest, radius, given.D)
    return of_mean, torch.where(limit, math.nan, of_lse)


# ---- gradients -------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What the forward pass has saved, and the upstream gradients."""

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

    def of(self, rows: Tensor) -> _Saved:
        """The same for the points of these numbers."""
        return _Saved(*(each[rows] for each in self))


def _sum_of_gradients(
    saved: _Saved, alone: _Alone, given: _Given, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius, summed over the chunks of this process in float64.

    At D = ∞ the term g d²/σ³ of the nearest of all references is left out of that in radius.
    """
    of_x = torch.zeros(saved.x.shape, dtype=wide_dtype(saved.x.device), device=saved.x.device)
    of_radius = torch.zeros_like(saved.radius)
    steep = _is_steep(saved, given)
    averages = torch.zeros_like(saved.radius)
    if bool(steep.any()):
        averages = _averages(saved, alone, given, steep)
    for whole in _shares(saved.x, saved.radius, saved.state, alone, given):
        for part, is_steep in ((whole.of(~steep), False), (whole.of(steep), True)):
            if len(part.rows) == 0:
                continue
            some = saved.of(part.rows)
            if is_steep:
                some = some._replace(x=some.x.double(), grad_mean=some.grad_mean.double())
            found_x, found_radius = _gradients_of(part, some, averages[part.rows], given, needs)
            if needs[0]:
                of_x.index_add_(0, part.rows, found_x.to(of_x.dtype))
            if needs[1]:
                of_radius.index_add_(0, part.rows, found_radius)
    return of_x, of_radius


def _is_steep(saved: _Saved, given: _Given) -> Tensor:
    """The points (B,) whose gradients would show that means are rounded.

    The bound is that of csrc/cpu/steep_rows.h.
    """
    N, wide = saved.x.shape[1], saved.radius.dtype
    # Kernels on a GPU compute in float32 alone.
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
    return (saved.total > 1) & (error * distance > _LARGEST_ERROR * variance)


def _averages(saved: _Saved, alone: _Alone, given: _Given, steep: Tensor) -> Tensor:
    """Σ_i q_i G·(mean_i − mean) (B,) of steep points over all chunks of all processes, in float64.

    It is not 0, because mean is rounded.
    """
    averages = torch.zeros_like(saved.radius)
    for whole in _shares(saved.x, saved.radius, saved.state, alone, given):
        part = whole.of(steep)
        if len(part.rows) == 0:
            continue
        some = saved.of(part.rows)
        own = given.state(given.problem(some.x.double(), part.chunk, some.radius))
        averages.index_add_(0, part.rows, part.share * _pull(own.mean, some))
    return averages if given.ranks is None else given.ranks.sum(averages)


def _pull(mean: Tensor, saved: _Saved) -> Tensor:
    """G·(mean_i − mean) (B,) of a chunk's own mean."""
    wide = saved.radius.dtype
    return (saved.grad_mean.to(wide) * (mean.to(wide) - saved.mean.to(wide))).sum(1)


def _gradients_of(
    part: _Share, saved: _Saved, average: Tensor, given: _Given, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """One chunk's gradients in x and radius, for the points that it has a share in."""
    x, share = saved.x, part.share
    # Sketches are for points in the dtype of the forward pass.
    sketch = None if x.dtype != saved.mean.dtype else given.sketch(part.place, part.chunk, x)
    problem = given.problem(x, part.chunk, saved.radius, sketch)
    own = given.state(problem)
    g = share * (_pull(own.mean, saved) - average + saved.grad_logsumexp)
    upstream = Upstream((share[:, None] * saved.grad_mean).to(x.dtype), g)
    needed = [needs[0], False, needs[1]]
    of_x, _, of_radius = call_backward(problem, own, upstream, needed, given.backend)
    if needs[1] and math.isinf(given.D):
        # Σ_i g_i d_i²/σ³ is much larger than the result. What all chunks share is left out.
        of_radius = of_radius - _of_distance(g, own.nearest, saved.radius)
        of_radius += _of_distance(g, own.nearest - saved.nearest, saved.radius)
    return of_x, of_radius


def _of_distance(g: Tensor, squared: Tensor, sigma: Tensor) -> Tensor:
    """g d²/σ³: the gradient in σ of g times the score of a squared distance, at D = ∞."""
    return g * (squared / sigma / sigma) / sigma
