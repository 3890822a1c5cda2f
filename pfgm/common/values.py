"""Values of tensors: finite, within the range of their dtype, and where they are checked."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_debug = False
_CHUNK = 1 << 20  # values that are looked at together
# The largest allowed radius with D ≤ 1, and with any D. The same as in csrc/cpu/weights.h.
_LARGEST_RADIUS, _LARGEST_OF_ALL = 1e130, 1e150


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Checks values on every device while the context is open, for the whole process.

    On the CPU, values that are not finite always raise an error. On other devices a check would
    make the host wait for the device, so NaN propagates unless this context is open. Functions that
    torch.compile or torch.export traces check no values.

    >>> import pfgm
    >>> with pfgm.debug_checks():
    ...     mean = pfgm.posterior_mean(torch.zeros(1, 2), torch.ones(3, 2), r=1.0)
    """
    global _debug
    previous, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = previous


def checks_values(device: torch.device) -> bool:
    """Whether values on this device are checked: always on the CPU, see :func:`debug_checks`.

    A compiled or exported graph cannot look at values.
    """
    return (_on_cpu(device) or _debug) and not torch.compiler.is_compiling()


def debugging() -> bool:
    """Whether values are checked on every device."""
    return _debug


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def first_bad_row(values: Tensor) -> int | None:
    """Number of the first row that holds NaN or infinity; None if all rows are finite."""
    if not values.is_floating_point():
        return None
    step = max(1, _CHUNK // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        if not bool((finite := rows.isfinite()).all()):
            return start + int((~finite).nonzero()[0, 0])
    return None


def check_finite(name: str, values: Tensor, start: int = 0) -> None:
    """Raises ValueError for NaN or infinity, and names the first row; values[0] is row start.

    >>> check_finite("x", torch.tensor([[1.0], [float("nan")]]), start=10)
    Traceback (most recent call last):
    ...
    ValueError: x must be finite, got NaN or infinity (first in row 11).
    """
    row = first_bad_row(values if values.ndim > 0 else values.unsqueeze(0))
    if row is not None:
        where = f" (first in row {start + row})" if values.ndim > 1 else ""
        raise ValueError(f"{name} must be finite, got NaN or infinity{where}.")


def radius_message(radius: Tensor, row: int) -> str:
    """The error for a radius that is not allowed.

    It gives all names that the public functions use for the radius.
    """
    value = radius[row].item()
    if not 0 < value <= sys.float_info.max:
        return f"r, sigma or z must be finite and at least 0, got {value} in row {row}."
    return (
        "r must be at most 1e+130, or with D above 1 at most 1e+130 √D and 1e+150, so that float64 "
        f"holds the weights, got {value} for r, sigma or z in row {row}. With a finite D, r is "
        "sigma √D."
    )


def check_radius(radius: Tensor, D: float) -> None:
    """Raises ValueError for the first radius that is not allowed."""
    most = min(_LARGEST_OF_ALL, _LARGEST_RADIUS * math.sqrt(max(1.0, D)))
    allowed = (radius >= 0) & (radius <= most)
    if not bool(allowed.all()):
        raise ValueError(radius_message(radius, int((~allowed).nonzero()[0])))


def non_finite_message(x: Tensor, references: Tensor) -> str:
    """The error for a distance that is not finite. It names the argument and its first bad row."""
    for argument, values in (("x", x), ("references", references)):
        row = first_bad_row(values)
        if row is not None:
            return f"{argument} must be finite, got NaN or infinity (first in row {row})."
    return f"x and references lie so far apart that their squared distance overflows {x.dtype}."


def range_message(x: Tensor, references: Tensor, row: int) -> str:
    """The error for references that a row of x needs and whose values, or their differences from x,
    its dtype cannot hold."""
    most = torch.finfo(x.dtype).max
    bad = first_bad_row(references.to(x.dtype))
    if bad is None and len(references) > 0:
        return (
            f"x is so far from references that x minus its mean overflows {x.dtype} in row {row} "
            f"of x: differences must be at most {most:.2g}. Use x in torch.float64."
        )
    where = "" if bad is None else f" (first in row {bad})"
    return (
        f"references must be at most {most:.2g} for {x.dtype} x, got larger values{where} that row "
        f"{row} of x needs. Use x in torch.float64."
    )


def least_square(features: int, dtype: torch.dtype) -> float:
    """Where d² + r² is at least this, underflow of squares takes less from it than rounding.

    The same as in csrc/cpu/weights.h.
    """
    limits = torch.finfo(dtype)
    return features * limits.tiny / limits.eps


def underflow_message(x: Tensor, row: int) -> str:
    """The error for a row of x near a reference, at a radius whose square is small too."""
    least = math.sqrt(least_square(math.prod(x.shape[1:]), torch.float64))
    return (
        f"x is so close to references in row {row} of x that the squared distance underflows "
        f"float64: distances must be 0 or at least {least:.1e}, or r, sigma or z at least that."
    )


def check_underflow(nearest: Tensor, radius: Tensor, x: Tensor) -> None:
    """Raises ValueError if a result for x (B, N) depends on squared distances that underflow."""
    least = least_square(x.shape[1], nearest.dtype)
    low = (nearest > 0) & (nearest + radius.square() < least)
    if bool(low.any()):
        raise ValueError(underflow_message(x, int(low.flatten().nonzero()[0])))


def check_range(result: Tensor, x: Tensor, references: Tensor, difference: bool = False) -> None:
    """Raises ValueError if the dtype of x cannot hold a mean over wider references, or x − mean."""
    if references.dtype.itemsize <= x.dtype.itemsize and not difference:
        return
    row = first_bad_row(result.to(x.dtype))
    if row is not None:
        raise ValueError(range_message(x, references, row))


def check_distances(nearest: Tensor, x: Tensor, references: Tensor) -> None:
    """Raises ValueError if a distance is NaN, where values are checked (:func:`checks_values`)."""
    if checks_values(x.device) and bool(nearest.isnan().any()):
        raise ValueError(non_finite_message(x, references))
