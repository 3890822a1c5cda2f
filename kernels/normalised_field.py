"""PFGM's normalised field from x − mean and z, in one launch.

    v = −√N E/(‖E‖ + γ),   E = (x − mean, z)

A program takes whole rows, as in :mod:`pfgm.kernels.ode_step`. It computes in float64: ‖E‖² may
overflow or underflow float32.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from .launching import KEPT, Launch, Launcher
from .ode_step import at, row_tiles
from .problem import cdiv
from .variant import Variant


@triton.jit
def _tile(values, rows, stride, columns, mask):
    """One tile in float64; 0 outside of mask."""
    return tl.load(at(values, rows, stride, columns), mask, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["B"])
def normalised_field_kernel(
    difference,
    z,
    field_x,
    field_z,
    stride,
    field_stride,
    B,
    N,
    gamma: tl.float64,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes field_x (B, N) and field_z (B,) of ROWS rows. z (B,) is float64, all else float32."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = rows < B
    level = tl.load(z + rows, within, other=0.0)

    columns = tl.arange(0, BLOCK)
    mask = within[:, None] & (columns < N)[None, :]
    if WHOLE:
        tile = _tile(difference, rows, stride, columns, mask)
        squared = tl.sum(tile * tile, axis=1)
    else:
        lanes = tl.zeros((ROWS, BLOCK), tl.float64)
        for start in range(0, N, BLOCK):
            turn = start + columns
            mask = within[:, None] & (turn < N)[None, :]
            tile = _tile(difference, rows, stride, turn, mask)
            lanes += tile * tile
        squared = tl.sum(lanes, axis=1)

    norm = tl.sqrt(squared + level * level) + gamma
    root_N = tl.sqrt(tl.full((1,), N, tl.float64))
    # The norm is 0 at E = 0 and γ = 0. There any finite scale gives v = 0.
    scale = -root_N / tl.where(norm == 0, 1.0, norm)

    if WHOLE:
        result = (scale[:, None] * tile).to(tl.float32)
        tl.store(at(field_x, rows, field_stride, columns), result, mask)
    else:
        for start in range(0, N, BLOCK):
            turn = start + columns
            mask = within[:, None] & (turn < N)[None, :]
            tile = _tile(difference, rows, stride, turn, mask)
            result = (scale[:, None] * tile).to(tl.float32)
            tl.store(at(field_x, rows, field_stride, turn), result, mask)
    tl.store(field_z + rows, (scale * level).to(tl.float32), within)


_normalised_field = Launcher(normalised_field_kernel)


def launch(difference: Tensor, z: Tensor, gamma: float, field_x: Tensor, field_z: Tensor) -> None:
    """Writes field_x (B, N) and field_z (B,) in float32.

    difference (B, N) is float32 with contiguous features, z (B,) is contiguous in float64.
    field_x may be difference: a program reads what it overwrites before it writes.
    """
    strides = difference.stride(0), field_x.stride(0)
    _launch_of(*difference.shape, strides, gamma)(difference, z, field_x, field_z)


@functools.lru_cache(KEPT)
def _launch_of(B: int, N: int, strides: tuple[int, int], gamma: float) -> Launch:
    tiles = row_tiles(N)
    grid = (cdiv(B, tiles["ROWS"]), 1, 1)
    return _normalised_field(grid, (*strides, B, N), (gamma,), (), tiles)


def variants() -> list[Variant]:
    """Short rows, rows held whole and rows read twice."""
    types = {
        "difference": "*fp32",
        "z": "*fp64",
        **dict.fromkeys(("field_x", "field_z"), "*fp32"),
        **dict.fromkeys(("stride", "field_stride", "B", "N"), "i32"),
        "gamma": "fp64",
    }
    result = []
    for N in (64, 3072, 20_000):
        tiles = row_tiles(N)
        result.append(
            Variant(
                name=f"normalised_field, N = {N}",
                kernel=normalised_field_kernel,
                types=types,
                constants=tiles.sizes,
                divisible=frozenset(types) - {"B", "gamma"},
                num_warps=tiles.num_warps,
            )
        )
    return result
