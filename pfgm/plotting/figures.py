"""Parts of all pictures: figures without pyplot, measured in pixels, and saved atomically."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.files import StrPath, write_atomic
from ..common.optional import optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# All lengths are in pixels of the saved picture.
PICTURES = (".png", ".jpg", ".jpeg")
"""How the names of pictures may end."""

DPI = 100
MARGIN = 10
TITLE = 15
INK = "#333333"
_GAP = 12  # between panels
_HEADER = 13
_BAR = 12  # width of a colour bar
_BAR_ROOM = 64  # width of a colour bar with its numbers


def require_matplotlib() -> None:
    """Raises ImportError if matplotlib is missing. Long work that ends in a picture asks first."""
    _shown_figure()


def _shown_figure() -> Any:
    optional("matplotlib.figure", "plotting needs matplotlib", "demo")
    from .shown_figure import ShownFigure

    return ShownFigure


def new_figure(width: int, height: int) -> Figure:
    """An empty white figure of this size in pixels."""
    size = (width / DPI, height / DPI)
    figure: Figure = _shown_figure()(figsize=size, dpi=DPI, facecolor="white")
    return figure


def add_axes(
    figure: Figure, left: float, bottom: float, width: float, height: float, **options: Any
) -> Any:
    """Axes at a position in pixels from the lower left corner."""
    full_width, full_height = figure.get_size_inches() * DPI
    bounds = (left / full_width, bottom / full_height, width / full_width, height / full_height)
    return figure.add_axes(bounds, **options)


def add_title(figure: Figure, title: str | None) -> None:
    """Writes the title at the top, where the caller has left room."""
    if title:
        height = figure.get_size_inches()[1] * DPI
        figure.text(0.5, 1 - MARGIN / height, title, va="top", **style(TITLE))


def style(size: float) -> dict[str, Any]:
    """Options of a text; size is the height of its letters in pixels."""
    return {"fontsize": size * 72 / DPI, "color": INK, "ha": "center"}


def text_width(text: str, size: float) -> int:
    """An estimate of the width of a line of text. Measuring it would need a renderer."""
    return math.ceil(0.62 * size * len(text))


def save(figure: Figure, path: StrPath | None) -> None:
    """Writes the figure to a .png, .jpg or .jpeg file, or nothing if path is None."""
    if path is None:
        return
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise ValueError(f"path must end in .png or .jpg, got {path}.")
    write_atomic(
        path,
        lambda file: figure.savefig(file, format=suffix[1:], dpi=DPI, facecolor="white"),
    )


def raster(figure: Figure) -> Any:
    """The figure as an image of Pillow, which matplotlib needs too."""
    from PIL import Image

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, facecolor="white")
    return Image.open(content).convert("RGB")


def square_panels(
    names: list[str], title: str | None, size: int, bar: bool = False
) -> tuple[Figure, list[Any]]:
    """A row of square panels with their names above; bar leaves room for a colour bar."""
    above = MARGIN + _HEADER + 8 + (TITLE + MARGIN if title else 0)
    row = len(names) * (size + _GAP) - _GAP
    width = max(row + (_BAR_ROOM if bar else 0), text_width(title or "", TITLE)) + 2 * MARGIN
    figure = new_figure(width, MARGIN + size + above)
    panels = []
    for i, name in enumerate(names):
        axes = add_axes(figure, MARGIN + i * (size + _GAP), MARGIN, size, size)
        axes.set_title(name, pad=5 * 72 / DPI, **style(_HEADER))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#CCCCCC", linewidth=0.6)
        panels.append(axes)
    add_title(figure, title)
    return figure, panels


def add_colour_bar(
    figure: Figure, shades: Any, name: str, size: int, ticks: Iterable[float]
) -> None:
    """Draws a colour bar right of the panels; size is their height in pixels."""
    right = figure.axes[-1].get_position().x1 * figure.get_size_inches()[0] * DPI
    axes = add_axes(figure, right + _GAP, MARGIN, _BAR, size)
    shown = list(ticks)
    bar = figure.colorbar(shades, cax=axes)
    bar.ax.minorticks_off()
    bar.set_ticks(shown, labels=[f"{tick:g}".replace("-", "−") for tick in shown])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10 * 72 / DPI, color="#999999", labelcolor=INK, length=2)
    bar.set_label(name, **{**style(11), "labelpad": 2})


def part_of_colormap(name: str, low: float, high: float) -> Any:
    """The part of one of matplotlib's colour maps from low to high, both in [0, 1]."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[name](torch.linspace(low, high, 256, device="cpu").numpy()))
