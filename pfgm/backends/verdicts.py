"""Which backend computes on a GPU: the verdicts of :func:`pfgm.backends.check`, and what follows.

A verdict holds for a kind of GPU, its driver, the versions of torch and Triton, and the sources and
build of pfgm. Each such combination has a file of its own in the user's cache folder, which is
written atomically, so that processes that start together can all read and write it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch

from ..common.files import MALFORMED, write_json
from . import native, triton
from .backend import BACKENDS

SIZES = {
    "digits": (128, 1437, 64),
    "CIFAR-10": (128, 4096, 3072),
    "Fashion-MNIST": (256, 60000, 784),
}
"""Points, references and features of the problems that are timed, the smallest first. The one whose
B·M·N is nearest by ratio decides which backend computes a problem."""


class Verdict(NamedTuple):
    """The result of a check on a GPU."""

    passed: tuple[str, ...]
    """The backends that passed."""
    failures: dict[str, str]
    """Backend → what failed first."""
    speeds: dict[str, dict[str, float]]
    """Problem of :data:`SIZES` → backend → how many times as fast as plain torch."""
    quick: bool
    """Whether it was a quick check."""

    def order(self, size: str) -> tuple[str, ...]:
        """The backends that passed, the fastest at a problem first.

        A quick check has not timed the largest problem. There the next smaller one decides.
        """
        names = list(SIZES)[: list(SIZES).index(size) + 1]
        speeds = next((self.speeds[name] for name in reversed(names) if self.speeds.get(name)), {})
        return tuple(sorted(self.passed, key=lambda backend: -speeds.get(backend, 0.0)))

    def __str__(self) -> str:
        fastest = ", ".join(f"{(self.order(size) or ('none',))[0]} for {size}" for size in SIZES)
        failed = "".join(f"; {name} failed ({why})" for name, why in self.failures.items())
        kind = "a quick check" if self.quick else "a whole check"
        return f"{kind}; passed {', '.join(self.passed) or 'none'}{failed}; fastest {fastest}"


# ---- the file ----------------------------------------------------------------------------------


def folder() -> Path:
    """The folder of the verdicts, which may be missing."""
    return Path(platformdirs.user_cache_dir("pfgm")) / "verdicts"


_SWITCHES = ("PFGM_CUDA_OVERLAP", "PFGM_CUDA_WARPGROUPS")


@functools.cache
def _sources() -> str:
    """The digest of the Python sources that compute, and of Triton's kernels."""
    digest = hashlib.sha256()
    kernels = importlib.util.find_spec("pfgm.kernels")  # a checkout has none
    backends = Path(__file__).parent
    places = [backends, backends.parent / "core"]
    if kernels is not None:
        places += map(Path, kernels.submodule_search_locations or ())
    for path in (path for place in places for path in sorted(place.glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _driver() -> str:
    """The version of NVIDIA's driver, else of the CUDA or ROCm that torch uses."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        return str(torch.version.hip or torch.version.cuda)


@functools.cache
def _conditions(name: str) -> dict[str, Any]:
    """What a verdict on a GPU of this name holds for."""
    build = native.extension().build_info() if native.has_extension() else None
    return {
        "device": name,
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.installed(),
        "sources": _sources(),
        "extension": build,
        "switches": {name: os.environ.get(name) for name in _SWITCHES},
    }


def _kind(device: torch.device) -> str | None:
    """The name of a GPU; None of other devices, and where torch finds no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device)


def _path(kind: str) -> Path:
    text = json.dumps(_conditions(kind), sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(kind: str) -> Verdict | None:
    """The verdict in the file; None if there is no file, or it is damaged."""
    try:
        content = json.loads(_path(kind).read_text())
        speeds = {
            str(size): {str(name): float(speed) for name, speed in of.items()}
            for size, of in content["speeds"].items()
        }
        failures = {str(name): str(why) for name, why in content["failures"].items()}
        passed = tuple(name for name in BACKENDS if name in content["passed"])
        return Verdict(passed, failures, speeds, bool(content["quick"]))
    except MALFORMED:
        return None


# ---- what follows ------------------------------------------------------------------------------

_LIMITS = [
    math.sqrt(math.prod(one) * math.prod(next_one))
    for one, next_one in itertools.pairwise(SIZES.values())
]
_verdicts: dict[str, Verdict] = {}
"""Those that this process knows, by the name of the GPU."""
_orders: dict[torch.device, tuple[tuple[str, ...], ...]] = {}
"""GPU → for each of SIZES the backends in the order of preference."""
_UNPROVEN: tuple[tuple[str, ...], ...] = (("torch",),) * len(SIZES)


def find(device: torch.device) -> Verdict | None:
    """The verdict on a GPU; None without one, and on other devices."""
    if (kind := _kind(device)) is None:
        return None
    if kind not in _verdicts and (verdict := _read(kind)) is not None:
        _verdicts[kind] = verdict
    return _verdicts.get(kind)


def keep(device: torch.device, verdict: Verdict) -> str:
    """Decides by a verdict from now on, and writes it. Returns where it is kept, or why it is not.

    What a whole check found wrong stays wrong after a quick one.
    """
    kind = _kind(device)
    assert kind is not None
    before = find(device)
    if verdict.quick and before is not None and not before.quick:
        failures = verdict.failures | before.failures
        passed = tuple(name for name in verdict.passed if name not in failures)
        speeds = before.speeds | {size: each for size, each in verdict.speeds.items() if each}
        verdict = Verdict(passed, failures, speeds, quick=False)
    _verdicts[kind] = verdict
    _orders.clear()
    path = _path(kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, verdict._asdict() | {"conditions": _conditions(kind)})
    except OSError as error:
        return f"The verdict is not kept, and holds for this process alone: {error}"
    return f"The verdict is kept in {path}."


def needed(device: torch.device) -> bool:
    """Whether kernels could compute on a GPU if they had proved themselves there."""
    return device.type == "cuda" and find(device) is None and _has_kernels(device)


def _has_kernels(device: torch.device) -> bool:
    names = ("native", "triton")
    return any(BACKENDS[name].supports(device, torch.float32) is None for name in names)


def order(device: torch.device, work: int) -> tuple[str, ...]:
    """The backends for an operation on a GPU, in the order of preference.

    Args:
        device: the GPU.
        work: the product of its sizes, B·M·N, or B·N without references.
    """
    return known_order(device, work) or _find_orders(device)[_class_of(work)]


def known_order(device: torch.device, work: int) -> tuple[str, ...]:
    """The same if an operation has asked before, else nothing."""
    orders = _orders.get(device)
    return () if orders is None else orders[_class_of(work)]


def _class_of(work: int) -> int:
    """The number of the problem of :data:`SIZES` that is nearest by ratio."""
    return (work > _LIMITS[0]) + (work > _LIMITS[1])


def _find_orders(device: torch.device) -> tuple[tuple[str, ...], ...]:
    verdict = find(device)
    orders = _UNPROVEN
    if verdict is None:
        if _has_kernels(device):
            _warn_of_unproven(device)
    else:
        orders = tuple(verdict.order(size) for size in SIZES)
    _orders[device] = orders
    return orders


@functools.cache
def _warn_of_unproven(device: torch.device) -> None:
    warnings.warn(
        f"{device} computes with the backend torch until the kernels have proved themselves there, "
        f"which takes a minute: pfgm check --device {device}",
        RuntimeWarning,
        stacklevel=2,
    )


def lines() -> list[str]:
    """The verdict on each kind of GPU, for ``pfgm info``."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    kinds = {torch.cuda.get_device_name(gpu): gpu for gpu in reversed(gpus)}
    verdicts = {kind: find(torch.device("cuda", gpu)) for kind, gpu in kinds.items()}
    return [
        f"verdict    {kind}: {verdict or f'none; pfgm check --device cuda:{kinds[kind]} finds one'}"
        for kind, verdict in verdicts.items()
    ]


def title(device: torch.device) -> str:
    """A device and what else results depend on, in a line."""
    kind = _kind(device)
    name = platform.machine() if kind is None else f"{kind}, driver {_driver()}"
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    return f"{device}: {name}{threads}, torch {torch.__version__}, Triton {triton.installed()}"
