"""An Euler step from a network's output on CIFAR-10's shape: time beside torch and a plain copy.

    pytest benchmarks/cpu/bench_ode_step.py --benchmark-only --store

``native`` is the step as the solvers take it, in place. ``published`` is the sequence of torch
calls of the published sampler for the same step, ``compiled`` the same under torch.compile. ``add``
reads and writes what the step must (x and field_x, then x), ``copy`` moves as many bytes in half
as much memory again: bounds inside and outside the cache. They take turns in one run, each after a
call of its own that is not timed and leaves the caches as it likes them.

Temporaries are most of the published time where the allocator hands their memory back to the
system at each step (glibc's habit; ``page faults``). To see it without, set
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to 10000000000 in the environment.

``extra_info`` holds the page faults of each, and the worst relative error of a row of native
against the exact step in float64.
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
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay

pytestmark = pytest.mark.benchmark(timer=replay)

SHAPE = (3, 32, 32)
N = math.prod(SHAPE)
GAMMA, Z_EXP = 5.0, 5.0
STEPS, Z_MAX, Z_MIN = 100, 40.0, 1e-3
DT = math.log(Z_MIN / Z_MAX) / STEPS
TURNS = 31


class Case(NamedTuple):
    """Points (B, *SHAPE), a network's field there, their level and, as published, its log a row."""

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
    return pfgm.euler_step(
        case.x,
        case.field_x,
        case.field_z,
        case.z,
        case.z * math.exp(DT),
        gamma=GAMMA,
        z_exp=Z_EXP,
        out=case.x,
        backend="native",
    )


def published(case: Case) -> Tensor:
    """x + dt z dx/dz, each intermediate in memory; below z_exp the published substitution."""
    z = math.exp(float(case.t.mean()))
    return _published_step(case.x, case.field_x, case.field_z, z)


def _published_step(x: Tensor, field_x: Tensor, field_z: Tensor, z: float) -> Tensor:
    field_x = field_x.view(len(x), -1)
    if z < Z_EXP:
        root = math.sqrt(N)
        norm = field_x.norm(p=2, dim=1) / root
        distance = GAMMA * norm / (1 - norm)
        distance = torch.sqrt(distance**2 + z**2)
        field_z = -root * torch.ones_like(field_z) * z / (distance + GAMMA)
    v = torch.cat([field_x, field_z[:, None]], dim=1)
    dt_dz = 1 / (v[:, -1] + 1e-5)
    dx_dt = v[:, :-1].view(x.shape)
    dx_dz = dx_dt * dt_dz.view(-1, 1, 1, 1)
    drift = z * dx_dz
    return x + drift * DT


def compiled() -> Callable[[Case], Tensor]:
    step = torch.compile(_published_step)
    return lambda case: step(case.x, case.field_x, case.field_z, math.exp(float(case.t.mean())))


def add(case: Case) -> Tensor:
    return case.x.add_(case.field_x, alpha=1e-6)


def copy(B: int) -> Callable[[Case], Tensor]:
    source = torch.ones(3 * B * N // 2)
    target = torch.empty_like(source)
    return lambda case: target.copy_(source)


def page_faults(path: Callable[[], Tensor]) -> int:
    """Of one call, after the calls that fault once and for all."""
    path()
    path()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    path()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def error(case: Case) -> float:
    """Of native, against the exact step in float64."""
    x, field_x, field_z = (t.double() for t in (case.x, case.field_x, case.field_z))
    z = case.z
    exact = pfgm.euler_step(x, field_x, field_z, z, z * math.exp(DT), backend="reference")
    found = native(case._replace(x=case.x.clone())).double()
    return float(((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())


def paths(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Every path with points of its own."""
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
    """z = 1 is one of the 80 steps of 100 that substitute field_z, z = 20 one of the others."""
    if benchmark.disabled:
        case = build(2, z)
        benchmark(paths(case)[path])
        assert error(case) <= 1e-6
        return
    measured = measure(B, z)
    substituted = "field_z substituted" if z < Z_EXP else "field_z as given"
    add_row(benchmark, f"Euler step, B = {B}, {substituted}", path, measured)
    assert measured.facts["error"] <= 1e-6
