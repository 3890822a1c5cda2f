"""How a kernel is compiled, said once: for the check of the code that comes out without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, with what its machine code should hold.

    Each kernel module lists its own in ``variants()``: every type of references and every
    configuration that a launch may choose.
    """

    name: str
    """Kernel, types and configuration in a few words: "distances, uint8, 64 × 64 × 32"."""
    kernel: Any
    """The ``@triton.jit`` function."""
    types: Mapping[str, str]
    """Argument → Triton's name of its type ("*fp32", "i32", "fp64"), without the constants."""
    constants: Mapping[str, Any]
    """The ``tl.constexpr`` arguments, and others whose value is known (None, 1)."""
    divisible: frozenset[str] = frozenset()
    """Arguments known to be multiples of 16, as aligned addresses and common strides are."""
    num_warps: int = 4
    num_stages: int = 3
    products: bool = False
    """Whether matrix instructions are intended."""
    wide_loads: bool = True
    """Whether 16-byte loads from global memory are intended."""
    notes: Mapping[str, Any] = field(default_factory=dict)
