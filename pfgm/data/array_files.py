"""Where in a file the numbers of an array lie: .npy, .npz, .safetensors and memory maps."""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import safe_open
from torch import Tensor

from .arrays import choose, dtype_error, read_safetensors, reading

_NUMPY_DTYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
_SAFETENSORS_DTYPES = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library itself


class Extent(NamedTuple):
    """An array (n, *S) in a file: C-contiguous, its bytes as they are in memory."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def find_array(path: Path, name: str | None = None) -> Extent | Tensor:
    """Reads the header of an array file and no numbers, unless they cannot be used in place.

    Args:
        path: the file.
        name: one of :func:`array_names`; of several arrays in a file the choice is that of
            :func:`pfgm.data.load_array` unless given.

    Returns:
        Where the array lies; or the array, contiguous on the CPU and float32 where it was wider,
        if it is compressed, in Fortran order, in another byte order or of an uncommon width.

    Raises:
        FileNotFoundError: no such file.
        TypeError: numbers that are neither floating nor uint8.
        ValueError: another suffix, an empty, truncated, foreign or pickled file, no array of the
            names, fewer than two dimensions, no numbers.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}; allowed are .npy, .npz, .safetensors and "
            "folders of images."
        )
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, 0 bytes long.")
    return _READERS[path.suffix](path, name)


def array_names(path: Path) -> list[str]:
    """What the arrays in a .npz or .safetensors file are called; the one in a .npy has no name.

    Raises:
        ValueError: a damaged file.
    """
    if path.suffix == ".npz":
        with reading(path), ZipFile(path) as archive:
            return [info.filename.removesuffix(".npy") for info in archive.infolist()]
    if path.suffix == ".safetensors":
        with reading(path), safe_open(path, framework="pt") as file:
            return list(file.keys())
    return []


def read_integers(path: Path, name: str) -> Tensor:
    """An array of integers in a .npz or .safetensors file, as int64.

    Raises:
        TypeError: numbers of another type.
        ValueError: a damaged or pickled file.
    """
    with reading(path):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                array: np.ndarray[Any, Any] = archive[name]
        else:
            with safe_open(path, framework="np") as file:
                array = file.get_tensor(name)
        if not isinstance(array, np.ndarray):
            raise ValueError("a member of the archive that is no array comes as bytes")
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{path} holds {name} of type {array.dtype}; allowed are integers, a label for each "
            "sample."
        )
    return torch.from_numpy(array.astype(np.int64))


def find_mapped(array: np.memmap[Any, Any]) -> Extent | Tensor:
    """Where in its file a memory map, or a part of one, lies.

    Returns:
        The place; or the array in memory if it is no map (any more), of mode "c", which may differ
        from the file, or, as a copy, not contiguous or not of native byte order.

    Raises:
        TypeError: numbers that are neither floating nor uint8.
        ValueError: fewer than two dimensions, or no numbers.
    """
    mapping, filename = getattr(array, "_mmap", None), array.filename
    dtype = _NUMPY_DTYPES.get(array.dtype)
    if mapping is None or filename is None or array.mode == "c":
        return from_numpy(np.asarray(array), "source")
    if dtype is None or not array.flags.c_contiguous:
        return _in_memory(np.array(array), str(filename))
    check_samples(array.shape, str(filename))
    # A part keeps the whole's offset, so only the address tells where in the map it begins; the
    # map itself begins where a page does.
    begin = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    base = np.frombuffer(mapping, np.uint8).ctypes.data
    return Extent(Path(filename), begin + array.ctypes.data - base, dtype, array.shape)


def from_numpy(array: np.ndarray[Any, Any], name: str) -> Tensor:
    """The array as a contiguous tensor; ``name`` says in errors what it is.

    Memory is shared where the array is C-contiguous and of native byte order. The dtype stays, but
    floating numbers wider than 64 bits become float32.

    Raises:
        TypeError: numbers that are neither floating nor uint8.
    """
    if not _is_allowed(array.dtype):
        raise TypeError(
            f"{name} holds numbers of type {array.dtype}; allowed are uint8 and floating numbers."
        )
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float32)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity
        native = np.ascontiguousarray(array, dtype)
    with warnings.catch_warnings():
        # That it may be read-only is no matter: nobody writes to samples.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(native)


def check_samples(shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError unless this is the shape of samples (n, *S)."""
    if len(shape) < 2 or 0 in shape:
        raise ValueError(
            f"{name} holds an array of shape {tuple(shape)}; allowed is (n, *S), n samples of "
            "shape S with at least one number."
        )


def _is_allowed(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == np.uint8


def _in_memory(array: np.ndarray[Any, Any], name: str) -> Tensor:
    tensor = from_numpy(array, name)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _find_npy(path: Path, name: str | None) -> Extent | Tensor:
    with open(path, "rb") as file:
        return _find_in_stream(file, 0, path.stat().st_size, path)


def _find_npz(path: Path, name: str | None) -> Extent | Tensor:
    with reading(path):
        archive = ZipFile(path)
    with archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        member = members[name or choose(list(members), path)]
        with reading(path):
            start = _start_of(member, path)
            stream = archive.open(member)
        with stream:
            return _find_in_stream(stream, start, member.file_size, path)


def _start_of(member: ZipInfo, path: Path) -> int | None:
    """Where the bytes of a member lie as they are: behind its local header; None if compressed."""
    if member.compress_type != ZIP_STORED:
        return None
    if member.compress_size != member.file_size:
        raise ValueError("a stored member of two sizes")
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return member.header_offset + len(header) + name + extra


def _find_in_stream(stream: IO[bytes], start: int | None, size: int, path: Path) -> Extent | Tensor:
    """The array of a stream in the .npy format of ``size`` bytes, which lies in the file at start.

    Where start is None the array is loaded.
    """
    with reading(path):
        shape, fortran, dtype = _read_header(stream)
    if not _is_allowed(dtype):
        raise dtype_error(dtype, path)
    check_samples(shape, str(path))
    _check_length(path, math.prod(shape) * dtype.itemsize, size - stream.tell())
    if start is not None and not fortran and dtype in _NUMPY_DTYPES:
        return Extent(path, start + stream.tell(), _NUMPY_DTYPES[dtype], shape)
    with reading(path):
        stream.seek(0)
        array: np.ndarray[Any, Any] = npy.read_array(stream, allow_pickle=False)
    return _in_memory(array, str(path))


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError("an unknown version of the format")
    # Version 3 is version 2 with names of fields, which no array allowed here has, in UTF-8.
    old = version == (1, 0)
    shape, fortran, dtype = (
        npy.read_array_header_1_0(stream) if old else npy.read_array_header_2_0(stream)
    )
    return _whole_numbers(shape), fortran, dtype


def _find_safetensors(path: Path, name: str | None) -> Extent | Tensor:
    size = path.stat().st_size
    with open(path, "rb") as file, reading(path):
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _LARGEST_HEADER):
            raise ValueError("a header longer than the file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        names = list(header.keys())
    name = name or choose(names, path)
    with reading(path):
        shape = _whole_numbers(header[name]["shape"])
        begin, end = _whole_numbers(header[name]["data_offsets"])
        dtype = _SAFETENSORS_DTYPES.get(header[name]["dtype"])
        if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError("an array of two sizes")
    check_samples(shape, str(path))
    _check_length(path, end, size - 8 - length)
    if dtype is None:
        return read_safetensors(path, name)
    return Extent(path, 8 + length + begin, dtype, shape)


def _whole_numbers(numbers: Any) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a shape or a place that is not of whole numbers")
    return tuple(numbers)


def _check_length(path: Path, needed: int, found: int) -> None:
    if needed > found:
        raise ValueError(
            f"{path} is truncated: by its header {needed} bytes of numbers follow, but {found} do; "
            "allowed are whole files."
        )


_READERS: dict[str, Callable[[Path, str | None], Extent | Tensor]] = {
    ".npy": _find_npy,
    ".npz": _find_npz,
    ".safetensors": _find_safetensors,
}
