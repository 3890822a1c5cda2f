"""Opens data by name or path: digits, clothes, avatars, CIFAR-10, folders of images, files."""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from .common.checks import check_choice
from .common.files import StrPath, absolute_path
from .common.images import channels_last
from .data import digits
from .data.arrays import array_names, from_numpy, open_array, read_integers
from .data.images import load_images
from .data.opening import open_source
from .data.rows import InMemory, OnDisk, Scaled, Source
from .data.table_files import is_table_file
from .data.tables import LABEL_NAMES, Table, load_table
from .references import ReferenceSet

__all__ = ["Data", "Layout", "Range", "open_data", "open_samples"]

FASHION_MNIST_CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""What its labels mean, from 0."""
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
_ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")
_FILE_SUFFIXES = (*_ARRAY_SUFFIXES, ".zip")
_KINDS_OF_PATHS = ("folder", "npz")  # written before a path
_HELD_OUT_NAMES = ("held_out", "test")
_ALLOWED = (
    "avatars[:FOLDER], digits, fashion-mnist[:FOLDER], cifar10[:FOLDER], folder:PATH (of images), "
    "npz:PATH, or the path of a folder or of a file that ends in .csv, .tsv, .csv.gz, .parquet, "
    ".npy, .npz, .safetensors or .zip (of images)"
)
_SMALLEST_IMAGE = 8  # height and width of what is taken for a grey image
_PERMUTE_ROWS = 1024  # rows whose channels are moved to the front at a time
_MAX_DEFLATE_RATIO = 1032  # deflate compresses at most by this factor
_TRAIN_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST_BATCHES = ("test_batch.bin",)
_PICKLED = ("cifar-10-batches-py", "data_batch_1")  # of CIFAR-10's Python version
_RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then red, green and blue


class Data(NamedTuple):
    """Training data, held-out data, and the numbers of their classes and grey levels."""

    train: ReferenceSet
    """(n, *S), with labels if they are known; images are (n, C, H, W)."""
    held_out: ReferenceSet | None
    """(m, *S), likewise; not used for training. None if there are none."""
    classes: int
    """The number of classes; 0 if there are no labels. Labels are 0 to classes − 1."""
    grey_levels: int
    """The number of grey levels, for bits per dimension: 17 for digits, 256 for bytes, 0 (unknown)
    for floating numbers from a file."""
    names: tuple[str, ...] = ()
    """The names of the classes, by label; empty if they have none."""
    table: Table | None = None
    """The columns of a table, which encode and decode its rows."""


Range = tuple[float, float]
"""The values of data that stand for −1 and 1."""

Layout = Literal["auto", "images", "as-is"]
"""What arrays (n, H, W) and (n, H, W, C) in a file are. images: grey images, which get a channel,
and images whose channels, 1 or 3, move to the front. as-is: nothing is changed. auto: bytes are
images, and floating-point numbers stay as they are."""


def open_data(
    source: str,
    *,
    value_range: Range | None = None,
    layout: Layout = "auto",
    resize: int | None = None,
    label_column: str | None = None,
    drop_missing: bool = False,
    drop_columns: Sequence[str] = (),
    header: bool = True,
    table: Table | None = None,
    progress: bool = False,
) -> Data:
    """Opens data by name or path. Nothing is downloaded or unpickled.

    - ``avatars`` or ``avatars:FOLDER``: 3 × 32 × 32 bytes, 60 000 faces in ten styles for training
      and 5000 held out, as ``python -m benchmarks.avatars.render FOLDER`` draws them in a checkout.
      Without a folder it is $PFGM_DATA/avatars.
    - ``digits``: :func:`pfgm.data.digits`.
    - ``fashion-mnist`` or ``fashion-mnist:FOLDER``: 28 × 28 bytes, 60 000 images for training and
      10 000 held out. The folder holds the four ``idx`` files, gzipped or not. Without a folder
      they are read from $PFGM_DATA/fashion-mnist, or else from Debian's package
      dataset-fashion-mnist.
    - ``cifar10`` or ``cifar10:FOLDER``: 3 × 32 × 32 bytes, 50 000 images for training and 10 000
      held out. The folder holds the binary version; without a folder it is $PFGM_DATA/cifar10.
    - ``folder:PATH``, or a path: a folder or a ``.zip`` archive of images of one size. Transparent
      images are composed on white. Class folders, as in ``cat/1.png``, give labels, and so does
      ``dataset.json``, as in the data sets of EDM and StyleGAN.
    - ``npz:PATH``, or a path: a ``.npy``, ``.npz`` or ``.safetensors`` file of samples (n, ...),
      which is read in place if possible.
    - the path of a ``.csv`` file, a table with a line of names, whose numbers and texts
      :class:`pfgm.data.Table` encodes.

    A file of several arrays has its samples in the array images, data or x. Optional arrays are the
    integer labels (n,) in labels, label or y; held-out samples in held_out or test; and their
    labels in held_out_labels or test_labels. The layout says whether arrays (n, H, W) are grey
    images, which get a channel, and arrays (n, H, W, C) images, which are copied into memory with
    their channels moved to the front.

    Args:
        source: one of the names, or a path. For a file or folder named digits, write ./digits.
        value_range: the values of floating-point data that stand for −1 and 1, such as (0, 255).
            They are converted; the default converts nothing.
        layout: what the arrays of an array file are, see :data:`Layout`.
        resize: the height and width of images in a folder or an archive. Their largest central
            square is scaled to it. None takes images of one size as they are.
        label_column, drop_missing, drop_columns, header: of a table, see
            :meth:`pfgm.data.Table.read`.
        table: the columns that are known from other data, such as those of a checkpoint; None
            learns them.
        progress: show a progress bar while images are read.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ImportError: digits need scikit-learn, and images Pillow.
        TypeError: samples are neither floating nor uint8, or uint8 where a range is given; or
            labels are not integers.
        ValueError: the name is unknown, a file is damaged, arrays do not fit together, or a resize
            or a layout or an option of tables is given for what does not take it.

    >>> data = open_data("digits")
    >>> data.train, data.classes, data.grey_levels
    (ReferenceSet((1398, 1, 8, 8), torch.float32, cpu), 10, 17)
    """
    _check_layout(layout, source)
    name, place = _name_and_path(source)
    if not name and is_table_file(source):
        if value_range is not None or resize is not None:
            raise ValueError(f"range and resize are not for tables, got one for {source}.")
        if table is None or table.plain:
            read = Table.read(
                source,
                label_column=label_column,
                drop_missing=drop_missing,
                drop_columns=drop_columns,
                header=header,
            )
            table = read if table is None else dataclasses.replace(table, label=read.label)
        table = dataclasses.replace(
            table, dropped=(*dict.fromkeys([*table.dropped, *drop_columns]),)
        )
        return _from_table(Path(source), label_column, drop_missing, table)
    if label_column or drop_missing or drop_columns or not header:
        raise ValueError(
            "label_column, drop_missing, drop_columns and header are for .csv files, got one for "
            f"{source}; leave it out."
        )
    path = Path(place).expanduser()
    if name in _NAMED:
        if resize is not None:
            raise ValueError(
                f"resize is {resize}, but data is {source}, of one size; leave it out."
            )
        if value_range is not None:
            raise ValueError(
                f"range is {value_range[0]:g} {value_range[1]:g}, but data is {source}, whose "
                "values lie in −1 to 1 already; leave it out."
            )
        return _NAMED[name](path if place else None)
    if name == "folder" and not _holds_images(path):
        raise FileNotFoundError(
            f"data is {source!r}, but {path} is neither an existing folder nor a .zip archive."
        )
    if name in _KINDS_OF_PATHS:
        return _from_path(path, value_range, layout, resize, progress)
    if source and (Path(source).exists() or Path(source).suffix in _FILE_SUFFIXES):
        return _from_path(Path(source), value_range, layout, resize, progress)
    raise ValueError(
        f"data must be one of {_ALLOWED}, got {source!r}, which is neither a name nor an existing "
        "path."
    )


def absolute_source(source: str) -> str:
    """A name or path of data as :func:`open_data` takes it, which is right in any folder.

    A relative path becomes absolute; it starts in the current folder.
    """
    name, place = _name_and_path(source)
    if name and place and not Path(place).expanduser().is_absolute():
        return f"{name}:{absolute_path(place)}"
    return source if name or not source else str(absolute_path(source))


def is_missing(source: str) -> bool:
    """Whether the path in a source does not exist; False for a name."""
    _, place = _name_and_path(source)
    return bool(place) and not Path(place).expanduser().exists()


def takes_layout(source: StrPath) -> bool:
    """Whether a name or path is that of an array file, whose layout can be chosen."""
    name, place = _name_and_path(os.fspath(source))
    path = Path(place or source)
    return name not in _NAMED and path.suffix in _ARRAY_SUFFIXES and not path.is_dir()


def _check_layout(layout: Layout, source: StrPath) -> None:
    check_choice("layout", layout, get_args(Layout))
    if layout != "auto" and not takes_layout(source):
        raise ValueError(
            f"layout is for files that end in {', '.join(_ARRAY_SUFFIXES)}, got {layout!r} for "
            f"{source}; leave it out."
        )


def _name_and_path(source: str) -> tuple[str, str]:
    """The name of the data or of the kind of path, and the path; one of them may be empty."""
    name, colon, place = source.partition(":")
    if name in (*_NAMED, *_KINDS_OF_PATHS) and place:
        return name, place
    if name in _NAMED and not colon:
        return name, ""
    return "", source


def open_samples(
    path: StrPath, *, layout: Layout = "auto", resize: int | None = None, progress: bool = False
) -> Data:
    """Opens an array file, a table or a folder of images by its path, never by the name of data.

    Args:
        path: a ``.csv``, ``.npy``, ``.npz`` or ``.safetensors`` file, or a folder or ``.zip``
            archive of images.
        layout, resize: as for :func:`open_data`.
        progress: show a progress bar while images are read.

    Raises:
        FileNotFoundError, OSError, ImportError, TypeError, ValueError: as for :func:`open_data`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/grey.npy", np.zeros((5, 8, 8), np.uint8))
    ...     open_samples(f"{folder}/grey.npy").train
    ReferenceSet((5, 1, 8, 8), torch.uint8, file)
    """
    _check_layout(layout, path)
    return _from_path(Path(path), None, layout, resize, progress)


def _holds_images(path: Path) -> bool:
    return path.is_dir() or (path.suffix == ".zip" and path.is_file())


def _opened(path: Path, resize: int | None, progress: bool) -> Source:
    if is_table_file(path) and path.is_file() and resize is None:
        return InMemory(load_table(path))
    if resize is None:
        return open_source(path, progress=progress)
    if not _holds_images(path):
        raise ValueError(
            f"resize is {resize}, but {path} is neither a folder nor a .zip archive of images; "
            "leave it out."
        )
    return InMemory(*load_images(path, resize=resize, progress=progress))


def _from_path(
    path: Path, value_range: Range | None, layout: Layout, resize: int | None, progress: bool
) -> Data:
    source = _opened(path, resize, progress)
    names = array_names(path) if path.is_file() else []
    if len(names) == 1:  # a single array holds the samples, whatever its name
        names = []
    label_names = [name for name in LABEL_NAMES if name in names]
    if len(label_names) > 1:
        raise ValueError(
            f"{path} must have one array of labels, got {' and '.join(label_names)}; leave all but "
            "one out."
        )
    train = _rows(source, path, label_names, value_range, layout)
    held_out = None
    if name := next((name for name in _HELD_OUT_NAMES if name in names), None):
        labels = [label for label in (f"{name}_labels",) if label in names]
        held_out = _rows(open_array(path, name), path, labels, value_range, layout)
        if (held_out.shape[1:], held_out.dtype) != (train.shape[1:], train.dtype):
            raise ValueError(
                f"{name} in {path} must have the dtype and sample shape of the training data, "
                f"{train.dtype} and {tuple(train.shape[1:])}, got {held_out.dtype} and shape "
                f"{tuple(held_out.shape)}."
            )
    grey_levels = 256 if train.dtype == torch.uint8 else 0
    return Data(train, held_out, _classes(train, held_out), grey_levels, source.label_names)


def _from_table(path: Path, label_column: str | None, drop_missing: bool, table: Table) -> Data:
    if label_column and label_column != (table.label and table.label.name):
        raise ValueError(
            f"label_column must be {table.label and table.label.name!r}, as in the checkpoint, got "
            f"{label_column!r}."
        )
    rows, labels = table.encode(path, drop_missing=drop_missing)
    train = ReferenceSet(rows, labels=labels)
    return Data(
        train, None, _classes(train, None), grey_levels=0, names=table.label_names, table=table
    )


def _rows(
    source: Source,
    path: Path,
    label_names: list[str],
    value_range: Range | None,
    layout: Layout,
) -> ReferenceSet:
    """The rows, with the labels in the array of the first name if there is a name."""
    labels = read_integers(path, label_names[0]) if label_names else source.labels
    if labels is not None and labels.shape != (len(source),):
        raise ValueError(
            f"{label_names[0]} in {path} must have shape ({len(source)},), a label for each "
            f"sample, got {tuple(labels.shape)}."
        )
    source = _channels_first(source, layout)
    return ReferenceSet(_scaled(source, value_range), labels=labels)


def _scaled(source: Source, value_range: Range | None) -> Source:
    """The rows with a range of values mapped to −1 to 1; in memory if the source is."""
    if value_range is None:
        return source
    scaled = Scaled(source, *value_range)
    return InMemory(scaled.read(0, len(source))) if source.tensor is not None else scaled


def _classes(train: ReferenceSet, held_out: ReferenceSet | None) -> int:
    if train.labels is None:
        return 0
    known = [rows.labels for rows in (train, held_out) if rows is not None]
    return max(int(labels.max()) for labels in known if labels is not None) + 1


def _channels_first(source: Source, layout: Layout) -> Source:
    """Images as (n, C, H, W), and other samples unchanged. A new shape alone needs no copy."""
    shape = source.shape
    if layout == "as-is" or (layout == "auto" and source.dtype != torch.uint8):
        if layout == "auto" and _looks_like_images(shape):
            warnings.warn(
                f"the samples have the shape {shape} and stay as they are; if they are images, "
                "whose channels come first in networks, give --layout images, and if not, "
                "--layout as-is.",
                stacklevel=2,
            )
        return source
    if len(shape) == 2:
        if isinstance(source, OnDisk):
            return OnDisk(source.path, source.offset, source.dtype, (1, *shape), len(source))
        return InMemory(source.read(0, len(source)).unsqueeze(1))
    if not channels_last(shape):
        return source
    moved = torch.empty(len(source), shape[2], *shape[:2], dtype=source.dtype, device="cpu")
    for start in range(0, len(source), _PERMUTE_ROWS):
        stop = min(start + _PERMUTE_ROWS, len(source))
        moved[start:stop] = source.read(start, stop).permute(0, 3, 1, 2)
    return InMemory(moved)


def _looks_like_images(shape: tuple[int, ...]) -> bool:
    """Whether floating-point samples are probably grey images, or have their channels last."""
    if len(shape) == 2:
        return min(shape) >= _SMALLEST_IMAGE and max(shape) <= 2 * min(shape)
    return channels_last(shape)


def _digits(folder: Path | None) -> Data:
    if folder is not None:
        raise ValueError(f"data must be digits, without a folder, got digits:{folder}.")
    data = digits()
    train = ReferenceSet(data.train, labels=data.train_labels)
    held_out = ReferenceSet(data.held_out, labels=data.held_out_labels)
    return Data(train, held_out, classes=10, grey_levels=17)


def _fashion_mnist(folder: Path | None) -> Data:
    folder = folder or _fashion_mnist_folder()
    train, held_out = (_idx_pair(folder, part) for part in ("train", "t10k"))
    if held_out.shape[1:] != train.shape[1:]:
        raise ValueError(f"{folder} must hold images of one size, got two.")
    return Data(train, held_out, classes=10, grey_levels=256, names=FASHION_MNIST_CLASSES)


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


def _idx_pair(folder: Path, part: str) -> ReferenceSet:
    images = _read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    path = _idx_file(folder, f"{part}-labels-idx1-ubyte")
    labels = _read_idx(path, dimensions=1)
    _check_labels(labels, path)
    if len(labels) != len(images):
        raise ValueError(
            f"{path} must hold {len(images)} labels, one for each image, got {len(labels)}."
        )
    return ReferenceSet(images.unsqueeze(1), labels=labels)


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


def _avatars(folder: Path | None) -> Data:
    folder = folder or _in_data_folder("avatars")
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"the avatars are not at {folder or '$PFGM_DATA/avatars'}: draw them in a checkout by "
            "`python -m benchmarks.avatars.render FOLDER`, and give the folder, as in "
            "avatars:FOLDER."
        )
    train, held_out = (load_images(folder / part) for part in ("train", "held-out"))
    if train[2] != held_out[2]:
        raise ValueError(f"train and held-out in {folder} must have the same styles, got others.")
    rows, others = (ReferenceSet(images, labels=labels) for images, labels, _ in (train, held_out))
    return Data(rows, others, classes=len(train[2]), grey_levels=256, names=train[2])


def _cifar10(folder: Path | None) -> Data:
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
    train, held_out = _records(batches, _TRAIN_BATCHES), _records(batches, _TEST_BATCHES)
    return Data(train, held_out, classes=10, grey_levels=256)


def _records(folder: Path, names: tuple[str, ...]) -> ReferenceSet:
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
    return ReferenceSet(images, labels=torch.cat([batch[:, 0] for batch in batches]))


def _in_data_folder(name: str) -> Path | None:
    place = os.environ.get("PFGM_DATA")
    return Path(place).expanduser() / name if place else None


def _check_labels(labels: Tensor, path: Path) -> None:
    if int(labels.max()) > 9:
        raise ValueError(f"labels in {path} must be from 0 to 9, got {int(labels.max())}.")


_NAMED: dict[str, Callable[[Path | None], Data]] = {
    "avatars": _avatars,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}
