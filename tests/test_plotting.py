"""The pictures, pixel by pixel, read back by Pillow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pfgm import plotting

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
RendererAgg = pytest.importorskip("matplotlib.backends.backend_agg").RendererAgg

MARGIN, GAP = 10, 4
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


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


@pytest.mark.parametrize("channels", [1, 3])
def test_every_panel_shows_its_image_exactly(tmp_path: Path, channels: int) -> None:
    images = uniform(6, channels, 4, 5) * 1.5
    plotting.image_grid(images, tmp_path / "a.png", columns=3, scale=7)
    pixels = read(tmp_path / "a.png")
    assert pixels.shape == (2 * 28 + GAP + 2 * MARGIN, 3 * 35 + 2 * GAP + 2 * MARGIN, 3)
    for i, image in enumerate(images):
        found = panel(pixels, 1 - i // 3, i % 3, (28, 35))
        np.testing.assert_array_equal(found, shown(image, 7))


def test_all_around_the_panels_is_white(tmp_path: Path) -> None:
    plotting.image_grid(torch.full((5, 1, 4, 4), -1.0), tmp_path / "a.png", columns=3, scale=5)
    pixels = read(tmp_path / "a.png")
    assert set(np.unique(pixels)) == {0, 255}
    assert int((pixels == 0).all(2).sum()) == 5 * 20 * 20
    assert (panel(pixels, 0, 2, (20, 20)) == 255).all(), "the sixth place is vacant"


def test_grey_images_need_no_channel_dimension(tmp_path: Path) -> None:
    images = uniform(4, 5, 6)
    plotting.image_grid(images, tmp_path / "a.png")
    plotting.image_grid(images.unsqueeze(1), tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


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


def test_a_title_stands_above_and_fits(tmp_path: Path) -> None:
    title = "A title much wider than the only picture"
    plotting.image_grid(torch.ones(1, 1, 8, 8), tmp_path / "a.png", title=title)
    dark = np.any(read(tmp_path / "a.png") < 128, axis=2)
    rows, columns = np.nonzero(dark)
    assert rows.size > 0
    assert rows.max() < dark.shape[0] - MARGIN - 72, "the title does not touch the picture"
    assert columns.min() > 0
    assert columns.max() < dark.shape[1] - 1


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
            found = panel(pixels, 1 - sample, step, (36, 36))
            np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=1)
            if step == 2:
                np.testing.assert_array_equal(found, expected)


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


def test_arguments_are_unchanged() -> None:
    images = uniform(2, 2, 1, 8, 8) * 100
    before = images.clone()
    plotting.trajectory_grid(images, [2, 1])
    plotting.image_grid(images[0])
    assert torch.equal(images, before)


def test_images_that_need_a_gradient_are_drawn() -> None:
    plotting.image_grid(torch.zeros(2, 1, 8, 8, requires_grad=True))


def test_pyplot_is_not_imported_and_matplotlib_only_when_drawing() -> None:
    code = (
        "import sys, torch; from pfgm import plotting\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plotting.image_grid(torch.zeros(1, 1, 8, 8))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    # The same pfgm as here, installed or not.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*pip install 'pfgm\[demo\]'"):
        plotting.image_grid(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("shape", [(8, 8), (2, 2, 8, 8), (0, 1, 8, 8), (2, 1, 0, 8), (1,) * 5])
def test_image_grid_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"images has shape {shape}; allowed is (n, C")):
        plotting.image_grid(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 2, 2, 8, 8), (2, 0, 1, 8, 8), (1,) * 6])
def test_trajectory_grid_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    message = re.escape(f"images has shape {shape}; allowed is (steps, n, C")
    with pytest.raises(ValueError, match=message):
        plotting.trajectory_grid(torch.zeros(shape), [1, 2])


@pytest.mark.parametrize("z", [[1.0], [3.0, 2.0, 1.0], torch.ones(3)])
def test_trajectory_grid_needs_a_z_for_each_step(z: Any) -> None:
    with pytest.raises(ValueError, match=f"z has {len(z)} values; allowed are 2"):
        plotting.trajectory_grid(torch.zeros(2, 1, 8, 8), z)


@pytest.mark.parametrize("count", [0, -3])
def test_counts_below_one_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"columns is {count}; allowed are whole numbers from 1"):
        plotting.image_grid(torch.zeros(1, 1, 8, 8), columns=count)
    with pytest.raises(ValueError, match=f"scale is {count}; allowed are whole numbers from 1"):
        plotting.image_grid(torch.zeros(1, 1, 8, 8), scale=count)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="images holds NaN or infinity"):
        plotting.image_grid(torch.full((1, 1, 8, 8), value))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"images has dtype torch\.int64"):
        plotting.image_grid(torch.zeros(1, 1, 8, 8, dtype=torch.int64))


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jpg; allowed is a name ending in \.png"):
        plotting.image_grid(torch.zeros(1, 1, 8, 8), tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing is not an existing folder"):
        plotting.image_grid(torch.zeros(1, 1, 8, 8), tmp_path / "missing" / "a.png")
