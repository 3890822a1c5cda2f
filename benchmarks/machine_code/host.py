"""The host's time for a call, without the driver. Measured on the CPU; needs no GPU.

Triton's kernels are launched into a driver that does nothing, so that only the Python code of the
library and of Triton takes time. For CUDA kernels and plain torch the same calls run on the CPU
with one query and one reference, so that computing takes no time. The driver's time for a launch is
not measured and must be added.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

ROUNDS, CALLS = 15, 20
DRIVER = 2.5e-6  # seconds that the driver takes for a launch; assumed


class _Utils:
    """Accepts every kernel and does nothing with it."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def unload_module(self, *arguments: Any) -> None:
        return None


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(
        self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *arguments: Any
    ) -> None:
        """Takes what a launcher of Triton takes."""


class Driver:
    """Stands for Triton's driver of an H100."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device. No GPU has this number.
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def no_driver() -> Iterator[None]:
    """Triton's launches do nothing, kernels are not tuned, and tensors on the CPU pass for tensors
    on a GPU."""
    from triton.runtime import driver

    from pfgm.backends import triton, triton_direct

    def forget() -> None:
        triton_direct._chosen.cache_clear()

    with ExitStack() as patches:
        patches.callback(forget)
        for owner, name, value in (
            (driver, "_active", Driver()),
            (triton, "supports", lambda *_: None),
            (triton_direct, "_on_gpu", lambda _: True),
            (triton_direct, "checks_values", lambda _: False),
        ):
            patches.enter_context(patch.object(owner, name, value))
        patches.enter_context(patch.dict(os.environ, {"PFGM_TUNE": "0"}))
        forget()
        yield


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of a call in this thread: the median of rounds, after one untimed call."""
    run()
    found = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for _ in range(CALLS):
            run()
        found.append((time.thread_time() - started) / CALLS)
    return statistics.median(found)


def measure() -> dict[str, float]:
    """Seconds of a call by each path. With Triton: ``field_fn``, the launches of ``posterior_mean``
    alone, and ``euler_step``; by the other paths ``posterior_mean``."""
    from pfgm.kernels import posterior_mean as kernels

    import pfgm

    x, radius, y = torch.randn(32, 64), torch.rand(32).double() + 0.5, torch.randn(256, 64)
    z, slope, field_z = radius.float(), torch.randn(32, 64), -torch.rand(32)
    calls = {
        "triton, field_fn": lambda: pfgm.field_fn(x, z, y, backend="triton"),
        "triton, posterior_mean, launches alone": lambda: kernels.posterior_mean(
            x, y, radius, 1.0, "high"
        ),
        "triton, euler_step": lambda: pfgm.euler_step(
            x, slope, field_z, 1.0, 0.9, backend="triton"
        ),
    }
    with torch.no_grad():
        with no_driver():
            found = {name: seconds(call) for name, call in calls.items()}
        found["native, posterior_mean"] = seconds(_native(x, radius, y))
        found["torch, posterior_mean"] = seconds(_torch(x, radius, y))
        return found


def _native(x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    import pfgm

    x, y, z = x[:1], y[:1], z[:1].float()
    return lambda: pfgm.posterior_mean(x, y, r=z, return_logsumexp=True, backend="native")


def _torch(x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    from benchmarks.common import posterior_paths
    from benchmarks.common.subjects import Case

    return posterior_paths.torch_path(Case(x[:1], z[:1].float(), y[:1]))
