"""The operations as torch sees them: schema, shapes, gradients — one place for all backends.

Arguments are flat and complete (:mod:`pfgm.functional` makes them so): x (B, N) in float32 or
float64, references (M, N), radius (B,) float64, D > 0 with radius = σ at D = ∞.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import choose, requested
from .backends.reference import wide_dtype

_REFERENCE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)

_library = torch.library.Library("pfgm", "DEF")
_library.define(
    "posterior_mean(Tensor x, Tensor references, Tensor radius, float D, str? backend=None)"
    " -> (Tensor mean, Tensor logsumexp)"
)
_library.define(
    "posterior_mean_backward(Tensor grad_mean, Tensor grad_logsumexp, Tensor x, Tensor references,"
    " Tensor radius, Tensor mean, Tensor logsumexp, float D, bool[] needs, str? backend=None)"
    " -> (Tensor grad_x, Tensor grad_references, Tensor grad_radius)"
)


def _check(x: Tensor, references: Tensor, radius: Tensor, D: float) -> None:
    if x.ndim != 2 or references.ndim != 2 or x.shape[1] != references.shape[1]:
        raise ValueError(
            f"x and references have shapes {tuple(x.shape)} and {tuple(references.shape)}; "
            "allowed are (B, N) and (M, N)."
        )
    if x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; a sample needs at least one value.")
    if references.shape[0] == 0:
        raise ValueError("references is empty; at least one reference is needed.")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x has dtype {x.dtype}; allowed are torch.float32 and torch.float64.")
    if references.dtype not in _REFERENCE_DTYPES:
        raise TypeError(
            f"references has dtype {references.dtype}; allowed are "
            f"{', '.join(map(str, _REFERENCE_DTYPES))}."
        )
    if radius.shape != x.shape[:1] or radius.dtype != wide_dtype(x.device):
        raise ValueError(
            f"radius has shape {tuple(radius.shape)} and dtype {radius.dtype}; allowed is a "
            f"{wide_dtype(x.device)} tensor of shape ({x.shape[0]},)."
        )
    if not x.device == references.device == radius.device:
        raise ValueError(
            f"x is on {x.device}, references on {references.device}, radius on {radius.device}; "
            "all must be on one device."
        )
    if not D > 0:
        raise ValueError(f"D is {D}; allowed is any positive number or infinity.")


def _posterior_mean(
    x: Tensor, references: Tensor, radius: Tensor, D: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, references, radius, D)
    chosen = choose(backend, x.device, x.dtype)
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.empty_like(radius)
    return chosen.posterior_mean(x, references, radius, D)


def _posterior_mean_fake(
    x: Tensor, references: Tensor, radius: Tensor, D: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, references, radius, D)
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(radius)


def _posterior_mean_backward(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    logsumexp: Tensor,
    D: float,
    needs: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        gradients: tuple[Tensor | None, ...] = (
            torch.zeros_like(x),
            torch.zeros_like(references),
            torch.zeros_like(radius),
        )
    else:
        chosen = choose(backend, x.device, x.dtype)
        gradients = chosen.posterior_mean_backward(
            grad_mean,
            grad_logsumexp,
            x,
            references,
            radius,
            mean,
            logsumexp,
            D,
            (needs[0], needs[1], needs[2]),
        )
    grad_x, grad_references, grad_radius = (
        gradient if needed and gradient is not None else x.new_empty(0)
        for gradient, needed in zip(gradients, needs, strict=True)
    )
    return grad_x, grad_references, grad_radius


def _posterior_mean_backward_fake(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    logsumexp: Tensor,
    D: float,
    needs: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_references, grad_radius = (
        torch.empty_like(of, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for of, needed in zip((x, references, radius), needs, strict=True)
    )
    return grad_x, grad_references, grad_radius


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, references, radius, ctx.D, ctx.backend = inputs
    ctx.save_for_backward(x, references, radius, *output)


def _gradient(ctx: Any, grad_mean: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.pfgm.posterior_mean_backward(
        grad_mean, grad_logsumexp, *ctx.saved_tensors, ctx.D, needs, ctx.backend
    )
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_double_backward(ctx: Any, *gradients: Tensor) -> None:
    # Without this autograd would take the first gradient for a constant: silently wrong.
    raise RuntimeError(
        "pfgm.posterior_mean (and field_fn, log_density) can be differentiated once; its gradient "
        "has no derivative of its own."
    )


_library.impl("posterior_mean", _posterior_mean, "CompositeExplicitAutograd")
_library.impl("posterior_mean_backward", _posterior_mean_backward, "CompositeExplicitAutograd")
torch.library.register_fake("pfgm::posterior_mean", _posterior_mean_fake, lib=_library)
torch.library.register_fake(
    "pfgm::posterior_mean_backward", _posterior_mean_backward_fake, lib=_library
)
torch.library.register_autograd(
    "pfgm::posterior_mean", _gradient, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "pfgm::posterior_mean_backward", _no_double_backward, setup_context=_save_nothing, lib=_library
)


def posterior_mean(
    x: Tensor, references: Tensor, radius: Tensor, D: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The op with the backend settled now, so that its backward pass uses the same one."""
    mean, logsumexp = torch.ops.pfgm.posterior_mean(
        x, references, radius, D, backend or requested()
    )
    return mean, logsumexp
