"""How long a training step takes, which decides its precision and how many fit into minutes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from .processes import Processes

_TURNS = 3
_LONG = 2.0  # seconds of a step that is timed only once
_FASTER = 1.2  # how much faster bfloat16 must be, as it rounds more
_SHORT = 0.02  # seconds of a step from which on it may be used; less is noise, and soon done


def seconds_of(
    steps: Sequence[Callable[[], object]],
    processes: Processes,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each of these steps, which take turns after one call that is not timed.

    The clock of the first process decides, so all processes call a step equally often.

    >>> now = iter(range(100))
    >>> seconds_of([lambda: None], Processes(), clock=lambda: next(now) / 2)
    [0.5]
    """

    def seconds(step: Callable[[], object]) -> float:
        started = clock()
        step()
        return processes.of_leader(clock() - started)

    longest = max([seconds(step) for step in steps])  # the first call is slower: it allocates
    turns = [[seconds(step) for step in steps] for _ in range(1 if longest > _LONG else _TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def bfloat16_pays(seconds: Sequence[float]) -> bool:
    """Whether bfloat16 is to be used, from the seconds of a step in float32 and in bfloat16.

    >>> bfloat16_pays([2.09, 1.06]), bfloat16_pays([1.0, 0.9]), bfloat16_pays([0.002, 0.001])
    (True, False, False)
    """
    float32, bfloat16 = seconds
    return float32 >= max(_FASTER * bfloat16, _SHORT)
