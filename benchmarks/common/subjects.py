"""The data of the benchmarks: real images as references, and queries perturbed as in training.

The time of a posterior mean depends on how many weights are near zero. Weights of random noise
would differ from those of real images.
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
# Debian's package dataset-fashion-mnist installs its files here.
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


def photograph_bytes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Crops (count, 3, size, size) of scikit-learn's two photographs, half of them flipped."""
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.from_numpy(p.copy()) for p in load_sample_images().images])
    windows = photographs.unfold(1, size, 1).unfold(2, size, 1)  # (2, rows, columns, 3, size, size)
    which, row, column = (
        torch.randint(0, choices, (count,), generator=generator) for choices in windows.shape[:3]
    )
    crops = windows[which, row, column]
    flipped = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped, crops.flip(3), crops).contiguous()


def photograph_crops(count: int, size: int = 32) -> Tensor:
    """The same in [-1, 1].

    Crops of size 32 stand in for CIFAR-10, which is not available everywhere.
    """
    return pfgm.data.to_unit(photograph_bytes(count, size, torch.Generator().manual_seed(0)))


def fashion_mnist() -> Tensor:
    """The 60000 training images of Fashion-MNIST as bytes (60000, 784).

    From Debian's package dataset-fashion-mnist, or else downloaded by torchvision. Skips the
    benchmark if neither is available.
    """
    file = FASHION_FOLDER / FASHION
    if not file.exists():
        file = _download()
    content = gzip.decompress(file.read_bytes())
    images = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16)
    return images.view(60000, 784).clone()  # a copy in memory that torch allocated


def _download() -> Path:
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
    """Fashion-MNIST as references: N = 784."""
    return perturbed(pfgm.data.to_unit(fashion_mnist()[:M]).view(-1, 1, 28, 28), B)


def fashion_near_data(B: int = 256, M: int = 60000, z: float = 0.1) -> Case:
    """Fashion-MNIST as references, and images with noise of one level z: few references count."""
    images = pfgm.data.to_unit(fashion_mnist()[:M])
    chosen = images[torch.linspace(0, M - 1, B).long()]
    noise = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0))
    return Case(chosen + z * noise, torch.full((B,), z), images)


def digits_shape(B: int = 128, M: int = 1437) -> Case:
    """scikit-learn's digits: N = 64."""
    digits = pfgm.data.digits()
    return perturbed(torch.cat([digits.train, digits.held_out])[:M], B)


def plane(B: int = 1024, M: int = 4096) -> Case:
    """M points around eight centres on a circle, and B of them perturbed."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.randint(0, 8, (M,), generator=generator) * (torch.pi / 4)
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    return perturbed(centres + 0.05 * torch.randn(M, 2, generator=generator), B)
