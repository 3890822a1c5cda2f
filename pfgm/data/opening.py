"""The one function that opens data: by name, in files and folders, in memory."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..common.checks import check_choice
from ..common.files import StrPath, absolute_path
from ..common.images import channels_last
from ..common.optional import is_frame, is_series
from .arrays import array_names, from_numpy, open_array, open_mapped, read_integers
from .named import NAMED
from .opened import Data
from .rows import LABEL_NAMES, InMemory, OnDisk, Scaled, Source

if TYPE_CHECKING:
    from .tables import Table

Samples = Tensor | np.ndarray[Any, Any] | StrPath | Dataset[Any] | DataLoader[Any] | Source | Data
"""What :func:`open` takes, beside DataFrames of pandas."""

Range = tuple[float, float]
"""The values of data that stand for −1 and 1."""

Layout = Literal["auto", "images", "as-is"]
"""What arrays (n, H, W) and (n, H, W, C) are. images: grey images, which get a channel, and images
whose channels, 1 or 3, move to the front. as-is: nothing is changed. auto: bytes in a file are
images, and other numbers and arrays in memory stay as they are."""

_ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")
_TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")  # in any case
_FILE_SUFFIXES = (*_ARRAY_SUFFIXES, ".zip")
_KINDS_OF_PATHS = ("folder", "npz")  # written before a path
_HELD_OUT_NAMES = ("held_out", "test")
_ALLOWED = (
    "avatars[:FOLDER], digits, fashion-mnist[:FOLDER], cifar10[:FOLDER], folder:PATH (of images), "
    "npz:PATH, or the path of a folder or of a file that ends in .csv, .tsv, .csv.gz, .parquet, "
    ".npy, .npz, .safetensors or .zip (of images)"
)
_TAKERS = {
    "value_range": "array",
    "layout": "array",
    "resize": "images",
    **dict.fromkeys(("label_column", "drop_missing", "drop_columns", "header"), "table"),
}
"""The kind of data that takes an option."""
_KINDS = {
    "array": f"arrays and files that end in {', '.join(_ARRAY_SUFFIXES)}",
    "images": "folders and .zip archives of images",
    "table": "tables",
}
_SMALLEST_IMAGE = 8  # height and width of what is taken for a grey image
_PERMUTE_ROWS = 1024  # rows whose channels are moved to the front at a time


def open(
    source: Samples,
    *,
    value_range: Range | None = None,
    layout: Layout = "auto",
    resize: int | None = None,
    label_column: str | None = None,
    drop_missing: bool = False,
    drop_columns: Sequence[str] = (),
    header: bool = True,
    table: Table | None = None,
    progress: bool | None = None,
) -> Data:
    """Open data by name or path, or what is in memory. Nothing is downloaded or unpickled.

    - ``"avatars"`` or ``"avatars:FOLDER"``: 3 × 32 × 32 bytes, 60 000 faces in ten styles for
      training and 5000 held out, as ``python -m benchmarks.avatars.render FOLDER`` draws them in a
      checkout. Without a folder it is $PFGM_DATA/avatars.
    - ``"digits"``: :func:`pfgm.data.digits`.
    - ``"fashion-mnist"`` or ``"fashion-mnist:FOLDER"``: 28 × 28 bytes, 60 000 images for training
      and 10 000 held out. The folder holds the four ``idx`` files, gzipped or not. Without a folder
      they are read from $PFGM_DATA/fashion-mnist, or else from Debian's package
      dataset-fashion-mnist.
    - ``"cifar10"`` or ``"cifar10:FOLDER"``: 3 × 32 × 32 bytes, 50 000 images for training and
      10 000 held out. The folder holds the binary version; without a folder it is
      $PFGM_DATA/cifar10.
    - ``"folder:PATH"``, or a path: a folder or a ``.zip`` archive of images of one size.
      Transparent images are composed on white. Class folders, as in ``cat/1.png``, give labels, and
      so does ``dataset.json``, as in the data sets of EDM and StyleGAN. Two folders named train and
      held-out, held_out or test give images for training and others, with class folders in both.
    - ``"npz:PATH"``, or a path: a ``.npy``, ``.npz`` or ``.safetensors`` file of samples (n, ...),
      which is read in place if possible.
    - the path of a ``.csv``, ``.tsv``, ``.csv.gz`` or ``.parquet`` file, or a DataFrame: a table,
      whose numbers and texts :class:`pfgm.data.Table` encodes.
    - a tensor, an array or a memory map (n, ...), which is used without a copy.
    - a :class:`torch.utils.data.Dataset` of samples or of (sample, label) pairs, or its DataLoader,
      which is loaded.

    A file of several arrays has its samples in the array images, data or x. Optional arrays are the
    integer labels (n,) in labels, label or y; held-out samples in held_out or test; and their
    labels in held_out_labels or test_labels. The layout says whether arrays (n, H, W) are grey
    images, which get a channel, and arrays (n, H, W, C) images, which are copied into memory with
    their channels moved to the front.

    Args:
        source: one of these, or what this function has returned. For a file or folder named digits,
            write "./digits" or a Path.
        value_range: the values of floating-point data that stand for −1 and 1, such as (0, 255).
            They are converted; the default converts nothing.
        layout: what arrays are, see :data:`Layout`.
        resize: the height and width of images in a folder or an archive. Their largest central
            square is scaled to it. None takes images of one size as they are.
        label_column, drop_missing, drop_columns, header: of a table, see
            :meth:`pfgm.data.Table.read`.
        table: the columns that are known from other data, such as those of a checkpoint; None
            learns them. It is for tables, and others ignore it.
        progress: whether to show a progress bar while images or a dataset are read. None shows one
            for more than 2000, in a terminal.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ImportError: digits need scikit-learn, images Pillow, and files of tables pandas.
        TypeError: samples are neither floating nor uint8, or uint8 where a range is given; labels
            are not integers; or the source is of another type.
        ValueError: the name is unknown, a file is damaged, arrays do not fit together, or an option
            is given for what does not take it.

    >>> data = open("digits")
    >>> data, data.held_out, data.grey_levels
    (Data((1398, 1, 8, 8), torch.float32, 10 classes, 399 held out), \
Data((399, 1, 8, 8), torch.float32, 10 classes), 17)
    >>> open(torch.rand(5, 2)).samples[:2].shape
    torch.Size([2, 2])
    """
    given, defaults = locals(), open.__kwdefaults__ or {}
    name, path = _name_and_path(source)
    kind = _kind(source, name, path)
    check_choice("layout", layout, get_args(Layout))
    for option, taker in _TAKERS.items():
        if kind != taker and (given[option] or None) != (defaults[option] or None):
            raise ValueError(
                f"{option.removeprefix('value_')} is for {_KINDS[taker]}, got {given[option]!r} "
                f"for {name or path or type(source).__name__}; leave it out."
            )
    if isinstance(source, Data):
        return source
    if kind == "named":
        return NAMED[name](path, progress)
    if kind == "table":
        return _table(source, table, label_column, drop_missing, drop_columns, header)
    if kind == "array":
        arrays = Data(_in_memory(source)) if path is None else _array_file(path)
        return _converted(arrays, value_range, layout, in_file=path is not None)
    if kind == "dataset":
        from .torch_datasets import load_dataset

        return load_dataset(source, progress=progress)
    assert path is not None
    from .images import load_images

    return load_images(path, resize=resize, progress=progress)


def absolute_source(source: str) -> str:
    """A name or path of data as :func:`open` takes it, which is right in any folder.

    A relative path becomes absolute; it starts in the current folder.
    """
    name, path = _name_and_path(source)
    if path is None or (name and path.is_absolute()) or not source:
        return source
    return f"{name}:{absolute_path(path)}" if name else str(absolute_path(source))


def is_table_file(path: StrPath) -> bool:
    """Whether the name of a file is that of a table."""
    return os.fspath(path).lower().endswith(_TABLE_SUFFIXES)


def is_missing(source: str) -> bool:
    """Whether the path in a source does not exist; False for a name."""
    _, path = _name_and_path(source)
    return path is not None and not path.exists()


def takes_layout(source: StrPath) -> bool:
    """Whether a name or path is that of an array file, whose layout can be chosen."""
    name, path = _name_and_path(source)
    array = path is not None and path.suffix in _ARRAY_SUFFIXES and not path.is_dir()
    return name not in NAMED and array


def _name_and_path(source: object) -> tuple[str, Path | None]:
    """The name of data or of the kind of path, or ""; and the path, None without one."""
    if isinstance(source, os.PathLike):
        return "", Path(source)
    if not isinstance(source, str):
        return "", None
    name, colon, place = source.partition(":")
    if name in (*NAMED, *_KINDS_OF_PATHS) and place:
        return name, Path(place).expanduser()
    return (name, None) if name in NAMED and not colon else ("", Path(source))


def _kind(source: object, name: str, path: Path | None) -> str:
    """The kind of a source, and an error if it is none."""
    if name in NAMED:
        return "named"
    if path is None:
        return _kind_in_memory(source)
    if not name and is_table_file(path):
        return "table"
    images = path.is_dir() or (path.suffix == ".zip" and path.is_file())
    if name == "folder" and not images:
        raise FileNotFoundError(
            f"data is {source!r}, but {path} is neither an existing folder nor a .zip archive."
        )
    if not name and (source == "" or not (path.exists() or path.suffix in _FILE_SUFFIXES)):
        raise ValueError(
            f"data must be one of {_ALLOWED}, got {str(source)!r}, which is neither a name nor an "
            "existing path."
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    return "images" if images else "array"


def _kind_in_memory(source: object) -> str:
    if isinstance(source, Data):
        return "data"
    if isinstance(source, (Tensor, np.ndarray, Source)):
        return "array"
    if is_frame(source):
        return "table"
    if is_series(source):
        raise TypeError(
            "data must be an array or a DataFrame, got a Series of pandas; use series.to_numpy()."
        )
    numbered = hasattr(type(source), "__getitem__") and not isinstance(source, Mapping)
    if numbered or isinstance(source, DataLoader):
        return "dataset"
    raise TypeError(
        "data must be a tensor, a NumPy array, a DataFrame, the path of a file or a folder of "
        "images, or a dataset with __len__ and __getitem__ or its DataLoader, got "
        f"{type(source).__name__}."
    )


def _in_memory(source: Any) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, Tensor):
        return InMemory(source)
    if isinstance(source, np.memmap):
        return open_mapped(source)
    return InMemory(from_numpy(source, "data"))


def _table(
    source: Any,
    known: Table | None,
    label_column: str | None,
    drop_missing: bool,
    drop_columns: Sequence[str],
    header: bool,
) -> Data:
    """The rows and labels of a table, with its columns; None for ``known`` learns them."""
    from .tables import Table  # late, as images, for a quick import of pfgm

    table = known
    if table is None or table.plain:
        given: dict[str, Any] = {"drop_columns": drop_columns, "drop_missing": drop_missing}
        table = Table.read(source, label_column=label_column, header=header, **given)
        table = table if known is None else dataclasses.replace(known, label=table.label)
    if label_column and label_column != (table.label and table.label.name):
        raise ValueError(
            f"label_column must be {table.label and table.label.name!r}, as in the checkpoint, got "
            f"{label_column!r}."
        )
    table = dataclasses.replace(table, dropped=(*dict.fromkeys([*table.dropped, *drop_columns]),))
    rows, labels = table.encode(source, drop_missing=drop_missing)
    return Data(InMemory(rows), labels, table.label_names, table)


def _array_file(path: Path) -> Data:
    samples = open_array(path)
    names = array_names(path)
    if len(names) == 1:  # a single array holds the samples, whatever its name
        names = []
    label_names = [name for name in LABEL_NAMES if name in names]
    if len(label_names) > 1:
        raise ValueError(
            f"{path} must have one array of labels, got {' and '.join(label_names)}; leave all but "
            "one out."
        )
    train = Data(samples, _labels(path, label_names, len(samples)))
    name = next((name for name in _HELD_OUT_NAMES if name in names), None)
    if name is None:
        return train
    others = open_array(path, name)
    if (others.row_shape, others.dtype) != (samples.row_shape, samples.dtype):
        raise ValueError(
            f"{name} in {path} must have the dtype and sample shape of the training data, "
            f"{samples.dtype} and {samples.row_shape}, got {others.dtype} and shape {others.shape}."
        )
    label_names = [label for label in (f"{name}_labels",) if label in names]
    held_out = Data(others, _labels(path, label_names, len(others)))
    return dataclasses.replace(train, held_out=held_out)


def _labels(path: Path, names: list[str], count: int) -> Tensor | None:
    """The labels in the array of the first name, if there is a name."""
    labels = read_integers(path, names[0]) if names else None
    if labels is not None and labels.shape != (count,):
        raise ValueError(
            f"{names[0]} in {path} must have shape ({count},), a label for each sample, got "
            f"{tuple(labels.shape)}."
        )
    return labels


def _converted(data: Data, value_range: Range | None, layout: Layout, *, in_file: bool) -> Data:
    """The data with images in (n, C, H, W), and with a range of values mapped to −1 to 1."""
    samples = _channels_first(data.samples, layout, in_file)
    if value_range is not None:
        scaled = Scaled(samples, *value_range)
        in_memory = samples.tensor is not None
        samples = InMemory(scaled.read(0, len(samples))) if in_memory else scaled
    held_out = data.held_out and _converted(data.held_out, value_range, layout, in_file=in_file)
    return dataclasses.replace(data, samples=samples, held_out=held_out)


def _channels_first(source: Source, layout: Layout, in_file: bool) -> Source:
    """Images as (n, C, H, W), and other samples unchanged. A new shape alone needs no copy."""
    shape = source.row_shape
    if layout != "images" and (layout == "as-is" or not in_file or source.dtype != torch.uint8):
        if layout == "auto" and in_file and _looks_like_images(shape):
            warnings.warn(
                f"the samples have the shape {shape} and stay as they are; if they are images, "
                "whose channels come first in networks, give --layout images, and if not, "
                '--layout as-is; in Python open(…, layout="images") or "as-is".',
                stacklevel=4,
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
