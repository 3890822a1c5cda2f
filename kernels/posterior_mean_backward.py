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
    ∂L/∂x  = F [Σ_j c_j (x − y_j) + (C − Σ_j c_j) (x − mean)], C − Σ c_j from rounding c_j
    ∂L/∂r  = r F C,   ∂L/∂σ = (g d²/σ² + moment)/σ

``pull`` computes Σ p_j G·y_j, which t_j needs, and ``find_coefficients`` the c_j. ``weighted_sum``
of the forward pass sums c_j y_j, and ``merge_gradient`` turns the sum into ∂L/∂x.
``reference_gradient`` sums over the queries. Where such sums lose digits, because x is close to
y_j, differences x − y_j are summed. F is applied last, in float64, because it may be huge.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import load_references
from .distances import Block, Pairs, memory
from .launching import KEPT, Launcher
from .memory import Layout, Step
from .posterior_mean import (
    ENOUGH,
    has_digits,
    memory_of_sums,
    merge_config,
    sum_of_differences,
    sum_of_references,
)
from .problem import Problem, cdiv, input_precision, padded, part
from .refinement import exact_difference
from .tuning import Config
from .variant import REFERENCES, Variant, variant
from .weights import relative_weight, score_rate, weight_cutoff

GRADIENT_CUTOFF = 8.0  # nats below WEIGHT_CUTOFF, because (y_j − mean)²/s may be large
PER_QUERY = Config({"BLOCK": 2048}, num_warps=8)  # for kernels that take a row of weights
REFERENCE_GRADIENT = Config({"ROWS": 16, "TILE": 64, "FEATURES": 64}, num_warps=8)


@triton.jit
def at_limit(nearest, r, GAUSSIAN: tl.constexpr):
    """Where the mean is locally constant: r = 0 on a reference, or scores that overflow."""
    if GAUSSIAN:
        limit = (r == 0.0) | (nearest / r / r == float("inf"))
    else:
        limit = nearest + r * r == 0.0
    return limit


@triton.jit
def probability(squared, nearest, total, r, exponent, floor, GAUSSIAN: tl.constexpr):
    """p_j; zero below ``floor``."""
    rate = score_rate(nearest, r, exponent, GAUSSIAN)
    p = relative_weight(squared - nearest, rate, exponent, GAUSSIAN).to(tl.float64) / total
    p = tl.where(p < floor, 0.0, p)
    return tl.where(at_limit(nearest, r, GAUSSIAN), 0.0, p)


@triton.jit
def pull(
    radius,
    nearest,
    total,
    squared,
    projected,
    pulled,
    mass,
    width,
    pairs_stride,
    exponent: tl.float64,
    floor: tl.float64,
    FIRST: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the chunk's Σ p_j G·y_j and Σ p_j of one query."""
    row = tl.program_id(0).to(tl.int64)
    r, least, summed = tl.load(radius + row), tl.load(nearest + row), tl.load(total + row)
    pulls = tl.zeros([BLOCK], tl.float64)
    masses = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = row * pairs_stride + column
        d = tl.load(squared + place, mask=column < width, other=float("inf"))
        q = tl.load(projected + place, mask=column < width, other=0.0).to(tl.float64)
        p = probability(d, least, summed, r, exponent, floor, GAUSSIAN)
        pulls += tl.where(p == 0.0, 0.0, p * q)
        masses += p
    whole_pull, whole_mass = tl.sum(pulls, 0), tl.sum(masses, 0)
    if not FIRST:
        whole_pull += tl.load(pulled + row)
        whole_mass += tl.load(mass + row)
    tl.store(pulled + row, whole_pull)
    tl.store(mass + row, whole_mass)


@triton.jit
def find_coefficients(
    radius,
    nearest,
    total,
    grad_logsumexp,
    pulled,
    mass,
    squared,
    projected,
    coefficients,
    probabilities,
    moment,
    summed,
    chunk_sum,
    squares,
    live,
    whole,
    unit,
    grad_radius,
    width,
    pairs_stride,
    pieces,
    exponent: tl.float64,
    floor: tl.float64,
    FIRST: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c_j and p_j of one query over the chunk, the moment and Σ c_j so far, and from them C, F and
    ∂L/∂radius. Of the chunk alone Σ c_j, Σ c_j², and how many of each BLOCK are not zero."""
    row = tl.program_id(0).to(tl.int64)
    r, least, weights = tl.load(radius + row), tl.load(nearest + row), tl.load(total + row)
    g = tl.load(grad_logsumexp + row)
    # Σ p_j is 1 up to rounding, and 0 at a limit.
    weight = tl.load(mass + row)
    center = tl.load(pulled + row) / tl.where(weight == 0.0, 1.0, weight)
    moments = tl.zeros([BLOCK], tl.float64)
    c_sums = tl.zeros([BLOCK], tl.float64)
    c_squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = row * pairs_stride + column
        d = tl.load(squared + place, mask=column < width, other=float("inf"))
        q = tl.load(projected + place, mask=column < width, other=0.0).to(tl.float64)
        p = probability(d, least, weights, r, exponent, floor, GAUSSIAN)
        # The projection is undefined where p = 0.
        pt = tl.where(p == 0.0, 0.0, p * (q - center + g))
        excess = tl.where(p == 0.0, 0.0, d - least)
        if GAUSSIAN:
            c = -pt
            moments += tl.where(p == 0.0, 0.0, pt * (excess / r / r))
        else:
            s = tl.where(p == 0.0, 1.0, d + r * r)
            c = -pt * ((least + r * r) / s)
            moments += pt * (excess / s)
        rounded = c.to(tl.float32)
        c_sums += rounded.to(tl.float64)
        c_squares += c * c
        tl.store(live + row * pieces + start // BLOCK, tl.sum((rounded != 0.0).to(tl.int32), 0))
        tl.store(coefficients + place, rounded, mask=column < width)
        tl.store(probabilities + place, p.to(tl.float32), mask=column < width)
    so_far, c_sum = tl.sum(moments, 0), tl.sum(c_sums, 0)
    tl.store(chunk_sum + row, c_sum)
    tl.store(squares + row, tl.sum(c_squares, 0))
    if not FIRST:
        so_far += tl.load(moment + row)
        c_sum += tl.load(summed + row)
    tl.store(moment + row, so_far)
    tl.store(summed + row, c_sum)
    limit = at_limit(least, r, GAUSSIAN)
    if GAUSSIAN:
        C = -g
        F = 1.0 / r / r
        radius_gradient = (g * (least / r / r) + so_far) / r
    else:
        C = so_far - g
        F = 2.0 * exponent / (least + r * r)
        radius_gradient = r * F * C
    tl.store(whole + row, C)
    tl.store(unit + row, tl.where(limit, 0.0, F))
    tl.store(grad_radius + row, tl.where(limit, 0.0, radius_gradient))


@triton.jit(do_not_specialize=["M", "pieces"])
def merge_gradient(
    x,
    y,
    mean,
    coefficients,
    live,
    radius,
    nearest,
    whole,
    unit,
    summed,
    chunk_sum,
    squares,
    parts,
    grad_x,
    B,
    M,
    N,
    stretches,
    pieces,
    x_stride,
    y_stride,
    pairs_stride,
    exponent: tl.float64,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds the chunk's Σ c_j (x − y_j) to grad_x. The last chunk turns the sum into ∂L/∂x. What c_j
    lose where they are rounded counts as if it were at the mean."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
    before = tl.zeros([BLOCK], tl.float32)
    if not FIRST:
        before += tl.load(grad_x + row * N + feature, mask=feature < N, other=0.0)
    value = tl.zeros([BLOCK], tl.float32)
    source = parts + row * N + feature
    for _ in range(0, stretches):
        value += tl.load(source, mask=feature < N, other=0.0)
        source += B * N
    c_sum, r = tl.load(chunk_sum + row), tl.load(radius + row)
    value = c_sum.to(tl.float32) * a - value
    size = tl.sqrt(c_sum * c_sum + tl.load(squares + row)).to(tl.float32)
    reach = tl.load(nearest + row) + r * r / exponent
    if has_digits(before + value, a, reach, size) == 0:  # also if a number is out of range
        row_coefficients = coefficients + row * pairs_stride
        value = sum_of_differences(
            a, y, row_coefficients, live, feature, row, M, N, y_stride, pieces, SIZE, TILE
        )
    value += before
    if LAST:
        center = tl.load(mean + row * N + feature, mask=feature < N, other=0.0)
        apart = a.to(tl.float64) - center.to(tl.float64)
        F, rest = tl.load(unit + row), tl.load(whole + row) - tl.load(summed + row)
        gradient = F * (value.to(tl.float64) + rest * apart)
        gradient = tl.where(F == 0.0, 0.0, gradient)
        value = gradient.to(tl.float32)
    tl.store(grad_x + row * N + feature, value, mask=feature < N)


@triton.jit(do_not_specialize=["B", "M"])
def reference_gradient(
    x,
    upstream,
    y,
    unit,
    coefficients,
    probabilities,
    grad_references,
    B,
    M,
    width,
    N,
    x_stride,
    y_stride,
    pairs_stride,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FEATURES: tl.constexpr,
):
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
        place = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
        inside = (row < B)[:, None] & (column < width)[None, :]
        p = tl.load(probabilities + place, mask=inside, other=0.0)
        if tl.max(tl.max((p != 0.0).to(tl.int32), 1), 0) > 0:
            F = tl.load(unit + row, mask=row < B, other=0.0)[:, None]
            c = tl.load(coefficients + place, mask=inside, other=0.0)
            c = tl.where(c == 0.0, 0.0, c.to(tl.float64) * F).to(tl.float32)
            known = (row < B)[:, None] & (feature < N)
            a = tl.load(x + row.to(tl.int64)[:, None] * x_stride + feature, mask=known, other=0.0)
            g = tl.load(upstream + row.to(tl.int64)[:, None] * N + feature, mask=known, other=0.0)
            # The factor 2 has the same reason as in ``weighted_sum``.
            gradient += 2.0 * tl.dot(tl.trans(0.5 * p), g, input_precision=PRECISION)
            gradient -= 2.0 * tl.dot(tl.trans(0.5 * c), a, input_precision=PRECISION)
            c_sums += tl.trans(c)
            size += tl.trans(tl.abs(c))
            largest = tl.maximum(largest, tl.trans(tl.abs(c)))
    known = (column < M)[:, None] & (feature < N)
    y_rows = y + column.to(tl.int64)[:, None] * y_stride
    b = load_references(y_rows + feature, known, tl.float32)
    total = tl.sum(c_sums, 1)
    gradient += total[:, None] * b
    # Sums of numbers of both signs have errors relative to the root of the sum of their squares.
    spread = tl.sqrt(tl.sum(size, 1)) * tl.sqrt(tl.max(largest, 1))  # at least √(Σ c²)
    scaled = tl.maximum(tl.abs(total), spread)[:, None] * b
    again = (tl.sum(gradient * gradient, 1) >= ENOUGH * tl.sum(scaled * scaled, 1)) == 0
    if tl.max(again.to(tl.int32), 0) > 0:
        exact = tl.zeros([TILE, FEATURES], tl.float32)
        for query in range(0, B):
            row = tl.full((), query, tl.int64)
            place = row * pairs_stride + column
            p = tl.load(probabilities + place, mask=column < width, other=0.0)
            if tl.max((p != 0.0).to(tl.int32), 0) > 0:
                c = tl.load(coefficients + place, mask=column < width, other=0.0)
                F = tl.load(unit + row)
                c = tl.where(c == 0.0, 0.0, c.to(tl.float64) * F).to(tl.float32)
                a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
                g = tl.load(upstream + row * N + feature, mask=feature < N, other=0.0)
                apart, _ = exact_difference(a, y_rows + feature, known)
                exact += p[:, None] * g - c[:, None] * apart
        gradient = tl.where(again[:, None], exact, gradient)
    out = grad_references + column.to(tl.int64)[:, None] * N + feature
    if not FIRST:
        gradient += tl.load(out, mask=known, other=0.0)
    tl.store(out, gradient, mask=known)


# ---- launches ---------------------------------------------------------------------------------

_pull, _find_coefficients = Launcher(pull), Launcher(find_coefficients)
_merge_gradient, _reference_gradient = Launcher(merge_gradient), Launcher(reference_gradient)


@functools.lru_cache(KEPT)
def layout(block: Block) -> Layout:
    """The temporary tensors of the backward pass."""
    pairs, rows = block.rows * block.pairs_stride, block.rows
    own = dict.fromkeys(("pulled", "mass", "moment", "summed", "whole", "unit"), rows)
    own |= dict.fromkeys(("chunk_sum", "squares"), rows)
    own |= {"coefficients": pairs, "probabilities": pairs, "live": rows * pieces_of(block.chunk)}
    return Layout(memory(block) | memory_of_sums(block) | own)


def pieces_of(references: int) -> int:
    """Of the references of a chunk, whose coefficients that are not zero are counted."""
    return cdiv(padded(references), PER_QUERY["BLOCK"])


class Gradients:
    """Gradients of one block of queries."""

    def __init__(self, pairs: Pairs, needs: tuple[bool, bool], floor: float) -> None:
        """needs: whether the gradients of x and of the references are needed."""
        self.pairs, self.block, self.space = pairs, pairs.block, pairs.space
        self.needs, self.floor = needs, floor

    def run(self, chunks: list[slice], grad_references: Tensor | None, first_block: bool) -> None:
        for chunk in chunks:
            self.pairs.measure(chunk)
            self._pull(chunk)
        for chunk in chunks:
            if len(chunks) > 1:  # with one chunk the distances are still in memory
                self.pairs.measure(chunk)
            self._coefficients(chunk)
            if self.needs[0]:
                self._merge(chunk)
            if grad_references is not None:
                self.space.give("grad_references", part(grad_references, chunk))
                self._reference_gradient(chunk, first_block)

    def _pull(self, chunk: slice) -> None:
        launch = _pull(
            (self.block.rows, 1, 1),
            (padded(chunk.stop - chunk.start), self.block.pairs_stride),
            (self.block.exponent, self.floor),
            (chunk.start == 0, self.block.gaussian),
            PER_QUERY,
        )
        state = ("radius", "nearest", "total")
        self.space.run(Step(launch, (*state, "squared", "projected", "pulled", "mass")))

    def _coefficients(self, chunk: slice) -> None:
        M = chunk.stop - chunk.start
        launch = _find_coefficients(
            (self.block.rows, 1, 1),
            (padded(M), self.block.pairs_stride, pieces_of(M)),
            (self.block.exponent, self.floor),
            (chunk.start == 0, self.block.gaussian),
            PER_QUERY,
        )
        read = ("radius", "nearest", "total", "grad_logsumexp", "pulled", "mass", "squared")
        written = ("coefficients", "probabilities", "moment", "summed", "chunk_sum", "squares")
        totals = ("live", "whole", "unit", "grad_radius")
        self.space.run(Step(launch, (*read, "projected", *written, *totals)))

    def _merge(self, chunk: slice) -> None:
        block, N = self.block, self.block.N
        M = chunk.stop - chunk.start
        stretches = sum_of_references(self.pairs, M, "coefficients", ordered=False)
        config = merge_config(N)
        launch = _merge_gradient(
            (block.rows, cdiv(N, config["BLOCK"]), 1),
            (
                *(block.rows, M, N, stretches, pieces_of(M)),
                *(block.x_stride, block.y_stride, block.pairs_stride),
            ),
            (block.exponent,),
            (chunk.start == 0, chunk.stop == block.references, PER_QUERY["BLOCK"]),
            config,
        )
        row_names = ("radius", "nearest", "whole", "unit", "summed", "chunk_sum", "squares")
        names = ("x", "y", "mean", "coefficients", "live", *row_names, "parts", "grad_x")
        self.space.run(Step(launch, names))

    def _reference_gradient(self, chunk: slice, first_block: bool) -> None:
        block, N, config = self.block, self.block.N, REFERENCE_GRADIENT
        M = chunk.stop - chunk.start
        launch = _reference_gradient(
            (cdiv(N, config["FEATURES"]), cdiv(M, config["TILE"]), 1),
            (block.rows, M, padded(M), N, block.x_stride, block.y_stride, block.pairs_stride),
            (),
            (input_precision(block.shape.precision), first_block),
            config,
        )
        read = ("x", "upstream", "y", "unit", "coefficients", "probabilities")
        self.space.run(Step(launch, (*read, "grad_references")))


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
    problem = Problem(x, references, radius, D, "high", grad_mean)
    grad_x = torch.empty_like(mean) if needs[0] else None
    grad_references = x.new_empty(references.shape) if needs[1] else None
    grad_radius = torch.empty_like(radius)
    floor = math.exp(-weight_cutoff(problem.count) - GRADIENT_CUTOFF)
    for rows in problem.blocks():
        arguments = {
            "grad_logsumexp": part(grad_logsumexp, rows),
            "mean": part(mean, rows),
            "nearest": part(nearest, rows),
            "total": part(total, rows),
            "grad_radius": part(grad_radius, rows),
        }
        if grad_x is not None:
            arguments["grad_x"] = part(grad_x, rows)
        gradients = Gradients(Pairs(problem, rows, layout, **arguments), needs[:2], floor)
        gradients.run(list(problem.chunks()), grad_references, rows.start == 0)
    return grad_x, grad_references, grad_radius if needs[2] else None


def variants() -> list[Variant]:
    """Every type of references, both kinds of D, the first chunk and later ones."""
    result = []
    for first in (False, True):
        constants: dict[str, Any] = {"FIRST": first, "GAUSSIAN": first}
        constants |= PER_QUERY.options
        result += [variant(kernel, constants) for kernel in (pull, find_coefficients)]
    for dtype in REFERENCES:
        for first, features in itertools.product((False, True), (16, 1024)):
            constants = {"FIRST": first, "LAST": not first, "SIZE": PER_QUERY["BLOCK"]}
            constants |= merge_config(features).options
            wide = features > 16 or dtype != torch.uint8
            result.append(variant(merge_gradient, constants, dtype, wide_loads=wide))
        constants = {"FIRST": False, "PRECISION": input_precision("high")}
        constants |= REFERENCE_GRADIENT.options
        result.append(variant(reference_gradient, constants, dtype, products=True))
    return result
