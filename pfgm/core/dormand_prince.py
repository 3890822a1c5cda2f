"""Integration with steps that follow the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dormand_prince(
    slope: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    ends: Tensor,
    rtol: float,
    atol: float,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """The state at ends[1] from that at ends[0], by torchdiffeq's dopri5 with these options.

    Raises:
        ValueError: no step is small enough.
    """
    with torch.device("cpu"):  # torchdiffeq makes constants, on what is the default device then
        from torchdiffeq import odeint  # late, because it imports SciPy, which is slow

    try:
        states: Tensor = odeint(
            slope, state, ends, rtol=rtol, atol=atol, method="dopri5", options=options
        )
    except AssertionError as error:
        raise ValueError(
            f"rk45 found no step small enough ({error}): the result of the network is not finite "
            "or not smooth."
        ) from error
    return states[-1]
