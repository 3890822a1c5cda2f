"""What a call costs: functions on tensors so small that hardly anything is computed.

    pytest benchmarks/cpu/bench_calls.py --benchmark-only --store

- ``native`` is the function as it is: one call of the CPU kernels.
- ``operators`` takes the way through torch's operators, as where a gradient is wanted.
- ``torch`` is the formula in plain torch with the fewest operations.

The subject of 100 Euler steps is a run of the solver with a network that costs nothing and returns
the same field each time. It checks each time that the field is finite; ``torch`` checks it too.
Paths take turns in one run of one thread.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pfgm
from benchmarks.common.posterior_paths import GAMMA
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay
from pfgm import Field
from pfgm.ops import eager
from pfgm.solvers import euler, log_grid

pytestmark = pytest.mark.benchmark(timer=replay)

B, M, N = 4, 16, 8
LONG_B, LONG_N, STEPS = 64, 64, 100
Z, Z_NEXT, Z_PREVIOUS = 2.0, 1.0, 4.0  # below z_exp: field_z is replaced
CALLS = 50  # in a timed turn

Call = Callable[[], Any]


class Tensors:
    """Points, references and a field, all small."""

    def __init__(self, rows: int = B, features: int = N) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(count: int) -> Tensor:
            return torch.randn(count, features, generator=generator)

        self.x, self.before, self.references = normal(rows), normal(rows), normal(M)
        self.field_x = 0.3 * normal(rows)
        self.field_z = -torch.rand(rows, generator=generator) - 0.1
        self.levels = [torch.full((rows,), level) for level in (Z, Z_NEXT)]


# ---- the formulas in plain torch ---------------------------------------------------------------


def torch_mean(t: Tensors) -> Tensor:
    squared = torch.cdist(t.x, t.references).square() + Z * Z
    return torch.softmax(-(N + 1) / 2 * squared.log(), 1) @ t.references


def torch_field(t: Tensors) -> tuple[Tensor, Tensor]:
    difference = t.x - torch_mean(t)
    norm = (difference.square().sum(1) + Z * Z).sqrt()
    scale = -math.sqrt(N) / (norm + GAMMA)
    return scale[:, None] * difference, scale * Z


def torch_mean_factor(field_x: Tensor, z: float) -> Tensor:
    """t with mean = x + t v_x, from the field_z that field_x implies."""
    root = math.sqrt(field_x.shape[1])
    n = torch.linalg.vector_norm(field_x, dim=1) / root
    square = n * n
    e_x = n * (GAMMA + (square * GAMMA**2 + (1 - square) * z**2).sqrt()) / (1 - square)
    mean_factor: Tensor = ((e_x * e_x + z * z).sqrt() + GAMMA) / root
    return mean_factor


def torch_euler(x: Tensor, field_x: Tensor, z: float, z_next: float) -> Tensor:
    mean_factor = (z - z_next) / z * torch_mean_factor(field_x, z)
    return torch.addcmul(x, mean_factor[:, None], field_x)


def torch_multistep(t: Tensors) -> tuple[Tensor, Tensor]:
    w = math.log(Z / Z_NEXT) / (2 * math.log(Z_PREVIOUS / Z))
    mean = torch.addcmul(t.x, torch_mean_factor(t.field_x, Z)[:, None], t.field_x)
    ahead = torch.lerp(t.before, mean, 1 + w)
    return torch.lerp(t.x, ahead, (Z - Z_NEXT) / Z), mean


def torch_run(t: Tensors, grid: list[float]) -> Tensor:
    x = t.x
    for z, z_next in itertools.pairwise(grid):
        if not (bool(t.field_x.isfinite().all()) and bool(t.field_z.isfinite().all())):
            raise ValueError("the field is not finite.")
        x = torch_euler(x, t.field_x, z, z_next)
    return x


# ---- the subjects ------------------------------------------------------------------------------


def subjects(t: Tensors, long: Tensors) -> dict[str, tuple[Call, Call | None]]:
    """Subject → the library's call, and plain torch's."""
    grid = log_grid(4.0, 1e-3, STEPS)
    field = Field(long.field_x, long.field_z, GAMMA)
    z, z_next = t.levels
    return {
        "field_fn": (
            lambda: pfgm.field_fn(t.x, Z, t.references, gamma=GAMMA),
            lambda: torch_field(t),
        ),
        "posterior_mean": (
            lambda: pfgm.posterior_mean(t.x, t.references, r=Z),
            lambda: torch_mean(t),
        ),
        "euler_step": (
            lambda: pfgm.euler_step(t.x, Field(t.field_x, t.field_z), Z, Z_NEXT),
            lambda: torch_euler(t.x, t.field_x, Z, Z_NEXT),
        ),
        "euler_step, levels in tensors": (
            lambda: pfgm.euler_step(t.x, Field(t.field_x, t.field_z), z, z_next),
            None,
        ),
        "heun_step": (
            lambda: pfgm.heun_step(t.x, t.before, Field(t.field_x, t.field_z), Z, Z_NEXT),
            None,
        ),
        "multistep_step": (
            lambda: pfgm.multistep_step(
                t.x, Field(t.field_x, t.field_z), Z, Z_NEXT, t.before, Z_PREVIOUS
            ),
            lambda: torch_multistep(t),
        ),
        f"{STEPS} Euler steps, {LONG_B} × {LONG_N}": (
            lambda: euler(lambda x, level: field, long.x, grid)[0],
            lambda: torch_run(long, grid),
        ),
    }


def by_operators(call: Call) -> Call:
    """The same call without the direct way to the kernels."""

    def run() -> Any:
        eager.enabled = False
        try:
            return call()
        finally:
            eager.enabled = True

    return run


def repeated(call: Call, count: int) -> Call:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def paths(name: str) -> dict[str, Call]:
    call, peer = subjects(Tensors(), Tensors(LONG_B, LONG_N))[name]
    calls = {"native": call, "operators": by_operators(call)}
    return calls if peer is None else {**calls, "torch": peer}


NAMES = tuple(subjects(Tensors(), Tensors(LONG_B, LONG_N)))


def error(name: str) -> float:
    """The largest difference between the library and plain torch; 0 without a formula in torch."""
    calls = paths(name)
    if "torch" not in calls:
        return 0.0
    results, expected = (calls[path]() for path in ("native", "torch"))
    pairs = (
        zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    )
    return max(float((a - b).abs().max()) for a, b in pairs)


@functools.lru_cache(maxsize=1)
def measure(name: str) -> Measured:
    count = 1 if str(STEPS) in name else CALLS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            calls = {path: repeated(call, count) for path, call in paths(name).items()}
            measured = measure_paths(calls, 101, {"error": error(name)}, warm=True)
    finally:
        torch.set_num_threads(threads)
    seconds = {path: [value / count for value in each] for path, each in measured.seconds.items()}
    return Measured(seconds, measured.facts)


@pytest.mark.parametrize("path", ["native", "operators", "torch"])
@pytest.mark.parametrize("name", NAMES)
def bench_call(name: str, path: str, benchmark: Any) -> None:
    calls = paths(name)
    if path not in calls:
        pytest.skip("no formula in torch")
    if benchmark.disabled:
        with torch.no_grad():
            benchmark(calls[path])
        assert error(name) < 1e-4
        return
    measured = measure(name)
    add_row(benchmark, name, path, measured)
    assert measured.facts["error"] < 1e-4
