"""Checks of levels (z, r or sigma): a number for all points, or one number for each point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.numbers import LARGEST, as_float, is_number, is_symbolic
from ..common.tensors import wide_dtype
from ..common.transforms import batched
from ..common.values import checks_values

_LARGEST_FLOAT = torch.finfo(torch.float32).max

Level = Tensor | float
"""A number, or a tensor (B,)."""


def per_query(name: str, value: Level, x: Tensor) -> Tensor:
    """A number or a tensor (B,) or (B, 1, …, 1) as float64 (B,) on the device of x (B, *S)."""
    dtype, count = wide_dtype(x.device), x.shape[0]
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(
                f"{name} must be a number or a tensor of shape ({count},), got "
                f"{type(value).__name__}."
            )
        if is_symbolic(value):
            return torch.ones(count, dtype=dtype, device=x.device) * value
        return torch.full((count,), as_float(value), dtype=dtype, device=x.device)
    if value.ndim > 1 and value.ndim == x.ndim and value.shape == (count, *[1] * (x.ndim - 1)):
        value = value.reshape(count)  # EDM's code has levels of this shape
    if value.shape != (count,) and value.ndim != 0:
        raise ValueError(
            f"{name} must be a number or a tensor of shape ({count},), or ({count}, 1, …, 1) with "
            f"a 1 for each dimension of a sample, got shape {tuple(value.shape)}."
        )
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}.")
    if value.ndim != 0 and value.device != x.device:
        raise ValueError(f"{name} and x must be on one device, got {value.device} and {x.device}.")
    value = value.to(device=x.device, dtype=dtype)
    return value.expand(count) if value.ndim == 0 else value


def step_levels(x: Tensor, *values: Level, next_may_be_zero: bool = False) -> Sequence[Any]:
    """Checks the levels of a step. Returns all as floats, or all as (B,) in float64.

    Args:
        x: (B, *S), the points.
        values: levels of x, of the next points and, for a multistep step, of the previous points.
        next_may_be_zero: whether the level of the next points may be 0.
    """
    # Points that are no tensor are refused later.
    wide = isinstance(x, Tensor) and x.dtype == torch.float64
    most = LARGEST if wide else _LARGEST_FLOAT
    if all(type(value) is float and 0 < value <= most for value in values):
        levels: Sequence[Any] = values
    else:
        levels = _converted(x, values, next_may_be_zero, most)
    if any(not isinstance(level, Tensor) and is_symbolic(level) for level in levels):
        levels = [per_query("level", level, x) for level in levels]
    # A compiled graph cannot look at values.
    if (
        len(levels) == 3
        and not torch.compiler.is_compiling()
        and _holds_anywhere(levels[2] == levels[0])
    ):
        raise ValueError("z_previous must differ from z.")
    return levels


def _converted(
    x: Tensor, values: Sequence[Level], next_may_be_zero: bool, most: float
) -> list[Any]:
    names = ("z", "z_next", "z_previous")[: len(values)]
    may_be_zero = (False, next_may_be_zero, False)[: len(values)]
    if not any(isinstance(value, Tensor) for value in values):
        for name, value, zero in zip(names, values, may_be_zero, strict=True):
            _check_number(name, value, zero, most)
        return [float(value) for value in values]
    wide = [per_query(name, value, x) for name, value in zip(names, values, strict=True)]
    if checks_values(x.device):
        for name, level, zero in zip(names, wide, may_be_zero, strict=True):
            if batched(level):
                continue
            allowed = (level <= most) & ((level >= 0) if zero else (level > 0))
            if not bool(allowed.all()):
                _check_number(name, level[~allowed][0].item(), zero, most)
    return wide


def _holds_anywhere(condition: Tensor | bool) -> bool:
    """Whether a condition holds in any row. Under vmap it cannot be read and counts as False.

    So it does on a GPU, where reading would make the host wait, unless values are checked there.
    """
    if not isinstance(condition, Tensor):
        return condition
    if not checks_values(condition.device) or batched(condition):
        return False
    return bool(condition.any())


def _check_number(name: str, value: Any, zero: bool, most: float) -> None:
    if not is_number(value):
        raise TypeError(
            f"{name} must be a number or a tensor of shape (B,), got {type(value).__name__}."
        )
    if not (0 < value <= most or (zero and value == 0)):
        least = "of at least 0" if zero else "above 0"
        limit = f" and at most {most:.2g}, the limit of float32" if most < value < math.inf else ""
        raise ValueError(f"{name} must be a finite number {least}{limit}, got {value}.")
