"""Image folders and datasets: what is not read in place, but item by item into one tensor."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..common.messages import progress_bar
from .array_files import from_numpy

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

# Nothing but these, whatever a file is called: Pillow runs a program to read some other formats.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "RGBX": 3, "CMYK": 3}
_CHANNELS |= {"YCbCr": 3, "HSV": 3}

# What Pillow calls 16 bits a channel where it keeps the upper 8 alone, such as RGB;16B; without a
# letter behind them, as in BGR;16, they are those of a whole pixel.
_WIDE = re.compile(r";16[BLNS]")

_DATA_KEYS = ("image", "images", "x", "data")
_LABEL_KEYS = ("label", "labels")
_KEPT_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


def load_images(folder: Path, *, progress: bool = False) -> Tensor:
    """Decodes every image below a folder, in the order of the relative paths.

    An alpha channel is dropped and rotation marked in EXIF is not applied.

    Returns:
        uint8 (n, C, H, W): C = 1 where all images are grey, else 3.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: no image, one that cannot be read or has more than 8 bits a channel, or images
            of several sizes.
    """
    _import_pillow()
    paths = sorted(
        (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not paths:
        raise ValueError(
            f"{folder} is a folder without images; allowed are folders that hold at least one "
            f"file that ends in {', '.join(IMAGE_SUFFIXES[:-1])} or {IMAGE_SUFFIXES[-1]}."
        )
    channels, size = _common_form(paths)
    width, height = size
    images = torch.empty(len(paths), channels, height, width, dtype=torch.uint8)
    bar = progress_bar(paths, "images", unit="image", disable=not progress)
    for row, path in enumerate(bar):
        with _opened(path) as image:
            images[row] = _pixels(image, channels)
    return images


def load_dataset(dataset: Any, *, progress: bool = False) -> tuple[Tensor, Tensor | None]:
    """Fetches every item of a map-style dataset once.

    An item is a tensor, an array or a Pillow image (uint8 (C, H, W)), or a sequence whose first
    value is one, or a mapping with one at image, images, x or data, or else as its first value.
    The second value of a sequence, or that at label or labels, is the label where it is an integer.

    Returns:
        The items (n, *S), float64 as float32, and the labels (n,) int64, or None without labels.

    Raises:
        TypeError: items of other types or dtypes.
        ValueError: no items, or items of several shapes or dtypes, or labels in some items only, or
            images of more than 8 bits a channel, where the dataset has not decoded them itself.
    """
    count = _length(dataset)
    first, label = _split(dataset[0])
    channels = _image_channels(first, 0)
    row = _row(first, 0, channels)
    rows = torch.empty(count, *row.shape, dtype=row.dtype)
    labels = None if label is None else torch.empty(count, dtype=torch.int64)
    rest = (_split(dataset[index]) for index in range(1, count))
    items = progress_bar(
        chain([(first, label)], rest), "dataset", count, unit="item", disable=not progress
    )
    for index, (value, label) in enumerate(items):
        row = _row(value, index, channels)
        if (row.shape, row.dtype) != (rows.shape[1:], rows.dtype):
            raise ValueError(
                f"Item {index} of the dataset is {row.dtype} of shape {tuple(row.shape)}; allowed "
                f"is {rows.dtype} of shape {tuple(rows.shape[1:])}, as in item 0."
            )
        rows[index] = row
        if labels is not None:
            if label is None:
                raise ValueError(
                    f"Item {index} of the dataset has no integer label; allowed are labels in all "
                    "items or in none, and item 0 has one."
                )
            labels[index] = label
    return rows, labels


def _import_pillow() -> Any:
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise ImportError(
            "A folder of images needs Pillow; in a checkout: pip install '.[demo]'"
        ) from error
    return PIL.Image


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """Turns whatever Pillow raises on damaged bytes, of several types, into one sentence."""
    try:
        with _import_pillow().open(path, formats=_FORMATS) as image:
            yield image
    except PermissionError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is truncated, damaged or not an image; allowed are whole files of the "
            f"formats {', '.join(_FORMATS)}."
        ) from error


def _common_form(paths: Sequence[Path]) -> tuple[int, tuple[int, int]]:
    """Channels and (width, height), from the headers alone: before memory is taken."""
    channels, expected = 1, None
    for path in paths:
        with _opened(path) as image:
            mode, size, wide = image.mode, image.size, _is_wide(image)
        channels = max(channels, _channels(mode, str(path)))
        _check_depth(wide, str(path))
        expected = expected or size
        if size != expected:
            raise ValueError(
                f"{path} is an image of {size[0]} × {size[1]} pixels; allowed are images of one "
                f"size, and {paths[0]} has {expected[0]} × {expected[1]}."
            )
    assert expected is not None  # paths is not empty
    return channels, expected


def _is_wide(image: Image) -> bool:
    """Whether pixels that are not decoded yet have 16 bits a channel, which Pillow would cut to 8.

    Of decoded pixels nobody knows.
    """
    for codec, *_, arguments in getattr(image, "tile", ()):
        given = arguments if isinstance(arguments, tuple) else (arguments,)
        if codec == "SGI16" or any(isinstance(a, str) and _WIDE.search(a) for a in given):
            return True
        # The largest value of a PPM file.
        if codec.startswith("ppm") and any(isinstance(a, int) and a > 255 for a in given):
            return True
    return False


def _check_depth(wide: bool, name: str) -> None:
    if wide:
        raise ValueError(
            f"{name} has pixels of 16 bits a channel; allowed are images of 8 bits a channel."
        )


def _channels(mode: str, name: str) -> int:
    if mode not in _CHANNELS:
        raise ValueError(
            f"{name} has pixels of the mode {mode}; allowed are images of 8 bits a channel."
        )
    return _CHANNELS[mode]


def _pixels(image: Image, channels: int) -> Tensor:
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1)


def _length(dataset: Any) -> int:
    if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        raise TypeError(
            f"source is a {type(dataset).__name__}, a dataset without a length or without numbered "
            "items; allowed are datasets with __len__ and __getitem__."
        )
    count = len(dataset)
    if count == 0:
        raise ValueError("source is a dataset of 0 items; allowed is at least one.")
    return count


def _split(item: Any) -> tuple[Any, int | None]:
    """The value of an item and its label, None where it has none."""
    if isinstance(item, Mapping) and item:
        key = next((key for key in _DATA_KEYS if key in item), next(iter(item)))
        label = next((item[key] for key in _LABEL_KEYS if key in item), None)
        return item[key], _integer(label)
    if isinstance(item, (tuple, list)) and item:
        return item[0], _integer(item[1]) if len(item) > 1 else None
    return item, None


def _integer(value: Any) -> int | None:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    return None


def _is_image(value: Any) -> bool:
    module = sys.modules.get("PIL.Image")  # not imported: then it has made no image either
    return module is not None and isinstance(value, module.Image)


def _item(index: int) -> str:
    return f"Item {index} of the dataset"


def _image_channels(value: Any, index: int) -> int:
    """How many channels the images have, by the first; 0 for other items."""
    return _channels(value.mode, _item(index)) if _is_image(value) else 0


def _row(value: Any, index: int, channels: int) -> Tensor:
    name = _item(index)
    if _is_image(value):
        _check_depth(_is_wide(value), name)
        # A grey image among coloured ones gets their channels; the reverse would lose the colours.
        return _pixels(value, max(channels, _channels(value.mode, name)))
    if isinstance(value, np.ndarray):
        value = from_numpy(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; allowed are tensors, NumPy arrays, Pillow "
            "images, and sequences and mappings that hold one."
        )
    row = value.detach().float() if value.dtype == torch.float64 else value.detach()
    if row.dtype not in _KEPT_DTYPES:
        raise TypeError(
            f"{name} holds numbers of type {row.dtype}; allowed are uint8 and floating numbers."
        )
    return row
