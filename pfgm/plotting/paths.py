"""The paths of 2-D samples, seen from above and in space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.checks import check_floating
from ..common.files import StrPath
from ..common.numbers import whole
from ..flows import Network, PoissonFlow
from .figures import (
    DPI,
    MARGIN,
    TITLE,
    add_axes,
    add_colour_bar,
    add_title,
    new_figure,
    part_of_colormap,
    save,
    square_panels,
    style,
    text_width,
)
from .points import DATA_COLOUR, Window, check_levels, checked_finite, checked_points, mark_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In pixels of the saved picture.
_PANEL = 380
_SPACE = (520, 440)
_MOST_EXTENT = 2.0  # of the lines that are drawn in full, relative to the median of all


def trajectory_plot(
    paths: Tensor,
    levels: Iterable[float] | Tensor,
    path: StrPath | None = None,
    *,
    data: Tensor | None = None,
    title: str | None = None,
    symbol: str = "z",
) -> Figure:
    """The paths of 2-D samples from noise to data, in full and with the end magnified.

    The colour of a line is the level. Circles are the samples, dots behind them the data. Paths
    that reach more than twice as far as the median path leave the picture.

    Args:
        paths: (steps, n, 2), floating point: the points at each level, the samples last. steps is
            at least 2, n at least 1.
        levels: (steps,), above 0.
        data: (m, 2), floating point, drawn behind the paths. The magnified part is the region of
            the data, or of the samples if data is None.
        symbol: the name of the level, such as "σ".

    >>> paths = torch.tensor([[[8.0, 6.0]], [[4.0, 3.0]], [[0.8, 0.6]]])
    >>> figure = trajectory_plot(paths, [10, 5, 1], data=torch.eye(2))
    >>> len(figure.axes[0].collections[0].get_segments())
    2
    """
    steps = _checked_paths(paths)
    heights = [float(level) for level in levels]
    if len(heights) != len(steps):
        raise ValueError(
            f"levels must have {len(steps)} values, one for each step, got {len(heights)}."
        )
    check_levels("levels", heights)
    known = None if data is None else checked_points(data)
    near = Window.around(steps[-1] if known is None else known)
    whole = _window_of_lines(steps, known)
    figure, panels = square_panels(["the whole way", "its end"], title, size=_PANEL, bar=True)
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    low, high = min(heights), max(max(heights), min(heights) * 1.001)
    norm = LogNorm(low, high)
    middle = [math.sqrt(a * b) for a, b in pairwise(heights)]
    segments = torch.stack([steps[:-1], steps[1:]], 2).flatten(0, 1)
    values = [value for value in middle for _ in range(steps.shape[1])]
    for axes, window, width in zip(panels, (whole, near), (0.6, 0.9), strict=True):
        lines = LineCollection(
            list(segments.numpy()), cmap=part_of_colormap("viridis", 0, 0.8), norm=norm
        )
        lines.set(array=values, linewidth=width, alpha=0.75, capstyle="round")
        axes.add_collection(lines)
        if known is not None:
            axes.scatter(*known.T, s=mark_size(known), color="#999999", linewidths=0, zorder=0)
        axes.scatter(
            *steps[-1].T, s=9, facecolor="white", edgecolor=DATA_COLOUR, linewidths=0.8, zorder=3
        )
        window.show(axes)
    add_colour_bar(figure, lines, symbol, _PANEL, _decades(low, high))
    save(figure, path)
    return figure


def flow_lines(
    flow: PoissonFlow,
    net: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    n: int,
    path: StrPath | None = None,
    *,
    data: Tensor | None = None,
    solver: str = "multistep",
    steps: int = 60,
    generator: torch.Generator | None = None,
    z_top: float | None = None,
    title: str | None = None,
) -> Figure:
    """Field lines in space: the paths of n samples of a 2-D flow from z_max down to z_min.

    A line (x₁, x₂, z) runs from a point of the prior, the uniform hemisphere projected onto the
    plane z_max, to its sample on the plane of the data. Its colour shows the x₁ of the sample.

    Some points of the prior are very far away. The axes end where they hold the data, the samples,
    and the lines that reach at most twice as far as the median line. Farther lines are drawn from
    the point at which they enter the axes.

    Args:
        flow: of shape (2,).
        net: its network, such as ``flow.empirical(data)``.
        n: number of lines, at least 1.
        data: (m, 2), floating point, drawn as dots at z = 0.
        solver: as for :meth:`pfgm.PoissonFlow.sample`.
        steps: the number of solver steps, and of segments of each line.
        generator: of the prior.
        z_top: the height above which nothing is drawn, to show the end of the lines better; None
            draws all.

    >>> from pfgm import PoissonFlow
    >>> flow = PoissonFlow((2,), data_norm=1.0)
    >>> figure = flow_lines(flow, flow.empirical(torch.eye(2)), 5, steps=8)
    >>> len(figure.axes[0].lines)
    5
    """
    if tuple(flow.shape) != (2,):
        raise ValueError(f"flow must have sample shape (2,), got {tuple(flow.shape)}.")
    whole("n", n)
    if z_top is not None and not flow.z_min < z_top <= flow.z_max:
        raise ValueError(f"z_top must be from {flow.z_min} to {flow.z_max}, got {z_top}.")
    known = None if data is None else checked_points(data)
    heights, lines = _sample_lines(flow, net, n, solver, steps, generator)
    if z_top is not None:
        heights, lines = _cut_at(z_top, heights, lines)
    above = TITLE + MARGIN if title else 0
    width = max(_SPACE[0], text_width(title or "", TITLE) + 2 * MARGIN)
    figure = new_figure(width, _SPACE[1] + above)
    # A 3-D drawing leaves the margins of its square empty.
    side = _SPACE[0] - 36
    axes = add_axes(
        figure, (width - side) / 2 - 24, -24, side, side, projection="3d", computed_zorder=False
    )
    if known is not None:
        axes.scatter(
            *known.T, 0, s=mark_size(known), color="#AAAAAA", linewidths=0, depthshade=False
        )
    end = lines[-1, :, 0]
    fraction = (end - end.min()) / (end.max() - end.min()).clamp(min=torch.finfo(end.dtype).tiny)
    colours = part_of_colormap("plasma", 0, 0.88)(fraction.numpy())
    window = _window_of_lines(lines, known)
    for i, colour in enumerate(colours):
        inside = _cut_sides(window, heights, lines[:, i])
        axes.plot(*inside.T, color=colour, linewidth=0.8, alpha=0.8)
    axes.scatter(*lines[-1].T, heights[-1], s=8, c=colours, linewidths=0, depthshade=False)
    _style_space(axes, window, heights[0])
    add_title(figure, title)
    save(figure, path)
    return figure


def _checked_paths(paths: Tensor) -> Tensor:
    check_floating("paths", paths)
    if paths.ndim != 3 or paths.shape[2] != 2 or len(paths) < 2 or paths.shape[1] == 0:
        raise ValueError(
            "paths must have shape (steps, n, 2) with steps ≥ 2 and n ≥ 1, got "
            f"{tuple(paths.shape)}."
        )
    return checked_finite("paths", paths)


def _sample_lines(
    flow: PoissonFlow,
    net: Network,
    n: int,
    solver: str,
    steps: int,
    generator: torch.Generator | None,
) -> tuple[list[float], Tensor]:
    """The levels of a run, and its points (steps, n, 2), with the samples last."""
    seen: list[tuple[float, Tensor]] = []
    samples = flow.sample(
        net,
        n,
        solver=solver,
        steps=steps,
        generator=generator,
        callback=lambda info: seen.append((info["z"], info["x"].clone())),
    )
    points = torch.stack([*(x for _, x in seen), samples])
    return [*(z for z, _ in seen), flow.z_min], checked_finite("samples of the flow", points)


def _cut_at(top: float, heights: list[float], lines: Tensor) -> tuple[list[float], Tensor]:
    """The part of the lines (steps, n, 2) below a height, cut between two steps."""
    first = next(i for i, z in enumerate(heights) if z <= top)
    if heights[first] == top:
        return heights[first:], lines[first:]
    fraction = (heights[first - 1] - top) / (heights[first - 1] - heights[first])
    cut = torch.lerp(lines[first - 1], lines[first], fraction)
    return [top, *heights[first:]], torch.cat([cut.unsqueeze(0), lines[first:]])


def _window_of_lines(lines: Tensor, data: Tensor | None) -> Window:
    """The window of data, samples and most of the lines (steps, n, 2)."""
    ends = lines[-1] if data is None else torch.cat([lines[-1], data])
    x, y, half = Window.around(ends)
    extent = (lines - lines.new_tensor([x, y])).abs().amax((0, 2))
    usual = min(float(extent.max()), _MOST_EXTENT * float(extent.median()))
    return Window(x, y, max(half, 1.04 * usual))


def _cut_sides(window: Window, heights: list[float], line: Tensor) -> Tensor:
    """The last part of a line (steps, 2) inside the window, as points (x₁, x₂, z)."""
    points = torch.cat([line, line.new_tensor(heights).unsqueeze(1)], 1)
    offset = (line - line.new_tensor([window.x, window.y])) / window.half
    outside = (offset.abs().amax(1) > 1).nonzero()
    if len(outside) == 0:
        return points
    last = int(outside[-1])
    before, after = offset[last], offset[last + 1]
    # The fraction of the step that is outside, along the coordinate that enters last.
    fraction = ((before.abs() - 1) / (before - after).abs())[before.abs() > 1].max()
    entry = torch.lerp(points[last], points[last + 1], fraction)
    return torch.cat([entry.unsqueeze(0), points[last + 1 :]])


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in a range, and 2 and 5 times them if the range is below two decades."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if high < 100 * low else (1,)
    return [m * 10.0**e for e in exponents for m in leading if low <= m * 10.0**e <= high]


def _style_space(axes: Any, window: Window, top: float) -> None:
    """Gives the axes limits, a plain floor and names, without grey walls and grid."""
    axes.axis((*window.extent, 0, top))
    axes.set_box_aspect((1, 1, 0.8))
    axes.view_init(elev=20, azim=-58)
    for axis, name in ((axes.xaxis, "x₁"), (axes.yaxis, "x₂"), (axes.zaxis, "z")):
        axis.set_label_text(name, **style(12))
        axis.labelpad = -2
        axis.pane.set(facecolor="white", edgecolor="#DDDDDD", alpha=1)
        axis.line.set_color("#BBBBBB")
    axes.grid(False)
    axes.tick_params(labelsize=10 * 72 / DPI, colors="#999999", labelcolor="#777777", pad=-1)
