"""Grids are checked pixel by pixel, as Pillow reads them; other pictures by the contents of their
figures. The checks of their arguments are in tests/test_arguments.py."""

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pfgm import PoissonFlow, plotting
from pfgm.plotting import plane

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
RendererAgg = pytest.importorskip("matplotlib.backends.backend_agg").RendererAgg

MARGIN, GAP = 10, 4
ROOT = Path(__file__).resolve().parents[2]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Refused = Callable[[Callable[[], object], str], None]


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def ring(n: int = 40) -> Tensor:
    angle = torch.arange(n) / n * math.tau
    return torch.stack([angle.cos(), angle.sin()], 1)


def frames_of(path: Path) -> list[Pixels]:
    with Image.open(path) as image:
        assert image.format == path.suffix[1:].upper()
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.array(image.convert("RGB")))
        return frames


def panel(pixels: Pixels, row: int, column: int, size: tuple[int, int]) -> Pixels:
    """A panel by its place, counted from the lower edge, which no header moves."""
    height, width = size
    bottom = len(pixels) - MARGIN - row * (height + GAP)
    left = MARGIN + column * (width + GAP)
    return pixels[bottom - height : bottom, left : left + width]


def shown(image: Tensor, scale: int) -> Pixels:
    """What a panel must look like: an image (C, H, W) as RGB bytes, each pixel a square."""
    levels = np.rint((np.clip(image.numpy(), -1, 1) + 1) * 127.5).astype(np.uint8)
    rgb = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
    return np.kron(rgb, np.ones((scale, scale, 1), dtype=np.uint8))


def boxes(figure: Any, texts: Any) -> list[Any]:
    renderer: Any = RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi)
    return [text.get_window_extent(renderer) for text in texts]


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_every_panel_shows_its_image_exactly(tmp_path: Path, channels: tuple[int, ...]) -> None:
    images = uniform(5, *channels, 4, 5) * 1.5
    plotting.image_grid(images, tmp_path / "a.png", columns=3, scale=7)
    (pixels,) = frames_of(tmp_path / "a.png")
    expected = np.full((2 * 28 + GAP + 2 * MARGIN, 3 * 35 + 2 * GAP + 2 * MARGIN, 3), 255, np.uint8)
    for i, image in enumerate(images.view(5, -1, 4, 5)):
        panel(expected, 1 - i // 3, i % 3, (28, 35))[:] = shown(image, 7)
    np.testing.assert_array_equal(pixels, expected)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    plotting.image_grid(levels, tmp_path / "a.png", scale=1)
    plotting.image_grid(levels, tmp_path / "a.JPEG", scale=1)
    assert frames_of(tmp_path / "a.JPEG")[0].shape == frames_of(tmp_path / "a.png")[0].shape
    drawn = panel(frames_of(tmp_path / "a.png")[0], 0, 0, (16, 16))[..., 0]
    np.testing.assert_array_equal(drawn, levels[0, 0])


@pytest.mark.parametrize(
    ("n", "columns", "size", "expected"),
    [
        (10, None, 8, (3, 4)),
        (16, None, 8, (4, 4)),
        (3, 8, 8, (1, 3)),
        (1, None, 256, (3, 3)),
    ],
)
def test_rows_and_columns(
    n: int, columns: int | None, size: int, expected: tuple[int, int]
) -> None:
    """The default scale never shrinks an image."""
    figure = plotting.image_grid(torch.zeros(n, 1, size, size), columns=columns)
    width, height = np.rint(figure.get_size_inches() * 100).astype(int) - 2 * MARGIN + GAP
    assert (height // (72 + GAP), width // (72 + GAP)) == expected


def test_trajectory_panels_are_divided_by_their_largest_value(tmp_path: Path) -> None:
    images = uniform(3, 2, 1, 4, 4) * torch.tensor([300.0, 2.0, 0.5]).view(3, 1, 1, 1, 1)
    images.requires_grad_()
    figure = plotting.trajectory_grid(
        images, [38.57, 1, 0.001], tmp_path / "a.png", scale=9, symbol="σ"
    )
    images = images.detach()
    (pixels,) = frames_of(tmp_path / "a.png")
    for step in range(3):
        for sample in range(2):
            image = images[step, sample]
            expected = shown(image / max(1.0, float(image.abs().max())), 9)
            drawn = panel(pixels, 1 - sample, step, (36, 36))
            np.testing.assert_allclose(drawn.astype(int), expected.astype(int), atol=step < 2)
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == ["σ = 38.6", "σ = 1", "σ = 0.001"]
    assert [text.get_position()[0] for text in texts] == [18, 58, 98]


@pytest.mark.parametrize("steps", [1, 12])
def test_labels_and_a_title_stand_above_the_panels_and_apart(tmp_path: Path, steps: int) -> None:
    figure = plotting.trajectory_grid(
        torch.ones(steps, 1, 8, 8), [0.000123456] * steps, tmp_path / "a.png", scale=5, title="Way"
    )
    labels = boxes(figure, figure.axes[0].texts)
    assert all(box.width <= 40 for box in labels)
    assert all(left.x1 < right.x0 for left, right in pairwise(labels))
    dark = np.any(frames_of(tmp_path / "a.png")[0] < 128, axis=2)
    header = dark[: -MARGIN - 40]
    assert header.sum() == dark.sum()
    assert np.count_nonzero(np.diff(header.any(1).astype(int)) == 1) == 2


def test_texts_around_a_grid(tmp_path: Path) -> None:
    images, side = uniform(5, 8, 8), ["first row", "second", "3"]
    header = ["a", "the longest name of a label that anyone would think of"]
    figure = plotting.image_grid(images, tmp_path / "x.png", columns=2, side=side, header=header)
    axes = figure.axes[0]
    first, shortened, *others = (text.get_text() for text in axes.texts)
    assert [first, shortened[-1], *others] == ["a", "…", *side]
    assert boxes(figure, axes.texts)[0].x1 < boxes(figure, axes.texts)[1].x0
    beside = boxes(figure, axes.texts[2:])
    assert all(MARGIN <= box.x0 < box.x1 < axes.get_window_extent().x0 for box in beside)
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(beside))
    plotting.image_grid(images, tmp_path / "y.png", columns=2, header=header)
    (plain,), (named,) = frames_of(tmp_path / "y.png"), frames_of(tmp_path / "x.png")
    assert np.array_equal(named[:, MARGIN - plain.shape[1] :], plain[:, MARGIN:])


def test_an_animation_ends_with_the_picture_of_its_samples(tmp_path: Path) -> None:
    images = uniform(4, 6, 1, 8, 8) * torch.tensor([40.0, 5.0, 1.0, 1.0]).view(4, 1, 1, 1, 1)
    images[-1, :, :, 0, :3] = 1.5  # samples overshoot white in single pixels
    words: dict[str, Any] = {"columns": 3, "header": ["a", "b", "c"]}
    titles = ["z = 40", "z = 5", "z = 0.0123", "end"]
    plotting.animation(images, titles, tmp_path / "x.gif", **words)
    frames = frames_of(tmp_path / "x.gif")
    title = "end".center(len(titles[2]))
    plotting.image_grid(images[-1], tmp_path / "x.png", title=title, **words)
    expected = frames_of(tmp_path / "x.png")[0].astype(int)
    assert [frame.shape for frame in frames] == [expected.shape] * 4
    assert np.abs(frames[-1] - expected).max() <= 8  # a GIF has 256 colours
    assert np.abs(frames[0] - expected).max() > 50


def test_frames_are_spaced_by_what_changes(tmp_path: Path) -> None:
    """Ten equal images, and then ten that brighten from 0.1 to 1."""
    values = torch.cat([torch.zeros(10), torch.arange(1, 11) / 10])
    images = values.view(20, 1, 1, 1, 1).expand(20, 1, 1, 8, 8)
    plotting.animation(images, ["x"] * 20, tmp_path / "x.gif", frames=6, seconds=0.2)
    seen = [frame[len(frame) // 2 + 10, frame.shape[1] // 2, 0] for frame in
            frames_of(tmp_path / "x.gif")]  # fmt: skip
    assert seen == pytest.approx([127.5 * (1 + k / 5) for k in range(6)], abs=3)
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.info["duration"], gif.info["loop"]) == (200, 0)


def straight_paths() -> tuple[Tensor, list[float]]:
    """Three samples on straight ways into the corners of a triangle."""
    levels = [4.0, 2.0, 1.0, 0.5]
    ends = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    return torch.stack([ends * level * 2 for level in levels]), levels


def recorded(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[Any, ...]]:
    """Records the positional arguments of each call of a method of axes, and calls it."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    calls, original = [], getattr(axes, method)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(args)
        return original(self, *args, **options)

    monkeypatch.setattr(axes, method, call)
    return calls


@pytest.fixture(autouse=True)
def few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Field lines take longest to draw."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    draw = axes.streamplot
    monkeypatch.setattr(axes, "streamplot", lambda *a, **o: draw(*a, **o | {"density": 0.2}))


def draw_space(data: Tensor, path: Path | None = None, **options: Any) -> Any:
    flow = PoissonFlow((2,), data_norm=1.0)
    options = {"steps": 5, "generator": torch.Generator().manual_seed(0), **options}
    return plotting.flow_lines(flow, flow.empirical(ring()), 4, path, data=data, **options)


OF_DATA: dict[str, Callable[..., Any]] = {
    "field": lambda data, path=None, **o: plotting.field_lines(data, path, **{"z": [0.3], **o}),
    "levels": lambda data, path=None, **o: plotting.equipotentials(
        data, path, **{"sigma": [0.3], **o}
    ),
    "paths": lambda data, path=None, **o: plotting.trajectory_plot(
        *straight_paths(), path, data=data, **o
    ),
    "space": draw_space,
}
FIGURES: dict[str, Callable[..., Any]] = {
    **OF_DATA,
    "curve": lambda _, path=None, **o: plotting.quality_curve({"a": ([4, 8], [2, 1])}, path, **o),
    "grid": lambda _, path=None, **o: plotting.image_grid(uniform(4, 8, 8), path, **o),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_saved_as_they_measure_with_all_text_inside(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, tmp_path: Path, name: str
) -> None:
    """Without pyplot, which would open windows and keep every figure; twice with the same bytes."""
    monkeypatch.delattr("matplotlib.pyplot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    draw, data, title = FIGURES[name], ring().requires_grad_(), "A title of some length " * 3
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        figure = draw(data, path, title=title)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (pixels,) = frames_of(path)
    assert pixels.shape[:2] == tuple(np.rint(figure.get_size_inches() * 100)[::-1])
    assert len(np.unique(pixels)) > 10
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all(), "nothing is cut off"
    assert figure.texts[0].get_text() == title
    assert torch.equal(data, ring())
    picture = figure._repr_png_()  # which IPython shows
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert pickle.loads(pickle.dumps(figure))._repr_png_() == picture
    draw(torch.tensor([[3.0, -2.0]]))
    refused(lambda: draw(data, tmp_path / "a.svg"), "path must end in .png or .jpg, got ….")
    refused(lambda: draw(data, tmp_path / "no" / "a.png"), "OSError: …is not an existing folder.")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "pfgm.plotting.shown_figure", raising=False)
    with pytest.raises(ImportError, match=r"matplotlib.*pip install '\.\[demo\]'"):
        draw(data)


@pytest.mark.parametrize("D", [1.0, 2.5, math.inf])
def test_the_potential_agrees_with_loops(monkeypatch: pytest.MonkeyPatch, D: float) -> None:
    x, data = uniform(7, 2).double() * 3, uniform(5, 2).double()
    monkeypatch.setattr(plane, "_MAX_DISTANCES", 10)
    potential = plane._log_potential(x, data, 0.7, D)
    for point, value in zip(x.tolist(), potential.tolist(), strict=True):
        squares = [math.dist(point, other) ** 2 for other in data.tolist()]
        if math.isinf(D):
            expected = math.fsum(math.exp(-s / (2 * 0.49)) for s in squares)
        else:
            expected = math.fsum((s + D * 0.49) ** (-D / 2) for s in squares)
        assert value == pytest.approx(math.log(expected), rel=1e-12)


def test_the_lines_cross_the_equipotentials_at_right_angles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The drawn lines follow the numerical gradient of the drawn shades."""
    streams, shades = recorded(monkeypatch, "streamplot"), recorded(monkeypatch, "contourf")
    figure = plotting.field_lines(ring(), z=[0.123456, 1])
    assert [axes.get_title() for axes in figure.axes] == ["z = 0.123", "z = 1"]
    for axes, (x, y, u, v), (_, _, potential) in zip(figure.axes, streams, shades, strict=True):
        slope_y, slope_x = np.gradient(potential, y, x)
        inner = (slice(2, -2), slice(2, -2))
        along = u * slope_x + v * slope_y
        cosine = (along / np.hypot(u, v) / np.hypot(slope_x, slope_y))[inner]
        weak = np.hypot(slope_x, slope_y)[inner] < 0.05
        assert weak.mean() < 0.2
        assert cosine[~weak].min() > 0.95, "toward higher potential: toward the data"
        assert np.allclose(axes.collections[-1].get_offsets(), ring())
        assert axes.get_xlim() == pytest.approx((-1.6, 1.6), abs=0.01)


def test_default_levels_scale_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.axes.Axes.streamplot", lambda *_, **options: None)
    figure = plotting.field_lines(ring() * 100 + 7)
    assert [axes.get_title() for axes in figure.axes] == ["z = 5", "z = 25", "z = 100"]
    assert len(plotting.equipotentials(ring() * 100).axes) == 5


@pytest.mark.parametrize(("D", "symbol"), [(1.0, "z"), (math.inf, "σ")])
def test_equipotentials_shows_the_log_density(
    monkeypatch: pytest.MonkeyPatch, D: float, symbol: str
) -> None:
    shades, lines = recorded(monkeypatch, "imshow"), recorded(monkeypatch, "contour")
    figure = plotting.equipotentials(ring(), sigma=[0.2, 0.5], D=D)
    titles = [f"{symbol} = 0.2", f"{symbol} = 0.5"]
    assert [axes.get_title() for axes in figure.axes[:2]] == titles
    assert figure.axes[2].get_ylabel() == "log density − maximum"
    for (density,), (x, y, potential) in zip(shades, lines, strict=True):
        assert density.max() == 0
        # The middle of the ring, and a point of it.
        row, column = np.abs(y).argmin(), np.abs(x - 1).argmin()
        assert density[row, column] > density[row, np.abs(x).argmin()]
        if math.isinf(D):
            np.testing.assert_allclose(potential - density, (potential - density)[0, 0], atol=1e-9)


@pytest.mark.parametrize("data", [ring(), None])
def test_trajectory_plot_draws_every_segment_twice(data: Tensor | None) -> None:
    paths, levels = straight_paths()
    figure = plotting.trajectory_plot(paths, levels, data=data, symbol="σ")
    whole, near, bar = figure.axes
    assert bar.get_ylabel() == "σ"
    assert [label.get_text() for label in bar.get_yticklabels()][:3] == ["0.5", "1", "2"]
    for axes in (whole, near):
        lines, *known, ends = axes.collections
        segments = np.array(lines.get_segments())
        assert segments.shape == (9, 2, 2)
        np.testing.assert_allclose(segments[:3, 0], paths[0])
        np.testing.assert_allclose(segments[-3:, 1], paths[-1])
        expected = np.repeat(np.sqrt([8, 2, 0.5]), 3)
        np.testing.assert_allclose(lines.get_array(), expected)
        assert (lines.norm.vmin, lines.norm.vmax) == (0.5, 4)
        assert [len(dots.get_offsets()) for dots in known] == ([] if data is None else [40])
        np.testing.assert_allclose(ends.get_offsets(), paths[-1])
    assert whole.get_xlim()[1] > 8
    assert near.get_xlim()[1] == pytest.approx(1.6, abs=0.01)
    (_, _, bar) = plotting.trajectory_plot(paths, [100, 10, 1, 1e-3]).axes
    ticks = [label.get_text() for label in bar.get_yticklabels()][:4]
    assert ticks == ["0.001", "0.01", "0.1", "1"]


@pytest.mark.parametrize("top", [None, 0.7])
def test_flow_lines_are_the_ways_of_the_samples(top: float | None) -> None:
    flow = PoissonFlow((2,), data_norm=1.0)
    net = flow.empirical(ring())
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    seen: list[tuple[float, Tensor]] = []
    samples = flow.sample(
        net,
        6,
        steps=20,
        generator=draw[0],
        callback=lambda info: seen.append((info["z"], info["x"])),
    )
    figure = plotting.flow_lines(flow, net, 6, data=ring(), steps=20, generator=draw[1], z_top=top)
    (axes,) = figure.axes
    assert len(axes.lines) == 6
    below = [(z, x) for z, x in seen if top is None or z < top]
    for i, line in enumerate(axes.lines):
        x, y, z = line.get_data_3d()
        assert len(z) == len(below) + 1 + (top is not None)
        assert (x[-1], y[-1]) == pytest.approx(samples[i].tolist())
        assert (z[0], z[-1]) == pytest.approx((top or flow.z_max, flow.z_min))
        count = len(below)
        np.testing.assert_allclose(z[-1 - count : -1], [level for level, _ in below])
        np.testing.assert_allclose(x[-1 - count : -1], [float(point[i, 0]) for _, point in below])
        if top is not None:
            (z0, before), (z1, after) = seen[-1 - count], seen[-count]
            share = (z0 - top) / (z0 - z1)
            expected = before[i] + share * (after[i] - before[i])
            assert (x[0], y[0]) == pytest.approx(expected.tolist(), rel=1e-5)
    assert len({tuple(line.get_color()) for line in axes.lines}) > 3


def test_a_far_line_is_cut_where_it_enters_the_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, data = PoissonFlow((2,), data_norm=1.0), ring()
    start = torch.tensor([[400.0, 0.0], [4.0, 4.0], [4.0, -4.0], [-4.0, 4.0], [-4.0, -4.0]])
    monkeypatch.setattr(flow, "prior", lambda *args, **options: start)
    (axes,) = plotting.flow_lines(flow, flow.empirical(data), 5, data=data, steps=20).axes
    for limits in (axes.get_xlim(), axes.get_ylim()):
        assert limits == pytest.approx((-8.32, 8.32), rel=0.01)
    x, y, z = axes.lines[0].get_data_3d()
    assert (x[0], y[0]) == pytest.approx((axes.get_xlim()[1], 0), abs=1e-3)
    assert flow.z_min == z[-1] < z[0] < flow.z_max
    assert (x[1:] < x[0]).all()
    for line, point in zip(axes.lines[1:], start[1:], strict=True):
        x, y, z = line.get_data_3d()
        assert (x[0], y[0], z[0]) == pytest.approx((*point.tolist(), flow.z_max))
        assert len(z) == 21
    paths = torch.stack([start, start / 2, data[:5]])
    whole, _ = plotting.trajectory_plot(paths, [4, 2, 1], data=data).axes[:2]
    assert whole.get_xlim() == pytest.approx((-8.32, 8.32), rel=0.01)


def test_quality_curve_draws_its_numbers_in_order_of_evaluations() -> None:
    curves: Any = {
        "euler": ([20, 5, 10], [1.0, 3.0, 1.4], [0.1, 0.3, 0.2]),
        "heun": ((9, 19), torch.tensor([2.0, 1.0])),
    }
    figure = plotting.quality_curve(curves, xlabel="NFE", ylabel="distance")
    (axes,) = figure.axes
    euler, heun = axes.lines
    np.testing.assert_array_equal(euler.get_xydata(), [[5, 3], [10, 1.4], [20, 1]])
    np.testing.assert_array_equal(heun.get_xydata(), [[9, 2], [19, 1]])
    assert (euler.get_color(), euler.get_marker()) != (heun.get_color(), heun.get_marker())
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("NFE", "distance")
    (band,) = axes.collections
    corners = {tuple(np.round(point, 9)) for point in band.get_paths()[0].vertices}
    assert {(5, 2.7), (5, 3.3), (20, 0.9), (20, 1.1)} <= corners


def test_names_of_curves_and_ticks_stand_apart() -> None:
    numbers = [*range(1, 30), 100, 101, 1000]
    curves = {name: (numbers, [2.0] * 31 + [1 + i / 1000]) for i, name in enumerate("abcdefg")}
    figure = plotting.quality_curve(curves)
    (axes,) = figure.axes
    ticks = boxes(figure, axes.get_xticklabels())
    assert len(ticks) > 6
    assert all(left.x1 < right.x0 for left, right in pairwise(ticks))
    names = boxes(figure, axes.texts)
    assert [text.get_text() for text in axes.texts] == list("abcdefg")
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(names))
    area = axes.get_window_extent()
    assert all(area.y0 - 8 <= box.y0 < box.y1 <= area.y1 + 8 for box in names)
    colours = [line.get_color() for line in axes.lines]
    assert [text.get_color() for text in axes.texts] == colours
    assert len(set(colours)) == 7


@pytest.mark.parametrize(
    ("values", "log_y", "expected"),
    [
        ([0.9, 5.0], True, ["1", "2", "3", "4"]),
        ([0.002, 300], True, ["0.01", "100"]),
        ([3e-5, 1.5e-5], True, ["2e-05", "3e-05"]),
        ([1e9 + 2, 1e9], False, ["1000000000.50", "1000000001.50"]),
    ],
)
def test_a_quality_axis_leaves_room_for_its_numbers_and_shows_every_band(
    values: list[float], log_y: bool, expected: list[str]
) -> None:
    spread = ([values[0] / 2, 2 * values[1]],) if log_y else ()
    figure = plotting.quality_curve({"a": ([1, 10], values, *spread)}, log_y=log_y, ylabel="y")
    (axes,) = figure.axes
    figure.draw(RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi))
    assert set(expected) <= {t.get_text() for t in axes.yaxis.get_ticklabels(which="both")}
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert boxes(figure, [axes.yaxis.label])[0].x0 >= 0
    if log_y:  # a band that reaches below 0 goes down to the edge of the axes
        low, high = axes.get_ylim()
        assert 0.1 * min(values) < low < min(values) < max(values) < high
        assert (axes.collections[0].get_paths()[0].vertices[:, 1] > 0).all()


@pytest.mark.slow
def test_the_gallery_draws_all_its_pictures(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = ROOT / "examples" / "gallery.py"
    subprocess.run(
        [sys.executable, script, "--out", tmp_path, "--quick"], check=True, env=environment
    )
    stored = sorted((ROOT / "docs" / "images").glob("gallery-*.png"))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in stored}
    for path in stored:
        assert path.stat().st_size < 150_000, path
        assert len(np.unique(frames_of(tmp_path / path.name)[0])) > 50


IMAGES, RING = torch.zeros(5, 1, 8, 8), ring()
PATHS, LEVELS = straight_paths()
FLOW, SOLID = (PoissonFlow(shape, data_norm=1.0) for shape in ((2,), (3,)))
NET = FLOW.empirical(RING)


def animate(images: Tensor = IMAGES[:2, None], titles: str = "ab", path: str = "x.gif") -> None:
    plotting.animation(images, titles, path)


def curve(*columns: list[float], **options: Any) -> None:
    plotting.quality_curve({"a": columns}, **options)  # type: ignore[dict-item]


SHAPES: list[tuple[Callable[[Tensor], object], str, list[tuple[int, ...]]]] = [
    (plotting.image_grid, "(n, C, H, W) …", [(8, 8), (2, 2, 8, 8), (0, 1, 8, 8)]),
    (lambda x: plotting.trajectory_grid(x, [1]), "(steps, n, C, H, W) …", [(2, 8, 8)]),
    (animate, "(frames, n, …", [(2, 8, 8)]),
    (lambda x: plotting.trajectory_plot(x, [1.0]), "(steps, n, 2) …", [(1, 3, 2), (4, 3, 3)]),
    *((draw, "(n, 2) with n ≥ 1", [(0, 2), (4, 3)]) for draw in OF_DATA.values()),
]
OTHERS: list[tuple[Callable[[], object], str]] = [
    (lambda: plotting.image_grid(IMAGES, columns=3, header="ab"), "header must have 3…got 2."),
    (lambda: plotting.image_grid(IMAGES, columns=2, side="ab"), "side must have 3…got 2."),
    (lambda: plotting.trajectory_grid(IMAGES[:, None], [1]), "z must have 5 values,…got 1."),
    (lambda: plotting.field_lines(RING, z=[]), "z must hold at least one value, got none."),
    (lambda: plotting.field_lines(RING, z=[1, 0.0]), "z must be a number above 0…got 0.0."),
    (lambda: plotting.equipotentials(RING, sigma=[-1]), "sigma must be…above 0…got -1.0."),
    (lambda: plotting.equipotentials(RING, D=-1.0), "D must be a positive…got -1.0."),
    (lambda: plotting.trajectory_plot(PATHS, [1.0]), "levels must have 4 values,…got 1."),
    (lambda: plotting.trajectory_plot(PATHS, [1, 1, 1, 0.0]), "levels must be…got 0.0."),
    (lambda: plotting.flow_lines(SOLID, NET, 5), "flow must have sample shape (2,), got (3,)."),
    (lambda: plotting.flow_lines(FLOW, NET, 5, z_top=FLOW.z_min), "z_top must be from…."),
    (
        lambda: plotting.flow_lines(FLOW, NET, 5, z_top=1e9),
        "z_top must be from…, got 1000000000.0.",
    ),
    (lambda: plotting.flow_lines(FLOW, NET, 5, z_top=math.nan), "z_top must be from…got nan."),
    (lambda: animate(path="x.png"), "path must end in .gif, got x.png."),
    (lambda: animate(titles="a"), "titles must have 2 texts, one for each frame, got 1."),
    (lambda: plotting.quality_curve({}), "curves must have 1 to 7 curves, got 0."),
    (lambda: plotting.quality_curve(dict.fromkeys("abcdefgh", ([1], [1]))), "curves must…got 8."),
    (lambda: curve([], []), "the curve 'a' must be…lengths [0, 0]."),
    (lambda: curve([1, 2], [1]), "the curve 'a' must…lengths [2, 1]."),
    (lambda: curve([1, 2]), "the curve 'a' must…of lengths [2]."),
    (lambda: curve([1], [math.nan]), "the curve 'a' must be finite, got NaN or infinity."),
    (lambda: curve([0, 2], [1, 1]), "the curve 'a' has…on a logarithmic axis."),
    (lambda: curve([1, 2], [1, 0], log_y=True), "the curve 'a' has…on a logarithmic axis."),
    (lambda: curve([1], [1], [-1]), "the spread of the curve 'a' must be at least 0."),
]


@pytest.mark.parametrize(("draw", "form", "shapes"), SHAPES)
def test_other_shapes_are_refused(
    refused: Refused, draw: Callable[[Tensor], object], form: str, shapes: list[tuple[int, ...]]
) -> None:
    for shape in shapes:
        refused(lambda shape=shape: draw(torch.zeros(shape)), f"…{form}, got {shape}.")


@pytest.mark.parametrize(("call", "sentence"), OTHERS)
def test_refusals(refused: Refused, call: Callable[[], object], sentence: str) -> None:
    refused(call, sentence)
