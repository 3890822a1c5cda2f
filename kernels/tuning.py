"""Configurations of a kernel, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

Measure = Callable[[Callable[[], Any]], float]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as Triton saw it when they were defined."""
    return bool(triton.knobs.runtime.interpret)


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors, which each run at least one program."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Config:
    """Sizes of a kernel's tiles, and its numbers of warps and pipeline stages."""

    sizes: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments for a launch."""
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


def median_seconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, return_mode="median")) * 1e-3


def may_not_measure() -> bool:
    """Whether timings must not choose the configuration. Rounding depends on the tiles, so
    deterministic results exclude timing. Timings in the interpreter mean nothing."""
    return (
        torch.are_deterministic_algorithms_enabled()
        or interpreted()
        or os.environ.get("PFGM_TUNE") == "0"
    )


def capturing() -> bool:
    """Whether a CUDA graph is being captured. Nothing can be timed then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@dataclass
class Choice:
    """Chooses among a few configurations: the fastest, measured once per shape class, or the first
    if timings must not choose. A launch must be repeatable: it overwrites its results and does not
    read them."""

    configs: Callable[[Any], Sequence[Config]]
    """Shape class → configurations to choose from; the one that is most likely best comes first."""
    measure: Measure = median_seconds
    chosen: dict[Hashable, Config] = field(default_factory=dict)

    def launch(self, shape: Hashable, run: Callable[[Config], Any]) -> None:
        """Runs with the configuration for this shape class, a NamedTuple."""
        first, *others = self.configs(shape)
        unmeasurable = capturing() and shape not in self.chosen
        if not others or may_not_measure() or unmeasurable:
            best = first
        else:
            best = self._measured(shape, [first, *others], run)
        run(best)

    def _measured(
        self, shape: Hashable, configs: Sequence[Config], run: Callable[[Config], Any]
    ) -> Config:
        if shape not in self.chosen:
            self.chosen[shape] = min(configs, key=lambda config: self._seconds(config, run))
        return self.chosen[shape]

    def _seconds(self, config: Config, run: Callable[[Config], Any]) -> float:
        """Time of a launch; infinite if the device lacks the resources."""
        try:
            return self.measure(lambda: run(config))
        except triton.runtime.errors.OutOfResources:
            return float("inf")
