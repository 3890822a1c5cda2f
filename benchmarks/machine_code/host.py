"""The host's time for a call, without the driver. Measured on the CPU; needs no GPU.

Triton's kernels are launched into a driver that does nothing, so that only the Python code of the
library and of Triton takes time. Calls of the native backend go the way to a GPU in an extension
built with csrc/host_shim (``PFGM_CUDA_SHIM``), where launches do nothing, on tensors in CPU memory.
Without that extension they are not measured. Plain torch runs on the CPU with one query and one
reference, so that computing takes no time. The driver's time for a launch is not measured and must
be added, and so are the calls of the CUDA runtime around the launches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

import pfgm
from benchmarks.common import cuda_shim
from pfgm.backends import native_direct

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
    from pfgm.kernels import loading
    from triton.runtime import driver

    from pfgm.backends import triton, triton_direct

    def forget() -> None:
        triton_direct._chosen.cache_clear()

    with ExitStack() as patches:
        patches.callback(forget)
        for owner, name, value in (
            (driver, "_active", Driver()),
            (loading, "_exchange_mode", lambda: None),
            (triton, "supports", lambda *_: None),
            (triton_direct, "_on_gpu", lambda _: True),
            (triton_direct, "checks_values", lambda _: False),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(mock.patch.dict(os.environ, {"PFGM_TUNE": "0"}))
        forget()
        yield


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of a call in this thread: the least of the rounds, after one untimed call.

    Other work on the machine only adds to it.
    """
    run()
    found = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for _ in range(CALLS):
            run()
        found.append((time.thread_time() - started) / CALLS)
    return float(f"{min(found):.3g}")


def measure() -> dict[str, float]:
    """Seconds of a call, by function and path."""
    from pfgm.kernels import posterior_mean as kernels

    x, radius, y = torch.randn(32, 64), torch.rand(32).double() + 0.5, torch.randn(256, 64)
    z, slope, field_z = radius.float(), torch.randn(32, 64), -torch.rand(32)
    calls = {
        "field_fn, triton": lambda: pfgm.field_fn(x, z, y, backend="triton"),
        "posterior_mean, triton, launches alone": lambda: kernels.posterior_mean(
            x, y, radius, 1.0, "high"
        ),
        "euler_step, triton": lambda: pfgm.euler_step(
            x, pfgm.Field(slope, field_z), 1.0, 0.9, backend="triton"
        ),
    }
    with torch.no_grad():
        with no_driver():
            found = {name: seconds(call) for name, call in calls.items()}
        found |= native_calls(x, radius.float(), y)
        found["posterior_mean, torch"] = seconds(_torch(x, radius, y))
        return found


@contextmanager
def no_launches(path: str) -> Iterator[None]:
    """Tensors count as being on a GPU, where the launches of the native backend do nothing."""
    extension = cuda_shim.load(path)
    extension.shim_idle(True)
    with cuda_shim.in_place_of_a_gpu(extension):
        yield


def native_calls(x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Seconds of calls of the native backend: each in one call of the extension, and one through
    torch's operators, as where a gradient is wanted."""
    if cuda_shim.PATH is None:
        print("The native backend is not measured: PFGM_CUDA_SHIM is not set (see host.py).")
        return {}
    with no_launches(cuda_shim.PATH):
        found = {f"{name}, native": seconds(call) for name, call in _calls(x, z, y).items()}
        with mock.patch.object(native_direct, "enabled", False):
            call = _calls(x, z, y)["field_fn"]
            found["field_fn, native through torch's operators"] = seconds(call)
    return found


def _calls(x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], Any]]:
    field = pfgm.Field(torch.randn_like(x), -torch.rand(len(x)) - 0.1)
    before, to, since = torch.randn_like(x), z / 2, 2 * z
    return {
        "posterior_mean": lambda: pfgm.posterior_mean(x, y, r=z, return_logsumexp=True),
        "field_fn": lambda: pfgm.field_fn(x, z, y),
        "euler_step": lambda: pfgm.euler_step(x, field, 2.0, 1.0),
        "euler_step with levels in tensors": lambda: pfgm.euler_step(x, field, z, to),
        "heun_step": lambda: pfgm.heun_step(x, before, field, 2.0, 1.0),
        "multistep_step": lambda: pfgm.multistep_step(x, field, 2.0, 1.0, before, 4.0),
        "multistep_step with levels in tensors": lambda: pfgm.multistep_step(
            x, field, z, to, before, since
        ),
    }


def _torch(x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    from benchmarks.common import posterior_paths
    from benchmarks.common.subjects import Case

    return posterior_paths.torch_path(Case(x[:1], z[:1].float(), y[:1]))
