"""Checks of arguments: types, dtypes and shapes of tensors, and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

R = TypeVar("R")
_MAX_DIMENSIONS = 64  # dimensions of a tensor


def untouched(
    function: Callable[..., R], who: str, names: Sequence[str], /, *values: Any, **named: Any
) -> R:
    """Calls ``function(*values, **named)`` and raises ValueError if it changed a tensor in place.

    The error calls the function ``who`` and the values by their names. The version counter of a
    tensor shows a change without reading the values. A tensor of inference mode has no version
    counter, so the function gets a copy of it.

    >>> untouched(torch.relu_, "net", ["x"], torch.ones(2))
    Traceback (most recent call last):
    ...
    ValueError: net must not change x in place; change a copy, such as x.clone().
    """
    if torch.compiler.is_compiling():  # a compiled graph has no version counters
        return function(*values, **named)
    values = tuple(_versioned(value) for value in values)
    named = {name: _versioned(value) for name, value in named.items()}
    before = [_version(value) for value in (*values, *named.values())]
    result = function(*values, **named)
    arguments = (*zip(names, values, strict=True), *named.items())
    for (name, value), version in zip(arguments, before, strict=True):
        if _version(value) != version:
            raise ValueError(
                f"{who} must not change {name} in place; change a copy, such as {name}.clone()."
            )
    return result


def _versioned(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def shape_or_type(value: object) -> str:
    """What an error says of a value that should be a tensor of another shape.

    >>> shape_or_type(torch.zeros(2, 3)), shape_or_type((1, 2))
    ('shape (2, 3)', 'tuple')
    """
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def check_dimensions(shape: Sequence[object]) -> None:
    """Raises ValueError if a shape has more dimensions than a tensor can have."""
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"shape must have at most {_MAX_DIMENSIONS} dimensions, got {len(shape)}.")


def layout_hint(shape: Sequence[int], needed: Sequence[int]) -> str:
    """What to do about samples that are images with their channels last, where needed is (C, H, W).

    >>> layout_hint((32, 32, 3), (3, 32, 32))
    ' Channels come first: use x.movedim(-1, 1).'
    >>> layout_hint((2,), (3,))
    ''
    """
    if len(shape) != 3 or tuple(shape) == tuple(needed) or (shape[2], *shape[:2]) != tuple(needed):
        return ""
    return " Channels come first: use x.movedim(-1, 1)."


def check_sample_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless x has the shape (B, *shape)."""
    if x.ndim == 0 or x.shape[1:] != shape:
        needed = ", ".join(["B", *map(str, shape)])
        hint = layout_hint(x.shape[1:], shape)
        raise ValueError(f"x must have shape ({needed}), got {tuple(x.shape)}.{hint}")


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        remedy = f"; use torch.as_tensor({name})" if isinstance(value, (np.ndarray, list)) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{remedy}.")


def check_dense(name: str, values: Tensor) -> None:
    """Raises TypeError for a sparse tensor."""
    if values.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got layout {values.layout}; use {name}.to_dense()."
        )


def check_dtype(name: str, values: Tensor) -> None:
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise TypeError(
            f"{name} must be uint8 or floating point, got {values.dtype}; use {name}.float()."
        )


def check_floating(name: str, values: object, hint: str = "") -> None:
    """Raises TypeError unless values is a floating-point tensor. The hint is added to the error."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}{hint}.")


def check_bool(name: str, value: object) -> None:
    """Raises ValueError unless the value is True or False, such as for the text "false" of JSON."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
