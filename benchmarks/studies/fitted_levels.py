"""Quality of samples at levels fitted to the training data, beside other schedules.

    python -m benchmarks.studies.fitted_levels --model runs/demo --data digits --folder runs/levels

Levels are fitted to the exact field of the training data (:meth:`pfgm.Flow.fit_levels`); the
network takes no part. For each schedule, number of steps and seed 1000 samples of the network are
drawn, and their Fréchet distance in pixel space to the held-out data is measured. Each figure is
kept in the folder as soon as it is known, so that a stopped run continues there. ``--store`` adds
the means over the seeds to results/fitted_levels.json, in place of earlier ones under that name.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import RESULTS
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.common.files import write_json
from pfgm.data import to_unit
from pfgm.evaluation import clamp_images, draw_samples
from pfgm.flows.flow import Flow

SAMPLES = 1000
SEEDS = (0, 1, 2)
STEPS = (3, 4, 5, 6, 8, 10, 16)
_LAST = 0.1  # invisible on digits, whose grey levels are 1/8 apart
_MOST_HELD_OUT = 10_000


def schedules(flow: Flow, steps: int) -> dict[str, list[float]]:
    """The levels that are compared."""
    return {
        "log": flow.grid(steps, "log"),
        "rho": flow.grid(steps, "rho"),
        f"log to {_LAST}": flow.grid(steps, "log", last=_LAST),
    }


def fitted(flow: Flow, data: Any, solver: str, known: dict[str, Any], steps: int) -> list[float]:
    """The fitted levels, which with the seconds of the search are kept in ``known``."""
    key = f"fit, {steps}"
    if key not in known:
        started = time.perf_counter()
        levels = flow.fit_levels(data.train, steps, solver=solver)
        known[key] = {"levels": levels, "seconds": time.perf_counter() - started}
    kept: list[float] = known[key]["levels"]
    return kept


def measure(
    loaded: Any, held_out: Any, solver: str, seed: int, levels: Sequence[float]
) -> dict[str, float]:
    """The Fréchet distance of samples, and the evaluations of the network."""
    samples, nfe = draw_samples(
        loaded.flow, loaded.network, SAMPLES, seed=seed, solver=solver, schedule=list(levels)
    )
    samples = clamp_images(samples, held_out)
    return {"nfe": nfe, "distance": pfgm.metrics.frechet_distance(samples, held_out)}


def measure_all(
    loaded: Any, data: Any, solver: str, steps: Sequence[int], path: Path
) -> dict[str, Any]:
    """All fits and figures; those in the file ``path`` are known already."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows = data.held_out.draw(
        min(len(data.held_out), _MOST_HELD_OUT), generator=torch.Generator().manual_seed(0)
    )
    held_out = to_unit(data.held_out[rows])
    for count in steps:
        own = {"fitted": fitted(loaded.flow, data, solver, known, count)}
        for schedule, levels in {**schedules(loaded.flow, count), **own}.items():
            for seed in SEEDS:
                key = f"{schedule}, {count}, {seed}"
                if key in known:
                    continue
                known[key] = measure(loaded, held_out, solver, seed, levels)
                write_json(path, known)
                print(key, known[key], flush=True)
    return known


def means(known: dict[str, Any], steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The mean distance over the seeds, for each schedule and number of steps."""
    for count in steps:
        for schedule in ("log", "rho", f"log to {_LAST}", "fitted"):
            seeds = [known[f"{schedule}, {count}, {seed}"] for seed in SEEDS]
            distances = [one["distance"] for one in seeds]
            row = {
                "schedule": schedule,
                "steps": count,
                "nfe": seeds[0]["nfe"],
                "distance": statistics.mean(distances),
                "spread": statistics.stdev(distances),
            }
            yield row | (known[f"fit, {count}"] if schedule == "fitted" else {})


def main() -> None:
    name_backend()
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="weights or folder of a run")
    parser.add_argument("--data", default="digits", help="the data that it was trained on")
    parser.add_argument("--solver", default="multistep")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--folder", type=Path, required=True, help="keeps figures of this run")
    parser.add_argument("--store", metavar="NAME", help="store the results under this name")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    loaded, data = pfgm.load(options.model), pfgm.datasets.open_data(options.data)
    path = options.folder / f"{options.solver}.json"
    known = measure_all(loaded, data, options.solver, options.steps, path)
    rows = list(means(known, options.steps))
    shown = [[r["schedule"], str(r["nfe"]), f"{r['distance']:.3f}"] for r in rows]
    print(table(["schedule", "evaluations", "Fréchet distance"], shown))
    if options.store:
        stored = RESULTS / "fitted_levels.json"
        others = json.loads(stored.read_text())["result"] if stored.exists() else {}
        described = {"data": options.data, "solver": options.solver, "flow": repr(loaded.flow)}
        print(store("fitted_levels", {**others, options.store: {**described, "rows": rows}}))


if __name__ == "__main__":
    main()
