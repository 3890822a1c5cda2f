"""Time on a device: the clocks of gpu.py, and how calls are timed in turns and in graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.common.turns import Call, Clock, host_seconds

CYCLES = 2e9  # a second, at least


class Budget:
    """Seconds that may be spent, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def allows(self, estimate: float) -> bool:
        return estimate <= self.left()


class Device(NamedTuple):
    """Where things are measured: by its own clock, or as a dry run by the host's."""

    name: str
    clock: Clock
    cache: int
    """Bytes of the L2 cache."""

    @property
    def real(self) -> bool:
        return self.name == "cuda"

    def wait(self) -> None:
        """Until all is done; raises what went wrong in it."""
        if self.real:
            torch.cuda.synchronize()

    def copies(self, size: int) -> int:
        """How many inputs of so many bytes are twice what the cache holds."""
        return min(max(2, -(-2 * self.cache // size)), 256)

    def compiled(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        backend = "inductor" if self.real else "eager"
        return torch.compile(function, dynamic=False, backend=backend)


def gpu() -> Device:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Device("cuda", event_clock(2 * cache), cache)


def dry() -> Device:
    return Device("cpu", host_seconds, 0)


def event_clock(flushed: int) -> Clock:
    """Seconds between two events around a call, ``flushed`` bytes written before."""
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
        # The device sleeps while the host runs ahead; a call that itself waits cannot be outrun.
        for _ in range(3):
            wait = waits.setdefault(call, 5e-4)
            device, host = once(call, wait)
            if host < wait:
                break
            waits[call] = min(2 * host, 0.05)
        return device

    return seconds


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "tenth": ordered[round(0.1 * last)],
        "ninetieth": ordered[round(0.9 * last)],
    }


def graph_of(calls: list[Call]) -> Call:
    """All calls, captured to be replayed together."""
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
    for call in calls:
        call()
