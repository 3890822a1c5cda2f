"""Prints the peak memory of one posterior mean, in MiB beyond its arguments and results.

    python -m benchmarks.cpu.peak_memory B M N DTYPE PATH PASSES

DTYPE is that of the references, PATH "native" or "torch path", PASSES "forward" or "backward"
(forward, then the gradient in x). Each measurement needs a process of its own, because the system
counts the peak of a whole process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.common.posterior_paths import PATHS, with_backward
from benchmarks.common.subjects import Case


def random_case(B: int, M: int, N: int, dtype: torch.dtype) -> Case:
    """Random queries and references."""
    generator = torch.Generator().manual_seed(0)
    y = torch.empty(M, N, dtype=dtype)
    if dtype == torch.uint8:
        y.random_(generator=generator)
    else:
        y.uniform_(-1, 1, generator=generator)
    x = torch.randn(B, N, generator=generator)
    return Case(x, torch.linspace(0.1, 10, B), y)


def kilobytes(name: str) -> int:
    """A figure of this process in Linux's list: VmRSS is its memory, VmHWM the most it has held.

    ru_maxrss would also hold the memory of the process that started this one.
    """
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1])


def main() -> None:
    B, M, N = map(int, sys.argv[1:4])
    dtype: torch.dtype = getattr(torch, sys.argv[4])
    path = PATHS[sys.argv[5]]
    if sys.argv[6] == "backward":
        path = with_backward(path)
    path(random_case(1, 2, N, dtype))()  # allocates what stays for the whole process
    call = path(random_case(B, M, N, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    mean, logsumexp = call()
    extra = (kilobytes("VmHWM") - before) / 1024
    print(extra - (mean.nbytes + logsumexp.nbytes) / 2**20)


if __name__ == "__main__":
    main()
