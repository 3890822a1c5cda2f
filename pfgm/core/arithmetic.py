"""Distances, and products with differences of points and references, that keep their digits.

A product of matrices takes points and references from a common origin. It loses the digits of a
difference that is small beside the two. The differences of such pairs, called near, are computed
one by one. They are few unless references crowd together far from the origin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.tensors import dequantise, wide_dtype
from ..common.values import checks_values, least_square, underflow_message
from .problems import PosteriorMean
from .weights import law

MAX_PAIRS = 1 << 20  # (query, reference) pairs in a chunk: 8 MiB for each (B, chunk) matrix
MAX_VALUES = 1 << 22  # values of references in a chunk: 32 MiB in float64
_NEAR_VALUES = 1 << 16  # values of near pairs at a time: they stay in the caches of a processor
_AGAIN = 16  # near pairs of a point on a device that must not be waited for
_ERROR = 1e-6  # of a log-weight that rounded distances may have
_UNSEEN = 36  # by which a log-weight must be smaller for its weight not to count: −log 2⁻⁵²
# Squared distances from a point over that from the origin, below which products lose digits of a
# difference: half of three.
_CLOSE = 1e-6


class Chunk(NamedTuple):
    """Some references."""

    references: Tensor
    """(m, N), as in the problem."""
    placed: Tensor
    """(m, N), the same relative to the origin, wide."""


class Near(NamedTuple):
    """Near pairs, k times c of them: each row has those of one point."""

    b: Tensor
    """(k, c), numbers of points."""
    j: Tensor
    """(k, c), numbers of references in their chunk."""


def chunks(
    x: Tensor, references: Tensor, max_pairs: int = MAX_PAIRS, max_values: int = MAX_VALUES
) -> Iterator[slice]:
    """Slices of the references, short enough that a matrix (B, chunk) stays small."""
    rows = min(max_pairs // max(len(x), 1), max_values // max(x.shape[1], 1))
    return blocks(len(references), rows)


def blocks(count: int, rows: int) -> Iterator[slice]:
    """Slices of some rows, of one at least, that cover a number of rows."""
    for start in range(0, count, max(rows, 1)):
        yield slice(start, start + max(rows, 1))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (B, M) of x (B, N) and y (M, N), as sums of squared differences."""
    # The matrix product form |x|² + |y|² − 2 x·y suffers from cancellation.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def may_wait(device: torch.device) -> bool:
    """Whether values may decide what is computed next."""
    return device.type == "cpu"


class Arithmetic:
    """Distances and products of the points x (B, N) of a problem and chunks of its references.

    All distances are sums of squared differences. Wide is float64, or float32 on devices without
    float64.
    """

    max_pairs, max_values = MAX_PAIRS, MAX_VALUES  # in a chunk of references

    def __init__(self, problem: PosteriorMean) -> None:
        x, device = problem.x, problem.x.device
        self.x = x.to(wide_dtype(device)).contiguous()  # as are the results of operators
        self.radius, self.law = problem.radius[:, None], law(problem.D, x.shape[1])
        self.origin = self._origin(problem.references)
        self.placed = self.x - self.origin
        self.norms = self.placed.square().sum(1, keepdim=True)
        self.rounding = (x.shape[1] + 4) * torch.finfo(torch.float64).eps
        self.waits = may_wait(device)
        # (B, N), from which products take the references of each point, and the same from the
        # origin. x − mean needs all references from the point: it may be small beside both.
        self.centers, self.shift = self.x, self.placed

    def _origin(self, references: Tensor) -> Tensor:
        """(N,)."""
        return self.x.new_zeros(self.x.shape[1])

    def center(self, nearest: Tensor) -> None:
        """Takes references from the origin where points are no closer to their nearest (B, 1)."""
        close = nearest < _CLOSE * self.norms
        self.centers = torch.where(close, self.x, self.origin)
        self.shift = torch.where(close, self.placed, 0.0)

    def chunk(self, references: Tensor) -> Chunk:
        return Chunk(references, dequantise(references, self.x.dtype))

    def distances(self, chunk: Chunk, known: Tensor) -> tuple[Tensor, Tensor, Near]:
        """The squared distance (B, 1) of the nearest, by how much others (B, m) exceed it, and the
        pairs that are near.

        Distances that exceed the squared distances known (B, 1) need not be exact.
        """
        squared = self.squared(chunk)
        near = self.near(squared, known)
        for b, j, difference in self.differences(chunk, near, self.x):
            squared[b, j] = difference.square_().sum(2)
        near = self._close(near, squared)
        if checks_values(self.x.device):
            squared = _zero_if_equal(squared, self.x, chunk.references, self.radius)
        nearest = squared.amin(1, keepdim=True)
        return nearest, squared - nearest, near

    def squared(self, chunk: Chunk) -> Tensor:
        """Squared distances (B, m), rounded."""
        return squared_distances(self.x, chunk.placed)

    def near(self, squared: Tensor, known: Tensor) -> Near:
        """The pairs whose squared distances must be exact, from rounded ones (B, m)."""
        if not self.waits:
            return self.nearest_of_all(squared)
        least = squared.amin(1, keepdim=True).minimum(known)
        b, j = (squared <= least + self._margin(least)).nonzero().unbind(1)
        return Near(b[:, None], j[:, None])

    def _margin(self, least: Tensor) -> Tensor:
        """Squared distances up to this much above the least (B, 1) must be exact.

        They are those of all references that may be nearest, and those whose rounding would change
        a weight that counts.
        """
        # A distance is off by its rounding × (‖x‖² + ‖y‖²), and ‖y‖² ≤ 2 ‖x‖² + 2 d².
        error = 4 * self.rounding * (self.norms + least)
        shown = self.law.affected(error, _ERROR, _UNSEEN, least + 2 * error, self.radius)
        return 2 * error + shown.clamp(min=0)

    def _close(self, near: Near, squared: Tensor) -> Near:
        """Those near pairs of which products would lose the difference."""
        if not self.waits:
            return near
        close = squared[near] < _CLOSE * self.norms[near.b[:, 0]]
        return Near(near.b[close, None], near.j[close, None])

    def nearest_of_all(self, squared: Tensor) -> Near:
        """A fixed number of the nearest of each point, by rounded squared distances (B, m).

        A constant of each row may have been subtracted from them.
        """
        j = squared.topk(min(_AGAIN, squared.shape[1]), largest=False).indices
        return Near(torch.arange(len(j), device=j.device)[:, None].expand_as(j), j)

    def differences(
        self, chunk: Chunk, near: Near, points: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields points b, references j and y_j − points_b (·, c, N) for some of the near pairs."""
        if near.j.numel() == 0:
            return
        values = _NEAR_VALUES if self.waits else self.max_values
        rows = max(values // max(near.j.shape[1] * self.x.shape[1], 1), 1)
        for b, j in zip(near.b.split(rows), near.j.split(rows), strict=True):
            yield b, j, dequantise(chunk.references[j], self.x.dtype).sub_(points[b])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def inner(self, G: Tensor, chunk: Chunk, near: Near) -> Tensor:
        """Inner products (B, m) of G (B, N) and the references from the centers."""
        result = self.product(G, chunk.placed.T).sub_((G * self.shift).sum(1, keepdim=True))
        for b, j, difference in self.differences(chunk, near, self.centers):
            result[b, j] = (G[b] * difference).sum(2)
        return result

    def inner_with(self, rows: Tensor, chunk: Chunk, near: Near) -> Tensor:
        """Inner products (B, m) of rows (m, N), one for a reference, and y_j − x_b."""
        result = (rows * chunk.placed).sum(1) - self.product(self.placed, rows.T)
        for b, j, difference in self.differences(chunk, near, self.x):
            result[b, j] = (rows[j] * difference).sum(2)
        return result

    def average(self, weights: Tensor, chunk: Chunk) -> Tensor:
        """The references (B, N), summed with weights (B, m) between 0 and 1."""
        return weights @ dequantise(chunk.references, self.x.dtype)

    def sums(self, factors: Tensor, chunk: Chunk, near: Near) -> Tensor:
        """The references from the centers (B, N), summed with factors (B, m) of any size."""
        far = _without(near, factors)
        result = self.product(far, chunk.placed)
        result.addcmul_(far.sum(1, keepdim=True), self.shift, value=-1)
        for b, j, difference in self.differences(chunk, near, self.centers):
            result.index_add_(0, b[:, 0], (factors[b, j, None] * difference).sum(1))
        return result

    def sums_of_points(self, factors: Tensor, chunk: Chunk, near: Near) -> Tensor:
        """Sums of y_j − x_b over the points (m, N), with factors (B, m) of any size."""
        far = _without(near, factors).T
        result = (far @ self.placed).neg_().addcmul_(far.sum(1, keepdim=True), chunk.placed)
        for b, j, difference in self.differences(chunk, near, self.x):
            result.index_add_(0, j.flatten(), (factors[b, j, None] * difference).flatten(0, 1))
        return result


def _without(near: Near, factors: Tensor) -> Tensor:
    """Factors (B, m) that are 0 for near pairs."""
    return factors if len(near.b) == 0 else factors.index_put(near, factors.new_zeros(()))


def _zero_if_equal(squared: Tensor, x: Tensor, references: Tensor, radius: Tensor) -> Tensor:
    """Squared distances (B, m), which at r = 0 are 0 between equal points only."""
    least = least_square(x.shape[1], x.dtype)
    near = radius.square() < least
    if not bool(near.any()):
        return squared
    near &= squared.amin(1, keepdim=True) < least
    for row in map(int, near.flatten().nonzero()):
        different = dequantise(references, x.dtype) != x[row]
        underflows = (squared[row] < least) & different.any(1)
        if radius[row] > 0 and bool(underflows.any()):
            raise ValueError(underflow_message(x, row))
        smallest = torch.finfo(x.dtype).tiny
        squared[row] = torch.where(underflows, squared[row].clamp(min=smallest), squared[row])
    return squared
