"""The native backend's way to a GPU without one: the extension built with csrc/host_shim."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pfgm.backends import native, native_direct
from pfgm.common import checks, transforms

PATH = os.environ.get("PFGM_CUDA_SHIM")
"""The extension, built with ``cmake -DPFGM_CUDA_SHIM=ON``."""


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
    is_plain = transforms.is_plain

    def is_plain_on_gpu(value: Tensor, gpu: torch.device | None = None) -> bool:
        return gpu is not None and is_plain(value, gpu)

    replaced: list[tuple[Any, str, Any]] = [
        (native, "_native", extension),
        (native, "_on_cuda", lambda device: True),
        (native, "on_gpu", lambda value: True),
        (native, "current_stream", lambda device: (0, 0)),
        (native_direct, "_native", extension),
        (checks, "_on_cpu", lambda device: False),
        (transforms, "is_plain", is_plain_on_gpu),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
