"""Peak memory of one posterior mean beyond its arguments and results (peak_memory.py).

pytest benchmarks/cpu/bench_memory.py --benchmark-only --store
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from benchmarks.common.folders import ROOT

SUBJECTS = [
    ("CIFAR-10 shape", (128, 4096, 3072), "float32", "native", "forward"),
    ("CIFAR-10 shape", (128, 4096, 3072), "float32", "torch path", "forward"),
    ("CIFAR-10 shape", (128, 4096, 3072), "float32", "native", "backward"),
    ("CIFAR-10 shape", (128, 4096, 3072), "float32", "torch path", "backward"),
    ("Fashion-MNIST's shape", (256, 60000, 784), "uint8", "native", "forward"),
    ("Fashion-MNIST's shape", (256, 60000, 784), "float32", "native", "forward"),
    ("Fashion-MNIST's shape", (256, 60000, 784), "float32", "torch path", "forward"),
    ("a million references", (1024, 1_000_000, 64), "float32", "native", "forward"),
    ("large batch", (4096, 4096, 3072), "float32", "native", "forward"),
]


def extra_megabytes(*arguments: object) -> float:
    """The number that benchmarks.cpu.peak_memory prints, run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.peak_memory", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "path", "passes"),
    SUBJECTS,
    ids=[f"{name}, {dtype}, {path}, {passes}" for name, _, dtype, path, passes in SUBJECTS],
)
def bench_memory(
    name: str, shape: tuple[int, int, int], dtype: str, path: str, passes: str, benchmark: Any
) -> None:
    """Measures only memory. The time is that of a whole process and means nothing."""
    B, M, N = (4, 100, 64) if benchmark.disabled else shape
    megabytes = benchmark.pedantic(extra_megabytes, (B, M, N, dtype, path, passes), rounds=1)
    benchmark.group = "memory"
    benchmark.extra_info |= {
        "subject": f"{name}, {passes}",
        "path": path,
        "references": dtype,
        "B, M, N": shape,
        "megabytes": megabytes,
        "megabytes of references": M * N * (1 if dtype == "uint8" else 4) / 2**20,
    }
    if path == "native":
        assert megabytes <= 64
