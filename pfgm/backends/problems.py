"""What the operations are asked: one tuple an operation, the same for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class OdeStep(NamedTuple):
    """One step next = x + toward (mean − x) + blend (history − x), as every backend takes it."""

    x: Tensor
    """(B, N), the points."""
    slope: Tensor
    """(B, N), their v_x, or the mean itself where field_z is None."""
    field_z: Tensor | None
    """(B,), their v_z."""
    history: Tensor | None
    """(B, N), one more point of each row; None where blend is 0."""
    levels: tuple[float, float, float] | Tensor
    """z, toward and blend for all rows, or (3, B) in float64 for each."""
    gamma: float
    z_exp: float
    exact: bool
    """Which substitution of v_z below z_exp."""
