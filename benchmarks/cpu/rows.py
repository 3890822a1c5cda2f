"""Rows of pytest-benchmark's table from calls that were timed in turns."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import torch

from benchmarks.common.machine import limits
from benchmarks.common.turns import Call, Seconds, host_seconds, ratio, time_calls, warm_seconds


class Replay:
    """A timer for pytest-benchmark. It replays loaded durations; without any it returns the true
    time."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def load(self, seconds: list[float]) -> None:
        """Sets the durations, one a round."""
        self._times = [time for duration in reversed(seconds) for time in (duration, 0.0)]

    def __call__(self) -> float:
        return self._times.pop() if self._times else time.perf_counter()


replay = Replay()


class Measured(NamedTuple):
    """Times of competing paths, and other facts about the subject."""

    seconds: Seconds
    facts: dict[str, Any]


def measure_paths(
    paths: dict[str, Call], turns: int, facts: dict[str, Any], *, warm: bool = False
) -> Measured:
    """Times paths in turns, and notes the state of the machine.

    Args:
        warm: whether an untimed call of the same path comes right before each timed one.
    """
    seconds = time_calls(paths, turns, warm_seconds if warm else host_seconds)
    conditions = {"threads": torch.get_num_threads(), "load": os.getloadavg(), **limits()}
    return Measured(seconds, {**facts, **conditions})


def add_row(benchmark: Any, group: str, path: str, measured: Measured, **facts: Any) -> None:
    """Reports one path's seconds as a row of pytest-benchmark's table.

    ``extra_info`` gets the facts, and the ratio of every path's time to this one's.
    """
    seconds = measured.seconds
    benchmark.group = group
    benchmark.extra_info |= {
        "subject": group,
        "path": path,
        "times as long": {other: ratio(seconds, other, path) for other in seconds},
        **measured.facts,
        **facts,
    }
    replay.load(seconds[path])
    benchmark.pedantic(lambda: None, rounds=len(seconds[path]))
