"""Statistics over all rows of a data set."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.tensors import dequantise
from .ranks import reduce_values

_SQUARED_DEVIATIONS = 6
_VALUES = 1 << 18  # in one pass: in float64 they stay in a core's cache


class Measures(NamedTuple):
    """Statistics of data (M, *S), in float64."""

    norm: float
    """Average of ‖x‖."""
    rms: float
    """Root mean square of the values."""
    mean: Tensor
    """(*S), the average row."""
    std: float
    """Root mean square of the values of x − mean."""
    least: Tensor
    """(*S), the smallest of each value over the rows."""
    most: Tensor
    """(*S), the largest of each value over the rows."""
    fills_unit: bool
    """Whether all values are in [−1, 1] and some within 0.01 of both ends, as in images."""

    @property
    def radius(self) -> float:
        """An upper bound of the distance from mean to any row."""
        return float(torch.maximum(self.most - self.mean, self.mean - self.least).norm())

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value."""
        return float(self.least.min()), float(self.most.max())

    def mirrored(self) -> Measures:
        """The statistics of the rows and their mirror images (last axis reversed) together."""
        mean = (self.mean + self.mean.flip(-1)) / 2
        shift = float((self.mean - mean).square().mean())
        return self._replace(
            mean=mean,
            std=math.sqrt(self.std**2 + shift),
            least=torch.minimum(self.least, self.least.flip(-1)),
            most=torch.maximum(self.most, self.most.flip(-1)),
        )


class RowSums:
    """Sums over rows, from which :class:`Measures` are computed.

    Deviations are relative to the first row. Relative to 0, data far from 0 would lose digits.
    """

    def __init__(self, features: int) -> None:
        # Number of rows; sums of norms and of squares; numbers of values outside [−1, 1], near −1
        # and near 1; at _SQUARED_DEVIATIONS the sum of squared deviations.
        self.sums = torch.zeros(_SQUARED_DEVIATIONS + 1, dtype=torch.float64, device="cpu")
        self.deviations = torch.zeros(features, dtype=torch.float64, device="cpu")
        self.origin: Tensor | None = None
        # Least, −most.
        self.extremes = torch.full((2, features), math.inf, dtype=torch.float64, device="cpu")

    def add(self, chunk: Tensor) -> None:
        """Adds rows (m, *S); uint8 means u/127.5 − 1."""
        flat = chunk.detach().reshape(len(chunk), -1)
        for rows in flat.split(max(_VALUES // max(flat.shape[1], 1), 1)):
            wide = (dequantise(rows, torch.float32) if rows.dtype == torch.uint8 else rows).double()
            if self.origin is None:
                self.origin = wide[0].cpu()
            deviations = wide - self.origin.to(wide.device)
            squared = wide.square().sum(1)
            counted = [wide.abs() > 1, wide <= -0.99, wide >= 0.99]
            sums = [squared.sqrt().sum(), squared.sum(), *(each.sum() for each in counted)]
            sums.append(deviations.square().sum())
            self.sums[1:] += torch.stack([each.double() for each in sums]).cpu()
            self.sums[0] += len(rows)
            self.deviations += deviations.sum(0).cpu()
            extremes = torch.stack([wide.amin(0), -wide.amax(0)]).cpu()
            self.extremes = torch.minimum(self.extremes, extremes)

    def gather(self, group: dist.ProcessGroup | None, processes: int) -> None:
        """Adds the sums of the other processes of a group."""
        assert self.origin is not None
        origin = reduce_values(self.origin, group) / processes
        shift, rows = self.origin - origin, float(self.sums[0])
        moved = 2 * float(self.deviations @ shift) + rows * float(shift.square().sum())
        self.sums[_SQUARED_DEVIATIONS] += moved
        self.deviations += rows * shift
        self.sums = reduce_values(self.sums, group)
        self.deviations = reduce_values(self.deviations, group)
        self.extremes = reduce_values(self.extremes, group, dist.ReduceOp.MIN)
        self.origin = origin

    def measures(self, shape: tuple[int, ...]) -> Measures:
        """The statistics of the rows added so far, for rows of this shape."""
        assert self.origin is not None
        count, norms, squares, outside, low, high, deviations = self.sums.tolist()
        average, values = self.deviations / count, max(math.prod(shape), 1)
        variance = deviations / (count * values) - float(average.square().sum()) / values
        return Measures(
            norm=norms / count,
            rms=math.sqrt(squares / (count * values)),
            mean=(self.origin + average).view(shape),
            std=math.sqrt(max(variance, 0.0)),
            least=self.extremes[0].view(shape),
            most=-self.extremes[1].view(shape),
            fills_unit=outside == 0 and low > 0 and high > 0,
        )
