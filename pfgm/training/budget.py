"""The network and the batch that a time pays for, by a fit to measured trainings.

``budget.json`` holds the trainings. The unit of time is the step of the default network in batches
of :data:`REFERENCE_BATCH`, so that a training counts alike on each machine and with each size of
samples. Of the trainings on the same data, those that are nearest to the data for their time have
the largest weight. Width, patch, batch and resolutions are fitted to them as powers of the time.
The study ``benchmarks/studies/budget.py`` measures the trainings and writes the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common.files import write_atomic

TABLE = Path(__file__).with_name("budget.json")
REFERENCE_BATCH = 32
_WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_LARGEST_BATCH = 256
_SHARPNESS = 4.0  # twice the distance from the data has a 16th of the weight
_SAME_TIME = 0.15  # in powers of 2
_RIDGE = 0.3  # of the slopes, in rows: with few rows choices hardly depend on the time
_EXTRAPOLATION = 2.0  # powers of 2 beyond the measured times


class Row(NamedTuple):
    """A measured training."""

    data: str
    """Name of the data; rows with the same name are compared."""
    shape: tuple[int, ...]
    """Shape of a sample."""
    width: int
    multipliers: tuple[int, ...]
    patch: int
    batch: int
    cost: float
    """Seconds of a step in those of the step of the default network with batches of 32."""
    steps: int
    quality: float
    """Distance of samples from the data, such as the Fréchet distance in features."""

    @property
    def time(self) -> float:
        """log2 of the training's time, in reference steps."""
        return math.log2(self.steps * self.cost)


class Choice(NamedTuple):
    """The sizes of a network and of its batches that fit a time."""

    width: int
    multipliers: tuple[int, ...]
    patch: int
    batch_size: int
    rows: int
    """The number of rows that it was fitted to."""


def read_rows(path: Path = TABLE) -> list[Row]:
    """The stored rows."""
    return [
        Row(**row | {"shape": tuple(row["shape"]), "multipliers": tuple(row["multipliers"])})
        for row in json.loads(path.read_text())
    ]


def write_rows(rows: Sequence[Row], path: Path = TABLE) -> None:
    """Writes rows, as a study does that has measured them."""
    lines = ",\n".join(json.dumps(row._asdict()) for row in rows)
    write_atomic(path, lambda file: file.write(f"[\n{lines}\n]\n".encode()))


def choose(
    shape: Sequence[int], time: float, *, patch: int | None = None, rows: Sequence[Row] = ()
) -> Choice:
    """The U-Net and batch for samples of a shape (C, *axes), and a time in reference steps.

    Args:
        patch: the length of the patches, if it is given.
        rows: the trainings that the choice is fitted to, by default those that are stored.

    >>> few, many = choose((1, 28, 28), 100.0), choose((1, 28, 28), 100_000.0)
    >>> few.width < many.width
    True
    """
    rows = rows or read_rows()
    fitted = _fitted(rows, math.log2(max(time, 1.0)), math.log2(_length(shape)))
    width = min(_WIDTHS, key=lambda each: abs(math.log2(each) - fitted["width"]))
    batch_size = min(2 ** max(round(fitted["batch"]), 0), _LARGEST_BATCH)
    if patch is None:
        patch = next(p for k in range(round(fitted["patch"]), -1, -1) if _fits(p := 2**k, shape))
    levels = 1 + round(math.log2(_length(shape) / patch) - fitted["coarsest"])
    levels = min(max(levels, 1), 1 + max(len(row.multipliers) for row in rows))
    growth = max(round(2 ** fitted["growth"]), 1)
    return Choice(width, (1, *[growth] * (levels - 1)), patch, batch_size, len(rows))


def _length(shape: Sequence[int]) -> float:
    """The geometric mean of the lengths of the axes."""
    axes = shape[1:]
    return math.exp(math.log(math.prod(axes)) / len(axes))


def _fits(patch: int, shape: Sequence[int]) -> bool:
    return all(n % patch == 0 and n >= 4 * patch for n in shape[1:]) or patch == 1


def _fitted(rows: Sequence[Row], time: float, length: float) -> dict[str, float]:
    """log2 of each choice: weighted ridge regression on log2 of the time and of the length."""
    known = np.array([[row.time, math.log2(_length(row.shape))] for row in rows])
    choices = [_logarithms(row) for row in rows]
    chosen = np.array([[*each.values()] for each in choices])
    weight = _weights(rows)[:, None]
    beyond = np.array([_EXTRAPOLATION, 0.0])
    asked = np.clip([time, length], known.min(0) - beyond, known.max(0) + beyond)
    center, mean = ((weight * v).sum(0) / weight.sum() for v in (known, chosen))
    x, y = known - center, chosen - mean
    ridge = _RIDGE * np.eye(x.shape[1])
    slopes = np.linalg.solve(x.T @ (weight * x) + ridge, x.T @ (weight * y))
    return dict(zip(choices[0], (mean + (asked - center) @ slopes).tolist(), strict=True))


def _logarithms(row: Row) -> dict[str, float]:
    coarsest = _length(row.shape) / row.patch / 2 ** (len(row.multipliers) - 1)
    values = {"width": row.width, "batch": row.batch, "patch": row.patch, "coarsest": coarsest}
    return {n: math.log2(v) for n, v in (values | {"growth": row.multipliers[-1]}).items()}


def _weights(rows: Sequence[Row]) -> np.ndarray:
    """(best/quality)^4, where the best on the same data took no longer."""
    weights = []
    for row in rows:
        rivals = [r for r in rows if r.data == row.data and r.time <= row.time + _SAME_TIME]
        weights.append((min(r.quality for r in rivals) / row.quality) ** _SHARPNESS)
    return np.array(weights)
