"""The dtypes of points and of references."""

from __future__ import annotations

from typing import NamedTuple

import torch


class _Stored(NamedTuple):
    """A dtype of references."""

    number: int
    """Its ``Type`` in csrc/api/posterior_mean.h."""
    on_gpus: bool
    """Whether the kernels for GPUs, native and Triton, read it."""
    numpy: str | None
    """NumPy's name; None if it has none."""
    safetensors: str
    """Its name in the header of a safetensors file."""


REFERENCES = {
    torch.float32: _Stored(0, True, "float32", "F32"),
    torch.float64: _Stored(1, False, "float64", "F64"),
    torch.bfloat16: _Stored(2, True, None, "BF16"),
    torch.float16: _Stored(3, True, "float16", "F16"),
    torch.uint8: _Stored(4, True, "uint8", "U8"),
}
"""The dtypes of references. A byte u means u/127.5 − 1 (:func:`pfgm.common.tensors.dequantise`)."""

GPU_REFERENCES = tuple(dtype for dtype, stored in REFERENCES.items() if stored.on_gpus)

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of points that are computed in float32."""

POINTS = (torch.float32, torch.float64, *HALF)
"""The dtypes of points."""
