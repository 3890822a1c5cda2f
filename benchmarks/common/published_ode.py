"""The step of the published PFGM sampler in torch, each intermediate in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.common.posterior_paths import GAMMA

Z_EXP = 5.0  # below this level the sampler replaces the network's field_z


def slope(x: Tensor, field_x: Tensor, field_z: Tensor, z: float) -> Tensor:
    """z dx/dz at points (B, N).

    The level is a number here; the published code asks the device for it at every step.
    """
    if z < Z_EXP:
        root = math.sqrt(x.shape[1])
        norm = field_x.norm(p=2, dim=1) / root
        distance = GAMMA * norm / (1 - norm)
        distance = torch.sqrt(distance**2 + z**2)
        field_z = -root * torch.ones_like(field_z) * z / (distance + GAMMA)
    v = torch.cat([field_x, field_z[:, None]], dim=1)
    return z * v[:, :-1] * (1 / (v[:, -1] + 1e-5))[:, None]
