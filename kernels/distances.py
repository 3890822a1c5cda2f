"""Squared distances between a block of queries and a chunk of references, in Triton.

``distances`` computes |x|² + |y|² − 2 x·y from matrix products, with the data centred by
``find_center`` and each value split into two float16 parts (centering.py). For few queries or
features, ``differences`` computes Σ (x − y)² instead. Both find the smallest distance of each tile
and, for the backward pass, G·y. ``refine`` then corrects what must be exact (refinement.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import centering
from .arithmetic import add_compensated, centered_references, load_references
from .launching import KEPT, Launcher
from .memory import NOTHING, Layout, Space, Step
from .problem import Errors, Problem, Shape, cdiv, padded, part
from .refinement import (
    LIMITS,
    MAX_REFINE_PROGRAMS,
    MIN_REFINE_TILES,
    NEAR,
    OTHERS,
    find_limits,
    refine,
    refine_config,
)
from .tuning import Choice, Config
from .variant import REFERENCES, Variant, variant


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
    y_scale = tl.load(scale)
    total = tl.zeros([TILE, ROWS], tl.float32)
    lost = tl.zeros([TILE, ROWS], tl.float32)
    projection = tl.zeros([TILE, ROWS], tl.float32)
    projection_lost = tl.zeros([TILE, ROWS], tl.float32)
    square = tl.zeros([TILE], tl.float32)
    square_lost = tl.zeros([TILE], tl.float32)
    for k in range(0, N, PANEL):
        feature = k + tl.arange(0, PANEL)
        known = (column < M)[:, None] & (feature < N)[None, :]
        c = tl.load(scaled_center + feature, mask=feature < x_stride, other=0.0)
        b = centered_references(y_rows + feature[None, :], known, y_scale, c[None, :])
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
    wide = y_scale.to(tl.float64)
    y_norm = (square.to(tl.float64) - square_lost.to(tl.float64)) / wide / wide
    norm = tl.load(norms + row, mask=row < B, other=0.0)
    unit = tl.load(units + row, mask=row < B, other=0.0)
    products = (total.to(tl.float64) - lost.to(tl.float64)) * unit[None, :]
    distance = tl.trans(y_norm[:, None] + norm[None, :] - 2.0 * products)
    finish_distances(distance, squared, lowest, row, column, B, M, width, pairs_stride, tiles)
    tile = tl.program_id(1)
    # Larger references have no products in float16; they do not count.
    counts = (column < M) & (y_norm * wide * wide <= N * 2.0**32)
    farthest = tl.max(tl.where(counts, y_norm, 0.0), 0)
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
        squares = tl.zeros([ROWS, TILE, PANEL], tl.float32)
        products = tl.zeros([ROWS, TILE, PANEL], tl.float32)
        x_squares = tl.zeros([ROWS, PANEL], tl.float32)
        for k in range(start, min(start + 256 * PANEL, N), PANEL):
            feature = (k + tl.arange(0, PANEL))[None, :]
            a = tl.load(x_rows + feature, mask=(row < B)[:, None] & (feature < N), other=0.0)
            b = load_references(y_rows + feature, (column < M)[:, None] & (feature < N), tl.float32)
            difference = a[:, None, :] - b[None, :, :]
            squares += difference * difference
            x_squares += a * a
            if PROJECT:
                g = tl.load(g_rows + feature, mask=(row < B)[:, None] & (feature < N), other=0.0)
                products += g[:, None, :] * b[None, :, :]
        distance += tl.sum(squares.to(tl.float64), 2)
        norm += tl.sum(x_squares.to(tl.float64), 1)
        if PROJECT:
            projection += tl.sum(products.to(tl.float64), 2)
    finish_distances(distance, squared, lowest, row, column, B, M, width, pairs_stride, tiles)
    tl.store(norms + row, norm, mask=row < tl.where(tl.program_id(1) == 0, B, 0))
    if PROJECT:
        place = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
        known = (row < B)[:, None] & (column < M)[None, :]
        tl.store(projected + place, projection.to(tl.float32), mask=known)


# ---- launches ---------------------------------------------------------------------------------


def distance_configs(shape: Shape) -> list[Config]:
    """Configurations of the kernel that computes distances.

    Few queries get small tiles, so that every multiprocessor has some. Larger tiles read each value
    less often. But sums in two floats need registers, and with 64 × 64 some would spill.
    """
    if shape.few:
        panel = 64 if shape.features >= 64 else 16
        # On sm_120, G·y of references in half precision would spill registers with 4 queries.
        half = shape.references in (torch.bfloat16, torch.float16)
        rows = 2 if shape.project and half and panel == 64 else 4
        return [Config({"ROWS": rows, "TILE": 16, "PANEL": panel}, num_stages=1)]
    return [Config({"ROWS": 32, "TILE": 64, "PANEL": 32})]


DISTANCES = Choice(distance_configs)
NOT_USED = "x"
"""A tensor that is passed where a kernel reads and writes none."""

_distances, _differences = Launcher(distances), Launcher(differences)
_find_limits, _refine = Launcher(find_limits), Launcher(refine)


class Block(NamedTuple):
    """What the launches for a block of queries depend on."""

    shape: Shape
    rows: int
    references: int
    """M, those of all chunks."""
    chunk: int
    """The number of references in the largest chunk."""
    N: int
    x_stride: int
    y_stride: int
    exponent: float
    gaussian: bool
    errors: Errors
    device: torch.device

    @property
    def pairs_stride(self) -> int:
        return padded(self.chunk)


def memory(block: Block) -> dict[str, int]:
    """The numbers of values that ``Pairs`` writes, by name."""
    rows, pairs, shape = block.rows, block.rows * block.pairs_stride, block.shape
    tiles = cdiv(block.chunk, min(config["TILE"] for config in DISTANCES.configs(shape)))
    sizes = {"norms": rows, "squared": pairs, "lowest": rows * tiles, "limits": 2 * rows}
    if shape.project:
        sizes["projected"] = pairs
    if not shape.few:
        sizes |= {"reach": tiles} | centering.memory(rows, block.N, shape.project)
    return sizes


@functools.lru_cache(KEPT)
def centering_steps(block: Block) -> tuple[Step, ...]:
    """Those before the first chunk."""
    if block.shape.few:
        return ()
    strides = block.x_stride, block.y_stride
    project = block.shape.project
    byte_references = block.shape.references == torch.uint8
    return centering.steps(
        block.rows, block.references, block.N, *strides, project, byte_references
    )


class Steps(NamedTuple):
    """How distances to a chunk are found."""

    tiles: int
    distances: Step
    limits: Step
    refine: Step


@functools.lru_cache(KEPT)
def steps(block: Block, M: int, first: bool, config: Config) -> Steps:
    tiles = cdiv(M, config["TILE"])
    return Steps(
        tiles,
        _distances_step(block, M, tiles, config),
        _limits_step(block, tiles, first),
        _refine_step(block, M, tiles, config),
    )


def _distances_step(block: Block, M: int, tiles: int, config: Config) -> Step:
    shape, rows, N = block.shape, block.rows, block.N
    grid = (cdiv(rows, config["ROWS"]), tiles, 1)
    sizes = (rows, M, padded(M), N)
    strides = (block.y_stride, block.pairs_stride, tiles)
    projected = "projected" if shape.project else NOT_USED
    if shape.few:
        launch = _differences(
            grid, (*sizes, block.x_stride, *strides), (), (shape.project,), config
        )
        upstream = "upstream" if shape.project else NOT_USED
        return Step(launch, ("x", upstream, "y", "squared", "lowest", "norms", projected))
    flags = (shape.precision == "high", shape.project)
    launch = _distances(grid, (*sizes, padded(N), *strides), (), flags, config)
    queries = ("high", "low", "units")
    upstream_names = tuple(f"upstream_{name}" for name in queries) if shape.project else queries
    read = ("y", "scaled_center", "scale", *queries, "norms", *upstream_names)
    return Step(launch, (*read, "squared", "lowest", "reach", projected))


def _limits_step(block: Block, tiles: int, first: bool) -> Step:
    products = not block.shape.few
    spread = 0.0 if block.gaussian else math.expm1(NEAR / block.exponent)
    margin, noise, tolerance = block.errors
    # The gradient needs digits of weights that the mean does not.
    others = math.inf if block.shape.project else math.log(block.references) + OTHERS
    launch = _find_limits(
        (block.rows, 1, 1),
        (block.N, tiles),
        (block.exponent, spread, margin, noise, NEAR, others, tolerance),
        (first, products, block.gaussian),
        LIMITS,
    )
    # Without products neither is read.
    reach, scale = ("reach", "scale") if products else ("norms", NOT_USED)
    return Step(launch, ("radius", "nearest", "lowest", reach, "norms", scale, "limits"))


def _refine_step(block: Block, M: int, tiles: int, config: Config) -> Step:
    segment = max(MIN_REFINE_TILES, cdiv(tiles, MAX_REFINE_PROGRAMS))
    project = block.shape.project and not block.shape.few
    launch = _refine(
        (block.rows, cdiv(tiles, segment), 1),
        (M, block.N, block.x_stride, block.y_stride, block.pairs_stride, tiles, segment),
        (),
        (project, config["TILE"]),
        refine_config(block.N),
    )
    upstream_names = (
        ("upstream", "center", "projected") if project else (NOTHING, NOTHING, NOT_USED)
    )
    return Step(launch, ("x", "y", "limits", "squared", "lowest", *upstream_names))


class Pairs:
    """Distances of a block of queries to one chunk of references at a time."""

    def __init__(
        self, problem: Problem, rows: slice, layout: Callable[[Block], Layout], **arguments: Tensor
    ) -> None:
        """arguments: other tensors of the operation, ``nearest`` among them."""
        x, references = part(problem.x, rows), problem.references
        if problem.upstream is not None:
            arguments["upstream"] = part(problem.upstream, rows)
        self.count = rows.stop - rows.start
        self.shape = problem.shape(self.count)
        self.block = Block(
            self.shape,
            self.count,
            problem.count,
            problem.chunk,
            problem.features,
            x.stride(0),
            references.stride(0),
            problem.exponent,
            problem.gaussian,
            problem.errors(self.shape),
            x.device,
        )
        self.references = references
        self.space = Space(
            layout(self.block),
            x=x,
            radius=part(problem.radius, rows),
            references=references,
            y=part(references, slice(0, problem.chunk)),
            **arguments,
        )
        for step in centering_steps(self.block):
            self.space.run(step)

    def measure(self, chunk: slice, first: bool = False) -> None:
        """Squared distances (and G·(y − a constant)), exact where it matters.

        ``nearest`` is the smallest distance in other chunks. It is not read in the first.
        """
        M = chunk.stop - chunk.start
        if self.block.references > M:
            self.space.give("y", self.references[chunk])

        def run(config: Config) -> None:
            # Set in every launch: timing launches other configurations before the chosen one.
            self.steps = steps(self.block, M, first, config)
            self.space.run(self.steps.distances)

        DISTANCES.launch(self.shape, self.block.device, run)
        self.space.run(self.steps.limits)
        self.space.run(self.steps.refine)


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
    result = []
    for dtype in REFERENCES:
        for shape in shapes(dtype):
            for config in distance_configs(shape):
                constants: dict[str, Any] = {"PROJECT": shape.project} | config.options
                if shape.few:
                    wide = dtype != torch.uint8  # a thread takes 8 of a tile's 1024 values
                    result.append(variant(differences, constants, dtype, wide_loads=wide))
                    continue
                constants["HIGH"] = shape.precision == "high"
                result.append(variant(distances, constants, dtype, products=True))
    return list({each.name: each for each in result}.values())
