"""Quality of the networks that come with the package, with at most 20 evaluations.

    python -m benchmarks.studies.pretrained [--store]

Draws 1000 samples, 100 of each label, and compares them in pixel space with all held-out images, as
the training images are. With guidance a step takes two evaluations. ``--store`` writes
results/pretrained.json and the picture of the documentation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pfgm
from benchmarks.common.commands import new_parser
from benchmarks.common.folders import DOCS
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.data import to_unit
from pfgm.datasets import open_data
from pfgm.evaluation import evenly_spaced
from pfgm.flows.batched_sampling import draw_prior, sample_in_batches
from pfgm.pretrained import PRETRAINED

SAMPLES, BATCH, CLASSES = 1000, 100, 10
PICTURE = DOCS / "images" / "fashion-mnist.png"
RUNS: dict[str, dict[str, Any]] = {
    "no label": {},
    "labels": {},
    "labels, log to 0.1": {"schedule": "log", "last": 0.1},
    "labels, log to 0.3": {"schedule": "log", "last": 0.3},
    "labels, guidance 1.5": {"guidance": 1.5},
}
"""All with 10 steps, and the schedule rho unless another is named."""
SHOWN = "labels"


def measure(name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Figures and samples of each run of a network."""
    data = open_data(name)
    assert data.held_out is not None
    held_out, train = to_unit(data.held_out[:]), to_unit(data.train[:])
    neighbours = pfgm.metrics.neighbour_distances(held_out, 3)
    flow, network = pfgm.load_pretrained(name)
    samples = {"training images": evenly_spaced(train, SAMPLES)}
    evaluations = {"training images": 0}
    for run, options in RUNS.items():
        labels = None if run.startswith("no label") else torch.arange(SAMPLES) % CLASSES
        found, steps = sample_in_batches(
            flow,
            network,
            draw_prior(flow, SAMPLES, seed=0),
            batch_size=BATCH,
            labels=labels,
            progress=True,
            steps=10,
            **options,
        )
        samples[run], evaluations[run] = found.clamp(-1, 1), steps
    rows = []
    for run, images in samples.items():
        found_pr = pfgm.metrics.precision_recall(images, held_out, k=3, neighbours=neighbours)
        rows.append(
            {
                "network": name,
                "run": run,
                "evaluations": evaluations[run],
                "frechet_distance": pfgm.metrics.frechet_distance(images, held_out),
                **found_pr._asdict(),
            }
        )
    return rows, samples


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--store", action="store_true", help="write the results and the picture")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in PRETRAINED:
        found, samples = measure(name)
        rows += found
        if options.store and name == "fashion-mnist":
            pfgm.plotting.image_grid(samples[SHOWN][:100], PICTURE, columns=CLASSES)
    figures = ("frechet_distance", "precision", "recall")
    cells = [
        [r["network"], r["run"], str(r["evaluations"])] + [f"{r[name]:.3g}" for name in figures]
        for r in rows
    ]
    print(table(["network", "samples", "evaluations", "Fréchet", "precision", "recall"], cells))
    if options.store:
        print(store("pretrained", rows))


if __name__ == "__main__":
    main()
