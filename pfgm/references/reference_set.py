"""Reference sets: the references of the field as an object, in memory, in files or in processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from ..common.files import StrPath, write_atomic
from ..common.tensors import dequantise
from ..data.rows import DTYPES, InMemory, Source, open_source
from .measures import Measures, RowSums
from .part import Part, check_finite

__all__ = ["Measures", "ReferenceSet", "References", "measure"]


class ReferenceSet:
    """References (M, *S) that need not lie in memory: what every operation takes for a tensor.

    Over a set, :func:`pfgm.posterior_mean` and all that follows from it go through the rows in
    chunks of 32 MiB, from a file with the next chunk read ahead, and merge what they find exactly.
    The chunks do not depend on where the rows lie, and neither does any bit of the result. It is
    differentiable in the points, not in the references.

    Of a tensor on the CPU, with 512 values or more in a row, sums over the rows are kept from the
    second call on: for points in float32, in a third of the memory of rows of bytes and a twelfth
    of that of float32, and as much again for mirror images. Changes of the tensor are noticed,
    those made through its ``data`` are not.

    A gradient needs the rows as they were in the forward pass: ``backward`` raises a RuntimeError
    where a tensor was changed in place since, or a file was written to. Not noticed are changes of
    a tensor through its ``data``, of one made under ``torch.inference_mode``, of an array past
    torch, and of a file within the resolution of its time stamp or through a memory map that the
    system has not written out.

    Args:
        source: a tensor or array (M, *S); a memory map; a ``.npy``, ``.npz`` or ``.safetensors``
            file, read where it lies unless it is compressed; a folder of images of one size; or a
            :class:`torch.utils.data.Dataset` of samples, or of pairs of one and its label. uint8
            means u/127.5 − 1.
        flips: count the mirror image of each row (last axis reversed) too, as rows M to 2M − 1.
        labels: (M,) integers, where the source has none of its own.
        progress: show a progress bar while images or a dataset are read.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ImportError: images need Pillow.
        TypeError: numbers that are neither floating nor uint8.
        ValueError: a damaged file, no rows, values that are not finite, labels that do not fit.

    >>> import pfgm
    >>> references = ReferenceSet(torch.rand(1000, 3, 8, 8), flips=True)
    >>> len(references), tuple(references.shape[1:])
    (2000, (3, 8, 8))
    >>> pfgm.posterior_mean(torch.rand(4, 3, 8, 8), references, sigma=0.1).shape
    torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        source: Tensor | np.ndarray[Any, Any] | StrPath | Dataset[Any] | Source,
        *,
        flips: bool = False,
        labels: Tensor | None = None,
        progress: bool = False,
    ) -> None:
        opened = open_source(source, progress=progress)
        self._rows = len(opened)
        self._offset = 0  # number of this process's first row
        self._part = Part(opened, flips=bool(flips))
        self._labels = self._checked_labels(opened.labels if labels is None else labels)
        self._measured: tuple[object, Measures] | None = None

    def __len__(self) -> int:
        """The number of references, mirror images among them."""
        return self._rows * self._sides

    def __repr__(self) -> str:
        where = "file" if self._part.source.tensor is None else str(self.device)
        group, processes = self._part.group, self._part.processes
        part = f", rank {dist.get_rank(group)} of {processes}" if self.sharded else ""
        return f"ReferenceSet({tuple(self.shape)}, {self.dtype}, {where}{part})"

    @property
    def shape(self) -> torch.Size:
        """(M, *S)."""
        return torch.Size((len(self), *self._part.shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As the rows are stored."""
        return self._part.source.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are held; files are on the CPU."""
        return self._part.device

    @property
    def labels(self) -> Tensor | None:
        """(M,) int64 labels of the rows, mirror images among them, on the CPU; None if unknown."""
        if self._labels is None or not self._part.flips:
            return self._labels
        return self._labels.repeat(2)

    @property
    def _sides(self) -> int:
        return 2 if self._part.flips else 1

    @property
    def sharded(self) -> bool:
        """Whether other processes hold some of the rows."""
        return self._part.processes > 1

    # ---- rows ----

    @property
    def rows(self) -> Tensor:
        """Numbers of the rows that this process holds."""
        own = torch.arange(len(self._part)) + self._offset
        return torch.cat([own, own + self._rows]) if self._part.flips else own

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Some rows (k, *S), in the order of their numbers (k,), of a mask (M,) or of a slice.

        Raises:
            IndexError: a number is out of range, or that of a row which another process holds.
        """
        numbers = self._numbers(rows)
        mirrored = (numbers >= self._rows) & self._part.flips
        local = torch.where(mirrored, numbers - self._rows, numbers) - self._offset
        self._check_held("rows", numbers, local)
        taken = self._part.source.take(local + self._part.begin)
        if bool(mirrored.any()):
            mirrored = mirrored.to(taken.device)
            taken[mirrored] = taken[mirrored].flip(-1)
        return taken

    def _check_held(self, name: str, numbers: Tensor, local: Tensor) -> None:
        outside = (local < 0) | (local >= len(self._part))
        if bool(outside.any()):
            raise IndexError(
                f"{name} holds {int(numbers[outside][0])}, which this process has not; it has "
                f"{self._offset} to {self._offset + len(self._part) - 1}"
                + (f", and as many from {self._rows}." if self._part.flips else ".")
            )

    def _numbers(self, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, slice):
            return torch.from_numpy(np.arange(*rows.indices(len(self))))
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point():
            given = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows is {given}; allowed are a slice, numbers (k,) or a mask (M,).")
        if rows.dtype == torch.bool:
            if len(rows) != len(self):
                raise IndexError(f"rows has {len(rows)} truth values; allowed are {len(self)}.")
            return rows.cpu().nonzero().squeeze(1)
        return rows.cpu().long()

    def draw(
        self,
        count: int,
        *,
        containing: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Numbers (count,) of rows drawn without replacement: a reference batch.

        Args:
            count: how many; at most the rows that this process holds.
            containing: (k,) numbers of rows that are among them, those of the mini-batch: they come
                first.
            generator: of the draw.

        Raises:
            IndexError: containing has a number that is out of range.
            ValueError: count is out of range, or containing has a number twice.

        >>> references = ReferenceSet(torch.rand(1000, 2))
        >>> rows = references.draw(64, containing=torch.tensor([7, 3]))
        >>> rows[:2].tolist(), len(rows.unique())
        ([7, 3], 64)
        """
        chosen = torch.empty(0, dtype=torch.long) if containing is None else containing.cpu().long()
        held = len(self._part)
        if not len(chosen) <= count <= held * self._sides:
            raise ValueError(
                f"count is {count}; allowed is {len(chosen)} (the rows in containing) to "
                f"{held * self._sides} (the rows held)."
            )
        numbers, times = chosen.unique(return_counts=True)
        if bool((times > 1).any()):
            raise ValueError(
                f"containing holds {int(numbers[times > 1][0])} twice; each row is drawn once."
            )
        mirrored = (chosen >= self._rows) & self._part.flips
        local = torch.where(mirrored, chosen - self._rows, chosen) - self._offset
        self._check_held("containing", chosen, local)
        local = torch.where(mirrored, local + held, local)
        drawn = _without_replacement(local, count, held * self._sides, generator)
        return torch.where(drawn >= held, drawn - held + self._rows, drawn) + self._offset

    # ---- storage ----

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pin_memory: bool = False,
    ) -> ReferenceSet:
        """The same set with its rows (those of this process) held in memory.

        Args:
            device: where; on the CPU unless given, or where they are.
            dtype: torch.uint8 (for values in [−1, 1], rounded to the nearest of 256), bfloat16,
                float16, float32 or float64; as they are unless given.
            pin_memory: in page-locked memory, from which GPUs read faster.

        Raises:
            ValueError: another dtype, or values outside [−1, 1] for uint8.

        >>> ReferenceSet(torch.rand(10, 2)).to(dtype=torch.bfloat16).dtype
        torch.bfloat16
        """
        dtype = dtype or self.dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; allowed are {', '.join(map(str, DTYPES))}.")
        shape = (len(self._part), *self._part.shape)
        held = torch.empty(shape, dtype=dtype, device=device or self.device, pin_memory=pin_memory)
        for start, chunk in self._part.stored_chunks():
            converted = _converted(chunk, dtype)
            if converted is not chunk:
                check_finite(converted, start)  # a value may be too large for a narrower type
            held[start : start + len(chunk)] = converted
        moved = copy.copy(self)
        moved._part = Part(
            InMemory(held),
            flips=self._part.flips,
            group=self._part.group,
            processes=self._part.processes,
            finite=True,
        )
        return moved

    def flipped(self) -> ReferenceSet:
        """The same set with the mirror image of each row (last axis reversed) counted too."""
        both, part = copy.copy(self), self._part
        both._part = Part(
            part.source,
            part.begin,
            part.end,
            flips=True,
            group=part.group,
            processes=part.processes,
            finite=part.finite,
        )
        return both

    def save(self, path: StrPath) -> None:
        """Writes the rows, without mirror images, as a ``.npy`` file, whole or not at all.

        A folder of images saved once is read from the file from then on.

        Raises:
            OSError: the file cannot be written.
            ValueError: the rows are bfloat16, which NumPy has not, or in several processes.
        """
        if self.sharded or self.dtype == torch.bfloat16:
            raise ValueError(f"{self!r} cannot be saved: only whole sets that are not bfloat16.")
        like = torch.empty(0, dtype=self.dtype).numpy().dtype
        header = {
            "descr": np.lib.format.dtype_to_descr(like),
            "fortran_order": False,
            "shape": (self._rows, *self._part.shape),
        }

        def write(file: Any) -> None:
            np.lib.format.write_array_header_1_0(file, header)
            for _, chunk in self._part.stored_chunks():
                file.write(chunk.cpu().contiguous().numpy().data)

        write_atomic(path, write)

    def shard(self, group: dist.ProcessGroup | None = None) -> ReferenceSet:
        """This process's part of the set: all operations over it see the whole set all the same.

        Each process of the group holds as many rows as the others, one after the other, and calls
        every operation together with the others, each with points of its own, and backward
        too. Points are gathered, each process computes what its rows say, and one reduction as
        large as the points merges that exactly. ``to`` then brings only this part into memory.

        Args:
            group: of processes; all unless given.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: the set is a part already, or has fewer rows than there are processes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised; call init_process_group.")
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if self.sharded or rank < 0 or self._rows < size:
            raise ValueError(
                f"{self!r} cannot be sharded over {size} processes; allowed are whole sets with at "
                "least a row for each, in the processes of the group."
            )
        begin, end = (self._rows * k // size for k in (rank, rank + 1))
        part = copy.copy(self)
        part._offset = begin
        part._part = Part(
            self._part.source,
            begin,
            end,
            flips=self._part.flips,
            group=group,
            processes=size,
            finite=self._part.finite,
        )
        return part

    # ---- going through all rows ----

    @property
    def norm(self) -> float:
        """Average norm of the rows, found once: the data_norm of :class:`pfgm.PoissonFlow`."""
        return self.measures.norm

    @property
    def rms(self) -> float:
        """Root mean square of the values, found once."""
        return self.measures.rms

    @property
    def measures(self) -> Measures:
        """What is measured of all rows in one pass, and kept for as long as they stay."""
        version = self._part.source.version()
        if self._measured is None or self._measured[0] != version:
            sums = RowSums(math.prod(self._part.shape))
            for _, chunk in self._part.stored_chunks():
                sums.add(chunk)
            if self.sharded:
                sums.gather(self._part.group, self._part.processes)
            self._measured = version, sums.measures(self._part.shape)
        found = self._measured[1]
        return found.mirrored() if self._part.flips and found.mean.ndim > 0 else found

    def chunks(self, device: torch.device | str | None = None) -> Iterator[Tensor]:
        """The rows of this process and their mirror images in chunks (m, *S), on a device.

        A chunk is valid until the next one is asked for. Going through a file reads ahead.

        Raises:
            OSError: a file can no longer be read.
            ValueError: values that are not finite.
        """
        return self._part.chunks(device)

    @property
    def part(self) -> Part:
        """The rows that this process holds, for :mod:`pfgm.references.posterior_mean`."""
        return self._part

    def _checked_labels(self, labels: Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        if labels.shape != (self._rows,) or labels.is_floating_point():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; allowed are "
                f"integers of shape ({self._rows},)."
            )
        return labels.cpu().long()


References = Tensor | ReferenceSet
"""What every operation takes for references."""


def measure(data: References) -> Measures:
    """Measures the rows of data (M, *S), a tensor on any device or a set."""
    if isinstance(data, ReferenceSet):
        return data.measures
    sums = RowSums(math.prod(data.shape[1:]))
    sums.add(data)
    return sums.measures(tuple(data.shape[1:]))


def _converted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if rows.dtype == dtype:
        return rows
    if dtype != torch.uint8:
        return (dequantise(rows, torch.float32) if rows.dtype == torch.uint8 else rows).to(dtype)
    if bool((rows.abs() > 1).any()):
        raise ValueError(
            f"dtype is torch.uint8, but the largest value is {float(rows.abs().max()):.4g}; "
            "allowed are values in [-1, 1]."
        )
    return ((rows.float() + 1) * 127.5).round().to(torch.uint8)


def _without_replacement(
    chosen: Tensor, count: int, rows: int, generator: torch.Generator | None
) -> Tensor:
    """Chosen numbers, then others below rows, count in all and none twice."""
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
    """Values without repetitions, in the order in which they first come."""
    order = values.argsort(stable=True)
    ordered = values[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return values[order[first].sort().values]
