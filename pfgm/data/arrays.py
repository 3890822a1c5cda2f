"""Samples in .npy, .npz and .safetensors files and in memory maps; bytes to [-1, 1]."""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..common.checks import check_dtype
from ..common.dtypes import REFERENCES
from ..common.files import StrPath, write_atomic
from ..common.tensors import as_int64, dequantise
from .rows import InMemory, OnDisk, Source, check_samples

_PREFERRED_NAMES = ("images", "data", "x")
_NUMPY_DTYPES = {np.dtype(of.numpy): dtype for dtype, of in REFERENCES.items() if of.numpy}
_SAFETENSORS_DTYPES = {of.safetensors: dtype for dtype, of in REFERENCES.items()}
_TABLES = (".feather", ".ods", ".txt", ".xls", ".xlsx")  # what pandas reads, or writes as .csv
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit of the safetensors library itself


def save_array(path: StrPath, samples: Tensor) -> None:
    """Writes samples to a ``.npy`` file. If writing fails, an existing file is left as it was.

    Raises:
        OSError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_array(f"{folder}/samples.npy", torch.zeros(5, 2))
    ...     np.load(f"{folder}/samples.npy").shape
    (5, 2)
    """
    array = samples.detach().cpu().numpy()
    write_atomic(path, lambda file: np.save(file, array, allow_pickle=False))


def to_unit(images: Tensor) -> Tensor:
    """Images of any shape as float32. A byte u becomes u/127.5 - 1; floating numbers are kept.

    Raises:
        TypeError: the dtype is neither floating nor uint8.

    >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    check_dtype("images", images)
    return dequantise(images, torch.float32)


def open_array(path: Path, name: str | None = None) -> Source:
    """Opens the samples of an array file.

    Args:
        path: the file.
        name: the array, one of :func:`array_names`; None takes a single one, or else the first of
            images, data and x.

    Returns:
        The rows, which are read from the file when they are needed. An array that is compressed, in
        Fortran order, in another byte order or of another width than references have is loaded now,
        and its float64 becomes float32.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a file or a folder, not a pipe, socket or device.")
    if path.suffix not in _OPENERS:
        table = "; a table is read from a .csv file"
        raise ValueError(
            f"{path} must be a folder of images or end in .csv, .npy, .npz, .safetensors or .zip, "
            f"got the suffix {path.suffix!r}{(table if path.suffix in _TABLES else '')}."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, 0 bytes long.")
    return _OPENERS[path.suffix](path, name)


def array_names(path: Path) -> list[str]:
    """The names of the arrays in a .npz or .safetensors file; an empty list for a .npy file."""
    if path.suffix == ".npz":
        with _parsing(path), ZipFile(path) as archive:
            names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path} must have different names of arrays, got {twice[0]!r} twice.")
        return names
    if path.suffix == ".safetensors":
        with _parsing(path), _open_tensors(path) as file:
            return list(file.keys())
    return []


def read_integers(path: Path, name: str) -> Tensor:
    """An array of integers in a .npz or .safetensors file, as int64."""
    with _parsing(path):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                array: np.ndarray[Any, Any] = archive[name]
            if not isinstance(array, np.ndarray):  # NumPy returns bytes for other members
                raise ValueError("the member of the archive is not an array")
            integers, dtype = array.dtype.kind in "iu", str(array.dtype)
        else:
            with _open_tensors(path) as file:
                values: Tensor = file.get_tensor(name)
            dtype = str(values.dtype).removeprefix("torch.")
            integers = dtype.startswith(("int", "uint"))
    if not integers:
        raise TypeError(
            f"{name} in {path} must be integers, one label for each sample, got {dtype}."
        )
    if path.suffix == ".npz":
        values = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    return as_int64(f"{name} in {path}", values)


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turns the many types of error that parsers raise on damaged bytes into one ValueError."""
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} must be a complete {path.suffix} file of plain numbers: it is truncated, "
            "damaged, pickled or too large for the memory."
        ) from error


def _choose_name(names: Sequence[str], path: Path) -> str:
    """The name of the array that holds the samples."""
    if len(names) == 1:
        return names[0]
    for name in _PREFERRED_NAMES:
        if name in names:
            return name
    raise ValueError(
        f"{path} must hold one array, or one named {', '.join(_PREFERRED_NAMES[:-1])} or "
        f"{_PREFERRED_NAMES[-1]}, got {len(names)} arrays ({', '.join(sorted(names)) or 'none'})."
    )


def _open_npy(path: Path, name: str | None) -> Source:
    with open(path, "rb") as file:
        return _open_stream(file, 0, path.stat().st_size, path)


def _open_npz(path: Path, name: str | None) -> Source:
    with _parsing(path):
        archive = ZipFile(path)
    with archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        member = members[name or _choose_name(list(members), path)]
        with _parsing(path):
            start = _member_start(member, path)
            stream = archive.open(member)
        with stream:
            return _open_stream(stream, start, member.file_size, path)


def _member_start(member: ZipInfo, path: Path) -> int | None:
    """The position in the file where a member's bytes begin; None if they are compressed."""
    if member.compress_type != ZIP_STORED:
        return None
    if member.compress_size != member.file_size:
        raise ValueError("a member that is not compressed has two sizes")
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return member.header_offset + len(header) + name + extra


def _open_stream(stream: IO[bytes], start: int | None, size: int, path: Path) -> Source:
    """Opens the array of a stream of this size in bytes, which begins in the .npy format.

    It begins at the position ``start`` of the file; None if it is compressed.
    """
    with _parsing(path):
        shape, fortran, dtype = _read_npy_header(stream)
    if not _is_allowed(dtype):
        raise _dtype_error(dtype, str(path))
    check_samples(shape, str(path))
    _check_length(path, math.prod(shape) * dtype.itemsize, size - stream.tell())
    if start is not None and not fortran and dtype in _NUMPY_DTYPES:
        return OnDisk(path, start + stream.tell(), _NUMPY_DTYPES[dtype], shape[1:], shape[0])
    with _parsing(path):
        stream.seek(0)
        array: np.ndarray[Any, Any] = npy.read_array(stream, allow_pickle=False)
    return _loaded(array, str(path))


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError("the version of the format is unknown")
    # Version 3 differs from 2 only in the names of fields, and no allowed array has fields.
    shape, fortran, dtype = (
        npy.read_array_header_1_0(stream)
        if version == (1, 0)
        else npy.read_array_header_2_0(stream)
    )
    return _natural_numbers(shape), fortran, dtype


def _open_tensors(path: Path) -> Any:
    from safetensors import safe_open  # late, because only files need it

    return safe_open(path, framework="pt")  # NumPy has no bfloat16


def _open_safetensors(path: Path, name: str | None) -> Source:
    size = path.stat().st_size
    with open(path, "rb") as file, _parsing(path):
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_SAFETENSORS_HEADER):
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        names = list(header.keys())
    name = name or _choose_name(names, path)
    with _parsing(path):
        shape = _natural_numbers(header[name]["shape"])
        begin, end = _natural_numbers(header[name]["data_offsets"])
        dtype = _SAFETENSORS_DTYPES.get(header[name]["dtype"])
        if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError("the shape and the number of bytes differ")
    check_samples(shape, str(path))
    _check_length(path, end, size - 8 - length)
    if dtype is None:
        return InMemory(_read_safetensors(path, name))
    return OnDisk(path, 8 + length + begin, dtype, shape[1:], shape[0])


def _read_safetensors(path: Path, name: str) -> Tensor:
    """Loads an array of a file as uint8 or float32."""
    with _parsing(path), _open_tensors(path) as file:
        # The tensor may share memory with the mapped file, which can change.
        tensor: Tensor = file.get_tensor(name).clone()
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise _dtype_error(tensor.dtype, str(path))
    return tensor if tensor.dtype == torch.uint8 else tensor.float()


def _natural_numbers(numbers: Any) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a shape or an offset is not a whole number of at least 0")
    return tuple(numbers)


def _check_length(path: Path, needed: int, size: int) -> None:
    if needed > size:
        raise ValueError(
            f"{path} is truncated: its header announces {needed} bytes of numbers, and {size} "
            "follow."
        )


_OPENERS: dict[str, Callable[[Path, str | None], Source]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
}


def open_mapped(array: np.memmap[Any, Any]) -> Source:
    """The rows of a memory map, or of a part of one.

    Returns:
        The rows, which are read from the file of the map. Four kinds of array are used in memory:
        those of shape (n,), those that no longer have a map, those with a map of mode "c", which
        may differ from the file, and copies of those that are not contiguous or not of native byte
        order.
    """
    mapping, filename = getattr(array, "_mmap", None), array.filename
    if mapping is None or filename is None or array.mode == "c" or array.ndim < 2:
        return InMemory(from_numpy(np.asarray(array), "data"))
    dtype = _NUMPY_DTYPES.get(array.dtype)
    if dtype is None or not array.flags.c_contiguous:
        return _loaded(np.array(array), str(filename))
    # A part of a map keeps the offset of the whole map. Its address tells where it begins in the
    # mapped memory, which begins at a page of the file.
    page = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    offset = page + array.ctypes.data - address
    return OnDisk(Path(filename), offset, dtype, array.shape[1:], array.shape[0])


def from_numpy(array: np.ndarray[Any, Any], name: str) -> Tensor:
    """The array as a contiguous tensor of the same dtype; numbers over 64 bits become float32.

    Memory is shared if the array is C-contiguous and of native byte order. The numbers must be
    floating or uint8, or there is a TypeError that calls the array ``name``.
    """
    if not _is_allowed(array.dtype):
        raise _dtype_error(array.dtype, name)
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float32)
    with np.errstate(over="ignore"):  # values beyond float32 become infinity
        native = np.ascontiguousarray(array, dtype)
    with warnings.catch_warnings():
        # Read-only arrays are allowed, because samples are never written to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(native).view(array.shape)  # NumPy makes (1,) of ()


def _loaded(array: np.ndarray[Any, Any], name: str) -> InMemory:
    """The rows of an array in memory, float64 as float32."""
    tensor = from_numpy(array, name)
    return InMemory(tensor.float() if tensor.dtype == torch.float64 else tensor)


def _is_allowed(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == np.uint8


def _dtype_error(dtype: object, name: str) -> TypeError:
    return TypeError(
        f"{name} must hold uint8 or floating-point numbers, got {dtype}; convert them, as by "
        "astype('float32')."
    )
