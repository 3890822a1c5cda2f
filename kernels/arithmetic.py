"""Reading references, and sums and powers of two that several kernels need, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

EXCESS = tl.constexpr(127 * 2.0**-31)  # 255 times 1/255 as float32 has it, less 1


@triton.jit
def load_references(pointers, mask, dtype: tl.constexpr):
    """References as floating point, zero outside of mask. A uint8 value u means u/127.5 − 1."""
    values = tl.load(pointers, mask=mask, other=0)
    if values.dtype == tl.uint8:
        # The difference of two rounded numbers would lose digits near 0.
        floating = tl.where(mask, (2.0 * values.to(dtype) - 255.0) * (1.0 / 255.0), 0.0).to(dtype)
    else:
        floating = values.to(dtype)
    return floating


@triton.jit
def centered_references(pointers, mask, scale, center):
    """References times a power of two, minus the centre times it; rounded once.

    The unit 1/255 of bytes is that of float32, so that they are (1 + EXCESS) times too large.
    """
    values = tl.load(pointers, mask=mask, other=0)
    unit = scale
    if values.dtype == tl.uint8:
        whole = tl.where(mask, 2.0 * values.to(tl.float32) - 255.0, 0.0)
        unit *= 1.0 / 255.0
    else:
        whole = values.to(tl.float32)
    return tl.fma(whole, tl.broadcast_to(unit, whole.shape), tl.broadcast_to(-center, whole.shape))


@triton.jit
def scale_to(largest, POWER: tl.constexpr):
    """The power of two that brings a float32 ``largest`` > 0 to at least 2^POWER, below twice that.
    For 0 and values that are not finite it is some power of two."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    biased = tl.minimum(tl.maximum(254 + POWER - exponent, 1), 254)
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_compensated(total, lost, value):
    """Kahan's sum: total − lost is the sum of all values to about twice the digits of float32."""
    value -= lost
    larger = total + value
    return larger, (larger - total) - value
