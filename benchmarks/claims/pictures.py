"""Pictures: curves, by :func:`pfgm.plotting.quality_curve`, and bars."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.rows import Row, grouped, write_csv
from pfgm.plotting import figures, quality_curve
from pfgm.plotting.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR, _GAP = 16, 22  # widths in pixels
_HEIGHT, _LEFT, _BELOW, _ABOVE = 240, 62, 34, 34
_LABEL = 12


def curves(
    rows: Iterable[Row],
    series: str,
    x: str,
    y: str,
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Draws a curve for each value of the column ``series``, with the column y_spread as its band.

    Also writes the rows to a CSV file of the same name. Without rows there is no picture. x = ∞ is
    drawn at four times the largest finite x.
    """
    rows = [row for row in rows if math.isfinite(row[y])]
    write_csv(path.with_suffix(".csv"), rows)
    if not rows:
        path.unlink(missing_ok=True)
        return
    finite = [float(row[x]) for row in rows if row[x] != math.inf]
    beyond = 4 * max(finite)
    lines = {
        str(name): (
            [min(float(row[x]), beyond) for row in part],
            [row[y] for row in part],
            [row.get(f"{y}_spread", 0.0) for row in part],
        )
        for (name,), part in grouped(rows, [series]).items()
    }
    figure = quality_curve(lines, xlabel=xlabel, ylabel=ylabel, title=title, log_y=True)
    if any(row[x] == math.inf for row in rows):
        axes = figure.axes[0]
        ticks = [tick for tick in axes.get_xticks() if tick < beyond / 2]
        axes.set_xticks([*ticks, beyond], [*(f"{tick:g}" for tick in ticks), "∞"])
    figures.save(figure, path)


def bars(
    table: Iterable[Row], group: str, series: str, y: str, path: Path, ylabel: str, title: str
) -> None:
    """Draws a group of bars for each value of a column, with the column y_spread as errors.

    Also writes them to a CSV file of the same name.
    """
    rows: list[Row] = [
        {
            "group": row[group],
            "series": row[series],
            "value": row[y],
            "spread": row.get(f"{y}_spread", 0.0),
        }
        for row in table
    ]
    write_csv(path.with_suffix(".csv"), rows)
    values = {
        name: {row["series"]: (row["value"], row["spread"]) for row in part}
        for (name,), part in grouped(rows, ["group"]).items()
    }
    names = list(dict.fromkeys(row["series"] for row in rows))
    widths = [
        max(_BAR * len(each), figures.text_width(name, _LABEL)) + _GAP
        for name, each in values.items()
    ]
    legend = 40 + max(figures.text_width(name, _LABEL) for name in names)
    inner = max(
        sum(widths), figures.text_width(title, figures.TITLE) - legend - _LEFT + 2 * figures.MARGIN
    )
    figure = figures.new_figure(_LEFT + inner + legend, _BELOW + _HEIGHT + _ABOVE)
    axes = figures.add_axes(figure, _LEFT, _BELOW, inner, _HEIGHT)
    axes.set_xlim(0, inner)
    ends = list(itertools.accumulate(widths))
    centres = [end - width / 2 for end, width in zip(ends, widths, strict=True)]
    for centre, each in zip(centres, values.values(), strict=True):
        _add_group(axes, centre, each, names)
    _style_axes(axes, ylabel, centres, list(values))
    _add_legend(figure, names, left=_LEFT + inner + 14)
    figures.add_title(figure, title)
    figures.save(figure, path)


def _add_group(
    axes: Any, centre: float, group: Mapping[str, tuple[float, float]], names: list[str]
) -> None:
    first = centre - _BAR * (len(group) - 1) / 2
    for place, (name, (value, spread)) in enumerate(group.items()):
        axes.bar(
            first + _BAR * place,
            value,
            0.9 * _BAR,
            yerr=spread or None,
            color=COLOURS[names.index(name)],
            error_kw={"ecolor": figures.INK, "elinewidth": 1.2, "capsize": 3},
        )


def _add_legend(figure: Figure, names: list[str], left: float) -> None:
    """Names the series in their colours, right of the bars."""
    width, height = figure.get_size_inches() * figures.DPI
    for line, name in enumerate(names):
        label = {**figures.style(_LABEL), "color": COLOURS[line], "ha": "left", "va": "center"}
        top = _BELOW + _HEIGHT - 8 - 18 * line
        figure.text(left / width, top / height, f"■ {name}", **label)


def _style_axes(axes: Any, ylabel: str, centres: list[float], names: list[str]) -> None:
    small = {"fontsize": _LABEL * 72 / figures.DPI, "color": figures.INK}
    axes.set_ylabel(ylabel, **small)
    axes.set_xticks(centres, names)
    axes.tick_params(
        labelsize=_LABEL * 72 / figures.DPI * 0.9, color="#999999", labelcolor=figures.INK
    )
    axes.grid(True, axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
