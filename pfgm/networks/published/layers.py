"""What the published U-Nets of PFGM and EDM share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.numbers import whole

HALF_SUM = math.sqrt(0.5)
"""Factor of a sum of two branches, which keeps their variance."""
FOURIER_STD = 16.0
"""Standard deviation of the random frequencies, in cycles per unit of the feature's input."""
_LONGEST_PERIOD = 10_000.0  # of the positional sines, in units of 2π


def checked_resolution(resolution: int, levels: int) -> int:
    """The resolution, if a U-Net of these levels, each half of the one above, takes it."""
    coarsest, resolution = 2 ** (levels - 1), whole("resolution", resolution)
    if resolution % coarsest:
        raise ValueError(
            f"resolution must be a multiple of {coarsest}, as {levels} levels halve it, got "
            f"{resolution}."
        )
    return resolution


def positional_features(z: Tensor, count: int) -> Tensor:
    """Sines and cosines (B, count) of z (B,), with periods from 2π to 20000π."""
    half = count // 2
    indices = torch.arange(half, dtype=z.dtype, device=z.device)
    angles = z[:, None] * (-indices * math.log(_LONGEST_PERIOD) / (half - 1)).exp()
    return torch.cat([angles.sin(), angles.cos()], 1)


def add_attention(h: Tensor, q: Tensor, k: Tensor, v: Tensor, projection: nn.Module) -> Tensor:
    """h (B, C, H, W) plus the projected attention of q, k and v, (B, H W, C) each."""
    q, k, v = q[:, None], k[:, None], v[:, None]  # one head, an axis that export to ONNX needs
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(h.shape)
    result: Tensor = (h + projection(mixed)) * HALF_SUM
    return result
