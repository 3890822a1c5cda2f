"""Points in the plane: their checks, the window around them, and the size of their marks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_floating
from ..common.numbers import positive
from ..common.values import check_finite

GRID = 160  # points along each side of a window where a field is computed
DATA_COLOUR = "#D55E00"
_ROOM = 0.3  # on each side of the data, relative to their extent


class Window(NamedTuple):
    """A square part of the plane, by its center and half its side."""

    x: float
    y: float
    half: float

    @classmethod
    def around(cls, points: Tensor) -> Window:
        low, high = points.amin(0), points.amax(0)
        middle = (low + high) / 2
        half = float((high - low).max()) * (0.5 + _ROOM)
        # A single point, or several in one place, has no extent.
        return cls(float(middle[0]), float(middle[1]), half if half > 0 else 1.0)

    def grid(self) -> tuple[Any, Any, Tensor]:
        """Coordinates along both sides, and the points (GRID², 2), row by row."""
        unit = torch.linspace(-1, 1, GRID, dtype=torch.float64, device="cpu")
        x, y = self.x + self.half * unit, self.y + self.half * unit
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        return x.numpy(), y.numpy(), torch.stack([columns, rows], 2).flatten(0, 1)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        x, y, half = self
        return x - half, x + half, y - half, y + half

    def show(self, axes: Any) -> None:
        axes.axis(self.extent)


def checked_points(data: Tensor) -> Tensor:
    """The points (n, 2) as float64 on the CPU."""
    check_floating("data", data)
    if data.ndim != 2 or data.shape[1] != 2 or len(data) == 0:
        raise ValueError(f"data must have shape (n, 2) with n ≥ 1, got {tuple(data.shape)}.")
    return checked_finite("data", data)


def checked_finite(name: str, values: Tensor) -> Tensor:
    """The values as float64 on the CPU."""
    check_finite(name, values)
    return values.detach().cpu().double()


def check_levels(name: str, levels: list[float]) -> None:
    """Raises ValueError unless levels are numbers above 0, at least one of them."""
    if not levels:
        raise ValueError(f"{name} must hold at least one value, got none.")
    for level in levels:
        positive(name, level)


def mark_size(data: Tensor) -> float:
    """The size of the mark of one data point: the more points, the smaller."""
    return min(12.0, max(1.5, 1200 / len(data)))
