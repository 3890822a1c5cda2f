"""Sampling with the exact field of the digits: time, and distance to the nearest digit.

    pytest benchmarks/cpu/bench_sampling.py --benchmark-only --store

The field comes from the library or from the torch path; the solver is the library's. rk45 has no
row for the torch path: it finds no step size, because that field is too rough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pfgm
from benchmarks.common.posterior_paths import torch_path
from benchmarks.common.subjects import Case
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay
from pfgm.backends.reference import normalised_field

pytestmark = pytest.mark.benchmark(timer=replay)

SAMPLES = 1000
SOLVERS = [("euler", 20), ("heun", 10), ("multistep", 20), ("rk45", 1)]
ROWS = [
    (*solver, field)
    for solver in SOLVERS
    for field in ("native", "torch path")
    if (solver[0], field) != ("rk45", "torch path")
]


def torch_field(references: Tensor, gamma: float) -> Callable[[Tensor, Tensor], Any]:
    """The field that EmpiricalField computes, by the torch path."""
    flat = references.flatten(1)

    def field(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = torch_path(Case(x.flatten(1), z, flat))()
        field_x, field_z = normalised_field(x.flatten(1) - mean, z, gamma)
        return field_x.view_as(x), field_z

    return field


def run(solver: str, steps: int, schedule: str, field: str, count: int) -> Callable[[], Any]:
    digits = pfgm.data.digits().train
    flow = pfgm.PoissonFlow.from_data(digits)
    net = flow.empirical(digits) if field == "native" else torch_field(digits, flow.gamma)
    return lambda: flow.sample(
        net,
        count,
        solver=solver,
        steps=steps,
        schedule=schedule,
        generator=torch.Generator().manual_seed(0),
        return_nfe=True,
    )


@functools.lru_cache(maxsize=1)
def measure(solver: str, steps: int, schedule: str) -> Measured:
    fields = [field for *other, field in ROWS if other == [solver, steps]]
    paths = {field: run(solver, steps, schedule, field, SAMPLES) for field in fields}
    measured = {}
    for field, path in paths.items():
        samples, evaluations = path()
        distance = pfgm.metrics.nearest_distance(samples, pfgm.data.digits().train)
        measured[field] = {
            "evaluations": evaluations,
            "within 0.02": float((distance < 0.02).double().mean()),
            "largest distance": float(distance.max()),
        }
    return measure_paths(paths, 3, {"found": measured})


@pytest.mark.parametrize(("solver", "steps", "field"), ROWS)
@pytest.mark.parametrize("schedule", ["log", "rho"])
def bench_empirical_sampling(
    solver: str, steps: int, schedule: str, field: str, benchmark: Any
) -> None:
    if benchmark.disabled:
        benchmark(run(solver, steps, schedule, field, 8))
        return
    measured = measure(solver, steps, schedule)
    add_row(benchmark, f"sampling digits, {solver} {steps}, {schedule}", field, measured)
    if (solver, steps, field) == ("euler", 20, "native"):
        assert measured.facts["found"][field]["within 0.02"] >= 0.99
