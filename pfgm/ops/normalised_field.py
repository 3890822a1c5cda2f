"""The operator normalised_field: from the posterior mean to PFGM's normalised Poisson field.

x and mean (B, N) share one dtype, z (B,) is float64. The operator can be differentiated once, as
the posterior mean. Where a tangent is needed, ``compute`` evaluates the formula in plain torch
instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, formulas, requested
from ..common import transforms
from ..common.checks import is_symbolic
from ..common.tensors import wide_dtype
from .library import check_like, library, no_gradient, register

_INPUTS = "Tensor x, Tensor z, Tensor mean, float gamma, str? backend=None"
library.define(f"normalised_field({_INPUTS}) -> (Tensor field_x, Tensor field_z)")
library.define(
    f"normalised_field_backward(Tensor grad_field_x, Tensor grad_field_z, {_INPUTS})"
    " -> (Tensor grad_x, Tensor grad_z, Tensor grad_mean)"
)


def compute(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """v_x (B, N) and v_z (B,).

    The formula in plain torch replaces the operator where a tangent is needed, and in a compiled
    graph where gamma is symbolic or a gradient is needed: there the compiler fuses it.
    """
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, z, mean))
    if (
        transforms.forward_mode()
        or is_symbolic(gamma)
        or (needs_gradient and torch.compiler.is_compiling())
    ):
        return formulas.normalised_field(x, z, mean, gamma)
    field_x, field_z = torch.ops.pfgm.normalised_field(x, z, mean, gamma, requested(backend))
    return field_x, field_z


# ---- forward ---------------------------------------------------------------------------------


def _check(x: Tensor, z: Tensor, mean: Tensor) -> None:
    check_like("mean", mean, x, x.shape, x.dtype)
    check_like("z", z, x, x.shape[:1], wide_dtype(x.device))


def _forward(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, z, mean)
    transforms.check_no_tangent("normalised_field", x, z, mean)
    if x.shape[0] == 0:
        return _fake(x, z, mean, gamma)
    return choose(backend, x.device, x.dtype).normalised_field(x, z, mean, gamma)


def _fake(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


def _transformed(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return formulas.normalised_field(x, z, mean, gamma)


# ---- backward --------------------------------------------------------------------------------


def _backward(
    grad_field_x: Tensor,
    grad_field_z: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    gamma: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, z, mean)
    check_like("grad_field_x", grad_field_x, x, x.shape, x.dtype)
    check_like("grad_field_z", grad_field_z, x, x.shape[:1], x.dtype)
    given = (grad_field_x, grad_field_z, x, z, mean)
    transforms.check_no_tangent("normalised_field_backward", *given)
    if x.shape[0] == 0:
        return _fake_backward(*given, gamma)
    return choose(backend, x.device, x.dtype).normalised_field_backward(*given, gamma)


def _fake_backward(
    grad_field_x: Tensor,
    grad_field_z: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    gamma: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape), x.new_empty(x.shape)


def _transformed_backward(
    grad_field_x: Tensor,
    grad_field_z: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    gamma: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return formulas.normalised_field_backward(grad_field_x, grad_field_z, x, z, mean, gamma)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, z, mean, ctx.gamma, ctx.backend = inputs
    ctx.save_for_backward(x, z, mean)


def _gradient(ctx: Any, grad_field_x: Tensor, grad_field_z: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.pfgm.normalised_field_backward.default(
        grad_field_x, grad_field_z, *ctx.saved_tensors, ctx.gamma, ctx.backend
    )
    return (*gradients, None, None)


register(
    "normalised_field",
    _forward,
    fake=_fake,
    transformed=_transformed,
    gradient=_gradient,
    save=_save,
)
register(
    "normalised_field_backward",
    _backward,
    fake=_fake_backward,
    transformed=_transformed_backward,
    gradient=no_gradient(
        "pfgm.field_fn can be differentiated once; its gradient has no derivative of its own."
    ),
)
