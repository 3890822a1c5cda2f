"""Reading references, sums in two floats, and tiles, shared by the kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# A float32 product is six products of bfloat16 parts on matrix units. The interpreter and AMD's
# units multiply float32 itself.
PRECISION = "ieee" if triton.knobs.runtime.interpret or torch.version.hip else "bf16x6"
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every launch. By default versions of Triton differ in fusing products and sums."""


def with_registers(count: int, warps: int) -> dict[str, Any]:
    """Launch options that allow a thread ``count`` registers. Without them the compiler would
    spill some to fit one more block."""
    return FUSED | {"num_warps": warps} | ({} if torch.version.hip else {"maxnreg": count})


def cdiv(count: int, each: int) -> int:
    """count / each, rounded up."""
    return -(-count // each)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least count."""
    return 1 << (count - 1).bit_length()


@triton.jit
def unit_of(y):
    """The factor by which ``load_references`` multiplies: a byte u means (2u − 255)/255."""
    return 255.0 if y.dtype.element_ty == tl.uint8 else 1.0


@triton.jit
def load_references(pointers, mask):
    """References times ``unit_of(y)``, exact in float32; zero outside of mask."""
    values = tl.load(pointers, mask=mask, other=0)
    whole = values.to(tl.float32)
    if values.dtype == tl.uint8:
        whole = tl.where(mask, 2.0 * whole - 255.0, 0.0)
    return whole


@triton.jit
def add_compensated(total, lost, value):
    """Kahan's sum: total − lost is the sum of all values to about twice the digits of float32."""
    value -= lost
    larger = total + value
    return larger, (larger - total) - value


@triton.jit
def head_of(value):
    """The first 12 of a float32's 24 bits. Products of two heads, or of a head and 255, are
    exact."""
    return (value.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def exact_difference(a, y, pointers, mask, power):
    """(a − y) · power · ``unit_of(y)`` as high + low, exactly; ``power`` is a power of two."""
    a = a * power
    b = load_references(pointers, mask) * power
    rest = tl.zeros_like(a)
    if y.dtype.element_ty == tl.uint8:  # a · 255 may not fit float32, head · 255 does
        head = head_of(a)
        rest = (a - head) * 255.0
        a = head * 255.0
    high = a - b  # Knuth's sum of a and −b
    minus_b = high - a
    low = (a - (high - minus_b)) - (b + minus_b) + rest
    whole = high + low
    return whole, low - (whole - high)


@triton.jit
def add_exactly(total, rest, value):
    """Knuth's sum: total + rest is the sum of all values, and only ``rest`` is rounded."""
    larger = total + value
    added = larger - total
    return larger, rest + ((total - (larger - added)) + (value - added))


@triton.jit
def add_square(total, rest, high, low):
    """Adds (high + low)² to total + rest, in two floats."""
    head = head_of(high)
    tail = high - head
    total, rest = add_exactly(total, rest, head * head)
    total, rest = add_exactly(total, rest, 2.0 * head * tail)
    return total, rest + (tail * tail + low * (2.0 * high + low))


@triton.jit
def scale_to_one(largest):
    """The power of two that brings a float32 ``largest`` > 0 to between 1 and 2. For 0, infinity
    and NaN it is some power of two."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    biased = tl.minimum(tl.maximum(254 - exponent, 1), 254)
    return (biased << 23).to(tl.float32, bitcast=True)
