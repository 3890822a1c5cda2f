"""What all pictures share: figures without pyplot, measured in pixels, saved whole or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import StrPath, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# All lengths are in pixels of the saved picture.
DPI = 100
MARGIN = 10
TITLE = 15
INK = "#333333"


def new_figure(width: int, height: int) -> Figure:
    """An empty white figure of so many pixels."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            "plotting needs matplotlib; in a checkout: pip install '.[demo]'"
        ) from error
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def add_axes(
    figure: Figure, left: float, bottom: float, width: float, height: float, **options: Any
) -> Any:
    """Axes at a place given in pixels from the lower left corner."""
    full_width, full_height = figure.get_size_inches() * DPI
    place = (left / full_width, bottom / full_height, width / full_width, height / full_height)
    return figure.add_axes(place, **options)


def add_title(figure: Figure, title: str | None) -> None:
    """A line at the top, in the room that the caller has left."""
    if title:
        height = figure.get_size_inches()[1] * DPI
        figure.text(0.5, 1 - MARGIN / height, title, va="top", **style(TITLE))


def style(size: float) -> dict[str, Any]:
    return {"fontsize": size * 72 / DPI, "color": INK, "ha": "center"}


def text_width(text: str, size: float) -> int:
    """About the width of a line of text; measuring it would need a renderer."""
    return math.ceil(0.62 * size * len(text))


def save(figure: Figure, path: StrPath | None) -> None:
    if path is None:
        return
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path is {path}; allowed is a name ending in .png.")
    write_atomic(
        path,
        lambda file: figure.savefig(file, format="png", dpi=DPI, facecolor="white"),
    )
