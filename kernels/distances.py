"""Squared distances between a block of queries and a chunk of references, in Triton.

1. ``distances`` computes |x|² + |y|² − 2 x·y from matrix products. For few queries or features,
   ``differences`` computes Σ (x − y)² instead. Both find the smallest distance of each tile and,
   for the backward pass, G·y.
2. ``refine`` recomputes distances near the minimum from differences in float64, where they decide
   the result. Products lose digits, and the exponent (N + D)/2 multiplies the error.
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
FEW_TILES = 16  # up to this many tiles near the minimum are always refined
NEAR = 20.0  # nats: a weight e^-20 times the largest needs no more digits
MAX_REFINE_PROGRAMS = 256  # for a query; each program reads all minima
MIN_REFINE_TILES = 4  # tiles of references for a program of ``refine``
SWEEP = 256  # minima that ``refine`` reads at a time


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
def finish_distances(
    distance, norm, squared, lowest, norms, row, column, B, M, width, pairs_stride, tiles
):
    """Stores distances, the smallest of the tile for each query, and |x|² of the queries.

    Rows of distances are padded with infinity to a multiple of 16 references.
    """
    known = (row < B)[:, None] & (column < M)[None, :]
    distance = tl.where(distance < 0.0, 0.0, distance)
    place = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
    filled = tl.where(known, distance, float("inf")).to(tl.float64)
    tl.store(squared + place, filled, mask=(row < B)[:, None] & (column < width)[None, :])
    finite = distance < float("inf")
    least = tl.min(tl.where(known & finite, distance, float("inf")), 1)
    # −inf marks a tile with a distance that float32 cannot hold. ``refine`` looks at it.
    overflows = tl.max((known & (finite == 0)).to(tl.int32), 1)
    least = tl.where(overflows > 0, float("-inf"), least)
    tile = tl.program_id(1)
    tl.store(lowest + row.to(tl.int64) * tiles + tile, least, mask=row < B)
    tl.store(norms + row, norm, mask=row < tl.where(tile == 0, B, 0))


@triton.jit(do_not_specialize=["B", "M", "tiles"])
def distances(
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
    PRECISION: tl.constexpr,
    PROJECT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
):
    """|x|² + |y|² − 2 x·y for ROWS queries and TILE references, and G·y for the backward pass.

    Tiles are references × queries, because matrix units take 64 rows, more than there may be
    queries. Matrix units round every addition toward zero, so panels are added up outside of them.
    The factor 2 keeps the compiler from passing the sum to the next product as its initial value.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    y_rows = y + column.to(tl.int64)[:, None] * y_stride
    g_rows = upstream + row.to(tl.int64)[:, None] * N
    distance = tl.zeros([TILE, ROWS], tl.float32)
    projection = tl.zeros([TILE, ROWS], tl.float32)
    of_x = tl.zeros([ROWS, PANEL], tl.float32)
    of_y = tl.zeros([TILE, PANEL], tl.float32)
    for k in range(0, N, PANEL):
        feature = (k + tl.arange(0, PANEL))[None, :]
        a = tl.load(x_rows + feature, mask=(row < B)[:, None] & (feature < N), other=0.0)
        b = load_references(y_rows + feature, (column < M)[:, None] & (feature < N), tl.float32)
        of_x += a * a
        of_y += b * b
        distance -= 2.0 * tl.dot(b, tl.trans(a), input_precision=PRECISION)
        if PROJECT:
            g = tl.load(g_rows + feature, mask=(row < B)[:, None] & (feature < N), other=0.0)
            projection += 2.0 * tl.dot(b, tl.trans(g), input_precision=PRECISION)
    norm = tl.sum(of_x, 1)
    distance += tl.sum(of_y, 1)[:, None] + norm[None, :]
    distance = tl.trans(distance)
    finish_distances(
        distance, norm, squared, lowest, norms, row, column, B, M, width, pairs_stride, tiles
    )
    if PROJECT:
        place = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
        known = (row < B)[:, None] & (column < M)[None, :]
        tl.store(projected + place, 0.5 * tl.trans(projection), mask=known)


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
    finish_distances(
        distance,
        norm.to(tl.float32),
        squared,
        lowest,
        norms,
        row,
        column,
        B,
        M,
        width,
        pairs_stride,
        tiles,
    )
    if PROJECT:
        place = row.to(tl.int64)[:, None] * pairs_stride + column[None, :]
        known = (row < B)[:, None] & (column < M)[None, :]
        tl.store(projected + place, projection.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=["M", "tiles", "segment"])
def refine(
    x,
    y,
    radius,
    nearest,
    squared,
    lowest,
    norms,
    M,
    N,
    x_stride,
    y_stride,
    pairs_stride,
    tiles,
    segment,
    exponent: tl.float64,
    spread: tl.float64,
    margin: tl.float64,
    noise: tl.float64,
    near_nats: tl.float64,
    FEW: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    PANEL: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """Recomputes the distances of one query that decide its result.

    The error of a distance is at most ``margin``·(|x|² + |y|²) and typically ``noise``·(|x|² + d²).
    Distances are recomputed where the weight may be more than e^-near_nats times the largest, if
    these are few or if the typical error would change their weights. Distances that overflow
    float32 are always recomputed.
    """
    row = tl.program_id(0).to(tl.int64)
    low_row = lowest + row * tiles
    base = tl.load(nearest + row)
    for start in range(0, tiles, SWEEP):
        tile = start + tl.arange(0, SWEEP)
        low = tl.load(low_row + tile, mask=tile < tiles, other=float("inf")).to(tl.float64)
        base = tl.minimum(base, tl.min(tl.where(low >= 0.0, low, float("inf")), 0))

    r = tl.load(radius + row)
    norm = tl.load(norms + row).to(tl.float64)
    # The rounding errors of single differences mostly average out.
    error = noise * (norm + base) + 2.0**-26 * base
    # The bound of the error uses |y|² ≤ 2 (d² + |x|²). It counts twice: the minimum has an error
    # too.
    near = base + 2.0 * margin * (3.0 * norm + 2.0 * base)
    if GAUSSIAN:
        near += 2.0 * near_nats * r * r
        ill = error > 6e-4 * r * r
    else:
        s = base + r * r
        near += spread * s
        ill = exponent * error > 3e-4 * s
    near = tl.where(near == near, near, float("inf"))
    competing = 0
    for start in range(0, tiles, SWEEP):
        tile = start + tl.arange(0, SWEEP)
        low = tl.load(low_row + tile, mask=tile < tiles, other=float("inf")).to(tl.float64)
        competing += tl.sum((low <= near).to(tl.int32), 0)
    near = tl.where((competing > FEW) & (ill == 0) & (near < float("inf")), -1.0, near)

    first = tl.program_id(1) * segment
    for tile in range(first, min(first + segment, tiles)):
        if tl.load(low_row + tile).to(tl.float64) <= near:
            for start in range(0, TILE, GROUP):
                column = tile * TILE + start + tl.arange(0, GROUP)
                place = squared + row * pairs_stride + column
                known = tl.load(place, mask=column < M, other=float("inf"))
                needed = (column < M) & ((known <= near) | ((known < float("inf")) == 0))
                if tl.max(needed.to(tl.int32), 0) > 0:
                    exact = tl.zeros([GROUP], tl.float64)
                    y_rows = y + column.to(tl.int64)[:, None] * y_stride
                    for k in range(0, N, PANEL):
                        feature = k + tl.arange(0, PANEL)
                        mask = needed[:, None] & (feature < N)[None, :]
                        a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
                        b = load_references(y_rows + feature[None, :], mask, tl.float64)
                        difference = tl.where(mask, a.to(tl.float64)[None, :] - b, 0.0)
                        exact += tl.sum(difference * difference, 1)
                    # Infinite only if the input is not finite. NaN reaches the result; infinity
                    # would not.
                    finite = tl.where(exact < float("inf"), exact, float("nan"))
                    tl.store(place, finite, mask=needed)


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
    less often. But three TF32 products need registers for two parts of each value, and with still
    larger tiles registers would spill.
    """
    if shape.few:
        panel = 64 if shape.features >= 64 else 16
        return [Config({"ROWS": 4, "TILE": 16, "PANEL": panel}, num_stages=1)]
    small = Config({"ROWS": 32, "TILE": 64, "PANEL": 32}, num_warps=8)
    medium = Config({"ROWS": 64, "TILE": 64, "PANEL": 32}, num_warps=8)
    return [small] if shape.rows <= 32 or shape.project else [medium, small]


DISTANCES = Choice(distance_configs)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least count."""
    return 1 << (count - 1).bit_length()


def padded(references: int) -> int:
    """references rounded up to a multiple of 16, which is whole 16-byte accesses for any type."""
    return -(-references // 16) * 16


def input_precision(precision: str) -> str:
    """Triton's name of the precision. On AMD it is always float32."""
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

    def errors(self, shape: Shape) -> tuple[float, float]:
        """Largest error of a distance, relative to |x|² + |y|², and typical error, to |x|² + d²."""
        long = max(1.0, self.features / 8192)
        holds = self.references.dtype != torch.uint8
        if shape.few:
            return 2.0**-21 * long, 0.0 if holds else 2.0**-22
        if shape.precision == "high":
            return 2.0**-18 * long, 2.0**-22
        return 2.0**-9, 0.0  # TF32: many equally near references are not refined


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
        self.norms = empty(self.count)

    @property
    def upstream(self) -> Tensor | None:
        return None if self.problem.upstream is None else self.problem.upstream[self.rows]

    def measure(self, references: Tensor, nearest: Tensor) -> None:
        """Squared distances (and G·y), exact where it matters; nearest (B,) is the smallest yet."""
        DISTANCES.launch(self.shape, lambda config: self._distances(config, references))
        self._refine(references, nearest)

    def _distances(self, config: Config, references: Tensor) -> None:
        # Set in every launch: timing launches other configurations before the chosen one.
        self.tile = config["TILE"]
        self.lowest = self.x.new_empty(self.count, triton.cdiv(len(references), self.tile))
        tiles = self.lowest.shape[1]
        kernel: Any = distances
        constants: dict[str, Any] = {"PROJECT": self.upstream is not None}
        if self.shape.few:
            kernel = differences
        else:
            constants["PRECISION"] = input_precision(self.shape.precision)
        kernel[(triton.cdiv(self.count, config["ROWS"]), tiles)](
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
            tiles,
            **constants,
            **config.options,
        )

    def _refine(self, references: Tensor, nearest: Tensor) -> None:
        problem, tiles = self.problem, self.lowest.shape[1]
        margin, noise = problem.errors(self.shape)
        spread = 0.0 if problem.gaussian else math.expm1(NEAR / problem.exponent)
        segment = max(MIN_REFINE_TILES, triton.cdiv(tiles, MAX_REFINE_PROGRAMS))
        refine[(self.count, triton.cdiv(tiles, segment))](
            self.x,
            references,
            self.radius,
            nearest,
            self.squared,
            self.lowest,
            self.norms,
            len(references),
            problem.features,
            self.x.stride(0),
            references.stride(0),
            self.stride,
            tiles,
            segment,
            problem.exponent,
            spread,
            margin,
            noise,
            NEAR,
            FEW=FEW_TILES,
            GAUSSIAN=problem.gaussian,
            TILE=self.tile,
            SWEEP=SWEEP,
            **group_of(problem.features),
        )


def group_of(features: int) -> dict[str, int]:
    """Sizes of the tile of references × features in ``refine``, 1024 values."""
    panel = min(512, max(16, power_of_two(features)))
    return {"GROUP": min(16, 1024 // panel), "PANEL": panel}


def shapes(references: torch.dtype) -> Iterator[Shape]:
    """One shape for each class that has its own configurations. TF32 is listed for float32 only: it
    does not change how references are read."""
    precisions = ("high", "medium") if references == torch.float32 else ("high",)
    for rows in (4, 32, 128, 512):
        for precision in precisions:
            for project in (False, True):
                yield Shape(rows, 4096, references, precision, project)


def variants() -> list[Variant]:
    """Every type of references and configuration, with and without G·y. What does not depend on
    the type (D = ∞, the tiles that ``refine`` follows) is listed for float32 only."""
    found = []
    for dtype in REFERENCES:
        for shape in shapes(dtype):
            for config in distance_configs(shape):
                constants: dict[str, Any] = {"PROJECT": shape.project} | config.options
                if shape.few:
                    wide = dtype != torch.uint8  # a thread takes 8 of a tile's 1024 values
                    found.append(variant(differences, constants, dtype, wide_loads=wide))
                    continue
                constants["PRECISION"] = input_precision(shape.precision)
                found.append(variant(distances, constants, dtype, products=True))
        others = [(True, 64), (False, 16)] if dtype == torch.float32 else []
        for gaussian, tile in [(False, 64), *others]:
            constants = {"FEW": FEW_TILES, "TILE": tile, "SWEEP": SWEEP, "GAUSSIAN": gaussian}
            constants |= group_of(3072)
            found.append(variant(refine, constants, dtype))
    return list({each.name: each for each in found}.values())
