"""The posterior mean in Triton.

For a block of queries x_b and a chunk of references y_j (PFGM++, arXiv 2302.04265, section 3):

1. ``distances`` or ``differences`` computes squared distances (distances.py).
2. ``refine`` recomputes those whose error would change the result (refinement.py).
3. ``weigh`` computes weights relative to the nearest reference so far and merges them in float64
   with earlier chunks. Weights below float32 rounding become zero.
4. ``weighted_sum`` computes Σ_j w_j y_j over several stretches of the chunk at once. It skips tiles
   whose weights are all zero.
5. ``merge`` adds the stretches to the running mean.

Launches depend on shapes alone. Nothing waits for the device, and CUDA graphs can capture them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import load_references
from .distances import Pairs, shapes
from .problem import MAX_PARTS, Problem, Shape, input_precision, padded
from .tuning import Choice, Config, multiprocessors
from .variant import REFERENCES, Variant, variant

WEIGHT_CUTOFF = 16.0  # nats: a weight below e^-16 / M of the sum is below float32 rounding
MIN_SORTED_QUERIES = 256  # from here on queries are sorted by their number of nonzero weights
PER_QUERY = Config({"BLOCK": 2048}, num_warps=8)  # for kernels that take a row of weights
BLOCK = 1024  # features for a program of ``merge``


@triton.jit
def log1p(u):
    """log(1 + u) for u ≥ 0 in float64. A factor corrects the rounding of 1 + u."""
    whole = 1.0 + u
    rounded = tl.where((whole == 1.0) | (whole > 1e15), 2.0, whole)
    return tl.where(
        whole == 1.0, u, tl.log(whole) * tl.where(whole > 1e15, 1.0, u / (rounded - 1.0))
    )


@triton.jit
def relative_score(excess, nearest, radius, exponent, GAUSSIAN: tl.constexpr):
    """Score at the squared distance nearest + excess, minus the score at nearest."""
    if GAUSSIAN:
        value = -excess / radius / radius / 2.0
    else:
        value = -exponent * log1p(excess / (nearest + radius * radius))
    return tl.where(excess == 0.0, 0.0, value)


@triton.jit
def weigh(
    radius,
    squared,
    nearest,
    total,
    logsumexp,
    weights,
    share,
    carry,
    live,
    width,
    pairs_stride,
    exponent: tl.float64,
    floor: tl.float64,
    FIRST: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query's weights over the chunk, merged with the state (nearest, total) of earlier chunks.

    share = 1/total turns a weight into a probability; carry is the factor of the running mean.
    """
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(radius + row)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        d = tl.load(squared + row * pairs_stride + column, mask=column < width, other=float("inf"))
        low = tl.minimum(low, tl.where(d == d, d, float("inf")))
        nans |= (d != d).to(tl.int32)
    least = tl.min(low, 0)
    kept = r * 0.0
    if not FIRST:
        before = tl.load(nearest + row)
        least = tl.where(before == before, tl.minimum(before, least), before)
        of_before = relative_score(before - least, least, r, exponent, GAUSSIAN)
        kept = tl.load(total + row) * tl.exp(of_before)
    least = tl.where(tl.max(nans, 0) > 0, float("nan"), least)

    smallest = floor * tl.maximum(kept, 1.0)
    sums = tl.zeros([BLOCK], tl.float64)
    alive = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        d = tl.load(squared + row * pairs_stride + column, mask=column < width, other=float("inf"))
        score = relative_score(d - least, least, r, exponent, GAUSSIAN)
        w = tl.exp(score.to(tl.float32))
        sums += w.to(tl.float64)
        w = tl.where(w < smallest, 0.0, w)
        alive += (w != 0.0).to(tl.int32)
        tl.store(weights + row * pairs_stride + column, w, mask=column < width)
    summed = kept + tl.sum(sums, 0)
    if GAUSSIAN:
        of_least = tl.where(least == 0.0, 0.0, -least / r / r / 2.0)
    else:
        of_least = -exponent * tl.log(least + r * r)
    tl.store(nearest + row, least)
    tl.store(total + row, summed)
    tl.store(logsumexp + row, of_least + tl.log(summed))
    tl.store(share + row, (1.0 / summed).to(tl.float32))
    tl.store(carry + row, (kept / summed).to(tl.float32))
    tl.store(live + row, tl.sum(alive, 0))


@triton.jit(do_not_specialize=["B", "M"])
def weighted_sum(
    y,
    weights,
    share,
    order,
    parts,
    B,
    M,
    width,
    N,
    y_stride,
    pairs_stride,
    stretch,
    PRECISION: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """parts[stretch, row] = share · Σ_j w_j y_j over one stretch of references. ORDERED queries are
    alike, and tiles without a weight are left out.

    Tiles are features × queries, because matrix units take 64 rows, more than there may be queries.
    """
    feature = (tl.program_id(0) * FEATURES + tl.arange(0, FEATURES))[None, :]
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    present = place < B
    row = place
    if ORDERED:
        row = tl.load(order + place, mask=present, other=0).to(tl.int32)
    first = tl.program_id(2) * stretch
    half_share = 0.5 * tl.load(share + row, mask=present, other=0.0)[:, None]
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
            weighed = tl.trans(w * half_share)
            total += 2.0 * tl.dot(tl.trans(b), weighed, input_precision=PRECISION)
    out = parts + (tl.program_id(2).to(tl.int64) * B + row.to(tl.int64)[:, None]) * N + feature
    tl.store(out, tl.trans(total), mask=present[:, None] & (feature < N))


@triton.jit
def merge(
    mean,
    parts,
    carry,
    B,
    N,
    stretches,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The running mean: carry times the mean of earlier chunks, plus the stretches of this one."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], tl.float32)
    if not FIRST:
        before = tl.load(mean + row * N + feature, mask=feature < N, other=0.0)
        value += tl.load(carry + row) * before
    source = parts + row * N + feature
    for _ in range(0, stretches):
        value += tl.load(source, mask=feature < N, other=0.0)
        source += B * N
    tl.store(mean + row * N + feature, value, mask=feature < N)


# ---- launches ---------------------------------------------------------------------------------


def sum_configs(shape: Shape) -> list[Config]:
    """Tiles with as few references as matrix units allow: small tiles are more often all zero."""
    if shape.rows <= 32:
        return [Config({"ROWS": 16, "TILE": 32, "FEATURES": 64})]
    medium = Config({"ROWS": 64, "TILE": 32, "FEATURES": 64})
    small = Config({"ROWS": 32, "TILE": 32, "FEATURES": 64})
    if shape.rows < MIN_SORTED_QUERIES:
        # On sm_100 bytes would spill registers in the larger tile.
        return [small if shape.references == torch.uint8 else medium]
    large = Config({"ROWS": 64, "TILE": 32, "FEATURES": 128}, num_warps=8)
    return [small, large] if shape.rows <= 256 else [large, small]


SUMS = Choice(sum_configs)


def weight_cutoff(references: int) -> float:
    """How many nats below the sum of weights a weight becomes zero."""
    return WEIGHT_CUTOFF + math.log(references)


def sum_of_references(
    pairs: Pairs, references: Tensor, weights: Tensor, share: Tensor, live: Tensor | None
) -> Tensor:
    """share (B,) · Σ_j weights_j y_j over each stretch of the references, (stretches, B, N).

    Many queries are sorted by live (B,), their number of nonzero weights, so that similar queries
    share tiles.
    """
    M, N = len(references), pairs.problem.features
    order = None
    if live is not None and pairs.count >= MIN_SORTED_QUERIES:
        order = live.argsort(stable=True)
    parts = pairs.x.new_empty(stretches_of(pairs, M), pairs.count, N)

    def run(config: Config) -> None:
        tile = config["TILE"]
        stretch = triton.cdiv(M, len(parts) * tile) * tile
        rows = triton.cdiv(pairs.count, config["ROWS"])
        weighted_sum[(triton.cdiv(N, config["FEATURES"]), rows, len(parts))](
            references,
            weights,
            share,
            order,
            parts,
            pairs.count,
            M,
            padded(M),
            N,
            references.stride(0),
            pairs.stride,
            stretch,
            PRECISION=input_precision(pairs.shape.precision),
            ORDERED=order is not None,
            **config.options,
        )

    SUMS.launch(pairs.shape, run)
    return parts


def stretches_of(pairs: Pairs, references: int) -> int:
    """The number of stretches: two programs per multiprocessor, if memory and references allow."""
    N = pairs.problem.features
    tiles = triton.cdiv(pairs.count, 64) * triton.cdiv(N, 128)
    wanted = triton.cdiv(2 * multiprocessors(pairs.x.device), tiles)
    fitting = MAX_PARTS // (pairs.count * N)
    return int(max(1, min(wanted, fitting, triton.cdiv(references, 128))))


def posterior_mean(
    x: Tensor, references: Tensor, radius: Tensor, D: float, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (B, N) and, in float64, log-sum-exp, squared distance of the nearest reference and total
    weight relative to it, each (B,). All tensors are on one device; rows have contiguous
    features."""
    problem = Problem(x, references, radius, D, precision)
    mean = torch.empty_like(x, memory_format=torch.contiguous_format)
    nearest = torch.full_like(radius, math.inf)
    logsumexp, total = torch.empty_like(radius), torch.empty_like(radius)
    for rows in problem.blocks():
        results = (mean[rows], logsumexp[rows], nearest[rows], total[rows])
        _average(Pairs(problem, rows), *results)
    return mean, logsumexp, nearest, total


def _average(pairs: Pairs, mean: Tensor, logsumexp: Tensor, nearest: Tensor, total: Tensor) -> None:
    """The results of one block of queries, chunk by chunk."""
    problem = pairs.problem
    weights = torch.empty_like(pairs.squared, dtype=mean.dtype)
    share, carry = (torch.empty_like(total, dtype=mean.dtype) for _ in range(2))
    live = torch.empty_like(total, dtype=torch.int32)
    for chunk in problem.chunks():
        references, first = problem.references[chunk], chunk.start == 0
        pairs.measure(references, nearest)
        weigh[(pairs.count,)](
            pairs.radius,
            pairs.squared,
            nearest,
            total,
            logsumexp,
            weights,
            share,
            carry,
            live,
            padded(len(references)),
            pairs.stride,
            problem.exponent,
            math.exp(-weight_cutoff(len(problem.references))),
            FIRST=first,
            GAUSSIAN=problem.gaussian,
            **PER_QUERY.options,
        )
        parts = sum_of_references(pairs, references, weights, share, live)
        merge[(pairs.count, triton.cdiv(problem.features, BLOCK))](
            mean,
            parts,
            carry,
            pairs.count,
            problem.features,
            len(parts),
            FIRST=first,
            BLOCK=BLOCK,
        )


def variants() -> list[Variant]:
    """Every type of references and configuration, the first chunk and later ones. Sorted queries
    are listed for float32 references only."""
    found = []
    constants: dict[str, Any]
    for dtype in REFERENCES:
        for shape in shapes(dtype):
            for config in () if shape.project else sum_configs(shape):
                constants = {"PRECISION": input_precision(shape.precision)} | config.options
                constants["ORDERED"] = shape.rows >= MIN_SORTED_QUERIES and dtype == torch.float32
                found.append(variant(weighted_sum, constants, dtype, products=True))
    for first in (False, True):
        found.append(variant(merge, {"FIRST": first, "BLOCK": BLOCK}))
        for gaussian in (False, True):
            constants = {"FIRST": first, "GAUSSIAN": gaussian} | PER_QUERY.options
            found.append(variant(weigh, constants))
    return list({each.name: each for each in found}.values())
