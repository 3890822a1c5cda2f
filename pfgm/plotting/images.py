"""Grids of images, drawn pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import check_tensor
from ..common.files import StrPath, write_atomic
from ..common.images import is_image
from ..common.numbers import positive, whole
from ..common.values import check_finite
from ..data import to_unit
from .figures import (
    MARGIN,
    TITLE,
    add_axes,
    add_title,
    new_figure,
    raster,
    save,
    style,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In pixels of the saved picture.
_PANEL = 72  # the size of an image that the default scale aims at
_GAP = 4
_HEADER = 12
_SMALLEST_HEADER = 8

_MOST_LABEL_COLUMNS = 32
_EXCEEDING = 0.05  # the share of the values of noise that is clipped
_MOST_FRAMES = 10_000


def image_grid(
    images: Tensor,
    path: StrPath | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
    title: str | None = None,
    header: Sequence[str] = (),
    side: Sequence[str] = (),
) -> Figure:
    """Images side by side on white, in reading order, enlarged without smoothing.

    Args:
        images: (n, C, H, W) with C = 1 (grey) or 3 (RGB), or (n, H, W) grey; floating values in
            [-1, 1], clipped for display, or uint8.
        columns: images per row; by default the grid is about square.
        scale: picture pixels per image pixel; by default an image is about 72 pixels wide.
        header: texts above the columns, one for each; long ones are shortened.
        side: texts beside the rows, one for each.

    >>> figure = image_grid(torch.rand(10, 1, 8, 8) * 2 - 1, columns=5, title="noise")
    >>> (figure.get_size_inches() * figure.dpi).round()
    array([396., 191.])
    """
    images = _checked(images, "(n, C, H, W) or (n, H, W)", (3, 4))
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    whole("columns", columns)
    columns = min(columns, len(images))
    if header and len(header) != columns:
        raise ValueError(
            f"header must have {columns} texts, one for each column, got {len(header)}."
        )
    rows = math.ceil(len(images) / columns)
    if side and len(side) != rows:
        raise ValueError(f"side must have {rows} texts, one for each row, got {len(side)}.")
    scale = _scale(images, scale)
    figure, axes = _draw(
        _tile(images, columns, scale),
        title,
        header=_HEADER + _GAP if header else 0,
        side=max((text_width(text, _HEADER) for text in side), default=0),
    )
    if header:
        width = images.shape[-1] * scale
        _write_header(axes, [_shortened(text, width) for text in header], width)
    for i, text in enumerate(side):
        middle = i * (images.shape[-2] * scale + _GAP) + images.shape[-2] * scale / 2
        axes.text(-_GAP, middle, text, va="center", **style(_HEADER) | {"ha": "right"})
    save(figure, path)
    return figure


def label_columns(labels: Sequence[int], names: Sequence[str], count: int) -> dict[str, Any]:
    """The options of :func:`image_grid` for images whose labels repeat in this order.

    Each label has a column, or several if there are few labels, with its name above it. Without
    labels, or with more than fit into columns or into ``count`` images, there are no options.

    >>> label_columns([0, 2], ["cat", "dog", "cow"], 16)
    {'columns': 4, 'header': ['cat', 'cow', 'cat', 'cow']}
    """
    if not 1 < len(labels) <= min(count, _MOST_LABEL_COLUMNS):
        return {}
    names = names or [str(label) for label in range(max(labels) + 1)]
    times = max(1, round(math.sqrt(count) / len(labels)))  # about square
    return {"columns": times * len(labels), "header": times * [names[each] for each in labels]}


def trajectory_grid(
    images: Tensor,
    z: Iterable[float] | Tensor,
    path: StrPath | None = None,
    *,
    scale: int | None = None,
    title: str | None = None,
    symbol: str = "z",
) -> Figure:
    """The path of samples from noise to data: a row for each sample, a column for each z.

    Values far from the data are in the hundreds. A panel is therefore divided by the absolute value
    that 5 % of its values exceed, if it is above 1, so that it shows structure but not magnitude.
    Grey is 0 in every panel, and values beyond 1 are clipped.

    Args:
        images: (steps, n, C, H, W) with C = 1 (grey) or 3 (RGB), or (steps, n, H, W) grey; floating
            or uint8. About ten steps fit well.
        z: (steps,), written above the columns.
        scale: picture pixels per image pixel; by default an image is about 72 pixels wide. The
            letters of the header shrink to fit narrow columns.
        symbol: the name of z, such as "σ".

    >>> z = torch.tensor([40.0, 6.0, 1.0, 0.001])
    >>> steps = z.view(4, 1, 1, 1, 1) * torch.randn(4, 2, 1, 8, 8)
    >>> [text.get_text() for text in trajectory_grid(steps, z).axes[0].texts]
    ['z = 40', 'z = 6', 'z = 1', 'z = 0.001']
    """
    images = _checked(images, "(steps, n, C, H, W) or (steps, n, H, W)", (4, 5))
    labels = [f"{symbol} = {float(value):.3g}" for value in z]
    if len(labels) != len(images):
        raise ValueError(f"z must have {len(images)} values, one for each step, got {len(labels)}.")
    panels = _shrunk(images).transpose(0, 1).flatten(0, 1)
    scale = _scale(panels, scale)
    figure, axes = _draw(_tile(panels, len(labels), scale), title, header=_HEADER + _GAP)
    _write_header(axes, labels, width=panels.shape[-1] * scale)
    save(figure, path)
    return figure


def animation(
    images: Tensor,
    titles: Sequence[str],
    path: StrPath,
    *,
    columns: int | None = None,
    header: Sequence[str] = (),
    frames: int | None = None,
    seconds: float = 0.15,
) -> None:
    """Samples on their way from noise to data, as an animated GIF that repeats.

    Panels are shown as by :func:`trajectory_grid`, each frame is an :func:`image_grid`.

    Args:
        images: (frames, n, C, H, W) with C = 1 (grey) or 3 (RGB), or (frames, n, H, W) grey;
            floating or uint8.
        titles: (frames,), above each frame, such as its level.
        path: where to save the animation, a name ending in .gif.
        columns: images per row; by default the grid is about square.
        header: texts above the columns, one for each.
        frames: the most images to show, at least 2; None shows all. They are chosen so that the
            pictures change evenly, because most steps of a solver change noise alone.
        seconds: how long a frame is shown; the last is shown ten times as long.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     animation(torch.rand(3, 4, 8, 8), ["a", "b", "c"], f"{folder}/x.gif")
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path must end in .gif, got {path}.")
    positive("seconds", seconds)
    images = _shrunk(_checked(images, "(frames, n, C, H, W) or (frames, n, H, W)", (4, 5)))
    if len(titles) != len(images):
        raise ValueError(
            f"titles must have {len(images)} texts, one for each frame, got {len(titles)}."
        )
    longest = max(map(len, titles))  # frames of one width
    pictures = []
    for place in range(len(images)) if frames is None else _evenly_changed(images, frames):
        title = titles[place].center(longest)
        picture = image_grid(images[place], columns=columns, title=title, header=header)
        pictures.append(raster(picture))
    milliseconds = [round(1000 * seconds)] * (len(pictures) - 1) + [round(10_000 * seconds)]
    shown = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
    write_atomic(path, lambda file: pictures[0].save(file, format="GIF", **shown))


def _evenly_changed(images: Tensor, count: int) -> list[int]:
    """At most ``count`` places, the first and the last included, with about equal changes between.

    The change between two images is the root mean square of their difference; along the path of
    all images changes add up.
    """
    if whole("frames", count, 2, _MOST_FRAMES) >= len(images):
        return [*range(len(images))]
    changes = images.diff(dim=0).flatten(1).square().mean(1).sqrt().double()
    passed = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), changes.cumsum(0)])
    wanted = passed[-1] * torch.arange(count, device="cpu") / (count - 1)
    return [int(place) for place in (passed - wanted[:, None]).abs().argmin(1).unique()]


def _shrunk(images: Tensor) -> Tensor:
    """Images (k, n, C, H, W), divided by what a few of their values exceed if it is above 1.

    The largest value would make all else grey, also where a sample overshoots white in one pixel.
    """
    sizes = images.abs().flatten(2)
    common = sizes.kthvalue(math.ceil((1 - _EXCEEDING) * sizes.shape[2]), dim=2).values
    return images / common.clamp(min=1)[..., None, None, None]


def _checked(images: Tensor, form: str, ndims: tuple[int, int]) -> Tensor:
    """The images as float32 on the CPU, with a dimension for the channels."""
    check_tensor("images", images)
    shape = tuple(images.shape)
    images = to_unit(images.detach()).cpu()
    if images.ndim == ndims[0]:
        images = images.unsqueeze(-3)
    if images.ndim != ndims[1] or not is_image(images.shape[-3:]) or images.numel() == 0:
        raise ValueError(f"images must have shape {form}, not empty, with C = 1 or 3, got {shape}.")
    check_finite("images", images)
    return images


def _scale(images: Tensor, scale: int | None) -> int:
    if scale is None:
        return max(1, round(_PANEL / max(images.shape[-2:])))
    whole("scale", scale)
    return scale


def _tile(images: Tensor, columns: int, scale: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One RGB picture (height, width, 3) of images (n, C, H, W), with white gaps between them."""
    panels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    panels = panels.expand(-1, 3, -1, -1)
    panels = panels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    missing = -len(panels) % columns
    panels = F.pad(panels, (0, _GAP, 0, _GAP, 0, 0, 0, missing), value=255)
    n, channels, height, width = panels.shape
    grid = panels.view(n // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(n // columns * height, columns * width, channels)
    return picture[:-_GAP, :-_GAP].numpy()


def _draw(
    picture: np.ndarray[Any, Any], title: str | None, *, header: int, side: int = 0
) -> tuple[Figure, Any]:
    """A figure that shows the picture pixel by pixel, and its axes.

    The axes count pixels of the picture from its upper left corner. header is the height of the
    room above the picture, side the width of that to its left.
    """
    height, width = picture.shape[:2]
    above = MARGIN + header + (TITLE + 2 * _GAP if title else 0)
    full_width = max(side + width, text_width(title or "", TITLE)) + 2 * MARGIN
    figure = new_figure(full_width, height + above + MARGIN)
    axes = add_axes(figure, (full_width - width + side) // 2, MARGIN, width, height)
    axes.imshow(picture, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    axes.set_axis_off()
    add_title(figure, title)
    return figure, axes


def _shortened(label: str, width: int) -> str:
    """The label, cut where it would not fit above a column of this width in small letters."""
    most = max(int(width / text_width("m", _SMALLEST_HEADER)), 2)
    return label if len(label) <= most else label[: most - 1] + "…"


def _write_header(axes: Any, labels: Sequence[str], width: int) -> None:
    """Writes a label above each column of this width."""
    longest = max(labels, key=len)
    size = _HEADER * min(1.0, width / text_width(longest, _HEADER))
    for i, label in enumerate(labels):
        centre = i * (width + _GAP) + width / 2
        axes.text(centre, -_GAP, label, va="bottom", **style(size))
