"""Quality of the networks that come with the package, with at most 20 evaluations.

    python -m benchmarks.studies.pretrained [--only NAME] [--seeds 3] [--flows FOLDER]

Draws 1000 samples for each seed, 100 of each label, and compares them with all held-out
images, in pixels and in the features of the classifier that comes with the package. The training
images are compared in the same way. With guidance a step takes two evaluations.

Of avatars it also measures how far samples and held-out images are from the nearest training image,
and whose samples show the style that was asked for. FOLDER has two runs of 3000 steps of
``recipes/avatars.json``, pfgm and pfgm++ (``--method``), to compare the flows.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pfgm
from benchmarks.common.folders import DOCS
from benchmarks.common.rows import Row, mean_of, select
from benchmarks.common.study import Study, run
from pfgm.data import to_unit
from pfgm.evaluation import evenly_spaced
from pfgm.flows.batched_sampling import draw_prior, sample_in_batches
from pfgm.plotting import image_grid, quality_curve
from pfgm.pretrained import PRETRAINED

SAMPLES, BATCH, CLASSES = 1000, 100, 10
LABELS = torch.arange(SAMPLES) % CLASSES
TRAINING, HELD_OUT = "training images", "held-out images"
RUNS: dict[str, dict[str, Any]] = {
    "no label": {},
    "labels": {},
    "labels, log to 0.1": {"schedule": "log", "last": 0.1},
    "labels, log to 0.3": {"schedule": "log", "last": 0.3},
    "labels, guidance 1.5": {"guidance": 1.5},
    "labels, guidance 1.5, log to 0.3": {"guidance": 1.5, "schedule": "log", "last": 0.3},
    "labels, guidance 1.2": {"guidance": 1.2},
}
"""All with 10 steps, and the schedule rho unless another is named."""
SHOWN = "labels, guidance 1.2"  # in pictures of avatars
AVATARS = (HELD_OUT, "labels", "labels, guidance 1.5, log to 0.3", SHOWN)
OTHERS = tuple(run for run in RUNS if run != SHOWN)
FLOWS = {"PFGM, 3000 steps": "pfgm", "PFGM++ 128, 3000 steps": "pfgm++"}
BINS, WIDTH = 20, 0.02  # of the histograms of distances


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The networks, and how they are sampled."""
    for name in [options.only] if options.only else PRETRAINED:
        runs = AVATARS if name == "avatars" else OTHERS
        yield from ({"network": name, "run": run} for run in (TRAINING, *runs))
    if options.flows:
        yield from ({"network": "avatars", "run": run} for run in FLOWS)


@functools.cache
def data_of(name: str) -> Any:
    """The data, the classifier, and held-out images in each space with neighbours' distances."""
    data, classifier = pfgm.data.open(name), pfgm.metrics.load_classifier(name)
    assert data.held_out is not None
    held_out = to_unit(data.held_out.samples[:])
    real = {"pixels": held_out, "features": classifier.rows(held_out)}
    neighbours = {of: pfgm.metrics.neighbour_distances(x, 3) for of, x in real.items()}
    return data, classifier, real, neighbours


def figures(images: Tensor, name: str) -> Row:
    """Fréchet distance, precision and recall of images in both spaces."""
    _, classifier, real, neighbours = data_of(name)
    row: Row = {}
    for of, rows in {"pixels": images, "features": classifier.rows(images)}.items():
        row[f"frechet_distance_{of}"] = pfgm.metrics.frechet_distance(rows, real[of])
        inside = pfgm.metrics.precision_recall(rows, real[of], neighbours=neighbours[of])
        row |= {f"precision_{of}": inside.precision, f"recall_{of}": inside.recall}
    return row


def likeness(images: Tensor, labels: Tensor, name: str) -> Row:
    """How far images are from the nearest training image, and how many labels are right.

    A distance is the root mean square of the differences of values in [-1, 1]. The label that an
    image shows is that of the largest logit, and beside it that of the nearest training image.
    """
    data, classifier, *_ = data_of(name)
    assert data.labels is not None
    parts = [to_unit(data.samples[data.labels == label]) for label in range(CLASSES)]
    by_label = torch.stack([pfgm.metrics.nearest_distance(images, part) for part in parts], 1)
    nearest, found = by_label.min(1)
    distances = nearest / math.sqrt(images[0].numel())
    shown = classifier(images)[:, :CLASSES].argmax(1)
    return {
        "label_right": float((shown == labels).float().mean()),
        "label_of_nearest_right": float((found == labels).float().mean()),
        "least_distance": float(distances.min()),
        "median_distance": float(distances.median()),
        "distances": [int(each) for each in distances.histc(BINS, 0, BINS * WIDTH)],
    }


def drawn(options: argparse.Namespace, name: str, run: str, seed: int) -> tuple[Tensor, int]:
    """Samples of a run, and the evaluations of the network."""
    flow, network = pfgm.load(options.flows / FLOWS[run] if run in FLOWS else name)
    labels = None if run.startswith("no label") else LABELS
    samples, evaluations = sample_in_batches(
        flow,
        network,
        draw_prior(flow, SAMPLES, seed=seed),
        batch_size=BATCH,
        labels=labels,
        progress=True,
        steps=10,
        **RUNS.get(run, {}),
    )
    return samples.clamp(-1, 1), evaluations


def measure(options: argparse.Namespace, network: str, run: str) -> Row:
    """The figures of a run: means and standard deviations over the seeds."""
    data, *_ = data_of(network)
    if run == TRAINING:
        chosen = to_unit(evenly_spaced(data.samples[:], SAMPLES))
        return {"evaluations": 0, **figures(chosen, network)}
    if run == HELD_OUT:
        some = evenly_spaced(torch.arange(len(data.held_out.samples)), SAMPLES)
        return likeness(to_unit(data.held_out.samples[some]), data.held_out.labels[some], network)
    draws = [drawn(options, network, run, seed) for seed in range(options.seeds)]
    row: Row = {"evaluations": draws[0][1], "seeds": len(draws)}
    row |= mean_of([figures(samples, network) for samples, _ in draws])
    if network == "avatars":
        samples = torch.cat([samples for samples, _ in draws])
        row |= likeness(samples, LABELS.repeat(len(draws)), network)
    return row


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    """Draws avatars beside held-out ones, and the histograms of their distances."""
    flow, network = pfgm.load("avatars")
    labels, names = LABELS[:50], PRETRAINED["avatars"].classes
    prior = draw_prior(flow, len(labels), seed=1)
    samples, _ = sample_in_batches(
        flow, network, prior, batch_size=BATCH, labels=labels, steps=10, **RUNS[SHOWN]
    )
    held_out = data_of("avatars")[0].held_out
    real = [
        held_out.samples[(held_out.labels == label).nonzero()[:5, 0]] for label in range(CLASSES)
    ]
    sheet = torch.cat([samples, to_unit(torch.stack(real, 1).flatten(0, 1))])
    side = [*["drawn"] * 5, *["real"] * 5]
    image_grid(sheet, DOCS / "images" / "avatars-real.png", columns=10, header=names, side=side)
    middles = [WIDTH * (place + 0.5) for place in range(BINS)]
    curves = {
        name: (middles, [each / sum(row["distances"]) for each in row["distances"]])
        for name, run in (("samples", SHOWN), ("held-out avatars", HELD_OUT))
        for row in select(rows, network="avatars", run=run)
    }
    quality_curve(
        curves,
        DOCS / "images" / "avatars-distances.png",
        xlabel="distance to the nearest training avatar",
        ylabel=f"fraction, in steps of {WIDTH}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=list(PRETRAINED), help="measure this network alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flows", type=Path, help="a folder with the runs pfgm and pfgm++")


STUDY = Study("pretrained", settings, measure, draw=draw, add_arguments=add_arguments)

if __name__ == "__main__":
    run(STUDY, __doc__)
