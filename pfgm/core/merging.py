"""Exact merging of results over disjoint sets of references.

With n the squared distance of the nearest reference, ℓ(n) its score and t the total weight relative
to its weight, two states merge into

    n = min(n₁, n₂),  w_i = t_i exp(ℓ(n_i) − ℓ(n)),  t = w₁ + w₂,  mean = (w₁ mean₁ + w₂ mean₂)/t

This holds at the limits too, where scores are infinite. Differences x − mean merge as means do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..common.tensors import wide_dtype
from .problems import State
from .weights import law


def merge(x: Tensor, radius: Tensor, D: float, states: Iterable[State]) -> State:
    """Merges states for points x (B, N) into the state over all references, in float64."""
    wide = wide_dtype(x.device)
    mean = torch.zeros(x.shape, dtype=wide, device=x.device)
    nearest, total = torch.full_like(radius, math.inf), torch.zeros_like(radius)
    for state in states:
        least = torch.minimum(nearest, state.nearest)
        # Before the first state there is nothing to rescale. kept is then NaN, from inf − inf.
        kept = relative_weight(nearest, least, radius, D, x.shape[1]) * total
        kept = torch.where(total == 0, 0.0, kept)
        added = relative_weight(state.nearest, least, radius, D, x.shape[1]) * state.total
        nearest, total = least, kept + added
        mean.lerp_(state.mean.to(wide), (added / total)[:, None])
    return State(mean, nearest, total)


def relative_weight(nearest: Tensor, least: Tensor, radius: Tensor, D: float, N: int) -> Tensor:
    """Weight at the squared distance nearest, relative to that at the squared distance least."""
    return law(D, N).log_weight(nearest - least, least, radius).exp()
