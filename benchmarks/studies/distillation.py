"""Few-step models of digits beside their teachers: quality at one and two evaluations.

    python -m benchmarks.studies.distillation [--steps 1500] [--draw]

Trains a network of PFGM and one of PFGM++ (D = 128) as ``recipes/digits.json`` says, and a student
of each as ``pfgm train --teacher`` does. Draws 1000 samples for each of three seeds, and measures
the Fréchet distance in pixel space to the 399 held-out digits. ``--out`` keeps the networks.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pfgm
from benchmarks.common.folders import DOCS
from benchmarks.common.models import DIGITS, model
from benchmarks.common.rows import Row, mean_of
from benchmarks.common.study import Study, run
from pfgm.distillation import Consistency
from pfgm.flows.flow import Flow
from pfgm.training import Trainer
from pfgm.training.run_config import Method

SEEDS = (0, 1, 2)
SAMPLES = 1000
METHODS: tuple[Method, ...] = ("pfgm", "pfgm++")
SAMPLERS: dict[str, dict[str, Any]] = {
    "multistep, 10": {"solver": "multistep", "steps": 10},
    "the default": {},  # 35 evaluations for PFGM++
    "euler, 1": {"solver": "euler", "steps": 1},
    "consistency, 1": {"solver": "consistency", "steps": 1},
    "consistency, 2": {"solver": "consistency", "steps": 2, "last": 0.5},
}
_DRAWN = ("multistep, 10", "euler, 1", "consistency, 1", "consistency, 2")


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """Teachers and students with their samplers."""
    for method in METHODS:
        for sampler in SAMPLERS:
            if sampler.startswith("consistency"):
                student = {"network": "student", "student's steps": options.steps}
                yield {"method": method, "sampler": sampler, **student}
            else:
                yield {"method": method, "sampler": sampler, "network": "teacher"}


def teacher_of(method: Method, path: Path) -> tuple[Flow, nn.Module]:
    """The teacher in a file, which is trained if the file does not exist."""
    if path.exists():
        return pfgm.load(path)
    data = pfgm.data.digits().train
    flow, network = model(method, data)
    averaged = Trainer(flow, network, data, DIGITS.training).train()
    pfgm.save(path, flow, averaged)
    return pfgm.load(path)


def network_of(options: argparse.Namespace, method: Method, network: str) -> tuple[Flow, nn.Module]:
    """A teacher or a student; a file in the folder, which is written if it does not exist."""
    options.out.mkdir(parents=True, exist_ok=True)
    flow, teacher = teacher_of(method, options.out / f"{method}.safetensors")
    if network == "teacher":
        return flow, teacher
    path = options.out / f"{method}-student-{options.steps}.safetensors"
    if not path.exists():
        config = dataclasses.replace(
            DIGITS.training, steps=options.steps, learning_rate=1e-3, reference_batch=0
        )
        data, loss = pfgm.data.digits().train, Consistency(flow, teacher).loss
        trainer = Trainer(flow, copy.deepcopy(teacher), data, config, loss=loss)
        pfgm.save(path, flow, trainer.train())
    return pfgm.load(path)


def samples_of(
    options: argparse.Namespace, method: Method, sampler: str, seed: int, n: int
) -> tuple[Tensor, int]:
    """Samples in [-1, 1], and the evaluations of the network."""
    student = sampler.startswith("consistency")
    flow, network = network_of(options, method, "student" if student else "teacher")
    generator = torch.Generator().manual_seed(seed)
    samples, nfe = flow.sample(
        network, n, generator=generator, return_nfe=True, **SAMPLERS[sampler]
    )
    return samples.clamp(-1, 1), nfe


def measure(options: argparse.Namespace, method: Method, sampler: str, **_: Any) -> Row:
    """The figures of a network with one sampler: means over the seeds."""
    held_out, rows, nfe = pfgm.data.digits().held_out, [], 0
    for seed in SEEDS:
        samples, nfe = samples_of(options, method, sampler, seed, SAMPLES)
        inside = pfgm.metrics.precision_recall(samples, held_out)
        distance = pfgm.metrics.frechet_distance(samples, held_out)
        rows.append({"frechet_distance": distance, **inside._asdict()})
    mean = mean_of(rows)
    spread = mean["frechet_distance_spread"]
    return {"evaluations": nfe, "spread": spread, **{name: mean[name] for name in rows[0]}}


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    """Draws ten samples of each network from the same prior points."""
    runs = [(method, sampler) for method in METHODS for sampler in _DRAWN]
    pictures = [samples_of(options, *run, 0, 10)[0] for run in runs]
    side = [f"{method.upper()}: {sampler}" for method, sampler in runs]
    path = DOCS / "images" / "few-steps.png"
    pfgm.plotting.image_grid(torch.cat(pictures), path, columns=10, side=side, scale=4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1500, help="of each student")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"), help="networks")


STUDY = Study("distillation", settings, measure, draw=draw, add_arguments=add_arguments)

if __name__ == "__main__":
    run(STUDY, __doc__)
