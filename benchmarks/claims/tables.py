"""Tables of figures: means over the seeds, and CSV files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.jobs import Row
from pfgm.common import files


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows with these values in their columns."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def grouped(rows: Iterable[Row], by: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows grouped by the values in columns ``by``, in order of first occurrence."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return groups


def over_seeds(rows: Iterable[Row], by: Sequence[str], figures: Sequence[str]) -> list[Row]:
    """The mean of each figure in groups of equal ``by``, and its standard deviation, FIGURE_spread.

    >>> over_seeds([{"D": 1, "f": 2.0}, {"D": 1, "f": 4.0}], ["D"], ["f"])
    [{'D': 1, 'f': 3.0, 'f_spread': 1.4142135623730951}]
    """
    means = []
    for key, part in grouped(rows, by).items():
        row: Row = dict(zip(by, key, strict=True))
        for figure in figures:
            values = [float(member[figure]) for member in part]
            row[figure] = statistics.mean(values)
            row[f"{figure}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
        means.append(row)
    return means


def relative(
    rows: Iterable[Row],
    figures: Sequence[str],
    same: Sequence[str],
    is_base: Callable[[Row], bool],
) -> list[Row]:
    """Rows with each figure divided by that of the base row with equal columns ``same``."""
    rows = list(rows)
    base = {key: part[0] for key, part in grouped(filter(is_base, rows), same).items()}
    return [
        {**row, **{f: row[f] / base[tuple(row[name] for name in same)][f] for f in figures}}
        for row in rows
    ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, with six digits a number. Writes the whole file or nothing."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = ([_text(row.get(name, "")) for name in columns] for row in rows)
    files.write_csv(path, [columns, *texts])


def _text(value: Any) -> str:
    if value is None:
        return "never"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
