"""What :func:`pfgm.data.open` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rows import Source

if TYPE_CHECKING:
    from .tables import Table


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Samples, and what is known of them. :class:`pfgm.ReferenceSet` and the trainer take it."""

    samples: Source
    """(n, *S), in memory or in a file; ``samples[:]`` is a tensor of them. Images are (n, C, H, W),
    as bytes or in [-1, 1]."""
    labels: Tensor | None = None
    """(n,) int64, 0 to classes − 1; None where they are not known."""
    names: tuple[str, ...] = ()
    """The names of the classes, by label; empty where they have none."""
    table: Table | None = None
    """The columns of a table, which encode and decode its rows."""
    held_out: Data | None = None
    """Samples that are not for training; None if there are none."""
    levels: int = 0
    """The number of grey levels, where it does not follow from the dtype."""

    def __repr__(self) -> str:
        known = [f"{self.classes} classes"] if self.classes else []
        known += [] if self.held_out is None else [f"{len(self.held_out.samples)} held out"]
        return f"Data({', '.join([f'{self.samples.shape}', f'{self.samples.dtype}', *known])})"

    @property
    def classes(self) -> int:
        """The number of classes; 0 without labels."""
        if self.labels is None:
            return 0
        held_out = 0 if self.held_out is None else self.held_out.classes
        return len(self.names) or max(int(self.labels.max()) + 1, held_out)

    @property
    def grey_levels(self) -> int:
        """For bits per dimension: 17 for digits, 256 for bytes, 0 (unknown) for others."""
        return self.levels or 256 * (self.samples.dtype == torch.uint8)
