"""Quality of the networks that come with the package, with at most 20 evaluations.

    python -m benchmarks.studies.pretrained [--only NAME] [--store]

Draws 1000 samples for each of three seeds, 100 of each label, and compares them with all held-out
images, in pixels and in the features of the classifier that comes with the package. The training
images are compared in the same way. With guidance a step takes two evaluations. ``--store`` writes
results/pretrained.json, in which the rows of other networks stay.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from torch import Tensor

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import RESULTS
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.data import to_unit
from pfgm.datasets import open_data
from pfgm.evaluation import evenly_spaced
from pfgm.flows.batched_sampling import draw_prior, sample_in_batches
from pfgm.pretrained import PRETRAINED

SAMPLES, BATCH, CLASSES, SEEDS = 1000, 100, 10, (0, 1, 2)
RUNS: dict[str, dict[str, Any]] = {
    "no label": {},
    "labels": {},
    "labels, log to 0.1": {"schedule": "log", "last": 0.1},
    "labels, log to 0.3": {"schedule": "log", "last": 0.3},
    "labels, guidance 1.5": {"guidance": 1.5},
}
"""All with 10 steps, and the schedule rho unless another is named."""
FIGURES = ("frechet_distance", "precision", "recall")


def drawn(name: str, run: str, seed: int) -> tuple[Tensor, int]:
    """Samples of a run, and the evaluations of the network."""
    flow, network = pfgm.load_pretrained(name)
    labels = None if run.startswith("no label") else torch.arange(SAMPLES) % CLASSES
    samples, evaluations = sample_in_batches(
        flow,
        network,
        draw_prior(flow, SAMPLES, seed=seed),
        batch_size=BATCH,
        labels=labels,
        progress=True,
        steps=10,
        **RUNS[run],
    )
    return samples.clamp(-1, 1), evaluations


def measure(name: str) -> list[dict[str, Any]]:
    """The figures of each run of a network: means and standard deviations over the seeds."""
    data, classifier = open_data(name), pfgm.metrics.load_classifier(name)
    assert data.held_out is not None
    held_out, train = to_unit(data.held_out[:]), to_unit(data.train[:])
    real = {"pixels": held_out, "features": classifier.rows(held_out)}
    neighbours = {of: pfgm.metrics.neighbour_distances(x, 3) for of, x in real.items()}

    def figures(images: Tensor) -> dict[str, float]:
        measured: dict[str, float] = {}
        for of, rows in {"pixels": images, "features": classifier.rows(images)}.items():
            inside = pfgm.metrics.precision_recall(rows, real[of], neighbours=neighbours[of])
            distance = pfgm.metrics.frechet_distance(rows, real[of])
            values = (distance, inside.precision, inside.recall)
            measured |= {f"{each}_{of}": value for each, value in zip(FIGURES, values, strict=True)}
        return measured

    known = figures(evenly_spaced(train, SAMPLES))
    rows = [{"network": name, "run": "training images", "evaluations": 0, **known}]
    for run in RUNS:
        draws = [drawn(name, run, seed) for seed in SEEDS]
        seeds = [figures(samples) for samples, _ in draws]
        row = {"network": name, "run": run, "evaluations": draws[0][1], "seeds": len(SEEDS)}
        for each in seeds[0]:
            values = [one[each] for one in seeds]
            row |= {each: statistics.mean(values), f"{each}_spread": statistics.stdev(values)}
        rows.append(row)
    return rows


def main() -> None:
    name_backend()
    parser = new_parser(__doc__)
    parser.add_argument("--only", choices=list(PRETRAINED), help="measure this network alone")
    parser.add_argument("--store", action="store_true", help="write the results")
    options = parser.parse_args()
    names = [options.only] if options.only else list(PRETRAINED)
    rows = [row for name in names for row in measure(name)]
    shown = [f"{each}_{of}" for of in ("pixels", "features") for each in FIGURES]
    cells = [
        [r["network"], r["run"], str(r["evaluations"])] + [f"{r[each]:.3g}" for each in shown]
        for r in rows
    ]
    print(table(["network", "samples", "evaluations", *shown], cells))
    if options.store:
        known = json.loads((RESULTS / "pretrained.json").read_text())["result"]
        rows += [row for row in known if row["network"] not in names]
        print(store("pretrained", rows))


if __name__ == "__main__":
    main()
