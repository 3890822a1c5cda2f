"""Where the rows of a large reference set come from: memory, or a file that is read piece by piece.

Rows in a file are read into memory that the caller has, at a position, with the interpreter lock
released: nothing is mapped, so a file larger than the memory costs none, and one thread can read
ahead while another takes rows.
"""

from __future__ import annotations

import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..common.checks import checks_values
from ..common.files import StrPath
from .array_files import Extent, check_samples, find_array, find_mapped, from_numpy
from .images import load_dataset, load_images

DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64)

_READ_BYTES = 1 << 30  # in one system call; some systems refuse 2³¹ and more
_CHUNK_BYTES = 1 << 24  # of a file that is loaded: what the conversion needs besides


class Source(ABC):
    """n rows of the shape S.

    Attributes:
        shape: S.
        dtype: of the rows as they are stored, one of ``DTYPES``.
        labels: (n,) int64, or None where the source knows none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    labels: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @property
    def tensor(self) -> Tensor | None:
        """All rows (n, *S) where they are held in memory, else None."""
        return None

    def version(self) -> object:
        """Something that is another once rows were changed in place, as far as that is noticed."""
        return None

    @abstractmethod
    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows start to stop - 1, as (stop - start, *S).

        Args:
            start, stop: 0 ≤ start ≤ stop ≤ n.
            out: contiguous (at least stop - start, *S) on the CPU, of the source's dtype. Where
                rows are read from a file they go into its first rows, which are returned; where
                they are in memory it is not touched, and what is returned is a view of them.

        Raises:
            IndexError: start or stop out of range.
            TypeError: start or stop no whole numbers, out of another dtype.
            ValueError: out of another form.
            OSError: the file cannot be read, or has become shorter since it was opened.
        """

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """The rows of these numbers in this order, as a new tensor (k, *S).

        Args:
            rows: (k,) int64, each 0 to n - 1; duplicates are allowed. The numbers are checked
                where that does not make the host wait for a device, or under ``debug_checks()``.

        Raises:
            IndexError: a number out of range.
            TypeError: rows is no tensor, or not int64.
            ValueError: rows has another number of dimensions than one.
            OSError: as for :meth:`read`.
        """


class InMemory(Source):
    """The rows of a tensor on any device; it is neither copied nor changed.

    Raises:
        TypeError: another dtype than those of ``DTYPES``.
        ValueError: fewer than two dimensions, or no numbers.
    """

    def __init__(self, tensor: Tensor, labels: Tensor | None = None) -> None:
        _check_dtype(tensor.dtype, "source")
        check_samples(tensor.shape, "source")
        self._tensor = tensor
        self.shape = tuple(tensor.shape[1:])
        self.dtype = tensor.dtype
        self.labels = labels

    def __len__(self) -> int:
        return len(self._tensor)

    @property
    def tensor(self) -> Tensor:
        return self._tensor

    def version(self) -> object:
        """That of the tensor; None for one made under torch.inference_mode, which counts none."""
        return None if self._tensor.is_inference() else self._tensor._version

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        _check_range(start, stop, len(self))
        return self._tensor[start:stop]

    def take(self, rows: Tensor) -> Tensor:
        _check_rows(rows, len(self))
        return self._tensor.index_select(0, rows.to(self._tensor.device))


class OnDisk(Source):
    """Rows that lie one after the other in a file, read when asked for; safe to use from threads.

    Pickled, it is opened anew by its path.

    Args:
        path: the file; it stays open for as long as this object lives.
        offset: where in it the first row begins, in bytes.
        dtype: one of ``DTYPES``, in the byte order of the machine.
        shape: S.
        count: n.

    Raises:
        OSError: the file cannot be opened.
        TypeError: another dtype.
        ValueError: the file is too short for the rows, or there are no numbers in them.
    """

    def __init__(
        self, path: StrPath, offset: int, dtype: torch.dtype, shape: tuple[int, ...], count: int
    ) -> None:
        self.path = Path(path).absolute()  # of use to a process in another folder
        _check_dtype(dtype, str(self.path))
        check_samples((count, *shape), str(self.path))
        self.offset = offset
        self.dtype = dtype
        self.shape = tuple(shape)
        self._count = count
        self._row_bytes = math.prod(shape) * dtype.itemsize
        self._descriptor = os.open(self.path, os.O_RDONLY)
        # Not at exit, when a background thread may still read: the system closes it then.
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        end, size = offset + count * self._row_bytes, os.fstat(self._descriptor).st_size
        if size < end:
            raise ValueError(
                f"{self.path} is truncated: its rows end at byte {end}, the file at byte {size}; "
                "allowed are whole files."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return OnDisk, (self.path, self.offset, self.dtype, self.shape, self._count)

    def __len__(self) -> int:
        return self._count

    def version(self) -> object:
        """Length of the file and when it was written last."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        _check_range(start, stop, len(self))
        if out is None:
            out = self._empty(stop - start)
        else:
            self._check_out(out, stop - start)
        rows = out.detach()[: stop - start]
        self._fill(_bytes_of(rows), start)
        return rows

    def take(self, rows: Tensor) -> Tensor:
        rows = rows.cpu() if isinstance(rows, Tensor) else rows
        _check_rows(rows, len(self))
        # In the order of the file, neighbours together: few and short ways for the disk.
        numbers, places = rows.unique(sorted=True, return_inverse=True)
        found = self._empty(len(numbers))
        memory = _bytes_of(found)
        for number, begin, end in _runs(numbers):
            self._fill(memory[begin * self._row_bytes : end * self._row_bytes], number)
        return found if torch.equal(numbers, rows) else found.index_select(0, places)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, *self.shape, dtype=self.dtype)

    def _fill(self, memory: memoryview, row: int) -> None:
        """Reads as many bytes as there is memory for, from the row's first on."""
        position = self.offset + row * self._row_bytes
        while len(memory):
            try:
                count = os.preadv(self._descriptor, [memory[:_READ_BYTES]], position)
            except OSError as error:  # which names no file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if count == 0:
                raise OSError(
                    f"{self.path} ends at byte {os.fstat(self._descriptor).st_size} and has "
                    "become shorter since it was opened; allowed are files that stay as they are."
                )
            memory = memory[count:]
            position += count

    def _check_out(self, out: Tensor, count: int) -> None:
        if out.dtype != self.dtype:
            raise TypeError(f"out has dtype {out.dtype}; allowed is {self.dtype}, the source's.")
        if (
            out.device.type != "cpu"
            or not out.is_contiguous()
            or tuple(out.shape[1:]) != self.shape
            or len(out) < count
        ):
            raise ValueError(
                f"out has shape {tuple(out.shape)} and strides {out.stride()} on {out.device}; "
                f"allowed is a contiguous tensor ({count} or more, *{self.shape}) on the CPU."
            )


def open_source(
    source: Tensor | np.ndarray[Any, Any] | StrPath | Dataset[Any] | Source,
    *,
    in_memory: bool = False,
    progress: bool = False,
) -> Source:
    """Opens what holds samples; nothing is unpickled, and values are not looked at.

    Args:
        source: one of

            - a tensor (n, *S) or a NumPy array, shared where torch can share it;
            - a ``numpy.memmap``, read from its file; one that is not C-contiguous is copied into
              memory, and one of mode "c", which may differ from its file, is an array as others;
            - the path of a ``.npy``, ``.npz`` or ``.safetensors`` file, read in place where its
              numbers lie in it as they do in memory, and else loaded: in a compressed archive, in
              Fortran order, in another byte order, or of a width that is none of ``DTYPES``. Of
              several arrays the choice is that of :func:`pfgm.data.load_array`;
            - the path of a folder: every PNG, JPEG, BMP and WebP image below it, decoded;
            - a dataset with ``__len__`` and ``__getitem__``, loaded: see
              :func:`pfgm.data.images.load_dataset`;
            - a source, as it is.
        in_memory: whether files that could be read in place are loaded as well.
        progress: whether a bar is shown while images or a dataset are loaded.

    Returns:
        The rows. float64 in files and datasets becomes float32 where it is loaded.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a folder of images, and Pillow is not installed.
        TypeError: numbers that are neither floating nor uint8, or a source of another type.
        ValueError: another suffix, a file that is empty, truncated or damaged, fewer than two
            dimensions, no numbers, images or items that do not match.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/images.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    ...     source = open_source(f"{folder}/images.npy")
    >>> source.take(torch.tensor([5, 0]))
    tensor([[10., 11.],
            [ 0.,  1.]])
    """
    opened = _open(source, progress)
    return _loaded(opened) if in_memory and isinstance(opened, OnDisk) else opened


def _open(source: object, progress: bool) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, Tensor):
        return InMemory(source)
    if isinstance(source, np.memmap):
        return source_of(find_mapped(source))
    if isinstance(source, np.ndarray):
        return InMemory(from_numpy(source, "source"))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            return InMemory(load_images(path, progress=progress))
        return source_of(find_array(path))
    if hasattr(source, "__getitem__") and not isinstance(source, Mapping):
        return InMemory(*load_dataset(source, progress=progress))
    raise TypeError(
        f"source is a {type(source).__name__}; allowed are a tensor, a NumPy array, the path of a "
        "file or a folder of images, and a dataset with __len__ and __getitem__."
    )


def source_of(found: Extent | Tensor) -> Source:
    """The rows of an array that was found in a file, or of one in memory."""
    if isinstance(found, Tensor):
        return InMemory(found)
    return OnDisk(found.path, found.offset, found.dtype, found.shape[1:], found.shape[0])


def _loaded(source: OnDisk) -> InMemory:
    dtype = torch.float32 if source.dtype == torch.float64 else source.dtype
    rows = torch.empty(len(source), *source.shape, dtype=dtype)
    step = max(1, _CHUNK_BYTES // (math.prod(source.shape) * source.dtype.itemsize))
    for start in range(0, len(source), step):
        stop = min(start + step, len(source))
        rows[start:stop] = source.read(start, stop)
    return InMemory(rows)


def _runs(numbers: Tensor) -> Iterator[tuple[int, int, int]]:
    """The runs of neighbours among ascending numbers: the first, where it begins and ends."""
    if len(numbers):
        breaks = (numbers.diff() != 1).nonzero().flatten() + 1
        edges = torch.cat([breaks.new_zeros(1), breaks, breaks.new_tensor([len(numbers)])])
        yield from zip(
            numbers[edges[:-1]].tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
        )


def _bytes_of(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; NumPy would refuse bfloat16 as it is."""
    return rows.reshape(-1).view(torch.uint8).numpy().data


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in DTYPES:
        raise TypeError(
            f"{name} holds numbers of type {dtype}; allowed are {', '.join(map(str, DTYPES))}."
        )


def _check_range(start: int, stop: int, count: int) -> None:
    for name, value in (("start", start), ("stop", stop)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; allowed are whole numbers.")
    if not 0 <= start <= stop <= count:
        raise IndexError(
            f"start is {start} and stop is {stop}; allowed are 0 <= start <= stop <= {count}."
        )


def _check_rows(rows: Tensor, count: int) -> None:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows is {kind}; allowed is a tensor of torch.int64.")
    if rows.ndim != 1:
        raise ValueError(f"rows has shape {tuple(rows.shape)}; allowed is (k,), k row numbers.")
    if checks_values(rows.device):
        bad = rows[(rows < 0) | (rows >= count)]
        if len(bad):
            raise IndexError(f"rows holds the number {int(bad[0])}; allowed are 0 to {count - 1}.")
