"""Random numbers of a generator, or of torch's own generator for None.

The same numbers as those of torch.randn, rand and randint. torch.compile cannot call these with
``generator=None`` and a symbolic shape, such as that of a second batch size.

>>> a, b = (torch.Generator().manual_seed(0) for _ in range(2))
>>> torch.equal(normal((2,), a, device=a.device), torch.randn(2, generator=b))
True
>>> torch.equal(integers(9, (2,), a, device=a.device), torch.randint(9, (2,), generator=b))
True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(
    shape: Sequence[int],
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
) -> Tensor:
    """Draws from N(0, 1)."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)


def uniform(
    shape: Sequence[int],
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
) -> Tensor:
    """Draws from U[0, 1)."""
    return torch.empty(shape, dtype=dtype, device=device).uniform_(generator=generator)


def integers(
    below: int, shape: Sequence[int], generator: torch.Generator | None, *, device: torch.device
) -> Tensor:
    """Draws from 0 to below − 1."""
    empty = torch.empty(shape, dtype=torch.int64, device=device)
    return empty.random_(0, below, generator=generator)
