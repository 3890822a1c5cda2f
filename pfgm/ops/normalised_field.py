"""The operator normalised_field: from the posterior mean to PFGM's normalised Poisson field.

x and mean (B, N) share one dtype, z (B,) is float64. The operator has no gradient. Where a
derivative is needed, ``compute`` evaluates the formula in plain torch instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose, formulas, requested
from ..common import transforms
from ..common.checks import is_symbolic
from ..common.tensors import wide_dtype
from .library import check_like, library, no_gradient, register

library.define(
    "normalised_field(Tensor x, Tensor z, Tensor mean, float gamma, str? backend=None)"
    " -> (Tensor field_x, Tensor field_z)"
)


def compute(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """v_x (B, N) and v_z (B,).

    The formula in plain torch replaces the operator where a derivative is needed, and where gamma
    is symbolic in a compiled graph.
    """
    if (
        transforms.forward_mode()
        or is_symbolic(gamma)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, z, mean)))
    ):
        return formulas.normalised_field(x, z, mean, gamma)
    field_x, field_z = torch.ops.pfgm.normalised_field(x, z, mean, gamma, backend or requested())
    return field_x, field_z


def _forward(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    check_like("mean", mean, x, x.shape, x.dtype)
    check_like("z", z, x, x.shape[:1], wide_dtype(x.device))
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


register(
    "normalised_field",
    _forward,
    fake=_fake,
    transformed=_transformed,
    gradient=no_gradient("torch.ops.pfgm.normalised_field has no gradient; pfgm.field_fn has one."),
)
