"""The posterior mean in Triton.

For a block of queries x_b and a chunk of references y_j (PFGM++, arXiv 2302.04265, section 3):

1. ``distances`` or ``differences`` computes squared distances (distances.py).
2. ``refine`` recomputes those whose error would change the result (refinement.py).
3. ``weigh`` computes weights relative to the nearest reference so far (weights.py). Weights below
   float32 rounding become zero.
4. ``weighted_sum`` computes Σ_j w_j y_j over several stretches of the chunk at once. It skips tiles
   whose weights are all zero.
5. ``merge`` adds the stretches to the running mean, and in float64 the chunk's sum of weights to
   that of earlier chunks. Where x − mean is wanted, and is small, it sums differences instead.

Launches depend on shapes alone. Nothing waits for the device, and CUDA graphs can capture them.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import load_references
from .distances import Block, Pairs, memory, shapes
from .launching import KEPT, Launcher
from .memory import NOTHING, Layout, Step
from .problem import (
    MAX_PARTS,
    Problem,
    Shape,
    cdiv,
    input_precision,
    padded,
    part,
    power_of_two,
)
from .refinement import MAX_REGISTERS, exact_difference
from .tuning import Choice, Config, multiprocessors
from .variant import REFERENCES, Variant, variant
from .weights import PIECES, WEIGH, minima_of, pieces_of, weigh, weight_cutoff

MIN_SORTED_QUERIES = 256  # from here on queries are sorted by their number of nonzero weights
# From this (x − mean)² on, relative to the size of what is summed, sums over references leave
# enough digits of it.
ENOUGH = tl.constexpr(2.0**-6)


@triton.jit(do_not_specialize=["B", "M"])
def weighted_sum(
    y,
    weights,
    order,
    parts,
    B,
    M,
    width,
    N,
    y_stride,
    pairs_stride,
    stretch,
    half,
    PRECISION: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """parts[stretch, row] = 2 half · Σ_j w_j y_j over one stretch of references. ORDERED queries
    are alike, and tiles without a weight are left out.

    Tiles are features × queries, because matrix units take 64 rows, more than there may be queries.
    """
    feature = (tl.program_id(0) * FEATURES + tl.arange(0, FEATURES))[None, :]
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    present = place < B
    row = place
    if ORDERED:
        row = tl.load(order + place, mask=present, other=0).to(tl.int32)
    first = tl.program_id(2) * stretch
    w_rows = weights + row.to(tl.int64)[:, None] * pairs_stride
    total = tl.zeros([FEATURES, ROWS], tl.float32)
    for start in range(first, min(first + stretch, M), TILE):
        column = start + tl.arange(0, TILE)
        w = tl.load(
            w_rows + column[None, :], mask=present[:, None] & (column < width)[None, :], other=0.0
        )
        # Without an order nearly all tiles have a weight, and a condition would keep the compiler
        # from loading the next tile early.
        alive = True
        if ORDERED:
            alive = tl.max(tl.max((w != 0.0).to(tl.int32), 1), 0) > 0
        if alive:
            known = (column < M)[:, None] & (feature < N)
            y_rows = y + column.to(tl.int64)[:, None] * y_stride
            b = load_references(y_rows + feature, known, tl.float32)
            # Matrix units round every addition toward zero. The factor 2 keeps the compiler from
            # passing the sum to the next product as its initial value.
            weighed = tl.trans(w * half)
            total += 2.0 * tl.dot(tl.trans(b), weighed, input_precision=PRECISION)
    out = parts + (tl.program_id(2).to(tl.int64) * B + row.to(tl.int64)[:, None]) * N + feature
    tl.store(out, tl.trans(total), mask=present[:, None] & (feature < N))


@triton.jit
def sum_of_differences(
    a,
    y,
    weights,
    live,
    feature,
    row,
    M,
    N,
    y_stride,
    pieces,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σ_j w_j (a − y_j) of one query, whose row of weights begins at ``weights``. ``live`` says how
    many of each SIZE of them are not zero. Only tiles with a weight are read."""
    total = tl.zeros_like(a)
    index = tl.arange(0, SIZE)
    for piece in range(0, pieces):
        if tl.load(live + row * pieces + piece) > 0:
            column = piece * SIZE + index
            has = tl.load(weights + column, mask=column < M, other=0.0) != 0.0
            first = tl.min(tl.where(has, index, SIZE), 0)
            while first < SIZE:
                tile = first // TILE * TILE
                j = piece * SIZE + tile + tl.arange(0, TILE)
                w = tl.load(weights + j, mask=j < M, other=0.0)
                mask = (w != 0.0)[:, None] & (feature < N)[None, :]
                place = y + j.to(tl.int64)[:, None] * y_stride + feature[None, :]
                apart, _ = exact_difference(a[None, :], place, mask)
                total += tl.sum(tl.where(mask, w[:, None] * apart, 0.0), 0)
                first = tl.min(tl.where(has & (index >= tile + TILE), index, SIZE), 0)
    return total


@triton.jit
def has_digits(value, a, reach, size):
    """Whether sums over references leave enough digits of ``value``, a sum of differences w_j
    (a − y_j). Their errors are relative to the ``size`` of the w_j and to that of what is summed,
    which is about |a| and √reach, the distance at which weights become small."""
    unit = 1.0 / tl.sqrt(reach).to(tl.float32)
    apart = value * (unit / size)
    return tl.sum(apart * apart, 0) >= ENOUGH * (1.0 + tl.sum((a * unit) * (a * unit), 0))


@triton.jit(do_not_specialize=["M", "pieces"])
def merge(
    mean,
    parts,
    sums,
    closest,
    kept,
    radius,
    nearest,
    total,
    logsumexp,
    x,
    y,
    weights,
    live,
    B,
    M,
    N,
    stretches,
    pieces,
    x_stride,
    y_stride,
    pairs_stride,
    divisor,
    exponent: tl.float64,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    PIECES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The running mean: that of earlier chunks, with weight kept[row], and the stretches of this
    one, times ``divisor``. DIFFERENCE subtracts it from x, and x, y, weights and live are read.

    One program of each query also writes the state (nearest, total), and for the LAST chunk the
    log-sum-exp.
    """
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.arange(0, PIECES)
    piece_sums = tl.load(sums + row * pieces + index, mask=index < pieces, other=0.0)
    carried = tl.load(kept + row)
    weight = carried.to(tl.float32) + tl.sum(piece_sums, 0)
    value = tl.zeros([BLOCK], tl.float32)
    source = parts + row * N + feature
    for _ in range(0, stretches):
        value += tl.load(source, mask=feature < N, other=0.0)
        source += B * N
    value *= divisor / weight
    before = tl.zeros([BLOCK], tl.float32)
    if not FIRST:
        before = tl.load(mean + row * N + feature, mask=feature < N, other=0.0)
        before *= carried.to(tl.float32) / weight
    if DIFFERENCE:
        a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
        share = tl.sum(piece_sums, 0) / weight
        value = share * a - value
        r = tl.load(radius + row)
        reach = tl.load(closest + row) + r * r / exponent
        if has_digits(before + value, a, reach, share) == 0:  # also if a number is out of range
            row_weights = weights + row * pairs_stride
            value = sum_of_differences(
                a, y, row_weights, live, feature, row, M, N, y_stride, pieces, SIZE, TILE
            )
            value /= weight
    value += before
    tl.store(mean + row * N + feature, value, mask=feature < N)
    if tl.program_id(1) == 0:
        least = tl.load(closest + row)
        whole = carried + tl.sum(piece_sums.to(tl.float64), 0)
        tl.store(nearest + row, least)
        tl.store(total + row, whole)
        if LAST:
            r = tl.load(radius + row)
            if GAUSSIAN:
                score = tl.where(least == 0.0, 0.0, -least / r / r / 2.0)
            else:
                power = tl.where(least == 0.0, 2.0, 1.0)  # r² may underflow on a reference
                score = -exponent * power * tl.log(tl.where(least == 0.0, r, least + r * r))
            tl.store(logsumexp + row, score + tl.log(whole))


# ---- launches ---------------------------------------------------------------------------------


def sum_configs(shape: Shape) -> list[Config]:
    """Tiles with as few references as matrix units allow: small tiles are more often all zero."""
    if shape.rows <= 32:
        return [Config({"ROWS": 16, "TILE": 32, "FEATURES": 64})]
    # On sm_120 one product of float32 would spill registers with 4 warps.
    once = shape.references == torch.float32 and shape.precision == "medium"
    medium = Config({"ROWS": 64, "TILE": 32, "FEATURES": 64}, num_warps=8 if once else 4)
    small = Config({"ROWS": 32, "TILE": 32, "FEATURES": 64})
    if shape.rows < MIN_SORTED_QUERIES:
        # On sm_100 bytes would spill registers in the larger tile.
        return [small if shape.references == torch.uint8 else medium]
    large = Config({"ROWS": 64, "TILE": 32, "FEATURES": 128}, num_warps=8)
    return [small, large] if shape.rows <= 256 else [large, small]


@functools.cache
def merge_config(features: int) -> Config:
    """Features for a program of ``merge``, and references whose differences it sums at a time. No
    two threads have the same feature."""
    block = min(1024, max(256, power_of_two(features)))
    sizes = {"BLOCK": block, "TILE": 2048 // block}
    return Config(sizes, num_warps=8, maxnreg=MAX_REGISTERS)


SUMS = Choice(sum_configs)
_weigh, _weighted_sum, _merge = Launcher(weigh), Launcher(weighted_sum), Launcher(merge)


def sum_of_references(
    pairs: Pairs, M: int, weights: str, ordered: bool, divisor: float = 1.0
) -> int:
    """Writes Σ_j weights_j y_j / divisor over each stretch of M references to ``parts``, which is
    (stretches, B, N). Returns the number of stretches.

    If ordered, queries are in the order of the tensor ``order``.
    """
    block = pairs.block
    stretches = stretches_of(block.rows, M, block.N, block.device)

    def run(config: Config) -> None:
        pairs.space.run(sum_step(block, M, weights, stretches, divisor, ordered, config))

    SUMS.launch(pairs.shape, block.device, run)
    return stretches


@functools.lru_cache(KEPT)
def sum_step(
    block: Block,
    M: int,
    weights: str,
    stretches: int,
    divisor: float,
    ordered: bool,
    config: Config,
) -> Step:
    tile = config["TILE"]
    stretch = cdiv(M, stretches * tile) * tile
    launch = _weighted_sum(
        (cdiv(block.N, config["FEATURES"]), cdiv(block.rows, config["ROWS"]), stretches),
        (block.rows, M, padded(M), block.N, block.y_stride, block.pairs_stride, stretch),
        (0.5 / divisor,),
        (input_precision(block.shape.precision), ordered),
        config,
    )
    return Step(launch, ("y", weights, "order" if ordered else NOTHING, "parts"))


@functools.lru_cache(KEPT)
def stretches_of(rows: int, M: int, N: int, device: torch.device) -> int:
    """The number of stretches: two programs per multiprocessor, if memory and references allow."""
    tiles = cdiv(rows, 64) * cdiv(N, 128)
    wanted = cdiv(2 * multiprocessors(device), tiles)
    return int(max(1, min(wanted, MAX_PARTS // (rows * N), cdiv(M, 128))))


def memory_of_sums(block: Block) -> dict[str, int]:
    """The number of values in ``parts``, by name."""
    stretches = stretches_of(block.rows, block.chunk, block.N, block.device)
    return {"parts": stretches * block.rows * block.N}


@functools.lru_cache(KEPT)
def layout(block: Block) -> Layout:
    """The temporary tensors of the forward pass."""
    pairs, sums = block.rows * block.pairs_stride, block.rows * pieces_of(block.chunk)
    own = {"weights": pairs, "sums": sums, "live": sums, "closest": block.rows, "kept": block.rows}
    return Layout(memory(block) | memory_of_sums(block) | own)


class Steps(NamedTuple):
    """How a chunk is weighed and merged."""

    pieces: int
    divisor: float
    """Divided by it, a sum of weights is at most 1, so that no sum of large values overflows."""
    weigh: Step
    merge: Step


@functools.lru_cache(KEPT)
def steps(block: Block, M: int, tiles: int, first: bool, last: bool, difference: bool) -> Steps:
    pieces, divisor = pieces_of(M), float(power_of_two(M))
    cutoff = weight_cutoff(block.references)
    if difference and not block.gaussian:
        # A weight counts by the distance of its reference, relative to that of the nearest one:
        # (s/s₀)^½ w = w^(1 − 1/(N + D)). e^-80 is a normal float32.
        cutoff = min(80.0, cutoff / max(1 - 0.5 / block.exponent, 0.1))
    stretches = stretches_of(block.rows, M, block.N, block.device)
    weigh = _weigh(
        (block.rows, pieces, 1),
        (padded(M), block.pairs_stride, tiles, pieces),
        (block.exponent, math.exp(-cutoff)),
        (first, block.gaussian, minima_of(tiles)),
        WEIGH,
    )
    read = ("radius", "lowest", "nearest", "total", "squared")
    written = ("weights", "sums", "closest", "kept", "live")
    config = merge_config(block.N)
    merge = _merge(
        (block.rows, cdiv(block.N, config["BLOCK"]), 1),
        (
            *(block.rows, M, block.N, stretches, pieces),
            *(block.x_stride, block.y_stride, block.pairs_stride),
        ),
        (divisor, block.exponent),
        (first, last, block.gaussian, difference, PIECES, WEIGH["BLOCK"]),
        config,
    )
    state = ("radius", "nearest", "total", "logsumexp")
    summed = ("x", "y", "weights", "live") if difference else (NOTHING,) * 4
    merged = ("mean", "parts", "sums", "closest", "kept", *state, *summed)
    return Steps(pieces, divisor, Step(weigh, (*read, *written)), Step(merge, merged))


def posterior_mean(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    difference: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean or x − mean (B, N) and, in float64, log-sum-exp, squared distance of the nearest
    reference and total weight relative to it, each (B,). All tensors are on one device; rows have
    contiguous features."""
    problem = Problem(x, references, radius, D, "high")
    mean = torch.empty_like(x, memory_format=torch.contiguous_format)
    logsumexp, nearest, total = (torch.empty_like(radius) for _ in range(3))
    for rows in problem.blocks():
        pairs = Pairs(
            problem,
            rows,
            layout,
            mean=part(mean, rows),
            logsumexp=part(logsumexp, rows),
            nearest=part(nearest, rows),
            total=part(total, rows),
        )
        for chunk in problem.chunks():
            _average(pairs, chunk, difference)
    return mean, logsumexp, nearest, total


def _average(pairs: Pairs, chunk: slice, difference: bool) -> None:
    """Merges a chunk into the results of one block of queries."""
    block, space = pairs.block, pairs.space
    M, first, last = chunk.stop - chunk.start, chunk.start == 0, chunk.stop == block.references
    pairs.measure(chunk, first)
    work = steps(block, M, pairs.steps.tiles, first, last, difference)
    space.run(work.weigh)
    ordered = block.rows >= MIN_SORTED_QUERIES
    if ordered:
        # By the number of nonzero weights, so that similar queries share tiles.
        live = space.temporary("live")[: block.rows * work.pieces].view(block.rows, work.pieces)
        space.give("order", live.sum(1).argsort(stable=True))
    sum_of_references(pairs, M, "weights", ordered, work.divisor)
    space.run(work.merge)


def variants() -> list[Variant]:
    """Every type of references and configuration, the first chunk and later ones. Sorted queries
    are listed for float32 references only."""
    result = []
    constants: dict[str, Any]
    for dtype in REFERENCES:
        for shape in shapes(dtype):
            for config in () if shape.project else sum_configs(shape):
                constants = {"PRECISION": input_precision(shape.precision)} | config.options
                constants["ORDERED"] = shape.rows >= MIN_SORTED_QUERIES and dtype == torch.float32
                result.append(variant(weighted_sum, constants, dtype, products=True))
    unread: dict[str, Any] = dict.fromkeys(("x", "y", "weights", "live"))
    for first in (False, True):
        for last, gaussian in ((False, False), (True, False), (True, True)):
            constants = {"FIRST": first, "LAST": last, "GAUSSIAN": gaussian, "DIFFERENCE": False}
            constants |= {"PIECES": PIECES, "SIZE": WEIGH["BLOCK"]} | merge_config(1024).options
            result.append(variant(merge, unread | constants))
        for dtype, features in itertools.product(REFERENCES, (16, 1024)):
            constants = {"FIRST": first, "LAST": True, "GAUSSIAN": False, "DIFFERENCE": True}
            constants |= {"PIECES": PIECES, "SIZE": WEIGH["BLOCK"]} | merge_config(features).options
            wide = features > 16 or dtype != torch.uint8
            result.append(variant(merge, constants, dtype, wide_loads=wide))
    return list({each.name: each for each in result}.values())
