"""Reference sets: the charges of the field as an object, in memory, in files or in processes."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from .. import ops
from ..common.checks import first_bad_row
from ..common.files import StrPath, write_atomic
from ..common.tensors import dequantise
from ..data.opening import open_source
from ..data.rows import DTYPES, InMemory, Source
from .merging import Parts
from .ranks import Ranks, total

__all__ = ["Measures", "ReferenceSet", "References", "measure"]

_CHUNK = 32 << 20  # bytes of rows that are computed together
_CPU = torch.device("cpu")


class Measures(NamedTuple):
    """What is measured of the rows of data (M, *S), in float64."""

    norm: float
    """Average of ‖x‖."""
    rms: float
    """Root mean square of the values."""
    mean: Tensor
    """Average row, *S."""
    std: float
    """Root mean square of the values of x − mean."""
    least: Tensor
    """Smallest of each value, *S."""
    most: Tensor
    """Largest of each value, *S."""
    fills_unit: bool
    """Whether all values lie in [−1, 1] and come within 0.01 of both ends, as those of images."""

    @property
    def reach(self) -> float:
        """A distance from mean within which all rows lie."""
        return float(torch.maximum(self.most - self.mean, self.mean - self.least).norm())

    def mirrored(self) -> Measures:
        """The same of the rows together with their mirror images (last axis reversed)."""
        mean = (self.mean + self.mean.flip(-1)) / 2
        apart = float((self.mean - mean).square().mean())
        return self._replace(
            mean=mean,
            std=math.sqrt(self.std**2 + apart),
            least=torch.minimum(self.least, self.least.flip(-1)),
            most=torch.maximum(self.most, self.most.flip(-1)),
        )


class _Sums:
    """Sums over rows, from which :class:`Measures` follow; they add up over processes.

    Deviations are from a row of the data: squares of values far from 0 hold no digits of them.
    """

    def __init__(self, features: int) -> None:
        # Rows, norms, squares, values outside, near −1 and near 1, squared deviations.
        self.counts = torch.zeros(7, dtype=torch.float64)
        self.deviations = torch.zeros(features, dtype=torch.float64)
        self.origin: Tensor | None = None
        self.extremes = torch.full((2, features), math.inf, dtype=torch.float64)  # least, −most

    def add(self, chunk: Tensor) -> None:
        """Adds rows (m, *S), uint8 meaning u/127.5 − 1."""
        for rows in chunk.reshape(len(chunk), -1).split(1024):
            wide = (dequantise(rows, torch.float32) if rows.dtype == torch.uint8 else rows).double()
            if self.origin is None:
                self.origin = wide[0].cpu()
            apart = wide - self.origin.to(wide.device)
            squared = wide.square().sum(1)
            counts = [wide.abs() > 1, wide <= -0.99, wide >= 0.99]
            sums = [squared.sqrt().sum(), squared.sum(), *(each.sum() for each in counts)]
            sums.append(apart.square().sum())
            self.counts[1:] += torch.stack([each.double() for each in sums]).cpu()
            self.counts[0] += len(rows)
            self.deviations += apart.sum(0).cpu()
            found = torch.stack([wide.amin(0), -wide.amax(0)]).cpu()
            self.extremes = torch.minimum(self.extremes, found)

    def gather(self, group: dist.ProcessGroup | None, processes: int) -> None:
        """The sums over all processes of a group."""
        assert self.origin is not None
        origin = total(self.origin, group) / processes
        apart, rows = self.origin - origin, float(self.counts[0])
        self.counts[6] += 2 * float(self.deviations @ apart) + rows * float(apart.square().sum())
        self.deviations += rows * apart
        self.counts, self.deviations = total(self.counts, group), total(self.deviations, group)
        self.extremes = total(self.extremes, group, dist.ReduceOp.MIN)
        self.origin = origin

    def measures(self, shape: tuple[int, ...]) -> Measures:
        assert self.origin is not None
        count, norms, squares, outside, low, high, deviations = self.counts.tolist()
        average, values = self.deviations / count, max(math.prod(shape), 1)
        variance = deviations / (count * values) - float(average.square().sum()) / values
        return Measures(
            norm=norms / count,
            rms=math.sqrt(squares / (count * values)),
            mean=(self.origin + average).view(shape),
            std=math.sqrt(max(variance, 0.0)),
            least=self.extremes[0].view(shape),
            most=-self.extremes[1].view(shape),
            fills_unit=outside == 0 and low > 0 and high > 0,
        )


def measure(data: References) -> Measures:
    """Measures the rows of data (M, *S), a tensor on any device or a set."""
    if isinstance(data, ReferenceSet):
        return data.measures
    sums = _Sums(math.prod(data.shape[1:]))
    sums.add(data)
    return sums.measures(tuple(data.shape[1:]))


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
        self._source: Source = open_source(source, progress=progress)
        # The rows of the source that are this process's, and the number of the first among all.
        self._begin, self._end, self._offset = 0, len(self._source), 0
        self._rows = len(self._source)
        self._group: dist.ProcessGroup | None = None
        self._processes = 1
        self._flips = bool(flips)
        self._labels = self._checked_labels(self._source.labels if labels is None else labels)
        self._spare: list[tuple[Tensor, Tensor]] = []
        self._sketches: dict[int, tuple[tuple[int, int], Tensor | None]] = {}
        self._measured: tuple[object, Measures] | None = None
        self._known_finite = not self._source.dtype.is_floating_point
        if (held := self._source.tensor) is not None and not self._known_finite:
            _check_finite(held, 0)
            self._known_finite = True

    def __len__(self) -> int:
        """The number of references, mirror images among them."""
        return self._rows * (2 if self._flips else 1)

    def __repr__(self) -> str:
        where = "file" if self._source.tensor is None else str(self.device)
        part = f", rank {dist.get_rank(self._group)} of {self._processes}" if self.sharded else ""
        return f"ReferenceSet({tuple(self.shape)}, {self.dtype}, {where}{part})"

    @property
    def shape(self) -> torch.Size:
        """(M, *S)."""
        return torch.Size((len(self), *self._source.shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As the rows are stored."""
        return self._source.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are held; files are on the CPU."""
        held = self._source.tensor
        return torch.device("cpu") if held is None else held.device

    @property
    def labels(self) -> Tensor | None:
        """(M,) int64 labels of the rows, mirror images among them, on the CPU; None if unknown."""
        if self._labels is None or not self._flips:
            return self._labels
        return self._labels.repeat(2)

    @property
    def sharded(self) -> bool:
        """Whether other processes hold some of the rows."""
        return self._processes > 1

    # ---- rows ----

    @property
    def rows(self) -> Tensor:
        """Numbers of the rows that this process holds."""
        own = torch.arange(self._end - self._begin) + self._offset
        return torch.cat([own, own + self._rows]) if self._flips else own

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Some rows (k, *S), in the order of their numbers (k,), of a mask (M,) or of a slice.

        Raises:
            IndexError: a number is out of range, or that of a row which another process holds.
        """
        numbers = self._numbers(rows)
        mirrored = (numbers >= self._rows) & self._flips
        local = torch.where(mirrored, numbers - self._rows, numbers) - self._offset
        self._check_held("rows", numbers, local)
        taken = self._source.take(local + self._begin)
        if bool(mirrored.any()):
            mirrored = mirrored.to(taken.device)
            taken[mirrored] = taken[mirrored].flip(-1)
        return taken

    def _check_held(self, name: str, numbers: Tensor, local: Tensor) -> None:
        outside = (local < 0) | (local >= self._end - self._begin)
        if bool(outside.any()):
            raise IndexError(
                f"{name} holds {int(numbers[outside][0])}, which this process has not; it has "
                f"{self._offset} to {self._offset + self._end - self._begin - 1}"
                + (f", and as many from {self._rows}." if self._flips else ".")
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
        held = self._end - self._begin
        sides = 2 if self._flips else 1
        if not len(chosen) <= count <= held * sides:
            raise ValueError(
                f"count is {count}; allowed is {len(chosen)} (the rows in containing) to "
                f"{held * sides} (the rows held)."
            )
        numbers, times = chosen.unique(return_counts=True)
        if bool((times > 1).any()):
            raise ValueError(
                f"containing holds {int(numbers[times > 1][0])} twice; each row is drawn once."
            )
        mirrored = (chosen >= self._rows) & self._flips
        local = torch.where(mirrored, chosen - self._rows, chosen) - self._offset
        self._check_held("containing", chosen, local)
        local = torch.where(mirrored, local + held, local)
        drawn = _without_replacement(local, count, held * sides, generator)
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
        count = self._end - self._begin
        shape = (count, *self._source.shape)
        held = torch.empty(shape, dtype=dtype, device=device or self.device, pin_memory=pin_memory)
        for start, chunk in self._local_chunks():
            converted = _converted(chunk, dtype)
            if converted is not chunk:
                _check_finite(converted, start)  # what was too large for a narrower type
            held[start : start + len(chunk)] = converted
        moved = copy.copy(self)
        moved._source, moved._begin, moved._end = InMemory(held), 0, count
        moved._spare, moved._sketches, moved._known_finite = [], {}, True
        return moved

    def flipped(self) -> ReferenceSet:
        """The same set with the mirror image of each row (last axis reversed) counted too."""
        both = copy.copy(self)
        both._flips, both._spare, both._sketches = True, [], {}
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
            "shape": (self._rows, *self._source.shape),
        }

        def write(file: Any) -> None:
            np.lib.format.write_array_header_1_0(file, header)
            for _, chunk in self._local_chunks():
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
        part = copy.copy(self)
        part._group, part._processes, part._spare, part._sketches = group, size, [], {}
        part._begin, part._end = (self._rows * k // size for k in (rank, rank + 1))
        part._offset = part._begin
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
        version = self._source.version()
        if self._measured is None or self._measured[0] != version:
            sums = _Sums(math.prod(self._source.shape))
            for _, chunk in self._local_chunks():
                sums.add(chunk)
            if self.sharded:
                sums.gather(self._group, self._processes)
            self._measured = version, sums.measures(self._source.shape)
        found = self._measured[1]
        return found.mirrored() if self._flips and found.mean.ndim > 0 else found

    def chunks(self, device: torch.device | str | None = None) -> Iterator[Tensor]:
        """The rows of this process and their mirror images in chunks (m, *S), on a device.

        A chunk is valid until the next one is asked for. Going through a file reads ahead.

        Raises:
            OSError: a file can no longer be read.
            ValueError: values that are not finite.
        """
        for _, chunk in self._local_chunks():
            chunk = chunk.to(device or self.device, non_blocking=True)
            yield chunk
            if self._flips:
                yield chunk.flip(-1)

    @property
    def _chunk_rows(self) -> int:
        size = torch.empty(0, dtype=self.dtype).element_size()
        return max(_CHUNK // max(size * math.prod(self._source.shape), 1), 1)

    @property
    def parts(self) -> Parts:
        """What :mod:`pfgm.references.merging` needs to know."""
        exchange = functools.partial(Ranks, self._group) if self.sharded else None
        # Of a file nothing is kept: what is, lies in memory.
        sketch = None if self._source.tensor is None else self._sketch
        return Parts(self.chunks, exchange, sketch, self._version)

    def _version(self) -> object:
        # A graph saves the rows for its backward pass, which checks them as it does any tensor.
        return None if torch.compiler.is_compiling() else self._source.version()

    def _sketch(self, place: int, chunk: Tensor, x: Tensor, backend: str | None) -> Tensor | None:
        """What the kernels can use again of a chunk, found once for as long as the rows stay.

        The second time they are seen, as it takes longer than a few points.
        """
        held = self._source.tensor
        if held is None or x.dtype != torch.float32 or not held.device == x.device == _CPU:
            return None
        # A graph holds no dictionary, and of these rows nobody knows when they change.
        if torch.compiler.is_compiling() or held.is_inference() or _belongs_to_others(held):
            return None
        state = id(held), held._version
        known, kept = self._sketches.get(place, (None, None))
        if known != state or kept is None:
            kept = ops.sketch(chunk, x, backend) if known == state else None
            self._sketches[place] = state, kept
        return kept

    def _local_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Chunks of this process's rows where they are held, and the place of their first row."""
        starts = range(self._begin, self._end, self._chunk_rows)
        read: Iterator[Tensor]
        if self._source.tensor is not None:
            read = (self._source.read(a, min(a + self._chunk_rows, self._end)) for a in starts)
        else:
            read = self._read_ahead(starts)
        for start, chunk in zip(starts, read, strict=True):
            if not self._known_finite:
                _check_finite(chunk, start)
            yield start - self._begin, chunk
        self._known_finite = True

    def _read_ahead(self, starts: range) -> Iterator[Tensor]:
        """Reads into one of two buffers while the caller works on the other."""
        size = (self._chunk_rows, *self._source.shape)
        # Kept for the next time; two threads that go through the set at once have their own.
        try:
            buffers = self._spare.pop()
        except IndexError:
            buffers = torch.empty(size, dtype=self.dtype), torch.empty(size, dtype=self.dtype)

        def read(place: int) -> Tensor:
            start = starts[place]
            stop = min(start + self._chunk_rows, self._end)
            return self._source.read(start, stop, buffers[place % 2])

        with ThreadPoolExecutor(1, "pfgm-read-ahead") as reader:
            coming = reader.submit(read, 0)
            for place in range(len(starts)):
                chunk = coming.result()
                if place + 1 < len(starts):
                    coming = reader.submit(read, place + 1)
                yield chunk
        self._spare.append(buffers)

    def _checked_labels(self, labels: Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        if labels.shape != (self._rows,) or labels.is_floating_point():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; allowed are "
                f"integers of shape ({self._rows},)."
            )
        return labels.cpu().long()


def _belongs_to_others(held: Tensor) -> bool:
    """Whether its memory is that of an array, which may be written to past torch."""
    return not held.untyped_storage().resizable()


References = Tensor | ReferenceSet
"""What every operation takes for references."""


def _check_finite(rows: Tensor, start: int) -> None:
    if (bad := first_bad_row(rows)) is not None:
        raise ValueError(
            f"references holds NaN or infinity (first in row {start + bad}); only finite values "
            "are allowed."
        )


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
