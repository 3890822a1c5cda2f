"""Quality of samples at levels fitted to the training data, beside other schedules.

    python -m benchmarks.studies.fitted_levels NAME --model runs/demo --data digits

Levels are fitted to the exact field of the training data (:meth:`pfgm.Flow.fit_levels`); the
network takes no part. For each schedule, number of steps and seed 1000 samples of the network are
drawn, and their Fréchet distance in pixel space to the held-out data is measured. The rows have
NAME, which stands for the network.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import pfgm
from benchmarks.common.rows import Row, mean_of
from benchmarks.common.study import Study, run
from pfgm.data import to_unit
from pfgm.evaluation import clamp_images, draw_samples

SAMPLES = 1000
SEEDS = (0, 1, 2)
STEPS = (3, 5, 8, 10)
_LAST = 0.1  # invisible on digits, whose grey levels are 1/8 apart
SCHEDULES: dict[str, dict[str, Any]] = {
    "log": {"schedule": "log"},
    "rho": {"schedule": "rho"},
    f"log to {_LAST}": {"schedule": "log", "last": _LAST},
    "fitted": {},
}
_MOST_HELD_OUT = 10_000


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """Numbers of steps, each with every schedule."""
    of = {"network": options.name, "data": options.data, "solver": options.solver}
    for steps in options.steps:
        yield from ({**of, "schedule": schedule, "steps": steps} for schedule in SCHEDULES)


@functools.cache
def loaded(model: Path, name: str) -> Any:
    """The flow and network, their data, and the held-out rows."""
    data, generator = pfgm.data.open(name), torch.Generator().manual_seed(0)
    assert data.held_out is not None
    held_out = pfgm.ReferenceSet(data.held_out)
    rows = held_out.draw(min(len(held_out), _MOST_HELD_OUT), generator=generator)
    return *pfgm.load(model), pfgm.ReferenceSet(data), to_unit(held_out[rows])


def measure(
    options: argparse.Namespace, network: str, data: str, solver: str, schedule: str, steps: int
) -> Row:
    """Evaluations and distance; of fitted levels also these, and the seconds of the search."""
    flow, net, train, held_out = loaded(options.model, data)
    row: Row = {}
    if schedule == "fitted":
        started = time.perf_counter()
        row["levels"] = flow.fit_levels(train, steps, solver=solver)
        row["seconds"] = time.perf_counter() - started
    levels = row.get("levels") or flow.grid(steps, **SCHEDULES[schedule])
    distances = []
    for seed in SEEDS:
        samples, row["nfe"] = draw_samples(
            flow, net, SAMPLES, seed=seed, solver=solver, schedule=list(levels)
        )
        samples = clamp_images(samples, held_out)
        distances.append({"distance": pfgm.metrics.frechet_distance(samples, held_out)})
    mean = mean_of(distances)
    return row | {"distance": mean["distance"], "spread": mean["distance_spread"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of the network in the rows")
    parser.add_argument("--model", type=Path, required=True, help="weights or folder of a run")
    parser.add_argument("--data", default="digits", help="the data that it was trained on")
    parser.add_argument("--solver", default="multistep")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)


STUDY = Study("fitted_levels", settings, measure, add_arguments=add_arguments)

if __name__ == "__main__":
    run(STUDY, __doc__)
