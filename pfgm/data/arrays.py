"""Arrays of samples in files, and bytes to [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..common.files import StrPath, write_atomic

__all__ = ["load_array", "save_array", "to_unit"]

_PREFERRED_NAMES = ("images", "data", "x")


def load_array(path: StrPath) -> Tensor:
    """Reads samples from a ``.npy``, ``.npz`` or ``.safetensors`` file; nothing is unpickled.

    A file of several arrays is read at the first of the names images, data, x that it has.
    Floating numbers of any width become float32. uint8 stays uint8 for the memory it saves: as
    references, and in :func:`to_unit`, a byte u means u/127.5 - 1.

    Returns:
        A contiguous tensor (n, *S) on the CPU, float32 or uint8, with at least one number in it.

    Raises:
        FileNotFoundError: no such file.
        TypeError: numbers that are neither floating nor uint8.
        ValueError: another suffix, an empty, truncated, foreign or pickled file, no array of those
            names, fewer than two dimensions, no numbers, NaN or infinity.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/images.npy", np.zeros((5, 1, 8, 8)))
    ...     images = load_array(f"{folder}/images.npy")
    >>> images.shape, images.dtype
    (torch.Size([5, 1, 8, 8]), torch.float32)
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz", ".safetensors"):
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}; allowed are .npy, .npz and .safetensors."
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, 0 bytes long.")
    read = read_safetensors if path.suffix == ".safetensors" else _read_numpy
    return _checked(read(path), path)


def save_array(path: StrPath, samples: Tensor) -> None:
    """Writes samples as a ``.npy`` file, whole or not at all.

    Raises:
        OSError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_array(f"{folder}/samples.npy", torch.zeros(5, 2))
    ...     load_array(f"{folder}/samples.npy").shape
    torch.Size([5, 2])
    """
    array = samples.detach().cpu().numpy()
    write_atomic(path, lambda file: np.save(file, array, allow_pickle=False))


def to_unit(images: Tensor) -> Tensor:
    """Images as float32: a byte u as u/127.5 - 1, in [-1, 1]; floating numbers as they are.

    Args:
        images: any shape, uint8 or floating.

    Raises:
        TypeError: another dtype.

    >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    if images.dtype == torch.uint8:
        return images.float().div_(127.5).sub_(1)
    if images.is_floating_point():
        return images.float()
    raise TypeError(
        f"images has dtype {images.dtype}; allowed are torch.uint8 and floating dtypes."
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever the parsers raise on damaged bytes, of a dozen types, into one sentence."""
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is truncated, damaged, pickled, too large for the memory or not a "
            f"{path.suffix} file; allowed are whole files of plain numbers."
        ) from error


def _read_numpy(path: Path) -> Tensor:
    with open(path, "rb") as file:
        with reading(path):
            loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _from_numpy(loaded, path)
        name = choose(loaded.files, path)
        with reading(path):
            array = loaded[name]
            if not isinstance(array, np.ndarray):
                raise ValueError("a member of the archive that is no array comes as bytes")
    return _from_numpy(array, path)


def _from_numpy(array: np.ndarray[Any, Any], path: Path) -> Tensor:
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as infinity
            array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        raise dtype_error(array.dtype, path)
    return torch.from_numpy(array)


def read_safetensors(path: Path, name: str | None = None) -> Tensor:
    """The samples of a file, or its array of that name, copied, uint8 or float32."""
    with reading(path):
        file: Any = safe_open(path, framework="pt")
    with file:
        name = name or choose(file.keys(), path)
        with reading(path):
            # A copy, since the tensor may be the mapped file, which could change under it.
            tensor: Tensor = file.get_tensor(name).clone()
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise dtype_error(tensor.dtype, path)
    return tensor if tensor.dtype == torch.uint8 else tensor.float()


def choose(names: Sequence[str], path: Path) -> str:
    """Which of the arrays in a file is read."""
    if len(names) == 1:
        return names[0]
    for name in _PREFERRED_NAMES:
        if name in names:
            return name
    raise ValueError(
        f"{path} holds {len(names)} arrays ({', '.join(sorted(names)) or 'none'}); allowed is one "
        f"array, or several of which one is named {', '.join(_PREFERRED_NAMES[:-1])} or "
        f"{_PREFERRED_NAMES[-1]}."
    )


def _checked(samples: Tensor, path: Path) -> Tensor:
    if samples.ndim < 2 or samples.numel() == 0:
        raise ValueError(
            f"{path} holds an array of shape {tuple(samples.shape)}; allowed is (n, *S), n samples "
            "of shape S with at least one number."
        )
    if samples.is_floating_point() and not bool(torch.isfinite(samples).all()):
        raise ValueError(
            f"{path} holds NaN or infinity as float32; only finite values are allowed."
        )
    return samples.contiguous()


def dtype_error(dtype: object, path: Path) -> TypeError:
    """For numbers of a type that is not read."""
    return TypeError(
        f"{path} holds numbers of type {dtype}; allowed are uint8 and floating numbers."
    )
