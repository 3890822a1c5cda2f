"""Quality of samples against evaluations of the network, for every solver, on digits.

    python -m benchmarks.studies.quality [--model MODEL] [--draw]

Trains a network without labels, by ``recipes/digits.json``, if no model is given. Draws 1000
samples for each solver, number of steps and seed, and measures the Fréchet distance in pixel space
to the 399 held-out digits.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pfgm
from benchmarks.common.folders import DOCS
from benchmarks.common.models import DIGITS
from benchmarks.common.rows import Row, grouped, mean_of
from benchmarks.common.study import Study, run
from pfgm.evaluation import RUNS, draw_samples
from pfgm.solvers import GRID_SOLVERS
from pfgm.training import runs

SEEDS = (0, 1, 2)
SAMPLES = 1000
STEPS = (3, 5, 8, 10, 20, 40, 100)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)  # rtol and atol of rk45
SOLVERS: dict[str, dict[str, Any]] = {
    **RUNS,
    # Ends at noise smaller than the step between two of the digits' 17 grey levels, 1/8.
    "multistep, log to 0.1": {"solver": "multistep", "schedule": "log", "last": 0.1},
}


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """Solvers with their steps, and rk45 with its tolerances."""
    for name, solver in SOLVERS.items():
        for evaluations in STEPS:
            each = GRID_SOLVERS[solver["solver"]].evaluations or 1
            yield {"run": name, "setting": -(-evaluations // each)}
    yield from ({"run": "rk45", "setting": tolerance} for tolerance in TOLERANCES)


@functools.cache
def network(model: Path | None) -> Any:
    """The flow and the network of digits, which is trained without labels if it is not given."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            runs.start(dataclasses.replace(DIGITS, labels=False), folder)
        return pfgm.load(model or folder)


def measure(options: argparse.Namespace, run: str, setting: float) -> Row:
    """Evaluations, distance and its spread over the seeds."""
    held_out = pfgm.data.digits().held_out
    how: dict[str, Any] = {"solver": "rk45", "rtol": setting, "atol": setting}
    if run != "rk45":
        how = {**SOLVERS[run], "steps": setting}
    seeds = []
    for seed in SEEDS:
        flow, net = network(options.model)
        samples, nfe = draw_samples(flow, net, SAMPLES, seed=seed, **how)
        distance = pfgm.metrics.frechet_distance(samples.clamp(-1, 1), held_out)
        seeds.append({"nfe": nfe, "distance": distance})
    mean = mean_of(seeds)
    return {"nfe": mean["nfe"], "distance": mean["distance"], "spread": mean["distance_spread"]}


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    """Draws distances against evaluations."""
    curves = {}
    # With few evaluations the distance is too large for the picture.
    near = (row for row in rows if row["distance"] < 3)
    for (name,), part in grouped(near, ["run"]).items():
        nfe, distance, spread = ([r[of] for r in part] for of in ("nfe", "distance", "spread"))
        curves[name] = nfe, distance, spread
    path = DOCS / "images" / "quality.png"
    pfgm.plotting.quality_curve(curves, path, ylabel="Fréchet distance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a model of digits; trains one unless given")


STUDY = Study("quality", settings, measure, draw=draw, add_arguments=add_arguments)

if __name__ == "__main__":
    run(STUDY, __doc__)
