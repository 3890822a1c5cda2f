"""Which rows a training step sees: a function of the seed, the step and the process alone."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..references import References, ReferenceSet

__all__ = ["Batch", "Batches", "seed_of"]


class Batch(NamedTuple):
    """What a step is given, on the device it computes on."""

    x: Tensor
    """(B, *S) samples."""
    references: References | None
    """(M, *S), those of the batch among them; None where the batch's own rows are the target."""
    labels: Tensor | None
    """(B,), where the data have labels."""
    reference_labels: Tensor | None
    """(M,), likewise."""


class Batches:
    """Batches in a new order each epoch, with the references around them.

    Args:
        data: (n, *S); of a set that is shared between processes, each takes its own rows.
        labels: (n,) of the data, or None.
        size: samples in this process's batch.
        references: how many; all data where they are no more, or lie in several processes; 0 is
            none.
        seed: of the order.
        device: where batches go.
        dtype: of the samples in them, unless these are bytes.
        place: (rank, size) of this process.
    """

    def __init__(
        self,
        data: References,
        labels: Tensor | None,
        *,
        size: int,
        references: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self._data, self._labels = data, labels
        self._size, self._references = size, references
        self._seed, self._device, self._dtype = seed, device, dtype
        self._apart = isinstance(data, ReferenceSet) and data.sharded
        # Processes with rows of their own draw from them alone, others share one order.
        self._own = data.rows if isinstance(data, ReferenceSet) else torch.arange(len(data))
        self._rank, self._processes = (0, 1) if self._apart else place
        self._epoch: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        rows, size = len(self._own), self._size * self._processes
        epoch, position = divmod(step, rows // size)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self._seed, epoch, 2))
            order = self._own[torch.randperm(rows, generator=generator)]
            # A tensor is indexed where it is, without a copy of the numbers each step.
            place = self._data.device if isinstance(self._data, Tensor) else order.device
            self._epoch = epoch, order.to(place)
        order = self._epoch[1]
        start = position * size + self._rank * self._size
        chosen = order[start : start + self._size]
        x, labels = self._rows(chosen), self._labels_of(chosen)
        x = x.to(self._dtype) if x.is_floating_point() else x
        if self._references == 0:
            return Batch(x, None, labels, None)
        if self._apart or self._references >= rows:
            return Batch(x, self._all(), labels, self._labels_of(slice(None)))
        places = torch.arange(start, start + self._references, device=order.device)
        around = order[places % rows]
        return Batch(x, self._rows(around), labels, self._labels_of(around))

    def _rows(self, rows: Tensor) -> Tensor:
        return self._data[rows].to(self._device)

    def _labels_of(self, rows: Tensor | slice) -> Tensor | None:
        if self._labels is None:
            return None
        if isinstance(rows, Tensor):
            rows = rows.to(self._labels.device)
        return self._labels[rows].to(self._device).long()

    def _all(self) -> References:
        if isinstance(self._data, Tensor) and self._data.device != self._device:
            self._data = self._data.to(self._device)
        return self._data


def seed_of(*parts: int) -> int:
    """A 63-bit seed for one purpose (seed, step, purpose), unrelated to that of any other."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
