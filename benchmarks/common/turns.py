"""Times competing calls in turns, so that their ratios hold on a machine whose speed varies.

All calls run once per turn, in an order that rotates. A ratio is the median over the turns of the
ratio within a turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[Call], float]
Seconds = dict[str, list[float]]
"""Name of a path → seconds of its calls, turn by turn."""


def host_seconds(call: Call) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def warm_seconds(call: Call) -> float:
    """Seconds of a call made right after an untimed one."""
    call()
    return host_seconds(call)


def take_turns(paths: Mapping[str, Sequence[Call]], clock: Clock, turns: int) -> Seconds:
    """Times one call of each path in each turn.

    Args:
        paths: name → calls that do the same on copies of the inputs, used in rotation.
    """
    seconds: Seconds = {name: [] for name in paths}
    names = list(paths)
    for turn in range(turns):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            calls = paths[name]
            seconds[name].append(clock(calls[turn % len(calls)]))
    return seconds


def time_calls(calls: Mapping[str, Call], turns: int, clock: Clock = host_seconds) -> Seconds:
    """Times calls in turns. Each call first runs once untimed, which includes compilation."""
    for call in calls.values():
        call()
    return take_turns({name: [call] for name, call in calls.items()}, clock, turns)


def medians(seconds: Seconds) -> dict[str, float]:
    """The median of each path."""
    return {path: statistics.median(times) for path, times in seconds.items()}


def ratio(seconds: Seconds, path: str, to: str) -> float:
    """How many times as long one path takes as another."""
    pairs = zip(seconds[path], seconds[to], strict=True)
    return statistics.median(a / b for a, b in pairs)
