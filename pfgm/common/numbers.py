"""Numbers: what counts as one, and the checks of arguments that must be numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from .values import check_finite

LARGEST = sys.float_info.max
"""The largest finite number. torch.compile cannot compare a symbolic number with infinity."""
_FLOAT32 = torch.finfo(torch.float32)
_MAX_INT = (1 << 63) - 1  # the largest integer that torch takes
_MAX_SIZES = 64  # values in a tuple of sizes


def is_number(value: object) -> bool:
    """Whether value is a real number of Python or NumPy, but not True or False."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is an integer of Python or NumPy, but not True or False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_symbolic(*values: float) -> bool:
    """Whether torch.compile is running and one of these numbers is symbolic.

    An operator that took a symbolic number would be compiled again for each value of it. Versions
    of torch that cannot tell whether a number is symbolic do compile again.
    """
    if not torch.compiler.is_compiling():
        return False
    shapes = torch.fx.experimental.symbolic_shapes
    if not hasattr(shapes, "has_static_value"):
        return False
    return not all(shapes.has_static_value(value) for value in values)


def as_float(value: Any) -> float:
    """A number as a float; infinity for an integer beyond the range of float64.

    >>> as_float(7), as_float(-(10**400))
    (7.0, -inf)
    """
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_number(value: Any) -> float:
    """A number of NumPy, or a tensor or array of one value, as a number of Python.

    NaN for other types, and for True and False.

    >>> as_number(torch.tensor(2.5)), as_number("2.5")
    (2.5, nan)
    """
    if isinstance(value, (Tensor, np.ndarray)):
        return as_number(value.item()) if math.prod(value.shape) == 1 else math.nan
    if isinstance(value, (bool, np.bool_)):
        return math.nan
    if isinstance(value, (int, float)):
        return value if -LARGEST <= value <= LARGEST else as_float(value)
    return as_float(value) if isinstance(value, Real) else math.nan


def whole(name: str, value: Any, least: int = 1, most: int = _MAX_INT) -> int:
    """The value as an int. Raises ValueError unless it is an integer from least to most."""
    if not is_whole(value) or not least <= value <= most:
        too_large = is_whole(value) and value > most
        limit = f" and at most {most}" if most != _MAX_INT or too_large else ""
        got = type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value)
        raise ValueError(f"{name} must be an integer of at least {least}{limit}, got {got}.")
    return int(value)


def int_tuple(name: str, values: Any, most: int = _MAX_INT) -> tuple[int, ...]:
    """A list or tuple of integers as a tuple.

    Raises ValueError if it is empty or holds anything but integers from 1 to ``most``.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) == 0:
        raise ValueError(f"{name} must be a non-empty list or tuple, got {values!r}.")
    if len(values) > _MAX_SIZES:
        raise ValueError(f"{name} must have at most {_MAX_SIZES} values, got {len(values)}.")
    return tuple(whole(f"{name}[{i}]", value, 1, most) for i, value in enumerate(values))


def check_seed(seed: object) -> None:
    """Raises ValueError unless the generators of torch accept this seed."""
    if not is_whole(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an integer from -2^63 to below 2^64, got {seed!r}.")


def positive(name: str, value: Any) -> float:
    """The value as a number of Python. Raises ValueError unless float32 holds it and it is > 0."""
    number = as_number(value)
    if not _FLOAT32.tiny <= number <= _FLOAT32.max:
        raise ValueError(
            f"{name} must be a number above 0 that float32 can hold, {_FLOAT32.tiny:.2g} to "
            f"{_FLOAT32.max:.2g}, got {value!s:.80}."
        )
    return number


def non_negative(name: str, value: Any) -> float:
    """The value as a number of Python. Raises ValueError unless float32 holds it and it is ≥ 0."""
    number = as_number(value)
    if not 0 <= number <= _FLOAT32.max:
        raise ValueError(
            f"{name} must be a number of at least 0 that float32 can hold, up to "
            f"{_FLOAT32.max:.2g}, got {value!s:.80}."
        )
    return number


def check_at_least_0(name: str, value: float | Tensor) -> None:
    """Raises ValueError unless value is a finite number of at least 0.

    Raises TypeError for a tensor that requires grad: the number has no gradient.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be a number, got a tensor that requires grad.")
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise ValueError(
            f"{name} must be a number, got a tensor of {value.dtype} and shape "
            f"{tuple(value.shape)}."
        )
    if not (isinstance(value, Tensor) or is_number(value)) or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")


def finite_values(name: str, value: Any) -> Tensor:
    """A number, nested lists of numbers, or a tensor or array of them, in float64 on the CPU.

    Raises TypeError if it is something else, and ValueError unless all are finite.
    """
    try:
        if np.iscomplexobj(value) or (isinstance(value, Tensor) and value.is_complex()):
            raise TypeError("complex")
        values = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must hold real numbers, got {value!r:.80}.") from error
    check_finite(name, values)
    return values
