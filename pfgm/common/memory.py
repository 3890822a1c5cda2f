"""Memory: how much there is, and errors where it does not suffice."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator raises a plain RuntimeError.
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextmanager
def allocating(what: str) -> Iterator[None]:
    """Turns an allocation error in the block into a MemoryError that says what did not fit.

    >>> with allocating("n is 10**15, and so many numbers"):
    ...     torch.empty(10**15)
    Traceback (most recent call last):
    MemoryError: n is 10**15, and so many numbers do not fit into the memory of this machine.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(f"{what} do not fit into the memory of this machine.") from error


def memory_bytes() -> float:
    """Memory of the machine; infinity where the system does not report it."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf
