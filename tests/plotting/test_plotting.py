"""Grids are checked pixel by pixel, as Pillow reads them; other pictures by the contents of their
figures."""

import math
import os
import pickle
import re
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
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Refused = Callable[[Callable[[], object], str], None]


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def read(path: Path) -> Pixels:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


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


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_every_panel_shows_its_image_exactly(tmp_path: Path, channels: tuple[int, ...]) -> None:
    images = uniform(6, *channels, 4, 5) * 1.5
    plotting.image_grid(images, tmp_path / "a.png", columns=3, scale=7)
    pixels = read(tmp_path / "a.png")
    assert pixels.shape == (2 * 28 + GAP + 2 * MARGIN, 3 * 35 + 2 * GAP + 2 * MARGIN, 3)
    for i, image in enumerate(images.view(6, -1, 4, 5)):
        drawn = panel(pixels, 1 - i // 3, i % 3, (28, 35))
        np.testing.assert_array_equal(drawn, shown(image, 7))


def test_all_around_the_panels_is_white(tmp_path: Path) -> None:
    plotting.image_grid(torch.full((5, 1, 4, 4), -1.0), tmp_path / "a.png", columns=3, scale=5)
    pixels = read(tmp_path / "a.png")
    assert set(np.unique(pixels)) == {0, 255}
    assert int((pixels == 0).all(2).sum()) == 5 * 20 * 20
    assert (panel(pixels, 0, 2, (20, 20)) == 255).all(), "the sixth place is vacant"


def test_bytes_are_shown_as_they_are(tmp_path: Path) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    plotting.image_grid(images, tmp_path / "a.png", scale=1)
    pixels = read(tmp_path / "a.png")
    np.testing.assert_array_equal(
        panel(pixels, 0, 0, (16, 16))[..., 0], np.arange(256).reshape(16, 16)
    )


@pytest.mark.parametrize(
    ("n", "columns", "expected"),
    [(1, None, (1, 1)), (10, None, (3, 4)), (16, None, (4, 4)), (3, 8, (1, 3)), (3, 1, (3, 1))],
)
def test_rows_and_columns(n: int, columns: int | None, expected: tuple[int, int]) -> None:
    figure = plotting.image_grid(torch.zeros(n, 1, 8, 8), columns=columns)
    width, height = np.rint(figure.get_size_inches() * 100).astype(int) - 2 * MARGIN + GAP
    assert (height // (72 + GAP), width // (72 + GAP)) == expected


@pytest.mark.parametrize("size", [1, 8, 28, 64, 256])
def test_the_default_scale_never_shrinks_an_image(size: int) -> None:
    width, _ = plotting.image_grid(torch.zeros(1, 1, size, size)).get_size_inches() * 100
    assert round(width) - 2 * MARGIN >= max(size, 60)


def test_a_title_wider_than_the_picture_fits(tmp_path: Path) -> None:
    title = "A title much wider than the only picture"
    plotting.image_grid(torch.ones(1, 1, 8, 8), tmp_path / "a.png", title=title)
    dark = np.any(read(tmp_path / "a.png") < 128, axis=2)
    rows, columns = np.nonzero(dark)
    assert rows.max() < dark.shape[0] - MARGIN - 72, "the title does not touch the picture"
    assert 0 < columns.min() < columns.max() < dark.shape[1] - 1


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plotting.image_grid(uniform(4, 1, 8, 8), tmp_path / name, title="same")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_trajectory_panels_are_divided_by_their_largest_value(tmp_path: Path) -> None:
    scales = torch.tensor([300.0, 2.0, 0.5])
    images = uniform(3, 2, 1, 4, 4) * scales.view(3, 1, 1, 1, 1)
    plotting.trajectory_grid(images, [40, 1, 0.001], tmp_path / "a.png", scale=9)
    pixels = read(tmp_path / "a.png")
    for step in range(3):
        for sample in range(2):
            image = images[step, sample]
            expected = shown(image / max(1.0, float(image.abs().max())), 9)
            drawn = panel(pixels, 1 - sample, step, (36, 36))
            np.testing.assert_allclose(drawn.astype(int), expected.astype(int), atol=1)
            if step == 2:
                np.testing.assert_array_equal(drawn, expected)


def test_trajectory_header_names_every_z() -> None:
    z = torch.tensor([38.57, 12.3, 1.0, 1e-3])
    axes = plotting.trajectory_grid(uniform(4, 2, 3, 8, 8), z, symbol="σ").axes[0]
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["σ = 38.6", "σ = 12.3", "σ = 1", "σ = 0.001"]
    assert [text.get_position()[0] for text in axes.texts] == [36, 112, 188, 264]


def test_trajectory_header_is_drawn_above_the_panels(tmp_path: Path) -> None:
    plotting.trajectory_grid(torch.ones(3, 8, 1, 8, 8), [3, 2, 1], tmp_path / "a.png", title="Way")
    dark = np.any(read(tmp_path / "a.png") < 128, axis=2)
    header = dark[: -MARGIN - 8 * 72 - 7 * GAP]
    assert header.sum() == dark.sum()
    lines = np.flatnonzero(np.diff(header.any(1).astype(int)) == 1)
    assert len(lines) == 2, "a title and a header, apart from each other"
    for column in range(3):
        left = MARGIN + column * (72 + GAP)
        assert header[lines[1] :, left : left + 72].any()


@pytest.mark.parametrize("steps", [1, 12])
def test_long_labels_do_not_run_into_each_other(steps: int) -> None:
    figure = plotting.trajectory_grid(uniform(steps, 1, 8, 8), [0.000123456] * steps, scale=5)
    renderer: Any = RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi)
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert all(box.width <= 40 for box in boxes)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_texts_above_the_columns_of_a_grid() -> None:
    axes = plotting.image_grid(uniform(5, 8, 8), columns=2, header=["a", "b"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["a", "b"]


def test_texts_beside_the_rows_of_a_grid(tmp_path: Path) -> None:
    images, side = uniform(5, 8, 8), ["first row", "second", "3"]
    figure = plotting.image_grid(images, tmp_path / "x.png", columns=2, side=side)
    renderer: Any = RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi)
    axes = figure.axes[0]
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == side
    assert all(MARGIN <= box.x0 < box.x1 < axes.get_window_extent(renderer).x0 for box in boxes)
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))
    plotting.image_grid(images, tmp_path / "y.png", columns=2)
    plain, named = read(tmp_path / "y.png"), read(tmp_path / "x.png")
    assert np.array_equal(named[:, MARGIN - plain.shape[1] :], plain[:, MARGIN:])


def test_an_animation_ends_with_the_picture_of_its_samples(tmp_path: Path) -> None:
    images = uniform(4, 6, 1, 8, 8) * torch.tensor([40.0, 5.0, 1.0, 1.0]).view(4, 1, 1, 1, 1)
    words: dict[str, Any] = {"columns": 3, "header": ["a", "b", "c"]}
    titles = ["z = 40", "z = 5", "z = 0.0123", "end"]
    plotting.animation(images, titles, tmp_path / "x.gif", **words)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 4  # type: ignore[attr-defined]
        frames = []
        for number in range(4):
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    title = "end".center(len(titles[2]))
    plotting.image_grid(images[-1], tmp_path / "x.png", title=title, **words)
    with Image.open(tmp_path / "x.png") as picture:
        expected = np.asarray(picture.convert("RGB")).astype(int)
    assert {frame.shape for frame in frames} == {expected.shape}
    assert np.abs(frames[-1] - expected).max() <= 8  # a GIF has 256 colours
    assert np.abs(frames[0] - expected).max() > 50


def test_pixels_beyond_white_do_not_darken_a_frame(tmp_path: Path) -> None:
    """Samples overshoot white in single pixels, while values of noise are all far from it."""
    images = torch.ones(2, 1, 3, 8, 8)
    images[1, :, :, 0, :3] = 1.5
    plotting.animation(images, ["x", "x"], tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as gif:
        pixels = np.asarray(gif.convert("L"))
        gif.seek(gif.n_frames - 1)  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(gif.convert("L")), pixels)


def test_frames_are_spaced_by_what_changes(tmp_path: Path) -> None:
    """Ten equal images, and then ten that brighten from 0.1 to 1."""
    values = torch.cat([torch.zeros(10), torch.arange(1, 11) / 10])
    images = values.view(20, 1, 1, 1, 1).expand(20, 1, 1, 8, 8)
    plotting.animation(images, ["x"] * 20, tmp_path / "x.gif", frames=6)
    with Image.open(tmp_path / "x.gif") as gif:
        shown = []
        for number in range(gif.n_frames):  # type: ignore[attr-defined]
            gif.seek(number)
            picture = np.asarray(gif.convert("L")).astype(float)
            shown.append(picture[picture.shape[0] // 2 + 10, picture.shape[1] // 2])
    assert shown == pytest.approx([127.5 * (1 + k / 5) for k in range(6)], abs=3)


def test_arguments_are_unchanged_and_may_need_a_gradient() -> None:
    images = (uniform(2, 2, 1, 8, 8) * 100).requires_grad_()
    before = images.detach().clone()
    plotting.trajectory_grid(images, [2, 1])
    plotting.image_grid(images[0])
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("draw", "form", "shapes"),
    [
        (
            plotting.image_grid,
            "(n, C, H, W)",
            [(8, 8), (2, 2, 8, 8), (0, 1, 8, 8), (2, 1, 0, 8), (1,) * 5],
        ),
        (
            lambda images: plotting.trajectory_grid(images, [1, 2]),
            "(steps, n, C, H, W)",
            [(2, 8, 8), (2, 2, 2, 8, 8), (2, 0, 1, 8, 8), (1,) * 6],
        ),
        (
            lambda paths: plotting.trajectory_plot(paths, [1.0] * len(paths)),
            "(steps",
            [(1, 3, 2), (4, 0, 2), (4, 3, 3), (4, 2), (4, 3, 1, 2)],
        ),
    ],
)
def test_other_shapes_are_refused(
    draw: Callable[..., Any], form: str, shapes: list[tuple[int, ...]]
) -> None:
    for shape in shapes:
        message = f"s must have shape {re.escape(form)}.*, got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            draw(torch.zeros(shape))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing is not an existing folder"):
        plotting.image_grid(torch.zeros(1, 1, 8, 8), tmp_path / "missing" / "a.png")


ROOT = Path(__file__).resolve().parents[2]


def ring(n: int = 40) -> Tensor:
    angle = torch.arange(n) / n * math.tau
    return torch.stack([angle.cos(), angle.sin()], 1)


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


def draw_field(data: Tensor, path: Path | None = None, **options: Any) -> Any:
    return plotting.field_lines(data, path, **{"z": [0.3], **options})


def draw_potential(data: Tensor, path: Path | None = None, **options: Any) -> Any:
    return plotting.equipotentials(data, path, **{"sigma": [0.3], **options})


def draw_paths(data: Tensor, path: Path | None = None, **options: Any) -> Any:
    return plotting.trajectory_plot(*straight_paths(), path, data=data, **options)


def draw_space(data: Tensor, path: Path | None = None, **options: Any) -> Any:
    flow = PoissonFlow((2,), data_norm=1.0)
    options = {"steps": 5, "generator": torch.Generator().manual_seed(0), **options}
    return plotting.flow_lines(flow, flow.empirical(ring()), 4, path, data=data, **options)


def draw_curve(_: Tensor, path: Path | None = None, **options: Any) -> Any:
    return plotting.quality_curve({"euler": ([4, 8], [2.0, 1.0])}, path, **options)


def draw_grid(_: Tensor, path: Path | None = None, **options: Any) -> Any:
    return plotting.image_grid(uniform(4, 8, 8), path, **options)


OF_DATA = [draw_field, draw_potential, draw_paths, draw_space]
FIGURES = [*OF_DATA, draw_curve, draw_grid]


@pytest.mark.parametrize("draw", FIGURES)
class TestFigures:
    def test_are_saved_as_they_measure_with_all_text_inside(
        self, draw: Callable[..., Any], tmp_path: Path
    ) -> None:
        figure = draw(ring(), tmp_path / "a.png", title="A title of some length " * 3)
        width, height = np.rint(figure.get_size_inches() * 100).astype(int)
        pixels = read(tmp_path / "a.png")
        assert pixels.shape == (height, width, 3)
        assert len(np.unique(pixels)) > 10
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == 255).all(), "nothing is cut off"
        assert figure.texts[0].get_text().startswith("A title")

    def test_without_pyplot(
        self, draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would open windows, and keep every figure."""
        monkeypatch.delattr("matplotlib.pyplot", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        draw(ring())

    def test_another_suffix_is_refused(self, draw: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"path must end in \.png, got .*\."):
            draw(ring(), tmp_path / "a.svg")
        assert list(tmp_path.iterdir()) == []

    def test_without_matplotlib_the_extra_is_named(
        self, draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.delitem(sys.modules, "pfgm.plotting.shown_figure", raising=False)
        with pytest.raises(ImportError, match=r"matplotlib.*pip install '\.\[demo\]'"):
            draw(ring())


@pytest.mark.parametrize("draw", OF_DATA)
class TestData:
    @pytest.mark.parametrize(
        ("data", "sentence"),
        [
            *(
                (torch.zeros(shape), f"data must have shape (n, 2) with n ≥ 1, got {shape}.")
                for shape in ((0, 2), (4, 3), (2,), (4, 1, 2))
            ),
            (torch.zeros(4, 2).byte(), "TypeError: data must be a…tensor, got torch.uint8."),
            (torch.full((4, 2), math.nan), "data must be finite, got NaN or infinity."),
        ],
    )
    def test_that_are_refused(
        self, draw: Callable[..., Any], refused: Refused, data: Tensor, sentence: str
    ) -> None:
        refused(lambda: draw(data), sentence)

    def test_unchanged_and_with_a_gradient(self, draw: Callable[..., Any]) -> None:
        data = ring(3).requires_grad_()
        draw(data)
        assert torch.equal(data, ring(3))

    def test_a_single_point(self, draw: Callable[..., Any]) -> None:
        draw(torch.tensor([[3.0, -2.0]]))


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


@pytest.mark.parametrize("z", [0.1, 1.0])
def test_the_lines_cross_the_equipotentials_at_right_angles(
    monkeypatch: pytest.MonkeyPatch, z: float
) -> None:
    """The drawn lines follow the numerical gradient of the drawn shades."""
    streams, shades = recorded(monkeypatch, "streamplot"), recorded(monkeypatch, "contourf")
    draw_field(ring(), z=[z])
    (x, y, u, v), (_, _, potential) = streams[0], shades[0]
    slope_y, slope_x = np.gradient(potential, y, x)
    inner = (slice(2, -2), slice(2, -2))
    along = u * slope_x + v * slope_y
    cosine = (along / np.hypot(u, v) / np.hypot(slope_x, slope_y))[inner]
    weak = np.hypot(slope_x, slope_y)[inner] < 0.05
    assert weak.mean() < 0.2
    assert cosine[~weak].min() > 0.95, "toward higher potential: toward the data"


def test_field_lines_has_a_panel_for_each_z() -> None:
    figure = plotting.field_lines(ring(), z=[0.123456, 2])
    assert [axes.get_title() for axes in figure.axes] == ["z = 0.123", "z = 2"]
    for axes in figure.axes:
        streams = [c for c in axes.collections if type(c).__name__ == "LineCollection"]
        assert len(streams) == 1
        assert all(np.isfinite(s).all() for s in streams[0].get_segments())
        assert np.allclose(axes.collections[-1].get_offsets(), ring())
        assert axes.get_xlim() == pytest.approx((-1.6, 1.6), abs=0.01)


def test_default_levels_scale_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.axes.Axes.streamplot", lambda *_, **options: None)
    for scale in (1.0, 100.0):
        figure = plotting.field_lines(ring() * scale + 7)
        titles = [f"z = {scale * share:.3g}" for share in (0.05, 0.25, 1)]
        assert [axes.get_title() for axes in figure.axes] == titles
        assert len(plotting.equipotentials(ring() * scale).axes) == 5


@pytest.mark.parametrize(("D", "symbol"), [(1.0, "z"), (3.0, "σ"), (math.inf, "σ")])
def test_equipotentials_shows_the_log_density(
    monkeypatch: pytest.MonkeyPatch, D: float, symbol: str
) -> None:
    shades, lines = recorded(monkeypatch, "imshow"), recorded(monkeypatch, "contour")
    figure = plotting.equipotentials(ring(), sigma=[0.2, 0.5], D=D)
    titles = [f"{symbol} = 0.2", f"{symbol} = 0.5"]
    assert [axes.get_title() for axes in figure.axes[:2]] == titles
    assert figure.axes[2].get_ylabel() == "log density − maximum"
    assert len(shades) == len(lines) == 2
    for (density,), (x, y, potential) in zip(shades, lines, strict=True):
        assert density.max() == 0
        assert np.isfinite(density).all()
        # The middle of the ring, and a point of it.
        row, column = np.abs(y).argmin(), np.abs(x - 1).argmin()
        assert density[row, column] > density[row, np.abs(x).argmin()]
        if math.isinf(D):
            offset = potential - density
            np.testing.assert_allclose(offset, offset[0, 0], atol=1e-9)


def test_trajectory_plot_draws_every_segment_twice() -> None:
    paths, levels = straight_paths()
    figure = plotting.trajectory_plot(paths, levels, data=ring(), symbol="σ")
    whole, near, bar = figure.axes
    assert bar.get_ylabel() == "σ"
    for axes in (whole, near):
        lines, data, ends = axes.collections
        segments = np.array(lines.get_segments())
        assert segments.shape == (9, 2, 2)
        np.testing.assert_allclose(segments[:3, 0], paths[0])
        np.testing.assert_allclose(segments[-3:, 1], paths[-1])
        expected = np.repeat(np.sqrt([8, 2, 0.5]), 3)
        np.testing.assert_allclose(lines.get_array(), expected)
        assert lines.norm.vmin == 0.5
        assert lines.norm.vmax == 4
        assert len(data.get_offsets()) == 40
        np.testing.assert_allclose(ends.get_offsets(), paths[-1])
    assert whole.get_xlim()[1] > 8
    assert near.get_xlim()[1] == pytest.approx(1.6, abs=0.01)


def test_trajectory_plot_without_data_magnifies_the_samples() -> None:
    figure = plotting.trajectory_plot(*straight_paths())
    assert [len(axes.collections) for axes in figure.axes[:2]] == [2, 2]
    assert figure.axes[1].get_xlim() == pytest.approx((-1.6, 1.6))


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


def far_path() -> tuple[PoissonFlow, Tensor, Tensor]:
    """A flow whose prior has one point far away; that prior, and its data."""
    flow = PoissonFlow((2,), data_norm=1.0)
    start = torch.tensor([[400.0, 0.0], [4.0, 4.0], [4.0, -4.0], [-4.0, 4.0], [-4.0, -4.0]])
    return flow, start, ring()


def test_flow_lines_cuts_a_far_line_where_it_enters_the_axes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow, start, data = far_path()
    monkeypatch.setattr(flow, "prior", lambda *args, **options: start)
    figure = plotting.flow_lines(flow, flow.empirical(data), 5, data=data, steps=20)
    (axes,) = figure.axes
    for limits in (axes.get_xlim(), axes.get_ylim()):
        assert limits == pytest.approx((-8.32, 8.32), rel=0.01)
    x, y, z = axes.lines[0].get_data_3d()
    assert (x[0], y[0]) == pytest.approx((axes.get_xlim()[1], 0), abs=1e-3)
    assert flow.z_min < z[0] < flow.z_max
    assert (x[1:] < x[0]).all()
    assert z[-1] == flow.z_min
    for line, point in zip(axes.lines[1:], start[1:], strict=True):
        x, y, z = line.get_data_3d()
        assert (x[0], y[0], z[0]) == pytest.approx((*point.tolist(), flow.z_max))
        assert len(z) == 21


def test_a_far_path_does_not_rule_the_window_of_a_trajectory() -> None:
    _, start, data = far_path()
    paths = torch.stack([start, start / 2, data[:5]])
    whole, _ = plotting.trajectory_plot(paths, [4, 2, 1], data=data).axes[:2]
    assert whole.get_xlim() == pytest.approx((-8.32, 8.32), rel=0.01)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [([4, 2, 1, 0.5], ["0.5", "1", "2"]), ([100, 10, 1, 1e-3], ["0.001", "0.01", "0.1", "1"])],
)
def test_the_bar_of_a_trajectory_names_levels(levels: list[float], expected: list[str]) -> None:
    figure = plotting.trajectory_plot(straight_paths()[0], levels)
    shown = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert shown[: len(expected)] == expected


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
    assert axes.get_xscale() == "log"
    assert axes.get_yscale() == "linear"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("NFE", "distance")
    (band,) = axes.collections
    corners = {tuple(np.round(point, 9)) for point in band.get_paths()[0].vertices}
    assert {(5, 2.7), (5, 3.3), (20, 0.9), (20, 1.1)} <= corners
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert {"5", "20"} - set(shown) <= {"20"}


def test_names_stand_beside_their_lines_and_apart() -> None:
    curves = {name: ([1, 2, 4], [3.0, 2.0, 1 + i / 1000]) for i, name in enumerate("abcdefg")}
    figure = plotting.quality_curve(curves)
    (axes,) = figure.axes
    renderer: Any = RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi)
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
    assert list(boxes) == list("abcdefg")
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes.values()))
    area = axes.get_window_extent(renderer)
    for text, line in zip(axes.texts, axes.lines, strict=True):
        assert text.get_color() == line.get_color()
        assert area.y0 - 8 <= boxes[text.get_text()].y0
        assert boxes[text.get_text()].y1 <= area.y1 + 8
    assert len({line.get_color() for line in axes.lines}) == 7


def test_ticks_of_a_quality_curve_do_not_run_into_each_other() -> None:
    numbers = [*range(1, 30), 100, 101, 1000]
    figure = plotting.quality_curve({"a": (numbers, [1.0] * len(numbers))})
    renderer: Any = RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi)
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].get_xticklabels()]
    assert len(boxes) > 6
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(
    ("values", "log_y", "expected"),
    [
        ([0.9, 5.0], True, ["1", "2", "3", "4"]),
        ([0.002, 300], True, ["0.01", "100"]),
        ([3e-5, 1.5e-5], True, ["2e-05", "3e-05"]),
        ([1e9 + 2, 1e9], False, ["1000000000.50", "1000000001.50"]),
    ],
)
def test_numbers_of_a_quality_axis_leave_room_for_its_label(
    values: list[float], log_y: bool, expected: list[str]
) -> None:
    figure = plotting.quality_curve({"a": ([1, 10], values)}, log_y=log_y, ylabel="distance")
    renderer: Any = RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi)
    figure.draw(renderer)
    axis = figure.axes[0].yaxis
    assert set(expected) <= {label.get_text() for label in axis.get_ticklabels(which="both")}
    assert axis.get_offset_text().get_text() == ""
    assert axis.label.get_window_extent(renderer).x0 >= 0


def test_a_logarithmic_quality_axis_shows_a_band_that_reaches_below_zero() -> None:
    figure = plotting.quality_curve({"a": ([1, 10], [1.0, 0.01], [0.5, 0.02])}, log_y=True)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert 0.001 < low < 0.01
    assert high > 1
    assert (axes.collections[0].get_paths()[0].vertices[:, 1] > 0).all()


@pytest.mark.slow
def test_the_gallery_draws_all_its_pictures(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = ROOT / "examples" / "gallery.py"
    subprocess.run(
        [sys.executable, script, "--out", tmp_path / "new", "--quick"], check=True, env=environment
    )
    kinds = ("field", "levels", "paths", "space")
    names = [f"{name}-{kind}" for name in ("moons", "spirals", "heart") for kind in kinds]
    expected = {f"gallery-{name}.png" for name in [*names, "solvers"]}
    assert {path.name for path in (tmp_path / "new").iterdir()} == expected
    for name in expected:
        assert len(np.unique(read(tmp_path / "new" / name))) > 50


def test_the_pictures_of_the_docs_are_those_of_the_gallery_and_small() -> None:
    stored = sorted((ROOT / "docs" / "images").glob("gallery-*.png"))
    assert len(stored) == 13
    for path in stored:
        assert path.stat().st_size < 150_000, path


def test_notebooks_show_figures():
    """IPython calls _repr_png_; the picture has the size of the figure."""
    figure = plotting.image_grid(torch.zeros(4, 1, 8, 8))
    picture = figure._repr_png_()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert [width, height] == [round(inches * 100) for inches in figure.get_size_inches()]
    assert pickle.loads(pickle.dumps(figure))._repr_png_() == picture


IMAGES, RING = torch.zeros(5, 1, 8, 8), ring()
PATHS, LEVELS = straight_paths()
FLOW = PoissonFlow((2,), data_norm=1.0)
NET = FLOW.empirical(RING)
FRAMES: dict[str, Any] = {"images": IMAGES.expand(2, 5, 1, 8, 8), "titles": "ab", "path": "x.gif"}


def trajectory(images: Any) -> None:
    plotting.trajectory_grid(images[None], [1.0])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        *(
            (lambda images=images, draw=draw: draw(images), sentence)
            for draw in (plotting.image_grid, trajectory)
            for images, sentence in (
                (
                    IMAGES.numpy(),
                    "TypeError: images must be a torch.Tensor, got ndarray; use…(images).",
                ),
                (
                    IMAGES.long(),
                    "TypeError: images must be uint8 or floating point, got torch.int64; use…().",
                ),
                (IMAGES / 0, "images must be finite, got NaN or infinity."),
                (IMAGES + math.inf, "images must be finite, got NaN or infinity."),
            )
        ),
        *(
            (
                lambda name=name, n=n: plotting.image_grid(IMAGES, **{name: n}),
                f"{name} must be an integer of at least 1, got {n}.",
            )
            for name in ("columns", "scale")
            for n in (0, -3, 2.5)
        ),
        (
            lambda: plotting.image_grid(IMAGES, columns=3, header=["a", "b"]),
            "header must have 3 texts, one for each column, got 2.",
        ),
        (
            lambda: plotting.image_grid(IMAGES, columns=2, side=["a", "b"]),
            "side must have 3 texts, one for each row, got 2.",
        ),
        *(
            (
                lambda z=z: plotting.trajectory_grid(torch.zeros(2, 1, 8, 8), z),
                f"z must have 2 values, one for each step, got {len(z)}.",
            )
            for z in ([1.0], [3.0, 2.0, 1.0], torch.ones(3))
        ),
        *(
            (lambda draw=draw, given={name: levels}: draw(RING, **given), f"{name} must {what}.")
            for name, draw in (("z", plotting.field_lines), ("sigma", plotting.equipotentials))
            for levels, what in (
                ([], "hold at least one value, got none"),
                ([0.0], "be finite and above 0, got 0.0"),
                ([0.1, -1.0], "be finite and above 0, got -1.0"),
                ([math.inf], "be finite and above 0, got inf"),
                ([math.nan], "be finite and above 0, got nan"),
            )
        ),
        *(
            (
                lambda D=D: plotting.equipotentials(RING, D=D),
                f"D must be a positive number or infinity, got {D}.",
            )
            for D in (0.0, -1.0, math.nan)
        ),
        (
            lambda: plotting.trajectory_plot(PATHS, LEVELS[1:]),
            "levels must have 4 values, one for each step, got 3.",
        ),
        (
            lambda: plotting.trajectory_plot(PATHS, [*LEVELS[:3], 0.0]),
            "levels must be finite and above 0, got 0.0.",
        ),
        (lambda: plotting.trajectory_plot(PATHS / 0, LEVELS), "paths must be…NaN or infinity."),
        (
            lambda: plotting.flow_lines(PoissonFlow((3,), data_norm=1.0), NET, 5),
            "flow must have sample shape (2,), got (3,).",
        ),
        (lambda: plotting.flow_lines(FLOW, NET, 0), "n must be an integer of at least 1, got 0."),
        *(
            (
                lambda top=top: plotting.flow_lines(FLOW, NET, 5, z_top=top),
                f"z_top must be from {FLOW.z_min} to {FLOW.z_max}, got {top}.",
            )
            for top in (0.0, FLOW.z_min, FLOW.z_max * 1.01, math.nan)
        ),
        (lambda: plotting.animation(**FRAMES | {"frames": 1}), "frames must be an…10000, got 1."),
        (
            lambda: plotting.animation(**FRAMES | {"path": "x.png"}),
            "path must end in .gif, got x.png.",
        ),
        (
            lambda: plotting.animation(**FRAMES | {"titles": "a"}),
            "titles must have 2 texts, one for each frame, got 1.",
        ),
        (lambda: plotting.animation(**FRAMES | {"seconds": 0.0}), "seconds must be…got 0.0."),
        (
            lambda: plotting.animation(**FRAMES | {"images": IMAGES[:2, 0]}),
            "images must have shape (frames, n, C, H, W) or…got (2, 8, 8).",
        ),
        (lambda: plotting.quality_curve({}), "curves must have 1 to 7 curves, got 0."),
        (
            lambda: plotting.quality_curve({str(i): ([1], [1]) for i in range(8)}),
            "curves must have 1 to 7 curves, got 8.",
        ),
        (lambda: plotting.quality_curve({"a": ([], [])}), "the curve 'a' must be…lengths [0, 0]."),
        (lambda: plotting.quality_curve({"a": ([1, 2], [1])}), "the curve 'a' must…ngths [2, 1]."),
        (lambda: plotting.quality_curve({"a": ([1, 2],)}), "the curve 'a' must…of lengths [2]."),
        (
            lambda: plotting.quality_curve({"a": ([1], [math.nan])}),
            "the curve 'a' must be finite, got NaN or infinity.",
        ),
        (
            lambda: plotting.quality_curve({"a": ([0, 2], [1, 1])}),
            "the curve 'a' has values of at most 0 on a logarithmic axis.",
        ),
        (
            lambda: plotting.quality_curve({"a": ([1], [1], [-1])}),
            "the spread of the curve 'a' must be at least 0.",
        ),
        (
            lambda: plotting.quality_curve({"a": ([1, 2], [1, 0])}, log_y=True),
            "the curve 'a' has values of at most 0 on a logarithmic axis.",
        ),
    ],
)
def test_refusals(refused: Refused, call: Callable[[], object], sentence: str) -> None:
    refused(call, sentence)
