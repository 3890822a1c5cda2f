"""Encodings of the noise level for networks of other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..common.checks import check_choice

LevelFunction = Callable[[Tensor], Tensor]
"""From levels (B,), z or sigma, to the network's argument (B,)."""


class TimestepEncoding:
    """t = T ln(σ/σ_last)/ln(σ_first/σ_last): 0 at the last level, T at the first.

    T = 1000 is the range of DDPM's timesteps (arXiv 2006.11239). The sinusoidal embeddings of
    diffusers and others are made for it: their frequencies are 1 to 1e-4. Levels below the last one
    give 0.
    """

    def __init__(self, first: float, last: float, timesteps: int = 1000) -> None:
        self._last = last
        self._scale = timesteps / math.log(first / last)

    def __call__(self, level: Tensor) -> Tensor:
        return self._scale * (level.clamp_min(self._last) / self._last).log()

    def decode(self, encoded: Tensor) -> Tensor:
        """The level that has this timestep."""
        return self._last * (encoded / self._scale).exp()


class LogEncoding:
    """ln(σ)/4, EDM's c_noise (arXiv 2206.00364, table 1)."""

    def __call__(self, level: Tensor) -> Tensor:
        return level.log() / 4

    def decode(self, encoded: Tensor) -> Tensor:
        return (4 * encoded).exp()


class IdentityEncoding:
    """The level itself: σ, or PFGM's z."""

    def __call__(self, level: Tensor) -> Tensor:
        return level

    def decode(self, encoded: Tensor) -> Tensor:
        return encoded


def level_encoding(
    name: str, first: float, last: float
) -> TimestepEncoding | LogEncoding | IdentityEncoding:
    """The encoding "timestep", "log" or "sigma" of levels from the first to the last."""
    check_choice("level", name, ("timestep", "log", "sigma"))
    if name == "timestep":
        return TimestepEncoding(first, last)
    return LogEncoding() if name == "log" else IdentityEncoding()
