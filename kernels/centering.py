"""The centre of the references, and queries relative to it in two float16 parts, in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .arithmetic import EXCESS, load_references, scale_to
from .launching import Launcher
from .memory import Step
from .problem import cdiv, padded
from .tuning import Config
from .variant import REFERENCES, Variant, variant

CENTER_PROGRAMS = 64  # at most, of ``find_center``
CENTER_FEATURES = tl.constexpr(64)  # that ``find_center`` reads at a time
SAMPLES = tl.constexpr(16)  # references whose mean is the centre
FAR = tl.constexpr(1 << 12)
# Powers of two of the largest centred values as float16, which holds less than 2^16. References
# outside of the sample may be larger by 2^11.
QUERY_POWER = tl.constexpr(12)
REFERENCE_POWER = tl.constexpr(4)
SPLIT = Config({"BLOCK": 1024})


@triton.jit(do_not_specialize=["M"])
def find_center(y, center, spread, M, N, y_stride, width, portion):
    """A centre of the references, the mean of evenly spaced ones, and how far these are from it.

    spread[i] is the largest |y − center| of the sample among the features of program i. A program
    takes ``portion`` features. ``center`` has ``width`` ≥ N features, zero from N on.

    One reference may be far from all others, so in the mean the smallest and the largest value
    count as the next ones. If the spread is more than FAR times what it is without these, they do
    not count.
    """
    row = (tl.arange(0, SAMPLES).to(tl.int64) * M) // SAMPLES
    first = tl.program_id(0) * portion
    index = tl.arange(0, SAMPLES)[:, None]
    near = tl.zeros([CENTER_FEATURES], tl.float32)
    far = tl.zeros([CENTER_FEATURES], tl.float32)
    for start in range(first, min(first + portion, width), CENTER_FEATURES):
        feature = start + tl.arange(0, CENTER_FEATURES)
        mask = (row >= 0)[:, None] & (feature < N)[None, :]
        place = y + row[:, None] * y_stride + feature[None, :]
        values = load_references(place, mask, tl.float32)
        least, most = tl.argmin(values, 0)[None, :], tl.argmax(values, 0)[None, :]
        second = tl.min(tl.where(index == least, float("inf"), values), 0)
        last = tl.max(tl.where(index == most, float("-inf"), values), 0)
        inner = tl.minimum(tl.maximum(values, second[None, :]), last[None, :])
        mean = tl.sum(inner * (1.0 / SAMPLES), 0)
        tl.store(center + feature, mean, mask=feature < width)
        # Equal samples say nothing about the others. Their own size is a guess.
        guess = tl.abs(mean) * 2.0**-10
        near = tl.maximum(near, tl.maximum(guess, tl.max(tl.abs(inner - mean[None, :]), 0)))
        far = tl.maximum(far, tl.max(tl.abs(values - mean[None, :]), 0))
    inner_spread = tl.max(near, 0)
    whole_spread = tl.maximum(tl.max(far, 0), inner_spread)
    tl.store(
        spread + tl.program_id(0),
        tl.where(
            (inner_spread > 0) & (whole_spread > FAR * inner_spread), inner_spread, whole_spread
        ),
    )


@triton.jit
def centered(a, c, BYTES: tl.constexpr):
    """Queries minus the centre, of references that ``centered_references`` finds."""
    difference = a - c
    if BYTES:
        difference += EXCESS * a
    return difference


@triton.jit
def split_rows(
    x,
    center,
    spread,
    high,
    low,
    norms,
    units,
    scale,
    scaled_center,
    N,
    x_stride,
    width,
    programs,
    CENTERED: tl.constexpr,
    BYTES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two float16 parts, high + low, of a row of queries times a power of two.

    Rows are centred if CENTERED; BYTES says that references are. units[row] turns a product with
    scaled references into x·y, ``scale`` is the power of two of the references, scaled_center the
    centre times that, and norms[row] = |x − center|².
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PROGRAMS)
    y_scale = scale_to(
        tl.max(tl.load(spread + part, mask=part < programs, other=0.0), 0), REFERENCE_POWER
    )
    norm = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
        if CENTERED:
            a = centered(a, tl.load(center + feature, mask=feature < N, other=0.0), BYTES)
        norm += a.to(tl.float64) * a.to(tl.float64)
        largest = tl.maximum(largest, tl.abs(a))
    x_scale = scale_to(tl.max(largest, 0), QUERY_POWER)
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        a = tl.load(x + row * x_stride + feature, mask=feature < N, other=0.0)
        if CENTERED:
            c = tl.load(center + feature, mask=feature < N, other=0.0)
            tl.store(
                scaled_center + feature, c * y_scale, mask=feature < tl.where(row == 0, width, 0)
            )
            a = centered(a, c, BYTES)
        a *= x_scale
        h = a.to(tl.float16)
        tl.store(high + row * width + feature, h, mask=feature < width)
        rest = (a - h.to(tl.float32)).to(tl.float16)
        tl.store(low + row * width + feature, rest, mask=feature < width)
    tl.store(units + row, 1.0 / x_scale.to(tl.float64) / y_scale.to(tl.float64))
    if CENTERED:
        tl.store(norms + row, tl.sum(norm, 0))
        tl.store(scale, y_scale, mask=row == 0)


# ---- launches ---------------------------------------------------------------------------------

_FEATURES: int = CENTER_FEATURES.value
_find_center, _split_rows = Launcher(find_center), Launcher(split_rows)


def memory(rows: int, N: int, project: bool) -> dict[str, int]:
    """The numbers of values that are written, by name."""
    width = padded(N)
    values = rows * width
    sizes = {"center": width, "scaled_center": width, "spread": CENTER_PROGRAMS, "scale": 1}
    sizes |= {"high": values, "low": values, "units": rows}
    if project:
        sizes |= {"upstream_high": values, "upstream_low": values, "upstream_units": rows}
    return sizes


def steps(
    rows: int, M: int, N: int, x_stride: int, y_stride: int, project: bool, byte_references: bool
) -> tuple[Step, ...]:
    """How a block of queries is centred, and with ``project`` how G is split (B, N), contiguous."""
    width = padded(N)
    portion = cdiv(cdiv(width, CENTER_PROGRAMS), _FEATURES) * _FEATURES
    programs = cdiv(width, portion)
    center = _find_center((programs, 1, 1), (M, N, y_stride, width, portion))
    result = [Step(center, ("references", "center", "spread"))]
    for prefix, rows_of, stride in (("", "x", x_stride), ("upstream_", "upstream", N)):
        if rows_of == "x" or project:
            flags = rows_of == "x", rows_of == "x" and byte_references, CENTER_PROGRAMS
            split = _split_rows((rows, 1, 1), (N, stride, width, programs), (), flags, SPLIT)
            parts = f"{prefix}high", f"{prefix}low", "norms", f"{prefix}units"
            read = rows_of, "center", "spread"
            result.append(Step(split, (*read, *parts, "scale", "scaled_center")))
    return tuple(result)


def variants() -> list[Variant]:
    """Every type of references, and rows that are centred or not."""
    result = [variant(find_center, {}, dtype, wide_loads=False) for dtype in REFERENCES]
    for centers, byte_references in ((False, False), (True, False), (True, True)):
        constants: dict[str, Any] = {"CENTERED": centers, "BYTES": byte_references}
        constants["PROGRAMS"] = CENTER_PROGRAMS
        result.append(variant(split_rows, constants | SPLIT.options))
    return result
