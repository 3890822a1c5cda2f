"""The field of 2-D data and the ways through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..common.files import StrPath
from ..functional import field_fn, log_density
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

    from ..flows.poisson import PoissonFlow

# In pixels of the saved picture.
_PANEL = 240
_LARGE = 380
_SPACE = (520, 440)
_GAP = 12
_HEADER = 13
_BAR = 12  # the width of a colour bar
_BAR_ROOM = 64  # of it with its numbers

_GRID = 160  # points along each side of a panel where the field is computed
_CHUNK = 2**22  # distances held at once
_ROOM = 0.3  # around the data, in terms of their extent
_DEPTH = 6  # nats below the highest density that are told apart
_DATA = "#D55E00"


def field_lines(
    data: Tensor,
    path: StrPath | None = None,
    *,
    z: Iterable[float] | None = None,
    title: str | None = None,
) -> Figure:
    """The Poisson field of points in the plane, seen at heights z above them.

    Every point is a charge at z = 0 in three dimensions. A panel is the plane at one z: lines that
    follow the field within it, with arrows toward the data (the way of samples as z falls), and
    shades between equipotentials, the contours of

        Φ(x, z) = 1/n Σ_j (‖x − x_j‖² + z²)^(−1/2)

    which the lines cross at right angles, because −∇Φ is the field (PFGM, arXiv 2209.11178, with
    N = 2 and its constant left out). Contours are evenly spaced in log Φ. The field's component
    along z is not drawn.

    Args:
        data: (n, 2), floating, n ≥ 1.
        path: where to save the picture, a name ending in .png; None saves nothing.
        z: heights above 0, a panel each, in the units of the data; None takes 1/20, 1/4 and 1 of
            the root mean square distance of the data from their mean.
        title: a line above.

    Returns:
        A matplotlib Figure of 100 dots per inch, which belongs to no pyplot window.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: a dtype that is not floating.
        ValueError: another shape, NaN or infinity, no z or one not above 0, another suffix.
        OSError: the picture cannot be written.

    >>> circle = torch.linspace(0, 6.28, 40)
    >>> figure = field_lines(torch.stack([circle.cos(), circle.sin()], 1), z=[0.1, 1.0])
    >>> [axes.get_title() for axes in figure.axes]
    ['z = 0.1', 'z = 1']
    """
    data = _points("data", data)
    heights = _levels("z", z, data, (0.05, 0.25, 1.0))
    window = _Window.around(data)
    figure, panels = _panels([f"z = {value:.3g}" for value in heights], title)
    x, y, points = window.grid()
    for axes, value in zip(panels, heights, strict=True):
        potential = _log_potential(points, data, value, D=1.0)
        levels = _steps(potential, 14)
        shades = {"cmap": _shades("Blues", 0.02, 0.75), "extend": "both"}
        axes.contourf(x, y, _shaped(potential), levels=levels, **shades)
        along, _ = field_fn(points, value, data, gamma=0.0)
        axes.streamplot(
            x,
            y,
            _shaped(along[:, 0]),
            _shaped(along[:, 1]),
            color=INK,
            density=1.0,
            linewidth=0.7,
            arrowsize=0.7,
        )
        axes.scatter(*data.T, s=_dot(data), color=_DATA, linewidths=0, zorder=3)
        window.show(axes)
    save(figure, path)
    return figure


def equipotentials(
    data: Tensor,
    path: StrPath | None = None,
    *,
    sigma: Iterable[float] | None = None,
    D: float = 1.0,
    title: str | None = None,
) -> Figure:
    """Density and potential of points in the plane at several noise levels, side by side.

    Shades are :func:`pfgm.log_density`, of which samples at that level are drawn, relative to its
    highest value in the panel. Lines are equipotentials: the contours of the potential of the
    points in 2 + D dimensions at r = sigma √D (PFGM++, arXiv 2302.04265), evenly spaced in

        log Φ = log Σ_j (‖x − x_j‖² + r²)^(−D/2),     log Σ_j exp(−‖x − x_j‖²/(2 sigma²)) at D = ∞

    The two families differ: the density is the field's component across the plane, the slope of the
    potential that within it. At D = ∞ they are the same.

    Args:
        data: (n, 2), floating, n ≥ 1.
        path: where to save the picture, a name ending in .png; None saves nothing.
        sigma: noise levels above 0, a panel each, in the units of the data (z where D = 1); None
            takes 0.05, 0.15, 0.4 and 1 times the root mean square distance of the data from their
            mean.
        D: number of augmented dimensions, any positive number or infinity.
        title: a line above.

    Returns:
        A matplotlib Figure of 100 dots per inch, which belongs to no pyplot window.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: a dtype that is not floating.
        ValueError: another shape, NaN or infinity, no sigma or one not above 0, D ≤ 0, another
            suffix.
        OSError: the picture cannot be written.

    >>> figure = equipotentials(torch.eye(2), sigma=[0.1, 1.0], D=math.inf)
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['σ = 0.1', 'σ = 1']
    """
    data = _points("data", data)
    noise = _levels("sigma", sigma, data, (0.05, 0.15, 0.4, 1.0))
    if not D > 0:
        raise ValueError(f"D is {D}; allowed is any positive number or infinity.")
    window = _Window.around(data)
    symbol = "z" if D == 1 else "σ"
    figure, panels = _panels([f"{symbol} = {v:.3g}" for v in noise], title, bar=True)
    x, y, points = window.grid()
    for axes, value in zip(panels, noise, strict=True):
        density = log_density(points, data, sigma=value, D=D)
        shades = axes.imshow(
            _shaped(density - density.max()),
            cmap=_shades("magma", 0, 0.85),
            vmin=-_DEPTH,
            vmax=0,
            extent=window.extent,
            origin="lower",
            interpolation="bilinear",
            aspect="auto",
        )
        potential = _log_potential(points, data, value, D)
        axes.contour(
            x,
            y,
            _shaped(potential),
            levels=_steps(potential, 12),
            colors="white",
            alpha=0.7,
            linewidths=0.7,
            linestyles="solid",
        )
        window.show(axes)
    _colour_bar(figure, shades, "log density − maximum", _PANEL, range(-_DEPTH, 1, 2))
    save(figure, path)
    return figure


def trajectory_plot(
    paths: Tensor,
    levels: Iterable[float] | Tensor,
    path: StrPath | None = None,
    *,
    data: Tensor | None = None,
    title: str | None = None,
    symbol: str = "z",
) -> Figure:
    """The ways of 2-D samples from noise to data: all of it, and its end magnified.

    Lines are coloured by the level; circles are the samples, dots behind them the data.

    Args:
        paths: (steps, n, 2), floating: the points at each level, samples last; steps ≥ 2, n ≥ 1.
        levels: (steps,), above 0.
        path: where to save the picture, a name ending in .png; None saves nothing.
        data: (m, 2), floating, drawn behind; the magnified part is where they are. None takes the
            samples for it.
        title: a line above.
        symbol: what the levels are called, such as "σ".

    Returns:
        A matplotlib Figure of 100 dots per inch, which belongs to no pyplot window.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: a dtype that is not floating.
        ValueError: another shape, NaN or infinity, a level not above 0, another suffix.
        OSError: the picture cannot be written.

    >>> paths = torch.tensor([[[8.0, 6.0]], [[4.0, 3.0]], [[0.8, 0.6]]])
    >>> figure = trajectory_plot(paths, [10, 5, 1], data=torch.eye(2))
    >>> len(figure.axes[0].collections[0].get_segments())
    2
    """
    steps = _paths(paths)
    heights = [float(level) for level in levels]
    if len(heights) != len(steps):
        raise ValueError(f"levels has {len(heights)} values; allowed are {len(steps)}, a step one.")
    _check_levels("levels", heights)
    known = None if data is None else _points("data", data)
    near = _Window.around(steps[-1] if known is None else known)
    whole = _Window.around(steps.flatten(0, 1), room=0.04)
    figure, panels = _panels(["the whole way", "its end"], title, size=_LARGE, bar=True)
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    low, high = min(heights), max(max(heights), min(heights) * 1.001)
    norm = LogNorm(low, high)
    middle = [math.sqrt(a * b) for a, b in pairwise(heights)]
    segments = torch.stack([steps[:-1], steps[1:]], 2).flatten(0, 1)
    values = [value for value in middle for _ in range(steps.shape[1])]
    for axes, window, width in zip(panels, (whole, near), (0.6, 0.9), strict=True):
        lines = LineCollection(list(segments.numpy()), cmap=_shades("viridis", 0, 0.8), norm=norm)
        lines.set(array=values, linewidth=width, alpha=0.75, capstyle="round")
        axes.add_collection(lines)
        if known is not None:
            axes.scatter(*known.T, s=_dot(known), color="#999999", linewidths=0, zorder=0)
        axes.scatter(
            *steps[-1].T, s=9, facecolor="white", edgecolor=_DATA, linewidths=0.8, zorder=3
        )
        window.show(axes)
    _colour_bar(figure, lines, symbol, _LARGE, _decades(low, high))
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
    """Field lines in space: n samples of a 2-D flow on their way from z_max down to z_min.

    A line (x₁, x₂, z) runs from a point of the prior, the uniform hemisphere projected onto the
    plane z_max, to its sample on the plane of the data. Its colour is that of the sample's x₁.

    Args:
        flow: of shape (2,).
        net: its network, such as ``flow.empirical(data)``.
        n: number of lines, at least 1.
        path: where to save the picture, a name ending in .png; None saves nothing.
        data: (m, 2), floating, drawn as dots at z = 0.
        solver: as of :meth:`pfgm.PoissonFlow.sample`.
        steps: of the solver, and corners of each line.
        generator: of the prior.
        z_top: draws only what lies below this, to see the end of the way better; None draws all.
        title: a line above.

    Returns:
        A matplotlib Figure of 100 dots per inch, which belongs to no pyplot window.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: data of a dtype that is not floating.
        ValueError: a flow of another shape, n below 1, data of another shape, NaN or infinity,
            z_top not between z_min and z_max, another suffix.
        OSError: the picture cannot be written.

    >>> from pfgm import PoissonFlow
    >>> flow = PoissonFlow((2,), data_norm=1.0)
    >>> figure = flow_lines(flow, flow.empirical(torch.eye(2)), 5, steps=8)
    >>> len(figure.axes[0].lines)
    5
    """
    if tuple(flow.shape) != (2,):
        raise ValueError(f"flow has shape {tuple(flow.shape)}; allowed is (2,).")
    if n < 1:
        raise ValueError(f"n is {n}; allowed are whole numbers from 1.")
    if z_top is not None and not flow.z_min < z_top <= flow.z_max:
        raise ValueError(f"z_top is {z_top}; allowed is from {flow.z_min} to {flow.z_max}.")
    known = None if data is None else _points("data", data)
    seen: list[tuple[float, Tensor]] = []
    samples = flow.sample(
        net,
        n,
        solver=solver,
        steps=steps,
        generator=generator,
        callback=lambda info: seen.append((info["z"], info["x"].clone())),
    )
    heights = [*(z for z, _ in seen), flow.z_min]
    ways = _finite("samples of the flow", torch.stack([*(x for _, x in seen), samples]))
    if z_top is not None:
        heights, ways = _below(z_top, heights, ways)

    above = TITLE + MARGIN if title else 0
    width = max(_SPACE[0], text_width(title or "", TITLE) + 2 * MARGIN)
    figure = new_figure(width, _SPACE[1] + above)
    # The drawing leaves much of its square empty.
    side = _SPACE[0] - 36
    axes = add_axes(
        figure, (width - side) / 2 - 24, -24, side, side, projection="3d", computed_zorder=False
    )
    if known is not None:
        axes.scatter(*known.T, 0, s=_dot(known), color="#AAAAAA", linewidths=0, depthshade=False)
    end = ways[-1, :, 0]
    share = (end - end.min()) / (end.max() - end.min()).clamp(min=torch.finfo(end.dtype).tiny)
    colours = _shades("plasma", 0, 0.88)(share.numpy())
    for i, colour in enumerate(colours):
        axes.plot(*ways[:, i].T, heights, color=colour, linewidth=0.8, alpha=0.8)
    axes.scatter(*ways[-1].T, heights[-1], s=8, c=colours, linewidths=0, depthshade=False)
    _space(axes, heights[0])
    add_title(figure, title)
    save(figure, path)
    return figure


class _Window(NamedTuple):
    """A square part of the plane."""

    x: float
    y: float
    half: float

    @classmethod
    def around(cls, points: Tensor, room: float = _ROOM) -> _Window:
        low, high = points.amin(0), points.amax(0)
        middle = (low + high) / 2
        half = float((high - low).max()) * (0.5 + room)
        # A single point, or several in one place, has no extent.
        return cls(float(middle[0]), float(middle[1]), half if half > 0 else 1.0)

    def grid(self) -> tuple[Any, Any, Tensor]:
        """Coordinates along both sides, and the points (_GRID², 2), row by row."""
        x = torch.linspace(self.x - self.half, self.x + self.half, _GRID, dtype=torch.float64)
        y = torch.linspace(self.y - self.half, self.y + self.half, _GRID, dtype=torch.float64)
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        return x.numpy(), y.numpy(), torch.stack([columns, rows], 2).flatten(0, 1)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        x, y, half = self
        return x - half, x + half, y - half, y + half

    def show(self, axes: Any) -> None:
        axes.axis(self.extent)


def _points(name: str, points: Tensor) -> Tensor:
    _check_floating(name, points)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; allowed is (n, 2) with n ≥ 1.")
    return _finite(name, points)


def _paths(paths: Tensor) -> Tensor:
    _check_floating("paths", paths)
    if paths.ndim != 3 or paths.shape[2] != 2 or len(paths) < 2 or paths.shape[1] == 0:
        raise ValueError(
            f"paths has shape {tuple(paths.shape)}; allowed is (steps, n, 2) with steps ≥ 2 and "
            "n ≥ 1."
        )
    return _finite("paths", paths)


def _below(top: float, heights: list[float], ways: Tensor) -> tuple[list[float], Tensor]:
    """The part of the ways (steps, n, 2) from this height down, cut between two steps."""
    first = next(i for i, z in enumerate(heights) if z <= top)
    if heights[first] == top:
        return heights[first:], ways[first:]
    share = (heights[first - 1] - top) / (heights[first - 1] - heights[first])
    cut = torch.lerp(ways[first - 1], ways[first], share)
    return [top, *heights[first:]], torch.cat([cut.unsqueeze(0), ways[first:]])


def _check_floating(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise TypeError(f"{name} has dtype {values.dtype}; allowed are floating dtypes.")


def _finite(name: str, values: Tensor) -> Tensor:
    """As float64 on the CPU."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinity; only finite values are allowed.")
    return values.detach().cpu().double()


def _levels(
    name: str, given: Iterable[float] | None, data: Tensor, shares: tuple[float, ...]
) -> list[float]:
    if given is None:
        spread = float((data - data.mean(0)).square().sum(1).mean().sqrt())
        return [share * (spread if spread > 0 else 1.0) for share in shares]
    levels = [float(level) for level in given]
    _check_levels(name, levels)
    return levels


def _check_levels(name: str, levels: list[float]) -> None:
    if not levels:
        raise ValueError(f"{name} is empty; allowed is at least one value.")
    for level in levels:
        if not (level > 0 and math.isfinite(level)):
            raise ValueError(f"{name} holds {level}; allowed are finite values above 0.")


def _log_potential(x: Tensor, data: Tensor, sigma: float, D: float) -> Tensor:
    """log Φ (B,) in 2 + D dimensions, at r = sigma √D, up to a constant."""

    def logarithm(squared: Tensor) -> Tensor:
        if math.isinf(D):
            return (-squared / (2 * sigma**2)).logsumexp(1)
        return (-D / 2 * (squared + D * sigma**2).log()).logsumexp(1)

    parts = x.split(max(1, _CHUNK // len(data)))
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([logarithm(torch.cdist(p, data, compute_mode=exact).square()) for p in parts])


def _steps(values: Tensor, count: int) -> list[float]:
    """Evenly spaced values between the extremes, without these."""
    inner: list[float] = torch.linspace(*values.aminmax(), count + 2).tolist()[1:-1]
    return inner


def _shaped(values: Tensor) -> Any:
    return values.view(_GRID, _GRID).numpy()


def _dot(data: Tensor) -> float:
    """The size of a data point's mark: many are drawn smaller."""
    return min(12.0, max(1.5, 1200 / len(data)))


def _shades(name: str, low: float, high: float) -> Any:
    """A part of one of matplotlib's scales."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[name](torch.linspace(low, high, 256).numpy()))


def _panels(
    names: list[str], title: str | None, size: int = _PANEL, bar: bool = False
) -> tuple[Figure, list[Any]]:
    """A row of square panels with their names above, and room for a colour bar."""
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


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in a range, with 2 and 5 between them where it has not two of these."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if high < 100 * low else (1,)
    return [m * 10.0**e for e in exponents for m in leading if low <= m * 10.0**e <= high]


def _colour_bar(figure: Figure, shades: Any, name: str, size: int, ticks: Iterable[float]) -> None:
    """Right of the panels."""
    right = figure.axes[-1].get_position().x1 * figure.get_size_inches()[0] * DPI
    axes = add_axes(figure, right + _GAP, MARGIN, _BAR, size)
    shown = list(ticks)
    bar = figure.colorbar(shades, cax=axes)
    bar.ax.minorticks_off()
    bar.set_ticks(shown, labels=[f"{tick:g}".replace("-", "−") for tick in shown])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10 * 72 / DPI, color="#999999", labelcolor=INK, length=2)
    bar.set_label(name, **{**style(11), "labelpad": 2})


def _space(axes: Any, top: float) -> None:
    """A plain floor, and the three axes without their grey walls."""
    axes.set_zlim(0, top)
    axes.set_box_aspect((1, 1, 0.8))
    axes.view_init(elev=20, azim=-58)
    for axis, name in ((axes.xaxis, "x₁"), (axes.yaxis, "x₂"), (axes.zaxis, "z")):
        axis.set_label_text(name, **style(12))
        axis.labelpad = -2
        axis.pane.set(facecolor="white", edgecolor="#DDDDDD", alpha=1)
        axis.line.set_color("#BBBBBB")
    axes.grid(False)
    axes.tick_params(labelsize=10 * 72 / DPI, colors="#999999", labelcolor="#777777", pad=-1)
