"""Curves of quality against the number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..common.files import StrPath
from ..common.values import check_finite
from .figures import (
    DPI,
    INK,
    MARGIN,
    TITLE,
    add_axes,
    add_title,
    new_figure,
    save,
    style,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours for the colour-blind, without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = "osD^vPX"
_WIDTH, _HEIGHT = 380, 260  # of the area between the axes, in pixels
_LEFT, _BELOW = 62, 46  # the room for the labels of the axes; left at least
_LABEL = 12
_TICK_LABEL = 0.9 * _LABEL

Curve = (
    tuple[Sequence[float], Sequence[float]]
    | tuple[Sequence[float], Sequence[float], Sequence[float]]
)


def quality_curve(
    curves: Mapping[str, Curve],
    path: StrPath | None = None,
    *,
    xlabel: str = "evaluations",
    ylabel: str = "quality",
    title: str | None = None,
    log_y: bool = False,
) -> Figure:
    """Quality against the number of evaluations, on a logarithmic axis.

    The name of each curve is beside its last point, in the colour of the curve. The colours
    suit the colour-blind, and the markers differ too.

    Args:
        curves: name to (evaluations, quality) or (evaluations, quality, spread), sequences of one
            length; at most 7 curves. spread is drawn as a band from quality − spread to quality +
            spread.
        xlabel: label of the x axis.
        ylabel: label of the y axis, such as "distance (lower is better)".
        log_y: whether the y axis is logarithmic too.

    >>> figure = quality_curve({"euler": ([5, 10, 20], [3.0, 1.4, 1.0]), "heun": ([9, 19], [2, 1])})
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['euler', 'heun']
    """
    if not 1 <= len(curves) <= len(COLOURS):
        raise ValueError(f"curves must have 1 to {len(COLOURS)} curves, got {len(curves)}.")
    checked = {name: _checked(name, curve, log_y) for name, curve in curves.items()}
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = add_axes(figure, 0, 0, _WIDTH, _HEIGHT)
    axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    for (name, (x, y, spread)), colour, marker in zip(
        checked.items(), COLOURS, _MARKERS, strict=False
    ):
        axes.plot(x, y, label=name, color=colour, marker=marker, markersize=5, linewidth=1.6)
        if spread:
            # On a logarithmic axis a band that reaches 0 goes down to the edge of the axes.
            low = [
                q - s if q > s or not log_y else q * 1e-3 for q, s in zip(y, spread, strict=True)
            ]
            high = [q + s for q, s in zip(y, spread, strict=True)]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    if log_y:
        values = [q for _, y, _ in checked.values() for q in y]
        room = max(1.3, (max(values) / min(values)) ** 0.06)
        axes.set_ylim(min(values) / room, max(values) * room)
    _label_axes(axes, xlabel, ylabel, sorted({n for x, _, _ in checked.values() for n in x}))
    _make_room(figure, axes, list(curves), title)
    _name_lines(axes)
    add_title(figure, title)
    save(figure, path)
    return figure


def _checked(name: str, curve: Curve, log_y: bool) -> tuple[list[float], ...]:
    columns = [[float(value) for value in column] for column in curve]
    if len(columns) not in (2, 3) or len(columns[0]) == 0 or len({*map(len, columns)}) > 1:
        raise ValueError(
            f"the curve {name!r} must be 2 or 3 sequences of one length, not empty, got "
            f"{len(columns)} of lengths {[len(column) for column in columns]}."
        )
    check_finite(f"the curve {name!r}", torch.tensor(columns, device="cpu").flatten())
    x, y, spread = columns if len(columns) == 3 else (*columns, [])
    if min(x) <= 0 or (log_y and min(y) <= 0):
        raise ValueError(f"the curve {name!r} has values of at most 0 on a logarithmic axis.")
    if min(spread, default=0) < 0:
        raise ValueError(f"the spread of the curve {name!r} must be at least 0.")
    order = sorted(range(len(x)), key=x.__getitem__)
    return tuple([column[i] for i in order if column] for column in (x, y, spread))


def _make_room(figure: Figure, axes: Any, names: list[str], title: str | None) -> None:
    """Enlarges the figure around the axes: for their labels, the names of the curves, the title."""
    numbers = axes.get_yticklabels() + axes.get_yticklabels(minor=True)
    widest = max(text_width(number.get_text(), _TICK_LABEL) for number in numbers)
    left = max(_LEFT, widest + 3 * _LABEL)  # with the label of the axis and the gaps beside it
    right = max(text_width(name, _LABEL) for name in names) + 2 * MARGIN
    above = MARGIN + (TITLE + MARGIN if title else 0)
    width = max(left + _WIDTH + right, text_width(title or "", TITLE) + 2 * MARGIN)
    height = _BELOW + _HEIGHT + above
    figure.set_size_inches(width / DPI, height / DPI)
    axes.set_position((left / width, _BELOW / height, _WIDTH / width, _HEIGHT / height))


def _label_axes(axes: Any, xlabel: str, ylabel: str, ticks: list[float]) -> None:
    from matplotlib.ticker import LogFormatter, NullLocator

    class Numbers(LogFormatter):
        """Plain where they are short, such as 0.02, at the ticks that LogFormatter labels."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    letters = {"fontsize": _LABEL * 72 / DPI, "color": INK}
    axes.set_xlabel(xlabel, **letters)
    axes.set_ylabel(ylabel, **letters)
    axes.set_xticks(shown := _spaced_ticks(ticks), [f"{tick:g}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(Numbers())
        axes.yaxis.set_minor_formatter(Numbers(labelOnlyBase=False))
    else:  # without a factor or an offset above the axis, where it has no room
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.tick_params(
        which="both", labelsize=_TICK_LABEL * 72 / DPI, color="#999999", labelcolor=INK
    )
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#999999")


def _spaced_ticks(ticks: list[float]) -> list[float]:
    """As many of the ticks as have room for their labels on a logarithmic axis."""
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    shown = ticks[:1]
    for tick in ticks[1:]:
        room = text_width(f"{tick:g}", _LABEL) + text_width(f"{shown[-1]:g}", _LABEL)
        if math.log(tick / shown[-1]) / span * _WIDTH * 0.9 >= room / 2 + 6:
            shown.append(tick)
    return shown


def _name_lines(axes: Any) -> None:
    """Writes the name of each line right of the axes, near the height of its last point."""
    heights = [
        axes.transAxes.inverted().transform(axes.transData.transform(line.get_xydata()[-1]))[1]
        for line in axes.lines
    ]
    gap = 1.3 * _LABEL / _HEIGHT
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for lower, upper in pairwise(order):
        heights[upper] = max(heights[upper], heights[lower] + gap)
    limit = 1.0
    for index in reversed(order):
        heights[index] = min(heights[index], limit)
        limit = heights[index] - gap
    for line, height in zip(axes.lines, heights, strict=True):
        label = {**style(_LABEL), "color": line.get_color(), "ha": "left", "va": "center"}
        axes.text(1.02, height, line.get_label(), transform=axes.transAxes, **label)
