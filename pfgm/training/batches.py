"""The batch of a training step. It depends only on the seed, the step and the process."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..references import References, ReferenceSet


class Batch(NamedTuple):
    """The data of a step, on the device of the network."""

    x: Tensor
    """Samples (B, *S)."""
    references: References | None
    """References (M, *S), which contain the batch; None for the single-sample target."""
    labels: Tensor | None
    """Labels (B,) of the samples, if the data have labels."""
    reference_labels: Tensor | None
    """Labels (M,) of the references, if the data have labels."""

    def condition(
        self, rows: slice, dropout: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The labels of these samples for the network, a fraction of them dropped."""
        if self.labels is None:
            return {}
        labels = self.labels[rows]
        drawn = torch.rand(len(labels), generator=generator, device=labels.device)
        return {"labels": torch.where(drawn < dropout, -1, labels)}


class Batches:
    """Batches in a new order each epoch, each with references that contain it.

    Args:
        data: samples (n, *S). Of a sharded set, each process takes its own rows.
        size: number of samples in the batch of this process.
        references: number of references, at most all data; a sharded set always gives all of its
            data; 0 means none.
        seed: seed of the order.
        dtype: dtype of the samples, unless they are uint8.
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
        rank_and_size: tuple[int, int] = (0, 1),
    ) -> None:
        self._data, self._labels = data, labels
        self._size, self._references = size, references
        self._seed, self._device, self._dtype = seed, device, dtype
        self._sharded = isinstance(data, ReferenceSet) and data.sharded
        # With a sharded set each process orders its own rows; otherwise all have the same order.
        self._own_rows = (
            data.rows if isinstance(data, ReferenceSet) else torch.arange(len(data), device="cpu")
        )
        self._rank, self._processes = (0, 1) if self._sharded else rank_and_size
        self._epoch: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        count, size = len(self._own_rows), self._size * self._processes
        epoch, position = divmod(step, count // size)
        order = self._order_of(epoch)
        start = position * size + self._rank * self._size
        rows = order[start : start + self._size]
        x, labels = self._samples(rows), self._labels_of(rows)
        x = x.to(self._dtype) if x.is_floating_point() else x
        if self._references == 0:
            return Batch(x, None, labels, None)
        if self._sharded or self._references >= count:
            return Batch(x, self._all_data(), labels, self._labels_of(slice(None)))
        positions = torch.arange(start, start + self._references, device=order.device)
        rows = order[positions % count]
        return Batch(x, self._samples(rows), labels, self._labels_of(rows))

    def _order_of(self, epoch: int) -> Tensor:
        """The rows of this process in the order of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self._seed, epoch, 2))
            shuffled = torch.randperm(len(self._own_rows), generator=generator, device="cpu")
            order = self._own_rows[shuffled]
            # The order stays on the device of the data, so indexing copies no row numbers.
            device = self._data.device if isinstance(self._data, Tensor) else order.device
            self._epoch = epoch, order.to(device)
        return self._epoch[1]

    def _samples(self, rows: Tensor) -> Tensor:
        return self._data[rows].to(self._device)

    def _labels_of(self, rows: Tensor | slice) -> Tensor | None:
        if self._labels is None:
            return None
        if isinstance(rows, Tensor):
            rows = rows.to(self._labels.device)
        return self._labels[rows].to(self._device)

    def _all_data(self) -> References:
        if isinstance(self._data, Tensor) and self._data.device != self._device:
            self._data = self._data.to(self._device)
        return self._data


def seed_of(*parts: int) -> int:
    """A 63-bit seed from several integers, such as seed, step and purpose."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
