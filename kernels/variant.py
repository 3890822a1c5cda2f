"""How a kernel is compiled, so that its machine code can be checked without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

FP_FUSION = True
"""Whether the compiler may fuse a multiplication and an addition. Error bounds assume it. Triton's
own default differs between versions."""
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, and what its machine code should hold.

    Each kernel module lists its own in ``variants()``: every type of references and every
    configuration that a launch may choose.
    """

    name: str
    """Kernel, types and configuration in a few words: "distances, uint8, 64 × 64 × 32"."""
    kernel: Any
    """The ``@triton.jit`` function."""
    types: Mapping[str, str]
    """Argument → Triton's name of its type ("*fp32", "i32", "fp64"). Constants are left out."""
    constants: Mapping[str, Any]
    """The ``tl.constexpr`` arguments, and other arguments with a known value (None, 1)."""
    divisible: frozenset[str] = frozenset()
    """Arguments known to be multiples of 16, like aligned addresses and common strides."""
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    products: bool = False
    """Whether matrix instructions are intended."""
    wide_loads: bool = True
    """Whether 16-byte loads from global memory are intended."""

    @property
    def options(self) -> dict[str, Any]:
        """How the compiler is called, as in a launch."""
        options = {name: getattr(self, name) for name in OPTIONS}
        if self.maxnreg is None:
            del options["maxnreg"]
        return options | {"enable_fp_fusion": FP_FUSION}


REFERENCES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
}
# Types of the arguments of the posterior mean's kernels, by name.
_POINTERS = {
    "*fp16": "high low upstream_high upstream_low",
    "*fp32": "x upstream mean center scaled_center spread scale projected weights sums parts"
    " coefficients probabilities grad_x grad_references",
    "*fp64": "radius squared nearest total logsumexp grad_logsumexp pulled mass moment summed"
    " chunk_sum squares whole unit grad_radius norms lowest reach units upstream_units limits"
    " closest kept",
    "*i32": "live",
    "*i64": "order",
}
_NUMBERS = {
    "i32": "B M N width portion programs tiles segment stretch stretches pieces x_stride"
    " y_stride pairs_stride",
    "fp32": "half divisor",
    "fp64": "exponent spreading margin noise near_nats others tolerance floor",
}
TYPES = {name: kind for kind, names in (_POINTERS | _NUMBERS).items() for name in names.split()}
_DIVISIBLE = {name for names in _POINTERS.values() for name in names.split()}
_DIVISIBLE |= {"y", "width", "N", "stretch", "x_stride", "y_stride", "pairs_stride"}


def variant(
    kernel: Any,
    constants: Mapping[str, Any],
    references: torch.dtype | None = None,
    products: bool = False,
    wide_loads: bool = True,
) -> Variant:
    """A kernel of the posterior mean for this type of references. ``constants`` may hold num_warps
    and num_stages. N and strides are taken to be multiples of 16."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    types = dict(TYPES)
    words = [kernel.__name__]
    if references is not None:
        types["y"] = f"*{REFERENCES[references]}"
        words.append(REFERENCES[references])
    present = [name for name in kernel.arg_names if name not in constants]
    words += [f"{name} {value}" for name, value in {**constants, **options}.items()]
    return Variant(
        name=", ".join(words),
        kernel=kernel,
        types={name: types[name] for name in present},
        constants=constants,
        divisible=frozenset(_DIVISIBLE.intersection(present)),
        products=products,
        wide_loads=wide_loads,
        **options,
    )
