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

from .backends import requested
from .backends.reference import (
    at_limit,
    check_singular,
    log_sum_exp,
    log_weight,
    wide_dtype,
)
from .ops import no_double_backward

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
    """What the forward pass went over, and the backward pass goes over again."""

    parts: Parts
    exchange: Exchange | None
    D: float
    backend: str | None
    precision: str
    alone: list[tuple[Tensor, Tensor]]
    """(nearest, total) of each part of this process, for all queries."""

    def sketch(self, place: int, chunk: Tensor, x: Tensor) -> Tensor | None:
        """What is kept of a part (m, N)."""
        return self.parts.sketch and self.parts.sketch(place, chunk, x, self.backend)

    def say(self, x: Tensor, chunk: Tensor, radius: Tensor, sketch: Tensor | None) -> _Merged:
        """What one part (m, N) says."""
        mean, _, nearest, total = torch.ops.pfgm.posterior_mean(
            x, chunk, radius, self.D, self.backend, self.precision, sketch
        )
        return _Merged(mean, nearest, total)


class _PosteriorMean(torch.autograd.Function):
    """(x, radius, parts, D, backend, precision) → mean (B, N) and lse (B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        radius: Tensor,
        parts: Parts,
        D: float,
        backend: str | None,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        exchange = None if parts.exchange is None else parts.exchange(x)
        over = _Over(parts, exchange, D, backend, precision, [])
        seen_x, seen_radius = x, radius
        if exchange is not None:
            seen_x, seen_radius = exchange.gather(x), exchange.gather(radius)

        def results() -> Iterator[_Merged]:
            for place, chunk in enumerate(parts.chunks(x.device)):
                chunk = chunk.flatten(1)
                sketch = over.sketch(place, chunk, x)
                said = over.say(seen_x, chunk, seen_radius, sketch)
                over.alone.append((said.nearest, said.total))
                yield said

        merged = _merge(seen_x, seen_radius, D, results())
        if exchange is not None:
            merged = _over_processes(merged, seen_x, seen_radius, D, exchange)
        mean = merged.mean.to(x.dtype)
        nearest, total, column = (each[:, None] for each in (*merged[1:], radius))
        logsumexp = log_sum_exp(nearest, total, column, D, x.shape[1]).squeeze(1)
        ctx.save_for_backward(x, radius, mean, merged.nearest, merged.total)
        ctx.over = over
        return mean, logsumexp

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        found = _Gradient.apply(  # type: ignore[no-untyped-call]
            *ctx.saved_tensors, grad_mean, grad_logsumexp, ctx.over, needs
        )
        of_x, of_radius = (g if need else None for g, need in zip(found, needs, strict=True))
        return of_x, of_radius, None, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradients in x and radius; not differentiable itself, which it says where it matters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        radius: Tensor,
        mean: Tensor,
        nearest: Tensor,
        total: Tensor,
        grad_mean: Tensor,
        grad_logsumexp: Tensor,
        over: _Over,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
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
        of_x, of_radius = _sum_of_gradients(seen, over, needs)
        if exchange is not None:
            of_x, of_radius = (exchange.own(exchange.sum(each)) for each in (of_x, of_radius))
        if math.isinf(over.D):
            of_nearest = _of_distance(grad_logsumexp, nearest, radius)
            of_radius += torch.where(at_limit(nearest, radius, over.D), 0.0, of_nearest)
        return of_x.to(x.dtype), of_radius

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        no_double_backward(ctx)


class _Saved(NamedTuple):
    """The forward pass, and upstream gradients."""

    x: Tensor
    radius: Tensor
    mean: Tensor
    nearest: Tensor
    total: Tensor
    grad_mean: Tensor
    grad_logsumexp: Tensor


def _sum_of_gradients(seen: _Saved, over: _Over, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius of every part of this process, added up in float64.

    At D = ∞ that of radius lacks g d²/σ³ of the nearest reference of all.
    """
    of_x = torch.zeros(seen.x.shape, dtype=wide_dtype(seen.x.device), device=seen.x.device)
    of_radius = torch.zeros_like(seen.radius)
    regular = ~at_limit(seen.nearest, seen.radius, over.D)  # else the mean is locally constant
    steep = regular & _is_steep(seen, over)
    averages = _averages(seen, over, steep) if bool(steep.any()) else torch.zeros_like(seen.radius)
    for place, chunk, share in _shares(seen, over):
        for rows in (regular & ~steep & (share > _UNSEEN), steep & (share > _UNSEEN)):
            index = rows.nonzero().squeeze(1)
            if len(index) == 0:
                continue
            some = _Saved(*(each[index] for each in seen))
            if bool(steep[index[0]]):
                some = some._replace(x=some.x.double(), grad_mean=some.grad_mean.double())
            found_x, found_radius = _part_of_gradient(
                some, share[index], averages[index], place, chunk, over, needs
            )
            if needs[0]:
                of_x.index_add_(0, index, found_x.to(of_x.dtype))
            if needs[1]:
                of_radius.index_add_(0, index, found_radius)
    return of_x, of_radius


def _shares(seen: _Saved, over: _Over) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The number of each part of this process, the part (m, N) and its share of each query."""
    chunks = enumerate(over.parts.chunks(seen.x.device))
    for (place, chunk), (nearest, total) in zip(chunks, over.alone, strict=True):
        share = _weight(nearest, seen.nearest, seen.radius, over.D, seen.x.shape[1])
        yield place, chunk.flatten(1), share * total / seen.total


def _is_steep(seen: _Saved, over: _Over) -> Tensor:
    """Of which queries the rounding of the means would show (as in csrc/steep_rows_cpu.h)."""
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


def _averages(seen: _Saved, over: _Over, steep: Tensor) -> Tensor:
    """Σ_i q_i G·(mean_i − mean) (B,) of steep queries over the parts of all processes, in float64;
    it is not 0, for the mean at hand is rounded."""
    averages = torch.zeros_like(seen.radius)
    for _, chunk, share in _shares(seen, over):
        index = (steep & (share > _UNSEEN)).nonzero().squeeze(1)
        if len(index) == 0:
            continue
        some = _Saved(*(each[index] for each in seen))
        said = over.say(some.x.double(), chunk, some.radius, None)
        averages.index_add_(0, index, share[index] * _pull(said.mean, some))
    return averages if over.exchange is None else over.exchange.sum(averages)


def _pull(mean: Tensor, seen: _Saved) -> Tensor:
    """G·(mean_i − mean) (B,) of a part."""
    wide = seen.radius.dtype
    return (seen.grad_mean.to(wide) * (mean.to(wide) - seen.mean.to(wide))).sum(1)


def _part_of_gradient(
    seen: _Saved,
    share: Tensor,
    average: Tensor,
    place: int,
    chunk: Tensor,
    over: _Over,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """One part's gradients in x and radius, for queries of which it has a share."""
    sketch = None if seen.x.dtype != seen.mean.dtype else over.sketch(place, chunk, seen.x)
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
    if math.isinf(over.D):
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
    mean, logsumexp = _PosteriorMean.apply(  # type: ignore[no-untyped-call]
        x, radius, parts, D, backend or requested(), precision
    )
    return mean, logsumexp
