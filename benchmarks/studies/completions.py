"""Seams of completions: what rounds of ``resample`` are worth.

    python -m benchmarks.studies.completions

The lower half of held-out images is completed by networks that come with the package, with the
labels of the images. "seam" is the mean step from the last known row to the first completed one,
relative to the steps beside it; real images have about 1. The distance in the features of the
classifier compares the completed images with all held-out images, and so does that of the same
images as they were.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import pfgm
from benchmarks.common.rows import Row
from benchmarks.common.study import Study, run
from pfgm.data import to_unit

NETWORKS, IMAGES, ROUNDS = ("digits", "fashion-mnist"), 250, (0, 1, 2, 4, 8)


def seam(images: Tensor) -> float:
    """The step across the border of the halves, relative to the steps beside it."""
    steps = images.diff(dim=-2).abs().mean((0, 1, 3))
    border = images.shape[-2] // 2 - 1
    return float(steps[border] / (steps[border - 1] + steps[border + 1]) * 2)


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The networks and rounds; None are the images as they were."""
    for name in NETWORKS:
        yield from ({"network": name, "rounds": rounds} for rounds in (None, *ROUNDS))


@functools.cache
def known(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images with their labels, and the features of all held-out images."""
    data = pfgm.data.open(name).held_out
    assert data is not None
    assert data.labels is not None
    held_out = to_unit(data.samples[:])
    features = pfgm.metrics.load_classifier(name).rows(held_out)
    return held_out[:IMAGES], data.labels[:IMAGES], features


def complete(network: str, rounds: int | None) -> tuple[Tensor, int]:
    """Images with completed lower halves, and the evaluations of the network."""
    images, labels, _ = known(network)
    if rounds is None:
        return images, 0
    flow, net = pfgm.load(network)
    mask = torch.zeros(images.shape[1:], dtype=torch.bool)
    mask[..., : mask.shape[-2] // 2, :] = True
    completed, evaluations = flow.inpaint(
        net,
        images,
        mask,
        steps=10,
        resample=rounds,
        condition={"labels": labels},
        generator=torch.Generator().manual_seed(0),
        return_nfe=True,
    )
    return completed.clamp(-1, 1), evaluations


def measure(options: argparse.Namespace, network: str, rounds: int | None) -> Row:
    """The seam and the distance of completed images."""
    completed, evaluations = complete(network, rounds)
    rows = pfgm.metrics.load_classifier(network).rows(completed)
    distance = pfgm.metrics.frechet_distance(rows, known(network)[2])
    figures = {"evaluations": evaluations, "seam": seam(completed)}
    return {**figures, "frechet_distance_features": distance}


STUDY = Study("completions", settings, measure)

if __name__ == "__main__":
    run(STUDY, __doc__)
