"""An Euler step from a network's output on CIFAR-10's shape: time beside torch and a plain copy.

    pytest benchmarks/cpu/bench_ode_step.py --benchmark-only --store

- ``native`` is the step as the solvers take it, in place.
- ``published`` is the published sampler's sequence of torch calls for the same step.
- ``compiled`` is the same under torch.compile.
- ``add`` reads and writes exactly what the step must: x and field_x, then x.
- ``copy`` moves as many bytes as ``add``, in 1.5 times as much memory.

``add`` and ``copy`` show the best time that a step can reach, inside and outside the cache. Paths
take turns in one run. Right before each timed call the same path runs untimed, which leaves its
data in the caches.

Temporaries take most of the published time where the allocator returns their memory to the system
at each step, as glibc does (``page faults``). To measure without that, set MALLOC_TRIM_THRESHOLD_
and MALLOC_MMAP_THRESHOLD_ to 10000000000 in the environment.

``extra_info`` holds the page faults of each path, and the largest relative error of a row of
``native`` against the exact step in float64.
"""

from __future__ import annotations

import functools
import math
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.ode_steps import (
    Z_EXP,
    Points,
    Step,
    our_step,
    points,
    published_step,
    step_errors,
)
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay

pytestmark = pytest.mark.benchmark(timer=replay)

N = 3072
STEPS, Z_MAX, Z_MIN = 100, 40.0, 1e-3
DT = math.log(Z_MIN / Z_MAX) / STEPS
TURNS = 31


def euler_from(z: float) -> Step:
    """A step of the sampler from level z."""
    return Step("euler", z, z * math.exp(DT), math.inf)


def add(at: Points) -> Tensor:
    """Moves the bytes of a step with almost no arithmetic."""
    return at.x.add_(at.field_x, alpha=1e-6)


def copy(B: int) -> Callable[[Points], Tensor]:
    """A copy that moves as many bytes as a step of B points."""
    source = torch.ones(3 * B * N // 2)
    target = torch.empty_like(source)
    return lambda at: target.copy_(source)


def page_faults(path: Callable[[], Any]) -> int:
    """Page faults of one call, after two calls that touch memory for the first time."""
    path()
    path()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    path()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def paths(step: Step, B: int) -> dict[str, Callable[[], Any]]:
    """The call of each path, on B points of its own."""
    published = functools.partial(published_step, step)
    calls: dict[str, Callable[[Points], Any]] = {
        "native": functools.partial(our_step, step, "native"),
        "published": published,
        "compiled": torch.compile(published),
        "add": add,
        "copy": copy(B),
    }
    return {name: functools.partial(call, points(B, N, step.z)) for name, call in calls.items()}


@functools.lru_cache(maxsize=1)
def measure(B: int, z: float) -> Measured:
    step = euler_from(z)
    torch._dynamo.reset()
    with torch.no_grad():
        run = paths(step, B)
        faults = {name: page_faults(path) for name, path in run.items()}
        error = step_errors(step, "native", points(B, N, z))["points"]
        facts = {"B, N": (B, N), "page faults": faults, "error": error}
        return measure_paths(run, TURNS, facts, warm=True)


@pytest.mark.parametrize("path", ["native", "published", "compiled", "add", "copy"])
@pytest.mark.parametrize("z", [1.0, 20.0], ids=["substituted", "given"])
@pytest.mark.parametrize("B", [128, 512, 1024])
def bench_euler_step(B: int, z: float, path: str, benchmark: Any) -> None:
    """The published sampler substitutes field_z in 80 of its 100 steps: it does at z = 1, not at z
    = 20."""
    if benchmark.disabled:
        benchmark(paths(euler_from(z), 2)[path])
        assert step_errors(euler_from(z), "native", points(2, N, z))["points"] <= 1e-6
        return
    measured = measure(B, z)
    substituted = "field_z substituted" if z < Z_EXP else "field_z as given"
    add_row(benchmark, f"Euler step, B = {B}, {substituted}", path, measured)
    assert measured.facts["error"] <= 1e-6
