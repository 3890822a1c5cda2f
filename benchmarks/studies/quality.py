"""Quality of samples against evaluations of the network, for every solver, on digits.

    python -m benchmarks.studies.quality [--model runs/demo/model.safetensors] [--store]

Takes the network of ``pfgm demo``, or trains one if no model is given. Draws 1000 samples for each
solver, number of steps and seed, and measures the Fréchet distance in pixel space to the 399
held-out digits, as the demo does. ``--store`` writes results/quality.json and the picture.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import DOCS
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm import evaluation
from pfgm.cli import demo

SEEDS = (0, 1, 2)
PICTURE = DOCS / "images" / "quality.png"
STEPS = (3, 5, 8, 10, 20, 40, 100)
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


def measure(loaded: Any, seed: int) -> list[evaluation.Point]:
    """Measures all solvers with all settings."""
    flow, network = loaded
    held_out, n = pfgm.data.digits().held_out, demo.SAMPLES
    points = evaluation.curve(
        flow,
        network,
        held_out,
        n=n,
        steps=STEPS,
        tolerances=TOLERANCES,
        seed=seed,
        progress=True,
    )
    # Ends at noise smaller than the step between two of the digits' 17 grey levels, 1/8.
    short: dict[str, Any] = {"solver": "multistep", "schedule": "log", "last": 0.1}
    for steps in STEPS:
        samples, nfe = evaluation.draw_samples(flow, network, n, seed=seed, steps=steps, **short)
        distance = pfgm.metrics.frechet_distance(samples.clamp(-1, 1), held_out)
        points.append(evaluation.Point("multistep, log to 0.1", steps, nfe, distance))
    return points


def over_seeds(points: Sequence[evaluation.Point]) -> Point:
    """The mean of one setting's points."""
    distances = [point.frechet_distance for point in points]
    spread, nfe = statistics.stdev(distances), statistics.mean(point.nfe for point in points)
    return Point(points[0].run, points[0].setting, nfe, statistics.mean(distances), spread)


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
        loaded = pfgm.load(options.model)
    seeds = [measure(loaded, seed) for seed in SEEDS]
    points = [over_seeds(each) for each in zip(*seeds, strict=True)]
    rows = [[p.run, f"{p.setting:g}", f"{p.nfe:.0f}", f"{p.distance:.3f}"] for p in points]
    print(table(["solver", "steps or tolerance", "evaluations", "Fréchet distance"], rows))
    if options.store:
        print(store("quality", [point._asdict() for point in points]))
        draw(points)


if __name__ == "__main__":
    main()
