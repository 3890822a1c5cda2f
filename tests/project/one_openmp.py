"""Fails unless the extension computes on the threads of torch's OpenMP, and no other is loaded.

A script, because it counts the threads of a process. It needs /proc.
"""

import os
import re
from pathlib import Path

import torch

import pfgm


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


torch.set_num_threads(3)
references = torch.randn(20_000, 64)
before = count_threads()
with pfgm.use_backend("native"):
    pfgm.posterior_mean(references[:256], references, r=1.0)
after_pfgm = count_threads()
assert after_pfgm == before + 2, f"{after_pfgm - before} threads of a pool stay after pfgm, not 2"
torch.ones(10_000_000).exp()
assert count_threads() == after_pfgm, "torch started other threads than pfgm"
maps = Path("/proc/self/maps").read_text().splitlines()
files = {line.split()[-1] for line in maps if "/" in line}
runtimes = [file for file in files if re.search("lib(g|i)?omp", file)]
assert len(runtimes) == 1, f"OpenMP is loaded from {', '.join(sorted(runtimes))}"
print(f"pfgm and torch {torch.__version__} share {runtimes[0]}")
