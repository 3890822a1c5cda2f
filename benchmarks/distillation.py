"""Few-step models of digits beside their teachers: quality at one and two evaluations.

    python benchmarks/distillation.py [--steps 4000] [--store]

Trains a network of PFGM and one of PFGM++ (D = 128) as ``pfgm demo`` does, makes a student of each,
and draws 1000 samples for each of three seeds: the Fréchet distance in pixel space to the 399
held-out digits. ``--teachers`` holds runs of an earlier call, which are then not trained again.
``--store`` writes results/distillation.json and the picture.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import store
from report import table
from torch import Tensor, nn

import pfgm
from pfgm import demo
from pfgm.base import Flow
from pfgm.distillation import Consistency
from pfgm.files import check_folder
from pfgm.training import Trainer

SEEDS = (0, 1, 2)
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "few-steps.png"
# The teacher's solver, the levels of its way, and where a second evaluation begins.
TEACHER: dict[str, dict[str, Any]] = {
    "pfgm": {"solver": "multistep", "last": 0.1},
    "pfgm++": {"solver": "multistep", "steps": 10},
}
LAST: dict[str, float | None] = {"pfgm": 0.1, "pfgm++": None}
SECOND = (0.2, 0.35, 0.5, 1.0)


def teacher_of(method: str, path: Path) -> tuple[Flow, nn.Module]:
    if path.exists():
        return pfgm.load(path)
    data = pfgm.data.digits().train
    torch.manual_seed(0)
    network: nn.Module
    flow: Flow
    if method == "pfgm":
        flow = pfgm.PoissonFlow.from_data(data)
        network = pfgm.networks.UNet(flow.shape, data_std=float(data.square().mean().sqrt()))
    else:
        flow = plusplus = pfgm.PoissonFlowPP.from_data(data, D=128)
        network = pfgm.networks.Denoiser("unet", {"shape": flow.shape}, plusplus.sigma_data)
    averaged = Trainer(flow, network, data, demo.TRAINING).train()
    pfgm.save(path, flow, averaged)
    return pfgm.load(path)


def student_of(method: str, flow: Flow, teacher: nn.Module, steps: int) -> tuple[nn.Module, float]:
    """The student, and the seconds that its training took."""
    consistency = Consistency(flow, teacher, last=LAST[method])
    config = dataclasses.replace(demo.TRAINING, steps=steps, learning_rate=1e-3, references=0)
    student, data = copy.deepcopy(teacher), pfgm.data.digits().train
    started = time.perf_counter()
    trainer = Trainer(flow, student, data, config, loss=consistency.loss)
    return trainer.train(), time.perf_counter() - started


def draw(flow: Flow, network: nn.Module, seed: int, **options: Any) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    samples, nfe = flow.sample(
        network, demo.SAMPLES, generator=generator, return_nfe=True, **options
    )
    return samples.clamp(-1, 1), nfe


def measure(flow: Flow, network: nn.Module, name: str, **options: Any) -> dict[str, Any]:
    held_out = pfgm.data.digits().held_out
    distances, precisions, recalls, nfe = [], [], [], 0
    for seed in SEEDS:
        samples, nfe = draw(flow, network, seed, **options)
        found = pfgm.metrics.precision_recall(samples, held_out)
        distances.append(pfgm.metrics.frechet_distance(samples, held_out))
        precisions.append(found.precision)
        recalls.append(found.recall)
    return {
        "network": name,
        "sampler": options,
        "evaluations": nfe,
        "frechet_distance": statistics.mean(distances),
        "spread": statistics.stdev(distances),
        "precision": statistics.mean(precisions),
        "recall": statistics.mean(recalls),
    }


def beside(method: str, folder: Path, steps: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Figures of a teacher and its student, and ten samples of each from the same priors."""
    flow, teacher = teacher_of(method, folder / f"{method}.safetensors")
    student, seconds = student_of(method, flow, teacher, steps)
    few: dict[str, Any] = {"solver": "consistency"}
    rows = [measure(flow, teacher, "teacher", **TEACHER[method])]
    rows += [measure(flow, teacher, "teacher", solver="euler", steps=k) for k in (1, 2)]
    rows += [measure(flow, student, "student", steps=1, **few)]
    rows += [measure(flow, student, "student", steps=2, last=last, **few) for last in SECOND]
    best = min(rows[-len(SECOND) :], key=lambda row: float(row["frechet_distance"]))
    least = rows[0]["frechet_distance"]
    shown = [
        draw(flow, network, 0, **options)[0][:10]
        for network, options in (
            (teacher, TEACHER[method]),
            (teacher, {"solver": "euler", "steps": 1}),
            (student, rows[3]["sampler"]),
            (student, best["sampler"]),
        )
    ]
    figures = {
        "rows": rows,
        "student's steps": steps,
        "student's seconds": seconds,
        "one evaluation / teacher": rows[3]["frechet_distance"] / least,
        "two evaluations / teacher": best["frechet_distance"] / least,
    }
    return figures, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=4000, help="of each student")
    parser.add_argument("--methods", nargs="+", default=list(TEACHER), choices=list(TEACHER))
    parser.add_argument("--teachers", type=Path, help="folder that keeps the teachers")
    parser.add_argument("--store", action="store_true", help="write the results and the picture")
    options = parser.parse_args()
    found, pictures = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = check_folder(options.teachers or name)
        for method in options.methods:
            found[method], shown = beside(method, folder, options.steps)
            pictures += shown
    columns = ("network", "evaluations", "frechet_distance", "spread", "precision", "recall")
    for method, figures in found.items():
        rows = [
            [f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns]
            for row in figures["rows"]
        ]
        print(f"{method}\n{table(list(columns), rows)}")
        print({k: v for k, v in figures.items() if k != "rows"})
        assert all(math.isfinite(row["frechet_distance"]) for row in figures["rows"])
    if options.store:
        print(store("distillation", found))
        title = "teacher, teacher at one evaluation, student at one and two: PFGM, PFGM++"
        pfgm.plotting.image_grid(torch.cat(pictures), PICTURE, columns=10, title=title, scale=4)


if __name__ == "__main__":
    main()
