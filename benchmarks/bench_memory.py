"""Peak memory of one posterior mean beyond its arguments and results, in a process of its own.

pytest benchmarks/bench_memory.py --benchmark-only --store
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Arguments: B, M, N, dtype of the references, path, whether with the gradient in x.
SCRIPT = """
import resource, sys
import torch
from subjects import Case
from posterior_paths import native, torch_path, with_backward

B, M, N = map(int, sys.argv[1:4])
path = {"native": native, "torch path": torch_path}[sys.argv[5]]
path = with_backward(path) if sys.argv[6] == "backward" else path

def case(B, M):
    generator = torch.Generator().manual_seed(0)
    y = torch.empty(M, N, dtype=getattr(torch, sys.argv[4]))
    if y.dtype == torch.uint8:
        y.random_(generator=generator)
    else:
        y.uniform_(-1, 1, generator=generator)
    x = torch.randn(B, N, generator=generator)
    return Case(x, torch.linspace(0.1, 10, B), y)

path(case(1, 2))()
run = path(case(B, M))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mean, logsumexp = run()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024 - (mean.nbytes + logsumexp.nbytes) / 2**20)
"""
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
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    folder = Path(__file__).resolve().parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "path", "passes"),
    SUBJECTS,
    ids=[f"{name}, {dtype}, {path}, {passes}" for name, _, dtype, path, passes in SUBJECTS],
)
def bench_memory(
    name: str, shape: tuple[int, int, int], dtype: str, path: str, passes: str, benchmark: Any
) -> None:
    """The time is that of the whole process and means nothing."""
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
