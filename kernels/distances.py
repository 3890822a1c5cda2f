"""Squared distances between a block of queries and a chunk of references, in Triton.

1. ``distances`` computes |x|² + |y|² − 2 x·y from matrix products, with the data centred by
   ``find_center`` and each value split into two float16 parts. For few queries or features,
   ``differences`` computes Σ (x − y)² instead. Both find the smallest distance of each tile and,
   for the backward pass, G·y.
2. ``find_limits`` decides where the error that is left would change the result. The exponent
   (N + D)/2 multiplies it. ``refine`` recomputes those distances from differences, in two floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Choice, Config
from .variant import REFERENCES, Variant, variant

MAX_PAIRS = 1 << 21  # queries × references: 12 bytes each, 20 in the backward pass
MAX_PARTS = 1 << 22  # values in the partial sums of a chunk
MAX_QUERIES = 4096  # in a block
MAX_REFERENCES = 1 << 16  # in a chunk
NEAR = 20.0  # nats: a weight e^-20 times the largest needs no more digits
TOLERANCE = 1.5e-4  # relative error of a weight that needs no refinement
MAX_REFINE_PROGRAMS = 256  # for a query
MIN_REFINE_TILES = 2  # tiles of references for a program of ``refine``
CENTER_PROGRAMS = 64  # at most, of ``find_center``
CENTER_FEATURES = tl.constexpr(64)  # that ``find_center`` reads at a time
SAMPLES = tl.constexpr(16)  # references whose mean is the centre
# Powers of two of the largest centred values as float16, which holds less than 2^16. References
# outside of the sample may be larger by 2^11.
QUERY_POWER = tl.constexpr(12)
REFERENCE_POWER = tl.constexpr(4)


@triton.jit
def load_references(pointers, mask, dtype: tl.constexpr):
    """References as floating point, zero outside of mask. A uint8 value u means u/127.5 − 1."""
    values = tl.load(pointers, mask=mask, other=0)
    if values.dtype == tl.uint8:
        # The difference of two rounded numbers would lose digits near 0.
        floating = tl.where(mask, (2.0 * values.to(dtype) - 255.0) * (1.0 / 255.0), 0.0).to(dtype)
    else:
        floating = values.to(dtype)
    return floating


@triton.jit
def scale_to(largest, POWER: tl.constexpr):
    """The power of two that brings a float32 ``largest`` > 0 to at least 2^POWER, below twice that.
    For 0 and values that are not finite it is some power of two."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    biased = tl.minimum(tl.maximum(254 + POWER - exponent, 1), 254)
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_compensated(total, lost, value):
    """Kahan's sum: total − lost is the sum of all values to about twice the digits of float32."""
    value -= lost
    larger = total + value
    return larger, (larger - total) - value


@triton.jit(do_not_specialize=["M"])
def find_center(y, center, spread, M, N, y_stride, width, portion):
    """A centre of the references, the mean of evenly spaced ones, and how far these are from it.

    spread[i] is the largest |y − center| of the sample among the features of program i. A program
    takes ``portion`` features. ``center`` has ``width`` ≥ N features, zero from N on.
    """
    row = (tl.arange(0, SAMPLES).to(tl.int64) * M) // SAMPLES
    first = tl.program_id(0) * portion
    largest = tl.zeros([CENTER_FEATURES], tl.float32)
    for start in range(first, min(first + portion, width), CENTER_FEATURES):
        feature = start + tl.arange(0, CENTER_FEATURES)
        mask = (row >= 0)[:, None] & (feature < N)[None, :]
        place = y + row[:, None] * y_stride + feature[None, :]
        values = load_references(place, mask, tl.float32)
        mean = tl.sum(values * (1.0 / SAMPLES), 0)
        tl.store(center + feature, mean, mask=feature < width)
        away = tl.where(mask, tl.abs(values - mean[None, :]), 0.0)
        # Equal samples say nothing about the others. Their own size is a guess.
        guess = tl.where(feature < N, tl.abs(mean) * 2.0**-10, 0.0)
        largest = tl.maximum(largest, tl.maximum(tl.max(away, 0), guess))
    tl.store(spread + tl.program_id(0), tl.max(largest, 0))


@triton.jit
def split_rows(
    x,
    center,
    spread,
    high,
    low,
    norms,
    units,
    scale,
    scaled_center,
    N,
    x_stride,
    width,
    programs,
    CENTERED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two float16 parts, high + low, of a row of queries times a power of two.

    Rows are centred if CENTERED. units[row] turns a product with scaled references into x·y,
    ``scale`` is the power of two of the references, scaled_center the centre times that, and
    norms[row] = |x − center|².
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PROGRAMS)
    of_y = scale_to(
        tl.max(tl.load(spread + part, mask=part < programs, other=0.0), 0), REFERENCE_POWER
    )
    norm = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
        if CENTERED:
            a -= tl.load(center + feature, mask=feature < N, other=0.0)
        norm += a.to(tl.float64) * a.to(tl.float64)
        largest = tl.maximum(largest, tl.abs(a))
    of_x = scale_to(tl.max(largest, 0), QUERY_POWER)
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
        if CENTERED:
            c = tl.load(center + feature, mask=feature < N, other=0.0)
            tl.store(scaled_center + feature, c * of_y, mask=feature < tl.where(row == 0, width, 0))
            a -= c
        a *= of_x
        h = a.to(tl.float16)
        tl.store(high + row * width + feature, h, mask=feature < width)
        rest = (a - h.to(tl.float32)).to(tl.float16)
        tl.store(low + row * width + feature, rest, mask=feature < width)
    tl.store(units + row, 1.0 / of_x.to(tl.float64) / of_y.to(tl.float64))
    if CENTERED:
        tl.store(norms + row, tl.sum(norm, 0))
        tl.store(scale, of_y, mask=row == 0)


@triton.jit
def finish_distances(distance, squared, lowest, row, column, B, M, width, pairs_stride, tiles):
    """Stores distances and the smallest of the tile for each query; in float64.

    Rows of distances are padded with infinity to a multiple of 16 references.
    """
    known = (row < B)[:, None] & (column < M)[None, :]
    finite = tl.abs(distance) < float("inf")
    distance = tl.where(finite, tl.maximum(distance, 0.0), float("nan"))
    place = row[:, None] * pairs_stride + column[None, :]  # below 2^31, as MAX_PAIRS is
    filled = tl.where(known, distance, float("inf"))
    tl.store(squared + place, filled, mask=(row < B)[:, None] & (column < width)[None, :])
    least = tl.min(tl.where(known & finite, distance, float("inf")), 1)
    # A negative minimum marks a tile with a distance that is not finite. ``refine`` looks at it.
    overflows = tl.max((known & (finite == 0)).to(tl.int32), 1)
    least = tl.where(overflows > 0, -tl.maximum(least, 1e-300), least)
    tile = tl.program_id(1)
    tl.store(lowest + row.to(tl.int64) * tiles + tile, least, mask=row < B)


@triton.jit
def split_product(b_high, b_low, a_high, a_low, HIGH: tl.constexpr):
    """Σ (b_high + b_low)(a_high + a_low) without low · low; only high · high unless HIGH."""
    if HIGH:
        product = tl.dot(b_low, a_high)
        product = tl.dot(b_high, a_low, product)
        product = tl.dot(b_high, a_high, product)
    else:
        product = tl.dot(b_high, a_high)
    return product


@triton.jit(do_not_specialize=["B", "M", "tiles"])
def distances(
    y,
    scaled_center,
    scale,
    high,
    low,
    units,
    norms,
    upstream_high,
    upstream_low,
    upstream_units,
    squared,
    lowest,
    reach,
    projected,
    B,
    M,
    width,
    N,
    x_stride,
    y_stride,
    pairs_stride,
    tiles,
    HIGH: tl.constexpr,
    PROJECT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
):
    """|x|² + |y|² − 2 x·y of centred data for ROWS queries and TILE references, and G·(y − center)
    for the backward pass. reach[tile] is the largest |y|² of the tile.

    Tiles are references × queries, because matrix units take 64 rows, more than there may be
    queries. Matrix units round every addition toward zero, so panels are added up outside of them,
    in two floats. References are split in registers, after they came through shared memory.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    y_rows = y + column.to(tl.int64)[:, None] * y_stride
    x_rows = row.to(tl.int64)[None, :] * x_stride
    of_y = tl.load(scale)
    total = tl.zeros([TILE, ROWS], tl.float32)
    lost = tl.zeros([TILE, ROWS], tl.float32)
    projection = tl.zeros([TILE, ROWS], tl.float32)
    projection_lost = tl.zeros([TILE, ROWS], tl.float32)
    square = tl.zeros([TILE], tl.float32)
    square_lost = tl.zeros([TILE], tl.float32)
    for k in range(0, N, PANEL):
        feature = k + tl.arange(0, PANEL)
        known = (column < M)[:, None] & (feature < N)[None, :]
        b = load_references(y_rows + feature[None, :], known, tl.float32)
        c = tl.load(scaled_center + feature, mask=feature < x_stride, other=0.0)
        b = b * of_y - c[None, :]
        square, square_lost = add_compensated(square, square_lost, tl.sum(b * b, 1))
        b_high = b.to(tl.float16)
        b_low = (b - b_high.to(tl.float32)).to(tl.float16)
        place = x_rows + feature[:, None]
        inside = (row < B)[None, :] & (feature < x_stride)[:, None]
        a_high = tl.load(high + place, mask=inside, other=0.0)
        a_low = tl.load(low + place, mask=inside, other=0.0)
        product = split_product(b_high, b_low, a_high, a_low, HIGH)
        total, lost = add_compensated(total, lost, product)
        if PROJECT:
            g_high = tl.load(upstream_high + place, mask=inside, other=0.0)
            g_low = tl.load(upstream_low + place, mask=inside, other=0.0)
            product = split_product(b_high, b_low, g_high, g_low, HIGH)
            projection, projection_lost = add_compensated(projection, projection_lost, product)
    wide = of_y.to(tl.float64)
    of_squares = (square.to(tl.float64) - square_lost.to(tl.float64)) / wide / wide
    norm = tl.load(norms + row, mask=row < B, other=0.0)
    unit = tl.load(units + row, mask=row < B, other=0.0)
    products = (total.to(tl.float64) - lost.to(tl.float64)) * unit[None, :]
    distance = tl.trans(of_squares[:, None] + norm[None, :] - 2.0 * products)
    finish_distances(distance, squared, lowest, row, column, B, M, width, pairs_stride, tiles)
    tile = tl.program_id(1)
    # Larger references have no products in float16; they do not count.
    counts = (column < M) & (of_squares * wide * wide <= N * 2.0**32)
    farthest = tl.max(tl.where(counts, of_squares, 0.0), 0)
    tl.store(reach + tile, farthest, mask=tl.program_id(0) == 0)
    if PROJECT:
        unit = tl.load(upstream_units + row, mask=row < B, other=0.0)
        sums = (projection.to(tl.float64) - projection_lost.to(tl.float64)) * unit[None, :]
        place = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
        known = (row < B)[:, None] & (column < M)[None, :]
        tl.store(projected + place, tl.trans(sums).to(tl.float32), mask=known)


@triton.jit(do_not_specialize=["B", "M", "tiles"])
def differences(
    x,
    upstream,
    y,
    squared,
    lowest,
    norms,
    projected,
    B,
    M,
    width,
    N,
    x_stride,
    y_stride,
    pairs_stride,
    tiles,
    PROJECT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
):
    """The same results from Σ (x − y)². Float32 sums of 256 values are added in float64."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    y_rows = y + column.to(tl.int64)[:, None] * y_stride
    g_rows = upstream + row.to(tl.int64)[:, None] * N
    distance = tl.zeros([ROWS, TILE], tl.float64)
    projection = tl.zeros([ROWS, TILE], tl.float64)
    norm = tl.zeros([ROWS], tl.float64)
    for start in range(0, N, 256 * PANEL):
        of_pairs = tl.zeros([ROWS, TILE, PANEL], tl.float32)
        of_upstream = tl.zeros([ROWS, TILE, PANEL], tl.float32)
        of_x = tl.zeros([ROWS, PANEL], tl.float32)
        for k in range(start, min(start + 256 * PANEL, N), PANEL):
            feature = (k + tl.arange(0, PANEL))[None, :]
            a = tl.load(x_rows + feature, mask=(row < B)[:, None] & (feature < N), other=0.0)
            b = load_references(y_rows + feature, (column < M)[:, None] & (feature < N), tl.float32)
            difference = a[:, None, :] - b[None, :, :]
            of_pairs += difference * difference
            of_x += a * a
            if PROJECT:
                g = tl.load(g_rows + feature, mask=(row < B)[:, None] & (feature < N), other=0.0)
                of_upstream += g[:, None, :] * b[None, :, :]
        distance += tl.sum(of_pairs.to(tl.float64), 2)
        norm += tl.sum(of_x.to(tl.float64), 1)
        if PROJECT:
            projection += tl.sum(of_upstream.to(tl.float64), 2)
    finish_distances(distance, squared, lowest, row, column, B, M, width, pairs_stride, tiles)
    tl.store(norms + row, norm, mask=row < tl.where(tl.program_id(1) == 0, B, 0))
    if PROJECT:
        place = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
        known = (row < B)[:, None] & (column < M)[None, :]
        tl.store(projected + place, projection.to(tl.float32), mask=known)


@triton.jit
def two_floats(pointers, mask):
    """References as high + low in float32, exact; a uint8 value u means (2u − 255)/255."""
    values = tl.load(pointers, mask=mask, other=0)
    if values.dtype == tl.uint8:
        whole = 2.0 * values.to(tl.float32) - 255.0
        high = whole * (1.0 / 255.0)
        # The remainder in products of few digits, which are exact without a fused operation.
        front = (high.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        low = ((whole - front * 255.0) - (high - front) * 255.0) * (1.0 / 255.0)
    else:
        high = values.to(tl.float32)
        low = high * 0.0
    return high, low


@triton.jit
def exact_difference(a, b):
    """a − b as high + low, exact."""
    high = a - b
    of_b = high - a
    return high, (a - (high - of_b)) - (b + of_b)


@triton.jit(do_not_specialize=["tiles"])
def find_limits(
    radius,
    nearest,
    lowest,
    reach,
    norms,
    scale,
    limits,
    N,
    tiles,
    exponent: tl.float64,
    spreading: tl.float64,
    margin: tl.float64,
    noise: tl.float64,
    near_nats: tl.float64,
    tolerance: tl.float64,
    PRODUCTS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """Which distances of a query are recomputed: those up to limits[row, 0], which may be −1.

    The error of a distance is at most ``margin``·(|x|² + |y|²). Its part that differs between
    references is typically ``noise``·(2|x||y| + |y|²) for PRODUCTS, and ``noise``·(|x|² + d²)
    otherwise. (exponent/s)·error is the relative error of a weight. If n weights are within a nat
    of the largest, their errors average out in the mean by a factor of at least √(n/e). If more
    than ``tolerance`` is left, or the log-sum-exp lacks digits, all references are refined whose
    weight may be more than e^-near_nats times the largest.

    limits[row, 1] is the power of two by which ``refine`` multiplies differences, so that float32
    holds their squares.
    """
    row = tl.program_id(0).to(tl.int64)
    low_row = lowest + row * tiles
    base = tl.load(nearest + row)
    for start in range(0, tiles, SWEEP):
        tile = start + tl.arange(0, SWEEP)
        low = tl.load(low_row + tile, mask=tile < tiles, other=float("inf"))
        base = tl.minimum(base, tl.min(tl.abs(low), 0))

    r = tl.load(radius + row)
    norm = tl.load(norms + row)
    s = base + r * r
    # The bound of the error uses |y|² ≤ 2 (d² + |x|²). It counts twice: the minimum has an error
    # too. Values too small for float16 have an error of their own.
    bound = 2.0 * margin * (3.0 * norm + 2.0 * base)
    smallest = norm * 0.0
    if PRODUCTS:
        smallest = tl.sqrt(norm) * 2.0**-24 / tl.load(scale).to(tl.float64)
        bound += 4.0 * tl.sqrt(tl.full((), N, tl.float64)) * smallest
    if GAUSSIAN:
        within = 2.0 * r * r
        near = base + bound + near_nats * within
        score = tl.where(base == 0.0, 0.0, base / within)
    else:
        within = s / exponent
        near = base + bound + spreading * s
        score = exponent * tl.abs(tl.log(s.to(tl.float32))).to(tl.float64)
    near = tl.where(near == near, near, float("inf"))
    farthest = norm * 0.0
    close = tl.full((), 0, tl.int32)
    for start in range(0, tiles, SWEEP):
        tile = start + tl.arange(0, SWEEP)
        low = tl.load(low_row + tile, mask=tile < tiles, other=float("inf"))
        close += tl.sum((tl.abs(low) <= base + within).to(tl.int32), 0)
        if PRODUCTS:
            competes = tl.abs(low) <= near
            norms_y = tl.load(reach + tile, mask=tile < tiles, other=0.0)
            farthest = tl.maximum(farthest, tl.max(tl.where(competes, norms_y, 0.0), 0))
    if PRODUCTS:
        error = smallest + noise * (2.0 * tl.sqrt(norm * farthest) + farthest)
    else:
        # The rounding errors of single differences mostly average out.
        error = 2.0**-26 * base + noise * (norm + base)
    allowed = tolerance * tl.sqrt(tl.maximum(close.to(tl.float64) / 2.718, 1.0))
    allowed = tl.minimum(allowed, tolerance * tl.maximum(1.0, score) / 16.0)
    unit = tl.where(near < float("inf"), scale_to(tl.sqrt(near).to(tl.float32), 0), 2.0**-76)
    near = tl.where((error > allowed * within) | (near == float("inf")), near, -1.0)
    tl.store(limits + 2 * row, near)
    tl.store(limits + 2 * row + 1, unit.to(tl.float64))


@triton.jit(do_not_specialize=["M", "tiles", "segment"])
def refine(
    x,
    y,
    limits,
    squared,
    lowest,
    M,
    N,
    x_stride,
    y_stride,
    pairs_stride,
    tiles,
    segment,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Recomputes distances of one query up to limits[row, 0], and all that are not finite."""
    row = tl.program_id(0).to(tl.int64)
    near, unit = tl.load(limits + 2 * row), tl.load(limits + 2 * row + 1)
    power = unit.to(tl.float32)
    first = tl.program_id(1) * segment
    for tile in range(first, min(first + segment, tiles)):
        low = tl.load(lowest + row * tiles + tile)
        if (low < 0.0) | (low <= near):
            index = tl.arange(0, TILE)
            place = squared + row * pairs_stride + tile * TILE
            inside = tile * TILE + index < M
            known = tl.load(place + index, mask=inside, other=float("inf"))
            needed = inside & ((known <= near) | ((known < float("inf")) == 0))
            for _ in range(0, tl.sum(needed.to(tl.int32), 0)):
                j = tl.min(tl.where(needed, index, TILE), 0)
                needed = needed & (index != j)
                y_row = y + (tile * TILE + j).to(tl.int64) * y_stride
                total = tl.zeros([PANEL], tl.float32)
                lost = tl.zeros([PANEL], tl.float32)
                for k in range(0, N, PANEL):
                    feature = k + tl.arange(0, PANEL)
                    mask = feature < N
                    a = tl.load(x + row * x_stride + feature, mask=mask, other=0.0)
                    b, b_rest = two_floats(y_row + feature, mask)
                    high, rest = exact_difference(a, b)
                    high, rest = high * power, (rest - b_rest) * power
                    # A reference with larger differences is too far away to have a weight.
                    cut = (tl.abs(high) > 2.0**40) & (rest == rest)
                    high, rest = tl.where(cut, 2.0**40, high), tl.where(cut, 0.0, rest)
                    value = tl.where(mask, high * high + 2.0 * high * rest, 0.0)
                    total, lost = add_compensated(total, lost, value)
                exact = tl.sum(total.to(tl.float64) - lost.to(tl.float64), 0) / unit / unit
                # Infinite only if the input is not finite. NaN reaches the result; infinity would
                # not.
                tl.store(place + j, tl.where(exact < float("inf"), exact, float("nan")))


# ---- launches ---------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What the fastest configuration depends on: sizes as powers of two, types, precision."""

    rows: int
    features: int
    references: torch.dtype
    precision: str
    project: bool

    @property
    def few(self) -> bool:
        """Whether there are too few queries or features to keep matrix units busy."""
        return self.rows < 16 or self.features < 32


def distance_configs(shape: Shape) -> list[Config]:
    """Configurations of the kernel that computes distances.

    Few queries get small tiles, so that every multiprocessor has some. Larger tiles read each value
    less often. But sums in two floats need registers, and with 64 × 64 some would spill.
    """
    if shape.few:
        panel = 64 if shape.features >= 64 else 16
        return [Config({"ROWS": 4, "TILE": 16, "PANEL": panel}, num_stages=1)]
    return [Config({"ROWS": 32, "TILE": 64, "PANEL": 32})]


DISTANCES = Choice(distance_configs)
SPLIT = Config({"BLOCK": 1024})
LIMITS = Config({"SWEEP": 256}, num_warps=2)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least count."""
    return 1 << (count - 1).bit_length()


def padded(references: int) -> int:
    """references rounded up to a multiple of 16, which is whole 16-byte accesses for any type."""
    return -(-references // 16) * 16


def input_precision(precision: str) -> str:
    """Triton's name of the precision of weighted sums. On AMD it is always float32."""
    if torch.version.hip is not None:
        return "ieee"
    return {"high": "tf32x3", "medium": "tf32"}[precision]


@dataclass(frozen=True)
class Problem:
    """All queries and references. Rows have contiguous features."""

    x: Tensor
    references: Tensor
    radius: Tensor
    D: float
    precision: str
    upstream: Tensor | None = None
    """(B, N), contiguous: G of the backward pass, which needs G·y too."""

    @property
    def features(self) -> int:
        return self.x.shape[1]

    @property
    def exponent(self) -> float:
        """(N + D)/2, the exponent of s; 1/2 at D = ∞, the factor of d²/σ²."""
        return 0.5 if math.isinf(self.D) else (self.features + self.D) / 2

    @property
    def gaussian(self) -> bool:
        return math.isinf(self.D)

    @property
    def block(self) -> int:
        """The number of queries in a block."""
        fitting = max(16, MAX_PARTS // self.features)
        return min(len(self.x), MAX_QUERIES, fitting)

    @property
    def chunk(self) -> int:
        """The number of references in a chunk."""
        fitting = -(-max(MAX_PAIRS // self.block, 128) // 128) * 128
        return min(len(self.references), fitting, MAX_REFERENCES)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.references), self.chunk):
            yield slice(start, min(start + self.chunk, len(self.references)))

    def blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.x), self.block):
            yield slice(start, min(start + self.block, len(self.x)))

    def shape(self, rows: int) -> Shape:
        kinds = (self.references.dtype, self.precision, self.upstream is not None)
        return Shape(power_of_two(rows), power_of_two(self.features), *kinds)

    def errors(self, shape: Shape) -> Errors:
        """The errors of distances before they are refined."""
        N = self.features
        long = max(1.0, N / 8192)
        if shape.few:
            rounded = self.references.dtype == torch.uint8
            return Errors(2.0**-21 * long, 2.0**-22 if rounded else 0.0, TOLERANCE)
        if shape.precision == "high":
            # Rounding of sums over panels of 32 features, which mostly averages out.
            return Errors(2.0**-18 * long, 2.0**-23 / math.sqrt(max(1.0, N / 32)), TOLERANCE)
        # The roundings to 11 bits mostly average out.
        return Errors(2.0**-9, 2.0**-12 / math.sqrt(N), 2e-2)


class Errors(NamedTuple):
    """Errors of distances before they are refined, as ``refine`` takes them."""

    margin: float
    """Largest error, relative to |x|² + |y|²."""
    noise: float
    """Typical error, relative to 2|x||y| + |y|² of products or |x|² + d² of differences."""
    tolerance: float
    """Relative error of a weight that needs no refinement."""


class Parts(NamedTuple):
    """Rows as two float16 parts, times a power of two."""

    high: Tensor
    low: Tensor
    units: Tensor
    """(B,) in float64: what turns a product with scaled references into the true one."""


class Centered:
    """The centre of the references, and a block of queries relative to it, in parts."""

    def __init__(self, problem: Problem, x: Tensor, upstream: Tensor | None, norms: Tensor) -> None:
        N, references = problem.features, problem.references
        self.width = padded(N)
        self.norms = norms
        features = CENTER_FEATURES.value
        portion = -(-self.width // CENTER_PROGRAMS // features) * features
        self.programs = -(-self.width // portion)
        self.center, self.scaled_center = x.new_empty(self.width), x.new_empty(self.width)
        self.spread = x.new_empty(self.programs)
        self.scale = x.new_empty(1)
        find_center[(self.programs,)](
            references,
            self.center,
            self.spread,
            len(references),
            N,
            references.stride(0),
            self.width,
            portion,
            num_warps=4,
        )
        self.queries = self._split(x, N, centered=True)
        self.upstream = self.queries
        if upstream is not None:
            self.upstream = self._split(upstream, N, centered=False)

    def _split(self, x: Tensor, N: int, centered: bool) -> Parts:
        high, low = (x.new_empty(len(x), self.width, dtype=torch.float16) for _ in range(2))
        parts = Parts(high, low, torch.empty_like(self.norms))
        split_rows[(len(x),)](
            x,
            self.center,
            self.spread,
            *parts[:2],
            self.norms,
            parts.units,
            self.scale,
            self.scaled_center,
            N,
            x.stride(0),
            self.width,
            self.programs,
            CENTERED=centered,
            PROGRAMS=CENTER_PROGRAMS,
            **SPLIT.options,
        )
        return parts


class Pairs:
    """Distances of a block of queries to one chunk of references at a time, and their memory."""

    def __init__(self, problem: Problem, rows: slice) -> None:
        self.problem, self.rows = problem, rows
        self.x, self.radius = problem.x[rows], problem.radius[rows]
        self.count = len(self.x)
        self.shape = problem.shape(self.count)
        self.stride = padded(problem.chunk)
        empty = self.x.new_empty
        self.squared = empty((self.count, self.stride), dtype=torch.float64)
        self.projected = empty((self.count, self.stride) if self.upstream is not None else 0)
        self.norms = empty(self.count, dtype=torch.float64)
        self.centered = None
        if not self.shape.few:
            self.centered = Centered(problem, self.x, self.upstream, self.norms)

    @property
    def upstream(self) -> Tensor | None:
        return None if self.problem.upstream is None else self.problem.upstream[self.rows]

    def measure(self, references: Tensor, nearest: Tensor) -> None:
        """Squared distances (and G·(y − a constant)), exact where it matters; nearest (B,) is the
        smallest yet."""
        DISTANCES.launch(self.shape, lambda config: self._distances(config, references))
        self._refine(references, nearest)

    def _distances(self, config: Config, references: Tensor) -> None:
        # Set in every launch: timing launches other configurations before the chosen one.
        self.tile = config["TILE"]
        M, tiles = len(references), triton.cdiv(len(references), self.tile)
        self.lowest = self.norms.new_empty(self.count, tiles)
        self.reach = self.norms.new_empty(tiles)
        grid = (triton.cdiv(self.count, config["ROWS"]), tiles)
        if self.centered is None:
            self._differences(config, references, grid)
            return
        centered = self.centered
        distances[grid](
            references,
            centered.scaled_center,
            centered.scale,
            *centered.queries,
            self.norms,
            *centered.upstream,
            self.squared,
            self.lowest,
            self.reach,
            self.projected,
            self.count,
            M,
            padded(M),
            self.problem.features,
            centered.width,
            references.stride(0),
            self.stride,
            tiles,
            HIGH=self.shape.precision == "high",
            PROJECT=self.upstream is not None,
            **config.options,
        )

    def _differences(self, config: Config, references: Tensor, grid: tuple[int, int]) -> None:
        differences[grid](
            self.x,
            self.x if self.upstream is None else self.upstream,
            references,
            self.squared,
            self.lowest,
            self.norms,
            self.projected,
            self.count,
            len(references),
            padded(len(references)),
            self.problem.features,
            self.x.stride(0),
            references.stride(0),
            self.stride,
            self.lowest.shape[1],
            PROJECT=self.upstream is not None,
            **config.options,
        )

    def _refine(self, references: Tensor, nearest: Tensor) -> None:
        problem, tiles = self.problem, self.lowest.shape[1]
        errors = problem.errors(self.shape)
        spread = 0.0 if problem.gaussian else math.expm1(NEAR / problem.exponent)
        limits = self.norms.new_empty(self.count, 2)
        find_limits[(self.count,)](
            self.radius,
            nearest,
            self.lowest,
            self.reach,
            self.norms,
            self.norms if self.centered is None else self.centered.scale,
            limits,
            problem.features,
            tiles,
            problem.exponent,
            spread,
            errors.margin,
            errors.noise,
            NEAR,
            errors.tolerance,
            PRODUCTS=self.centered is not None,
            GAUSSIAN=problem.gaussian,
            **LIMITS.options,
        )
        segment = max(MIN_REFINE_TILES, triton.cdiv(tiles, MAX_REFINE_PROGRAMS))
        refine[(self.count, triton.cdiv(tiles, segment))](
            self.x,
            references,
            limits,
            self.squared,
            self.lowest,
            len(references),
            problem.features,
            self.x.stride(0),
            references.stride(0),
            self.stride,
            tiles,
            segment,
            TILE=self.tile,
            **refine_config(problem.features).options,
        )


def refine_config(features: int) -> Config:
    """``refine`` takes as many features at a time as its warps can hold."""
    panel = min(4096, max(32, power_of_two(features)))
    return Config({"PANEL": panel}, num_warps=max(1, panel // 512))


def shapes(references: torch.dtype) -> Iterator[Shape]:
    """One shape for each class that has its own configurations. TF32 is listed for float32 only: it
    does not change how references are read."""
    precisions = ("high", "medium") if references == torch.float32 else ("high",)
    for rows in (4, 32, 128, 512):
        for precision in precisions:
            for project in (False, True):
                yield Shape(rows, 4096, references, precision, project)


def variants() -> list[Variant]:
    """Every type of references and configuration, with and without G·y."""
    found = []
    for centered in (False, True):
        constants: dict[str, Any] = {"CENTERED": centered, "PROGRAMS": CENTER_PROGRAMS}
        found.append(variant(split_rows, constants | SPLIT.options))
    for dtype in REFERENCES:
        found.append(variant(find_center, {}, dtype, wide_loads=False))
        for shape in shapes(dtype):
            for config in distance_configs(shape):
                constants = {"PROJECT": shape.project} | config.options
                if shape.few:
                    wide = dtype != torch.uint8  # a thread takes 8 of a tile's 1024 values
                    found.append(variant(differences, constants, dtype, wide_loads=wide))
                    continue
                constants["HIGH"] = shape.precision == "high"
                found.append(variant(distances, constants, dtype, products=True))
        for features in (32, 3072):
            for tile in (64, 16):
                constants = {"TILE": tile} | refine_config(features).options
                found.append(variant(refine, constants, dtype, wide_loads=features > 32))
    for products in (False, True):
        for gaussian in (False, True):
            constants = {"PRODUCTS": products, "GAUSSIAN": gaussian} | LIMITS.options
            found.append(variant(find_limits, constants, wide_loads=False))  # of rows of tiles
    return list({each.name: each for each in found}.values())
