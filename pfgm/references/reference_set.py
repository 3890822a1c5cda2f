"""The class ReferenceSet: references in memory, in a file or divided among processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..common.devices import known_device
from ..common.dtypes import REFERENCES
from ..common.files import StrPath, write_atomic
from ..common.numbers import whole
from ..common.tensors import as_labels, dequantise
from ..common.values import check_finite
from ..data.opened import Data
from ..data.opening import Samples
from ..data.opening import open as open_data
from ..data.rows import InMemory
from .measures import Measures, RowSums
from .part import Part


class ReferenceSet:
    """References (M, *S) in memory or in a file. Every operation takes a set in place of a tensor.

    Operations read the rows in chunks of 32 MiB and merge the results exactly. A file is read one
    chunk ahead, and on the CPU twice with ``flips``. Results are the same to the bit in memory and
    from a file. They are differentiable in the points, not in the references. A function under
    ``torch.compile`` that wants a gradient or reads a file falls into graphs around the
    operation, so it cannot have ``fullgraph=True``; with rows in memory and no gradient, or with a
    tensor as references, it can.

    For rows of 512 or more values in CPU memory, a summary of each (a sketch) is kept from the
    second call on. It speeds up calls with points in float32, and takes a third of the memory of
    uint8 rows, up to a quarter of that of float32 rows, and up to half of that of 16-bit rows.

    Rows that have changed get new sketches, and ``backward`` raises RuntimeError if they changed
    after the forward pass. torch does not count changes through a tensor's ``data``, its storage,
    NumPy, DLPack or ``torch.distributed.broadcast``, nor any of a tensor made under
    ``torch.inference_mode``. The extension notices them in contiguous rows in CPU memory: all in up
    to 16 KiB, and in more where they concern a tenth of the rows. Not noticed is a change of a few
    values in more, nor one of a file within the resolution of its time stamp, or through a memory
    map that is not written to the disk yet. After such a change call
    ``torch.autograd.graph.increment_version(tensor)``; for an array make a new set.

    Args:
        data: all that :func:`pfgm.data.open` opens, or what it returns: a tensor or array
            (M, *S), a memory map, a file that is read in place, a folder of images, a dataset of
            torch, a name. uint8 means u/127.5 − 1. A table must be opened, as samples are decoded
            with it.
        flips: add the mirror image of each row (last axis reversed), as rows M to 2M − 1. It is
            for images (M, C, H, W) or (M, H, W); the columns of a table would change their order.
        labels: (M,) integers, for data without labels. Operations use the labels of a set where
            they are given ``labels`` for their points.
        progress: whether to show a progress bar while images or a dataset are read. None shows one
            for more than 2000, in a terminal.

    Attributes:
        names: the names of the labels, by label; empty where they have none.
        table: the columns of a table that was opened; None for other data.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ImportError: Pillow, which images need, is missing.
        TypeError: the dtype is neither floating point nor uint8.
        ValueError: the file is damaged, there are no rows, a value is not finite, or labels do not
            fit.

    >>> import pfgm
    >>> references = ReferenceSet(torch.rand(1000, 3, 8, 8), flips=True)
    >>> len(references), tuple(references.shape[1:])
    (2000, (3, 8, 8))
    >>> pfgm.posterior_mean(torch.rand(4, 3, 8, 8), references, sigma=0.1).shape
    torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        data: Samples,
        *,
        flips: bool = False,
        labels: Tensor | None = None,
        progress: bool | None = None,
    ) -> None:
        opened = open_data(data, progress=progress)
        if opened.table is not None and not isinstance(data, Data):
            raise ValueError(
                "data must not be a table, whose columns are standardised; give what "
                "pfgm.data.open makes of it, whose table decodes samples, or an array of its "
                "numbers, as pandas.read_csv(…).to_numpy()."
            )
        self._rows = len(opened.samples)
        self._offset = 0  # number of the first row in part
        self.part = Part(opened.samples, flips=bool(flips))
        self._labels = self._checked_labels(opened.labels if labels is None else labels)
        self.names, self.table = opened.names if labels is None else (), opened.table
        self._measured: tuple[object, Measures] | None = None

    def __len__(self) -> int:
        """The number of references, including mirror images."""
        return self._rows * self._sides

    def __repr__(self) -> str:
        where = "file" if self.part.source.tensor is None else str(self.device)
        rank = ""
        if self.sharded:
            rank = f", rank {dist.get_rank(self.part.group)} of {self.part.processes}"
        return f"ReferenceSet({tuple(self.shape)}, {self.dtype}, {where}{rank})"

    @property
    def shape(self) -> torch.Size:
        """(M, *S)."""
        return torch.Size((len(self), *self.part.shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored rows."""
        return self.part.source.dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows; the CPU for a file."""
        return self.part.device

    @property
    def labels(self) -> Tensor | None:
        """(M,) int64 on the CPU, including mirror images; None if unknown."""
        if self._labels is None or not self.part.flips:
            return self._labels
        return self._labels.repeat(2)

    @property
    def _sides(self) -> int:
        return 2 if self.part.flips else 1

    @property
    def sharded(self) -> bool:
        """Whether other processes hold some of the rows."""
        return self.part.processes > 1

    @property
    def rows(self) -> Tensor:
        """Numbers of the rows that this process holds."""
        own = torch.arange(len(self.part), device="cpu") + self._offset
        return torch.cat([own, own + self._rows]) if self.part.flips else own

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Rows (k, *S) by their numbers (k,), in that order, by a mask (M,) or by a slice.

        Raises:
            IndexError: a number is out of range, or another process holds that row.
            TypeError: rows is none of these.
        """
        local, mirrored = self._local("rows", self._numbers(rows))
        taken = self.part.source.take(local + self.part.begin)
        if bool(mirrored.any()):
            mirrored = mirrored.to(taken.device)
            taken[mirrored] = taken[mirrored].flip(-1)
        return taken

    def _local(self, name: str, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The places of rows in the part of this process, and which of them are mirror images."""
        mirrored = (numbers >= self._rows) & self.part.flips
        local = torch.where(mirrored, numbers - self._rows, numbers) - self._offset
        outside = (local < 0) | (local >= len(self.part))
        if bool(outside.any()):
            first, last = self._offset, self._offset + len(self.part) - 1
            raise IndexError(
                f"{name} must be from {first} to {last}"
                + (f", or these plus {self._rows}" if self.part.flips else "")
                + (", the rows that this process holds" if self.sharded else "")
                + f", got {int(numbers[outside][0])}."
            )
        return local, mirrored

    def _numbers(self, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, slice):
            return torch.from_numpy(np.arange(*rows.indices(len(self))))
        if isinstance(rows, Tensor) and rows.ndim == 1 and rows.dtype == torch.bool:
            if len(rows) != len(self):
                raise IndexError(f"rows must have {len(self)} truth values, got {len(rows)}.")
            return rows.cpu().nonzero().squeeze(1)
        return _row_numbers("rows", rows, " a slice such as [2:3], a mask (M,) of torch.bool, or")

    def draw(
        self,
        count: int,
        *,
        containing: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws the row numbers (count,) of a reference batch without replacement.

        Args:
            count: how many; at most the number of rows that this process holds.
            containing: (k,) row numbers that the result starts with, those of the mini-batch.
            generator: generator of the random numbers.

        Raises:
            IndexError: a number in containing is out of range.
            TypeError: containing does not hold integers.
            ValueError: count is out of range, or containing has a number twice.

        >>> references = ReferenceSet(torch.rand(1000, 2))
        >>> rows = references.draw(64, containing=torch.tensor([7, 3]))
        >>> rows[:2].tolist(), len(rows.unique())
        ([7, 3], 64)
        """
        if containing is None or (isinstance(containing, Tensor) and containing.shape == (0,)):
            # torch.tensor([]) is float32.
            containing = torch.empty(0, dtype=torch.long, device="cpu")
        chosen = _row_numbers("containing", containing)
        held = len(self.part)
        whole("count", count, len(chosen), held * self._sides)
        numbers, times = chosen.unique(return_counts=True)
        if bool((times > 1).any()):
            raise ValueError(
                f"containing must hold each row once, got {int(numbers[times > 1][0])} twice."
            )
        local, mirrored = self._local("containing", chosen)
        local = torch.where(mirrored, local + held, local)
        drawn = _draw_numbers(local, count, held * self._sides, generator)
        return torch.where(drawn >= held, drawn - held + self._rows, drawn) + self._offset

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pin_memory: bool = False,
    ) -> ReferenceSet:
        """A set with the same rows in memory. A shard loads the rows of this process only.

        Args:
            device: where the rows are held; None keeps the device, and loads a file to the CPU.
            dtype: torch.uint8 (for values in [−1, 1], rounded to 256 levels), bfloat16, float16,
                float32 or float64; None keeps the dtype.
            pin_memory: use page-locked memory, which GPUs read faster. As in torch, do not
                change rows before the GPU has read them.

        Raises:
            ValueError: there is no such device; the dtype is not allowed, or is uint8 and a value
                is outside [−1, 1].

        >>> ReferenceSet(torch.rand(10, 2)).to(dtype=torch.bfloat16).dtype
        torch.bfloat16
        """
        dtype = dtype or self.dtype
        if dtype not in REFERENCES:
            raise ValueError(
                f"dtype must be one of {', '.join(map(str, REFERENCES))}, got {dtype}."
            )
        device = self.device if device is None else known_device(device)
        shape = (len(self.part), *self.part.shape)
        held = torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory)
        for start, chunk in self.part.stored_chunks():
            converted = _converted(chunk, dtype)
            if converted is not chunk:
                check_finite("data", chunk, self.part.begin + start)
                if not bool(converted.isfinite().all()):
                    largest = float(chunk.abs().max())
                    raise ValueError(
                        f"dtype must be one that holds values up to {largest:.4g}, got {dtype}; "
                        "torch.bfloat16 and torch.float32 hold more."
                    )
            held[start : start + len(chunk)] = converted
        moved = copy.copy(self)
        moved.part = replace(self.part, source=InMemory(held), begin=0, end=len(held), finite=True)
        return moved

    def flipped(self) -> ReferenceSet:
        """The set with the mirror image (last axis reversed) of each row added."""
        both = copy.copy(self)
        both.part = replace(self.part, flips=True)
        return both

    def save(self, path: StrPath) -> None:
        """Writes the rows, without mirror images, to a ``.npy`` file.

        A reference set can read this file without loading it; grey bytes (n, H, W) get a channel
        then, unless it is opened with ``layout="as-is"``. If writing fails, an existing file is
        left as it was.

        Raises:
            OSError: the file cannot be written.
            ValueError: the rows are bfloat16, which NumPy does not have, or have no dimension, or
                the set is a shard.
        """
        if self.sharded or self.dtype == torch.bfloat16 or self.ndim < 2:
            raise ValueError(
                "only rows (k, …) that are neither a shard nor bfloat16 can be saved, got "
                f"{self!r}."
            )
        like = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        header = {
            "descr": np.lib.format.dtype_to_descr(like),
            "fortran_order": False,
            "shape": (self._rows, *self.part.shape),
        }

        def write(file: Any) -> None:
            np.lib.format.write_array_header_1_0(file, header)
            for _, chunk in self.part.stored_chunks():
                file.write(chunk.cpu().contiguous().numpy().data)

        write_atomic(path, write)

    def shard(self, group: dist.ProcessGroup | None = None) -> ReferenceSet:
        """The set with its rows divided among processes. Results are still over all rows.

        Each process of the group holds about the same number of consecutive rows. All processes
        must call every operation together, also backward, each with its own points. The points are
        gathered, and each process computes over its own rows. One reduction of the size of the
        points merges the results exactly. :meth:`to` loads only the rows of this process.

        Args:
            group: the processes; None means all.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: the set is a shard already, or has fewer rows than there are processes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised; call init_process_group.")
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if self.sharded or rank < 0 or self._rows < size:
            raise ValueError(
                f"{self!r} cannot be sharded over {size} processes; it must have a row or more for "
                "each process and not be a shard, and this process must be in the group."
            )
        begin, end = (self._rows * k // size for k in (rank, rank + 1))
        shard = copy.copy(self)
        shard._offset = begin
        shard.part = replace(self.part, begin=begin, end=end, group=group, processes=size)
        return shard

    @property
    def norm(self) -> float:
        """Average norm of the rows: the data_norm of :class:`pfgm.PoissonFlow`."""
        return self.measures.norm

    @property
    def rms(self) -> float:
        """Root mean square of the values."""
        return self.measures.rms

    @property
    def measures(self) -> Measures:
        """Statistics over all rows, computed in one pass and kept until the rows change."""
        version = self.part.version()
        if self._measured is None or version is None or self._measured[0] != version:
            sums = RowSums(math.prod(self.part.shape))
            for _, chunk in self.part.stored_chunks():
                sums.add(chunk)
            if self.sharded:
                sums.gather(self.part.group, self.part.processes)
            self._measured = version, sums.measures(self.part.shape)
        measures = self._measured[1]
        return measures.mirrored() if self.part.flips else measures

    def chunks(self, device: torch.device | str | None = None) -> Iterator[Tensor]:
        """Yields the rows of this process and their mirror images in chunks (m, *S) on a device.

        A chunk is valid until the next one is asked for. From a file, the next chunk is read ahead.
        """
        return self.part.chunks(device)

    def _checked_labels(self, labels: Tensor | None) -> Tensor | None:
        return None if labels is None else as_labels("labels", labels, self._rows).cpu()


References = Tensor | ReferenceSet
"""The types that every operation accepts as references."""


def as_references(data: Samples | ReferenceSet, *, progress: bool | None = None) -> References:
    """Data (n, *S): a tensor or a set as it is, anything else as a set."""
    if isinstance(data, (Tensor, ReferenceSet)):
        return data
    return ReferenceSet(data, progress=progress)


def _converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if rows.dtype == dtype:
        return rows
    if dtype != torch.uint8:
        if rows.dtype == torch.uint8:
            rows = dequantise(rows, torch.promote_types(dtype, torch.float32))
        return rows.to(dtype)
    if bool((rows.abs() > 1).any()):
        raise ValueError(
            "references must be in [-1, 1] for dtype torch.uint8, got "
            f"{float(rows.abs().max()):.4g}."
        )
    return ((rows.float() + 1) * 127.5).round().to(torch.uint8)


def _row_numbers(name: str, rows: object, others: str = "") -> Tensor:
    """The row numbers (k,) as int64 on the CPU. The error names ``others`` too."""
    uint8 = isinstance(rows, Tensor) and rows.dtype == torch.uint8
    integers = isinstance(rows, Tensor) and not (
        rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool or uint8
    )
    if not isinstance(rows, Tensor) or rows.ndim != 1 or not integers:
        kind = (
            f"a tensor of {rows.dtype} of shape {tuple(rows.shape)}"
            if isinstance(rows, Tensor)
            else type(rows).__name__
        )
        raise TypeError(
            f"{name} must be{others} a tensor (k,) of row numbers in torch.int64, int32, int16 or "
            f"int8, such as torch.tensor([0, 2]), got {kind}."
            + (" torch takes uint8 for a mask." if uint8 else "")
        )
    return rows.cpu().long()


def _draw_numbers(
    chosen: Tensor, count: int, rows: int, generator: torch.Generator | None
) -> Tensor:
    """Draws numbers (count,) from 0 to rows - 1 without repetition. The chosen ones come first."""
    device = "cpu" if generator is None else generator.device
    if 2 * count > rows:
        order = torch.randperm(rows, generator=generator, device=device).cpu()
        return torch.cat([chosen, order[~torch.isin(order, chosen)]])[:count]
    drawn = chosen
    while len(drawn) < count:
        more = torch.randint(rows, (2 * count,), generator=generator, device=device).cpu()
        drawn = _first_of_each(torch.cat([drawn, more]))
    return drawn[:count]


def _first_of_each(values: Tensor) -> Tensor:
    """Values without repetition, in the order of their first occurrence."""
    order = values.argsort(stable=True)
    ordered = values[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return values[order[first].sort().values]
