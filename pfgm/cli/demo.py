"""The demonstration: from nothing to samples of handwritten digits, measured and drawn."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data, metrics
from ..common.checks import check_seed
from ..common.files import StrPath, write_atomic
from ..common.messages import say
from ..flows.poisson import PoissonFlow
from ..networks import UNet
from ..solvers import StepInfo
from ..training import Terminated, TrainConfig, Trainer, checkpoint
from ..training.locks import locked

__all__ = ["TRAINING", "run"]

SAMPLES = 1000
SOLVER_STEPS = 10
_SHOWN_SAMPLES, _SHOWN_PATHS, _SHOWN_LEVELS = 100, 8, 8
_ROW = 10  # samples in a row of the picture

TRAINING = TrainConfig(
    steps=4000,
    batch_size=64,
    references=1398,
    learning_rate=2e-3,
    beta2=0.99,
    warmup=100,
    decay="cosine",
    ema=0.99,
)


def run(
    out: StrPath,
    *,
    steps: int = TRAINING.steps,
    seed: int = 0,
    conditional: bool = False,
    report: Callable[[str], None] = say,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains on scikit-learn's digits, samples, and writes what came of it into a folder.

    samples.npy (1000, 8, 8) float32 in [-1, 1], samples.png, trajectory.png, metrics.json and
    model.safetensors. Everything but the times is a function of the seed (and of the number of
    threads). Interrupted training leaves the weights so far in model.safetensors.

    Args:
        out: the folder, created where missing.
        steps: of training.
        seed: of the network, training and sampling.
        conditional: tell the network which digit it is; each row of samples.png is then one digit,
            and a classifier trained on the real digits says how many it takes for what they are.
        report: takes lines of text on what is done.
        progress: show progress bars.

    Returns:
        The content of metrics.json.

    Raises:
        FolderInUse: another run is at work in the folder.
        OSError: the folder cannot be written.
        ImportError: scikit-learn or matplotlib is missing.
    """
    check_seed(seed)
    warmup = min(TRAINING.warmup, steps // 10)
    config = dataclasses.replace(TRAINING, steps=steps, warmup=warmup, seed=seed)
    with locked(out) as folder:
        return _run(folder, config, conditional, report, progress)


def _run(
    folder: Path,
    config: TrainConfig,
    conditional: bool,
    report: Callable[[str], None],
    progress: bool,
) -> dict[str, Any]:
    from ..plotting import image_grid, trajectory_grid

    started = time.perf_counter()
    digits = data.digits()
    flow = PoissonFlow.from_data(digits.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = UNet(
            flow.shape,
            classes=10 if conditional else 0,
            data_std=float(digits.train.square().mean().sqrt()),
        )
    known = digits.train_labels if conditional else None
    trainer = Trainer(flow, network, digits.train, config, progress=progress, labels=known)
    report(f"training on {len(digits.train)} digits, {config.steps} steps")
    try:
        trainer.train()
    except (KeyboardInterrupt, Terminated):
        checkpoint.save(folder / "model.safetensors", flow, trainer.averaged, step=trainer.step)
        raise
    checkpoint.save(folder / "model.safetensors", flow, trainer.averaged, step=trainer.step)
    trained = time.perf_counter()

    recorder, labels = _Recorder(), torch.arange(SAMPLES) // _ROW % 10
    samples, evaluations = flow.sample(
        trainer.averaged,
        SAMPLES,
        steps=SOLVER_STEPS,
        condition={"labels": labels} if conditional else None,
        generator=torch.Generator().manual_seed(config.seed),
        callback=recorder,
        progress=progress,
        return_nfe=True,
    )
    samples = samples.clamp(-1, 1)
    sampled = time.perf_counter()

    figures = _measure(samples, digits)
    if conditional:
        figures["agreement"] = _agreement(samples, labels, digits)
    data.save_array(folder / "samples.npy", samples[:, 0])
    image_grid(samples[:_SHOWN_SAMPLES], folder / "samples.png")
    trajectory_grid(*recorder.path(samples, flow.z_min), folder / "trajectory.png")
    figures |= {
        "evaluations": evaluations,
        "seconds": {
            "training": trained - started,
            "sampling": sampled - trained,
            "total": time.perf_counter() - started,
        },
        "seed": config.seed,
        "steps": config.steps,
        "threads": torch.get_num_threads(),
    }
    content = json.dumps(figures, indent=2) + "\n"
    write_atomic(folder / "metrics.json", lambda file: file.write(content.encode()))
    report(_summary(figures, folder))
    return figures


class _Recorder:
    """Keeps a few of the points at each step."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, Tensor]] = []

    def __call__(self, info: StepInfo) -> None:
        self._seen.append((info["z"], info["x"][:_SHOWN_PATHS].clone()))

    def path(self, samples: Tensor, z_min: float) -> tuple[Tensor, list[float]]:
        """Points (levels, n, *S) and z at about eight levels, the samples last."""
        seen = [*self._seen, (z_min, samples[:_SHOWN_PATHS])]
        places = torch.linspace(0, len(seen) - 1, min(_SHOWN_LEVELS, len(seen))).round().int()
        shown = [seen[place] for place in places.tolist()]
        return torch.stack([x for _, x in shown]), [z for z, _ in shown]


def _measure(samples: Tensor, digits: data.Digits) -> dict[str, Any]:
    """Quality of the samples against held-out digits, beside that of the training digits."""
    train, held_out = digits.train, digits.held_out
    of_samples = metrics.precision_recall(samples, held_out)
    of_train = metrics.precision_recall(train, held_out)
    nearest = torch.cdist(samples.flatten(1), train.flatten(1)).argmin(1)
    classes = torch.bincount(digits.train_labels[nearest], minlength=10)
    return {
        "frechet_distance": {
            "samples": metrics.frechet_distance(samples, held_out),
            "train": metrics.frechet_distance(train, held_out),
        },
        "precision": {"samples": of_samples.precision, "train": of_train.precision},
        "recall": {"samples": of_samples.recall, "train": of_train.recall},
        "median_distance_to_train": {
            "samples": float(metrics.nearest_distance(samples, train).median()),
            "held_out": float(metrics.nearest_distance(held_out, train).median()),
        },
        "samples_per_digit": classes.tolist(),
    }


def _agreement(samples: Tensor, labels: Tensor, digits: data.Digits) -> dict[str, float]:
    """How often a classifier trained on the real digits sees the label, in samples and held out."""
    from sklearn.svm import SVC

    classifier = SVC().fit(digits.train.flatten(1).numpy(), digits.train_labels.numpy())
    pairs = {"samples": (samples, labels), "held_out": (digits.held_out, digits.held_out_labels)}
    return {
        name: float(classifier.score(images.flatten(1).numpy(), known.numpy()))
        for name, (images, known) in pairs.items()
    }


def _summary(figures: dict[str, Any], folder: Path) -> str:
    rows = [("against 399 held-out digits", "samples", "train")]
    for name in ("frechet_distance", "precision", "recall"):
        values = figures[name]
        rows.append((name.replace("_", " "), f"{values['samples']:.3f}", f"{values['train']:.3f}"))
    distance = figures["median_distance_to_train"]
    lines = [f"{a:30}{b:>10}{c:>10}" for a, b, c in rows]
    if agreement := figures.get("agreement"):
        lines.append(
            f"a classifier agrees with the label of {100 * agreement['samples']:.1f} % of the "
            f"samples, of {100 * agreement['held_out']:.1f} % of the held-out digits"
        )
    return "\n".join(
        [
            *lines,
            f"median distance to the nearest training digit: samples {distance['samples']:.2f}, "
            f"held-out digits {distance['held_out']:.2f}",
            f"{figures['evaluations']} evaluations a sample, {figures['seconds']['total']:.0f} s",
            f"{folder}: samples.png, trajectory.png, samples.npy, metrics.json, model.safetensors",
        ]
    )
