"""The native backend's way to a GPU without one: the extension built with csrc/host_shim."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pfgm.backends import native, native_calls
from pfgm.common import checks
from pfgm.ops import eager

PATH = os.environ.get("PFGM_CUDA_SHIM")
"""The extension, built with ``cmake -DPFGM_CUDA_SHIM=ON``."""

_ROOT = Path(__file__).resolve().parents[2]
# The tools of the running environment, activated or not.
_TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def why_unbuilt() -> str | None:
    """Why the extension cannot be built, or None if it can."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=_TOOLS) is None]
    return f"no {' and no '.join(missing)} on PATH" if missing else None


def build() -> Path:
    """Builds the extension in build/cuda_shim. Only changed sources are compiled again.

    Raises:
        RuntimeError: it could not be built. The message has the compiler's output.
    """
    if reason := why_unbuilt():
        raise RuntimeError(f"the host shim is not built: {reason}.")
    path = _ROOT / "build" / "cuda_shim"
    options = ("-DPFGM_CUDA_SHIM=ON", f"-DPython_EXECUTABLE={sys.executable}")
    for command in (
        ["cmake", "-S", str(_ROOT), "-B", str(path), "-G", "Ninja", *options],
        ["cmake", "--build", str(path)],
    ):
        environment = os.environ | {"PATH": _TOOLS}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the host shim could not be built:\n{done.stdout}{done.stderr}")
    (extension,) = path.glob("_native*.so")
    return extension


def load(path: str) -> ModuleType:
    """The extension of this path."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def in_place_of_a_gpu(extension: ModuleType) -> Iterator[None]:
    """The package takes tensors in CPU memory as tensors on a GPU, and calls the extension."""
    is_plain = eager.is_plain

    def is_plain_on_gpu(value: Tensor, gpu: torch.device | None = None) -> bool:
        return gpu is not None and is_plain(value, gpu)

    replaced: list[tuple[Any, str, Any]] = [
        (native, "_native", extension),
        (native, "_on_cuda", lambda device: True),
        (native, "on_gpu", lambda value: True),
        (native, "current_stream", lambda device: (0, 0)),
        (native_calls, "_native", extension),
        (checks, "_on_cpu", lambda device: False),
        (eager, "is_plain", is_plain_on_gpu),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
