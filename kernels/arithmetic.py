"""Reading references, and sums and powers of two that several kernels need, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


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
