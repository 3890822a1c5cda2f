"""The number of threads that a command trains with on the CPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .trainer import Trainer

_LARGE = 0.5  # seconds of a step on one thread; a network that takes longer gets all threads
_TURNS = 5
_AS_FAST = 1.05  # the smallest count within this factor of the fastest is taken
_BUDGET = 3.0  # seconds after which no further turn begins


@contextmanager
def training_threads(trainer: Trainer, *, resumed: bool = False) -> Iterator[int]:
    """Sets the number of threads that trains the network fastest, and restores it afterwards.

    The precision is chosen first, if it is open. Then a few steps on a copy of the network are
    timed, see :func:`fastest_count`. The run itself is not changed by this, but results depend on
    the number of threads in their last digits. So a resumed run takes the number of its checkpoint.
    ``OMP_NUM_THREADS`` decides if it is set. Training in several processes, compiled or on a GPU
    keeps the present number.

    Yields:
        The number of threads.
    """
    trainer._settle_precision()
    before = torch.get_num_threads()
    count = before
    if "OMP_NUM_THREADS" not in os.environ and trainer._computes_alone_on_cpu:
        if resumed:
            count = min(trainer._saved_threads or before, before)
        elif before > 1:
            count = fastest_count(trainer._rehearsal())
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def fastest_count(
    step: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> int:
    """How many threads run a step fastest: 1, 2, 4, … or all.

    The counts take turns, and the medians of their times are compared, which includes the effect of
    other work on the machine. Of equally fast counts the smallest is returned. If a step takes long
    on one thread, all threads are used without further timing.
    """
    most = torch.get_num_threads()
    counts = sorted({most, *(1 << k for k in range(most.bit_length()))})

    def seconds(count: int) -> float:
        torch.set_num_threads(count)
        started = clock()
        step()
        return clock() - started

    try:
        seconds(1)  # the first call is slower: it allocates
        if seconds(1) > _LARGE:
            return most
        begun = clock()
        times: dict[int, list[float]] = {count: [] for count in counts}
        for turn in range(_TURNS):
            if turn > 1 and clock() - begun > _BUDGET:
                break
            for count in counts:
                seconds(count)  # threads start, and caches fill
                times[count].append(seconds(count))
        medians = {count: statistics.median(each) for count, each in times.items()}
        least = min(medians.values())
        return next(count for count in counts if medians[count] <= _AS_FAST * least)
    finally:
        torch.set_num_threads(most)
