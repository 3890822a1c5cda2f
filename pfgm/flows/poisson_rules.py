"""Default hyper-parameters of :class:`pfgm.PoissonFlow`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.numbers import finite_values, positive
from ..networks.fields import Center

MEAN_NORMAL = math.sqrt(2 / math.pi)  # the average of |g|, g ~ N(0, 1)
_SPREAD_RANGE = 1e-15, 1e12


class Rules(NamedTuple):
    """Default hyper-parameters. z_max is None if it follows from M, z_exp if it is gamma."""

    noise_std: float
    gamma: float
    z_max: float | None
    z_min: float
    restrict_M: bool
    z_exp: float | None


def published_rules() -> Rules:
    """The values published for images in [−1, 1]."""
    return Rules(noise_std=0.01, gamma=5.0, z_max=None, z_min=1e-3, restrict_M=True, z_exp=5.0)


def spread_rules(s: float, N: int) -> Rules:
    """The published lengths in units of the spread s, which is about 0.5 for images in [−1, 1].

    The prior treats the data as a single charge at the center. At z_max the relative error of its
    density is at most about N s²/(2 z_max²), which is 1/400 for z_max = 14 √N s. From N = 33 on,
    z_max is 80 s, near the published 71 s for images: the noise of so many values hides the spread.
    """
    return Rules(
        noise_std=0.02 * s,
        gamma=min(math.sqrt(N) / 4, 10.0) * s,
        z_max=min(14 * math.sqrt(N), 80.0) * s,
        z_min=2e-3 * s,
        restrict_M=False,
        z_exp=None,
    )


def exponent_from_norm(data_norm: float | None, N: int, noise_std: float, tau: float) -> float:
    """M for data of this average norm (PFGM, appendix B.1.1)."""
    if data_norm is None:
        raise ValueError(
            "one of M, data_norm and spread must be given, got none; PoissonFlow.from_data(data) "
            "chooses them from data."
        )
    ratio = positive("data_norm", data_norm) ** 2 / (2 * math.sqrt(N) * noise_std**2)
    exponent = int(0.75 * math.log(ratio) / math.log1p(tau)) + 1
    if exponent < 1:
        raise ValueError(
            f"data_norm is {data_norm}, too small for noise_std={noise_std}; scale the data up "
            "or noise_std down."
        )
    return exponent


def data_std_from_exponent(M: float, N: int, noise_std: float, tau: float) -> float:
    """Root mean square ‖x‖/√N of data for which the rule of :func:`exponent_from_norm` gives M."""
    return noise_std * math.sqrt(2 * math.exp((M - 0.5) / 0.75 * math.log1p(tau)) / math.sqrt(N))


def exponent_from_z_max(z_max: float, noise_std: float, tau: float) -> float:
    """M for which the average z at m = M is z_max."""
    ratio = z_max / (MEAN_NORMAL * noise_std)
    if ratio <= 1:
        raise ValueError(
            f"noise_std must be below 1.25 z_max, with z_max {z_max}, got {noise_std}."
        )
    return math.log(ratio) / math.log1p(tau)


def largest_scale(noise_std: float, tau: float, M: float) -> float:
    """noise_std (1 + tau)^M, the largest scale of the perturbation; ValueError if above float32."""
    most = math.log(torch.finfo(torch.float32).max)
    if max(math.log(noise_std), 0.0) + M * math.log1p(tau) > most:
        raise ValueError(
            f"M must keep noise_std (1 + tau)^M at or below 3.4e38, the limit of float32, got {M} "
            f"with noise_std {noise_std} and tau {tau}."
        )
    return float(noise_std * (1 + tau) ** M)


def checked_spread(spread: float) -> float:
    """The spread; ValueError unless float32 can hold its square."""
    spread = float(positive("spread", spread))
    low, high = _SPREAD_RANGE
    if not low <= spread <= high:
        raise ValueError(
            f"spread must be from {low} to {high}, so that float32 can hold its square, got "
            f"{spread}."
        )
    return spread


def checked_center(center: Center, shape: tuple[int, ...], spread: float | None) -> Tensor:
    """The center as float64 of shape S."""
    point = finite_values("center", center)
    if point.shape not in (torch.Size([]), torch.Size(shape)):
        raise ValueError(f"center must have shape {shape} or (), got {tuple(point.shape)}.")
    if spread is None and bool((point != 0).any()):
        raise ValueError("center is given without spread; the published rules centre data at 0.")
    return point.expand(shape).clone()
