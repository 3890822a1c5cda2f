"""The posterior mean over references that come in parts: chunks of a stream, ranks of a group.

Two results over disjoint references merge exactly. With n the squared distance of the nearest
reference, t the total weight relative to it and ℓ(n) its score,

    n = min(n₁, n₂),  w_i = t_i exp(ℓ(n_i) − ℓ(n)),  t = w₁ + w₂,  mean = (w₁ mean₁ + w₂ mean₂)/t

which holds at the limits too, where scores are infinite. Backward, with the share q_i = w_i/t of a
part and upstream gradients G of mean and g of lse, a part's own are

    G_i = q_i G,   g_i = q_i (G·(mean_i − mean) + g)

Σ_i q_i G·(mean_i − mean) = 0, which the rounding of float32 means breaks; beside a small σ that is
multiplied by d/σ². Points where it would show have their gradients in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends import requested
from ..backends.reference import posterior_mean_tangent
from ..backends.weights import at_limit, check_singular, log_sum_exp, log_weight
from ..common.tensors import wide_dtype
from ..common.transforms import forward_mode, functional, map_rows
from ..ops import OnceDifferentiable, part_of_tangent, tangent_dtype

__all__ = ["Exchange", "Parts", "posterior_mean"]


class Exchange(Protocol):
    """How the processes that hold parts of the references see one another's queries."""

    size: int
    """Processes."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (B, ...) of all processes, one after the other in the order of their ranks."""

    def own(self, rows: Tensor) -> Tensor:
        """Of gathered rows, those of this process."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of values that all of them have."""

    def least(self, values: Tensor) -> Tensor:
        """The minimum over the processes of values that all of them have."""


Sketch = Callable[[int, Tensor, Tensor, str | None], Tensor | None]
"""From the number of a part, the part (m, N), queries and a backend to :func:`pfgm.ops.sketch`."""


class Parts(NamedTuple):
    """References that come in parts."""

    chunks: Callable[[torch.device], Iterator[Tensor]]
    """Gives the parts (m, *S) of this process, one after the other, on a device."""
    exchange: Callable[[Tensor], Exchange] | None = None
    """Between the processes, for queries (B, N); None where there is one."""
    sketch: Sketch | None = None
    """What is kept of a part; None where nothing is."""
    version: Callable[[], object] | None = None
    """Something that is another once the rows were changed; None where nobody knows."""


_UNSEEN = 1e-18  # the share of a part below which its gradients are not looked at


_LEFT_ALONE = 1e-5  # the error of g_i, relative to ‖G‖, times (N + D) d/s that is left alone


class _Merged(NamedTuple):
    mean: Tensor
    nearest: Tensor
    total: Tensor


def _merge(x: Tensor, radius: Tensor, D: float, parts: Iterable[_Merged]) -> _Merged:
    """Merges what parts say, in float64."""
    wide = wide_dtype(x.device)
    mean = torch.zeros(x.shape, dtype=wide, device=x.device)
    nearest, total = torch.full_like(radius, math.inf), torch.zeros_like(radius)
    for part in parts:
        least = torch.minimum(nearest, part.nearest)
        # The first part has nothing to rescale: inf − inf, times a total of 0.
        kept = torch.where(total == 0, 0.0, _weight(nearest, least, radius, D, x.shape[1]) * total)
        added = _weight(part.nearest, least, radius, D, x.shape[1]) * part.total
        nearest, total = least, kept + added
        mean.lerp_(part.mean.to(wide), (added / total)[:, None])
    return _Merged(mean, nearest, total)


def _weight(nearest: Tensor, least: Tensor, radius: Tensor, D: float, N: int) -> Tensor:
    return log_weight(nearest - least, least, radius, D, N).exp()


def _over_processes(
    found: _Merged, x: Tensor, radius: Tensor, D: float, exchange: Exchange
) -> _Merged:
    """What this process found for all queries, merged with what the others did: for its own."""
    least = exchange.least(found.nearest)
    share = _weight(found.nearest, least, radius, D, x.shape[1]) * found.total
    total = exchange.sum(share)
    # On the wire in the type of x: as many bytes as one reduction of the queries.
    mean = exchange.sum(((share / total)[:, None] * found.mean).to(x.dtype))
    return _Merged(*(exchange.own(values) for values in (mean, least, total)))


class _Over(NamedTuple):
    """What the forward pass goes over, and the backward pass goes over again."""

    parts: Parts
    exchange: Exchange | None
    D: float
    backend: str | None
    precision: str
    version: object
    """Of the rows in the forward pass."""

    def sketch(self, place: int, chunk: Tensor, x: Tensor) -> Tensor | None:
        """What is kept of a part (m, N)."""
        return self.parts.sketch and self.parts.sketch(place, chunk, x, self.backend)

    def say(
        self, x: Tensor, chunk: Tensor, radius: Tensor, sketch: Tensor | None = None
    ) -> _Merged:
        """What one part (m, N) says."""
        mean, _, nearest, total = torch.ops.pfgm.posterior_mean(
            x, chunk, radius, self.D, self.backend, self.precision, sketch
        )
        return _Merged(mean, nearest, total)

    def check_version(self) -> None:
        """RuntimeError where the rows are no longer those of the forward pass."""
        if self.parts.version is not None and self.parts.version() != self.version:
            raise RuntimeError(
                "references is a ReferenceSet whose rows were changed in place after the forward "
                "pass; its gradient needs them as they were."
            )


class _Alone(NamedTuple):
    """What a part said for itself, (B,), or each of P parts, (B, P): it tells their shares."""

    nearest: Tensor
    total: Tensor


def _together(each: list[_Alone]) -> _Alone:
    return _Alone(*(torch.stack(values, 1) for values in zip(*each, strict=True)))


class _PosteriorMean(torch.autograd.Function):
    """(x, radius, over) → mean (B, N), lse (B,), and what the backward pass takes up again."""

    @staticmethod
    def forward(x: Tensor, radius: Tensor, over: _Over) -> tuple[Tensor, ...]:
        exchange = over.exchange
        seen_x, seen_radius = x, radius
        if exchange is not None:
            seen_x, seen_radius = exchange.gather(x), exchange.gather(radius)
        each: list[_Alone] = []

        def results() -> Iterator[_Merged]:
            for place, chunk in enumerate(over.parts.chunks(x.device)):
                chunk = chunk.flatten(1)
                sketch = over.sketch(place, chunk, x)
                said = over.say(seen_x, chunk, seen_radius, sketch)
                each.append(_Alone(said.nearest, said.total))
                yield said

        merged = _merge(seen_x, seen_radius, over.D, results())
        alone = _together(each)
        if exchange is not None:
            merged = _over_processes(merged, seen_x, seen_radius, over.D, exchange)
        mean = merged.mean.to(x.dtype)
        nearest, total, column = (each[:, None] for each in (*merged[1:], radius))
        logsumexp = log_sum_exp(nearest, total, column, over.D, x.shape[1]).squeeze(1)
        return mean, logsumexp, merged.nearest, merged.total, *alone

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, radius, ctx.over = inputs
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
            *ctx.saved_tensors, grad_mean, grad_logsumexp, ctx.over, needs
        )
        of_x, of_radius = (g if need else None for g, need in zip(found, needs, strict=True))
        return of_x, of_radius, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, radius = ctx.saved_tensors[:2]
        found = _Tangent.apply(x, radius, *tangents[:2], ctx.over)  # type: ignore[no-untyped-call]
        return (*found, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return map_rows(_PosteriorMean.apply, info.batch_size, in_dims, arguments, shared=())


class _Gradient(OnceDifferentiable):
    """The gradients in x and radius; not differentiable itself, which it says where it matters."""

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
        over: _Over,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        over.check_version()
        seen = _Saved(x, radius, mean, nearest, total, grad_mean, grad_logsumexp)
        exchange = over.exchange
        if exchange is not None:
            # Others may need what this process does not.
            seen, needs = _Saved(*map(exchange.gather, seen)), (True, True)
        # Of all queries, so that no process is left alone in what follows.
        try:
            check_singular(at_limit(seen.nearest, seen.radius, over.D), seen.grad_logsumexp)
        except ValueError as error:
            rows = "" if exchange is None else " Rows are numbered over all processes."
            raise ValueError(f"{error}{rows}") from error
        alone = _Alone(alone_nearest, alone_total)
        of_x, of_radius = _sum_of_gradients(seen, alone, over, needs)
        if exchange is not None:
            of_x, of_radius = (exchange.own(exchange.sum(each)) for each in (of_x, of_radius))
        if math.isinf(over.D):
            of_nearest = _of_distance(grad_logsumexp, nearest, radius)
            of_radius += torch.where(at_limit(nearest, radius, over.D), 0.0, of_nearest)
        return of_x.to(x.dtype), of_radius

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return map_rows(_Gradient.apply, info.batch_size, in_dims, arguments, shared=())


class _Tangent(OnceDifferentiable):
    """(x, radius, their tangents, over) → the tangents of mean and log-sum-exp."""

    @staticmethod
    def forward(
        x: Tensor,
        radius: Tensor,
        tangent_x: Tensor | None,
        tangent_radius: Tensor | None,
        over: _Over,
    ) -> tuple[Tensor, Tensor]:
        of_mean, of_lse = _sum_of_tangents(x, radius, tangent_x, tangent_radius, over)
        return of_mean.to(x.dtype), of_lse

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return map_rows(_Tangent.apply, info.batch_size, in_dims, arguments, shared=())


class _Saved(NamedTuple):
    """The forward pass, and upstream gradients."""

    x: Tensor
    radius: Tensor
    mean: Tensor
    nearest: Tensor
    total: Tensor
    grad_mean: Tensor
    grad_logsumexp: Tensor


class _Part(NamedTuple):
    """A part (m, N), the rows of queries of which it has a share, and that share."""

    place: int
    chunk: Tensor
    rows: Tensor
    share: Tensor

    def of(self, chosen: Tensor) -> _Part:
        """The same for those of its rows that are chosen (B,)."""
        own = chosen[self.rows]
        return self._replace(rows=self.rows[own], share=self.share[own])


def _seen_parts(
    x: Tensor, radius: Tensor, nearest: Tensor, total: Tensor, alone: _Alone, over: _Over
) -> Iterator[_Part]:
    """The parts of this process that have a share of queries away from the limits."""
    regular = ~at_limit(nearest, radius, over.D)  # else the mean is locally constant
    chunks = enumerate(over.parts.chunks(x.device))
    parts = zip(chunks, alone.nearest.unbind(1), alone.total.unbind(1), strict=True)
    for (place, chunk), own_nearest, own_total in parts:
        share = _weight(own_nearest, nearest, radius, over.D, x.shape[1]) * own_total / total
        rows = (regular & (share > _UNSEEN)).nonzero().squeeze(1)
        if len(rows) > 0:
            yield _Part(place, chunk.flatten(1), rows, share[rows])


def _sum_of_tangents(
    x: Tensor,
    radius: Tensor,
    tangent_x: Tensor | None,
    tangent_radius: Tensor | None,
    over: _Over,
) -> tuple[Tensor, Tensor]:
    """The tangents of mean and log-sum-exp, added up over the parts in float64."""
    each: list[_Alone] = []

    def wide(points: Tensor, chunk: Tensor) -> Tensor:
        return points.to(tangent_dtype(x, chunk, over.backend))

    def results() -> Iterator[_Merged]:
        for chunk in over.parts.chunks(x.device):
            said = over.say(wide(x, chunk), chunk.flatten(1), radius)
            each.append(_Alone(said.nearest, said.total))
            yield said

    mean, nearest, total = _merge(x, radius, over.D, results())
    of_mean, of_lse = torch.zeros_like(mean), torch.zeros_like(radius)
    by_formula = math.isinf(over.D) and tangent_radius is not None
    for part in _seen_parts(x, radius, nearest, total, _together(each), over):
        rows = part.rows
        of_x, of_radius = (None if t is None else t[rows] for t in (tangent_x, tangent_radius))
        at, r = wide(x[rows], part.chunk), radius[rows]
        if by_formula:
            found = posterior_mean_tangent(
                at, part.chunk, r, mean[rows], nearest[rows], total[rows], over.D,
                of_x, None, of_radius,
            )  # fmt: skip
        else:
            own = over.say(at, part.chunk, r)
            found = part_of_tangent(
                at, part.chunk, r, mean[rows], own.nearest, own.total, over.D,
                of_x, of_radius, own.mean, over.backend, over.precision,
            )  # fmt: skip
            found = (part.share[:, None] * found[0], part.share * found[1])
        of_mean.index_add_(0, rows, found[0])
        of_lse.index_add_(0, rows, found[1])
    limit = at_limit(nearest, radius, over.D)
    return of_mean, torch.where(limit, math.nan, of_lse)


def _sum_of_gradients(
    seen: _Saved, alone: _Alone, over: _Over, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius of every part of this process, added up in float64.

    At D = ∞ that of radius lacks g d²/σ³ of the nearest reference of all.
    """
    of_x = torch.zeros(seen.x.shape, dtype=wide_dtype(seen.x.device), device=seen.x.device)
    of_radius = torch.zeros_like(seen.radius)
    steep = _is_steep(seen, over)
    averages = torch.zeros_like(seen.radius)
    if bool(steep.any()):
        averages = _averages(seen, alone, over, steep)
    for whole in _seen_parts(seen.x, seen.radius, seen.nearest, seen.total, alone, over):
        for part, is_steep in ((whole.of(~steep), False), (whole.of(steep), True)):
            if len(part.rows) == 0:
                continue
            some = _Saved(*(each[part.rows] for each in seen))
            if is_steep:
                some = some._replace(x=some.x.double(), grad_mean=some.grad_mean.double())
            found_x, found_radius = _part_of_gradient(some, part, averages[part.rows], over, needs)
            if needs[0]:
                of_x.index_add_(0, part.rows, found_x.to(of_x.dtype))
            if needs[1]:
                of_radius.index_add_(0, part.rows, found_radius)
    return of_x, of_radius


def _is_steep(seen: _Saved, over: _Over) -> Tensor:
    """Of which queries the rounding of the means would show (as in csrc/cpu/steep_rows.h)."""
    N, wide = seen.x.shape[1], seen.radius.dtype
    # Kernels of GPUs compute in float32 alone.
    if seen.x.device.type != "cpu" or seen.x.dtype == wide:
        return torch.zeros_like(seen.radius, dtype=torch.bool)
    if math.isinf(over.D):
        variance = seen.radius.square()
    else:
        variance = (seen.nearest + seen.radius.square()) / (N + over.D)
    distance = (seen.nearest + variance).sqrt()
    largest = seen.mean.abs().amax(1).to(wide)
    rounding = torch.finfo(seen.x.dtype).eps / 2
    error = rounding * (largest * (1 + 3 / math.sqrt(N)) + distance / math.sqrt(N))
    return (seen.total > 1) & (error * distance > _LEFT_ALONE * variance)


def _averages(seen: _Saved, alone: _Alone, over: _Over, steep: Tensor) -> Tensor:
    """Σ_i q_i G·(mean_i − mean) (B,) of steep queries over the parts of all processes, in float64;
    it is not 0, for the mean at hand is rounded."""
    averages = torch.zeros_like(seen.radius)
    for whole in _seen_parts(seen.x, seen.radius, seen.nearest, seen.total, alone, over):
        part = whole.of(steep)
        if len(part.rows) == 0:
            continue
        some = _Saved(*(each[part.rows] for each in seen))
        said = over.say(some.x.double(), part.chunk, some.radius)
        averages.index_add_(0, part.rows, part.share * _pull(said.mean, some))
    return averages if over.exchange is None else over.exchange.sum(averages)


def _pull(mean: Tensor, seen: _Saved) -> Tensor:
    """G·(mean_i − mean) (B,) of a part."""
    wide = seen.radius.dtype
    return (seen.grad_mean.to(wide) * (mean.to(wide) - seen.mean.to(wide))).sum(1)


def _part_of_gradient(
    seen: _Saved, part: _Part, average: Tensor, over: _Over, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """One part's gradients in x and radius, for queries of which it has a share."""
    chunk, share = part.chunk, part.share
    sketch = None if seen.x.dtype != seen.mean.dtype else over.sketch(part.place, chunk, seen.x)
    said = over.say(seen.x, chunk, seen.radius, sketch)
    g = share * (_pull(said.mean, seen) - average + seen.grad_logsumexp)
    of_x, _, of_radius = torch.ops.pfgm.posterior_mean_backward(
        (share[:, None] * seen.grad_mean).to(seen.x.dtype),
        g,
        seen.x,
        chunk,
        seen.radius,
        *said,
        over.D,
        [needs[0], False, needs[1]],
        over.backend,
        over.precision,
        sketch,
    )
    if needs[1] and math.isinf(over.D):
        # Σ_i g_i d_i²/σ³, much larger than what is left of it, is summed without what is common.
        of_radius = of_radius - _of_distance(g, said.nearest, seen.radius)
        of_radius += _of_distance(g, said.nearest - seen.nearest, seen.radius)
    return of_x, of_radius


def _of_distance(g: Tensor, squared: Tensor, sigma: Tensor) -> Tensor:
    """g d²/σ³: the gradient in σ of g times the score of a squared distance, at D = ∞."""
    return g * (squared / sigma / sigma) / sigma


def posterior_mean(
    x: Tensor, radius: Tensor, parts: Parts, D: float, backend: str | None, precision: str
) -> tuple[Tensor, Tensor]:
    """As :func:`pfgm.ops.posterior_mean`, mean (B, N) and lse (B,), over references in parts.

    Differentiable once in x and radius.
    """
    shared, compiled = parts.exchange is not None, torch.compiler.is_compiling()
    if (shared or compiled) and (forward_mode() or functional()):
        raise RuntimeError(
            f"references is a ReferenceSet {'shared between processes' if shared else 'in a graph'}"
            ", which torch.func and forward-mode differentiation do not go through; allowed are "
            "backward() and torch.autograd.grad, or a tensor."
        )
    exchange = None if parts.exchange is None else parts.exchange(x)
    version = None if parts.version is None else parts.version()
    over = _Over(parts, exchange, D, backend or requested(), precision, version)
    wanted = torch.is_grad_enabled() and (x.requires_grad or radius.requires_grad)
    # The way through autograd takes a tenth of a millisecond.
    derived = wanted or forward_mode() or functional()
    compute = _PosteriorMean.apply if derived else _PosteriorMean.forward
    mean, logsumexp, *_ = compute(x, radius, over)
    return mean, logsumexp
