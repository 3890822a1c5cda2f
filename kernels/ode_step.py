"""The ODE step in one launch: next = x + toward (mean − x) + blend (history − x).

A program takes whole rows. If a row fits in registers, its slope is read once, for the norm and for
the update; a longer row is read twice. Factors are computed in float64, once per row; values are
combined in float32.

An output may be an input if both have the same strides: a program reads what it overwrites before
it writes, and no other program reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import FUSED, cdiv, power_of_two

if TYPE_CHECKING:
    from pfgm.core.problems import OdeStep

_SMALLEST_FIELD_Z = tl.constexpr(1e-5)  # v_z is clamped to at most −_SMALLEST_FIELD_Z
_LARGEST_NORM = tl.constexpr(1 - 1e-6)  # ‖v_x‖/√N is below 1 for a field, not for any network

_MAX_WHOLE = 8192  # features of the longest row held in registers
_LONG_BLOCK = 4096  # features of a longer row read at a time
_MIN_VALUES = 1024  # of a program, so that short rows share one


@triton.jit
def load(values, rows, stride, columns, within, N):
    """Values at rows (ROWS,), in int64, and columns (BLOCK,); 0 outside of rows and columns."""
    mask = within[:, None] & (columns < N)[None, :]
    return tl.load(values + (rows * stride)[:, None] + columns[None, :], mask, other=0.0)


@triton.jit
def write(values, rows, stride, columns, within, N, result):
    """Writes a result (ROWS, BLOCK) in float32."""
    mask = within[:, None] & (columns < N)[None, :]
    tl.store(values + (rows * stride)[:, None] + columns[None, :], result.to(tl.float32), mask)


@triton.jit
def _implied_mean_factor(squared, z, gamma, N, EXACT: tl.constexpr):
    """t = −z/v_z (ROWS,) with v_z computed from ‖v_x‖², without dividing by v_z.

    t = (√(e_x² + z²) + γ)/√N,   n = ‖v_x‖/√N
    e_x = n (γ + √(n²γ² + (1 − n²) z²))/(1 − n²)  where EXACT, else γ n/(1 − n)

    e_x is the length of the x part of E in normalised_field.py; without EXACT, its value at z = 0.
    """
    root_N = tl.sqrt(tl.full((1,), N, tl.float64))
    n = tl.sqrt(squared) / root_N
    n = tl.where(n > _LARGEST_NORM, _LARGEST_NORM, n)  # NaN stays NaN
    if EXACT:
        rest = 1 - n * n
        e = n * (gamma + tl.sqrt(n * n * gamma * gamma + rest * z * z)) / rest
    else:
        e = gamma * n / (1 - n)
    return (tl.sqrt(e * e + z * z) + gamma) / root_N


@triton.jit
def squared_norm(values, rows, stride, within, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """‖values‖² (ROWS,) of rows longer than BLOCK, in float64 because 1 − n² magnifies an error."""
    lanes = tl.zeros((ROWS, BLOCK), tl.float64)
    for start in range(0, N, BLOCK):
        v = load(values, rows, stride, start + tl.arange(0, BLOCK), within, N).to(tl.float64)
        lanes += v * v
    return tl.sum(lanes, axis=1)


@triton.jit(do_not_specialize=["B"])
def ode_step_kernel(
    x, slope, field_z, history, levels, out, mean_out,
    x_stride, slope_stride, history_stride, out_stride, mean_stride, B, N,
    z: tl.float64, toward: tl.float64, blend: tl.float64, gamma: tl.float64, z_exp: tl.float64,
    SUBSTITUTES: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps ROWS rows of (B, N) float32; strides are those of rows. field_z is (B,), levels (3, B)
    in float64.

    If levels is None, z, toward and blend hold for every row. If field_z is None, slope is the
    mean. SUBSTITUTES says whether any row may be below z_exp and need its norm. WHOLE rows are held
    in registers: their slope is read once, for the norm and for the step.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = rows < B
    if levels is None:
        z = tl.full((ROWS,), z, tl.float64)
        toward = tl.full((ROWS,), toward, tl.float64)
        blend = tl.full((ROWS,), blend, tl.float64)
    else:
        z = tl.load(levels + rows, within, other=1.0)
        toward = tl.load(levels + B + rows, within, other=0.0)
        blend = tl.load(levels + B + B + rows, within, other=0.0)
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        v = load(slope, rows, slope_stride, columns, within, N)
    if field_z is None:
        mean_factor = tl.full((ROWS,), 1.0, tl.float64)
        x_factor = 1 - toward - blend
    else:
        v_z = tl.load(field_z + rows, within, other=-1.0).to(tl.float64)
        mean_factor = -z / tl.where(v_z > -_SMALLEST_FIELD_Z, -_SMALLEST_FIELD_Z, v_z)
        x_factor = 1 - blend
        if SUBSTITUTES:
            if WHOLE:
                squared = tl.sum(v.to(tl.float64) * v.to(tl.float64), axis=1)
            else:
                squared = squared_norm(slope, rows, slope_stride, within, N, ROWS, BLOCK)
            implied = _implied_mean_factor(squared, z, gamma, N, EXACT)
            mean_factor = tl.where(z < z_exp, implied, mean_factor)
    a_factor = x_factor.to(tl.float32)[:, None]
    v_factor = (toward * mean_factor).to(tl.float32)[:, None]
    for start in range(0, N, BLOCK):  # once if WHOLE
        feature = start + columns
        a = load(x, rows, x_stride, feature, within, N)
        if not WHOLE:
            v = load(slope, rows, slope_stride, feature, within, N)
        result = a_factor * a + v_factor * v
        if history is not None:
            past = load(history, rows, history_stride, feature, within, N)
            result += blend.to(tl.float32)[:, None] * past
        write(out, rows, out_stride, feature, within, N, result)
        if mean_out is not None:
            mean = a + mean_factor.to(tl.float32)[:, None] * v
            write(mean_out, rows, mean_stride, feature, within, N, mean)


# ---- launches ---------------------------------------------------------------------------------


def row_tiles(N: int) -> dict[str, int]:
    """How rows of N features are split: WHOLE (held in registers), ROWS and BLOCK; and the warps.

    A thread has 8 or 16 values; threads share none.
    """
    whole = N <= _MAX_WHOLE
    block = power_of_two(N) if whole else _LONG_BLOCK
    rows = max(1, _MIN_VALUES // block)
    return {"WHOLE": whole, "ROWS": rows, "BLOCK": block, "num_warps": max(4, rows * block // 512)}


def launch(step: OdeStep, out: Tensor, mean_out: Tensor | None) -> None:
    """Writes the step to out (B, N) and mean_out (B, N), float32 with contiguous features.

    field_z and row_levels are contiguous; B is at least 1.
    """
    x, slope, field_z, history, z, toward, blend, row_levels, gamma, z_exp, exact = step
    B, N = x.shape
    substitutes = field_z is not None and (row_levels is not None or z < z_exp)
    tiles = row_tiles(N)
    strides = [0 if each is None else each.stride(0) for each in (x, slope, history, out, mean_out)]
    ode_step_kernel[(cdiv(B, tiles["ROWS"]),)](
        x, slope, field_z, history, row_levels, out, mean_out, *strides, B, N, z, toward, blend,
        gamma, z_exp, SUBSTITUTES=substitutes, EXACT=substitutes and exact, **tiles, **FUSED,
    )  # fmt: skip
