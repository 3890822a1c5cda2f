"""Third-order solvers beside the multistep solver, on a trained network.

    python -m benchmarks.studies.third_order --model runs/demo [--store]

"third order" extrapolates the mean from three evaluations, as a polynomial in log z whose integral
is exact (DPM-Solver++, arXiv 2211.01095; DEIS, arXiv 2204.13902). "corrected" then replaces each
point by that of the polynomial through the new mean too, without another evaluation, as UniPC-3
does (arXiv 2302.04867). Both take one evaluation per step, and an Euler step at the end. Measured
is the Fréchet distance of 1000 samples to the held-out digits, as in the study of quality. The
fitted levels are those of multistep (:meth:`pfgm.Flow.fit_levels`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.cli import demo
from pfgm.flows.batched_sampling import draw_prior

SEEDS = (0, 1, 2)
STEPS = (6, 8)
_LAST = 0.1
_ORDER = 3

Mean = Callable[[Tensor, float], Tensor]


def combined(z: float, z_next: float, levels: Sequence[float], means: Sequence[Tensor]) -> Tensor:
    """What the means at these levels contribute to the step from z to z_next.

    With u = log(z/s) and h = log(z/z_next) that is the integral over u from 0 to h of
    e^(u − h) p(u), where p is the polynomial through the means. Its moments are
    I_k = h^k − k I_(k−1), I_0 = 1 − e^(−h).
    """
    h = math.log(z / z_next)
    moments = [-math.expm1(-h)]
    for k in range(1, len(means)):
        moments.append(h**k - k * moments[-1])
    nodes = torch.tensor([math.log(z / level) for level in levels], dtype=torch.float64)
    powers = torch.stack([nodes**k for k in range(len(means))])
    weights = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64))
    return sum((w * m for w, m in zip(weights.tolist(), means, strict=True)), torch.zeros(()))


def third_order(mean: Mean, x: Tensor, grid: Sequence[float], *, corrected: bool) -> Tensor:
    """The points at the last level of the grid."""
    levels: list[float] = []
    means: list[Tensor] = []
    start = x
    for step, (z, z_next) in enumerate(pairwise(grid)):
        levels, means = [z, *levels[: _ORDER - 1]], [mean(x, z), *means[: _ORDER - 1]]
        if corrected and step > 0:
            before = levels[1]
            x = (z / before) * start + combined(before, z, levels, means)
        start, used = x, 1 if step == len(grid) - 2 else len(means)
        x = (z_next / z) * x + combined(z, z_next, levels[:used], means[:used])
    return x


def measure(loaded: Any, steps: int, fitted: list[float]) -> list[dict[str, Any]]:
    """The figures of every solver with one number of steps."""
    flow, net = loaded
    held_out = pfgm.data.digits().held_out
    starts = [draw_prior(flow, demo.SAMPLES, seed) for seed in SEEDS]

    def mean(x: Tensor, z: float) -> Tensor:
        result: Tensor = flow.denoise(net, x, z)
        return result

    def solve(name: str, x: Tensor, grid: Sequence[float]) -> Tensor:
        if name == "multistep":
            result: Tensor = flow.solve(net, x, grid, solver="multistep")[0]
            return result
        return third_order(mean, x, grid, corrected=name == "corrected")

    rows = []
    grids = {f"log to {_LAST}": flow.grid(steps, "log", last=_LAST), "fitted": fitted}
    for schedule, grid in grids.items():
        for name in ("multistep", "third order", "corrected"):
            samples = [solve(name, x, grid).clamp(-1, 1) for x in starts]
            distances = [pfgm.metrics.frechet_distance(x, held_out) for x in samples]
            row: dict[str, Any] = {"solver": name, "schedule": schedule, "nfe": steps}
            row["distance"] = statistics.mean(distances)
            rows.append({**row, "spread": statistics.stdev(distances)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    name_backend()
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="weights of the demo")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--store", action="store_true", help="write the results")
    options = parser.parse_args()
    loaded, train, rows = pfgm.load(options.model), pfgm.data.digits().train, []
    with torch.no_grad():
        for steps in options.steps:
            fitted = loaded.flow.fit_levels(train, steps, solver="multistep")
            rows += measure(loaded, steps, fitted)
    shown = [[r["solver"], r["schedule"], str(r["nfe"]), f"{r['distance']:.3f}"] for r in rows]
    print(table(["solver", "schedule", "evaluations", "Fréchet distance"], shown))
    if options.store:
        print(store("third_order", rows))


if __name__ == "__main__":
    main()
