"""Quality of the networks that come with the package, with at most 20 evaluations.

    python -m benchmarks.studies.pretrained [--only NAME]

Draws 1000 samples for each of three seeds, 100 of each label, and compares them with all held-out
images, in pixels and in the features of the classifier that comes with the package. The training
images are compared in the same way. With guidance a step takes two evaluations.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pfgm
from benchmarks.common.rows import Row, mean_of
from benchmarks.common.study import Study, run
from pfgm.data import to_unit
from pfgm.datasets import open_data
from pfgm.evaluation import evenly_spaced
from pfgm.flows.batched_sampling import draw_prior, sample_in_batches
from pfgm.pretrained import PRETRAINED

SAMPLES, BATCH, CLASSES, SEEDS = 1000, 100, 10, (0, 1, 2)
TRAINING = "training images"
RUNS: dict[str, dict[str, Any]] = {
    "no label": {},
    "labels": {},
    "labels, log to 0.1": {"schedule": "log", "last": 0.1},
    "labels, log to 0.3": {"schedule": "log", "last": 0.3},
    "labels, guidance 1.5": {"guidance": 1.5},
    "labels, guidance 1.5, log to 0.3": {"guidance": 1.5, "schedule": "log", "last": 0.3},
}
"""All with 10 steps, and the schedule rho unless another is named."""


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The networks, and how they are sampled."""
    for name in [options.only] if options.only else PRETRAINED:
        yield from ({"network": name, "run": run} for run in (TRAINING, *RUNS))


@functools.cache
def data_of(name: str) -> Any:
    """Training images, and the held-out ones in each space with their neighbours' distances."""
    data, classifier = open_data(name), pfgm.metrics.load_classifier(name)
    assert data.held_out is not None
    held_out = to_unit(data.held_out[:])
    real = {"pixels": held_out, "features": classifier.rows(held_out)}
    neighbours = {of: pfgm.metrics.neighbour_distances(x, 3) for of, x in real.items()}
    return to_unit(data.train[:]), classifier, real, neighbours


def figures(images: Tensor, name: str) -> Row:
    """Fréchet distance, precision and recall of images in both spaces."""
    _, classifier, real, neighbours = data_of(name)
    row: Row = {}
    for of, rows in {"pixels": images, "features": classifier.rows(images)}.items():
        row[f"frechet_distance_{of}"] = pfgm.metrics.frechet_distance(rows, real[of])
        inside = pfgm.metrics.precision_recall(rows, real[of], neighbours=neighbours[of])
        row |= {f"precision_{of}": inside.precision, f"recall_{of}": inside.recall}
    return row


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


def measure(options: argparse.Namespace, network: str, run: str) -> Row:
    """The figures of a run: means and standard deviations over the seeds."""
    if run == TRAINING:
        chosen = evenly_spaced(data_of(network)[0], SAMPLES)
        return {"evaluations": 0, **figures(chosen, network)}
    draws = [drawn(network, run, seed) for seed in SEEDS]
    means = mean_of([figures(samples, network) for samples, _ in draws])
    return {"evaluations": draws[0][1], "seeds": len(SEEDS), **means}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=list(PRETRAINED), help="measure this network alone")


STUDY = Study("pretrained", settings, measure, add_arguments=add_arguments)

if __name__ == "__main__":
    run(STUDY, __doc__)
