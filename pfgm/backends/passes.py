"""Which backend computes on a GPU: native if :func:`pfgm.backends.check` has passed there.

A pass holds for one kind of GPU, driver, torch and build of pfgm, with the version of nvcc. Each is
a file of its own in the user's cache folder, written atomically. There are no other files: what
failed is not stored, so that every process decides by the same fact.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from ..common.files import MALFORMED, write_json
from . import native

_known: dict[torch.device, bool] = {}
"""Whether native computes on a GPU, of those asked about so far."""


@functools.cache
def driver() -> str:
    """The version of NVIDIA's driver, from its own library, which is there on WSL2 too."""
    with contextlib.suppress(OSError, AttributeError):
        nvml, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
            return text.value.decode()
    return f"CUDA {native.extension().cuda_versions()[1] if native.has_extension() else None}"


def kind_of(device: torch.device) -> str:
    """The name of a GPU; the processor of other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _path(kind: str) -> tuple[Path, dict[str, Any]]:
    """The file of a pass, and what the pass holds for."""
    import platformdirs  # late, because it is slow and only GPUs need it

    build = native.extension().build_info() if native.has_extension() else None
    conditions: dict[str, Any] = {"gpu": kind, "driver": driver()}
    conditions |= {"torch": torch.__version__, "build": build}
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("pfgm")) / "passes" / f"{digest}.json", conditions


def has(kind: str) -> bool:
    """Whether native has passed on this kind of GPU. A damaged file is no pass."""
    path, conditions = _path(kind)
    with contextlib.suppress(*MALFORMED):
        return bool(json.loads(path.read_text()) == conditions)
    return False


def store(kind: str) -> None:
    """Store a pass. Raises OSError where the folder cannot be written."""
    path, conditions = _path(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, conditions)
    _known.clear()


def take_away(kind: str) -> None:
    """Remove a pass, if there is one. Raises OSError where that is not allowed."""
    _path(kind)[0].unlink(missing_ok=True)
    _known.clear()


def known(device: torch.device) -> bool:
    """As :func:`native_computes` answered for this GPU; False if it was not asked."""
    return _known.get(device, False)


def native_computes(device: torch.device) -> bool:
    """Whether native computes on a GPU unnamed. Warn where it could, but has no pass."""
    if device not in _known:
        if not torch.cuda.is_available() or native.unable(device, torch.float32) is not None:
            return False
        # Before kernels are loaded, which may take long: the driver may compile them.
        passed = has(kind_of(device))
        if passed and native.supports(device, torch.float32) is not None:
            return False  # which may change: the GPU may be busy
        if not passed:
            _warn_once()
        _known[device] = passed
    return _known[device]


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "the backend torch computes on the GPU, as the CUDA kernels have not passed pfgm check on "
        "it; run pfgm check, or set PFGM_BACKEND=native to take them untested",
        RuntimeWarning,
        stacklevel=2,
    )
