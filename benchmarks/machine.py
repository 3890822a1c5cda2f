"""What a stored figure was measured on, and how results are stored."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pfgm.backends import available

RESULTS = Path(__file__).resolve().parent / "results"


def describe() -> dict[str, Any]:
    """Processor, threads, versions, backends and commit."""
    packages = ("pfgm", "torch", "numpy", "torchdiffeq", "pykeops", "diffusers")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "backends": {name: detail for name, (usable, detail) in available().items() if usable},
        "commit": _commit(),
    }


def limits() -> dict[str, float]:
    """What the machine can do now: float32 products in GFLOP/s, a copy in GB/s read and written."""
    a, b = torch.rand(2, 1024, 1024)
    source = torch.rand(16 << 20)
    target = torch.empty_like(source)
    return {
        "sgemm GFLOP/s": 2e-9 * 1024**3 / _seconds(lambda: a @ b),
        "copy GB/s": 2e-9 * source.nbytes / _seconds(lambda: target.copy_(source)),
    }


def _seconds(run: Callable[[], Any]) -> float:
    run()
    found = []
    for _ in range(9):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def store(name: str, result: Any) -> Path:
    """Writes a result with its circumstances to results/NAME.json."""
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "result": result,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache  # before the results of this run change the tree
def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
