"""The posterior mean's problem: its sizes, and how it is split into blocks and chunks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PAIRS = 1 << 22  # queries × references of 12 bytes; half as many of 20 in the backward pass
MAX_PARTS = 1 << 22  # values in the partial sums of a chunk
MAX_QUERIES = 4096  # in a block
MAX_REFERENCES = 1 << 16  # in a chunk
TOLERANCE = 1.5e-4  # relative error of a weight that needs no refinement


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


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least count."""
    return 1 << (count - 1).bit_length()


def cdiv(count: int, each: int) -> int:
    """count / each, rounded up. Triton's own is for kernels, and slow on the host."""
    return -(-count // each)


def part(rows: Tensor, of: slice) -> Tensor:
    """rows[of], without a view if these are all rows."""
    return rows if of.stop - of.start == rows.shape[0] else rows[of]


def padded(references: int) -> int:
    """references rounded up to a multiple of 16, which is whole 16-byte accesses for any type."""
    return -(-references // 16) * 16


def input_precision(precision: str) -> str:
    """Triton's name of the precision of weighted sums. On AMD it is always float32."""
    if torch.version.hip is not None:
        return "ieee"
    return {"high": "tf32x3", "medium": "tf32"}[precision]


class Errors(NamedTuple):
    """Errors of distances before they are refined, as ``refine`` takes them."""

    margin: float
    """Largest error, relative to |x|² + |y|²."""
    noise: float
    """Typical error, relative to 2|x||y| + |y|² of products or |x|² + d² of differences."""
    tolerance: float
    """Relative error of a weight that needs no refinement."""


class Problem:
    """All queries and references. Rows have contiguous features."""

    def __init__(
        self,
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        D: float,
        precision: str,
        upstream: Tensor | None = None,
    ) -> None:
        """upstream (B, N), contiguous: G of the backward pass, which needs G·y too."""
        self.x, self.references, self.radius, self.upstream = x, references, radius, upstream
        self.D, self.precision = D, precision
        self.queries, self.features = x.shape
        self.count = references.shape[0]
        self.gaussian = math.isinf(D)
        self.exponent = 0.5 if self.gaussian else (self.features + D) / 2
        """(N + D)/2, the exponent of s; 1/2 at D = ∞, the factor of d²/σ²."""
        fitting = min(MAX_QUERIES, max(16, MAX_PARTS // self.features))
        # A last block of few queries would read all references for these. Large blocks have whole
        # tiles.
        part = -(-self.queries // max(1, -(-self.queries // fitting)))
        whole = part if fitting < 128 else -(-part // 32) * 32
        self.block = max(1, min(whole, self.queries, fitting))
        """The number of queries in a block. Blocks are of nearly equal size."""
        pairs = MAX_PAIRS if upstream is None else MAX_PAIRS // 2
        fitting = max(pairs // self.block // 128, 1) * 128
        self.chunk = min(self.count, fitting, MAX_REFERENCES)
        """The number of references in a chunk."""

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.count, self.chunk):
            yield slice(start, min(start + self.chunk, self.count))

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.queries, self.block):
            yield slice(start, min(start + self.block, self.queries))

    def shape(self, rows: int) -> Shape:
        project = self.upstream is not None
        return _shape(rows, self.features, self.references.dtype, self.precision, project)

    def errors(self, shape: Shape) -> Errors:
        """The errors of distances before they are refined."""
        return _errors(self.features, shape)


@functools.cache
def _shape(
    rows: int, features: int, references: torch.dtype, precision: str, project: bool
) -> Shape:
    return Shape(power_of_two(rows), power_of_two(features), references, precision, project)


@functools.cache
def _errors(N: int, shape: Shape) -> Errors:
    long = max(1.0, N / 8192)
    if shape.few:
        rounded = shape.references == torch.uint8
        return Errors(2.0**-21 * long, 2.0**-22 if rounded else 0.0, TOLERANCE)
    if shape.precision == "high":
        # Sums over panels of 32 features are rounded, which mostly averages out. Matrix units
        # round toward zero, which averages out less.
        return Errors(2.0**-18 * long, 2.0**-22 / math.sqrt(max(1.0, N / 32)), TOLERANCE)
    # The roundings to 11 bits mostly average out.
    return Errors(2.0**-9, 2.0**-12 / math.sqrt(N), 2e-2)
