"""Embeddings of the noise level and of labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..common.tensors import as_labels
from ..common.values import checks_values

_FLOOR = 1e-3  # logarithms level off here, as levels below z_min need not be told apart
_SINES = 8
_PERIODS = (2.0, 32.0)  # shortest and longest period of the sines, in units of the logarithm


def checked_labels(labels: Tensor, batch: int, classes: int) -> Tensor:
    """The labels as int64.

    Raises an error unless they are a tensor of integers below classes, of shape (B,).
    """
    if not classes:
        raise ValueError("labels given to a network without classes; build it with classes=….")
    labels = as_labels("labels", labels, batch)
    if checks_values(labels.device) and bool((labels >= classes).any()):
        raise ValueError(
            f"labels must be below {classes}, or negative for no label, got {int(labels.max())}."
        )
    return labels


class NoiseEmbedding(nn.Module):
    """Embeds log z and log(‖x‖/√N): sines and cosines, then a two-layer perceptron.

    Both are needed. At D = 1 the noise is heavy-tailed, so z alone does not tell how far x is from
    the data. Both logarithms are smooth and level off at 1e-3.

    >>> NoiseEmbedding(32)(torch.rand(5), torch.rand(5)).shape
    torch.Size([5, 32])
    """

    frequencies: Tensor

    def __init__(self, width: int, *, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        low, high = (math.log(2 * math.pi / period) for period in reversed(_PERIODS))
        frequencies = torch.linspace(low, high, _SINES).exp()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(4 * _SINES, width)
        self.second = nn.Linear(width, width)
        if classes:
            self.labels = nn.Embedding(classes + 1, width)  # the last row means no label
            nn.init.zeros_(self.labels.weight)

    def forward(self, rms: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Embed the root mean square of x (B,), z (B,) and labels (B,) as (B, width)."""
        logs = torch.stack([rms, z], 1).square().add(_FLOOR**2).log() / 2
        angles = (logs[:, :, None] * self.frequencies).flatten(1)
        features = torch.cat([angles.sin(), angles.cos()], 1)
        hidden = nn.functional.silu(self.first(features))
        if labels is not None:
            labels = checked_labels(labels, rms.shape[0], self.classes)
        if self.classes:
            hidden = hidden + self.labels(self._table_rows(labels, rms))
        return nn.functional.silu(self.second(hidden))

    def _table_rows(self, labels: Tensor | None, rms: Tensor) -> Tensor:
        """The row of the embedding table of each sample."""
        if labels is None:
            return torch.full(rms.shape, self.classes, dtype=torch.long, device=rms.device)
        # Where labels are not checked, one that is too large must not get the row for no label.
        beyond = labels >= self.classes
        return torch.where(labels < 0, self.classes, labels + beyond)
