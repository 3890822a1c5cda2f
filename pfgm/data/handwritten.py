"""The handwritten digits that come with scikit-learn, for demonstrations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.optional import optional


class Digits(NamedTuple):
    """8 × 8 grey images of handwritten digits in [-1, 1] with their labels, in two parts.

    train (1398, 1, 8, 8) and held_out (399, 1, 8, 8) are float32. train_labels (1398,) and
    held_out_labels (399,) are int64 from 0 to 9.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def digits() -> Digits:
    """The handwritten digits that come with scikit-learn, always in the same two parts.

    A grey level from 0 to 16 becomes level/8 - 1. Image i is held out if i mod 9 is 4 or 8. Source:
    the test part of the UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).

    Raises:
        ImportError: scikit-learn is not installed.

    >>> digits().train.shape, digits().held_out.shape
    (torch.Size([1398, 1, 8, 8]), torch.Size([399, 1, 8, 8]))
    """
    datasets = optional("sklearn.datasets", "digits() needs scikit-learn", "demo")
    levels, classes = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(levels).float().view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(classes).long()
    remainder = torch.arange(len(images), device="cpu") % 9
    held_out = (remainder == 4) | (remainder == 8)
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])
