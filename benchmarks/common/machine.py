"""The machine that figures were measured on, and the files that keep them."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.folders import RESULTS, ROOT
from benchmarks.common.turns import Call, host_seconds
from pfgm.backends import available
from pfgm.common.files import write_json


def describe() -> dict[str, Any]:
    """Processor, threads, versions, backends and commit."""
    packages = ("pfgm", "torch", "numpy", "torchdiffeq", "diffusers")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "backends": {name: detail for name, (usable, detail) in available().items() if usable},
        "PFGM_BACKEND": os.environ.get("PFGM_BACKEND"),
        "commit": _commit(),
    }


def limits() -> dict[str, float]:
    """Rates that the machine reaches now.

    A float32 product in GFLOP/s, and a copy in GB/s read and written.
    """
    a, b = torch.rand(2, 1024, 1024)
    source = torch.rand(16 << 20)
    target = torch.empty_like(source)
    return {
        "sgemm GFLOP/s": 2e-9 * 1024**3 / _median_seconds(lambda: a @ b),
        "copy GB/s": 2e-9 * source.nbytes / _median_seconds(lambda: target.copy_(source)),
    }


def _median_seconds(call: Call) -> float:
    call()
    return statistics.median(host_seconds(call) for _ in range(9))


def store(name: str, result: Any) -> Path:
    """Writes a result with date and machine to results/NAME.json."""
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "result": result,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)
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


@functools.cache  # read once: results that this run stores change the tree
def _commit() -> str:
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"
