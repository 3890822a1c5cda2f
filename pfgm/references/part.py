"""The rows of a reference set that one process holds, read in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import native_calls, native_parts
from ..common.tensors import flat_rows
from ..common.values import check_finite
from ..data.rows import Source
from ..ops import posterior_mean
from .ranks import Ranks

_CHUNK_BYTES = 32 << 20  # of rows that are computed together
_CPU = torch.device("cpu")


@dataclass(eq=False)
class Part:
    """Rows begin to end - 1 of a source, and with flips their mirror images (last axis reversed).

    Raises:
        ValueError: rows in memory are not finite. Rows in a file are checked when they are read.
    """

    source: Source
    begin: int = 0
    end: int = -1
    """A negative number means the number of rows in the source."""
    flips: bool = False
    group: dist.ProcessGroup | None = None
    """The processes that hold the other rows."""
    processes: int = 1
    """Processes in the group; 1 where this process holds all rows."""
    finite: bool = False
    """Whether all values are known to be finite."""
    chunk_rows: int = field(init=False)
    """Rows in a chunk."""
    _one_chunk: bool = field(init=False)
    """Whether the rows are in memory, and the CPU kernels give the same bits for all rows at once
    as chunk by chunk."""
    _buffers: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)
    _seen: dict[int, tuple[int, int, int]] = field(init=False, default_factory=dict)
    """First row of a chunk → what shows that it is unchanged."""
    _sketches: dict[int, tuple[tuple[int, int, int], Tensor | None]] = field(
        init=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if self.flips and not self.shape:
            raise ValueError(
                "flips must be False for rows of shape (), which have no mirror images."
            )
        if self.end < 0:
            self.end = len(self.source)
        N, dtype = math.prod(self.shape), self.source.dtype
        step = native_parts.kernel_chunk_rows(N, dtype)
        fitting = max(_CHUNK_BYTES // (N * dtype.itemsize), 1)
        self.chunk_rows = fitting // step * step or fitting
        same_bits = self.chunk_rows % step == 0 or len(self) <= self.chunk_rows
        held = self.source.tensor
        self._one_chunk = same_bits and held is not None and held.is_contiguous()
        if not self.source.dtype.is_floating_point:
            self.finite = True
        if self.source.tensor is not None and not self.finite:
            check_finite("data", self.source.tensor)
            self.finite = True

    def __len__(self) -> int:
        """The number of rows, without mirror images."""
        return self.end - self.begin

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row, *S."""
        return self.source.row_shape

    @property
    def device(self) -> torch.device:
        """The device of the rows; the CPU for a file."""
        held = self.source.tensor
        return _CPU if held is None else held.device

    def ranks(self, x: Tensor) -> Ranks | None:
        """The communication between processes for points x (B, N); None if there is one process."""
        return Ranks(self.group, x) if self.processes > 1 else None

    def version(self) -> object:
        """A value that changes when the rows change in place.

        A change that torch does not count shows in a sample of rows in the CPU's memory.
        """
        # A compiled graph saves the rows for its backward pass and checks their version itself.
        if torch.compiler.is_compiling():
            return None
        held = self.source.tensor
        return self.source.version(), 0 if held is None else native_calls.sample(held)

    def as_tensor(self) -> Tensor | None:
        """All references (M, *S) as one tensor for the CPU kernels; None if they need chunks."""
        all_references = len(self) == len(self.source) and not self.flips and self.processes == 1
        return self.source.tensor if self._one_chunk and all_references else None

    def large_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`stored_chunks`, but rows in memory in one chunk if results keep their bits."""
        if self._one_chunk:
            yield 0, self.source.read(self.begin, self.end)
        else:
            yield from self.stored_chunks()

    def sketch(self, start: int, chunk: Tensor, x: Tensor, backend: str | None) -> Tensor | None:
        """The backend's sketch of a chunk (m, *S), kept while the rows stay the same.

        The first call returns None, and the second makes the sketch. For a single call with few
        points the sketch would cost more time than it saves. Files have no sketches, because these
        take memory.

        Args:
            start: number of the first row of the chunk.
            chunk: the chunk.
            x: (B, N), the points.
            backend: the backend of the posterior mean.
        """
        held = self.source.tensor
        if held is None or x.dtype != torch.float32 or not held.device == x.device == _CPU:
            return None
        # A compiled graph cannot keep a sketch. Inference tensors count no changes.
        if torch.compiler.is_compiling() or held.is_inference():
            return None
        known, kept = self._sketches.get(start, (None, None))
        if known is not None and kept is None:
            return None  # rows of this shape have none
        state = id(held), held._version, native_calls.sample(chunk)
        if known == state:
            return kept
        if self._seen.get(start) != state:
            self._seen[start] = state
            self._sketches.pop(start, None)
            return None
        kept = posterior_mean.sketch(flat_rows(chunk), x, backend)
        self._sketches[start] = state, kept
        return kept

    def chunks(self, device: torch.device | str | None = None) -> Iterator[Tensor]:
        """As :meth:`pfgm.ReferenceSet.chunks`."""
        for _, chunk in self.stored_chunks():
            # Pinned rows are copied without waiting, as in torch: they must stay until a GPU has
            # read them. Pageable memory a GPU may read itself, as on Grace, so that copy waits.
            chunk = chunk.to(device or self.device, non_blocking=chunk.is_pinned())
            yield chunk
            if self.flips:
                yield chunk.flip(-1)

    def stored_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields pairs of the number of the first row and a chunk without mirror images."""
        starts = range(self.begin, self.end, self.chunk_rows)
        read: Iterator[Tensor]
        if self.source.tensor is not None:
            read = (self.source.read(a, min(a + self.chunk_rows, self.end)) for a in starts)
        else:
            read = self._read_ahead(starts)
        for start, chunk in zip(starts, read, strict=True):
            if not self.finite:
                check_finite("data", chunk, start)
            yield start - self.begin, chunk
        self.finite = True

    def _read_ahead(self, starts: range) -> Iterator[Tensor]:
        """Reads into one of two buffers while the caller works on the other."""
        size, dtype = (self.chunk_rows, *self.shape), self.source.dtype
        # Buffers are kept for the next pass. Threads that read at the same time get separate ones.
        try:
            buffers = self._buffers.pop()
        except IndexError:
            first = torch.empty(size, dtype=dtype, device=_CPU)
            buffers = first, torch.empty_like(first)

        def read(index: int) -> Tensor:
            start = starts[index]
            stop = min(start + self.chunk_rows, self.end)
            return self.source.read(start, stop, buffers[index % 2])

        with ThreadPoolExecutor(1, "pfgm-read-ahead") as reader:
            coming = reader.submit(read, 0)
            for index in range(len(starts)):
                chunk = coming.result()
                if index + 1 < len(starts):
                    coming = reader.submit(read, index + 1)
                yield chunk
        self._buffers.append(buffers)
