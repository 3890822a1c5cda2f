"""The ODE step in one launch: next = x + toward (mean − x) + blend (history − x).

A program takes whole rows. If a row fits in registers, its slope is read once, for the norm and for
the update; a longer row is read twice. Factors are computed in float64, once per row; values are
combined in float32.

An output may be an input if both have the same strides: a program reads what it overwrites before
it writes, and no other program reads it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .launching import Launcher
from .problem import cdiv, power_of_two
from .tuning import Config
from .variant import Variant

if TYPE_CHECKING:
    from pfgm.core.problems import OdeStep

_SMALLEST_FIELD_Z = tl.constexpr(1e-5)  # v_z is clamped to at most −_SMALLEST_FIELD_Z
_LARGEST_NORM = tl.constexpr(1 - 1e-6)  # ‖v_x‖/√N is below 1 for a field, not for any network

_MAX_WHOLE = 8192  # features of the longest row held in registers
_LONG_BLOCK = 4096  # features of a longer row read at a time
_MIN_VALUES = 1024  # of a program, so that short rows share one


@triton.jit
def at(values, rows, stride, columns):
    """Addresses (ROWS, BLOCK) of values at rows (ROWS,), in int64, and columns (BLOCK,)."""
    return values + (rows * stride)[:, None] + columns[None, :]


@triton.jit
def _implied_stretch(squared, z, gamma, N, EXACT: tl.constexpr):
    """t = −z/v_z (ROWS,) with the v_z computed from ‖v_x‖². It does not divide by v_z.

    t = (√(e_x² + z²) + γ)/√N,   n = ‖v_x‖/√N
    e_x = n (γ + √(n²γ² + (1 − n²) z²))/(1 − n²)  where EXACT, else γ n/(1 − n)
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
def _squared_norm(slope, rows, slope_stride, within, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """‖slope‖² (ROWS,) of rows longer than BLOCK, in float64 because 1 − n² magnifies an error."""
    lanes = tl.zeros((ROWS, BLOCK), tl.float64)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = within[:, None] & (columns < N)[None, :]
        v = _load(slope, rows, slope_stride, columns, mask).to(tl.float64)
        lanes += v * v
    return tl.sum(lanes, axis=1)


@triton.jit
def _load(values, rows, stride, columns, mask):
    """A tile of values; 0 outside of mask."""
    return tl.load(at(values, rows, stride, columns), mask, other=0.0)


@triton.jit
def _write(
    x,
    slope,
    history,
    out,
    mean_out,
    rows,
    out_stride,
    mean_stride,
    columns,
    mask,
    x_factor,
    slope_factor,
    history_factor,
    stretch,
):
    """Writes out = x_factor x + slope_factor slope + history_factor history and mean_out = x +
    stretch slope for one tile. Factors are (ROWS,)."""
    result = x_factor.to(tl.float32)[:, None] * x + slope_factor.to(tl.float32)[:, None] * slope
    if history is not None:
        result += history_factor.to(tl.float32)[:, None] * history
    tl.store(at(out, rows, out_stride, columns), result, mask)
    if mean_out is not None:
        mean = x + stretch.to(tl.float32)[:, None] * slope
        tl.store(at(mean_out, rows, mean_stride, columns), mean, mask)


@triton.jit(do_not_specialize=["B"])
def ode_step_kernel(
    x,
    slope,
    field_z,
    history,
    levels,
    out,
    mean_out,
    x_stride,
    slope_stride,
    history_stride,
    out_stride,
    mean_stride,
    B,
    N,
    z: tl.float64,
    toward: tl.float64,
    blend: tl.float64,
    gamma: tl.float64,
    z_exp: tl.float64,
    SUBSTITUTES: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps ROWS rows of (B, N) float32; strides are those of rows. field_z is (B,), levels (3, B)
    in float64.

    If levels is None, z, toward and blend hold for every row. If field_z is None, slope is the
    mean. SUBSTITUTES says whether any row may be below z_exp and need its norm.
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
    mask = within[:, None] & (columns < N)[None, :]
    if WHOLE:  # load all of a row before waiting for its norm
        v = _load(slope, rows, slope_stride, columns, mask)
        values = _load(x, rows, x_stride, columns, mask)
        past = history
        if history is not None:
            past = _load(history, rows, history_stride, columns, mask)

    if field_z is None:
        stretch = tl.full((ROWS,), 1.0, tl.float64)
        x_factor = 1 - toward - blend
    else:
        v_z = tl.load(field_z + rows, within, other=-1.0).to(tl.float64)
        stretch = -z / tl.where(v_z > -_SMALLEST_FIELD_Z, -_SMALLEST_FIELD_Z, v_z)
        x_factor = 1 - blend
        if SUBSTITUTES:
            if WHOLE:
                squared = tl.sum(v.to(tl.float64) * v.to(tl.float64), axis=1)
            else:
                squared = _squared_norm(slope, rows, slope_stride, within, N, ROWS, BLOCK)
            implied = _implied_stretch(squared, z, gamma, N, EXACT)
            stretch = tl.where(z < z_exp, implied, stretch)
    slope_factor = toward * stretch

    if WHOLE:
        _write(
            values, v, past, out, mean_out, rows, out_stride, mean_stride, columns, mask,
            x_factor, slope_factor, blend, stretch,
        )  # fmt: skip
    else:
        for start in range(0, N, BLOCK):
            turn = start + columns
            mask = within[:, None] & (turn < N)[None, :]
            v = _load(slope, rows, slope_stride, turn, mask)
            values = _load(x, rows, x_stride, turn, mask)
            past = history
            if history is not None:
                past = _load(history, rows, history_stride, turn, mask)
            _write(
                values, v, past, out, mean_out, rows, out_stride, mean_stride, turn, mask,
                x_factor, slope_factor, blend, stretch,
            )  # fmt: skip


# ---- launches ---------------------------------------------------------------------------------


@functools.cache
def row_tiles(N: int) -> Config:
    """How rows of N features are split: WHOLE (held in registers), ROWS and BLOCK.

    A thread has 8 or 16 values; threads share none.
    """
    whole = N <= _MAX_WHOLE
    block = power_of_two(N) if whole else _LONG_BLOCK
    rows = max(1, _MIN_VALUES // block)
    sizes = {"WHOLE": whole, "ROWS": rows, "BLOCK": block}
    return Config(sizes, num_warps=max(4, rows * block // 512))


_ode_step = Launcher(ode_step_kernel)


def launch(step: OdeStep, out: Tensor, mean_out: Tensor | None) -> None:
    """Writes the step to out (B, N) and mean_out (B, N), float32 with contiguous features.

    field_z and row_levels are contiguous; B is at least 1.
    """
    x, slope, field_z, history, z, toward, blend, row_levels, gamma, z_exp, exact = step
    B, N = x.shape
    substitutes = field_z is not None and (row_levels is not None or z < z_exp)
    tiles = row_tiles(N)
    step_of_rows = _ode_step(
        (cdiv(B, tiles["ROWS"]), 1, 1),
        (
            x.stride(0),
            slope.stride(0),
            0 if history is None else history.stride(0),
            out.stride(0),
            0 if mean_out is None else mean_out.stride(0),
            B,
            N,
        ),
        (z, toward, blend, gamma, z_exp),
        (substitutes, substitutes and exact),
        tiles,
    )
    step_of_rows(x, slope, field_z, history, row_levels, out, mean_out)


_TYPES = {
    **dict.fromkeys(("x", "slope", "field_z", "history", "out", "mean_out"), "*fp32"),
    "levels": "*fp64",
    **dict.fromkeys(
        ("x_stride", "slope_stride", "history_stride", "out_stride", "mean_stride", "B", "N"), "i32"
    ),
    **dict.fromkeys(("z", "toward", "blend", "gamma", "z_exp"), "fp64"),
}


def _variant(
    N: int, form: str, history: bool, mean: bool, levels: bool, substitutes: bool, exact: bool
) -> Variant:
    absent = {
        "field_z": form == "mean",
        "history": not history,
        "levels": not levels,
        "mean_out": not mean,
    }
    tiles = row_tiles(N)
    types = {name: kind for name, kind in _TYPES.items() if not absent.get(name)}
    words = {
        "history": history,
        "mean_out": mean,
        "levels of each row": levels,
        "substitution": substitutes,
        "published": substitutes and not exact,
    }
    return Variant(
        name=", ".join([f"ode_step, {form}, N = {N}", *(word for word, on in words.items() if on)]),
        kernel=ode_step_kernel,
        types=types,
        constants={
            **{name: None for name, missing in absent.items() if missing},
            "SUBSTITUTES": substitutes,
            "EXACT": substitutes and exact,
            **tiles.sizes,
        },
        # All but B: batches of every size share the compiled code.
        divisible=frozenset(name for name, kind in types.items() if kind != "fp64") - {"B"},
        num_warps=tiles.num_warps,
    )


def variants() -> list[Variant]:
    """Every form for rows held whole; the largest forms for short rows and for rows read twice."""
    result = []
    for history in (False, True):
        for mean in (False, True):
            result.append(_variant(3072, "field", history, mean, False, True, True))
        for levels in (False, True):
            result.append(_variant(3072, "field", history, history, levels, levels, True))
            result.append(_variant(3072, "mean", history, False, levels, False, False))
    result.append(_variant(3072, "field", True, True, False, True, False))
    for N in (64, 20_000):
        result.append(_variant(N, "field", True, True, True, True, True))
        result.append(_variant(N, "mean", True, False, True, False, False))
    return result
