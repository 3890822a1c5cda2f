"""The operations as torch sees them: schema, shapes, gradients — one place for all backends.

Arguments are flat and complete (:mod:`pfgm.functional` makes them so): x (B, N) in float32 or
float64, references (M, N), radius (B,) float64, D > 0 with radius = σ at D = ∞. Beside the mean and
the log-sum-exp, the squared distance of the nearest reference and the total weight relative to it
come out: with them the backward pass finds the weights in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import choose, requested
from .backends.reference import OdeStep, ode_step_formula, wide_dtype
from .backends.reference import normalised_field as normalised_field_formula

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


def posterior_mean(
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    D: float,
    backend: str | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The op with the backend settled now, so that its backward pass uses the same one."""
    mean, logsumexp, _, _ = torch.ops.pfgm.posterior_mean(
        x, references, radius, D, backend or requested(), precision
    )
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
    if x.shape[0] == 0:
        return _normalised_field_fake(x, z, mean, gamma)
    return choose(backend, x.device, x.dtype).normalised_field(x, z, mean, gamma)


def _normalised_field_fake(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


def _no_field_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("torch.ops.pfgm.normalised_field has no gradient; pfgm.field_fn has one.")


_library.impl("normalised_field", _normalised_field, "CompositeExplicitAutograd")
torch.library.register_fake("pfgm::normalised_field", _normalised_field_fake, lib=_library)
torch.library.register_autograd(
    "pfgm::normalised_field", _no_field_gradient, setup_context=_save_nothing, lib=_library
)


def normalised_field(
    x: Tensor, z: Tensor, mean: Tensor, gamma: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The op or, where a gradient is wanted, the formula in operations that have one."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, z, mean)):
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
    _check_like("out", out, step.x, step.x.shape, step.x.dtype)
    if mean_out is None:
        return
    if step.field_z is None:
        raise ValueError("mean_out is given, but the mean is an input of this form of the step.")
    _check_like("mean_out", mean_out, step.x, step.x.shape, step.x.dtype)
    if not (fake or out.is_meta) and out.numel() > 0 and _overlap(out, mean_out):
        raise ValueError("mean_out overlaps out; both must have memory of their own.")


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


_library.impl("ode_step", _ode_step, "CompositeExplicitAutograd")
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
    """The op or, where a gradient is wanted, the formula in operations that have one."""
    if _wants_gradient(step):
        _step(*_unpacked(step))
        return ode_step_formula(step, with_mean)
    result, mean = torch.ops.pfgm.ode_step.default(
        *_unpacked(step), with_mean, backend or requested()
    )
    return result, mean if with_mean else None


def ode_step_out(step: OdeStep, out: Tensor, mean_out: Tensor | None, backend: str | None) -> None:
    """The op that writes into out (B, N) and mean_out (B, N); out may be any input."""
    torch.ops.pfgm.ode_step_out.default(*_unpacked(step), backend or requested(), out, mean_out)
