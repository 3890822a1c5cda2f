"""Triton's kernels without a GPU: what Triton compiles runs in the executor of tests/ptx."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime import driver

from benchmarks.common.executor import SHARED, Executor
from pfgm.backends import triton

CAPABILITY = int(os.environ.get("PFGM_PTX_TRITON", "0"))
"""The device that Triton compiles for; 0 if its kernels do not run in the executor."""

# Of Triton's types, in `struct`.
_FORMATS = {"i1": "?", "i8": "b", "u8": "B", "i16": "h", "i32": "i", "u32": "I", "i64": "q"}
_FORMATS |= {"u64": "Q", "fp32": "f", "fp64": "d"}
_MOST_PARAMETERS = 128


class _Loader:
    """Loads compiled kernels. The number of one in ``kernels`` stands for its address."""

    def __init__(self, executor: Executor):
        self._library = executor.library
        self.kernels: list[tuple[int, bytes, list[int]]] = []  # module, name, sizes of parameters
        self.ptx = ""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        module = self._library.ptx_load(self.ptx.encode())
        sizes = (ctypes.c_uint64 * _MOST_PARAMETERS)()
        count = self._library.ptx_params(module, name.encode(), sizes, _MOST_PARAMETERS)
        if module < 0 or count < 0:
            raise RuntimeError(f"the executor does not take the PTX of {name}.")
        self.kernels.append((module, name.encode(), list(sizes[:count])))
        return 0, len(self.kernels) - 1, 32, 0, 1024  # module, kernel, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[CAPABILITY] << 10, "multiprocessor_count": 108}


def _launcher(loader: _Loader, library: ctypes.CDLL) -> type:
    """The class of launchers, which Triton makes of a kernel's signature and metadata."""

    class Launcher:
        def __init__(self, src: Any, metadata: Any):
            self._signature = list(src.signature.values())
            self._threads, self._shared = 32 * metadata.num_warps, metadata.shared
            assert not metadata.global_scratch_size
            assert not metadata.profile_scratch_size

        def __call__(self, x: int, y: int, z: int, stream: int, kernel: int, *rest: Any) -> None:
            arguments = rest[4:]  # after metadata and hooks
            module, name, sizes = loader.kernels[kernel]
            values = [
                _packed(kind, value)
                for kind, value in zip(self._signature, arguments, strict=True)
                if kind != "constexpr"
            ]
            values += [bytes(8)] * 2  # addresses of scratch memory, which no kernel has
            assert [len(value) for value in values] == sizes, name
            buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
            places = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
            grid, block = (ctypes.c_uint32 * 3)(x, y, z), (ctypes.c_uint32 * 3)(self._threads, 1, 1)
            if x * y * z > 0 and (
                error := library.ptx_launch(module, name, grid, block, self._shared, places)
            ):
                raise RuntimeError(f"{name.decode()}: error {error} of the executor.")

    return Launcher


def _packed(kind: str, value: Any) -> bytes:
    if not kind.startswith("*"):
        return struct.pack(_FORMATS[kind], value)
    if hasattr(value, "data_ptr"):
        value = value.data_ptr()
    return struct.pack("Q", value or 0)


class _Driver:
    def __init__(self, executor: Executor):
        self.utils = _Loader(executor)
        self.launcher_cls = _launcher(self.utils, executor.library)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return CAPABILITY // 10, CAPABILITY % 10

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def in_place_of_a_gpu(executor: Executor) -> Iterator[None]:
    """Triton launches its kernels in the executor, with tensors in CPU memory."""
    executor.device(CAPABILITY)
    stand_in = _Driver(executor)
    begin, hash_of_tools = CompiledKernel._init_handles, CUDABackend.hash

    def keep_ptx(kernel: CompiledKernel) -> Any:
        stand_in.utils.ptx = kernel.asm["ptx"]
        return begin(kernel)

    supports = triton.supports

    def supports_cpu(device: torch.device, *types: Any) -> str | None:
        return supports(torch.device("cuda"), *types)

    before = driver._active if hasattr(driver, "_active") else None
    driver.set_active(stand_in)
    try:
        with (
            # Machine code is not needed, and takes most of the time. Kernels without it are kept
            # under a key of their own.
            mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
            mock.patch.object(CUDABackend, "hash", lambda tools: f"ptx {hash_of_tools(tools)}"),
            mock.patch.object(CompiledKernel, "_init_handles", keep_ptx),
            mock.patch.object(triton, "supports", supports_cpu),
        ):
            yield
    finally:
        if before is not None:
            driver.set_active(before)
