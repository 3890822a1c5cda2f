"""Distances that are computed again because their error would change the result, in Triton.

``find_limits`` decides where the error that is left would change the result. The exponent (N + D)/2
multiplies it. ``refine`` recomputes those distances from differences, in two floats.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from .arithmetic import add_compensated, load_references, scale_to
from .problem import power_of_two
from .tuning import Config
from .variant import REFERENCES, Variant, variant

NEAR = 20.0  # nats: a weight e^-20 times the largest needs no more digits
DIGITS = tl.constexpr(2.0**-4)  # of ``tolerance``, for the smallest distance and for scores
OTHERS = 2.0  # nats: M weights that are smaller by log M and so much count e^-2 together
MAX_REFINE_PROGRAMS = 256  # for a query
MIN_REFINE_TILES = 2  # tiles of references for a program of ``refine``
MAX_REGISTERS = 128  # of a thread of ``refine``
LIMITS = Config({"SWEEP": 256}, num_warps=2)


@triton.jit
def exact_difference(a, pointers, mask):
    """a − y for references y, as high + low. It is exact in floats. In bytes, where a value u means
    (2u − 255)/255, it has the digits of float32: y itself is not rounded, which the compiler could
    do in one place and not in another."""
    values = tl.load(pointers, mask=mask, other=0)
    if values.dtype == tl.uint8:
        whole = 2.0 * values.to(tl.float32) - 255.0
        high = tl.fma(a + tl.zeros_like(whole), tl.full(whole.shape, 255.0, tl.float32), -whole)
        high *= 1.0 / 255.0
        low = high * 0.0
    else:
        b = values.to(tl.float32)
        high = a - b
        minus_b = high - a
        low = (a - (high - minus_b)) - (b + minus_b)
    return high, low


@triton.jit
def relative_growth(u):
    """(e^u − 1)/u of u ≥ 0, to about 2^-14."""
    series = 1.0 + u / 2.0 * (1.0 + u / 3.0 * (1.0 + u / 4.0 * (1.0 + u / 5.0)))
    return tl.where(u < 0.5, series, (tl.exp(u) - 1.0) / tl.maximum(u, 0.5))


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
    others: tl.float64,
    tolerance: tl.float64,
    FIRST: tl.constexpr,
    PRODUCTS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """Which distances of a query are recomputed: those up to limits[row, 0], which may be −1.

    nearest[row] is the smallest distance of other chunks; FIRST says that there are none yet.

    The error of a distance is at most ``margin``·(|x|² + |y|²). Its part that differs between
    references is typically ``noise``·(2|x||y| + |y|²) for PRODUCTS, and ``noise``·(|x|² + d²)
    otherwise. (exponent/s)·error is the relative error of a weight. If n weights are within a nat
    of the largest, their errors average out in the mean by a factor of at least √(n/e). If more
    than ``tolerance`` is left, or the log-sum-exp lacks digits, references are refined whose weight
    may be more than e^-near_nats times the largest, or more than a weight whose error may be left
    by ``others`` nats.

    limits[row, 1] is the power of two by which ``refine`` multiplies differences, so that float32
    holds their squares.
    """
    row = tl.program_id(0).to(tl.int64)
    low_row = lowest + row * tiles
    base = tl.full((), float("inf"), tl.float64)
    if not FIRST:
        base = tl.load(nearest + row)
    for start in range(0, tiles, SWEEP):
        tile = start + tl.arange(0, SWEEP)
        low = tl.load(low_row + tile, mask=tile < tiles, other=float("inf"))
        base = tl.minimum(base, tl.min(tl.abs(low), 0))

    r = tl.load(radius + row)
    norm = tl.load(norms + row)
    s = base + r * r
    # The bound of the error uses |y|² ≤ 2 (d² + |x|²). It counts twice: the minimum has an error
    # too. Values too small for float16, and squares too small for float32, have an error of their
    # own.
    bound = 2.0 * margin * (3.0 * norm + 2.0 * base)
    count = tl.full((), N, tl.float64)
    if PRODUCTS:
        smallest = tl.sqrt(norm) * 2.0**-24 / tl.load(scale).to(tl.float64)
        bound += 4.0 * tl.sqrt(count) * smallest
    else:
        smallest = count * 2.0**-126
        bound += 4.0 * smallest
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
        error = smallest + 2.0**-26 * base + noise * (norm + base)
    averaged = tl.sqrt(tl.maximum(close.to(tl.float64) / 2.718, 1.0))
    score_digits = tl.maximum(1.0, score) * DIGITS
    allowed = tolerance * tl.minimum(averaged, score_digits)
    times = error / (tolerance * tl.minimum(1.0, score_digits) * within)
    nats = tl.log(times.to(tl.float32)).to(tl.float64) + others
    fewer = nats < near_nats
    nats = tl.maximum(nats, 0.0)
    last = nats * within
    if not GAUSSIAN:
        power = tl.full((), exponent, tl.float32)  # a division in float64 would spill registers
        last *= relative_growth(nats.to(tl.float32) / power).to(tl.float64)
    last = tl.where(fewer & (near < float("inf")), base + bound + last, near)
    unit = tl.where(near < float("inf"), scale_to(tl.sqrt(near).to(tl.float32), 0), 2.0**-76)
    matters = (error > allowed * within) | (near == float("inf"))
    # The smallest distance is a result itself.
    other = tl.where(error > tolerance * DIGITS * base, base + bound, -1.0)
    tl.store(limits + 2 * row, tl.where(matters, last, other))
    tl.store(limits + 2 * row + 1, unit.to(tl.float64))


@triton.jit(do_not_specialize=["M", "tiles", "segment"])
def refine(
    x,
    y,
    limits,
    squared,
    lowest,
    upstream,
    center,
    projected,
    M,
    N,
    x_stride,
    y_stride,
    pairs_stride,
    tiles,
    segment,
    PROJECT: tl.constexpr,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Recomputes distances of one query up to limits[row, 0], and all that are not finite.

    The minima of tiles, ``lowest``, become those of the new distances, −1 if one is NaN. References
    that float16 cannot hold have no products; PROJECT finds their G·(y − center).
    """
    row = tl.program_id(0).to(tl.int64)
    near, unit = tl.load(limits + 2 * row), tl.load(limits + 2 * row + 1)
    # A division where much is held in registers would spill some. Here, with a power of two, it is
    # exact, and so are the products with it.
    power, back = unit.to(tl.float32), 1.0 / unit
    first = tl.program_id(1) * segment
    for tile in range(first, min(first + segment, tiles)):
        low = tl.load(lowest + row * tiles + tile)
        if (low < 0.0) | (low <= near):
            index = tl.arange(0, TILE)
            place = squared + row * pairs_stride + tile * TILE
            inside = tile * TILE + index < M
            known = tl.load(place + index, mask=inside, other=float("inf"))
            needed = inside & ((known <= near) | ((known < float("inf")) == 0))
            low = tl.min(tl.where(needed, float("inf"), known), 0)
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
                    high, rest = exact_difference(a, y_row + feature, mask)
                    high, rest = high * power, rest * power
                    # A reference with larger differences is too far away to have a weight.
                    cut = (tl.abs(high) > 2.0**55) & (rest == rest)
                    high, rest = tl.where(cut, 2.0**55, high), tl.where(cut, 0.0, rest)
                    value = tl.where(mask, high * high + rest * (2.0 * high + rest), 0.0)
                    total, lost = add_compensated(total, lost, value)
                exact = tl.sum(total.to(tl.float64) - lost.to(tl.float64), 0) * back * back
                exact = tl.where(exact < 0.0, 0.0, exact)
                # Infinite only if the input is not finite. NaN reaches the result; infinity would
                # not.
                finite = exact < float("inf")
                tl.store(place + j, tl.where(finite, exact, float("nan")))
                low = tl.minimum(low, tl.where(finite, exact, -1.0))
                if PROJECT:
                    pair = projected + row * pairs_stride + tile * TILE + j
                    if (tl.abs(tl.load(pair)) < float("inf")) == 0:
                        products = tl.zeros([PANEL], tl.float32)
                        lost_products = tl.zeros([PANEL], tl.float32)
                        for k in range(0, N, PANEL):
                            feature = k + tl.arange(0, PANEL)
                            mask = feature < N
                            g = tl.load(upstream + row * N + feature, mask=mask, other=0.0)
                            c = tl.load(center + feature, mask=mask, other=0.0)
                            b = load_references(y_row + feature, mask, tl.float32)
                            products, lost_products = add_compensated(
                                products, lost_products, g * (b - c)
                            )
                        tl.store(pair, tl.sum(products - lost_products, 0))
            tl.store(lowest + row * tiles + tile, low)


# ---- launches ---------------------------------------------------------------------------------


@functools.cache
def refine_config(features: int) -> Config:
    """``refine`` takes as many features at a time as its warps can hold."""
    panel = min(4096, max(32, power_of_two(features)))
    return Config({"PANEL": panel}, num_warps=max(1, panel // 512), maxnreg=MAX_REGISTERS)


def variants() -> list[Variant]:
    """Every type of references, short and long rows; after products with and without G·y."""
    result = []
    for dtype in REFERENCES:
        lengths = [(features, 64) for features in (32, 1024, 2048, 3072)] + [(32, 16), (3072, 16)]
        if dtype == torch.float32:
            lengths.append((64, 64))  # those of the digits
        for features, tile in lengths:
            for project in (False, True) if tile == 64 else (False,):
                constants: dict[str, Any] = {"PROJECT": project, "TILE": tile}
                constants |= refine_config(features).options
                result.append(variant(refine, constants, dtype, wide_loads=features > 64))
    for first, products, gaussian in itertools.product((False, True), repeat=3):
        constants = {"FIRST": first, "PRODUCTS": products, "GAUSSIAN": gaussian}
        constants |= LIMITS.options
        result.append(variant(find_limits, constants, wide_loads=False))  # of rows of tiles
    return result
