"""Time on a device: its clock, a budget, graphs and quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.turns import Call, Clock, host_seconds

CYCLES = 2e9  # of the device in a second, at least


class Budget:
    """A number of seconds from now on, or less: until there is a file."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        until: Path | None = None,
    ) -> None:
        self._clock, self._until = clock, until
        self._end = clock() + seconds

    def left(self) -> float:
        if self._until is not None and self._until.exists():
            return 0.0
        return self._end - self._clock()

    def allows(self, estimate: float) -> bool:
        return estimate <= self.left()


class Device(NamedTuple):
    """A device and its clock. A dry run has the CPU and the host's clock."""

    name: str
    clock: Clock
    cache: int
    """Bytes of the L2 cache."""

    @property
    def real(self) -> bool:
        return self.name == "cuda"

    def wait(self) -> None:
        """Waits until all work is done, and raises its errors."""
        if self.real:
            torch.cuda.synchronize()

    def copies(self, size: int) -> int:
        """How many inputs of this size fill twice the cache."""
        return min(max(2, -(-2 * self.cache // size)), 256)

    def compiled(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The function under torch.compile."""
        backend = "inductor" if self.real else "eager"
        return torch.compile(function, dynamic=False, backend=backend)


def gpu() -> Device:
    """The first GPU."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Device("cuda", event_clock(2 * cache), cache)


def dry() -> Device:
    """The device of a dry run."""
    return Device("cpu", host_seconds, 0)


def event_clock(flushed: int) -> Clock:
    """A clock that overwrites ``flushed`` bytes, then measures between two events around a call."""
    buffer = torch.empty(flushed, dtype=torch.uint8, device="cuda")
    waits: dict[Call, float] = {}

    def once(call: Call, wait: float) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        torch.cuda._sleep(int(wait * CYCLES))
        start.record()
        host = host_seconds(call)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3, host

    def seconds(call: Call) -> float:
        # The device sleeps while the host prepares the call. That fails if the call itself waits.
        for _ in range(3):
            wait = waits.setdefault(call, 5e-4)
            device, host = once(call, wait)
            if host < wait:
                break
            waits[call] = min(2 * host, 0.05)
        return device

    return seconds


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "tenth": ordered[round(0.1 * last)],
        "ninetieth": ordered[round(0.9 * last)],
    }


def graph_of(calls: list[Call]) -> Call:
    """The replay of a CUDA graph that holds all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all(calls)
    return graph.replay


def call_all(calls: list[Call]) -> None:
    """Makes each call once."""
    for call in calls:
        call()
