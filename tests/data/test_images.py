"""Folders of images and datasets that are loaded item by item."""

import io
import json
import re
import struct
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import pfgm
from pfgm.data import Data
from pfgm.data.rows import InMemory

Image = pytest.importorskip("PIL.Image")
Array = np.ndarray[Any, Any]


def pixels(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path: Path, array: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def loaded(folder: Path) -> Array:
    source = pfgm.data.open(folder).samples
    assert isinstance(source, InMemory)
    return source.tensor.numpy()


def test_coloured_images_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a/b/c.BMP", "a.png", "10.png", "9.png"]
    images = {name: pixels(5, 4, 3, seed=i) for i, name in enumerate(names)}
    for name, image in images.items():
        write(tmp_path / name, image)
    (tmp_path / "labels.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    expected = [images[n] for n in ["10.png", "9.png", "a.png", "a/b/c.BMP", "a/z.png", "b.png"]]
    np.testing.assert_array_equal(
        loaded(tmp_path), np.stack(expected).transpose(0, 3, 1, 2), strict=True
    )


def test_grey_images_have_one_channel_and_three_beside_a_coloured_one(tmp_path: Path) -> None:
    grey, alpha, colour = pixels(3, 5), pixels(3, 5, 2, seed=1), pixels(3, 5, 3)
    alpha[..., 1] = 255
    bits = np.eye(3, 5, dtype=bool)
    write(tmp_path / "a.png", grey)
    write(tmp_path / "b.png", alpha)
    Image.fromarray(bits).save(tmp_path / "c.png")
    expected = np.stack([grey, alpha[..., 0], bits * np.uint8(255)])[:, None]
    np.testing.assert_array_equal(loaded(tmp_path), expected, strict=True)
    write(tmp_path / "b.png", colour)
    shown = loaded(tmp_path)
    np.testing.assert_array_equal(shown[[0, 2]], np.repeat(expected[[0, 2]], 3, axis=1))
    np.testing.assert_array_equal(shown[1], colour.transpose(2, 0, 1))


def on_white(values: Array, alpha: Array) -> Array:
    """Porter and Duff's "over", with a white background."""
    return values * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_are_composed_on_white(tmp_path: Path, channels: int) -> None:
    image = pixels(30, 50, channels + 1)
    image[0, :, -1], image[1, :, -1] = 0, 255
    write(tmp_path / "a.png", image)
    shown = loaded(tmp_path)[0].transpose(1, 2, 0)
    expected = on_white(image[..., :-1], image[..., -1:])
    assert (shown[0] == 255).all()
    np.testing.assert_array_equal(shown[1], image[1, :, :-1])
    assert np.abs(shown - expected).max() <= 1


def zipped(folder: Path, path: Path, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def labels(source: Data) -> list[int] | None:
    return None if source.labels is None else source.labels.tolist()


def class_folders(folder: Path) -> dict[str, Array]:
    names = ["dog/b.png", "ant/z.png", "dog/a.png", "cat/deep/1.jpg.png"]
    images = {name: pixels(4, 3, seed=i) for i, name in enumerate(names)}
    for name, image in images.items():
        write(folder / name, image)
    return images


@pytest.mark.parametrize("place", ["", "all/of/them"])
@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_give_labels(tmp_path: Path, place: str, packed: bool) -> None:
    images = class_folders(tmp_path / "own" / place)
    (tmp_path / "own" / "notes.txt").write_text("about the images")
    (tmp_path / "own" / "empty").mkdir()
    write(tmp_path / "own" / "__MACOSX" / "._b.png", pixels(1, 1))
    write(tmp_path / "own" / ".thumbnails" / "b.png", pixels(1, 1))
    path = zipped(tmp_path / "own", tmp_path / "own.zip") if packed else tmp_path / "own"
    source = pfgm.data.open(path)
    assert source.names == ("ant", "cat", "dog")
    assert labels(source) == [0, 1, 2, 2]
    order = ["ant/z.png", "cat/deep/1.jpg.png", "dog/a.png", "dog/b.png"]
    np.testing.assert_array_equal(source.samples.tensor[:, 0], np.stack([images[n] for n in order]))


@pytest.mark.parametrize(
    "names", [["a.png", "b.png"], ["one/a.png", "one/b.png"], ["a.png", "x/b.png"]]
)
def test_images_outside_of_class_folders_have_no_labels(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, pixels(4, 3))
    assert labels(pfgm.data.open(tmp_path)) is None
    assert pfgm.data.open(tmp_path).names == ()


def edm(folder: Path, content: Any) -> None:
    for i in range(3):
        write(folder / f"0000{i % 2}" / f"img0000000{i}.png", pixels(4, 3, seed=i))
    (folder / "dataset.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


PAIRS = [["00000/img00000000.png", 5], ["00001/img00000001.png", 0], ["00000/img00000002.png", 5]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_data_sets_of_edm(tmp_path: Path, packed: bool, method: int) -> None:
    """Folders 00000 and 00001 are no classes; dataset.json holds the labels."""
    folder = tmp_path / "set"
    edm(folder, {"labels": PAIRS[::-1]})
    path = zipped(folder, tmp_path / "set.zip", compression=method) if packed else folder
    source = pfgm.data.open(path)
    assert labels(source) == [5, 5, 0]
    assert source.names == ()
    np.testing.assert_array_equal(source.samples.tensor[1, 0], pixels(4, 3, seed=2))
    edm(folder, {"labels": None})
    path = zipped(folder, tmp_path / "set.zip", compression=method) if packed else folder
    assert labels(pfgm.data.open(path)) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "{}",
        {"labels": 3},
        {"labels": [[1]]},
        "[" * 10**5,
        {"labels": PAIRS[:2]},
        {"labels": [[name, -1] for name, _ in PAIRS]},
        {"labels": [[name, 0.5] for name, _ in PAIRS]},
        {"labels": [[name, [0, 1]] for name, _ in PAIRS]},
        {"labels": [[name, True] for name, _ in PAIRS]},
        {"labels": [[name, 10**30] for name, _ in PAIRS]},
    ],
)
def test_damaged_labels_are_refused(tmp_path: Path, content: Any) -> None:
    edm(tmp_path, content)
    with pytest.raises(
        ValueError, match=r"dataset\.json must be (JSON of the form|an integer of at least 0)"
    ):
        pfgm.data.open(tmp_path)


def test_damaged_archives_are_one_sentence(tmp_path: Path) -> None:
    class_folders(tmp_path / "own")
    path = zipped(tmp_path / "own", tmp_path / "own.zip")
    whole = path.read_bytes()
    for content in (b"", whole[:40], whole[:-30], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"own\.zip"):
            pfgm.data.open(path)
    start = whole.index(b"IDAT")
    path.write_bytes(whole[:start] + b"xxxxxxxxxx" + whole[start + 10 :])
    with pytest.raises(
        ValueError, match=r"ant/z\.png in .* must be a complete image in one of the"
    ):
        pfgm.data.open(path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("no image")
    zipped(tmp_path / "none", path)
    for source, kind in ((path, "an archive"), (tmp_path / "none", "a folder")):
        message = rf"^{source} must hold at least one .*, got {kind} without images\."
        with pytest.raises(ValueError, match=message):
            pfgm.data.open(source)


def test_archives_that_ask_for_too_much_are_refused(tmp_path: Path) -> None:
    """A member that claims to unpack to gigabytes, and one with a password."""
    write(tmp_path / "own" / "a.png", pixels(4, 3))
    path = zipped(tmp_path / "own", tmp_path / "own.zip")
    whole = bytearray(path.read_bytes())
    central = whole.index(b"PK\x01\x02")
    for offset, value, message in (
        (
            24,
            (2**31).to_bytes(4, "little"),
            r"a\.png in .* must unpack to at most.*got 2147483648\.",
        ),
        (8, b"\x01\x00", r"a\.png in .* must not be encrypted; archives with passwords"),
    ):
        changed = bytearray(whole)
        changed[central + offset : central + offset + len(value)] = value
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            pfgm.data.open(path)


def test_images_that_announce_more_pixels_than_fit_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfgm.data.images.memory_bytes", lambda: 2e6)
    for name in ("a.png", "b.png"):
        write(tmp_path / "own" / name, np.zeros((1000, 2000), np.uint8))
    path = zipped(tmp_path / "own", tmp_path / "own.zip")
    monkeypatch.setattr("pfgm.data.images.pixels", None)
    with pytest.raises(MemoryError, match=r"own\.zip holds 2 images of 2000 × 1000 pixels, which"):
        pfgm.data.open(path)


def test_an_image_with_more_pixels_than_pillow_decodes_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    write(tmp_path / "own" / "a.png", pixels(20, 20))
    for source in (tmp_path / "own", zipped(tmp_path / "own", tmp_path / "own.zip")):
        with pytest.raises(ValueError, match="must have at most 200 pixels, twice"):
            pfgm.data.open(source)


def test_two_files_of_one_name_in_an_archive_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png", pixels(4, 3))
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.write(tmp_path / "a.png")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must hold one file of each name, got .* twice"):
        pfgm.data.open(tmp_path / "own.zip")


@pytest.mark.parametrize("name", ["/etc/a.png", "../../a.png", "c:/a.png"])
def test_names_in_archives_are_no_paths(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.png", pixels(4, 3))
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.write(tmp_path / "a.png", name)
    before = sorted(tmp_path.rglob("*"))
    source = pfgm.data.open(tmp_path / "own.zip")
    np.testing.assert_array_equal(source.samples.tensor[0, 0], pixels(4, 3))
    assert sorted(tmp_path.rglob("*")) == before


def test_palettes_become_colours_and_their_transparent_colour_white(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(3, 5)).convert("P")
    image.putpalette(pixels(768).tolist())
    expected = np.array(image.convert("RGB"))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded(tmp_path)[0], expected.transpose(2, 0, 1))
    first = int(np.array(image)[0, 0])
    image.save(tmp_path / "a.png", transparency=first)
    expected[np.array(image) == first] = 255
    np.testing.assert_array_equal(loaded(tmp_path)[0], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"a{suffix}", np.full((8, 8, 3), (200, 100, 50), np.uint8))
    difference = loaded(tmp_path).astype(int) - np.array([200, 100, 50])[:, None, None]
    assert np.abs(difference).max() < 8


def test_broken_images_and_other_formats_under_a_false_name_are_refused(tmp_path: Path) -> None:
    """For some formats, such as PostScript, Pillow would run a program."""
    write(tmp_path / "a.png", pixels(30, 50))
    path, foreign = tmp_path / "b.png", io.BytesIO()
    Image.fromarray(pixels(30, 50)).save(foreign, format="GIF")
    whole = (tmp_path / "a.png").read_bytes()
    parts = [whole[:size] for size in (0, 5, 20, 100, len(whole) - 100)]
    for content in (*parts, foreign.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} must be a complete image in one of the for"):
            pfgm.data.open(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write(folder / "cat" / "1.png", pixels(3, 5))
    write(tmp_path / "elsewhere" / "2.png", pixels(3, 5, seed=1))
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "up").symlink_to(folder)  # a loop
    source = pfgm.data.open(folder)
    assert source.names == ("cat", "dog")
    assert labels(source) == [0, 1]
    np.testing.assert_array_equal(loaded(folder)[1, 0], pixels(3, 5, seed=1))


def test_links_to_nothing_are_no_images_to_leave_out(tmp_path: Path) -> None:
    write(tmp_path / "a.png", pixels(3, 5))
    (tmp_path / "b.png").symlink_to(tmp_path / "missing.png")
    (tmp_path / "c.txt").symlink_to(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "b.png"))):
        pfgm.data.open(tmp_path)


@pytest.mark.parametrize("progress", [False, True, None])
def test_progress_is_shown_where_asked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    terminal: None,
    monkeypatch: pytest.MonkeyPatch,
    progress: bool | None,
) -> None:
    """Unasked, of many images or items in a terminal."""
    write(tmp_path / "a.png", pixels(3, 5))
    for many in (2000, 0):
        monkeypatch.setattr("pfgm.common.messages._MANY", many)
        shown = bool(progress) or (progress is None and not many)
        pfgm.data.open(tmp_path, progress=progress)
        errors = capsys.readouterr().err
        assert ("sizes of images: 100%" in errors, "\rimages: 100%" in errors) == (shown, shown)
        pfgm.data.open(TensorDataset(torch.zeros(3, 2)), progress=progress)
        assert ("dataset: 100%" in capsys.readouterr().err) == shown
        pfgm.ReferenceSet(tmp_path, progress=progress)
        assert ("images: 100%" in capsys.readouterr().err) == shown


def test_outside_of_a_terminal_progress_is_shown_only_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfgm.common.messages._MANY", 0)
    monkeypatch.setattr("pfgm.common.messages._MINUTE", 0.0)
    write(tmp_path / "a.png", pixels(3, 5))
    pfgm.data.open(tmp_path)
    assert capsys.readouterr().err == ""
    pfgm.data.open(tmp_path, progress=True)
    assert "images" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["held-out", "held_out", "test"])
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_two_parts_has_held_out_images(
    tmp_path: Path, other: str, classes: bool, packed: bool
) -> None:
    """Labels count as in training, where the held-out images lack a class too."""
    folder, below = tmp_path / "pets", ("cat", "dog") if classes else ("", "")
    for i, name in enumerate(below):
        write(folder / "train" / name / f"{i}.png", pixels(3, 4, 3, seed=i))
    write(folder / other / below[1] / "2.png", pixels(3, 4, seed=2))
    (folder / "credits.txt").write_text("by nobody")
    data = pfgm.data.open(zipped(folder, tmp_path / "a.zip") if packed else folder)
    expected = [pixels(3, 4, 3, seed=i).transpose(2, 0, 1) for i in (0, 1)]
    np.testing.assert_array_equal(data.samples[:].numpy(), expected)
    grey = np.stack([pixels(3, 4, seed=2)] * 3)  # with the channels of the others
    np.testing.assert_array_equal(data.held_out.samples[:].numpy(), [grey])
    assert labels(data) == ([0, 1] if classes else None)
    assert labels(data.held_out) == ([1] if classes else None)
    assert (data.names, data.classes) == ((("cat", "dog"), 2) if classes else ((), 0))
    assert torch.equal(pfgm.ReferenceSet(folder)[:], data.samples[:])


def test_folders_of_more_parts_or_other_classes_are_refused(tmp_path: Path, refused: Any) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/cow/4.png"):
        write(tmp_path / name, pixels(3, 4))
    refused(lambda: pfgm.data.open(tmp_path), "held-out images …the classes in train, got cow.")
    (tmp_path / "test" / "cow").rename(tmp_path / "val")
    refused(lambda: pfgm.data.open(tmp_path), "…one folder beside train, …got test and val.")
    (tmp_path / "train").rename(tmp_path / "bus")
    assert pfgm.data.open(tmp_path).names == ("bus", "test", "val")  # classes


class Items(Dataset[Any]):
    """Counts how often each item is fetched."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.fetched = [0] * len(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.fetched[index] += 1
        return self.items[index]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.uint8, torch.uint8),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_dtypes_of_items(dtype: torch.dtype, kept: torch.dtype) -> None:
    rows = torch.arange(12).view(3, 2, 2).to(dtype)
    source = pfgm.data.open(TensorDataset(rows))
    assert source.labels is None
    assert source.samples.dtype == kept
    assert torch.equal(source.samples.tensor, rows.to(kept))


def test_each_item_is_fetched_once_and_copied() -> None:
    rows = torch.zeros(5, 2)
    items = Items(*rows)
    source = pfgm.data.open(items)
    assert items.fetched == [1] * 5
    rows += 1
    assert (source.samples.tensor == 0).all()


Pair = namedtuple("Pair", "sample target")


@pytest.mark.parametrize(
    "item",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, torch.tensor(y)],
        lambda x, y: (x, np.int32(y)),
        lambda x, y: (x, np.array(y)),
        lambda x, y: (x, y, "more"),
        Pair,
        lambda x, y: {"image": x, "label": y},
        lambda x, y: {"id": 5, "images": x, "labels": y},
        lambda x, y: {"label": y, "x": x},
        lambda x, y: {"label": y, "data": x},
        lambda x, y: {"sample": x, "label": y},
    ],
)
@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy()])
def test_labelled_items(item: Any, convert: Any) -> None:
    rows, labels = torch.arange(12.0).view(3, 4), torch.tensor([7, 0, -1])
    pairs = zip(rows, labels.tolist(), strict=True)
    source = pfgm.data.open(Items(*(item(convert(row), label) for row, label in pairs)))
    assert torch.equal(source.samples.tensor, rows)
    assert source.labels.dtype == torch.int64
    assert torch.equal(source.labels, labels)


@pytest.mark.parametrize("second", ["a name", 1.5, None, True, torch.zeros(2), torch.tensor(0.5)])
def test_only_integers_are_labels(second: Any) -> None:
    assert pfgm.data.open(Items((torch.zeros(2), second), (torch.ones(2), second))).labels is None
    items = [{"x": torch.zeros(2), "label": second}] * 2
    assert pfgm.data.open(Items(*items)).labels is None


def test_pillow_images_as_items() -> None:
    colours = [pixels(4, 3, 3, seed=i) for i in range(2)]
    grey = pixels(4, 3)
    images = [Image.fromarray(image) for image in [*colours, grey]]
    source = pfgm.data.open(Items(*((image, i) for i, image in enumerate(images))))
    assert source.labels.tolist() == [0, 1, 2]
    expected = np.stack([*colours, np.stack([grey] * 3, -1)]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(source.samples.tensor.numpy(), expected, strict=True)
    assert pfgm.data.open(Items(images[2])).samples.row_shape == (1, 4, 3)


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([torch.zeros(2)])

    def __len__(self) -> int:
        return 1


def test_loaders_stand_for_their_datasets() -> None:
    """All items in the order of the dataset, whatever the order and the batches of the loader."""
    assert pfgm.data.open(list(Stream())).samples.row_shape == (2,)
    dataset = TensorDataset(torch.arange(10.0).view(5, 2), torch.arange(5))
    for options in (
        {},
        {"shuffle": True, "batch_size": 2, "drop_last": True},
        {"batch_size": None},
    ):
        source = pfgm.data.open(DataLoader(dataset, **options))
        assert torch.equal(source.samples.tensor, dataset.tensors[0])
        assert source.labels.tolist() == [0, 1, 2, 3, 4]


def png(colour: int, depth: int, channels: int) -> bytes:
    """A PNG file of 3 × 2 pixels, byte by byte: Pillow writes none of 16 bits a channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 3, 2, depth, colour, 0, 0, 0)
    rows = 2 * (b"\0" + bytes(range(3 * channels * depth // 8)))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bits_a_channel_are_refused(colour: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(colour, 8, channels))
    assert loaded(tmp_path).shape == (1, 1 if channels == 2 else 3, 2, 3)
    path.write_bytes(png(colour, 16, channels))
    with pytest.raises(ValueError, match=r"must have 8 bits a channel, got 16\."):
        pfgm.data.open(tmp_path)
    write(path, pixels(3, 5).astype(np.uint16))
    with pytest.raises(ValueError, match=r"must have 8 bits a channel, got .* mode I;16\."):
        pfgm.data.open(tmp_path)


FIVE, ROW = TensorDataset(torch.zeros(5, 2)), torch.zeros(2)
GREY, COLOURED = (Image.fromarray(pixels(*shape)) for shape in ((4, 3), (4, 3, 3)))
DEEP = (png(2, 16, 3), png(6, 16, 4), b"P6 2 1 65535\n" + bytes(12), b"P3 1 1 300\n1 2 3")
DIFFERENT = [(ROW, torch.zeros(3)), (ROW, torch.zeros(1, 2)), (ROW, ROW.half()), (GREY, COLOURED)]
ITEM = "Item 0 of the dataset must"
REFUSED = [
    *(
        (source, f"TypeError: data must be a tensor, a NumPy array,…got {type(source).__name__}.")
        for source in (None, 3, {"x": torch.zeros(2, 2)}, iter([ROW]), TensorDataset)
    ),
    *(
        (Items(item), f"TypeError: {ITEM} be a tensor, a NumPy array, a Pillow image, or…")
        for item in ("text", 3, None, [], {}, [[1.0, 2.0]], {"x": 1.0})
    ),
    *(
        (Items(item), f"TypeError: {ITEM} hold uint8 or floating-point numbers, got…")
        for item in (ROW.long(), ROW.short().numpy())
    ),
    *((Items([Image.open(io.BytesIO(each))]), f"{ITEM} have 8 bits…, got 16.") for each in DEEP),
    (Items(ROW[0], ROW[0]), "data must have shape (n, *S),…got (2,) (n numbers in a file or a…"),
    (Items(), "data must have at least one item, got a dataset of 0 items."),
    (
        Items((ROW, 1), (ROW, "b")),
        "Item 1 of the dataset has no integer label, but item 0 has one;…",
    ),
    (Items((ROW, None), (ROW, 1)), "Item 1 of…has an integer label, but item 0 has none;…"),
    *(
        (
            Items(item, item, other),
            "Item 2 of the dataset must have the shape and dtype of item 0,…",
        )
        for item, other in DIFFERENT
    ),
    *(
        (
            source,
            f"TypeError: data must have __len__…, got {name}, a dataset without…list(dataset).",
        )
        for source, name in (
            (NoLength(), "NoLength"),
            (Stream(), "Stream"),
            (DataLoader(Stream()), "Stream"),
        )
    ),
    *(
        (DataLoader(FIVE, **options), f"data must be a DataLoader of all items…its own {what};…")
        for options, what in (
            ({"sampler": SubsetRandomSampler([1, 2])}, "sampler, a SubsetRandomSampler"),
            ({"sampler": RandomSampler(FIVE, replacement=True)}, "sampler, a RandomSampler"),
            ({"sampler": RandomSampler(FIVE, num_samples=3)}, "sampler, a RandomSampler"),
            ({"batch_sampler": [[0, 1], [3]]}, "batch_sampler, a list"),
            ({"collate_fn": torch.stack}, "collate_fn"),
        )
    ),
]


@pytest.mark.parametrize(("source", "sentence"), REFUSED)
def test_sources_in_memory_that_are_refused(refused: Any, source: Any, sentence: str) -> None:
    refused(lambda: pfgm.data.open(source), sentence)


def test_images_of_many_sizes_become_squares_of_one(tmp_path: Path) -> None:
    """Against means of blocks, which the filter keeps in smooth images, and against the crop."""
    slope = np.add.outer(np.arange(48), 2 * np.arange(32)).astype(np.uint8)  # 48 high, 32 wide
    write(tmp_path / "tall.png", slope)
    write(tmp_path / "wide.png", np.ascontiguousarray(slope.T))
    size = f"the size of {tmp_path / 'tall.png'}, 32 × 48 pixels, got 48 × 32; --resize N, in"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'wide.png'} must have {size}")):
        pfgm.data.open(tmp_path)
    tall, wide = pfgm.data.open(tmp_path, resize=8).samples[:]
    assert tall.shape == (1, 8, 8)
    square = slope[8:40].reshape(8, 4, 8, 4).mean((1, 3))
    inner = tall[0, 1:-1, 1:-1].numpy().astype(float)
    np.testing.assert_allclose(inner, square[1:-1, 1:-1], atol=1)
    assert (tall[0].int() - wide[0].T.int()).abs().max() <= 1
    same = pfgm.data.open(tmp_path, resize=32).samples[:]
    np.testing.assert_array_equal(same[0, 0].numpy(), slope[8:40])
    assert pfgm.data.open(tmp_path, resize=50).samples[:].shape == (2, 1, 50, 50)
    with pytest.raises(
        ValueError, match=r"resize must be an integer of at least 1 and at most.*got 0\."
    ):
        pfgm.data.open(tmp_path, resize=0)


def test_transparent_images_are_composed_before_they_are_scaled(tmp_path: Path) -> None:
    hidden = np.zeros((6, 6, 4), np.uint8)  # black, and invisible
    write(tmp_path / "a.png", hidden)
    assert pfgm.data.open(tmp_path, resize=3).samples[:].unique().tolist() == [255]
