"""Squared distances between a block of queries and a chunk of references, in Triton.

``multiply`` computes |x|² + |y|² − 2 x·y of centred data from products, which matrix units make
fast. Where the error that is left would change a result, ``refine`` computes distances again from
differences, in two floats. With few features ``subtract`` computes Σ (x − y)² in float64 instead.

Bytes are exact in units of 1/255 (``unit_of``), in which all differences are taken.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    FUSED,
    PRECISION,
    add_compensated,
    add_square,
    cdiv,
    exact_difference,
    load_references,
    scale_to_one,
    unit_of,
    with_registers,
)
from .law import excess_at, exponent_of, rate_of, score_at

MAX_PAIRS = 1 << 22  # pairs of 12 bytes; in the backward pass half as many, of 20 bytes
MAX_VALUES = 1 << 22  # of a block's queries, or of a chunk's partial sums
MAX_QUERIES = 4096  # in a block
MAX_REFERENCES = 1 << 16  # in a chunk
MIN_PRODUCTS = 32  # features, from which distances are computed from products
PIECES = 64  # most pieces of a chunk

# Largest error of a distance from products, relative to |x|² + |y|², and its typical size relative
# to 2|x||y| + |y|² for 32 features. Sums over panels of 32 features are rounded, which mostly
# averages out. Matrix units round toward zero, which averages out less.
MARGIN, NOISE = 2.0**-18, 2.0**-22
# Relative error of a weight that needs no refinement: in a mean, where errors of several weights
# average out, and in a gradient, where they need not. ``test_contract`` holds both.
TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 3e-6
NEAR = 20.0  # nats: a weight e^-20 times the largest needs no more digits
OTHERS = 2.0  # nats: M weights, each log M + OTHERS below another, sum to e^-2 of it
LARGEST = tl.constexpr(3.4028234663852886e38)  # that float32 holds, also of a difference
SAMPLES = tl.constexpr(16)  # references whose mean is the centre
TILE = 64  # references of a tile of distances


@triton.jit(do_not_specialize=["M"])
def center_rows(
    x, y, upstream, centered, center, norms, scales, y_scale, M, N, x_stride, y_stride,
    UPSTREAM: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One query minus the centre of the references, times ``unit_of(y)``, and its squared norm
    without this factor. Multiplied by scales[row], a power of two, the centred query is about 1;
    scales[B + row] does this for ``upstream``, y_scale for centred references.

    The centre is the mean of evenly spaced references. So that an outlier does not move it, the
    smallest and the largest value of each feature are replaced by the next ones.
    """
    row, B = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    sample = (tl.arange(0, SAMPLES).to(tl.int64) * M) // SAMPLES
    index = tl.arange(0, SAMPLES)[:, None]
    norm = tl.zeros([FEATURES], tl.float64)
    largest = tl.zeros([FEATURES], tl.float32)
    upstream_largest, spread, full_spread = largest, largest, largest
    for start in range(0, N, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        valid = feature < N
        address = y + sample[:, None] * y_stride + feature[None, :]
        values = load_references(address, (sample >= 0)[:, None] & valid[None, :])
        least, greatest = tl.argmin(values, 0)[None, :], tl.argmax(values, 0)[None, :]
        second_least = tl.min(tl.where(index == least, float("inf"), values), 0)
        second_greatest = tl.max(tl.where(index == greatest, float("-inf"), values), 0)
        inner = tl.minimum(tl.maximum(values, second_least[None, :]), second_greatest[None, :])
        mean = tl.sum(inner * (1.0 / SAMPLES), 0)
        spread = tl.maximum(spread, tl.max(tl.abs(inner - mean[None, :]), 0))
        full_spread = tl.maximum(full_spread, tl.max(tl.abs(values - mean[None, :]), 0))
        a = tl.load(x + row * x_stride + feature, mask=valid, other=0.0).to(tl.float64)
        difference = tl.where(valid, a * unit_of(y) - mean.to(tl.float64), 0.0)
        norm += difference * difference
        rounded = difference.to(tl.float32)
        largest = tl.maximum(largest, tl.abs(rounded))
        tl.store(centered + row * N + feature, rounded, mask=valid)
        tl.store(center + feature, mean, mask=feature < tl.where(row == 0, N, 0))
        if UPSTREAM:
            g = tl.load(upstream + row * N + feature, mask=valid, other=0.0)
            upstream_largest = tl.maximum(upstream_largest, tl.abs(g))
    inner_spread, any_spread = tl.max(spread, 0), tl.max(full_spread, 0)
    size = tl.where(inner_spread > 0.0, inner_spread, tl.where(any_spread > 0.0, any_spread, 1.0))
    tl.store(norms + row, tl.sum(norm, 0) / unit_of(y) / unit_of(y))
    tl.store(scales + row, scale_to_one(tl.max(largest, 0)))
    tl.store(y_scale, scale_to_one(size), mask=row == 0)
    if UPSTREAM:
        tl.store(scales + B + row, scale_to_one(tl.max(upstream_largest, 0)))


@triton.jit(do_not_specialize=["B", "M", "tiles"])
def multiply(
    rows, y, center, scales, y_scale, norms, squared, lowest, reach, projected,
    B, M, width, N, y_stride, pairs_stride, tiles,
    PROJECT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """|x|² + |y|² − 2 x·y for ROWS centred queries and TILE references. lowest[row, tile] is the
    smallest of these distances, reach[tile] the largest |y|². With PROJECT, ``rows`` are upstream
    gradients, and only their products with centred y are written.

    Distances from M to ``width``, a multiple of 16, are infinite. Those beyond the range of float32
    are NaN, and do not count. Matrix units round every addition toward zero, so panels are added up
    outside of them, in two floats.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    y_rows = y + column.to(tl.int64)[:, None] * y_stride
    x_rows = rows + row.to(tl.int64)[None, :] * N
    scale = tl.load(scales + row, mask=row < B, other=1.0)
    b_scale = tl.load(y_scale)
    total = tl.zeros([TILE, ROWS], tl.float32)
    lost = tl.zeros([TILE, ROWS], tl.float32)
    square = tl.zeros([TILE], tl.float32)
    square_lost = tl.zeros([TILE], tl.float32)
    for k in range(0, N, PANEL):
        feature = k + tl.arange(0, PANEL)
        c = tl.load(center + feature, mask=feature < N, other=0.0)
        valid = (column < M)[:, None] & (feature < N)[None, :]
        b = (load_references(y_rows + feature[None, :], valid) - c[None, :]) * b_scale
        inside = (row < B)[None, :] & (feature < N)[:, None]
        a = tl.load(x_rows + feature[:, None], mask=inside, other=0.0) * scale[None, :]
        product = tl.dot(b, a, input_precision=PRECISION)
        total, lost = add_compensated(total, lost, product)
        if not PROJECT:
            square, square_lost = add_compensated(square, square_lost, tl.sum(b * b, 1))
    unit = b_scale.to(tl.float64) * unit_of(y)
    a_unit = scale.to(tl.float64) * (1.0 if PROJECT else unit_of(y))
    products = (total.to(tl.float64) - lost.to(tl.float64)) / (unit * a_unit)[None, :]
    pair = row[:, None] * pairs_stride + column[None, :]  # below 2^31, as MAX_PAIRS is
    valid = (row < B)[:, None] & (column < M)[None, :]
    if PROJECT:
        tl.store(projected + pair, tl.trans(products).to(tl.float32), mask=valid)
    else:
        y_norm = (square.to(tl.float64) - square_lost.to(tl.float64)) / unit / unit
        norm = tl.load(norms + row, mask=row < B, other=0.0)
        d = tl.trans(y_norm[:, None] + norm[None, :] - 2.0 * products)
        finite = tl.abs(d) < float("inf")
        d = tl.where(finite, tl.maximum(d, 0.0), float("nan"))
        filled = tl.where(valid, d, float("inf"))
        tl.store(squared + pair, filled, mask=(row < B)[:, None] & (column < width)[None, :])
        least = tl.min(tl.where(valid & finite, d, float("inf")), 1)
        tile = tl.program_id(1)
        tl.store(lowest + row * tiles + tile, least, mask=row < B)
        counts = (column < M) & (y_norm < float("inf"))
        farthest = tl.max(tl.where(counts, y_norm, 0.0), 0)
        tl.store(reach + tile, farthest, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["B", "M", "piece"])
def subtract(
    x, y, upstream, squared, closest, projected,
    B, M, width, N, x_stride, y_stride, pairs_stride, piece,
    PROJECT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Σ (x − y)² of few features for ROWS queries and a piece of references, in float64, and
    closest[row, piece], the smallest. With PROJECT also Σ G (y − x)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_rows = x + row.to(tl.int64) * x_stride
    g_rows = upstream + row.to(tl.int64) * N
    least = tl.full([ROWS], float("inf"), tl.float64)
    first = tl.program_id(1) * piece
    for start in range(first, min(first + piece, width), TILE):
        column = start + tl.arange(0, TILE)
        y_rows = y + column.to(tl.int64) * y_stride
        total = tl.zeros([ROWS, TILE], tl.float64)
        product = tl.zeros([ROWS, TILE], tl.float64)
        for k in range(0, N):
            a = tl.load(x_rows + k, mask=row < B, other=0.0).to(tl.float64) * unit_of(y)
            b = load_references(y_rows + k, column < M).to(tl.float64)
            difference = a[:, None] - b[None, :]
            # A difference that float32 cannot hold makes the distance NaN (check_distances).
            difference = tl.where(
                tl.abs(difference) <= LARGEST * unit_of(y), difference, float("nan")
            )
            total += difference * difference
            if PROJECT:
                g = tl.load(g_rows + k, mask=row < B, other=0.0).to(tl.float64)
                product -= g[:, None] * difference
        total *= 1.0 / (unit_of(y) * unit_of(y))
        product *= 1.0 / unit_of(y)
        total = tl.where(tl.abs(total) < float("inf"), total, float("nan"))
        total = tl.where((column < M)[None, :], total, float("inf"))
        pair = row[:, None] * pairs_stride + column[None, :]
        valid = (row < B)[:, None] & (column < width)[None, :]
        tl.store(squared + pair, total, mask=valid)
        if PROJECT:
            tl.store(projected + pair, product.to(tl.float32), mask=valid)
        # Once NaN, least stays NaN: no comparison with it is true.
        least = tl.where(tl.sum((total != total).to(tl.int32), 1) > 0, float("nan"), least)
        smaller = tl.min(total, 1) < least
        least = tl.where(smaller, tl.min(total, 1), least)
    tl.store(closest + row * tl.num_programs(1) + tl.program_id(1), least, mask=row < B)


@triton.jit
def find_limit(
    row, radius, before, norms, unit, lowest, reach, N, tiles, exponent, others,
    MARGIN: tl.constexpr, NOISE: tl.constexpr, TOLERANCE: tl.constexpr, NEAR: tl.constexpr,
    AVERAGES: tl.constexpr, GAUSSIAN: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """The limit up to which distances of a query are refined (−1 for none), and the largest
    distance whose weight may matter (docs/kernels.md, with an example).

    The error of a distance is at most MARGIN (|x|² + |y|²). Its part that differs between
    references is typically NOISE (2|x||y| + |y|²), averaged over the panels of 32 features. Times
    ``rate`` it is the relative error of a weight. AVERAGES says that a mean is wanted: if n weights
    are within a nat of the largest, their errors average out by a factor of at least √(n/e). If
    more than TOLERANCE is left, or the log-sum-exp lacks digits, references are refined down to a
    weight of e^-NEAR times the largest. For a mean it is e^-nats if that is larger: then the errors
    of all other weights together are small. Otherwise at most the smallest distance is refined,
    because a mixture of exact and approximate distances would be biased.
    """
    base = before
    for start in range(0, tiles, SWEEP):
        tile = start + tl.arange(0, SWEEP)
        low = tl.load(lowest + row * tiles + tile, mask=tile < tiles, other=float("inf"))
        base = tl.minimum(base, tl.min(low, 0))
    r, norm = tl.load(radius + row), tl.load(norms + row)
    features = tl.full((), N, tl.float64)
    rate = rate_of(base, r, exponent, GAUSSIAN)
    # |y|² ≤ 2 (d² + |x|²), and the minimum has an error too. Values that are too small for float32
    # have an error of their own.
    smallest = (features / unit + tl.sqrt(features * norm)) / unit * 2.0**-120
    bound = 2.0 * (MARGIN * (3.0 * norm + 2.0 * base) + smallest)
    near = base + bound + excess_at(NEAR, rate, exponent, GAUSSIAN)
    near = tl.where(near == near, near, float("inf"))
    farthest, close = norm * 0.0, tl.full((), 0, tl.int32)
    for start in range(0, tiles, SWEEP):
        tile = start + tl.arange(0, SWEEP)
        low = tl.load(lowest + row * tiles + tile, mask=tile < tiles, other=float("inf"))
        close += tl.sum(((low - base) * rate <= 1.0).to(tl.int32), 0)
        norms_y = tl.load(reach + tile, mask=tile < tiles, other=0.0)
        farthest = tl.maximum(farthest, tl.max(tl.where(low <= near, norms_y, 0.0), 0))
    noise = NOISE / tl.sqrt(tl.maximum(features / 32.0, 1.0)) * tl.maximum(features / 8192.0, 1.0)
    error = smallest + noise * (2.0 * tl.sqrt(norm * farthest) + farthest)
    # Errors of the smallest distance are those of the log-sum-exp, whose size is the score.
    score = tl.abs(score_at(base, r, exponent, GAUSSIAN))
    needed = TOLERANCE * tl.minimum(1.0, tl.maximum(score, 1.0) / 16.0)
    allowed = needed
    if AVERAGES:
        averaged = tl.sqrt(tl.maximum(close.to(tl.float64) / 2.718, 1.0))
        allowed = TOLERANCE * tl.minimum(averaged, tl.maximum(score, 1.0) / 16.0)
        nats = tl.log(error * rate / needed) + others
        fewer = base + bound + excess_at(tl.maximum(nats, 0.0), rate, exponent, GAUSSIAN)
        near = tl.where(nats < NEAR, tl.minimum(near, fewer), near)
    matters = (error * rate > allowed) | (near == float("inf"))
    only_nearest = tl.where(error > TOLERANCE / 16.0 * base, base + bound, -1.0)
    return tl.where(matters, near, only_nearest), near


@triton.jit(do_not_specialize=["M", "tiles", "piece", "first"])
def refine(
    x, y, radius, nearest, norms, y_scale, lowest, reach, squared, closest,
    M, N, x_stride, y_stride, pairs_stride, tiles, piece, first,
    exponent: tl.float64, others: tl.float64,
    MARGIN: tl.constexpr, NOISE: tl.constexpr, TOLERANCE: tl.constexpr, NEAR: tl.constexpr,
    AVERAGES: tl.constexpr, GAUSSIAN: tl.constexpr, SWEEP: tl.constexpr, BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """Computes distances of one query to a piece of references again: those up to ``find_limit``,
    and NaN. closest[row, piece] becomes the smallest, or NaN if one is still NaN."""
    row = tl.program_id(0).to(tl.int64)
    before = tl.full((), float("inf"), tl.float64)
    if first == 0:
        before = tl.load(nearest + row)
    unit = tl.load(y_scale).to(tl.float64) * unit_of(y)
    limit, near = find_limit(
        row, radius, before, norms, unit, lowest, reach, N, tiles, exponent, others,
        MARGIN, NOISE, TOLERANCE, NEAR, AVERAGES, GAUSSIAN, SWEEP,
    )  # fmt: skip
    # The power of two brings squares of differences into the range of float32. Differences that
    # remain too large are cut: their reference is too far away to have a weight.
    power = scale_to_one(tl.minimum(tl.sqrt(near) * unit_of(y), 2.0**76).to(tl.float32))
    back = 1.0 / (power.to(tl.float64) * unit_of(y))
    largest = tl.minimum(LARGEST * (power.to(tl.float64) * unit_of(y)), LARGEST).to(tl.float32)
    least = tl.full((), float("inf"), tl.float64)
    begin = tl.program_id(1) * piece
    for start in range(begin, min(begin + piece, M), BLOCK):
        index = tl.arange(0, BLOCK)
        address = squared + row * pairs_stride + start + index
        d = tl.load(address, mask=start + index < M, other=float("inf"))
        needed = ((d <= limit) | (d != d)) & (start + index < M)
        count = tl.sum(needed.to(tl.int32), 0)
        for _ in range(0, count):
            j = tl.min(tl.where(needed, index, BLOCK), 0)
            needed = needed & (index != j)
            y_row = y + (start + j).to(tl.int64) * y_stride
            total = tl.zeros([FEATURES], tl.float32)
            rest = total
            for k in range(0, N, FEATURES):
                feature = k + tl.arange(0, FEATURES)
                valid = feature < N
                a = tl.load(x + row * x_stride + feature, mask=valid, other=0.0)
                high, low = exact_difference(a, y, y_row + feature, valid, power)
                high, low = tl.where(valid, high, 0.0), tl.where(valid, low, 0.0)
                high = tl.where(tl.abs(high) <= largest, high, float("nan"))
                cut = (tl.abs(high) > 2.0**55) & (low == low)
                high, low = tl.where(cut, 2.0**55, high), tl.where(cut, 0.0, low)
                total, rest = add_square(total, rest, high, low)
            lanes = total.to(tl.float64) + rest.to(tl.float64)
            exact = tl.maximum(tl.sum(lanes, 0), 0.0) * back * back
            # NaN, where values are not finite or too far apart, reaches the result.
            exact = tl.where(tl.sum(lanes, 0) < float("inf"), exact, float("nan"))
            d = tl.where(index == j, exact, d)
        if count > 0:
            tl.store(address, d, mask=start + index < M)
        least = tl.where(tl.sum((d != d).to(tl.int32), 0) > 0, float("nan"), least)
        smaller = tl.min(d, 0) < least
        least = tl.where(smaller, tl.min(d, 0), least)
    tl.store(closest + row * tl.num_programs(1) + tl.program_id(1), least)


# ---- launches ---------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The largest numbers of queries in a block and of references in a chunk."""

    block: int
    chunk: int


def sizes_of(B: int, M: int, N: int, gradient: bool) -> Sizes:
    """The sizes for B queries and M references of N features."""
    fitting = min(MAX_QUERIES, max(16, MAX_VALUES // N))
    # A last block of few queries would read all references. Large blocks have whole tiles.
    part = cdiv(B, max(1, cdiv(B, fitting)))
    block = max(1, min(part if fitting < 128 else cdiv(part, 32) * 32, B, fitting))
    chunk = max(MAX_PAIRS // (2 if gradient else 1) // block // 128, 1) * 128
    return Sizes(block, min(M, chunk, MAX_REFERENCES))


def parts_of(count: int, each: int) -> list[slice]:
    """Slices that cut ``count`` items into parts of at most ``each``."""
    return [slice(start, min(start + each, count)) for start in range(0, count, each)]


def padded(references: int) -> int:
    """references rounded up to a multiple of 16, which is whole 16-byte accesses for any type."""
    return cdiv(references, 16) * 16


class Pairs:
    """Squared distances of a block of queries to one chunk of references at a time.

    Attributes:
        squared: (B, chunk).
        closest: (B, pieces), the smallest of each piece of the chunk.
        projected: (B, chunk), G·y_j less a constant of the query, if G is given.
    """

    closest: Tensor

    def __init__(
        self,
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        D: float,
        chunk: int,
        upstream: Tensor | None = None,
    ) -> None:
        """upstream (B, N) is contiguous: G of the backward pass."""
        self.x, self.radius, self.upstream = x, radius, upstream
        self.B, self.N = x.shape
        self.D, self.gaussian, self.exponent = D, math.isinf(D), exponent_of(self.N, D)
        self.count, self.stride = len(references), padded(chunk)
        self.squared = radius.new_empty(self.B, self.stride)
        self.projected = x.new_empty((self.B, self.stride) if upstream is not None else 0)
        self.products = self.N >= MIN_PRODUCTS  # else from differences
        if self.products:
            self._center(references)

    def _center(self, references: Tensor) -> None:
        x, like = self.x, self.radius
        self.centered, self.center = x.new_empty(self.B, self.N), x.new_empty(self.N)
        self.scales, self.y_scale = x.new_empty(2 * self.B), x.new_empty(1)
        self.norms = like.new_empty(self.B)
        given = self.upstream is not None
        center_rows[(self.B,)](
            x, references, self.upstream if given else x, self.centered, self.center, self.norms,
            self.scales, self.y_scale, self.count, self.N, x.stride(0), references.stride(0),
            UPSTREAM=given, FEATURES=64, **FUSED,
        )  # fmt: skip

    def measure(self, y: Tensor, nearest: Tensor, first: bool) -> None:
        """Measure the distances to a chunk y. ``nearest`` (B,) holds the smallest ones of other
        chunks, and is not read for the first one."""
        pieces = min(PIECES, cdiv(len(y), TILE))
        piece = cdiv(cdiv(len(y), pieces), TILE) * TILE
        pieces = cdiv(len(y), piece)
        self.closest = self.radius.new_empty(self.B, pieces)
        if self.products:
            self._multiply(y)
            self._refine(y, nearest, first, piece)
        else:
            given = self.upstream is not None
            subtract[cdiv(self.B, 16), pieces](
                self.x, y, self.upstream if given else self.x, self.squared, self.closest,
                self.projected, self.B, len(y), padded(len(y)), self.N, self.x.stride(0),
                y.stride(0), self.stride, piece, PROJECT=given, ROWS=16, TILE=TILE,
                **(with_registers(144, warps=4) if given else FUSED),
            )  # fmt: skip

    def _multiply(self, y: Tensor) -> None:
        tiles = cdiv(len(y), TILE)
        self.lowest = self.radius.new_empty(self.B, tiles)
        self.reach = self.radius.new_empty(tiles)
        rows = 16 if self.B <= 16 else 32
        operands = [(self.centered, self.scales, False)]
        if self.upstream is not None:
            operands.append((self.upstream, self.scales[self.B :], True))
        for source, scales, project in operands:
            multiply[cdiv(self.B, rows), tiles](
                source, y, self.center, scales, self.y_scale, self.norms, self.squared, self.lowest,
                self.reach, self.projected, self.B, len(y), padded(len(y)), self.N, y.stride(0),
                self.stride, tiles, project, rows, TILE, 32, PRECISION, **FUSED,
            )  # fmt: skip

    def _refine(self, y: Tensor, nearest: Tensor, first: bool, piece: int) -> None:
        averages = self.upstream is None
        refine[self.B, self.closest.shape[1]](
            self.x, y, self.radius, nearest, self.norms, self.y_scale, self.lowest, self.reach,
            self.squared, self.closest, len(y), self.N, self.x.stride(0), y.stride(0), self.stride,
            cdiv(len(y), TILE), piece, int(first), self.exponent, math.log(self.count) + OTHERS,
            MARGIN, NOISE, TOLERANCE if averages else GRADIENT_TOLERANCE, NEAR, averages,
            self.gaussian, SWEEP=256, BLOCK=TILE, FEATURES=512, **FUSED,
        )  # fmt: skip
