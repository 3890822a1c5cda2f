"""Rows of samples, in memory or in a file that is read in chunks.

Rows in a file are read, not mapped, so a file may be larger than the memory. Reading releases the
interpreter lock, so one thread can read ahead while another computes.
"""

from __future__ import annotations

import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_dense
from ..common.dtypes import REFERENCES
from ..common.files import StrPath

LABEL_NAMES = ("labels", "label", "y")
"""The names of arrays and columns that hold a label for each row."""

_MAX_READ_BYTES = 1 << 30  # in one system call; some systems refuse 2³¹ bytes or more


class Source(ABC):
    """n rows of shape S.

    Attributes:
        row_shape: S.
        dtype: the dtype in which the rows are stored, one of :data:`pfgm.common.dtypes.REFERENCES`.
    """

    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *S)."""
        return len(self), *self.row_shape

    def __getitem__(self, rows: Tensor | slice | int) -> Tensor:
        """Rows by a slice, a mask or their numbers, as a new tensor (k, *S); one row by its number.

        Raises:
            IndexError: a number is out of range.
        """
        numbers = torch.arange(len(self), device="cpu")[rows]
        return self.take(numbers) if numbers.ndim else self.take(numbers[None])[0]

    @property
    def tensor(self) -> Tensor | None:
        """All rows (n, *S) if they are in memory, else None."""
        return None

    def version(self) -> object:
        """A value that changes when the rows change in place; None if changes go unnoticed."""
        return None

    @abstractmethod
    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows start to stop - 1, as (stop - start, *S).

        Args:
            start, stop: 0 ≤ start ≤ stop ≤ n. Neither these nor out are checked.
            out: memory for rows from a file: contiguous, of shape (at least stop - start, *S), on
                the CPU, in the dtype of the source. Its first rows are filled and returned. A
                source in memory ignores out and returns a view of its rows.

        Raises:
            OSError: the file cannot be read, or it has become shorter since it was opened.
        """

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """The rows with these numbers (k,), int64, in this order, as a new tensor (k, *S).

        Duplicates are allowed. The numbers, 0 to n - 1, are not checked. Errors are those of
        :meth:`read`.
        """


class InMemory(Source):
    """The rows of a tensor on any device. The tensor is neither copied nor changed."""

    def __init__(self, tensor: Tensor) -> None:
        check_dense("data", tensor)
        _check_dtype(tensor.dtype, "data")
        check_samples(tensor.shape, "data", in_file=False)
        self._tensor = tensor
        self.row_shape = tuple(tensor.shape[1:])
        self.dtype = tensor.dtype

    def __len__(self) -> int:
        return len(self._tensor)

    @property
    def tensor(self) -> Tensor:
        return self._tensor

    def version(self) -> object:
        """The tensor's version counter; None for an inference tensor, which has no counter."""
        return None if self._tensor.is_inference() else self._tensor._version

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self._tensor[start:stop]

    def take(self, rows: Tensor) -> Tensor:
        return self._tensor.index_select(0, rows.to(self._tensor.device))


class OnDisk(Source):
    """Rows that are stored one after the other in a file and are read when they are needed.

    The first of ``count`` rows begins at the byte ``offset``. Several threads may read at once. A
    pickle holds the path, and unpickling opens the file again.
    """

    def __init__(
        self, path: StrPath, offset: int, dtype: torch.dtype, shape: tuple[int, ...], count: int
    ) -> None:
        self.path = Path(path).absolute()  # a process that unpickles it may be in another folder
        _check_dtype(dtype, str(self.path))
        check_samples((count, *shape), str(self.path))
        self.offset = offset
        self.dtype = dtype
        self.row_shape = tuple(shape)
        self._count = count
        self._row_bytes = math.prod(shape) * dtype.itemsize
        self._descriptor = os.open(self.path, os.O_RDONLY)
        # At exit a background thread may still read, so the file is left to the system to close.
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        end, size = offset + count * self._row_bytes, os.fstat(self._descriptor).st_size
        if size < end:
            raise ValueError(
                f"{self.path} is truncated: its rows end at byte {end}, the file at byte {size}."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return OnDisk, (self.path, self.offset, self.dtype, self.row_shape, self._count)

    def __len__(self) -> int:
        return self._count

    def version(self) -> object:
        """The length of the file and the time when it was last written."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        out = self._empty(stop - start) if out is None else out
        rows = out.detach()[: stop - start]
        self._fill(_bytes_of(rows), start)
        return rows

    def take(self, rows: Tensor) -> Tensor:
        rows = rows.cpu()
        # Reads go in the order of the file, neighbours in one read: this is fast on a disk.
        numbers, places = rows.unique(sorted=True, return_inverse=True)
        values = self._empty(len(numbers))
        memory = _bytes_of(values)
        for number, begin, end in _runs(numbers):
            self._fill(memory[begin * self._row_bytes : end * self._row_bytes], number)
        return values if torch.equal(numbers, rows) else values.index_select(0, places)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, *self.row_shape, dtype=self.dtype, device="cpu")

    def _fill(self, memory: memoryview, row: int) -> None:
        """Fills the memory with bytes of the file, from the beginning of the row on."""
        position = self.offset + row * self._row_bytes
        while len(memory):
            try:
                count = os.preadv(self._descriptor, [memory[:_MAX_READ_BYTES]], position)
            except OSError as error:  # the original does not name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if count == 0:
                raise OSError(
                    f"{self.path} must not change while it is read: it ends at byte "
                    f"{os.fstat(self._descriptor).st_size}, and was longer when it was opened."
                )
            memory = memory[count:]
            position += count


class Scaled(Source):
    """The rows of another source as float32, with the values low to high mapped to −1 to 1."""

    def __init__(self, source: Source, low: float, high: float) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range must be two numbers, the lower first, got {low} {high}.")
        if source.dtype == torch.uint8:
            raise TypeError(
                f"range is {low} {high}, but the data are bytes, which always stand for 0 to 255; "
                "leave it out."
            )
        self._source, self._low, self._high = source, low, high
        self.row_shape, self.dtype = source.row_shape, torch.float32

    def __len__(self) -> int:
        return len(self._source)

    def version(self) -> object:
        return self._source.version()

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        rows = self._scaled(self._source.read(start, stop))
        if out is None:
            return rows
        return out.detach()[: stop - start].copy_(rows)

    def take(self, rows: Tensor) -> Tensor:
        return self._scaled(self._source.take(rows))

    def _scaled(self, rows: Tensor) -> Tensor:
        middle, half = (self._low + self._high) / 2, (self._high - self._low) / 2
        return (rows.double() - middle).div_(half).float()


def _runs(numbers: Tensor) -> Iterator[tuple[int, int, int]]:
    """Splits ascending numbers into consecutive runs. Yields first number, begin and end index."""
    if len(numbers):
        breaks = (numbers.diff() != 1).nonzero().flatten() + 1
        edges = torch.cat([breaks.new_zeros(1), breaks, breaks.new_tensor([len(numbers)])])
        yield from zip(
            numbers[edges[:-1]].tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
        )


def _bytes_of(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes because NumPy has no bfloat16."""
    return rows.reshape(-1).view(torch.uint8).numpy().data


def check_samples(shape: tuple[int, ...], name: str, *, in_file: bool = True) -> None:
    """Raises ValueError unless this is the shape of samples (n, *S).

    An array (n,) in memory is n numbers. In a file it is refused: it may well be something else.
    """
    if len(shape) < 1 + in_file or 0 in shape:
        hint = (
            " (n numbers in a file or a dataset are (n, 1))" if in_file and len(shape) == 1 else ""
        )
        raise ValueError(
            f"{name} must have shape (n, *S), n samples of shape S with at least one number, got "
            f"{tuple(shape)}{hint}."
        )


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in REFERENCES:
        raise TypeError(
            f"{name} must be one of {', '.join(map(str, REFERENCES))}, got {dtype}; convert it, as "
            "by .float()."
        )
