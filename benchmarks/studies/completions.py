"""Seams of completions: what rounds of ``resample`` are worth.

    python -m benchmarks.studies.completions [--store] [--picture FILE]

The lower half of held-out images is completed by the networks that come with the package, with the
labels of the images. "seam" is the mean step from the last known row to the first completed one,
relative to the steps beside it; real images have about 1. The distance in the features of the
classifier compares the completed images with all held-out images, and so does that of the same
images as they were. ``--store`` writes results/completions.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.data import to_unit
from pfgm.datasets import open_data
from pfgm.pretrained import PRETRAINED

IMAGES, ROUNDS = 250, (0, 1, 2, 4, 8)
SHOWN = 10  # images of the picture


def seam(images: Tensor) -> float:
    """The step across the border of the halves, relative to the steps beside it."""
    steps = images.diff(dim=-2).abs().mean((0, 1, 3))
    border = images.shape[-2] // 2 - 1
    return float(steps[border] / (steps[border - 1] + steps[border + 1]) * 2)


def measure(name: str) -> tuple[list[dict[str, Any]], Tensor]:
    """The figures of a network for each number of rounds, and some completions, a row for each."""
    flow, network = pfgm.load_pretrained(name)
    data, classifier = open_data(name), pfgm.metrics.load_classifier(name)
    assert data.held_out is not None
    assert data.held_out.labels is not None
    held_out = to_unit(data.held_out[:])
    images, labels = held_out[:IMAGES], data.held_out.labels[:IMAGES]
    features = classifier.rows(held_out)
    mask = torch.zeros(images.shape[1:], dtype=torch.bool)
    mask[..., : mask.shape[-2] // 2, :] = True

    def row(completed: Tensor, rounds: int | None, evaluations: int) -> dict[str, Any]:
        distance = pfgm.metrics.frechet_distance(classifier.rows(completed), features)
        return {
            "network": name,
            "rounds": rounds,
            "evaluations": evaluations,
            "seam": seam(completed),
            "frechet_distance_features": distance,
        }

    rows, pictures = [row(images, None, 0)], [images[:SHOWN], images[:SHOWN].where(mask, 0.0)]
    for rounds in ROUNDS:
        completed, evaluations = flow.inpaint(
            network,
            images,
            mask,
            steps=10,
            resample=rounds,
            condition={"labels": labels},
            generator=torch.Generator().manual_seed(0),
            return_nfe=True,
        )
        rows.append(row(completed.clamp(-1, 1), rounds, evaluations))
        pictures.append(completed[:SHOWN].clamp(-1, 1))
        print(rows[-1], flush=True)
    return rows, torch.cat(pictures)


def main() -> None:
    name_backend()
    parser = new_parser(__doc__)
    parser.add_argument("--store", action="store_true", help="write the results")
    parser.add_argument("--picture", type=Path, help="a .png file of completions of clothes")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in PRETRAINED:
        figures, pictures = measure(name)
        rows += figures
        if options.picture is not None:
            side = ["image", "known", *(f"resample={rounds}" for rounds in ROUNDS)]
            path = options.picture.with_name(f"{name}-{options.picture.name}")
            pfgm.plotting.image_grid(pictures, path, columns=SHOWN, side=side)
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    print(table(list(rows[0]), cells))
    if options.store:
        print(store("completions", rows))


if __name__ == "__main__":
    main()
