"""Quality of samples in pixel space, and in the features of a small classifier.

The classifier is trained here, on the training data and their labels. The Fréchet distance of its
features is not an FID and can be compared only within one run.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.claims.presets import Preset
from pfgm import metrics
from pfgm.common.files import write_atomic
from pfgm.data import to_unit
from pfgm.datasets import open_data
from pfgm.evaluation import evenly_spaced

__all__ = [
    "FIGURES",
    "Classifier",
    "Data",
    "accuracy",
    "classifier_path",
    "data_of",
    "figures_of",
    "train_classifier",
]

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
    levels: int
    rms: float
    """Root mean square of the training data's values."""


@lru_cache
def data_of(preset: Preset) -> Data:
    """The preset's data, in memory."""
    found = open_data(preset.data)
    if found.held_out is None or found.train.labels is None or found.held_out.labels is None:
        raise ValueError(
            f"data is {preset.data!r}; allowed are data with labels and a held-out part."
        )
    train, held_out = (to_unit(part[:]) for part in (found.train, found.held_out))
    return Data(
        train,
        found.train.labels.long(),
        held_out,
        found.held_out.labels.long(),
        found.levels,
        float(train.square().mean().sqrt()),
    )


class Classifier(nn.Module):
    """Three convolutions and a hidden layer, whose outputs are the features."""

    def __init__(self, channels: int, classes: int, features: int = 32) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(256, features)
        self.last = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, features)."""
        return F.relu(self.hidden(self.convolutions(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        logits: Tensor = self.last(self.features(x))
        return logits


def _classifier(preset: Preset) -> Classifier:
    data = data_of(preset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(data.train.shape[1], int(data.train_labels.max()) + 1)


def classifier_path(folder: Path) -> Path:
    """The file of the classifier's weights."""
    return folder / "classifier.safetensors"


def train_classifier(preset: Preset, folder: Path) -> None:
    """Trains the classifier on the real training data."""
    data, classifier = data_of(preset), _classifier(preset).to(preset.device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(preset.classifier_epochs):
        for rows in torch.randperm(len(data.train), generator=generator).split(64):
            logits = classifier(data.train[rows].to(preset.device))
            loss = F.cross_entropy(logits, data.train_labels[rows].to(preset.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    content = safetensors.torch.save(classifier.cpu().state_dict())
    write_atomic(classifier_path(folder), lambda file: file.write(content))


@lru_cache
def load_classifier(preset: Preset, folder: Path) -> Classifier:
    """The classifier, on the preset's device."""
    classifier = _classifier(preset)
    classifier.load_state_dict(safetensors.torch.load_file(classifier_path(folder)))
    return classifier.to(preset.device).eval()


@torch.no_grad()
def accuracy(preset: Preset, folder: Path) -> float:
    """Share of the held-out data that the classifier labels correctly."""
    data = data_of(preset)
    classifier = load_classifier(preset, folder)
    parts = [classifier(part.to(preset.device)).argmax(1) for part in data.held_out.split(500)]
    return float((torch.cat(parts).cpu() == data.held_out_labels).float().mean())


class _Real(NamedTuple):
    rows: Tensor
    neighbours: Tensor


@lru_cache
def _real(preset: Preset, folder: Path, space: str) -> _Real:
    chosen = evenly_spaced(data_of(preset).held_out, preset.samples)
    rows = _in_space(chosen.to(preset.device), preset, folder, space)
    return _Real(rows, metrics.neighbour_distances(rows, 3))


@torch.no_grad()
def _in_space(rows: Tensor, preset: Preset, folder: Path, space: str) -> Tensor:
    if space == "pixels":
        return rows
    classifier = load_classifier(preset, folder)
    return torch.cat([classifier.features(part) for part in rows.split(500)])


def figures_of(samples: Tensor, preset: Preset, folder: Path) -> dict[str, float]:
    """Fréchet distance, precision and recall (k = 3) of samples against held-out data.

    All are NaN if the samples are not finite.
    """
    if not bool(samples.isfinite().all()):
        return dict.fromkeys(FIGURES, math.nan)
    samples = samples.detach().to(preset.device).clamp(-1, 1)
    found = {}
    for space in _SPACES:
        rows = _in_space(samples, preset, folder, space)
        real = _real(preset, folder, space)
        inside = metrics.precision_recall(rows, real.rows, k=3, neighbours=real.neighbours)
        found[f"frechet_{space}"] = metrics.frechet_distance(rows, real.rows)
        found[f"precision_{space}"] = inside.precision
        found[f"recall_{space}"] = inside.recall
    return found
