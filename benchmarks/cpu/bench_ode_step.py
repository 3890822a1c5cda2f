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
from benchmarks.common import published_ode
from benchmarks.common.posterior_paths import GAMMA
from benchmarks.common.published_ode import Z_EXP
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay

pytestmark = pytest.mark.benchmark(timer=replay)

SHAPE = (3, 32, 32)
N = math.prod(SHAPE)
STEPS, Z_MAX, Z_MIN = 100, 40.0, 1e-3
DT = math.log(Z_MIN / Z_MAX) / STEPS
TURNS = 31


class Case(NamedTuple):
    """Points (B, *SHAPE) at a level z, a network's field there, and t = log z of each row."""

    x: Tensor
    field_x: Tensor
    field_z: Tensor
    z: float
    t: Tensor


def build(B: int, z: float) -> Case:
    """Points around random data at level z, and their exact field."""
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(16, *SHAPE, generator=generator) * 2 - 1
    x = data[torch.arange(B) % 16] + z * torch.randn(B, *SHAPE, generator=generator)
    field_x, field_z = pfgm.field_fn(x, z, data)
    return Case(x, field_x, field_z, z, torch.full((B,), math.log(z)))


def native(case: Case) -> Tensor:
    """The library's step, in place."""
    return pfgm.euler_step(
        case.x,
        pfgm.Field(case.field_x, case.field_z, gamma=GAMMA, z_exp=Z_EXP),
        case.z,
        case.z * math.exp(DT),
        out=case.x,
        backend="native",
    )


def published(case: Case) -> Tensor:
    """The published step, which asks for the level at every step."""
    return _published_step(case.x, case.field_x, case.field_z, math.exp(float(case.t.mean())))


def _published_step(x: Tensor, field_x: Tensor, field_z: Tensor, z: float) -> Tensor:
    slope = published_ode.slope(x.flatten(1), field_x.flatten(1), field_z, z)
    return x + DT * slope.view(x.shape)


def compiled() -> Callable[[Case], Tensor]:
    """The published step under torch.compile."""
    step = torch.compile(_published_step)
    return lambda case: step(case.x, case.field_x, case.field_z, math.exp(float(case.t.mean())))


def add(case: Case) -> Tensor:
    """Moves the bytes of a step with almost no arithmetic."""
    return case.x.add_(case.field_x, alpha=1e-6)


def copy(B: int) -> Callable[[Case], Tensor]:
    """A copy that moves as many bytes as a step of B points."""
    source = torch.ones(3 * B * N // 2)
    target = torch.empty_like(source)
    return lambda case: target.copy_(source)


def page_faults(path: Callable[[], Tensor]) -> int:
    """Page faults of one call, after two calls that touch memory for the first time."""
    path()
    path()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    path()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def error(case: Case) -> float:
    """The largest relative error of a row of native, against float64."""
    x, field_x, field_z = (t.double() for t in (case.x, case.field_x, case.field_z))
    z = case.z
    exact = pfgm.euler_step(
        x, pfgm.Field(field_x, field_z), z, z * math.exp(DT), backend="reference"
    )
    result = native(case._replace(x=case.x.clone())).double()
    return float(((result - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())


def paths(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The call of each path, on points of its own."""
    steps = {
        "native": native,
        "published": published,
        "compiled": compiled(),
        "add": add,
        "copy": copy(len(case.x)),
    }
    return {
        name: functools.partial(step, case._replace(x=case.x.clone()))
        for name, step in steps.items()
    }


@functools.lru_cache(maxsize=1)
def measure(B: int, z: float) -> Measured:
    case = build(B, z)
    torch._dynamo.reset()
    with torch.no_grad():
        run = paths(case)
        faults = {name: page_faults(path) for name, path in run.items()}
        facts = {"B, N": (B, N), "page faults": faults, "error": error(case)}
        return measure_paths(run, TURNS, facts, warm=True)


@pytest.mark.parametrize("path", ["native", "published", "compiled", "add", "copy"])
@pytest.mark.parametrize("z", [1.0, 20.0], ids=["substituted", "given"])
@pytest.mark.parametrize("B", [128, 512, 1024])
def bench_euler_step(B: int, z: float, path: str, benchmark: Any) -> None:
    """The published sampler substitutes field_z in 80 of its 100 steps: it does at z = 1, not at z
    = 20."""
    if benchmark.disabled:
        case = build(2, z)
        benchmark(paths(case)[path])
        assert error(case) <= 1e-6
        return
    measured = measure(B, z)
    substituted = "field_z substituted" if z < Z_EXP else "field_z as given"
    add_row(benchmark, f"Euler step, B = {B}, {substituted}", path, measured)
    assert measured.facts["error"] <= 1e-6
