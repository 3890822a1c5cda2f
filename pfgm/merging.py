"""The posterior mean over references that come in parts: chunks of a stream, ranks of a group.

Two results over disjoint references merge exactly. With n the squared distance of the nearest
reference, t the total weight relative to it and ℓ(n) its score,

    n = min(n₁, n₂),  w_i = t_i exp(ℓ(n_i) − ℓ(n)),  t = w₁ + w₂,  mean = (w₁ mean₁ + w₂ mean₂)/t

which holds at the limits too, where scores are infinite. Given mean, n and t of all references,
the gradients of the parts add up, but for what each counts alone of all (:func:`_counted_once`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .backends import requested
from .backends.reference import log_sum_exp, log_weight, wide_dtype
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


class Parts(NamedTuple):
    """References that come in parts."""

    chunks: Callable[[torch.device], Iterator[Tensor]]
    """Gives the parts (m, *S) of this process, one after the other, on a device."""
    number: int
    """How many parts all processes have together."""
    exchange: Callable[[Tensor], Exchange] | None = None
    """Between the processes, for queries (B, N); None where there is one."""


class _Merged(NamedTuple):
    mean: Tensor
    nearest: Tensor
    total: Tensor


def _merge(x: Tensor, radius: Tensor, D: float, parts: Iterable[tuple[Tensor, ...]]) -> _Merged:
    """Merges (mean, lse, nearest, total) of parts, in float64."""
    wide = wide_dtype(x.device)
    mean = torch.zeros(x.shape, dtype=wide, device=x.device)
    nearest, total = torch.full_like(radius, math.inf), torch.zeros_like(radius)
    for part_mean, _, part_nearest, part_total in parts:
        least = torch.minimum(nearest, part_nearest)
        # The first part has nothing to rescale: inf − inf, times a total of 0.
        kept = torch.where(total == 0, 0.0, _weight(nearest, least, radius, D, x.shape[1]) * total)
        added = _weight(part_nearest, least, radius, D, x.shape[1]) * part_total
        nearest, total = least, kept + added
        mean.lerp_(part_mean.to(wide), (added / total)[:, None])
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
        seen_x, seen_radius = x, radius
        if exchange is not None:
            seen_x, seen_radius = exchange.gather(x), exchange.gather(radius)

        def results() -> Iterator[tuple[Tensor, ...]]:
            for chunk in parts.chunks(x.device):
                yield torch.ops.pfgm.posterior_mean(
                    seen_x, chunk.flatten(1), seen_radius, D, backend, precision
                )

        merged = _merge(seen_x, seen_radius, D, results())
        if exchange is not None:
            merged = _over_processes(merged, seen_x, seen_radius, D, exchange)
        mean = merged.mean.to(x.dtype)
        nearest, total, column = (each[:, None] for each in (*merged[1:], radius))
        logsumexp = log_sum_exp(nearest, total, column, D, x.shape[1]).squeeze(1)
        ctx.save_for_backward(x, radius, mean, merged.nearest, merged.total)
        ctx.over = _Over(parts, exchange, D, backend, precision)
        return mean, logsumexp

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        found = _Gradient.apply(  # type: ignore[no-untyped-call]
            *ctx.saved_tensors, grad_mean, grad_logsumexp, ctx.over, needs
        )
        of_x, of_radius = (g if need else None for g, need in zip(found, needs, strict=True))
        return of_x, of_radius, None, None, None, None


class _Over(NamedTuple):
    """What the forward pass went over, and the backward pass goes over again."""

    parts: Parts
    exchange: Exchange | None
    D: float
    backend: str | None
    precision: str


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
        own = _Saved(grad_mean, grad_logsumexp, x, radius, mean, nearest, total)
        exchange = over.exchange
        seen = own if exchange is None else _Saved(*map(exchange.gather, own))
        of_x, of_radius = _sum_of_gradients(seen, over, needs)
        if exchange is not None:
            of_x, of_radius = (exchange.own(exchange.sum(each)) for each in (of_x, of_radius))
        twice_x, twice_radius = _counted_once(own, over)
        return (of_x - twice_x).to(x.dtype), of_radius - twice_radius

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        no_double_backward(ctx)


class _Saved(NamedTuple):
    """Upstream gradients, and the forward pass."""

    grad_mean: Tensor
    grad_logsumexp: Tensor
    x: Tensor
    radius: Tensor
    mean: Tensor
    nearest: Tensor
    total: Tensor


def _sum_of_gradients(seen: _Saved, over: _Over, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius of every part of this process, added up in float64."""
    x, radius = seen.x, seen.radius
    of_x = torch.zeros(x.shape, dtype=wide_dtype(x.device), device=x.device)
    of_radius = torch.zeros_like(radius)
    for chunk in over.parts.chunks(x.device):
        found_x, _, found_radius = torch.ops.pfgm.posterior_mean_backward(
            seen.grad_mean,
            seen.grad_logsumexp,
            x,
            chunk.flatten(1),
            radius,
            seen.mean,
            seen.nearest,
            seen.total,
            over.D,
            [needs[0], False, needs[1]],
            over.backend,
            over.precision,
        )
        if needs[0]:
            of_x += found_x
        if needs[1]:
            of_radius += found_radius
    return of_x, of_radius


def _counted_once(own: _Saved, over: _Over) -> tuple[Tensor, Tensor]:
    """What the sum of gradients over parts has too much, in x and in the radius.

    With ∂L/∂x = Σ_j c_j (x − x_j), backends find Σ_j c_j from the upstream gradient g of lse as
    −(N + D)(g − moment)/s of the nearest reference, or −g/σ². Moments add up over the parts, but
    each part counts all of g.
    """
    g, radius, nearest = own.grad_logsumexp, own.radius, own.nearest
    if math.isinf(over.D):
        scaled = g / radius.square()
        of_x, of_radius = -scaled, scaled * nearest / radius
    else:
        of_x = -(own.x.shape[1] + over.D) * g / (nearest + radius.square())
        of_radius = radius * of_x
    # At a limit g is 0, or the backward pass has raised; 0/0 is meant to be 0.
    excess = over.parts.number - 1
    of_x, of_radius = (torch.where(g == 0, 0.0, excess * each) for each in (of_x, of_radius))
    return of_x[:, None] * (own.x.to(of_x.dtype) - own.mean.to(of_x.dtype)), of_radius


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
