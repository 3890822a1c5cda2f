"""Problems of the posterior mean for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pfgm.common.tensors import dequantise
from pfgm.core.weights import unit_radius

Level = TypeVar("Level", float, Tensor)


def seeded(seed: int = 0) -> torch.Generator:
    """A new generator on the CPU with this seed."""
    return torch.Generator().manual_seed(seed)


def radius_of(sigma: Level, D: float) -> Level:
    """r at a noise level; sigma itself at D = ∞."""
    return sigma * unit_radius(D)


def level(radius: Level, D: float) -> dict[str, Level]:
    """The keyword argument for a radius: sigma at D = ∞, r otherwise."""
    return {"sigma" if math.isinf(D) else "r": radius}


def problem(
    B: int = 4,
    M: int = 9,
    shape: int | Sequence[int] = 5,
    *,
    sigma: float | tuple[float, float] | Tensor | None = None,
    spread: float | None = None,
    between: float = 0.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    reference_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Points (B, *S), references (M, *S) and sigma (B,), float64.

    Each point starts at a reference, moves a random fraction of the way to another one, and gets
    normal noise. All is drawn in float64 and rounded once.

    Args:
        B, M, shape: the numbers, and the shape S or its only length.
        sigma: noise levels; two numbers are the ends of evenly spaced ones. None draws them
            from 0.01 to 10, uniformly in their logarithm.
        spread: standard deviation of the points' noise; None is sigma.
        between: the largest fraction of the way. With 0.5 some points have one weight, some many.
        offset: the centre of the references, which are uniform 1 to each side.
        dtype, reference_dtype: of the points and, unless it is given, of the references; uint8 are
            rounded to the byte.
        seed: of all draws.
    """
    generator, wide = seeded(seed), torch.float64
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    references = torch.rand(M, *shape, generator=generator, dtype=wide) * 2 - 1 + offset
    if reference_dtype == torch.uint8:
        references = ((references + 1) * 127.5).round()
    references = references.to(reference_dtype or dtype)
    y = dequantise(references, wide)
    first, other = (y[torch.randint(0, M, (B,), generator=generator)] for _ in range(2))
    share = between * torch.rand(B, generator=generator, dtype=wide)
    noise = torch.randn(B, *shape, generator=generator, dtype=wide)
    if sigma is None:
        sigma = 10 ** (3 * torch.rand(B, generator=generator, dtype=wide) - 2)
    elif isinstance(sigma, tuple):
        sigma = torch.linspace(*sigma, B, dtype=wide)
    sigma = torch.as_tensor(sigma, dtype=wide).expand(B).clone()

    def per_point(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * len(shape))

    x = first + per_point(share) * (other - first)
    x = x + (per_point(sigma) if spread is None else spread) * noise
    return x.to(dtype), references, sigma
