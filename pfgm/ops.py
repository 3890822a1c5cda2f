"""The operations as torch sees them: schema, shapes, gradients — one place for all backends.

Arguments are flat and complete (:mod:`pfgm.functional` makes them so): x (B, N) in float32 or
float64, references (M, N), radius (B,) float64, D > 0 with radius = σ at D = ∞. Beside the mean and
the log-sum-exp, the squared distance of the nearest reference and the total weight relative to it
come out: with them the backward pass finds the weights in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import choose, requested
from .backends.problems import OdeStep
from .backends.reference import normalised_field as normalised_field_formula
from .backends.reference import ode_step_formula, posterior_mean_tangent
from .backends.weights import at_limit
from .common import transforms
from .common.checks import varies
from .common.tensors import wide_dtype

_REFERENCE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)

_library = torch.library.Library("pfgm", "DEF")
_library.define(
    "posterior_mean(Tensor x, Tensor references, Tensor radius, float D, str? backend=None,"
    " str precision='high', Tensor? sketch=None)"
    " -> (Tensor mean, Tensor logsumexp, Tensor nearest, Tensor total)"
)
_library.define(
    "posterior_mean_backward(Tensor grad_mean, Tensor grad_logsumexp, Tensor x, Tensor references,"
    " Tensor radius, Tensor mean, Tensor nearest, Tensor total, float D, bool[] needs,"
    " str? backend=None, str precision='high', Tensor? sketch=None)"
    " -> (Tensor grad_x, Tensor grad_references, Tensor grad_radius)"
)


PRECISIONS = ("high", "medium")


def _check(x: Tensor, references: Tensor, radius: Tensor, D: float, precision: str) -> None:
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
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed are {', '.join(PRECISIONS)}.")


def _posterior_mean(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    backend: str | None = None,
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, references, radius, D, precision)
    transforms.check_no_tangent("posterior_mean", x, references, radius)
    chosen = choose(backend, x.device, x.dtype, references.dtype)
    if x.shape[0] == 0:
        return _posterior_mean_fake(x, references, radius, D)
    return chosen.posterior_mean(x, references, radius, D, precision, sketch)


def _posterior_mean_fake(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    backend: str | None = None,
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, references, radius, D, precision)
    mean = torch.empty_like(x, memory_format=torch.contiguous_format)
    logsumexp, nearest, total = (torch.empty_like(radius) for _ in range(3))
    return mean, logsumexp, nearest, total


def _posterior_mean_backward(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: float,
    needs: list[bool],
    backend: str | None = None,
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    given = grad_mean, grad_logsumexp, x, references, radius
    transforms.check_no_tangent("posterior_mean_backward", *given)
    if x.shape[0] == 0:
        gradients: tuple[Tensor | None, ...] = (
            torch.zeros_like(x),
            torch.zeros_like(references),
            torch.zeros_like(radius),
        )
    else:
        chosen = choose(backend, x.device, x.dtype, references.dtype)
        gradients = chosen.posterior_mean_backward(
            grad_mean,
            grad_logsumexp,
            x,
            references,
            radius,
            mean,
            nearest,
            total,
            D,
            (needs[0], needs[1], needs[2]),
            precision,
            sketch,
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
    nearest: Tensor,
    total: Tensor,
    D: float,
    needs: list[bool],
    backend: str | None = None,
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_references, grad_radius = (
        torch.empty_like(of, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for of, needed in zip((x, references, radius), needs, strict=True)
    )
    return grad_x, grad_references, grad_radius


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, references, radius, ctx.D, ctx.backend, ctx.precision, sketch = inputs
    mean, _, nearest, total = output
    ctx.save_for_backward(x, references, radius, mean, nearest, total, sketch)
    ctx.mark_non_differentiable(nearest, total)


def _gradient(
    ctx: Any, grad_mean: Tensor, grad_logsumexp: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    *saved, sketch = ctx.saved_tensors
    gradients = torch.ops.pfgm.posterior_mean_backward(
        grad_mean, grad_logsumexp, *saved, ctx.D, needs, ctx.backend, ctx.precision, sketch
    )
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None, None)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def no_double_backward(ctx: Any, *gradients: Tensor) -> None:
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
    "pfgm::posterior_mean_backward", no_double_backward, setup_context=_save_nothing, lib=_library
)


# ---- the posterior mean with a D that varies between the calls of one graph ------------------
#
# torch.compile knows the value of a number among an op's arguments and compiles anew for each;
# that of a tensor it does not look at.

_library.define(
    "posterior_mean_varying(Tensor x, Tensor references, Tensor radius, Tensor D,"
    " str? backend=None, str precision='high')"
    " -> (Tensor mean, Tensor logsumexp, Tensor nearest, Tensor total)"
)
_library.define(
    "posterior_mean_varying_backward(Tensor grad_mean, Tensor grad_logsumexp, Tensor x,"
    " Tensor references, Tensor radius, Tensor mean, Tensor nearest, Tensor total, Tensor D,"
    " bool[] needs, str? backend=None, str precision='high')"
    " -> (Tensor grad_x, Tensor grad_references, Tensor grad_radius)"
)


def _varying(
    x: Tensor, references: Tensor, radius: Tensor, D: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _posterior_mean(x, references, radius, D.item(), *rest)


def _varying_fake(
    x: Tensor, references: Tensor, radius: Tensor, D: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _posterior_mean_fake(x, references, radius, 1.0, *rest)


def _varying_backward(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: Tensor,
    needs: list[bool],
    *rest: Any,
) -> tuple[Tensor, ...]:
    upstream, found = (grad_mean, grad_logsumexp), (mean, nearest, total)
    return _posterior_mean_backward(
        *upstream, x, references, radius, *found, D.item(), needs, *rest
    )


def _varying_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _posterior_mean_backward_fake(*arguments)


def _save_varying(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, references, radius, D, ctx.backend, ctx.precision = inputs
    mean, _, nearest, total = output
    ctx.save_for_backward(x, references, radius, mean, nearest, total, D)
    ctx.mark_non_differentiable(nearest, total)


def _varying_gradient(
    ctx: Any, grad_mean: Tensor, grad_logsumexp: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.pfgm.posterior_mean_varying_backward(
        grad_mean, grad_logsumexp, *ctx.saved_tensors, needs, ctx.backend, ctx.precision
    )
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None)


for _name, _function, _fake, _derivative, _setup in (
    ("posterior_mean_varying", _varying, _varying_fake, _varying_gradient, _save_varying),
    (
        "posterior_mean_varying_backward",
        _varying_backward,
        _varying_backward_fake,
        no_double_backward,
        _save_nothing,
    ),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pfgm::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"pfgm::{_name}", _derivative, setup_context=_setup, lib=_library
    )


# ---- the posterior mean under the transforms of torch.func and in forward mode ----------------


class OnceDifferentiable(torch.autograd.Function):
    """A derivative: without one of its own, which it says where it matters."""

    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(no_double_backward)
    jvp = staticmethod(no_double_backward)


class _MappedBackward(OnceDifferentiable):
    """The op posterior_mean_backward, with a batching rule."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = torch.ops.pfgm.posterior_mean_backward(*arguments)
        return gradients

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        needs = arguments[9]
        return transforms.map_rows(
            _MappedBackward.apply,
            info.batch_size,
            in_dims,
            arguments,
            shared=(3, 12),
            by_rows=not needs[1],  # the gradient of references sums over rows
        )


class _Transformed(torch.autograd.Function):
    """The op posterior_mean, with a tangent and a batching rule."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = torch.ops.pfgm.posterior_mean(*arguments)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, radius = ctx.saved_tensors[3], ctx.saved_tensors[2]
        of_mean, of_lse = (
            torch.zeros_like(like) if gradient is None else gradient
            for gradient, like in zip(gradients, (mean, radius), strict=False)
        )
        return _gradient(ctx, of_mean, of_lse)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        given = (*ctx.saved_tensors[:3], *tangents[:3])
        of_mean, of_lse = _Tangent.apply(  # type: ignore[no-untyped-call]
            *given, ctx.D, ctx.backend, ctx.precision
        )
        return of_mean, of_lse, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return transforms.map_rows(
            _Transformed.apply, info.batch_size, in_dims, arguments, shared=(1, 6)
        )


def _transformed(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    backend: str | None = None,
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _Transformed.apply(  # type: ignore[no-untyped-call]
        x, references, radius, D, backend, precision, sketch
    )
    return found


def _transformed_backward(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: float,
    needs: list[bool],
    backend: str | None = None,
    precision: str = "high",
    sketch: Tensor | None = None,
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _MappedBackward.apply(  # type: ignore[no-untyped-call]
        grad_mean, grad_logsumexp, x, references, radius, mean, nearest, total, D, needs, backend,
        precision, sketch,
    )  # fmt: skip
    return found


class _Tangent(OnceDifferentiable):
    """(x, references, radius, their tangents, D, backend, precision) → tangents of mean and lse."""

    @staticmethod
    def forward(
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        tangent_x: Tensor | None,
        tangent_references: Tensor | None,
        tangent_radius: Tensor | None,
        D: float,
        backend: str | None,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        # In float64 where the backend has it: what cancels below is of the size of N + D.
        wide = x.to(tangent_dtype(x, references, backend))
        mean, _, nearest, total = torch.ops.pfgm.posterior_mean(
            wide, references, radius, D, backend, precision
        )
        seen = wide, references, radius, mean.to(radius.dtype), nearest, total, D
        if tangent_references is not None or (math.isinf(D) and tangent_radius is not None):
            tangents = tangent_x, tangent_references, tangent_radius
            of_mean, of_lse = posterior_mean_tangent(*seen, *tangents)
        else:
            of_mean, of_lse = part_of_tangent(
                *seen, tangent_x, tangent_radius, mean, backend, precision
            )
        return of_mean.to(x.dtype), of_lse

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return transforms.map_rows(
            _Tangent.apply, info.batch_size, in_dims, arguments, shared=(1, 4)
        )


def part_of_tangent(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    center: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: float,
    tangent_x: Tensor | None,
    tangent_radius: Tensor | None,
    mean: Tensor,
    backend: str | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Tangents of mean and log-sum-exp from one backward pass, in float64; at D = ∞ in x alone.

    With the upstream gradients G = ẋ and g = (mean − x)·ẋ − r ṙ the backward pass has

        t_j = (x_j − x)·ẋ − r ṙ,   c_j = −(N + D) p_j t_j / s_j,   grad_x = Σ_j c_j (x − x_j)

    while the tangents are −Σ c_j (x_j − center) = grad_x + (center − x) Σ c_j and −Σ c_j, and Σ c_j
    is the gradient in r, over r. At D = ∞ it is −g/σ². center is the mean over all references;
    mean, nearest and total are those of these references. At a limit as
    :func:`pfgm.backends.reference.posterior_mean_tangent`.
    """
    wide = center.dtype
    limit = at_limit(nearest, radius, D)
    moved = torch.zeros_like(x) if tangent_x is None else tangent_x.to(x.dtype)
    moved = torch.where(limit[:, None], 0.0, moved)
    g = (moved.to(wide) * (mean.to(wide) - x.to(wide))).sum(1)
    if tangent_radius is not None:
        g = g - radius * tangent_radius
    g = torch.where(limit, 0.0, g)
    finite = not math.isinf(D)
    if finite:
        # A radius too small to be seen in s, where the gradient in r = 0 would tell nothing.
        radius = torch.maximum(radius, 1e-10 * nearest.sqrt())
    grad_x, _, grad_radius = torch.ops.pfgm.posterior_mean_backward(
        moved, g, x, references, radius, mean, nearest, total, D, [True, False, finite],
        backend, precision,
    )  # fmt: skip
    sum_c = torch.where(limit, 0.0, grad_radius / radius if finite else -g / radius / radius)
    of_mean = grad_x.to(wide) + sum_c[:, None] * (center - x.to(wide))
    return of_mean, torch.where(limit, math.nan, -sum_c)


_library.impl("posterior_mean", _transformed, transforms.KEY)
_library.impl("posterior_mean_backward", _transformed_backward, transforms.KEY)


def tangent_dtype(x: Tensor, references: Tensor, backend: str | None) -> torch.dtype:
    """float64, unless the backend of x has none."""
    chosen = choose(backend, x.device, x.dtype, references.dtype)
    wide = wide_dtype(x.device)
    return x.dtype if chosen.supports(x.device, wide, references.dtype) else wide


def posterior_mean(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    backend: str | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The op with the backend settled now, so that its backward pass uses the same one."""
    settled = backend or requested()
    compiled = torch.compiler.is_compiling()
    if compiled and transforms.forward_mode() and not transforms.functional():
        raise RuntimeError(
            "torch.compile drops the dual numbers of torch.autograd.forward_ad in "
            "pfgm.posterior_mean (and field_fn, log_density); allowed is torch.func.jvp within "
            "what is compiled."
        )
    if varies(D) and not transforms.functional():
        D_tensor = torch.ones((), dtype=torch.float64) * D
        found = torch.ops.pfgm.posterior_mean_varying(
            x, references, radius, D_tensor, settled, precision
        )
    elif transforms.forward_mode() and not compiled:
        found = _transformed(x, references, radius, D, settled, precision)
    else:
        found = torch.ops.pfgm.posterior_mean(x, references, radius, D, settled, precision)
    mean, logsumexp, _, _ = found
    return mean, logsumexp


def sketch(references: Tensor, x: Tensor, backend: str | None) -> Tensor | None:
    """What the op's backend can use again of references (M, N) that stay as they are, if anything:
    its argument of that name, for queries of the dtype of x."""
    return choose(backend, x.device, x.dtype, references.dtype).sketch(references, x.dtype)


# ---- the normalised field --------------------------------------------------------------------
#
# x and mean (B, N) share one dtype, z (B,) is float64. Without a gradient, as the ODE step.

_library.define(
    "normalised_field(Tensor x, Tensor z, Tensor mean, float gamma, str? backend=None)"
    " -> (Tensor field_x, Tensor field_z)"
)


def _normalised_field(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check_like("mean", mean, x, x.shape, x.dtype)
    _check_like("z", z, x, x.shape[:1], wide_dtype(x.device))
    transforms.check_no_tangent("normalised_field", x, z, mean)
    if x.shape[0] == 0:
        return _normalised_field_fake(x, z, mean, gamma)
    return choose(backend, x.device, x.dtype).normalised_field(x, z, mean, gamma)


def _normalised_field_fake(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


def _no_field_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("torch.ops.pfgm.normalised_field has no gradient; pfgm.field_fn has one.")


def _field_under_transforms(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return normalised_field_formula(x, z, mean, gamma)


_library.impl("normalised_field", _normalised_field, "CompositeExplicitAutograd")
_library.impl("normalised_field", _field_under_transforms, transforms.KEY)
torch.library.register_fake("pfgm::normalised_field", _normalised_field_fake, lib=_library)
torch.library.register_autograd(
    "pfgm::normalised_field", _no_field_gradient, setup_context=_save_nothing, lib=_library
)


def normalised_field(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The op or, where it will not do, the formula in plain operations.

    That is where a derivative is wanted, or where a compiled gamma varies.
    """
    if (
        transforms.forward_mode()
        or varies(gamma)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, z, mean)))
    ):
        return normalised_field_formula(x, z, mean, gamma)
    field_x, field_z = torch.ops.pfgm.normalised_field(x, z, mean, gamma, backend or requested())
    return field_x, field_z


# ---- the ODE step ----------------------------------------------------------------------------
#
# x, slope and history (B, N) and field_z (B,) share one dtype. z, toward and blend hold for every
# row, unless row_levels (3, B) in float64 gives those of each (backends.reference.OdeStep). Neither
# op has a gradient: ode_step() below takes the formula where one is wanted.

_STEP = (
    "Tensor x, Tensor slope, Tensor? field_z, Tensor? history, float z, float toward, float blend,"
    " Tensor? row_levels, float gamma, float z_exp, bool exact"
)
_library.define(f"ode_step({_STEP}, bool with_mean, str? backend) -> (Tensor next, Tensor mean)")
_library.define(f"ode_step_out({_STEP}, str? backend, Tensor(a!) out, Tensor(b!)? mean_out) -> ()")


def _step(
    x: Tensor,
    slope: Tensor,
    field_z: Tensor | None,
    history: Tensor | None,
    z: float,
    toward: float,
    blend: float,
    row_levels: Tensor | None,
    gamma: float,
    z_exp: float,
    exact: bool,
) -> OdeStep:
    """The first arguments of both ops, checked."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x has dtype {x.dtype}; allowed are torch.float32 and torch.float64.")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed is (B, N) with N ≥ 1.")
    _check_like("slope", slope, x, x.shape, x.dtype)
    if field_z is not None:
        _check_like("field_z", field_z, x, x.shape[:1], x.dtype)
    if history is not None:
        _check_like("history", history, x, x.shape, x.dtype)
    levels: tuple[float, float, float] | Tensor = (z, toward, blend)
    if row_levels is not None:
        _check_like("row_levels", row_levels, x, (3, x.shape[0]), wide_dtype(x.device))
        levels = row_levels
    return OdeStep(x, slope, field_z, history, levels, gamma, z_exp, exact)


def _check_like(
    name: str, value: Tensor, x: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> None:
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; needed are "
            f"{tuple(shape)} and {dtype}."
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} and x on {x.device}; both must be on one.")


def _ode_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, with_mean, backend = arguments
    step = _step(*given)
    transforms.check_no_tangent("ode_step", *step)
    chosen = choose(backend, step.x.device, step.x.dtype)
    result, mean = chosen.ode_step(step, with_mean)
    return result, step.x.new_empty(0) if mean is None else mean


def _ode_step_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, with_mean, _ = arguments
    x = _step(*given).x
    mean = x.new_empty(x.shape) if with_mean and given[2] is not None else x.new_empty(0)
    return x.new_empty(x.shape), mean


def _ode_step_out(*arguments: Any) -> None:
    *given, backend, out, mean_out = arguments
    step = _step(*given)
    _check_outputs(step, out, mean_out)
    if step.x.shape[0] == 0:
        return
    inputs = [t for t in (step.x, step.slope, step.history) if t is not None]
    factors = (t for t in (step.field_z, step.levels) if isinstance(t, Tensor))
    inputs += [t if t.ndim == 2 else t[:, None] for t in factors]
    # An output that the kernels cannot write where it lies is copied from one that they can.
    direct = out if _writable(out, inputs) else None
    direct_mean = mean_out if mean_out is None or _writable(mean_out, inputs) else None
    chosen = choose(backend, step.x.device, step.x.dtype)
    result, mean = chosen.ode_step(step, mean_out is not None, direct, direct_mean)
    if direct is None:
        out.copy_(result)
    if mean_out is not None and direct_mean is None:
        mean_out.copy_(mean)


def _ode_step_out_fake(*arguments: Any) -> None:
    *given, _, out, mean_out = arguments
    _check_outputs(_step(*given), out, mean_out, fake=True)


def _check_outputs(step: OdeStep, out: Tensor, mean_out: Tensor | None, fake: bool = False) -> None:
    if _wants_gradient(step) or (torch.is_grad_enabled() and out.requires_grad):
        raise RuntimeError(
            "out is given, but an input or out requires grad, which an overwritten result cannot "
            "have; leave out away, or use torch.no_grad()."
        )
    if transforms.forward_mode() or transforms.functional():
        _no_output_under_transforms()
    _check_like("out", out, step.x, step.x.shape, step.x.dtype)
    if mean_out is None:
        return
    if step.field_z is None:
        raise ValueError("mean_out is given, but the mean is an input of this form of the step.")
    _check_like("mean_out", mean_out, step.x, step.x.shape, step.x.dtype)
    if not (fake or out.is_meta) and out.numel() > 0 and _overlap(out, mean_out):
        raise ValueError("mean_out overlaps out; both must have memory of their own.")


def _no_output_under_transforms(*_: Any) -> None:
    raise RuntimeError(
        "out is given under torch.func or forward-mode differentiation, which cannot follow an "
        "overwritten result; leave out away."
    )


def _writable(out: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Contiguous features, distinct rows, and each input either the same memory or apart."""
    rows, features = out.shape
    row_stride, feature_stride = out.stride()
    if (features > 1 and feature_stride != 1) or (rows > 1 and row_stride < features):
        return False
    return all(t is out or _same_layout(out, t) or not _overlap(out, t) for t in inputs)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the addresses from the first to the last value have any in common."""
    (a_start, a_end), (b_start, b_end) = _addresses(a), _addresses(b)
    return a_start < b_end and b_start < a_end


def _addresses(values: Tensor) -> tuple[int, int]:
    (rows, features), (row_stride, feature_stride) = values.shape, values.stride()
    extent = (rows - 1) * row_stride + (features - 1) * feature_stride + 1
    start = values.data_ptr()
    return start, start + extent * values.element_size()


def _wants_gradient(step: OdeStep) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in step
    )


def _no_step_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "torch.ops.pfgm.ode_step has no gradient; pfgm.euler_step and its like have one."
    )


def _step_under_transforms(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, with_mean, _ = arguments
    step = _step(*given)
    result, mean = ode_step_formula(step, with_mean)
    return result, step.x.new_empty(0) if mean is None else mean


_library.impl("ode_step", _ode_step, "CompositeExplicitAutograd")
_library.impl("ode_step", _step_under_transforms, transforms.KEY)
_library.impl("ode_step_out", _no_output_under_transforms, transforms.KEY)
_library.impl("ode_step_out", _ode_step_out, "CompositeExplicitAutograd")
torch.library.register_fake("pfgm::ode_step", _ode_step_fake, lib=_library)
torch.library.register_fake("pfgm::ode_step_out", _ode_step_out_fake, lib=_library)
torch.library.register_autograd(
    "pfgm::ode_step", _no_step_gradient, setup_context=_save_nothing, lib=_library
)


def _unpacked(step: OdeStep) -> tuple[Any, ...]:
    x, slope, field_z, history, levels, *law = step
    if isinstance(levels, Tensor):
        return (x, slope, field_z, history, 0.0, 0.0, 0.0, levels, *law)
    return (x, slope, field_z, history, *levels, None, *law)


def ode_step(step: OdeStep, with_mean: bool, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The op or, where it will not do, the formula in plain operations.

    That is where a derivative is wanted, or where a compiled gamma or z_exp varies.
    """
    if transforms.forward_mode() or varies(step.gamma, step.z_exp) or _wants_gradient(step):
        _step(*_unpacked(step))
        return ode_step_formula(step, with_mean)
    result, mean = torch.ops.pfgm.ode_step.default(
        *_unpacked(step), with_mean, backend or requested()
    )
    return result, mean if with_mean else None


def ode_step_out(step: OdeStep, out: Tensor, mean_out: Tensor | None, backend: str | None) -> None:
    """The op that writes into out (B, N) and mean_out (B, N); out may be any input."""
    if varies(step.gamma, step.z_exp):
        _check_outputs(_step(*_unpacked(step)), out, mean_out, fake=True)
        result, mean = ode_step_formula(step, mean_out is not None)
        out.copy_(result)
        if mean_out is not None and mean is not None:
            mean_out.copy_(mean)
        return
    torch.ops.pfgm.ode_step_out.default(*_unpacked(step), backend or requested(), out, mean_out)
