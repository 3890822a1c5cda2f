"""What ``--data`` of the command line means: digits, Fashion-MNIST, CIFAR-10, folders and files."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .common.files import StrPath
from .data import digits
from .data.arrays import array_names, from_numpy, open_array, read_integers
from .data.opening import open_source
from .data.rows import InMemory, OnDisk, Source
from .references import ReferenceSet

__all__ = ["Data", "open_data", "open_samples"]

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
_ARRAYS = (".npy", ".npz", ".safetensors")
_LABELS = ("labels", "label", "y")
_HELD_OUT = ("held_out", "test")
_ALLOWED = (
    "digits, fashion-mnist[:FOLDER], cifar10[:FOLDER], folder:PATH (of images), npz:PATH, or the "
    f"path of a folder or of a file that ends in {', '.join(_ARRAYS[:-1])} or {_ARRAYS[-1]}"
)
_ROWS = 1024  # that are turned to channels first together
_DEFLATE = 1032  # times its size is what a compressed file holds at most
_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST_BATCH = ("test_batch.bin",)
_PICKLED = "data_batch_1"  # of the Python version
_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then red, green and blue


class Data(NamedTuple):
    """What a name or a path of data stands for."""

    train: ReferenceSet
    """(n, *S), with labels where they are known; images are (n, C, H, W)."""
    held_out: ReferenceSet | None
    """(m, *S), likewise, that training does not see; None where there are none."""
    classes: int
    """Labels are 0 to classes − 1; 0 where there are none."""
    levels: int
    """Grey levels of the data, for bits per dimension: 17 of digits, 256 of bytes; 0 of floating
    numbers from a file, which say nothing of it."""


def open_data(source: str, *, progress: bool = False) -> Data:
    """Opens data by their name or path. Nothing is downloaded or unpickled.

    - ``digits``: :func:`pfgm.data.digits`.
    - ``fashion-mnist`` or ``fashion-mnist:FOLDER``: 28 × 28 bytes, 60 000 and 10 000 held out. The
      four ``idx`` files, gzipped or not, are in the folder, or else in $PFGM_DATA/fashion-mnist, or
      else where Debian's package dataset-fashion-mnist puts them.
    - ``cifar10`` or ``cifar10:FOLDER``: 3 × 32 × 32 bytes, 50 000 and 10 000 held out. The binary
      version is in the folder, or else in $PFGM_DATA/cifar10.
    - ``folder:PATH``, or a path: a folder of images of one size.
    - ``npz:PATH``, or a path: a ``.npy``, ``.npz`` or ``.safetensors`` file of samples (n, ...),
      read in place where that can be.

    A file of several arrays holds its samples at images, data or x, and may hold integers (n,) at
    labels, label or y, and samples that are held out at held_out or test, with labels of their own
    at held_out_labels or test_labels. Grey images (n, H, W) get a channel, and images (n, H, W, C)
    have theirs moved to the front, in memory.

    Args:
        source: one of the names, or a path; a path that is also a name can be written ./digits.
        progress: show a progress bar while images are read.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ImportError: digits need scikit-learn, images Pillow.
        TypeError: samples that are neither floating nor uint8, labels that are no integers.
        ValueError: another name, a damaged file, arrays that do not fit together.

    >>> found = open_data("digits")
    >>> found.train, found.classes, found.levels
    (ReferenceSet((1398, 1, 8, 8), torch.float32, cpu), 10, 17)
    """
    name, colon, place = source.partition(":")
    path = Path(place).expanduser()
    if name in _NAMED and not (colon and not place):
        return _NAMED[name](path if place else None)
    if name == "folder" and place and not path.is_dir():
        raise FileNotFoundError(f"data is {source!r}, but {path} is not an existing folder.")
    if name in ("folder", "npz") and place:
        return _from_path(path, progress)
    if source and (Path(source).exists() or Path(source).suffix in _ARRAYS):
        return _from_path(Path(source), progress)
    raise ValueError(
        f"data is {source!r}, which is neither a name nor an existing path; allowed are {_ALLOWED}."
    )


def open_samples(path: StrPath, *, progress: bool = False) -> ReferenceSet:
    """The samples of an array file or a folder of images, images with channels first.

    Args:
        path: a ``.npy``, ``.npz`` or ``.safetensors`` file, or a folder.
        progress: show a progress bar while images are read.

    Raises:
        FileNotFoundError, OSError, ImportError, TypeError, ValueError: as :func:`open_data`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/grey.npy", np.zeros((5, 8, 8), np.uint8))
    ...     open_samples(f"{folder}/grey.npy")
    ReferenceSet((5, 1, 8, 8), torch.uint8, file)
    """
    return ReferenceSet(_channels_first(open_source(path, progress=progress)))


# ---- files and folders of one's own -----------------------------------------------------------


def _from_path(path: Path, progress: bool) -> Data:
    source = open_source(path, progress=progress)
    names = array_names(path) if path.is_file() else []
    if len(names) == 1:  # these are the samples, whatever they are called
        names = []
    train = _rows(source, path, [name for name in _LABELS if name in names])
    held_out = None
    for name in [name for name in _HELD_OUT if name in names][:1]:
        labels = [label for label in (f"{name}_labels",) if label in names]
        held_out = _rows(open_array(path, name), path, labels)
        if (held_out.shape[1:], held_out.dtype) != (train.shape[1:], train.dtype):
            raise ValueError(
                f"{path} holds {name}, {held_out.dtype} of shape {tuple(held_out.shape)}; allowed "
                f"is {train.dtype} with samples of shape {tuple(train.shape[1:])}, as in training."
            )
    return Data(train, held_out, _classes(train, held_out), _levels(train))


def _rows(source: Source, path: Path, label_names: list[str]) -> ReferenceSet:
    """The rows with the labels of the first name, if there is one."""
    labels = read_integers(path, label_names[0]) if label_names else None
    if labels is not None and labels.shape != (len(source),):
        raise ValueError(
            f"{path} holds {label_names[0]} of shape {tuple(labels.shape)}; allowed is "
            f"({len(source)},), a label for each sample."
        )
    return ReferenceSet(_channels_first(source), labels=labels)


def _classes(train: ReferenceSet, held_out: ReferenceSet | None) -> int:
    if train.labels is None:
        return 0
    known = [rows.labels for rows in (train, held_out) if rows is not None]
    return max(int(labels.max()) for labels in known if labels is not None) + 1


def _levels(train: ReferenceSet) -> int:
    return 256 if train.dtype == torch.uint8 else 0


def _channels_first(source: Source) -> Source:
    """Images (n, C, H, W), in place unless their values have to move; anything else as it is."""
    shape = source.shape
    if len(shape) == 2:
        if isinstance(source, OnDisk):
            return OnDisk(source.path, source.offset, source.dtype, (1, *shape), len(source))
        return InMemory(source.read(0, len(source)).unsqueeze(1))
    if len(shape) != 3 or shape[2] not in (1, 3) or shape[0] in (1, 3):
        return source
    moved = torch.empty(len(source), shape[2], *shape[:2], dtype=source.dtype)
    for start in range(0, len(source), _ROWS):
        stop = min(start + _ROWS, len(source))
        moved[start:stop] = source.read(start, stop).permute(0, 3, 1, 2)
    return InMemory(moved)


# ---- digits -----------------------------------------------------------------------------------


def _digits(folder: Path | None) -> Data:
    if folder is not None:
        raise ValueError(f"data is digits:{folder}; allowed is digits, which needs no folder.")
    found = digits()
    train = ReferenceSet(found.train, labels=found.train_labels)
    held_out = ReferenceSet(found.held_out, labels=found.held_out_labels)
    return Data(train, held_out, classes=10, levels=17)


# ---- Fashion-MNIST ----------------------------------------------------------------------------


def _fashion_mnist(folder: Path | None) -> Data:
    folder = folder or _fashion_mnist_folder()
    train, held_out = (_idx_pair(folder, part) for part in ("train", "t10k"))
    if held_out.shape[1:] != train.shape[1:]:
        raise ValueError(f"{folder} holds images of two sizes; allowed is one.")
    return Data(train, held_out, classes=10, levels=256)


def _fashion_mnist_folder() -> Path:
    own = _in_data_folder("fashion-mnist")
    for folder in (own, _DEBIAN):
        if folder is not None and folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"Fashion-MNIST is neither at {own or '$PFGM_DATA/fashion-mnist'} nor at {_DEBIAN}; give "
        "its folder, as in fashion-mnist:FOLDER, or install Debian's package dataset-fashion-mnist."
    )


def _idx_pair(folder: Path, part: str) -> ReferenceSet:
    images = _read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    path = _idx_file(folder, f"{part}-labels-idx1-ubyte")
    labels = _read_idx(path, dimensions=1)
    _check_labels(labels, path)
    if len(labels) != len(images):
        raise ValueError(f"{path} holds {len(labels)} labels; allowed are {len(images)}.")
    return ReferenceSet(images.unsqueeze(1), labels=labels)


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz, a part of Fashion-MNIST.")


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file: two zeros, 8 for bytes, the number of sizes, these as big-endian
    32-bit numbers, then the values (as LeCun describes MNIST)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            sizes = [int(size) for size in np.frombuffer(header[4:], ">u4")]
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(sizes) != dimensions:
                raise ValueError("it has another header")
            count = math.prod(sizes)
            if not 0 < count <= _DEFLATE * path.stat().st_size:
                raise ValueError("it cannot hold so many values")
            values = file.read(count + 1)
        if len(values) != count:
            raise ValueError("it holds another number of values")
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or no IDX file of bytes with {dimensions} dimensions; "
            "allowed are the files of Fashion-MNIST as they come."
        ) from error
    return from_numpy(np.frombuffer(values, np.uint8).reshape(sizes), str(path))


# ---- CIFAR-10 ---------------------------------------------------------------------------------


def _cifar10(folder: Path | None) -> Data:
    folder = folder or _in_data_folder("cifar10")
    if folder is None:
        raise FileNotFoundError(
            f"CIFAR-10 has to be brought: download {CIFAR10_URL}, unpack it, and give the folder "
            "where that was done, as in cifar10:FOLDER."
        )
    inner = folder / "cifar-10-batches-bin"
    batches = inner if inner.is_dir() else folder
    for name in (*_BATCHES, *_TEST_BATCH):
        if not (batches / name).is_file():
            pickled = (folder / "cifar-10-batches-py").exists() or (folder / _PICKLED).exists()
            raise FileNotFoundError(
                f"{batches} has no {name}, a part of CIFAR-10's binary version"
                f"{' (the Python version there is pickled, and not read)' if pickled else ''}; "
                f"download {CIFAR10_URL} and unpack it in {folder}."
            )
    return Data(_records(batches, _BATCHES), _records(batches, _TEST_BATCH), classes=10, levels=256)


def _records(folder: Path, names: tuple[str, ...]) -> ReferenceSet:
    batches = []
    for path in (folder / name for name in names):
        content = np.fromfile(path, np.uint8)
        if len(content) % _RECORD or len(content) == 0:
            raise ValueError(
                f"{path} is {len(content)} bytes long; allowed are records of {_RECORD} bytes, as "
                "CIFAR-10's binary version has them."
            )
        batches.append(torch.from_numpy(content).view(-1, _RECORD))
        _check_labels(batches[-1][:, 0], path)
    images = torch.cat([batch[:, 1:] for batch in batches]).view(-1, 3, 32, 32)
    return ReferenceSet(images, labels=torch.cat([batch[:, 0] for batch in batches]))


# ---- what the named sets share ----------------------------------------------------------------


def _in_data_folder(name: str) -> Path | None:
    place = os.environ.get("PFGM_DATA")
    return Path(place).expanduser() / name if place else None


def _check_labels(labels: Tensor, path: Path) -> None:
    if int(labels.max()) > 9:
        raise ValueError(f"{path} holds the label {int(labels.max())}; allowed are 0 to 9.")


_NAMED: dict[str, Callable[[Path | None], Data]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}
