"""What code that was written for EDM reads from a network: attributes, and one-hot labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.values import checks_values


class EDMInterface:
    """The attributes that the samplers of EDM (arXiv 2206.00364) read from a network.

    Such a sampler starts from ``latents * sigma_max``. For normal latents that is the prior only at
    D = ∞; for any D give it ``flow.prior(n) / flow.sigma_max``, and no churn at a finite D.
    """

    shape: tuple[int, ...]
    classes: int
    sigma_min, sigma_max = 0.0, math.inf  # any level

    @property
    def img_channels(self) -> int:
        """The number of channels of the images."""
        return self._image_shape()[0]

    @property
    def img_resolution(self) -> int:
        """Height and width of the images."""
        return self._image_shape()[1]

    @property
    def label_dim(self) -> int:
        """The number of labels; 0 for none."""
        return self.classes

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest level that the network takes, which is sigma itself."""
        return sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, device="cpu")

    def _image_shape(self) -> tuple[int, ...]:
        if len(self.shape) != 3 or self.shape[1] != self.shape[2]:
            raise AttributeError(f"samples of shape {self.shape} are not square images.")
        return self.shape


def label_numbers(labels: Tensor | None, classes: int) -> Tensor | None:
    """Labels (B,) from labels (B,), or from one-hot rows (B, classes) as EDM has them.

    A row of zeros is no label, −1.

    Raises:
        ValueError: rows of floating numbers are not one-hot, or have another width.

    >>> label_numbers(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 2)
    tensor([ 1, -1])
    """
    if not isinstance(labels, Tensor) or not classes or labels.shape[1:] != (classes,):
        return labels  # other types are an error of the network
    largest, numbers = labels.max(1)
    if checks_values(labels.device):
        rows = F.one_hot(numbers, classes) * (largest > 0)[:, None]
        if not torch.equal(rows.to(labels.dtype), labels):
            raise ValueError(
                f"labels must be integers (B,), or one-hot rows (B, {classes}), got rows that are "
                "not one-hot."
            )
    return torch.where(largest > 0, numbers, -1)
