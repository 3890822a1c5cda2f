"""Quality of samples in pixel space, and in the features of a small classifier.

The classifier is trained here, on the training data and their labels. The Fréchet distance of its
features is not an FID and can be compared only within one run.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import pfgm
from benchmarks.claims.presets import Preset
from pfgm import metrics
from pfgm.data import to_unit
from pfgm.evaluation import evenly_spaced

_SPACES = ("pixels", "features")
FIGURES = tuple(
    f"{name}_{space}" for space in _SPACES for name in ("frechet", "precision", "recall")
)
"""The figures of :func:`figures_of`."""


class Data(NamedTuple):
    """Real images (n, C, H, W) in [-1, 1] and their labels."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    grey_levels: int
    rms: float
    """Root mean square of the training data's values."""


@lru_cache
def data_of(preset: Preset) -> Data:
    """The preset's data, in memory."""
    opened = pfgm.data.open(preset.data)
    others = opened.held_out
    if others is None or opened.labels is None or others.labels is None:
        raise ValueError(f"data must have labels and a held-out part, got {preset.data!r}.")
    train, held_out = (to_unit(part.samples[:]) for part in (opened, others))
    rms = float(train.square().mean().sqrt())
    return Data(train, opened.labels, held_out, others.labels, opened.grey_levels, rms)


def classifier_path(folder: Path) -> Path:
    """The file of the classifier's weights."""
    return folder / "classifier.safetensors"


def train_classifier(preset: Preset, folder: Path) -> None:
    """Trains the classifier on the real training data."""
    data = data_of(preset)
    classifier = metrics.train_classifier(
        data.train,
        data.train_labels,
        epochs=preset.classifier_epochs,
        decay=False,  # as for the figures that are stored
    )
    metrics.save_classifier(classifier_path(folder), classifier)


@lru_cache
def load_classifier(preset: Preset, folder: Path) -> metrics.Classifier:
    """The classifier."""
    return metrics.load_classifier(classifier_path(folder))


def accuracy(preset: Preset, folder: Path) -> float:
    """Share of the held-out data that the classifier labels correctly."""
    data = data_of(preset)
    return load_classifier(preset, folder).accuracy(data.held_out, data.held_out_labels)


class _Real(NamedTuple):
    rows: Tensor
    neighbours: Tensor


@lru_cache
def _real(preset: Preset, folder: Path, space: str) -> _Real:
    chosen = evenly_spaced(data_of(preset).held_out, preset.samples)
    rows = _in_space(chosen, preset, folder, space)
    return _Real(rows, metrics.neighbour_distances(rows, 3))


def _in_space(rows: Tensor, preset: Preset, folder: Path, space: str) -> Tensor:
    return rows if space == "pixels" else load_classifier(preset, folder).rows(rows)


def figures_of(samples: Tensor, preset: Preset, folder: Path) -> dict[str, float]:
    """Fréchet distance, precision and recall (k = 3) of samples against held-out data.

    All are NaN if the samples are not finite.
    """
    if not bool(samples.isfinite().all()):
        return dict.fromkeys(FIGURES, math.nan)
    samples = samples.detach().clamp(-1, 1)
    figures = {}
    for space in _SPACES:
        rows = _in_space(samples, preset, folder, space)
        real = _real(preset, folder, space)
        inside = metrics.precision_recall(rows, real.rows, k=3, neighbours=real.neighbours)
        figures[f"frechet_{space}"] = metrics.frechet_distance(rows, real.rows)
        figures[f"precision_{space}"] = inside.precision
        figures[f"recall_{space}"] = inside.recall
    return figures
