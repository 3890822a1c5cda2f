"""What is measured: queries perturbed as in training, at real images, and their references.

The sparsity of the weights decides how long the posterior mean takes, so that random noise would
measure something else.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import pfgm

FASHION = "train-images-idx3-ubyte.gz"
# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Case(NamedTuple):
    """Perturbed queries (B, N), their z (B,) and references (M, N)."""

    x: Tensor
    z: Tensor
    references: Tensor


def perturbed(images: Tensor, B: int) -> Case:
    """B images perturbed as in training (PFGM, algorithm 2), all images as references."""
    flow = pfgm.PoissonFlow.from_data(images)
    chosen = torch.linspace(0, len(images) - 1, B).long()
    x, z = flow.perturb(images[chosen], torch.Generator().manual_seed(0))
    return Case(x.flatten(1), z, images.flatten(1))


def photograph_crops(count: int, size: int = 32) -> Tensor:
    """Crops (count, 3, size, size) in [-1, 1] of scikit-learn's two photographs, half of them
    flipped. At 32 they have the shape of CIFAR-10, which cannot be had everywhere."""
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.from_numpy(p.copy()) for p in load_sample_images().images])
    windows = photographs.unfold(1, size, 1).unfold(2, size, 1)  # (2, rows, columns, 3, size, size)
    generator = torch.Generator().manual_seed(0)
    which, row, column = (
        torch.randint(0, choices, (count,), generator=generator) for choices in windows.shape[:3]
    )
    crops = pfgm.data.to_unit(windows[which, row, column])
    flipped = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped, crops.flip(3), crops).contiguous()


def fashion_mnist() -> Tensor:
    """The 60000 training images of Fashion-MNIST as bytes (60000, 784).

    Read from Debian's package dataset-fashion-mnist, else downloaded by torchvision; skips the
    benchmark where neither can be had.
    """
    file = FASHION_FOLDER / FASHION
    if not file.exists():
        file = _downloaded()
    content = gzip.decompress(file.read_bytes())
    images = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16)
    return images.view(60000, 784).clone()  # memory of torch's own


def _downloaded() -> Path:
    datasets = pytest.importorskip(
        "torchvision.datasets",
        reason="Fashion-MNIST needs Debian's package dataset-fashion-mnist, or torchvision",
    )
    folder = Path(torch.hub.get_dir()) / "pfgm"
    try:
        datasets.FashionMNIST(folder, download=True)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"Fashion-MNIST could not be downloaded: {error}")
    return folder / "FashionMNIST" / "raw" / FASHION


def cifar_shape(B: int = 128, M: int = 4096) -> Case:
    """The published training step for CIFAR-10: N = 3072."""
    return perturbed(photograph_crops(M), B)


def fashion_shape(B: int = 256, M: int = 60000) -> Case:
    """All of Fashion-MNIST as references: N = 784."""
    return perturbed(pfgm.data.to_unit(fashion_mnist()[:M]).view(-1, 1, 28, 28), B)


def digits_shape(B: int = 128, M: int = 1437) -> Case:
    """scikit-learn's digits: N = 64."""
    digits = pfgm.data.digits()
    return perturbed(torch.cat([digits.train, digits.held_out])[:M], B)


def patches(M: int, B: int = 128) -> Case:
    """Patches of photographs, 8 × 8 in colour: N = 192, as many as one likes."""
    return perturbed(photograph_crops(M, 8), B)
