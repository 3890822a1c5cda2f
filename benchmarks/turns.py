"""Paths that compete for one result take turns in one run, so that a ratio compares like with like.

A machine is not equally fast from one minute to the next. All paths of a subject are run once a
turn, in an order that rotates; a ratio is the median over the turns of the ratio within a turn.
pytest-benchmark gets the seconds of each path through a timer that repeats them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from machine import limits

Path = Callable[[], Any]


class Replay:
    """A timer for pytest-benchmark: the durations it is given, one a round, else the true time."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self._times = [time for duration in reversed(seconds) for time in (duration, 0.0)]

    def __call__(self) -> float:
        return self._times.pop() if self._times else time.perf_counter()


replay = Replay()


class Measured(NamedTuple):
    """Seconds of each path, turn by turn, and what else there is to know of the subject."""

    seconds: dict[str, list[float]]
    facts: dict[str, Any]

    def ratio(self, path: str, to: str) -> float:
        pairs = zip(self.seconds[path], self.seconds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)


def take_turns(
    paths: dict[str, Path], turns: int, facts: dict[str, Any], warm: bool = False
) -> Measured:
    """Runs each path once untimed, which compiles what is compiled, then in turns.

    warm: each timed call comes right after one of the same path, untimed.
    """
    for path in paths.values():
        path()
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    names = list(paths)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if warm:
                paths[name]()
            started = time.perf_counter()
            paths[name]()
            seconds[name].append(time.perf_counter() - started)
    conditions = {"threads": torch.get_num_threads(), "load": os.getloadavg(), **limits()}
    return Measured(seconds, {**facts, **conditions})


def enter(benchmark: Any, group: str, path: str, measured: Measured, **facts: Any) -> None:
    """One path's seconds become a row of pytest-benchmark's table, beside the others of its group.

    ``extra_info`` holds the ratio of every path's time to this one's.
    """
    benchmark.group = group
    benchmark.extra_info |= {
        "subject": group,
        "path": path,
        "times as long": {other: measured.ratio(other, path) for other in measured.seconds},
        **measured.facts,
        **facts,
    }
    seconds = measured.seconds[path]
    replay.load(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
