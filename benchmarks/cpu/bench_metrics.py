"""What the comparison of samples with data costs: precision and recall of 32 × 32 RGB images.

    pytest benchmarks/cpu/bench_metrics.py --benchmark-only --store

- ``products`` is the library: matrix products, and exact differences where these leave a decision
  open.
- ``differences`` finds each distance from differences.
- ``known`` is the library where the data's own neighbours are known, as in a training run after its
  first evaluation.

Times are those of the processor, on one thread, and paths take turns. Figures of ``products`` and
``known`` must be those of ``differences``, or for the largest set those of some of its rows.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.machine import limits
from benchmarks.common.turns import take_turns
from benchmarks.cpu.rows import Measured, add_row, replay
from pfgm import metrics
from pfgm.metrics import PrecisionRecall

pytestmark = pytest.mark.benchmark(timer=replay)

SHAPE, K = (3, 32, 32), 3
LARGE = (1000, 10_000)  # too many rows for differences of all pairs
SIZES = [(200, 1000), (200, 2000), (200, 4000), (2000, 2000), LARGE]
SHORT = 2_000_000  # pairs, up to which there are three turns
CHECKED = slice(None, None, 500)  # rows of the largest set


def sets(n: int, m: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples, real = (2 * torch.rand(k, *SHAPE, generator=generator) - 1 for k in (n, m))
    return samples, real


def differences(a: Tensor, b: Tensor) -> Tensor:
    """All distances (n, m), in calls of a second at most."""
    rows, others = a.flatten(1).double(), b.flatten(1).double()
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, others, compute_mode=mode) for part in rows.split(32)])


def by_differences(samples: Tensor, real: Tensor) -> PrecisionRecall:
    across = differences(samples, real)
    radii, real_radii = (
        differences(rows, rows).topk(K + 1, largest=False).values[:, -1] for rows in (samples, real)
    )
    inside, covered = across <= real_radii, across <= radii[:, None]
    return PrecisionRecall(
        int(inside.any(1).sum()) / len(samples), int(covered.any(0).sum()) / len(real)
    )


def paths(n: int, m: int) -> dict[str, Callable[[], PrecisionRecall]]:
    samples, real = sets(n, m)
    neighbours = metrics.neighbour_distances(real, K)
    calls = {
        "products": lambda: metrics.precision_recall(samples, real, K),
        "known": lambda: metrics.precision_recall(samples, real, K, neighbours=neighbours),
    }
    if (n, m) != LARGE:
        calls["differences"] = lambda: by_differences(samples, real)
    return calls


def check(n: int, m: int, calls: dict[str, Callable[[], PrecisionRecall]]) -> None:
    samples, real = sets(n, m)
    if "differences" in calls:
        assert calls["products"]() == calls["known"]() == calls["differences"]()
        return
    found = metrics.neighbour_distances(real, K)[CHECKED]
    nearest = differences(real[CHECKED], real).topk(K + 1, largest=False).values[:, 1:]
    assert torch.equal(found, nearest)
    expected = differences(samples[CHECKED], real).amin(1)
    assert torch.equal(metrics.nearest_distance(samples[CHECKED], real), expected)


def processor_seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


@functools.lru_cache(maxsize=1)
def measure(n: int, m: int) -> Measured:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = paths(n, m)
        check(n, m, calls)
        turns = 3 if n * m + m * m <= SHORT else 1
        seconds = take_turns(
            {path: [call] for path, call in calls.items()}, processor_seconds, turns
        )
        conditions = {"threads": 1, "load": os.getloadavg(), **limits()}
    finally:
        torch.set_num_threads(threads)
    return Measured(seconds, conditions)


@pytest.mark.parametrize("path", ["products", "known", "differences"])
@pytest.mark.parametrize(("n", "m"), SIZES)
def bench_precision_recall(n: int, m: int, path: str, benchmark: Any) -> None:
    if (n, m) == LARGE and path == "differences":
        pytest.skip("takes some five minutes")
    if benchmark.disabled:
        calls = paths(n // 10, m // 50)
        benchmark(calls[path])
        check(n // 10, m // 50, calls)
        return
    add_row(benchmark, f"{n} samples against {m} rows", path, measure(n, m))
