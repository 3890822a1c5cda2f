"""The tensors of an operation by name, and launches that take them by name.

Temporary tensors lie in one allocation, at places that are found once for all operations of the
same sizes. A launch then needs nothing but addresses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm.common.tensors import unfilled

from .launching import Launch, current_place, look_at
from .variant import TYPES

NOTHING = "nothing"
"""The name of a tensor that a kernel does without."""

_ALIGNMENT = 256  # bytes
_DTYPES = {
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*fp64": torch.float64,
    "*i32": torch.int32,
}


class Step(NamedTuple):
    """A launch and the names of its tensors."""

    launch: Launch
    names: tuple[str, ...]


class Layout:
    """Where temporary tensors lie in the memory of an operation."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        """counts: the number of values by name. The name says the type (variant.py)."""
        self.dtypes = {name: _DTYPES[TYPES[name]] for name in counts}
        self.counts = dict(counts)
        sizes = [
            -(-count * self.dtypes[name].itemsize // _ALIGNMENT) * _ALIGNMENT
            for name, count in counts.items()
        ]
        *starts, self.size = itertools.accumulate(sizes, initial=0)
        self.starts = dict(zip(counts, starts, strict=True))


class Space:
    """The memory of an operation, on the current device: its arguments, and temporary tensors."""

    def __init__(self, layout: Layout, **arguments: Tensor) -> None:
        self._layout, self._place = layout, current_place()
        like = next(iter(arguments.values()))
        self._memory = unfilled(layout.size, like.device)
        self._arguments: dict[str, Tensor | None] = {NOTHING: None, **arguments}
        start = self._memory.data_ptr()
        self._addresses: dict[str, int | None]
        self._addresses = {name: start + offset for name, offset in layout.starts.items()}
        self._look()

    def give(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor, or replaces one."""
        self._arguments[name] = tensor
        self._look()

    def _look(self) -> None:
        addresses, kinds = look_at((self._memory, *self._arguments.values()))
        self._kinds = (*self._arguments, *kinds)
        self._addresses.update(zip(self._arguments, addresses[1:], strict=True))

    def temporary(self, name: str) -> Tensor:
        """A temporary tensor as a vector."""
        dtype, start = self._layout.dtypes[name], self._layout.starts[name]
        end = start + self._layout.counts[name] * dtype.itemsize
        return self._memory[start:end].view(dtype)

    def run(self, step: Step) -> None:
        """Launches at the place that was the current one when this was made."""
        launch, names = step
        kinds = names, self._kinds
        if self._place is not None:
            addresses = [self._addresses[name] for name in names]
            if launch.repeat(self._place, kinds, addresses):
                return
        arguments = self._arguments
        tensors = [arguments[name] if name in arguments else self.temporary(name) for name in names]
        launch.by_triton(self._place, kinds, tensors)
