"""Weights of references from their squared distances, in Triton.

Weights are relative to that of the nearest reference. The score that is exponentiated is at most
some tens of nats where a weight counts, so float32 has enough digits for it, once the excess over
the smallest squared distance was taken in float64.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .tuning import Config
from .variant import Variant, variant

WEIGHT_CUTOFF = 16.0  # nats: a weight below e^-16 / M of the sum is below float32 rounding
PIECES = 64  # at most, that the references of a chunk are split into
MINIMA = (256, 1024, 4096)  # tiles of a chunk, at most
WEIGH = Config({"BLOCK": 1024})


@triton.jit
def score_rate(nearest, r, exponent, GAUSSIAN: tl.constexpr):
    """How fast the score falls at the squared distance ``nearest``, in float64.

    It is infinite where r = 0 on a reference. The largest number that is returned instead still
    keeps the weight of an equal distance at 1, because 0 times it is 0.
    """
    if GAUSSIAN:
        rate = 0.5 / r / r
    else:
        rate = exponent / (nearest + r * r)
    return tl.minimum(rate, 1e300)


@triton.jit
def relative_weight(excess, rate, exponent, GAUSSIAN: tl.constexpr):
    """The weight at the squared distance nearest + ``excess``, over that at nearest; in float32.

    −score is excess·rate for GAUSSIAN, otherwise exponent·log1p(u), u = excess·rate/exponent. With
    1 + u = 2^k (1 + m), −1/4 ≤ m < 1/2, log1p(u) = k log 2 + log1p(m). For k = 0, where exponent
    times u is known, the exponent may be larger than float32 holds.
    """
    linear = (excess * rate).to(tl.float32)
    if GAUSSIAN:
        fall = linear
    else:
        power = tl.full((), exponent, tl.float64).to(tl.float32)
        u = linear * (1.0 / power)
        whole = (1.0 + u).to(tl.int32, bitcast=True)
        k_shifted = (whole - 0x3F400000) & -0x800000  # 2^23 k
        scale = (0x3F800000 - k_shifted).to(tl.float32, bitcast=True)
        m = u * scale + (scale - 1.0)
        # log1p(m)/m = 1 − m/2 + m² q(m), to 5e-9.
        q = -0.0450747833 * m + 0.104630210
        q = q * m - 0.131611943
        q = q * m + 0.144783959
        q = q * m - 0.166473120
        q = q * m + 0.199908614
        q = q * m - 0.250000954
        q = q * m + 0.333334506
        ratio = (q * m - 0.5) * m + 1.0
        k_log2 = k_shifted.to(tl.float32) * (0.693147181 * 2.0**-23)
        fall = tl.where(k_shifted == 0, linear * ratio, power * (k_log2 + m * ratio))
        fall = tl.where(u > 2.0**100, float("inf"), fall)
    return tl.exp(-fall)


@triton.jit(do_not_specialize=["tiles", "pieces"])
def weigh(
    radius,
    lowest,
    nearest,
    total,
    squared,
    weights,
    sums,
    closest,
    kept,
    live,
    width,
    pairs_stride,
    tiles,
    pieces,
    exponent: tl.float64,
    floor: tl.float64,
    FIRST: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    MINIMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query's weights over a piece of the chunk, relative to the nearest reference so far.

    sums[row, piece] is the sum of the weights, and live[row, piece] how many are not set to zero.
    closest[row] is the smallest squared distance so far, from the minima of tiles and from
    ``nearest``, that of earlier chunks. kept[row] is the weight of all earlier chunks, ``total``,
    relative to it.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    r = tl.load(radius + row)
    tile = tl.arange(0, MINIMA)
    low = tl.load(lowest + row * tiles + tile, mask=tile < tiles, other=float("inf"))
    least = tl.min(low, 0)
    if not FIRST:
        before = tl.load(nearest + row)
        least = tl.where(before >= 0.0, tl.minimum(before, least), -1.0)
    # The minimum of a number and NaN is the number, so that NaN is −1 up to here.
    least = tl.where(least < 0.0, float("nan"), least)
    rate = score_rate(least, r, exponent, GAUSSIAN)
    carried = r * 0.0
    if not FIRST:
        earlier_weight = relative_weight(before - least, rate, exponent, GAUSSIAN)
        carried = tl.load(total + row) * earlier_weight.to(tl.float64)
    smallest = tl.full((), floor, tl.float64).to(tl.float32)
    smallest *= tl.maximum(carried.to(tl.float32), 1.0)

    column = piece * BLOCK + tl.arange(0, BLOCK)
    place = row * pairs_stride + column
    d = tl.load(squared + place, mask=column < width, other=float("inf"))
    w = relative_weight(d - least, rate, exponent, GAUSSIAN)
    summed = tl.sum(w, 0)
    w = tl.where(w < smallest, 0.0, w)
    tl.store(weights + place, w, mask=column < width)
    tl.store(sums + row * pieces + piece, summed)
    tl.store(live + row * pieces + piece, tl.sum((w != 0.0).to(tl.int32), 0))
    tl.store(closest + row, least, mask=piece == 0)
    tl.store(kept + row, carried, mask=piece == 0)


# ---- launches ---------------------------------------------------------------------------------


def weight_cutoff(references: int) -> float:
    """How many nats below the sum of weights a weight becomes zero."""
    return WEIGHT_CUTOFF + math.log(references)


def pieces_of(references: int) -> int:
    """The number of pieces that a chunk's references are split into."""
    return -(-references // WEIGH["BLOCK"])


def minima_of(tiles: int) -> int:
    """The number of minima that ``weigh`` reads: few sizes, so that it is compiled few times."""
    return next(size for size in MINIMA if size >= tiles)


def variants() -> list[Variant]:
    """The first chunk and later ones, both kinds of D. Many tiles are listed for later chunks."""
    result = []
    for first in (False, True):
        for gaussian in (False, True):
            for minima in MINIMA[:1] if first or gaussian else MINIMA:
                constants: dict[str, Any] = {"FIRST": first, "GAUSSIAN": gaussian, "MINIMA": minima}
                result.append(variant(weigh, constants | WEIGH.options))
    return result
