"""What a stored figure was measured on, and how results are stored."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from pfgm.backends import available

RESULTS = Path(__file__).resolve().parent / "results"


def describe() -> dict[str, Any]:
    """Processor, threads, versions, backends and commit."""
    packages = ("pfgm", "torch", "numpy", "torchdiffeq")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "backends": {name: detail for name, (usable, detail) in available().items() if usable},
        "commit": _commit(),
    }


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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
