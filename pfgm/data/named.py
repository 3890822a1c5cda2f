"""Data by name: avatars, digits, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.optional import optional
from .arrays import from_numpy
from .opened import Data
from .rows import InMemory

FASHION_MNIST_CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""What its labels mean, from 0."""
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
_MAX_DEFLATE_RATIO = 1032  # deflate compresses at most by this factor
_TRAIN_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST_BATCHES = ("test_batch.bin",)
_PICKLED = ("cifar-10-batches-py", "data_batch_1")  # of CIFAR-10's Python version
_RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then red, green and blue


class Digits(NamedTuple):
    """8 × 8 grey images of handwritten digits in [-1, 1] with their labels, in two parts.

    train (1398, 1, 8, 8) and held_out (399, 1, 8, 8) are float32. train_labels (1398,) and
    held_out_labels (399,) are int64 from 0 to 9.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def digits() -> Digits:
    """The handwritten digits that come with scikit-learn, always in the same two parts.

    A grey level from 0 to 16 becomes level/8 - 1. Image i is held out if i mod 9 is 4 or 8. Source:
    the test part of the UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).

    Raises:
        ImportError: scikit-learn is not installed.

    >>> digits().train.shape, digits().held_out.shape
    (torch.Size([1398, 1, 8, 8]), torch.Size([399, 1, 8, 8]))
    """
    datasets = optional("sklearn.datasets", "digits() needs scikit-learn", "demo")
    levels, classes = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(levels).float().view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(classes).long()
    remainder = torch.arange(len(images), device="cpu") % 9
    held_out = (remainder == 4) | (remainder == 8)
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def _digits(folder: Path | None, progress: bool | None) -> Data:
    if folder is not None:
        raise ValueError(f"data must be digits, without a folder, got digits:{folder}.")
    data = digits()
    held_out = Data(InMemory(data.held_out), data.held_out_labels, levels=17)
    return Data(InMemory(data.train), data.train_labels, held_out=held_out, levels=17)


def _fashion_mnist(folder: Path | None, progress: bool | None) -> Data:
    folder = folder or _fashion_mnist_folder()
    train, held_out = (_idx_pair(folder, part) for part in ("train", "t10k"))
    if held_out.samples.row_shape != train.samples.row_shape:
        raise ValueError(f"{folder} must hold images of one size, got two.")
    return replace(train, held_out=held_out)


def _fashion_mnist_folder() -> Path:
    own = _in_data_folder("fashion-mnist")
    for folder in (own, _DEBIAN_FOLDER):
        if folder is not None and folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"Fashion-MNIST is neither at {own or '$PFGM_DATA/fashion-mnist'} nor at {_DEBIAN_FOLDER}; "
        "give its folder, as in fashion-mnist:FOLDER, or install Debian's package "
        "dataset-fashion-mnist."
    )


def _idx_pair(folder: Path, part: str) -> Data:
    images = _read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    path = _idx_file(folder, f"{part}-labels-idx1-ubyte")
    labels = _read_idx(path, dimensions=1)
    _check_labels(labels, path)
    if len(labels) != len(images):
        raise ValueError(
            f"{path} must hold {len(images)} labels, one for each image, got {len(labels)}."
        )
    return Data(InMemory(images.unsqueeze(1)), labels.long(), FASHION_MNIST_CLASSES)


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz, a part of Fashion-MNIST.")


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The values of an IDX file of bytes (the format of MNIST).

    The file holds two zeros, an 8 for bytes, the number of dimensions, the sizes as big-endian
    32-bit numbers, and the values.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            sizes = [int(size) for size in np.frombuffer(header[4:], ">u4")]
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(sizes) != dimensions:
                raise ValueError("the header is not that of such a file")
            count = math.prod(sizes)
            if not 0 < count <= _MAX_DEFLATE_RATIO * path.stat().st_size:
                raise ValueError("the file is too short for its sizes")
            values = file.read(count + 1)
        if len(values) != count:
            raise ValueError("the number of values does not match the sizes")
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} must be an original file of Fashion-MNIST, an IDX file of bytes with "
            f"{dimensions} dimensions; it is truncated, damaged or another kind of file."
        ) from error
    return from_numpy(np.frombuffer(values, np.uint8).reshape(sizes), str(path))


def _avatars(folder: Path | None, progress: bool | None) -> Data:
    folder = folder or _in_data_folder("avatars")
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"the avatars are not at {folder or '$PFGM_DATA/avatars'}: draw them in a checkout by "
            "`python -m benchmarks.avatars.render FOLDER`, and give the folder, as in "
            "avatars:FOLDER."
        )
    from .images import load_images  # late, for a quick import of pfgm

    return load_images(folder, progress=progress)


def _cifar10(folder: Path | None, progress: bool | None) -> Data:
    folder = folder or _in_data_folder("cifar10")
    if folder is None:
        raise FileNotFoundError(
            f"CIFAR-10 is not downloaded automatically: download {CIFAR10_URL}, unpack it, and "
            "give the folder, as in cifar10:FOLDER."
        )
    inner = folder / "cifar-10-batches-bin"
    batches = inner if inner.is_dir() else folder
    for name in (*_TRAIN_BATCHES, *_TEST_BATCHES):
        if not (batches / name).is_file():
            pickled = any((folder / each).exists() for each in _PICKLED)
            raise FileNotFoundError(
                f"{batches} has no {name}, a part of CIFAR-10's binary version"
                f"{' (the Python version there is pickled, and not read)' if pickled else ''}; "
                f"download {CIFAR10_URL} and unpack it in {folder}."
            )
    return replace(_records(batches, _TRAIN_BATCHES), held_out=_records(batches, _TEST_BATCHES))


def _records(folder: Path, names: tuple[str, ...]) -> Data:
    batches = []
    for path in (folder / name for name in names):
        content = np.fromfile(path, np.uint8)
        if len(content) % _RECORD_BYTES or len(content) == 0:
            raise ValueError(
                f"{path} must be whole records of {_RECORD_BYTES} bytes, as in CIFAR-10's binary "
                f"version, got {len(content)} bytes."
            )
        batches.append(torch.from_numpy(content).view(-1, _RECORD_BYTES))
        _check_labels(batches[-1][:, 0], path)
    images = torch.cat([batch[:, 1:] for batch in batches]).view(-1, 3, 32, 32)
    return Data(InMemory(images), torch.cat([batch[:, 0] for batch in batches]).long())


def _in_data_folder(name: str) -> Path | None:
    place = os.environ.get("PFGM_DATA")
    return Path(place).expanduser() / name if place else None


def _check_labels(labels: Tensor, path: Path) -> None:
    if int(labels.max()) > 9:
        raise ValueError(f"labels in {path} must be from 0 to 9, got {int(labels.max())}.")


NAMED: dict[str, Callable[[Path | None, bool | None], Data]] = {
    "avatars": _avatars,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}
"""The function that opens the data of each name, in its default folder or another one."""
