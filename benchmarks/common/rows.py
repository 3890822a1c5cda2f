"""Rows of figures: groups, means over the seeds, CSV files and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.tables import table
from pfgm.common import files

Row = dict[str, Any]


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows with these values in their columns."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def grouped(rows: Iterable[Row], by: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows grouped by the values in columns ``by``, in order of first occurrence."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return groups


def mean_of(rows: Sequence[Row], figures: Iterable[str] | None = None) -> Row:
    """The mean of each figure, and its standard deviation as FIGURE_spread.

    >>> mean_of([{"f": 2.0}, {"f": 4.0}])
    {'f': 3.0, 'f_spread': 1.4142135623730951}
    """
    mean: Row = {}
    for figure in rows[0] if figures is None else figures:
        values = [float(row[figure]) for row in rows]
        mean[figure] = statistics.mean(values)
        mean[f"{figure}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return mean


def over_seeds(rows: Iterable[Row], by: Sequence[str], figures: Sequence[str]) -> list[Row]:
    """The :func:`mean_of` groups of rows with equal ``by``.

    >>> over_seeds([{"D": 1, "f": 2.0}, {"D": 1, "f": 4.0}], ["D"], ["f"])
    [{'D': 1, 'f': 3.0, 'f_spread': 1.4142135623730951}]
    """
    return [
        dict(zip(by, key, strict=True)) | mean_of(part, figures)
        for key, part in grouped(rows, by).items()
    ]


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
    files.write_csv(path, [columns_of(rows), *_cells(rows, "{:.6g}")])


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, with three digits a number and without lists."""
    flat = [
        {name: value for name, value in row.items() if not isinstance(value, (dict, list, tuple))}
        for row in rows
    ]
    return table(columns_of(flat), _cells(flat, "{:.3g}"))


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The names of all columns, in order of first occurrence."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _cells(rows: Sequence[Row], number: str) -> list[list[str]]:
    def text(value: Any) -> str:
        if value is None:
            return "never"
        return number.format(value) if isinstance(value, float) else str(value)

    return [[text(row.get(name, "")) for name in columns_of(rows)] for row in rows]
