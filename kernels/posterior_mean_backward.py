"""Gradients of the posterior mean and its log-sum-exp in Triton.

With upstream gradients G = ∂L/∂mean and g = ∂L/∂logsumexp, probabilities p_j relative to the
nearest reference, s = d² + r², and s₀ that of the nearest:

    t_j = G·y_j − Σ_i p_i G·y_i + g
    c_j = −p_j t_j s₀/s_j                 D finite, in units F = (N + D)/s₀
    c_j = −p_j t_j                        D = ∞,    in units F = 1/σ²
    ∂L/∂y_j = Σ_b [p_bj G_b − F_b c_bj (x_b − y_j)]

The t_j nearly cancel in Σ_j c_j. The following form avoids the cancellation. With d² that of the
nearest reference and e_j = d_j² − d²:

    moment = Σ_j p_j t_j e_j / s_j,   C = −(g − moment)                 D finite
    moment = Σ_j p_j t_j e_j / σ²,    C = −g                            D = ∞
    ∂L/∂x  = F [Σ_j c_j (x − y_j) + (C − Σ_j c_j) (x − mean)]
    ∂L/∂r  = r F C,   ∂L/∂σ = (g d²/σ² + moment)/σ

C − Σ_j c_j would be 0 without the rounding of c_j.

``pull`` computes Σ p_j G·y_j, which t_j needs, and ``find_coefficients`` the c_j. ``weighted_sum``
of the forward pass sums c_j y_j, and ``merge_gradient`` turns the sum into ∂L/∂x.
``reference_gradient`` sums over the queries. Where such sums lose digits, because x is close to
y_j, differences x − y_j are summed. F is applied last, in float64, because it may be huge.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    FUSED,
    PRECISION,
    cdiv,
    exact_difference,
    load_references,
    unit_of,
    with_registers,
)
from .distances import Pairs, padded, parts_of, sizes_of
from .law import gradient_factors, is_constant, rate_of, ratios_at, relative_weight
from .posterior_mean import (
    BLOCK,
    ENOUGH,
    MERGED,
    has_digits,
    sum_of_differences,
    sum_of_parts,
    sum_of_references,
    weight_cutoff,
)

GRADIENT_CUTOFF = 8.0  # nats below WEIGHT_CUTOFF, because (y_j − mean)²/s may be large


@triton.jit
def probability(squared, nearest, total, r, exponent, floor, GAUSSIAN: tl.constexpr):
    """p_j in float64; zero below ``floor``."""
    rate = rate_of(nearest, r, exponent, GAUSSIAN)
    p = relative_weight(squared - nearest, rate, exponent, GAUSSIAN).to(tl.float64) / total
    p = tl.where(p < floor, 0.0, p)
    return tl.where(is_constant(nearest, r, GAUSSIAN), 0.0, p)


@triton.jit(do_not_specialize=["first"])
def pull(
    radius, nearest, total, squared, projected, pulled, width, pairs_stride, first,
    exponent: tl.float64, floor: tl.float64, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds Σ p_j G·y_j and Σ p_j of one query over the chunk to pulled[row]; the first chunk sets
    them."""
    row = tl.program_id(0).to(tl.int64)
    r, least, weight_sum = tl.load(radius + row), tl.load(nearest + row), tl.load(total + row)
    pulls = tl.zeros([BLOCK], tl.float64)
    masses = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        pair = row * pairs_stride + column
        d = tl.load(squared + pair, mask=column < width, other=float("inf"))
        q = tl.load(projected + pair, mask=column < width, other=0.0).to(tl.float64)
        p = probability(d, least, weight_sum, r, exponent, floor, GAUSSIAN)
        pulls += tl.where(p == 0.0, 0.0, p * q)  # the projection is undefined where p = 0
        masses += p
    pull_sum, mass = tl.sum(pulls, 0), tl.sum(masses, 0)
    if first == 0:
        pull_sum += tl.load(pulled + 2 * row)
        mass += tl.load(pulled + 2 * row + 1)
    tl.store(pulled + 2 * row, pull_sum)
    tl.store(pulled + 2 * row + 1, mass)


@triton.jit(do_not_specialize=["pieces", "first"])
def find_coefficients(
    radius, nearest, total, grad_logsumexp, pulled, squared, projected, coefficients, probabilities,
    live, sums, scalars, grad_radius, width, pairs_stride, pieces, first,
    exponent: tl.float64, floor: tl.float64, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """c_j and p_j of one query over the chunk, and how many c_j of each BLOCK are not zero.

    ``sums`` are the moment and Σ c_j so far. From them follow ∂L/∂radius and ``scalars``: F,
    C − Σ c_j, Σ c_j of the chunk, and the size of these c_j.
    """
    row = tl.program_id(0).to(tl.int64)
    r, least, weight_sum = tl.load(radius + row), tl.load(nearest + row), tl.load(total + row)
    g = tl.load(grad_logsumexp + row)
    # Σ p_j is 1 up to rounding, and 0 where the mean is constant.
    mass = tl.load(pulled + 2 * row + 1)
    center = tl.load(pulled + 2 * row) / tl.where(mass == 0.0, 1.0, mass)
    moments = tl.zeros([BLOCK], tl.float64)
    c_sums = tl.zeros([BLOCK], tl.float64)
    c_squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        pair = row * pairs_stride + column
        d = tl.load(squared + pair, mask=column < width, other=float("inf"))
        q = tl.load(projected + pair, mask=column < width, other=0.0).to(tl.float64)
        p = probability(d, least, weight_sum, r, exponent, floor, GAUSSIAN)
        pt = tl.where(p == 0.0, 0.0, p * (q - center + g))
        ratio, excess = ratios_at(d, least, r, GAUSSIAN)
        c = tl.where(p == 0.0, 0.0, -pt * ratio)
        moments += tl.where(p == 0.0, 0.0, pt * excess)
        rounded = c.to(tl.float32)
        c_sums += rounded.to(tl.float64)
        c_squares += c * c
        tl.store(live + row * pieces + start // BLOCK, tl.sum((rounded != 0.0).to(tl.int32), 0))
        tl.store(coefficients + pair, rounded, mask=column < width)
        tl.store(probabilities + pair, p.to(tl.float32), mask=column < width)
    moment, chunk_sum = tl.sum(moments, 0), tl.sum(c_sums, 0)
    c_sum = chunk_sum
    if first == 0:
        moment += tl.load(sums + 2 * row)
        c_sum += tl.load(sums + 2 * row + 1)
    tl.store(sums + 2 * row, moment)
    tl.store(sums + 2 * row + 1, c_sum)
    F, C, radius_gradient = gradient_factors(least, r, g, moment, exponent, GAUSSIAN)
    row_scalars = scalars + 4 * row
    tl.store(row_scalars, F)
    tl.store(row_scalars + 1, C - c_sum)
    tl.store(row_scalars + 2, chunk_sum)
    tl.store(row_scalars + 3, tl.sqrt(chunk_sum * chunk_sum + tl.sum(c_squares, 0)))
    tl.store(grad_radius + row, radius_gradient)


@triton.jit(do_not_specialize=["B", "M", "splits", "pieces", "first", "last"])
def merge_gradient(
    x, y, mean, coefficients, live, radius, nearest, scalars, parts, grad_x,
    B, M, N, splits, pieces, x_stride, y_stride, pairs_stride, first, last, exponent: tl.float64,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the chunk's Σ c_j (x − y_j) to grad_x. The last chunk turns the sum into ∂L/∂x. What
    rounding takes from the c_j is added as if its references were at the mean."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = feature < N
    a = tl.load(x + row * x_stride + feature, mask=valid, other=0.0)
    before = tl.zeros([BLOCK], tl.float32)
    if first == 0:
        before = tl.load(grad_x + row * N + feature, mask=valid, other=0.0)
    row_scalars = scalars + 4 * row
    r, chunk_sum = tl.load(radius + row), tl.load(row_scalars + 2).to(tl.float32)
    value = chunk_sum * a - sum_of_parts(parts, row, feature, B, N, splits) / unit_of(y)
    reach = tl.load(nearest + row) + r * r / exponent
    size = tl.load(row_scalars + 3).to(tl.float32)
    if has_digits(before + value, a, reach, size) == 0:  # also if a number is out of range
        row_coefficients = coefficients + row * pairs_stride
        value = sum_of_differences(
            a, y, row_coefficients, live, feature, row, M, N, y_stride, pieces, SIZE, TILE
        )
    value += before
    if last != 0:
        center = tl.load(mean + row * N + feature, mask=valid, other=0.0)
        difference = a.to(tl.float64) - center.to(tl.float64)
        F = tl.load(row_scalars)
        gradient = F * (value.to(tl.float64) + tl.load(row_scalars + 1) * difference)
        value = tl.where(F == 0.0, 0.0, gradient).to(tl.float32)
    tl.store(grad_x + row * N + feature, value, mask=valid)


@triton.jit(do_not_specialize=["B", "M", "first"])
def reference_gradient(
    x, upstream, y, scalars, coefficients, probabilities, grad_references,
    B, M, width, N, x_stride, y_stride, pairs_stride, first,
    ROWS: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ∂L/∂y of TILE references over all queries of the block to that of earlier blocks.

    Products with x and y lose digits where these are close. Then differences are summed."""
    feature = (tl.program_id(0) * FEATURES + tl.arange(0, FEATURES))[None, :]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gradient = tl.zeros([TILE, FEATURES], tl.float32)
    c_sums = tl.zeros([TILE, ROWS], tl.float32)
    size = tl.zeros([TILE, ROWS], tl.float32)
    largest = tl.zeros([TILE, ROWS], tl.float32)
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        pair = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
        inside = (row < B)[:, None] & (column < width)[None, :]
        p = tl.load(probabilities + pair, mask=inside, other=0.0)
        if tl.max(tl.max((p != 0.0).to(tl.int32), 1), 0) > 0:
            F = tl.load(scalars + 4 * row, mask=row < B, other=0.0)[:, None]
            c = tl.load(coefficients + pair, mask=inside, other=0.0)
            c = tl.where(c == 0.0, 0.0, c.to(tl.float64) * F).to(tl.float32)
            valid = (row < B)[:, None] & (feature < N)
            a = tl.load(x + row.to(tl.int64)[:, None] * x_stride + feature, mask=valid, other=0.0)
            g = tl.load(upstream + row.to(tl.int64)[:, None] * N + feature, mask=valid, other=0.0)
            # The factor 2 has the same reason as in ``weighted_sum``.
            gradient += 2.0 * tl.dot(tl.trans(0.5 * p), g, input_precision=PRECISION)
            gradient -= 2.0 * tl.dot(tl.trans(0.5 * c), a, input_precision=PRECISION)
            c_sums += tl.trans(c)
            size += tl.trans(tl.abs(c))
            largest = tl.maximum(largest, tl.trans(tl.abs(c)))
    valid = (column < M)[:, None] & (feature < N)
    y_rows = y + column.to(tl.int64)[:, None] * y_stride
    b = load_references(y_rows + feature, valid) / unit_of(y)
    total = tl.sum(c_sums, 1)
    gradient += total[:, None] * b
    # Sums of numbers of both signs have errors relative to the root of the sum of their squares.
    spread = tl.sqrt(tl.sum(size, 1)) * tl.sqrt(tl.max(largest, 1))  # at least √(Σ c²)
    scaled = tl.maximum(tl.abs(total), spread)[:, None] * b
    cancelled = (tl.sum(gradient * gradient, 1) >= ENOUGH * tl.sum(scaled * scaled, 1)) == 0
    if tl.max(cancelled.to(tl.int32), 0) > 0:
        exact = tl.zeros([TILE, FEATURES], tl.float32)
        for query in range(0, B):
            row = tl.full((), query, tl.int64)
            pair = row * pairs_stride + column
            p = tl.load(probabilities + pair, mask=column < width, other=0.0)
            if tl.max((p != 0.0).to(tl.int32), 0) > 0:
                c = tl.load(coefficients + pair, mask=column < width, other=0.0)
                c = tl.where(c == 0.0, 0.0, c.to(tl.float64) * tl.load(scalars + 4 * row))
                a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
                g = tl.load(upstream + row * N + feature, mask=feature < N, other=0.0)
                a += tl.zeros_like(gradient)
                high, _ = exact_difference(a, y, y_rows + feature, valid, 1.0)
                exact += p[:, None] * g - c.to(tl.float32)[:, None] * (high / unit_of(y))
        gradient = tl.where(cancelled[:, None], exact, gradient)
    out = grad_references + column.to(tl.int64)[:, None] * N + feature
    if first == 0:
        gradient += tl.load(out, mask=valid, other=0.0)
    tl.store(out, gradient, mask=valid)


# ---- launches ---------------------------------------------------------------------------------


class Gradients:
    """Gradients of one block of queries."""

    def __init__(
        self,
        pairs: Pairs,
        state: tuple[Tensor, Tensor, Tensor],
        grad_logsumexp: Tensor,
        grad_x: Tensor | None,
        grad_radius: Tensor,
    ) -> None:
        """state: mean, nearest and total."""
        self.pairs, self.state, self.grad_logsumexp = pairs, state, grad_logsumexp
        self.grad_x, self.grad_radius = grad_x, grad_radius
        self.floor = math.exp(-weight_cutoff(pairs.count) - GRADIENT_CUTOFF)
        like, B = pairs.radius, pairs.B
        self.pulled = like.new_empty(B, 2)  # Σ p_j G·y_j and Σ p_j
        self.sums = like.new_empty(B, 2)  # the moment and Σ c_j, over the chunks so far
        self.scalars = like.new_empty(B, 4)  # F and sums of c_j, see find_coefficients
        self.coefficients, self.probabilities = pairs.x.new_empty(2, B, pairs.stride)

    def run(self, chunks: list[Tensor], grad_references: list[Tensor], first_block: bool) -> None:
        """Find the pulls over all chunks, then the coefficients and gradients of each.

        grad_references holds the gradient of each chunk; it is empty if none is needed.
        """
        _, nearest, _ = self.state
        for index, y in enumerate(chunks):
            self.pairs.measure(y, nearest, False)
            self._pull(y, index == 0)
        for index, y in enumerate(chunks):
            if len(chunks) > 1:  # with one chunk the distances are still in memory
                self.pairs.measure(y, nearest, False)
            live = self._coefficients(y, index == 0)
            if self.grad_x is not None:
                self._merge(y, live, index == 0, index == len(chunks) - 1)
            if grad_references:
                self._reference_gradient(y, grad_references[index], first_block)

    def _pull(self, y: Tensor, first: bool) -> None:
        pairs, (_, nearest, total) = self.pairs, self.state
        pull[(pairs.B,)](
            pairs.radius, nearest, total, pairs.squared, pairs.projected, self.pulled,
            padded(len(y)), pairs.stride, int(first), pairs.exponent, self.floor, pairs.gaussian,
            BLOCK, **FUSED,
        )  # fmt: skip

    def _coefficients(self, y: Tensor, first: bool) -> Tensor:
        """Find the coefficients c_j of the chunk y, its p_j, and the sums so far.

        Return how many c_j of each BLOCK are nonzero, (B, pieces).
        """
        pairs, (_, nearest, total) = self.pairs, self.state
        pieces = cdiv(padded(len(y)), BLOCK)
        live = torch.empty(pairs.B, pieces, dtype=torch.int32, device=y.device)
        find_coefficients[(pairs.B,)](
            pairs.radius, nearest, total, self.grad_logsumexp, self.pulled, pairs.squared,
            pairs.projected, self.coefficients, self.probabilities, live, self.sums, self.scalars,
            self.grad_radius, padded(len(y)), pairs.stride, pieces, int(first), pairs.exponent,
            self.floor, pairs.gaussian, BLOCK, **FUSED,
        )  # fmt: skip
        return live

    def _merge(self, y: Tensor, live: Tensor, first: bool, last: bool) -> None:
        pairs, (mean, nearest, _) = self.pairs, self.state
        parts = sum_of_references(y, self.coefficients)
        merge_gradient[pairs.B, cdiv(pairs.N, MERGED)](
            pairs.x, y, mean, self.coefficients, live, pairs.radius, nearest, self.scalars, parts,
            self.grad_x, pairs.B, len(y), pairs.N, len(parts), live.shape[1], pairs.x.stride(0),
            y.stride(0), pairs.stride, int(first), int(last), pairs.exponent, BLOCK, MERGED,
            2048 // MERGED, **with_registers(128, warps=8),
        )  # fmt: skip

    def _reference_gradient(self, y: Tensor, gradient: Tensor, first: bool) -> None:
        pairs = self.pairs
        reference_gradient[cdiv(pairs.N, 64), cdiv(len(y), 64)](
            pairs.x, pairs.upstream, y, self.scalars, self.coefficients, self.probabilities,
            gradient, pairs.B, len(y), padded(len(y)), pairs.N, pairs.x.stride(0), y.stride(0),
            pairs.stride, int(first), ROWS=16, TILE=64, FEATURES=64, PRECISION=PRECISION,
            **with_registers(240, warps=8),
        )  # fmt: skip


def posterior_mean_backward(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (B, N), references (M, N, in float32) and radius (B,); None where not needed.
    All arguments are contiguous; only rows of x and references may lie apart."""
    grad_x = torch.empty_like(mean) if needs[0] else None
    grad_references = x.new_empty(references.shape) if needs[1] else None
    grad_radius = torch.empty_like(radius)
    sizes = sizes_of(len(x), len(references), x.shape[1], gradient=True)
    chunks = parts_of(len(references), sizes.chunk)
    parts = [] if grad_references is None else [grad_references[chunk] for chunk in chunks]
    for rows in parts_of(len(x), sizes.block):
        pairs = Pairs(x[rows], references, radius[rows], D, sizes.chunk, grad_mean[rows])
        state = mean[rows], nearest[rows], total[rows]
        block_grad_x = None if grad_x is None else grad_x[rows]
        gradients = Gradients(pairs, state, grad_logsumexp[rows], block_grad_x, grad_radius[rows])
        gradients.run([references[chunk] for chunk in chunks], parts, rows.start == 0)
    return grad_x, grad_references, grad_radius if needs[2] else None
