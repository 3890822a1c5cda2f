"""The posterior mean on a GPU at the sizes that ``pfgm check`` times, beside what it has to beat.

    pytest benchmarks/gpu/bench_gpu.py

Each call finds cold caches. The error of the mean is stored beside its time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pfgm
from benchmarks.common.subjects import Case
from benchmarks.gpu import contender
from pfgm.backends.timing import plain_mean
from pfgm.backends.trials import SIZES, data_of

BACKENDS = ("native", "triton", "torch")
PATHS = (*BACKENDS, "plain torch", "compiled TF32", "contender")
_CACHE = 1 << 28  # bytes, more than any cache holds
_COMPARED = 8  # points whose error is stored


def call_of(path: str, case: Case, compiled: Any = torch.compile) -> Callable[[], Tensor]:
    """The call of a path that returns the mean (B, N)."""
    x, z, references = case.x, case.z, case.references
    if path in BACKENDS:
        return functools.partial(pfgm.posterior_mean, x, references, r=z, backend=path)
    if path == "contender":
        run = contender.path(compiled)(case)
        return lambda: run()[0]
    mean = compiled(plain_mean) if path == "compiled TF32" else plain_mean
    return lambda: mean(x, references, z)


def error(case: Case, mean: Tensor) -> float:
    """The largest error of the mean of some points, relative to √N."""
    rows = slice(None, None, max(len(mean) // _COMPARED, 1))
    x, z, references = (t.cpu().double() for t in (case.x[rows], case.z[rows], case.references))
    exact = pfgm.posterior_mean(x, references, r=z, backend="reference")
    difference = mean[rows].cpu().double() - exact
    return float(difference.norm(dim=1).max()) / math.sqrt(x.shape[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES)
def test_posterior_mean(benchmark: Any, monkeypatch: Any, size: str, path: str) -> None:
    x, references, z = (t.cuda() for t in data_of(*SIZES[size])[:3])
    case = Case(x, z.float(), references)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", path == "compiled TF32")
    call, cache = call_of(path, case), torch.empty(_CACHE, dtype=torch.uint8, device="cuda")

    def run() -> Tensor:
        mean = call()
        torch.cuda.synchronize()
        return mean

    def cool() -> None:
        cache.zero_()
        torch.cuda.synchronize()

    benchmark.group = size
    benchmark.extra_info |= {"error": error(case, run()), "device": torch.cuda.get_device_name()}
    benchmark.pedantic(run, setup=cool, rounds=50, warmup_rounds=5)
