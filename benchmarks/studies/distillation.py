"""Few-step models of digits beside their teachers: quality at one and two evaluations.

    python -m benchmarks.studies.distillation [--steps 1500] [--store]

Trains a network of PFGM and one of PFGM++ (D = 128) as ``pfgm demo`` does, and a student of each as
``pfgm train --teacher`` does. Draws 1000 samples for each of three seeds, and measures the Fréchet
distance in pixel space to the 399 held-out digits. ``--teachers`` keeps the teachers for the next
call. ``--store`` writes results/distillation.json and the picture.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import DOCS
from benchmarks.common.machine import store
from benchmarks.common.tables import table
from pfgm.cli import demo
from pfgm.common.files import check_folder
from pfgm.distillation import Consistency
from pfgm.flows.flow import Flow
from pfgm.training import Trainer

SEEDS = (0, 1, 2)
PICTURE = DOCS / "images" / "few-steps.png"
METHODS = ("pfgm", "pfgm++")
SECOND = 0.5  # level of the second evaluation
ROWS = (
    "teacher, 10 evaluations",
    "teacher, 1 evaluation",
    "student, 1 evaluation",
    "student, 2 evaluations",
)


def teacher_of(method: str, path: Path) -> tuple[Flow, nn.Module]:
    """The teacher in a file, which is trained if the file does not exist."""
    if path.exists():
        return pfgm.load(path)
    data = pfgm.data.digits().train
    torch.manual_seed(0)
    network: nn.Module
    flow: Flow
    if method == "pfgm":
        flow = pfgm.PoissonFlow.from_data(data)
        network = flow.network("unet", data_std=float(data.square().mean().sqrt()))
    else:
        flow = pfgm.PoissonFlowPP.from_data(data, D=128)
        network = flow.network("unet")
    averaged = Trainer(flow, network, data, demo.TRAINING).train()
    pfgm.save(path, flow, averaged)
    return pfgm.load(path)


def student_of(flow: Flow, teacher: nn.Module, steps: int) -> tuple[nn.Module, float]:
    """A student, and the seconds of its training."""
    consistency = Consistency(flow, teacher)
    config = dataclasses.replace(demo.TRAINING, steps=steps, learning_rate=1e-3, reference_batch=0)
    student, data = copy.deepcopy(teacher), pfgm.data.digits().train
    started = time.perf_counter()
    trainer = Trainer(flow, student, data, config, loss=consistency.loss)
    return trainer.train(), time.perf_counter() - started


def draw(flow: Flow, network: nn.Module, seed: int, **options: Any) -> tuple[Tensor, int]:
    """Samples in [-1, 1], and the evaluations of the network."""
    generator = torch.Generator().manual_seed(seed)
    samples, nfe = flow.sample(
        network, demo.SAMPLES, generator=generator, return_nfe=True, **options
    )
    return samples.clamp(-1, 1), nfe


def measure(flow: Flow, network: nn.Module, name: str, **options: Any) -> dict[str, Any]:
    """Measures a network with one sampler."""
    held_out = pfgm.data.digits().held_out
    distances, precisions, recalls, nfe = [], [], [], 0
    for seed in SEEDS:
        samples, nfe = draw(flow, network, seed, **options)
        measured = pfgm.metrics.precision_recall(samples, held_out)
        distances.append(pfgm.metrics.frechet_distance(samples, held_out))
        precisions.append(measured.precision)
        recalls.append(measured.recall)
    return {
        "network": name,
        "sampler": options,
        "evaluations": nfe,
        "frechet_distance": statistics.mean(distances),
        "spread": statistics.stdev(distances),
        "precision": statistics.mean(precisions),
        "recall": statistics.mean(recalls),
    }


def compare(method: str, folder: Path, steps: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Figures of a teacher and its student, and ten samples of each from the same prior points."""
    flow, teacher = teacher_of(method, folder / f"{method}.safetensors")
    student, seconds = student_of(flow, teacher, steps)
    many: dict[str, Any] = {"solver": "multistep", "steps": 10}
    few: dict[str, Any] = {"solver": "consistency"}
    runs: list[tuple[str, nn.Module, dict[str, Any]]] = [
        ("teacher", teacher, many),
        ("teacher", teacher, {"solver": "euler", "steps": 1}),
        ("student", student, {"steps": 1, **few}),
        ("student", student, {"steps": 2, "last": SECOND, **few}),
    ]
    rows = [measure(flow, network, name, **options) for name, network, options in runs]
    shown = [draw(flow, network, 0, **options)[0][:10] for _, network, options in runs]
    # The teacher with its default sampler as well: 35 evaluations for PFGM++.
    teachers = [rows[0], measure(flow, teacher, "teacher")]
    least = min(row["frechet_distance"] for row in teachers)
    figures = {
        "rows": [*teachers, *rows[1:]],
        "student's steps": steps,
        "student's seconds": seconds,
        "one evaluation / teacher": rows[2]["frechet_distance"] / least,
        "two evaluations / teacher": rows[3]["frechet_distance"] / least,
    }
    return figures, shown


def main() -> None:
    name_backend()
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="of each student")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--teachers", type=Path, help="folder that keeps the teachers")
    parser.add_argument("--store", action="store_true", help="write the results and the picture")
    options = parser.parse_args()
    results, pictures = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = check_folder(options.teachers or name)
        for method in options.methods:
            results[method], shown = compare(method, folder, options.steps)
            pictures += shown
    columns = ("network", "evaluations", "frechet_distance", "spread", "precision", "recall")
    for method, figures in results.items():
        rows = [
            [f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns]
            for row in figures["rows"]
        ]
        print(f"{method}\n{table(list(columns), rows)}")
        print({k: v for k, v in figures.items() if k != "rows"})
        assert all(math.isfinite(row["frechet_distance"]) for row in figures["rows"])
    if options.store:
        print(store("distillation", results))
        side = [f"{method.upper()}: {row}" for method in options.methods for row in ROWS]
        pfgm.plotting.image_grid(torch.cat(pictures), PICTURE, columns=10, side=side, scale=4)


if __name__ == "__main__":
    main()
