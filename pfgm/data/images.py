"""Folders and archives of images, which Pillow decodes, and the pixels of Pillow images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..common.images import is_image
from ..common.memory import allocating, memory_bytes
from ..common.messages import reading_bar
from ..common.numbers import whole
from ..common.optional import optional
from ..common.values import check_finite
from .image_files import ImageFiles, image_files
from .opened import Data
from .rows import InMemory

if TYPE_CHECKING:
    from PIL.Image import Image

# The only formats that are read, whatever the suffix. For some others Pillow runs a program.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "RGBX": 3, "CMYK": 3}
_CHANNELS |= {"YCbCr": 3, "HSV": 3}

_MAX_SIDE = 1 << 16  # pixels

# Pillow's raw modes of 16 bits a channel end in a letter, as in RGB;16B. In modes without the
# letter, as in BGR;16, a whole pixel has 16 bits.
_16_BITS_A_CHANNEL = re.compile(r";16[BLNS]")


def load_images(path: Path, *, resize: int | None = None, progress: bool | None = None) -> Data:
    """Decodes all images in a folder and its subfolders, or in a zip archive, as :func:`open` does.

    Their order is that of their relative paths. Links to files and folders are followed. Hidden
    files are left out. A rotation in the EXIF data is not applied. Of an animated image the first
    frame is taken. The images are uint8 (n, C, H, W), where C = 1 if all images are grey, else 3.
    """
    _import_pillow()
    size = None if resize is None else (whole("resize", resize, 1, _MAX_SIDE),) * 2
    with image_files(path) as files:
        first, labels, names = files.labels()  # the first for training
        channels, (width, height) = _common_shape(files, size, progress)
        shape = (len(files.names), channels, height, width)
        with allocating(f"{path} holds {shape[0]} images of {width} × {height} pixels, which"):
            # A small file may announce many pixels, and a system promise more memory than it has.
            if math.prod(shape) > memory_bytes():
                raise MemoryError
            images = torch.empty(shape, dtype=torch.uint8, device="cpu")
        for row, name in enumerate(_bar(files, "images", progress)):
            with _opened(files, name) as image:
                images[row] = pixels(image, channels, resize)

    def part(rows: slice) -> Data:
        return Data(InMemory(images[rows]), None if labels is None else labels[rows], names)

    return replace(part(slice(first, None)), held_out=part(slice(first)) if first else None)


def _bar(files: ImageFiles, name: str, progress: bool | None) -> Iterable[str]:
    return reading_bar(files.names, len(files.names), progress, desc=name, unit="image")


def save_image(path: Path, image: Tensor) -> None:
    """Writes an image (C, H, W), uint8 or floating in [-1, 1], as PNG: grey for C = 1, else RGB.

    Values outside [-1, 1] are clamped.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_image(Path(folder) / "0.png", torch.tensor([[[-1.0, 0.0, 1.0]]]))
    ...     load_images(Path(folder)).samples[:].flatten()
    tensor([  0, 128, 255], dtype=torch.uint8)
    """
    pillow = _import_pillow()
    if not is_image(image.shape):
        raise ValueError(
            f"image must have shape (C, H, W) with C = 1 or 3, got {tuple(image.shape)}."
        )
    if image.is_floating_point():
        check_finite("image", image.flatten())
        image = image.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    values = image.permute(1, 2, 0).cpu().numpy()
    pillow.fromarray(values[:, :, 0] if len(image) == 1 else values).save(path, format="PNG")


def pixels(image: Image, channels: int, resize: int | None = None) -> Tensor:
    """The pixels of a Pillow image, uint8 (channels, H, W), grey for one channel, else RGB.

    A transparent image is composed on white. With resize its largest central square is scaled to
    that height and width.
    """
    opaque = _on_white(image) if image.has_transparency_data else image
    plain = opaque.convert("L" if channels == 1 else "RGB")
    if resize is not None:
        plain = _central_square(plain, resize)
    values = torch.from_numpy(np.array(plain))
    return values.view(plain.height, plain.width, channels).permute(2, 0, 1)


def _central_square(image: Image, side: int) -> Image:
    """The largest central square, scaled with a filter that averages where it shrinks."""
    width, height = image.size
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    box = (left, top, left + square, top + square)
    return image.resize((side, side), _import_pillow().Resampling.LANCZOS, box=box)


def _on_white(image: Image) -> Image:
    image = image.convert("RGBA")
    pillow = _import_pillow()
    composed: Image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    return composed


def channel_count(image: Image, name: str) -> int:
    """The number of channels, 1 or 3, to which a Pillow image is converted."""
    if image.mode not in _CHANNELS:
        raise ValueError(f"{name} must have 8 bits a channel, got pixels of the mode {image.mode}.")
    if _has_16_bits(image):
        raise ValueError(f"{name} must have 8 bits a channel, got 16.")
    return _CHANNELS[image.mode]


def _has_16_bits(image: Image) -> bool:
    """Whether an image has 16 bits a channel, which Pillow would cut to 8.

    A decoded image no longer shows its file format, so the answer for it is always False.
    """
    for codec, *_, arguments in getattr(image, "tile", ()):
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        if codec == "SGI16":
            return True
        if any(isinstance(v, str) and _16_BITS_A_CHANNEL.search(v) for v in values):
            return True
        # For PPM files the integer is the largest value of a channel.
        if codec.startswith("ppm") and any(isinstance(v, int) and v > 255 for v in values):
            return True
    return False


def _import_pillow() -> Any:
    return optional("PIL.Image", "Images need Pillow", "demo")


@contextmanager
def _opened(files: ImageFiles, name: str) -> Iterator[Image]:
    """Opens an image. Turns the many types of error on damaged bytes into one ValueError."""
    pillow = _import_pillow()
    try:
        with files.open(name) as file, pillow.open(file, formats=_FORMATS) as image:
            yield image
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except pillow.DecompressionBombError as error:
        raise ValueError(
            f"{files.place(name)} must have at most {2 * pillow.MAX_IMAGE_PIXELS} pixels, twice "
            "PIL.Image.MAX_IMAGE_PIXELS; it announces more."
        ) from error
    except Exception as error:
        raise ValueError(
            f"{files.place(name)} must be a complete image in one of the formats "
            f"{', '.join(_FORMATS)}; it is truncated, damaged or another kind of file."
        ) from error


def _common_shape(
    files: ImageFiles, resized: tuple[int, int] | None, progress: bool | None
) -> tuple[int, tuple[int, int]]:
    """The channels and (width, height) of all images, which are resized. Only headers are read."""
    channels, expected = 1, resized
    for name in _bar(files, "sizes of images", progress):
        with _opened(files, name) as image:
            size, place = image.size, files.place(name)
        channels = max(channels, channel_count(image, place))
        expected = expected or size
        if resized is None and size != expected:
            raise ValueError(
                f"{place} must have the size of {files.place(files.names[0])}, {expected[0]} × "
                f"{expected[1]} pixels, got {size[0]} × {size[1]}; --resize N, in Python "
                "open(…, resize=N), scales all images to one size."
            )
    assert expected is not None  # there is an image
    return channels, expected
