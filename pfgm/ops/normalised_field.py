"""The operator normalised_field: PFGM's normalised Poisson field from x − mean.

The difference x − mean (B, N) is a result of the operator posterior_mean. z (B,) is float64. The
operator can be differentiated once, as the posterior mean. Where a tangent is needed, ``compute``
evaluates the formula in plain torch instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose_for, requested
from ..common import transforms
from ..common.numbers import is_symbolic
from ..common.tensors import wide_dtype
from ..core import formulas
from .library import Operator, check_like, no_gradient

_INPUTS = ("Tensor difference", "Tensor z", "float gamma", "str? backend=None")
_FORWARD = Operator("normalised_field", _INPUTS, "Tensor field_x, Tensor field_z")
_BACKWARD = Operator(
    "normalised_field_backward",
    ("Tensor grad_field_x", "Tensor grad_field_z", *_INPUTS),
    "Tensor grad_difference, Tensor grad_z",
)


def compute(
    difference: Tensor, z: Tensor, gamma: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """v_x (B, N) and v_z (B,).

    The formula in plain torch replaces the operator where a tangent is needed, and in a compiled
    graph where gamma is symbolic or a gradient is needed: there the compiler fuses it.
    """
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (difference, z))
    if (
        transforms.forward_mode()
        or is_symbolic(gamma)
        or (needs_gradient and torch.compiler.is_compiling())
    ):
        return formulas.normalised_field(difference, z, gamma)
    field_x, field_z = _FORWARD(difference, z, gamma, requested(backend))
    return field_x, field_z


def _check(difference: Tensor, z: Tensor) -> None:
    if difference.ndim != 2 or difference.shape[1] == 0:
        raise ValueError(
            f"difference must have shape (B, N) with N ≥ 1, got {tuple(difference.shape)}."
        )
    check_like("z", z, difference, difference.shape[:1], wide_dtype(difference.device))


def forward(
    difference: Tensor, z: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The implementation of normalised_field."""
    _check(difference, z)
    transforms.check_no_tangent("normalised_field", difference, z)
    if difference.shape[0] == 0:
        return _fake(difference, z)
    return choose_for(backend, difference).normalised_field(difference, z, gamma)


def _fake(difference: Tensor, z: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    _check(difference, z)
    return difference.new_empty(difference.shape), difference.new_empty(difference.shape[:1])


def _backward(
    grad_field_x: Tensor,
    grad_field_z: Tensor,
    difference: Tensor,
    z: Tensor,
    gamma: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(difference, z)
    check_like("grad_field_x", grad_field_x, difference, difference.shape, difference.dtype)
    check_like("grad_field_z", grad_field_z, difference, difference.shape[:1], difference.dtype)
    tensors = (grad_field_x, grad_field_z, difference, z)
    transforms.check_no_tangent("normalised_field_backward", *tensors)
    if difference.shape[0] == 0:
        return _fake_backward(*tensors)
    return choose_for(backend, difference).normalised_field_backward(*tensors, gamma)


def _fake_backward(
    grad_field_x: Tensor, grad_field_z: Tensor, difference: Tensor, z: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    _check(difference, z)
    return difference.new_empty(difference.shape), z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    difference, z, ctx.gamma, ctx.backend = inputs
    ctx.save_for_backward(difference, z)


def _gradient(ctx: Any, grad_field_x: Tensor, grad_field_z: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _BACKWARD(grad_field_x, grad_field_z, *ctx.saved_tensors, ctx.gamma, ctx.backend)
    return (*gradients, None, None)


_FORWARD.register(
    forward,
    fake=_fake,
    transformed=lambda *inputs: formulas.normalised_field(*inputs[:-1]),  # without the backend
    gradient=_gradient,
    save=_save,
)
_BACKWARD.register(
    _backward,
    fake=_fake_backward,
    transformed=lambda *inputs: formulas.normalised_field_backward(*inputs[:-1]),
    gradient=no_gradient(
        "pfgm.field_fn can be differentiated once; its gradient has no derivative of its own."
    ),
)
