"""Quality of samples against evaluations of the network, for every solver, on digits.

    python -m benchmarks.studies.quality [--model runs/demo/model.safetensors] [--store]

Takes the network of ``pfgm demo``, or trains one if no model is given. Draws 1000 samples for each
solver, number of steps and seed, and measures the Fréchet distance in pixel space to the 399
held-out digits, as the demo does. ``--store`` writes results/quality.json and the picture.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import DOCS
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.cli import demo

SEEDS = (0, 1, 2)
PICTURE = DOCS / "images" / "quality.png"
STEPS = (3, 5, 8, 10, 20, 40, 100)
HEUN_STEPS = (2, 3, 4, 5, 10, 20, 50)  # two evaluations each
RUNS: dict[str, dict[str, Any]] = {
    **pfgm.evaluation.RUNS,
    # Noise smaller than the step between two of the digits' 17 grey levels, 1/8.
    "multistep, log to 0.1": {"solver": "multistep", "schedule": "log", "last": 0.1},
}
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)  # rtol and atol of rk45


class Point(NamedTuple):
    """A solver with one setting, over the seeds."""

    run: str
    setting: float
    """Steps, or the tolerance of rk45."""
    nfe: float
    distance: float
    spread: float
    """Standard deviation over the seeds."""


def measure(loaded: Any, run: str, setting: float, **options: Any) -> Point:
    """Measures one solver with one setting."""
    digits, distances, evaluations = pfgm.data.digits(), [], []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        samples, nfe = loaded.flow.sample(
            loaded.network, demo.SAMPLES, generator=generator, return_nfe=True, **options
        )
        distances.append(pfgm.metrics.frechet_distance(samples.clamp(-1, 1), digits.held_out))
        evaluations.append(nfe)
    spread = statistics.stdev(distances)
    return Point(run, setting, statistics.mean(evaluations), statistics.mean(distances), spread)


def measure_all(loaded: Any) -> list[Point]:
    """Measures all solvers with all settings."""
    points = []
    for run, options in RUNS.items():
        for steps in HEUN_STEPS if options["solver"] == "heun" else STEPS:
            points.append(measure(loaded, run, steps, steps=steps, **options))
            print(points[-1], flush=True)
    for tolerance in TOLERANCES:
        points.append(
            measure(loaded, "rk45", tolerance, solver="rk45", rtol=tolerance, atol=tolerance)
        )
        print(points[-1], flush=True)
    return points


def draw(points: list[Point]) -> None:
    """Draws the picture of the documentation."""
    curves = {}
    for run in dict.fromkeys(point.run for point in points):
        # With few evaluations the distance is too large for the picture.
        part = [point for point in points if point.run == run and point.distance < 3]
        curves[run] = ([p.nfe for p in part], [p.distance for p in part], [p.spread for p in part])
    pfgm.plotting.quality_curve(curves, PICTURE, ylabel="Fréchet distance")


def main() -> None:
    name_backend()
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, help="weights of a demo; trains one unless given")
    parser.add_argument("--store", action="store_true", help="write the results and the picture")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            demo.run(folder)
            options.model = Path(folder) / "model.safetensors"
        points = measure_all(pfgm.load(options.model))
    rows = [[p.run, f"{p.setting:g}", f"{p.nfe:.0f}", f"{p.distance:.3f}"] for p in points]
    print(table(["solver", "steps or tolerance", "evaluations", "Fréchet distance"], rows))
    if options.store:
        print(store("quality", [point._asdict() for point in points]))
        draw(points)


if __name__ == "__main__":
    main()
