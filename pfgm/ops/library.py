"""The operator library "pfgm", and helpers for its operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import transforms

library = torch.library.Library("pfgm", "DEF")


def register(
    name: str,
    compute: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    transformed: Callable[..., Any] | None = None,
    gradient: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Registers the implementations of an operator. Its schema must be defined in ``library``.

    Args:
        name: the operator.
        compute: the implementation on every device.
        fake: returns empty results of the right shapes, for tracing.
        transformed: the implementation under the transforms of torch.func; None if there is none.
        gradient: the backward pass; None for an operator without results.
        save: saves what the backward pass needs; None saves nothing.
    """
    library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pfgm::{name}", fake, lib=library)
    if transformed is not None:
        library.impl(name, transformed, transforms.TRANSFORM_KEY)
    if gradient is not None:
        torch.library.register_autograd(
            f"pfgm::{name}", gradient, setup_context=save or save_nothing, lib=library
        )


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves nothing for the backward pass."""


def no_gradient(message: str) -> Callable[..., None]:
    """A backward pass that raises RuntimeError."""

    def gradient(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(message)

    return gradient


def check_like(
    name: str, value: Tensor, x: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Raises ValueError unless value has this shape and dtype, on the device of x."""
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; allowed are "
            f"{tuple(shape)} and {dtype}."
        )
    if value.device != x.device:
        raise ValueError(
            f"{name} is on {value.device} and x on {x.device}; both must be on one device."
        )
