"""Tests of the kernels for GPUs, on a GPU with every backend that can run there.

Where there is none, Triton's run in its interpreter (``TRITON_INTERPRET=1``, set before Triton is
imported) and the CUDA kernels as compiled for the host, in the extension that ``PFGM_CUDA_SHIM``
names: tests/test_triton.py and tests/test_cuda.py start processes with one or the other.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pfgm.backends import native, triton

SHIM = os.environ.get("PFGM_CUDA_SHIM")


def backends() -> list[str]:
    """Those that run in this process."""
    if SHIM is not None:
        return ["native"]
    if triton.interpreted():
        return ["triton"]
    device = torch.device("cuda")
    modules = {"triton": triton, "native": native} if torch.cuda.is_available() else {}
    return [name for name, module in modules.items() if not module.supports(device, torch.float32)]


BACKENDS = backends()
collect_ignore_glob = [
    pattern
    for pattern, needed in (("triton/*", {"triton"}), ("cuda/*", {"native"}), ("test_*", None))
    if not (BACKENDS if needed is None else needed.intersection(BACKENDS))
]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def device():
    """A GPU or, in its place, the CPU."""
    if SHIM is None:
        yield torch.device("cpu" if triton.interpreted() else "cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        extension = load(SHIM)
        patch.setattr(native, "_native", extension)
        patch.setattr(native, "_on_cuda", lambda device: True)
        patch.setattr(native, "_place", lambda device: extension.CudaPlace(device=0, stream=0))
        yield torch.device("cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def shim():
    """What only the host's build can: other devices, orders of threads, smaller parts."""
    if SHIM is None:
        pytest.skip("a GPU is what it is")
    module = native.extension()
    yield SimpleNamespace(
        order=module.shim_order,
        device=lambda capability, multiprocessors=4: module.shim_device(
            multiprocessors, capability, (163 if capability < 90 else 227) << 10
        ),
        limits=module.shim_limits,
        launches=module.shim_launches,
    )
    module.shim_order(0)
    module.shim_device(4, 90, 227 << 10)
    module.shim_limits()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed out uninitialised is NaN: a result that is not written shows."""
    owners = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    for owner, name in [*owners, (torch.Tensor, "new_empty")]:
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(255 if tensor.dtype == torch.uint8 else 77)

        monkeypatch.setattr(owner, name, filled)
