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
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pfgm
from benchmarks.common.posterior_paths import GAMMA
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay
from pfgm.backends.reference import normalised_field

pytestmark = pytest.mark.benchmark(timer=replay)

N = 3072
STEPS, Z_MAX, Z_MIN = 100, 40.0, 1e-3
DT = math.log(Z_MIN / Z_MAX) / STEPS
Z_EXP = 5.0  # below this level the sampler replaces the network's field_z
TURNS = 31


class Points(NamedTuple):
    """Points (B, N) and a network's field there."""

    x: Tensor
    field_x: Tensor
    field_z: Tensor


def points(B: int, z: float) -> Points:
    """Points around random data at level z."""
    generator = torch.Generator().manual_seed(0)
    mean = (torch.rand(16, N, generator=generator) * 2 - 1)[torch.arange(B) % 16]
    difference = z * torch.randn(B, N, generator=generator)
    return Points(mean + difference, *normalised_field(difference, torch.full((B,), z), GAMMA))


def our_step(z: float, at: Points, backend: str = "native") -> Tensor:
    """The step by the library, in place."""
    field = pfgm.Field(at.field_x, at.field_z)
    return pfgm.euler_step(at.x, field, z, z * math.exp(DT), out=at.x, backend=backend)


def published_step(z: float, at: Points) -> Tensor:
    """The published step, each intermediate in memory.

    The level is a number here; the published code asks the device for it at every step.
    """
    x, field_x, field_z = at
    if z < Z_EXP:
        root = math.sqrt(x.shape[1])
        norm = field_x.norm(p=2, dim=1) / root
        distance = GAMMA * norm / (1 - norm)
        distance = torch.sqrt(distance**2 + z**2)
        field_z = -root * torch.ones_like(field_z) * z / (distance + GAMMA)
    v = torch.cat([field_x, field_z[:, None]], dim=1)
    return x + DT * (z * v[:, :-1] * (1 / (v[:, -1] + 1e-5))[:, None])


def error(B: int, z: float) -> float:
    """The largest relative error of a row."""
    exact = our_step(z, Points(*(t.double() for t in points(B, z))), "reference")
    difference = our_step(z, points(B, z)).double() - exact
    return float((difference.norm(dim=1) / exact.norm(dim=1)).max())


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


def paths(z: float, B: int) -> dict[str, Callable[[], Any]]:
    """The call of each path, on B points of its own."""
    published = functools.partial(published_step, z)
    calls: dict[str, Callable[[Points], Any]] = {
        "native": functools.partial(our_step, z),
        "published": published,
        "compiled": torch.compile(published),
        "add": add,
        "copy": copy(B),
    }
    return {name: functools.partial(call, points(B, z)) for name, call in calls.items()}


@functools.lru_cache(maxsize=1)
def measure(B: int, z: float) -> Measured:
    torch._dynamo.reset()
    with torch.no_grad():
        run = paths(z, B)
        faults = {name: page_faults(path) for name, path in run.items()}
        facts = {"B, N": (B, N), "page faults": faults, "error": error(B, z)}
        return measure_paths(run, TURNS, facts, warm=True)


@pytest.mark.parametrize("path", ["native", "published", "compiled", "add", "copy"])
@pytest.mark.parametrize("z", [1.0, 20.0], ids=["substituted", "given"])
@pytest.mark.parametrize("B", [128, 512, 1024])
def bench_euler_step(B: int, z: float, path: str, benchmark: Any) -> None:
    """The published sampler substitutes field_z in 80 of its 100 steps: it does at z = 1, not at z
    = 20."""
    if benchmark.disabled:
        benchmark(paths(z, 2)[path])
        assert error(2, z) <= 1e-6
        return
    measured = measure(B, z)
    substituted = "field_z substituted" if z < Z_EXP else "field_z as given"
    add_row(benchmark, f"Euler step, B = {B}, {substituted}", path, measured)
    assert measured.facts["error"] <= 1e-6
