"""``pfgm demo``: trains on handwritten digits, draws samples and measures them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data, metrics
from ..common.files import StrPath, write_json
from ..common.messages import print_notice
from ..common.numbers import check_seed
from ..flows.batched_sampling import draw_prior, sample_in_batches
from ..flows.poisson import PoissonFlow
from ..plotting.figures import require_matplotlib
from ..solvers import StepInfo
from ..training import Terminated, TrainConfig, Trainer
from ..training.locks import locked
from ..training.model_files import save
from ..training.threads import training_threads
from .options import Output, Progress

SAMPLES = 1000
SOLVER_STEPS = 10
_PICTURE_SAMPLES = 100  # samples in samples.png
_PICTURE_ROW = 10  # samples in a row of samples.png
_PICTURE_PATHS = 8  # samples in trajectory.png
_PICTURE_LEVELS = 8  # noise levels in trajectory.png

STEPS = 4000
TRAINING = TrainConfig(
    steps=STEPS,
    batch_size=64,
    reference_batch=1398,
    learning_rate=2e-3,
    beta2=0.99,
    warmup=100,
    decay="cosine",
    ema=0.99,
    precision="float32",  # the same seed gives the same result
)


@dataclass
class Demo:
    """Train on scikit-learn's bundled digits, sample, measure, draw: a few minutes on a laptop."""

    out: Output = Path("runs/demo")
    """Folder for samples.npy, samples.png, trajectory.png, metrics.json and model.safetensors."""
    steps: int = STEPS
    """Training steps."""
    seed: int = 0
    """Seed of training and sampling: the same seed gives the same result."""
    conditional: bool = False
    """Train with labels: each row of samples.png is one digit."""
    progress: Progress = True

    def run(self) -> None:
        run(**vars(self))


def run(
    out: StrPath,
    *,
    steps: int = STEPS,
    seed: int = 0,
    conditional: bool = False,
    report: Callable[[str], None] = print_notice,
    progress: bool = True,
) -> dict[str, Any]:
    """As :class:`Demo`, with ``report`` called for each line of text.

    It returns the content of metrics.json. samples.npy is (1000, 8, 8), float32 in [-1, 1]. The
    same seed gives the same results on the same number of threads, except for times. If training is
    interrupted, model.safetensors holds the weights at that step. With ``conditional`` metrics.json
    also says how often a classifier trained on the real digits agrees with the label.
    """
    check_seed(seed)
    warmup = min(TRAINING.schedule.warmup, steps // 10)
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

    require_matplotlib()
    started = time.perf_counter()
    digits = data.digits()
    flow = PoissonFlow.from_data(digits.train)
    trainer = _trainer(flow, digits, config, conditional, progress)
    with training_threads(trainer) as threads:
        report(f"training on {len(digits.train)} digits, {config.steps} steps, threads: {threads}")
        _train(trainer, flow, folder / "model.safetensors", report)
    trained = time.perf_counter()

    recorder, labels = _Recorder(), torch.arange(SAMPLES, device="cpu") // _PICTURE_ROW % 10
    samples, evaluations = sample_in_batches(
        flow,
        trainer.averaged,
        draw_prior(flow, SAMPLES, config.seed),
        batch_size=SAMPLES,
        labels=labels if conditional else None,
        steps=SOLVER_STEPS,
        callback=recorder,
        progress=progress,
    )
    samples = samples.clamp(-1, 1)
    sampled = time.perf_counter()

    figures = _measure(samples, digits)
    if conditional:
        figures["agreement"] = _agreement(samples, labels, digits)
    data.save_array(folder / "samples.npy", samples[:, 0])
    side = [str(int(label)) for label in labels[:_PICTURE_SAMPLES:_PICTURE_ROW]]
    image_grid(
        samples[:_PICTURE_SAMPLES],
        folder / "samples.png",
        columns=_PICTURE_ROW,
        side=side if conditional else (),
    )
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
        "threads": threads,
    }
    write_json(folder / "metrics.json", figures)
    report(_summary(figures, folder))
    return figures


def _trainer(
    flow: PoissonFlow, digits: data.Digits, config: TrainConfig, conditional: bool, progress: bool
) -> Trainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = flow.network(
            "unet",
            classes=10 if conditional else 0,
            data_std=float(digits.train.square().mean().sqrt()),
        )
    labels = digits.train_labels if conditional else None
    return Trainer(flow, network, digits.train, config, progress=progress, labels=labels)


def _train(trainer: Trainer, flow: PoissonFlow, path: Path, report: Callable[[str], None]) -> None:
    """Trains and writes the averaged weights, also if training is interrupted."""
    try:
        trainer.train()
    except (KeyboardInterrupt, Terminated):
        save(path, flow, trainer.averaged, step=trainer.step)
        report(f"stopped at step {trainer.step}; the weights are in {path}")
        raise
    save(path, flow, trainer.averaged, step=trainer.step)


class _Recorder:
    """A callback of the solver that keeps a few points of each step, for trajectory.png."""

    def __init__(self) -> None:
        self._points: list[tuple[float, Tensor]] = []

    def __call__(self, info: StepInfo) -> None:
        self._points.append((info["z"], info["x"][:_PICTURE_PATHS].clone()))

    def path(self, samples: Tensor, z_min: float) -> tuple[Tensor, list[float]]:
        """Points (levels, n, *S) at no more than eight levels, the samples last, and their z."""
        points = [*self._points, (z_min, samples[:_PICTURE_PATHS])]
        count = min(_PICTURE_LEVELS, len(points))
        chosen = torch.linspace(0, len(points) - 1, count, device="cpu").round().int().tolist()
        return torch.stack([points[i][1] for i in chosen]), [points[i][0] for i in chosen]


def _measure(samples: Tensor, digits: data.Digits) -> dict[str, Any]:
    """Compares the samples, and also the training digits, with the held-out digits."""
    train, held_out = digits.train, digits.held_out
    samples_inside = metrics.precision_recall(samples, held_out)
    train_inside = metrics.precision_recall(train, held_out)
    nearest = torch.cdist(samples.flatten(1), train.flatten(1)).argmin(1)
    classes = torch.bincount(digits.train_labels[nearest], minlength=10)
    return {
        "frechet_distance": {
            "samples": metrics.frechet_distance(samples, held_out),
            "train": metrics.frechet_distance(train, held_out),
        },
        "precision": {"samples": samples_inside.precision, "train": train_inside.precision},
        "recall": {"samples": samples_inside.recall, "train": train_inside.recall},
        "median_distance_to_train": {
            "samples": float(metrics.nearest_distance(samples, train).median()),
            "held_out": float(metrics.nearest_distance(held_out, train).median()),
        },
        "samples_per_digit": classes.tolist(),
    }


def _agreement(samples: Tensor, labels: Tensor, digits: data.Digits) -> dict[str, float]:
    """The fraction of labels that a classifier trained on the real digits agrees with."""
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
