"""The field, the density and the potential of 2-D data, drawn in the plane."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.files import StrPath
from ..core.arithmetic import squared_distances
from ..core.weights import law, unit_radius
from ..functional import field_fn, log_density
from ..functional.field import checked_dimensions
from .figures import INK, add_colour_bar, part_of_colormap, save, square_panels
from .points import DATA_COLOUR, GRID, Window, check_levels, checked_points, mark_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = 240  # pixels
_MAX_DISTANCES = 2**22  # in memory at once
_DEPTH = 6  # the shades span this many nats below the highest density


def field_lines(
    data: Tensor,
    path: StrPath | None = None,
    *,
    z: Iterable[float] | None = None,
    title: str | None = None,
) -> Figure:
    """The Poisson field of points in the plane, at heights z above them.

    Every point is a charge at z = 0 in three dimensions. Each panel shows the plane at one z. Lines
    follow the field within the plane; their arrows point toward the data, the direction of samples
    as z falls. Shades lie between equipotentials, which are the contours of

        Φ(x, z) = 1/n Σ_j (‖x − x_j‖² + z²)^(−1/2)

    evenly spaced in log Φ. The lines cross them at right angles, because −∇Φ is the field (PFGM,
    arXiv 2209.11178, for N = 2 without its constant). The field's component along z is not drawn.

    Args:
        data: (n, 2), floating, n ≥ 1.
        z: heights above 0, one for each panel, in the units of the data. None takes 1/20, 1/4 and
            1 times the root mean square distance of the data from their mean.

    >>> circle = torch.linspace(0, 6.28, 40)
    >>> figure = field_lines(torch.stack([circle.cos(), circle.sin()], 1), z=[0.1, 1.0])
    >>> [axes.get_title() for axes in figure.axes]
    ['z = 0.1', 'z = 1']
    """
    data = checked_points(data)
    heights = _noise_levels("z", z, data, (0.05, 0.25, 1.0))
    window = Window.around(data)
    figure, panels = square_panels([f"z = {value:.3g}" for value in heights], title, _PANEL)
    x, y, points = window.grid()
    for axes, value in zip(panels, heights, strict=True):
        potential = _log_potential(points, data, value, D=1.0)
        levels = _contour_values(potential, 14)
        shades = {"cmap": part_of_colormap("Blues", 0.02, 0.75), "extend": "both"}
        axes.contourf(x, y, _on_grid(potential), levels=levels, **shades)
        along, _ = field_fn(points, value, data, gamma=0.0)
        axes.streamplot(
            x,
            y,
            _on_grid(along[:, 0]),
            _on_grid(along[:, 1]),
            color=INK,
            density=1.0,
            linewidth=0.7,
            arrowsize=0.7,
        )
        axes.scatter(*data.T, s=mark_size(data), color=DATA_COLOUR, linewidths=0, zorder=3)
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
    """Density and potential of points in the plane, at several noise levels.

    Shades are :func:`pfgm.log_density`, the density of samples at that level, relative to its
    highest value in the panel. Lines are equipotentials: contours of the potential of the points in
    2 + D dimensions at r = sigma √D (PFGM++, arXiv 2302.04265), evenly spaced in

        log Φ = log Σ_j (‖x − x_j‖² + r²)^(−D/2),     log Σ_j exp(−‖x − x_j‖²/(2 sigma²)) at D = ∞

    Shades and lines differ: the density is the field's component across the plane, while the
    gradient of the potential is its component within the plane. At D = ∞ they are the same.

    Args:
        data: (n, 2), floating, n ≥ 1.
        sigma: noise levels above 0, one for each panel, in the units of the data (z at D = 1). None
            takes 0.05, 0.15, 0.4 and 1 times the root mean square distance of the data from their
            mean.
        D: number of augmented dimensions, any positive number or infinity.

    >>> figure = equipotentials(torch.eye(2), sigma=[0.1, 1.0], D=float("inf"))
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['σ = 0.1', 'σ = 1']
    """
    data = checked_points(data)
    noise = _noise_levels("sigma", sigma, data, (0.05, 0.15, 0.4, 1.0))
    D = checked_dimensions(D)
    window = Window.around(data)
    symbol = "z" if D == 1 else "σ"
    figure, panels = square_panels([f"{symbol} = {v:.3g}" for v in noise], title, _PANEL, bar=True)
    x, y, points = window.grid()
    for axes, value in zip(panels, noise, strict=True):
        density = log_density(points, data, sigma=value, D=D)
        shades = axes.imshow(
            _on_grid(density - density.max()),
            cmap=part_of_colormap("magma", 0, 0.85),
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
            _on_grid(potential),
            levels=_contour_values(potential, 12),
            colors="white",
            alpha=0.7,
            linewidths=0.7,
            linestyles="solid",
        )
        window.show(axes)
    add_colour_bar(figure, shades, "log density − maximum", _PANEL, range(-_DEPTH, 1, 2))
    save(figure, path)
    return figure


def _noise_levels(
    name: str, levels: Iterable[float] | None, data: Tensor, multiples: tuple[float, ...]
) -> list[float]:
    """The levels, checked; for None, these multiples of the spread of the data."""
    if levels is None:
        spread = float((data - data.mean(0)).square().sum(1).mean().sqrt())
        return [factor * (spread if spread > 0 else 1.0) for factor in multiples]
    result = [float(level) for level in levels]
    check_levels(name, result)
    return result


def _log_potential(x: Tensor, data: Tensor, sigma: float, D: float) -> Tensor:
    """log Φ (B,) in 2 + D dimensions at r = sigma √D, up to a constant."""
    # The score of a reference with no dimensions but the augmented ones.
    weights, radius = law(D, 0), x.new_tensor(sigma * unit_radius(D))
    parts = x.split(max(1, _MAX_DISTANCES // len(data)))
    scores = (weights.score(squared_distances(part, data), radius) for part in parts)
    return torch.cat([each.logsumexp(1) for each in scores])


def _contour_values(values: Tensor, count: int) -> list[float]:
    """count evenly spaced values between the extremes, without the extremes."""
    inner: list[float] = torch.linspace(*values.aminmax(), count + 2, device="cpu").tolist()[1:-1]
    return inner


def _on_grid(values: Tensor) -> Any:
    """Values (GRID²,) as rows and columns of the window's grid."""
    return values.view(GRID, GRID).numpy()
