"""Weights of the levels in PFGM's loss: labels, and quality with and without them.

    python -m benchmarks.studies.weighting [--seeds 0 1 2]

Trains the same U-Net with the published and with the balanced loss, and with PFGM++ at D = 128, on
500 digits that are enlarged to 16 × 16 pixels, for 1000 steps. Each is trained once with labels and
once without. The figures are those of 1000 samples with 10 evaluations each:

- agreement: the share of samples to which a classifier gives the label that was asked for, without
  guidance and with guidance 2. The classifier is trained on all real training digits.
- Fréchet distance, precision and recall (k = 3) in pixel space, against the held-out digits.

Every network is trained by one thread, so the figures do not depend on the number of processors.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

import pfgm
from benchmarks.common.models import model
from benchmarks.common.rows import Row, over_seeds, select
from benchmarks.common.study import Study, run
from pfgm.evaluation import draw_samples
from pfgm.flows.flow import Flow
from pfgm.flows.poisson_networks import Weighting
from pfgm.training import TrainConfig, Trainer
from pfgm.training.run_config import Method

METHODS = ("PFGM, published", "PFGM, balanced", "PFGM++ 128")
_WEIGHTINGS: dict[str, Weighting] = {METHODS[0]: "published", METHODS[1]: "balanced"}
_ROWS, _STEPS, _WIDTH = 500, 1000, 32
_SAMPLES, _BATCH, _CLASSES = 1000, 250, 10
_FIGURES = ("agreement", "agreement_guided", "frechet_distance", "precision", "recall")


def enlarged(images: Tensor) -> Tensor:
    """Digits (n, 1, 8, 8) as (n, 1, 16, 16)."""
    return F.interpolate(images, scale_factor=2, mode="bilinear")


def model_of(method: str, train: Tensor, classes: int, seed: int) -> tuple[Flow, nn.Module, Any]:
    """The flow, the network and the loss of a method; None is the flow's own loss."""
    name: Method = "pfgm++" if method.startswith("PFGM++") else "pfgm"
    flow, network = model(name, train, width=_WIDTH, classes=classes, seed=seed)
    if isinstance(flow, pfgm.PoissonFlow):
        return flow, network, functools.partial(flow.loss, weighting=_WEIGHTINGS[method])
    return flow, network, None


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The networks to train."""
    for seed, labels, method in itertools.product(options.seeds, (True, False), METHODS):
        yield {"method": method, "labels": labels, "seed": seed}


def measure(options: argparse.Namespace, method: str, labels: bool, seed: int) -> Row:
    """Trains a network and measures its samples."""
    digits = pfgm.data.digits()
    train, known = enlarged(digits.train[:_ROWS]), digits.train_labels[:_ROWS]
    flow, network, loss = model_of(method, train, _CLASSES if labels else 0, seed)
    config = TrainConfig(
        steps=_STEPS,
        batch_size=64,
        reference_batch=_ROWS,
        learning_rate=1e-3,
        beta2=0.99,
        warmup=100,
        decay="cosine",
        ema=0.99,
        precision="bfloat16",
        seed=seed,
    )
    trainer = Trainer(flow, network, train, config, labels=known if labels else None, loss=loss)
    trained = trainer.train().eval()
    samples = draw(flow, trained, seed)
    row: Row = {}
    if labels:
        wanted = torch.arange(_SAMPLES) % _CLASSES
        guided = draw(flow, trained, seed, guidance=2.0)
        row["agreement"] = agreement(samples, wanted, digits)
        row["agreement_guided"] = agreement(guided, wanted, digits)
    held_out = enlarged(digits.held_out)
    measured = pfgm.metrics.precision_recall(samples, held_out, k=3)
    distance = pfgm.metrics.frechet_distance(samples, held_out)
    return row | {"frechet_distance": distance, **measured._asdict()}


def draw(flow: Flow, network: nn.Module, seed: int, **options: Any) -> Tensor:
    """Samples by the multistep solver, 10 steps on the log grid. A network of labels gets each."""
    samples, _ = draw_samples(
        flow,
        network,
        _SAMPLES,
        seed=seed,
        batch_size=_BATCH,
        solver="multistep",
        schedule="log",
        steps=10,
        **options,
    )
    return samples.clamp(-1, 1)


def agreement(samples: Tensor, labels: Tensor, digits: pfgm.data.Digits) -> float:
    """The share of samples (n, 1, 16, 16) to which a classifier of digits gives these labels."""
    classifier = SVC().fit(digits.train.flatten(1).numpy(), digits.train_labels.numpy())
    return float(classifier.score(F.avg_pool2d(samples, 2).flatten(1).numpy(), labels.numpy()))


def means(rows: list[Row]) -> list[Row]:
    """The mean of each figure over the seeds, and its standard deviation."""
    figures = {True: _FIGURES, False: _FIGURES[2:]}  # of samples without labels none agree
    return [
        row
        for with_labels in figures
        for row in over_seeds(
            select(rows, labels=with_labels), ("method", "labels"), figures[with_labels]
        )
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


STUDY = Study("weighting", settings, measure, means, add_arguments=add_arguments, threads=1)

if __name__ == "__main__":
    run(STUDY, __doc__)
