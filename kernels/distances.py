"""Squared distances between a block of queries and a chunk of references, in Triton.

``distances`` computes |x|² + |y|² − 2 x·y from matrix products, with the data centred by
``find_center`` and each value split into two float16 parts (centering.py). For few queries or
features, ``differences`` computes Σ (x − y)² instead. Both find the smallest distance of each tile
and, for the backward pass, G·y. ``refine`` then corrects what must be exact (refinement.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import add_compensated, load_references
from .centering import Centered
from .launching import KEPT, Launch, Launcher
from .problem import Errors, Problem, Shape, cdiv, padded, part
from .refinement import (
    LIMITS,
    MAX_REFINE_PROGRAMS,
    MIN_REFINE_TILES,
    NEAR,
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


# ---- launches ---------------------------------------------------------------------------------


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
_distances, _differences = Launcher(distances), Launcher(differences)
_find_limits, _refine = Launcher(find_limits), Launcher(refine)


class Block(NamedTuple):
    """What the launches for a block of queries depend on, beside the chunk of references."""

    shape: Shape
    rows: int
    N: int
    x_stride: int
    y_stride: int
    pairs_stride: int
    D: float
    exponent: float
    errors: Errors

    @property
    def gaussian(self) -> bool:
        return math.isinf(self.D)


class Launches(NamedTuple):
    """How distances to a chunk are found, for all tensors of the same sizes."""

    tiles: int
    distances: Launch
    limits: Launch
    refine: Launch


@functools.lru_cache(KEPT)
def launches(block: Block, M: int, first: bool, config: Config) -> Launches:
    shape, rows, N = block.shape, block.rows, block.N
    tile = config["TILE"]
    tiles = cdiv(M, tile)
    segment = max(MIN_REFINE_TILES, cdiv(tiles, MAX_REFINE_PROGRAMS))
    products = not shape.few
    grid = (cdiv(rows, config["ROWS"]), tiles, 1)
    sizes = (rows, M, padded(M), N)
    strides = (block.y_stride, block.pairs_stride, tiles)
    if products:
        flags = (shape.precision == "high", shape.project)
        of_pairs = _distances(grid, (*sizes, padded(N), *strides), (), flags, config)
    else:
        of_pairs = _differences(
            grid, (*sizes, block.x_stride, *strides), (), (shape.project,), config
        )
    spread = 0.0 if block.gaussian else math.expm1(NEAR / block.exponent)
    margin, noise, tolerance = block.errors
    numbers = (block.exponent, spread, margin, noise, NEAR, tolerance)
    limits = _find_limits(
        (rows, 1, 1), (N, tiles), numbers, (first, products, block.gaussian), LIMITS
    )
    again = _refine(
        (rows, cdiv(tiles, segment), 1),
        (M, N, block.x_stride, *strides, segment),
        (),
        (shape.project and products, tile),
        refine_config(N),
    )
    return Launches(tiles, of_pairs, limits, again)


class Pairs:
    """Distances of a block of queries to one chunk of references at a time, and their memory."""

    def __init__(self, problem: Problem, rows: slice) -> None:
        self.problem = problem
        self.x, self.radius = part(problem.x, rows), part(problem.radius, rows)
        self.upstream = None if problem.upstream is None else part(problem.upstream, rows)
        self.count = rows.stop - rows.start
        self.shape = problem.shape(self.count)
        self.stride = padded(problem.chunk)
        self.x_stride, self.y_stride = self.x.stride(0), problem.references.stride(0)
        self.block = Block(
            self.shape,
            self.count,
            problem.features,
            self.x_stride,
            self.y_stride,
            self.stride,
            problem.D,
            problem.exponent,
            problem.errors(self.shape),
        )
        self.norms = torch.empty_like(self.radius)
        self.squared = self.norms.new_empty((self.count, self.stride))
        self.projected = self.x  # not used
        if self.upstream is not None:
            self.projected = self.x.new_empty((self.count, self.stride))
        self.centered = None
        if not self.shape.few:
            self.centered = Centered(problem, self.x, self.upstream, self.norms)

    def measure(self, references: Tensor, nearest: Tensor, first: bool = False) -> None:
        """Squared distances (and G·(y − a constant)), exact where it matters.

        nearest (B,) is the smallest distance in other chunks. It is not read in the first.
        """

        def run(config: Config) -> None:
            # Set in every launch: timing launches other configurations before the chosen one.
            self.launches = launches(self.block, references.shape[0], first, config)
            self._distances(references)

        DISTANCES.launch(self.shape, self.x.device, run)
        self._refine(references, nearest)

    def _distances(self, references: Tensor) -> None:
        self.tiles = tiles = self.launches.tiles
        self.lowest = self.norms.new_empty((self.count, tiles))
        centered = self.centered
        if centered is None:
            self.launches.distances(
                self.x,
                self.x if self.upstream is None else self.upstream,
                references,
                self.squared,
                self.lowest,
                self.norms,
                self.projected,
            )
            return
        self.reach = self.norms.new_empty(tiles)
        self.launches.distances(
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
        )

    def _refine(self, references: Tensor, nearest: Tensor) -> None:
        centered = self.centered
        limits = self.norms.new_empty((self.count, 2))
        # Without products neither the reach of tiles nor a scale is read.
        reach, scale, center = self.norms, self.x, None
        if centered is not None:
            reach, scale, center = self.reach, centered.scale, centered.center
        self.launches.limits(self.radius, nearest, self.lowest, reach, self.norms, scale, limits)
        self.launches.refine(
            self.x,
            references,
            limits,
            self.squared,
            self.lowest,
            self.upstream,
            center,
            self.projected,
        )


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
    for dtype in REFERENCES:
        for shape in shapes(dtype):
            for config in distance_configs(shape):
                constants: dict[str, Any] = {"PROJECT": shape.project} | config.options
                if shape.few:
                    wide = dtype != torch.uint8  # a thread takes 8 of a tile's 1024 values
                    found.append(variant(differences, constants, dtype, wide_loads=wide))
                    continue
                constants["HIGH"] = shape.precision == "high"
                found.append(variant(distances, constants, dtype, products=True))
    return list({each.name: each for each in found}.values())
