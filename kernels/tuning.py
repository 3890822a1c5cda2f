"""Configurations of a kernel, and the choice among them."""

from __future__ import annotations

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

Measure = Callable[[Callable[[], Any]], float]

ROUNDS, RUNS = 5, 8  # in which a configuration is measured, and launches in each


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as Triton saw it when they were defined."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors, which each run at least one program."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@dataclass(frozen=True, eq=False)
class Config:
    """Sizes of a kernel's tiles, and its numbers of warps and pipeline stages."""

    sizes: Mapping[str, int]
    """By parameter, in the order of the kernel's parameters."""
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    """The most registers of a thread, on NVIDIA's GPUs. None leaves the number to the compiler,
    which may spill some to fit one more block."""

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @functools.cached_property
    def compiled(self) -> dict[str, Any]:
        """How the compiler is called."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None and torch.version.hip is None:
            options["maxnreg"] = self.maxnreg
        return options

    @property
    def options(self) -> dict[str, Any]:
        """Sizes and options by name."""
        return {**self.sizes, **self.compiled}

    @functools.cached_property
    def values(self) -> tuple[int, ...]:
        """The sizes alone."""
        return tuple(self.sizes.values())

    @functools.cached_property
    def key(self) -> tuple[int, ...]:
        """The same for configurations of a kernel that compile to the same code."""
        return (*self.values, *self.compiled.values())


def median_seconds(run: Callable[[], Any]) -> float:
    """The device's time for a run. Waits for the device."""
    run()  # compiles
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        # Several runs wait in the queue, so that the host's time for a launch does not count.
        for _ in range(RUNS):
            run()
        mark.record()
    # Not for the whole device, on which another thread may be capturing a graph.
    marks[-1].synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times) / RUNS * 1e-3


def may_not_measure() -> bool:
    """Whether timings must not choose the configuration.

    Rounding depends on the tiles. So deterministic results exclude timing, and processes that
    train together must not choose differently. Timings in the interpreter mean nothing.
    """
    return (
        torch.are_deterministic_algorithms_enabled()
        or interpreted()
        or _one_of_several_processes()
        or os.environ.get("PFGM_TUNE") == "0"
    )


def _one_of_several_processes() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def capturing() -> bool:
    """Whether a CUDA graph is being captured. Nothing can be timed then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def kind_of(device: torch.device) -> Hashable:
    """The same for devices of the same kind, for which one choice holds."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.major, properties.minor, properties.multi_processor_count


_forced: int | None = None


@contextmanager
def forced(index: int) -> Iterator[None]:
    """Takes the configuration of this index, or the last, in place of a measured one."""
    global _forced
    _forced = index
    try:
        yield
    finally:
        _forced = None


class Choice:
    """Chooses among a few configurations: the fastest, measured once per shape class and kind of
    device, or the first if timings must not choose. A launch must be repeatable: it overwrites its
    results and does not read them."""

    def __init__(
        self, configs: Callable[[Any], Sequence[Config]], measure: Measure = median_seconds
    ) -> None:
        """configs: shape class → configurations to choose from. The one that is most likely best
        comes first. It is called once a shape class."""
        self.configs = functools.cache(configs)
        self.measure = measure
        self.chosen: dict[Hashable, Config] = {}

    def launch(self, shape: Hashable, device: torch.device, run: Callable[[Config], Any]) -> None:
        """Runs with the configuration for this shape class, a NamedTuple."""
        configs = self.configs(shape)
        best = configs[min(_forced or 0, len(configs) - 1)]
        if _forced is None and len(configs) > 1 and not may_not_measure():
            key = shape, kind_of(device)
            if key not in self.chosen and not capturing():
                self.chosen[key] = min(configs, key=lambda config: self._seconds(config, run))
            best = self.chosen.get(key, best)
        run(best)

    def _seconds(self, config: Config, run: Callable[[Config], Any]) -> float:
        """Time of a launch; infinite if the device lacks the resources."""
        try:
            return self.measure(lambda: run(config))
        except triton.runtime.errors.OutOfResources:
            return float("inf")
