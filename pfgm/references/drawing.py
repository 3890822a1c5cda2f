"""Drawing numbers without replacement."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_numbers(
    chosen: Tensor, count: int, rows: int, generator: torch.Generator | None
) -> Tensor:
    """Draws numbers (count,) from 0 to rows - 1 without repetition. The chosen ones come first."""
    device = "cpu" if generator is None else generator.device
    if 2 * count > rows:
        order = torch.randperm(rows, generator=generator, device=device).cpu()
        return torch.cat([chosen, order[~torch.isin(order, chosen)]])[:count]
    drawn = chosen
    while len(drawn) < count:
        more = torch.randint(rows, (2 * count,), generator=generator, device=device).cpu()
        drawn = _first_of_each(torch.cat([drawn, more]))
    return drawn[:count]


def _first_of_each(values: Tensor) -> Tensor:
    """Values without repetition, in the order of their first occurrence."""
    order = values.argsort(stable=True)
    ordered = values[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return values[order[first].sort().values]
