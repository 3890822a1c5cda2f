"""PFGM's normalised field from x − mean and z, in one launch.

    v = −√N E/(‖E‖ + γ),   E = (x − mean, z)

A program takes whole rows, as in :mod:`pfgm.kernels.ode_step`. It computes in float64: ‖E‖² may
overflow or underflow float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import FUSED, cdiv
from .ode_step import load, row_tiles, squared_norm, write


@triton.jit(do_not_specialize=["B"])
def normalised_field_kernel(
    difference, z, field_x, field_z, stride, field_stride, B, N, gamma: tl.float64,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes field_x (B, N) and field_z (B,) of ROWS rows. z (B,) is float64, all else float32."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = rows < B
    level = tl.load(z + rows, within, other=0.0)
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        tile = load(difference, rows, stride, columns, within, N).to(tl.float64)
        squared = tl.sum(tile * tile, axis=1)
    else:
        squared = squared_norm(difference, rows, stride, within, N, ROWS, BLOCK)
    norm = tl.sqrt(squared + level * level) + gamma
    root_N = tl.sqrt(tl.full((1,), N, tl.float64))
    # The norm is 0 at E = 0 and γ = 0. There any finite scale gives v = 0.
    scale = -root_N / tl.where(norm == 0, 1.0, norm)
    if WHOLE:
        write(field_x, rows, field_stride, columns, within, N, scale[:, None] * tile)
    else:
        for start in range(0, N, BLOCK):
            feature = start + columns
            tile = load(difference, rows, stride, feature, within, N).to(tl.float64)
            write(field_x, rows, field_stride, feature, within, N, scale[:, None] * tile)
    tl.store(field_z + rows, (scale * level).to(tl.float32), within)


def launch(difference: Tensor, z: Tensor, gamma: float, field_x: Tensor, field_z: Tensor) -> None:
    """Writes field_x (B, N) and field_z (B,) in float32.

    difference (B, N) is float32 with contiguous features, z (B,) is contiguous in float64.
    field_x may be difference: a program reads what it overwrites before it writes.
    """
    B, N = difference.shape
    tiles = row_tiles(N)
    normalised_field_kernel[(cdiv(B, tiles["ROWS"]),)](
        difference, z, field_x, field_z, difference.stride(0), field_x.stride(0), B, N, gamma,
        **tiles, **FUSED,
    )  # fmt: skip
