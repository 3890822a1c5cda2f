"""The posterior mean in Triton.

For a block of queries x_b and a chunk of references y_j (PFGM++, arXiv 2302.04265, section 3):

1. ``Pairs`` measures squared distances (distances.py).
2. ``weigh`` turns them into weights relative to the nearest reference so far. Weights below float32
   rounding become zero.
3. ``weighted_sum`` computes Σ_j w_j y_j over several splits of the chunk at once. It skips tiles
   whose weights are all zero.
4. ``merge`` adds the splits to the running mean, and in float64 the chunk's sum of weights to
   that of earlier chunks. Where x − mean is wanted, and is small, it sums differences instead.

Launches depend on shapes alone. Nothing waits for the device, and CUDA graphs can capture them.
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
    power_of_two,
    unit_of,
    with_registers,
)
from .distances import MAX_VALUES, PIECES, Pairs, padded, parts_of, sizes_of
from .law import difference_cutoff, rate_of, relative_weight, score_at

WEIGHT_CUTOFF = 16.0  # nats: a weight below e^-16 / M of the sum is below float32 rounding
MIN_SORTED_QUERIES = 256  # from here on queries are sorted by their number of nonzero weights
PROGRAMS = 256  # wanted for a weighted sum: about two for each multiprocessor
BLOCK = 1024  # weights of a program of ``weigh``
MERGED = 1024  # features of a program of ``merge``
# The least (x − mean)², relative to the size of what is summed, of which sums over references keep
# enough digits.
ENOUGH = tl.constexpr(2.0**-6)


@triton.jit(do_not_specialize=["pieces", "count", "first"])
def weigh(
    radius, closest, nearest, total, squared, weights, sums, live, least_so_far, kept,
    width, pairs_stride, pieces, count, first, exponent: tl.float64, floor: tl.float64,
    GAUSSIAN: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query's weights over a piece of the chunk, relative to the nearest reference so far.

    sums[row, piece] is the sum of the weights, and live[row, piece] how many are not set to zero.
    least_so_far[row] is the smallest squared distance, from ``count`` minima ``closest`` and from
    ``nearest``, that of earlier chunks. kept[row] is ``total``, the weight of all earlier chunks,
    made relative to it.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    r = tl.load(radius + row)
    index = tl.arange(0, PIECES)
    minima = tl.load(closest + row * count + index, mask=index < count, other=float("inf"))
    before, earlier = tl.full((), float("inf"), tl.float64), tl.full((), 0.0, tl.float64)
    if first == 0:
        before, earlier = tl.load(nearest + row), tl.load(total + row)
    least = tl.minimum(before, tl.min(minima, 0))
    invalid = (tl.sum((minima != minima).to(tl.int32), 0) > 0) | (before != before) | (r != r)
    least = tl.where(invalid, float("nan"), least)
    rate = rate_of(least, r, exponent, GAUSSIAN)
    carried = earlier * relative_weight(before - least, rate, exponent, GAUSSIAN).to(tl.float64)
    threshold = tl.full((), floor, tl.float64).to(tl.float32)
    threshold *= tl.maximum(carried.to(tl.float32), 1.0)

    column = piece * BLOCK + tl.arange(0, BLOCK)
    pair = row * pairs_stride + column
    d = tl.load(squared + pair, mask=column < width, other=float("inf"))
    w = relative_weight(d - least, rate, exponent, GAUSSIAN)
    tl.store(sums + row * pieces + piece, tl.sum(w, 0))
    w = tl.where(w < threshold, 0.0, w)
    tl.store(weights + pair, w, mask=column < width)
    tl.store(live + row * pieces + piece, tl.sum((w != 0.0).to(tl.int32), 0))
    tl.store(least_so_far + row, least, mask=piece == 0)
    tl.store(kept + row, carried, mask=piece == 0)


@triton.jit(do_not_specialize=["B", "M"])
def weighted_sum(
    y, weights, order, parts, B, M, width, N, y_stride, pairs_stride, split_size, factor,
    ORDERED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[split, row] = 2 factor · Σ_j w_j y_j over one split of references, in units of
    ``unit_of(y)``. ORDERED queries that share a tile have similar weights, and tiles without a
    weight are skipped.

    Tiles are features × queries, because matrix units take 64 rows, more than there may be queries.
    """
    feature = (tl.program_id(0) * FEATURES + tl.arange(0, FEATURES))[None, :]
    rank = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    present = rank < B
    row = rank
    if ORDERED:
        row = tl.load(order + rank, mask=present, other=0).to(tl.int32)
    first = tl.program_id(2) * split_size
    w_rows = weights + row.to(tl.int64)[:, None] * pairs_stride
    total = tl.zeros([FEATURES, ROWS], tl.float32)
    for start in range(first, min(first + split_size, M), TILE):
        column = start + tl.arange(0, TILE)
        inside = present[:, None] & (column < width)[None, :]
        w = tl.load(w_rows + column[None, :], mask=inside, other=0.0)
        # Without an order nearly all tiles have a weight, and a condition would keep the compiler
        # from loading the next tile early.
        any_nonzero = True
        if ORDERED:
            any_nonzero = tl.max(tl.max((w != 0.0).to(tl.int32), 1), 0) > 0
        if any_nonzero:
            valid = (column < M)[:, None] & (feature < N)
            b = load_references(y + column.to(tl.int64)[:, None] * y_stride + feature, valid)
            # Matrix units round every addition toward zero. The factor 2 keeps the compiler from
            # passing the sum to the next product as its initial value.
            total += 2.0 * tl.dot(tl.trans(b), tl.trans(w * factor), input_precision=PRECISION)
    out = parts + (tl.program_id(2).to(tl.int64) * B + row.to(tl.int64)[:, None]) * N + feature
    tl.store(out, tl.trans(total), mask=present[:, None] & (feature < N))


@triton.jit
def sum_of_differences(
    a, y, weights, live, feature, row, M, N, y_stride, pieces,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Σ_j w_j (a − y_j) of one query, whose row of weights begins at ``weights``. ``live`` says how
    many of each BLOCK of them are not zero. Only tiles with a weight are read."""
    total = tl.zeros_like(a)
    index = tl.arange(0, BLOCK)
    for piece in range(0, pieces):
        if tl.load(live + row * pieces + piece) > 0:
            column = piece * BLOCK + index
            nonzero = tl.load(weights + column, mask=column < M, other=0.0) != 0.0
            first = tl.min(tl.where(nonzero, index, BLOCK), 0)
            while first < BLOCK:
                tile = first // TILE * TILE
                j = piece * BLOCK + tile + tl.arange(0, TILE)
                w = tl.load(weights + j, mask=j < M, other=0.0)
                mask = (w != 0.0)[:, None] & (feature < N)[None, :]
                address = y + j.to(tl.int64)[:, None] * y_stride + feature[None, :]
                a_tile = a[None, :] + tl.zeros_like(w)[:, None]
                high, _ = exact_difference(a_tile, y, address, mask, 1.0)
                total += tl.sum(tl.where(mask, w[:, None] * (high / unit_of(y)), 0.0), 0)
                first = tl.min(tl.where(nonzero & (index >= tile + TILE), index, BLOCK), 0)
    return total


@triton.jit
def has_digits(value, a, reach, size):
    """Whether ``value``, a sum of w_j (a − y_j), has enough digits if it comes from Σ w_j y_j. The
    errors of that sum are relative to the ``size`` of the w_j, and to that of what is summed: about
    |a| and √reach, the distance at which weights become small."""
    unit = 1.0 / tl.sqrt(reach).to(tl.float32)
    scaled = value * (unit / size)
    return tl.sum(scaled * scaled, 0) >= ENOUGH * (1.0 + tl.sum((a * unit) * (a * unit), 0))


@triton.jit
def sum_of_parts(parts, row, feature, B, N, splits):
    """The sum of a row over all splits."""
    value = tl.zeros_like(feature).to(tl.float32)
    source = parts + row * N + feature
    for _ in range(0, splits):
        value += tl.load(source, mask=feature < N, other=0.0)
        source += B.to(tl.int64) * N
    return value


@triton.jit(do_not_specialize=["B", "M", "splits", "pieces", "first"])
def merge(
    mean, parts, sums, least_so_far, kept, radius, nearest, total, logsumexp, x, y, weights, live,
    B, M, N, splits, pieces, x_stride, y_stride, pairs_stride, first, divisor,
    exponent: tl.float64, GAUSSIAN: tl.constexpr, DIFFERENCE: tl.constexpr, PIECES: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The running mean: that of earlier chunks, with weight kept[row], merged with this chunk's
    splits, times ``divisor``. With DIFFERENCE, x minus that. One program of each query also
    writes the state (nearest, total) and the log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.arange(0, PIECES)
    piece_sums = tl.load(sums + row * pieces + index, mask=index < pieces, other=0.0)
    carried, least = tl.load(kept + row), tl.load(least_so_far + row)
    chunk_sum = tl.sum(piece_sums.to(tl.float64), 0)
    new_total = carried + chunk_sum
    weight = new_total.to(tl.float32)
    value = sum_of_parts(parts, row, feature, B, N, splits) * (divisor / unit_of(y) / weight)
    before = tl.zeros([BLOCK], tl.float32)
    if first == 0:
        before = tl.load(mean + row * N + feature, mask=feature < N, other=0.0)
        before *= carried.to(tl.float32) / weight
    r = tl.load(radius + row)
    if DIFFERENCE:
        a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
        fraction = chunk_sum.to(tl.float32) / weight
        value = fraction * a - value
        reach = least + r * r / exponent
        if has_digits(before + value, a, reach, fraction) == 0:  # also if a number is out of range
            row_weights = weights + row * pairs_stride
            value = sum_of_differences(
                a, y, row_weights, live, feature, row, M, N, y_stride, pieces, SIZE, TILE
            )
            value /= weight
    tl.store(mean + row * N + feature, value + before, mask=feature < N)
    if tl.program_id(1) == 0:
        tl.store(nearest + row, least)
        tl.store(total + row, new_total)
        tl.store(logsumexp + row, score_at(least, r, exponent, GAUSSIAN) + tl.log(new_total))


# ---- launches ---------------------------------------------------------------------------------


def sum_of_references(
    y: Tensor, weights: Tensor, order: Tensor | None = None, divisor: float = 1.0
) -> Tensor:
    """Return Σ_j weights_j y_j ``unit_of(y)`` / divisor over each split of the references,
    (splits, B, N). ``order`` lets similar queries share tiles."""
    B, (M, N) = len(weights), y.shape
    rows = 16 if B <= 16 else 32
    tiles = cdiv(N, 64), cdiv(B, rows)
    # As many splits as give PROGRAMS, if memory allows and each has at least 128 references.
    splits = max(1, min(cdiv(PROGRAMS, tiles[0] * tiles[1]), MAX_VALUES // (B * N), cdiv(M, 128)))
    split_size = cdiv(cdiv(M, splits), 32) * 32
    splits = cdiv(M, split_size)
    parts, grid = weights.new_empty(splits, B, N), (*tiles, splits)
    weighted_sum[grid](
        y, weights, weights if order is None else order, parts, B, M, padded(M), N, y.stride(0),
        weights.stride(0), split_size, 0.5 / divisor, ORDERED=order is not None, ROWS=rows, TILE=32,
        FEATURES=64, PRECISION=PRECISION, **with_registers(168, warps=4),
    )  # fmt: skip
    return parts


def weight_cutoff(references: int) -> float:
    """How many nats below the sum of weights a weight becomes zero."""
    return WEIGHT_CUTOFF + math.log(references)


def posterior_mean(
    x: Tensor, references: Tensor, radius: Tensor, D: float, difference: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean or x − mean (B, N) and, in float64, log-sum-exp, squared distance of the nearest
    reference and total weight relative to it, each (B,). All tensors are on one device; rows have
    contiguous features."""
    (B, N), M = x.shape, len(references)
    mean = x.new_empty(B, N)
    logsumexp, nearest, total = (torch.empty_like(radius) for _ in range(3))
    sizes = sizes_of(B, M, N, gradient=False)
    for rows in parts_of(B, sizes.block):
        pairs = Pairs(x[rows], references, radius[rows], D, sizes.chunk)
        results = mean[rows], logsumexp[rows], nearest[rows], total[rows]
        for chunk in parts_of(M, sizes.chunk):
            _average(pairs, references[chunk], results, difference, chunk.start == 0)
    return mean, logsumexp, nearest, total


def _average(
    pairs: Pairs, y: Tensor, results: tuple[Tensor, ...], difference: bool, first: bool
) -> None:
    """Merges a chunk y into the results of one block of queries."""
    (mean, logsumexp, nearest, total), x, radius = results, pairs.x, pairs.radius
    (B, N), M, pieces = x.shape, len(y), cdiv(len(y), BLOCK)
    pairs.measure(y, nearest, first)
    cutoff = weight_cutoff(pairs.count)
    if difference:
        cutoff = difference_cutoff(cutoff, N, pairs.D)
    weights, sums = x.new_empty(B, pairs.stride), x.new_empty(B, pieces)
    live = torch.empty(B, pieces, dtype=torch.int32, device=x.device)
    least_so_far, kept = torch.empty_like(radius), torch.empty_like(radius)
    weigh[B, pieces](
        radius, pairs.closest, nearest, total, pairs.squared, weights, sums, live, least_so_far,
        kept, padded(M), pairs.stride, pieces, pairs.closest.shape[1], int(first), pairs.exponent,
        math.exp(-cutoff), pairs.gaussian, PIECES, BLOCK, **FUSED,
    )  # fmt: skip
    order = None
    if B >= MIN_SORTED_QUERIES:
        # By the number of nonzero weights, so that similar queries share tiles.
        order = live.sum(1).argsort(stable=True)
    divisor = float(power_of_two(M))  # so that no sum of large values overflows
    parts = sum_of_references(y, weights, order, divisor)
    merge[B, cdiv(N, MERGED)](
        mean, parts, sums, least_so_far, kept, radius, nearest, total, logsumexp, x, y, weights,
        live, B, M, N, len(parts), pieces, x.stride(0), y.stride(0), pairs.stride, int(first),
        divisor, pairs.exponent, pairs.gaussian, difference, PIECES, BLOCK, MERGED,
        2048 // MERGED, **with_registers(128, warps=8),
    )  # fmt: skip
