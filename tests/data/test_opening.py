"""Data by name and path: the samples in the files, or an error of one sentence."""

import gzip
import io
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pfgm
from pfgm.data import named
from pfgm.data.images import save_image
from pfgm.data.rows import Source
from pfgm.training import TrainConfig, Trainer

FASHION = Path("/usr/share/datasets/fashion-mnist")


def in_file(rows: Source) -> bool:
    return rows.tensor is None


def test_digits() -> None:
    """Those of scikit-learn: image i is held out if i mod 9 is 4 or 8."""
    datasets = pytest.importorskip("sklearn.datasets")
    levels, labels = datasets.load_digits(return_X_y=True)
    digits, data = pfgm.data.digits(), pfgm.data.open("digits")
    held_out = np.isin(np.arange(len(levels)) % 9, (4, 8))
    for part, opened, images, numbers in (
        (~held_out, data, digits.train, digits.train_labels),
        (held_out, data.held_out, digits.held_out, digits.held_out_labels),
    ):
        assert (images.dtype, numbers.dtype) == (torch.float32, torch.int64)
        expected = levels[part].reshape(-1, 1, 8, 8) / 8 - 1
        np.testing.assert_array_equal(images.numpy(), expected)
        np.testing.assert_array_equal(numbers.numpy(), labels[part])
        assert torch.equal(opened.samples[:], images)
        assert torch.equal(opened.labels, numbers)
        assert (opened.classes, opened.grey_levels) == (10, 17)


@pytest.mark.parametrize(
    ("package", "source", "sentence"),
    [
        ("sklearn.datasets", "digits", r"scikit-learn.*pip install '\.\[demo\]'"),
        ("PIL.Image", ".", r"Pillow.*pip install '\.\[demo\]'"),
        ("pandas", "t.csv", r"Tables need pandas.*pip install '\.\[tables\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str, sentence: str
) -> None:
    (tmp_path / "t.csv").write_text("a\n1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=sentence):
        pfgm.data.open(source)


@pytest.mark.parametrize("name", ["", "mnist", "mnist:/tmp", "digits:", "npz:", "folder:", "cifar"])
def test_other_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data must be one of avatars.*digits,.*got '") as caught:
        pfgm.data.open(name)
    assert repr(name) in str(caught.value)


def test_ranges_and_folders_that_are_none_or_not_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ramp(4, 2, 2))
    with pytest.raises(ValueError, match=r"data must be digits,.*got digits:/tmp\."):
        pfgm.data.open("digits:/tmp")
    with pytest.raises(TypeError, match=r"range is 0\.0 255\.0, but the data are bytes"):
        pfgm.data.open(str(tmp_path / "a.npy"), value_range=(0.0, 255.0))
    np.save(tmp_path / "b.npy", ramp(4, 2, 2, dtype=np.float32))
    for none in ((1.0, 0.0), (2.0, 2.0), (0.0, float("inf")), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="range must be two numbers, the lower first, got"):
            pfgm.data.open(tmp_path / "b.npy", value_range=none)
    with pytest.raises(ValueError, match=r"range is for arrays.*0\) for digits; leave it out"):
        pfgm.data.open("digits", value_range=(0.0, 255.0))
    for source in ("digits", str(tmp_path / "a.npy")):
        with pytest.raises(ValueError, match=r"resize is for folders.* images, got 8 for"):
            pfgm.data.open(source, resize=8)


def idx(values: np.ndarray[Any, Any]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def write(path: Path, content: bytes) -> None:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)


def fashion(folder: Path, suffix: str = "") -> dict[str, np.ndarray[Any, Any]]:
    """A small set in the form of Fashion-MNIST: 5 images and 3 held out, of 4 × 6 pixels."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": draw.integers(0, 256, (5, 4, 6)),
        "train-labels-idx1-ubyte": np.array([9, 0, 3, 3, 1]),
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (3, 4, 6)),
        "t10k-labels-idx1-ubyte": np.array([2, 7, 2]),
    }
    for name, values in arrays.items():
        write(folder / (name + suffix), idx(values))
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_in_a_folder(tmp_path: Path, suffix: str) -> None:
    arrays = fashion(tmp_path, suffix)
    data = pfgm.data.open(f"fashion-mnist:{tmp_path}")
    assert data.samples.shape == (5, 1, 4, 6)
    assert data.samples.dtype == torch.uint8
    images = data.samples[:][:, 0].numpy()
    np.testing.assert_array_equal(images, arrays["train-images-idx3-ubyte"])
    held_out = data.held_out.samples[:][:, 0].numpy()
    np.testing.assert_array_equal(held_out, arrays["t10k-images-idx3-ubyte"])
    assert data.labels.tolist() == [9, 0, 3, 3, 1]
    assert data.held_out.labels.tolist() == [2, 7, 2]
    assert (data.classes, data.grey_levels) == (10, 256)


def test_fashion_mnist_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    fashion(tmp_path / "fashion-mnist")
    assert pfgm.data.open("fashion-mnist").samples.shape == (5, 1, 4, 6)
    # Label 5 by Xiao et al., arXiv 1708.07747, table 2.
    assert pfgm.data.open("fashion-mnist").names[5] == "sandal"
    monkeypatch.setattr(named, "_DEBIAN_FOLDER", tmp_path / "debian")
    fashion(tmp_path / "debian", ".gz")
    monkeypatch.setenv("PFGM_DATA", str(tmp_path / "elsewhere"))
    assert pfgm.data.open("fashion-mnist").samples.shape == (5, 1, 4, 6)
    monkeypatch.setattr(named, "_DEBIAN_FOLDER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"elsewhere/fashion-mnist nor at .*nowhere"):
        pfgm.data.open("fashion-mnist")
    monkeypatch.delenv("PFGM_DATA")
    with pytest.raises(FileNotFoundError, match=r"\$PFGM_DATA/fashion-mnist.*fashion-mnist:FOLDER"):
        pfgm.data.open("fashion-mnist")


def test_avatars_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.avatars\.render.*avatars:FOLDER"):
        pfgm.data.open("avatars")
    for place, count in (("train", 3), ("held-out", 2)):
        for label, style in enumerate(("micah", "personas")):
            folder = tmp_path / "avatars" / place / style
            folder.mkdir(parents=True)
            for number in range(count):
                image = torch.full((3, 4, 4), 100 * label + number, dtype=torch.uint8)
                save_image(folder / f"{number}.png", image)
    for source in ("avatars", f"avatars:{tmp_path / 'avatars'}"):
        data = pfgm.data.open(source)
        assert data.samples[:][:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.held_out.samples[:][:, 2, 3, 3].tolist() == [0, 1, 100, 101]
        assert data.held_out.labels.tolist() == [0, 0, 1, 1]
        assert (data.classes, data.grey_levels, data.names) == (2, 256, ("micah", "personas"))
    (tmp_path / "avatars" / "held-out" / "micah").rename(tmp_path / "avatars/held-out/others")
    with pytest.raises(ValueError, match=r"must be of the classes in train, got others"):
        pfgm.data.open("avatars")


IMAGES, OTHER = idx(np.zeros((5, 4, 6))), idx(np.zeros((3, 4, 5)))


def labels(values: list[int]) -> bytes:
    return gzip.compress(idx(np.array(values)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        IMAGES[:3],
        IMAGES[:14],
        IMAGES[:-1],
        IMAGES + b"\0",
        idx(np.zeros(5)),
        bytes([0, 0, 9]) + IMAGES[3:],  # signed bytes
        bytes([0, 0, 8, 3]) + b"\xff" * 12 + IMAGES[16:],  # more than any file holds
        idx(np.zeros((0, 4, 6))),
    ],
)
def test_damaged_idx_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    fashion(tmp_path, suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    write(path, content)
    with pytest.raises(ValueError, match=f"^{path} must be an original file of Fashion-MNIST,"):
        pfgm.data.open(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "damaged", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda whole: whole[:-9], "an original file of Fashion-M"),
        ("train-images-idx3-ubyte.gz", lambda _: IMAGES, "an original file of Fashion-MNIST,"),
        (
            "train-images-idx3-ubyte.gz",
            lambda whole: whole[:10] + bytes([whole[10] ^ 0xFF]) + whole[11:],
            "an original file of Fashion-MNIST,",
        ),
        ("train-labels-idx1-ubyte.gz", lambda _: labels(4 * [0]), r" must hold 5 labels,.*got 4\."),
        ("t10k-labels-idx1-ubyte.gz", lambda _: labels([9, 9, 10]), r"must be from 0.*got 10\."),
        ("t10k-images-idx3-ubyte.gz", lambda _: gzip.compress(OTHER), r"images of one.*got two\."),
        ("t10k-labels-idx1-ubyte.gz", None, "neither t10k-labels-idx1-ubyte nor t10k-labels"),
    ],
)
def test_idx_files_that_are_damaged_missing_or_do_not_fit_together(
    tmp_path: Path, name: str, damaged: Callable[[bytes], bytes] | None, message: str
) -> None:
    fashion(tmp_path, ".gz")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damaged is not None:
        (tmp_path / name).write_bytes(damaged(whole))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pfgm.data.open(f"fashion-mnist:{tmp_path}")


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its paper, arXiv 1708.07747: ten classes of equal numbers."""
    monkeypatch.delenv("PFGM_DATA", raising=False)
    data = pfgm.data.open("fashion-mnist")
    assert data.samples.shape == (60_000, 1, 28, 28)
    assert data.labels.tolist()[:4] == [9, 0, 0, 3]
    for part in (data, data.held_out):
        assert torch.bincount(part.labels).tolist() == [len(part.samples) // 10] * 10


def cifar(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Two records in each of its files; a record is a label and 3 × 32 × 32 bytes."""
    draw = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    records = {name: draw.integers(0, 256, (2, 3073)).astype(np.uint8) for name in names}
    for number, (name, values) in enumerate(records.items()):
        values[:, 0] = number, 9 - number
        (folder / name).write_bytes(values.tobytes())
    return records


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = cifar(tmp_path / "cifar10" / inner)
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    for source in ("cifar10", f"cifar10:{tmp_path / 'cifar10'}"):
        data = pfgm.data.open(source)
        images = data.samples[:].numpy()
        assert images.shape == (10, 3, 32, 32)
        assert data.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
        third = records["data_batch_3.bin"][1]
        # "the first 1024 bytes are the red channel values … stored in row-major order"
        assert images[5, 0, 1, 2] == third[1 + 32 + 2]
        assert images[5, 2, 31, 31] == third[-1]
        np.testing.assert_array_equal(
            data.held_out.samples[:].numpy().reshape(2, -1), records["test_batch.bin"][:, 1:]
        )
        assert data.held_out.labels.tolist() == [5, 4]
        assert (data.classes, data.grey_levels) == (10, 256)


def test_missing_cifar10_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PFGM_DATA", raising=False)
    archive = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    with pytest.raises(FileNotFoundError, match=f"download {archive}, unpack it, .*cifar10:FOLDER"):
        pfgm.data.open("cifar10")
    there = f"download {archive} and unpack it in {tmp_path}"
    with pytest.raises(FileNotFoundError, match=there):
        pfgm.data.open(f"cifar10:{tmp_path}")
    for inner in ("cifar-10-batches-py", ""):  # the Python version
        (tmp_path / inner).mkdir(exist_ok=True)
        (tmp_path / inner / "data_batch_1").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=rf"pickled, and not read\); {there}"):
            pfgm.data.open(f"cifar10:{tmp_path}")
        shutil.rmtree(tmp_path / inner)
    cifar(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"no data_batch_4.bin.*{there}"):
        pfgm.data.open(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("damage", ["cut", "empty", "label"])
def test_damaged_cifar10(tmp_path: Path, damage: str) -> None:
    cifar(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "empty": b"", "label": b"\x0a" + content[1:]}[damage])
    message = "must be from 0 to 9, got 10" if damage == "label" else "records of 3073 bytes"
    with pytest.raises(ValueError, match=message):
        pfgm.data.open(f"cifar10:{tmp_path}")


def save(path: Path, **arrays: np.ndarray[Any, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}, path)
    return path


def ramp(*shape: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("prefix", ["", "npz:"])
def test_a_file_stays_where_it_is(tmp_path: Path, prefix: str) -> None:
    np.save(tmp_path / "a.npy", ramp(4, 3, 2, 2))
    data = pfgm.data.open(f"{prefix}{tmp_path / 'a.npy'}")
    assert in_file(data.samples)
    np.testing.assert_array_equal(data.samples[:].numpy(), ramp(4, 3, 2, 2))
    assert (data.labels, data.held_out, data.table, data.names) == (None, None, None, ())
    assert (data.classes, data.grey_levels) == (0, 256)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_grey_images_get_a_channel_in_place(tmp_path: Path, dtype: torch.dtype) -> None:
    images = torch.arange(60).view(5, 3, 4).to(dtype)
    save_file({"images": images}, tmp_path / "grey.safetensors")
    data = pfgm.data.open(str(tmp_path / "grey.safetensors"), layout="images")
    assert data.samples.shape == (5, 1, 3, 4)
    assert in_file(data.samples)
    assert torch.equal(data.samples[:][:, 0], images)
    assert data.grey_levels == (256 if dtype == torch.uint8 else 0)
    np.savez_compressed(tmp_path / "grey.npz", images.float().numpy())
    compressed = pfgm.data.open(tmp_path / "grey.npz", layout="images").samples
    assert not in_file(compressed)
    assert torch.equal(compressed[:][:, 0], images.float())


@pytest.mark.parametrize(
    ("shape", "becomes"),
    [
        ((2000, 4, 5, 3), (2000, 3, 4, 5)),
        ((7, 4, 5, 1), (7, 1, 4, 5)),
        ((7, 3, 5, 3), (7, 3, 5, 3)),  # channels are first already
        ((7, 4, 5, 2), (7, 4, 5, 2)),
        ((7, 3), (7, 3)),
    ],
)
def test_channels_come_first(
    tmp_path: Path, shape: tuple[int, ...], becomes: tuple[int, ...]
) -> None:
    array = ramp(*shape, dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    rows = pfgm.data.open(str(tmp_path / "a.npy"), layout="images").samples
    assert rows.shape == becomes
    assert in_file(rows) == (shape == becomes)
    expected = array if shape == becomes else np.moveaxis(array, -1, 1)
    np.testing.assert_array_equal(rows[:].numpy(), expected)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("label", ["labels", "label", "y"])
@pytest.mark.parametrize("held_out", ["held_out", "test"])
def test_labels_and_held_out_samples(
    tmp_path: Path, suffix: str, label: str, held_out: str
) -> None:
    arrays = {
        "images": ramp(4, 3, 2),
        label: np.array([2, 0, 0, 1], dtype=np.int32 if label == "y" else np.int64),
        held_out: ramp(2, 3, 2)[::-1].copy(),
        f"{held_out}_labels": np.array([5, 0], dtype=np.uint8),
    }
    path = save(tmp_path / f"set{suffix}", **arrays)
    data = pfgm.data.open(str(path))
    np.testing.assert_array_equal(data.samples[:][:, 0].numpy(), arrays["images"])
    np.testing.assert_array_equal(data.held_out.samples[:][:, 0].numpy(), arrays[held_out])
    assert data.labels.tolist() == [2, 0, 0, 1]
    assert data.held_out.labels.tolist() == [5, 0]
    assert (data.classes, data.grey_levels) == (6, 256)


def test_a_single_array_is_the_samples_whatever_its_name(tmp_path: Path) -> None:
    data = pfgm.data.open(str(save(tmp_path / "a.npz", held_out=ramp(4, 3))))
    assert data.samples.shape == (4, 3)
    assert data.held_out is None


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": ramp(3)}, r"labels in .* must have shape \(4,\), a label for.*got \(3,\)\."),
        ({"y": ramp(4, dtype=np.float32)}, r"y in .* must be integers, one.*got float32\."),
        ({"y": ramp(4, dtype=np.bool_)}, r"y in .* must be integers, one.*got bool\."),
        ({"label": ramp(4), "labels": ramp(4)}, r" must have one array of.*got labels and label;"),
        ({"test": ramp(2, 5)}, r"test in .* must have the.*got torch\.uint8 and shape \(2,"),
        ({"test": ramp(2, 3, dtype=np.float32)}, r"test in .* must have.*got torch\.float32 an"),
        ({"test": ramp(2, 3), "test_labels": ramp(3)}, r"test_labels in .*.*got \(3,\)\."),
    ],
)
def test_arrays_that_do_not_fit_together(
    tmp_path: Path, suffix: str, arrays: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / f"set{suffix}", x=ramp(4, 3), **arrays)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        pfgm.data.open(str(path))
    assert str(path) in str(caught.value)


def test_pickled_labels_are_not_read(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return pytest.fail, ("a pickle was loaded",)

    np.savez(tmp_path / "a.npz", x=ramp(4, 3), labels=np.array([Malicious()] * 4, dtype=object))
    with pytest.raises(ValueError, match="pickled"):
        pfgm.data.open(str(tmp_path / "a.npz"))


def test_a_missing_file_or_folder(tmp_path: Path) -> None:
    for name in ("no.npy", "npz:no.npz", "npz:no"):
        with pytest.raises(FileNotFoundError, match=r"no.* does not exist"):
            pfgm.data.open(name)
    with pytest.raises(FileNotFoundError, match="is neither an existing folder nor"):
        pfgm.data.open(f"folder:{tmp_path / 'no'}")
    (tmp_path / "notes.txt").write_text("no array")
    with pytest.raises(ValueError, match=r"suffix .\.txt."):
        pfgm.data.open(str(tmp_path / "notes.txt"))


def test_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "digits"  # a name too, unless written as a path
    folder.mkdir()
    for number in range(3):
        image.fromarray(ramp(4, 5) + number).save(folder / f"{number}.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = f"folder:{folder}", str(folder), "./digits", "folder:~/digits"
    for source in (*folders, "a.zip", "folder:a.zip", Path("a.zip")):
        data = pfgm.data.open(source)
        assert data.samples.shape == (3, 1, 4, 5)
        np.testing.assert_array_equal(data.samples[:][2, 0].numpy(), ramp(4, 5) + 2)
        assert (data.labels, data.held_out, data.table, data.names) == (None, None, None, ())
    assert (data.classes, data.grey_levels) == (0, 256)


def test_signals_keep_their_shape(tmp_path: Path) -> None:
    """No axis is added to floating-point samples, and none moves; bytes are images."""
    for shape in ((2, 64), (5, 6), (64, 1), (3, 4, 5), (64, 64, 4)):
        np.save(tmp_path / "a.npy", ramp(3, *shape, dtype=np.float32))
        assert pfgm.data.open(str(tmp_path / "a.npy")).samples.shape == (3, *shape)
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 64), np.uint8))
    assert pfgm.data.open(str(tmp_path / "a.npy")).samples.shape == (3, 1, 2, 64)
    assert pfgm.data.open(str(tmp_path / "a.npy"), layout="as-is").samples.shape == (3, 2, 64)
    np.save(tmp_path / "a.npy", np.zeros((3, 6, 5, 3), np.uint8))
    assert pfgm.data.open(str(tmp_path / "a.npy")).samples.shape == (3, 3, 6, 5)


@pytest.mark.parametrize(("shape", "images"), [((12, 9), (1, 12, 9)), ((12, 9, 3), (3, 12, 9))])
def test_floats_that_look_like_images_are_asked_about(
    tmp_path: Path, shape: tuple[int, ...], images: tuple[int, ...]
) -> None:
    array = ramp(4, *shape, dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    path = str(tmp_path / "a.npy")
    with pytest.warns(UserWarning, match="stay as they are; if they are images"):
        assert pfgm.data.open(path).samples.shape == (4, *shape)
    moved = torch.from_numpy(array).reshape(4, 12, 9, -1).permute(0, 3, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pfgm.data.open(path, layout="images").samples[:], moved)
        assert pfgm.data.open(path, layout="as-is").samples.shape == (4, *shape)
    assert moved.shape[1:] == images


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_values_of_a_range_become_minus_one_to_one(tmp_path: Path, dtype: Any, suffix: str) -> None:
    path, images = tmp_path / f"a{suffix}", ramp(16, 4, 4, dtype=dtype)
    np.save(path, images) if suffix == ".npy" else np.savez_compressed(path, images)
    train = pfgm.data.open(str(path), value_range=(0.0, 255.0), layout="images").samples
    assert in_file(train) == (suffix == ".npy")
    assert train.dtype == torch.float32
    expected = torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 127.5 - 1
    torch.testing.assert_close(train[:], expected, rtol=0, atol=2e-7)
    torch.testing.assert_close(train[torch.tensor([3, 0])], expected[[3, 0]], rtol=0, atol=2e-7)
    torch.testing.assert_close(
        torch.cat([*pfgm.ReferenceSet(train).chunks()]), expected, rtol=0, atol=2e-7
    )
    assert pfgm.ReferenceSet(train).rms == pytest.approx(
        float(expected.square().mean().sqrt()), rel=1e-6
    )


def test_two_arrays_of_one_name_are_refused(tmp_path, refused):
    path = tmp_path / "two.npz"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the second
        for name, array in (("x", np.zeros((3, 2))), *2 * [("label", np.arange(3))]):
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{name}.npy", content.getvalue())
    refused(lambda: pfgm.data.open(str(path)), "…different names of arrays, got 'label' twice.")


def test_labels_in_safetensors_must_be_integers(tmp_path, refused):
    """NumPy has no bfloat16."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(3, 2), "y": torch.ones(3).bfloat16()}, path)
    refused(lambda: pfgm.data.open(str(path)), "TypeError: y in …must be integers, …got bfloat16.")


def test_a_source_means_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For what is opened, for references and for flows; and a Path is never a name."""
    np.save(tmp_path / "grey.npy", ramp(5, 8, 9))
    np.savez(tmp_path / "set.npz", x=ramp(4, 3), labels=np.arange(4), test=ramp(2, 3))
    (tmp_path / "digits").mkdir()
    save_image(tmp_path / "digits" / "1.png", torch.zeros(1, 4, 6))
    monkeypatch.chdir(tmp_path)
    items = [(torch.ones(2), 3), (torch.zeros(2), 1)]
    sources = ("digits", Path("digits"), "grey.npy", "set.npz", torch.rand(5, 8, 9), items)
    shapes = (1398, 1, 8, 8), (1, 1, 4, 6), (5, 1, 8, 9), (4, 3), (5, 8, 9), (2, 2)
    for source, shape in zip(sources, shapes, strict=True):
        data, references = pfgm.data.open(source), pfgm.ReferenceSet(source)
        assert data.samples.shape == tuple(references.shape) == shape
        assert torch.equal(data.samples[:], references[:])
        assert torch.equal(pfgm.ReferenceSet(data)[:], references[:])
        assert pfgm.PoissonFlow.from_data(source).config == (
            pfgm.PoissonFlow.from_data(data).config
        )
        assert (data.labels is None) == (references.labels is None)
        assert pfgm.data.open(data) is data
    with pytest.raises(ValueError, match="layout is for arrays"):
        pfgm.data.open(data, layout="images")


def test_samples_are_indexed_as_tensors_are(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(6, 2)
    np.save(tmp_path / "a.npy", rows.numpy())
    mask = torch.tensor([True, False, False, True, True, False])
    for source in (rows, tmp_path / "a.npy"):
        samples = pfgm.data.open(source).samples
        for index in (slice(None), slice(1, -1, 2), mask, torch.tensor([-1, 2, 2]), 3, -1):
            assert torch.equal(samples[index], rows[index])
        for wrong in (6, torch.tensor([6]), mask[:5]):
            with pytest.raises(IndexError):
                samples[wrong]
        assert len([*samples]) == 6
        samples[:].zero_()
        assert torch.equal(samples[:], torch.arange(12.0).view(6, 2))  # a copy


def test_arrays_in_memory_take_the_options_of_array_files() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3)
    data = pfgm.data.open(images, layout="images", value_range=(0.0, 255.0))
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(data.samples[:], expected)


def test_a_trainer_records_what_was_opened(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    (tmp_path / "t.csv").write_text("a,b,label\n" + "1.5,x,old\n2.5,y,new\n" * 8)
    data = pfgm.data.open(tmp_path / "t.csv")
    flow = pfgm.PoissonFlow.from_data(data)
    for classes, names in ((2, ("new", "old")), (0, ())):
        net = flow.network("mlp", width=8, depth=1, classes=classes)
        config = TrainConfig(steps=2, batch_size=4, warmup=1)
        run = tmp_path / str(classes)
        Trainer(flow, net, data, config, folder=run, progress=False).train()
        assert pfgm.load(run).label_names == names
        assert pfgm.load(run).table == data.table
