"""The operators ode_step and ode_step_out: one step of the flow's ODE.

ode_step_out writes into given tensors. x, slope and history (B, N) and field_z (B,) share one
dtype. The operators have no gradient. Where a derivative is needed, ``compute``
evaluates the formula in plain torch instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import choose_for, requested
from ..common import transforms
from ..common.numbers import is_symbolic
from ..common.tensors import mark_written, wide_dtype
from ..core import formulas
from ..core.problems import OdeStep
from .library import Operator, check_like, no_gradient

_STEP = Operator(
    "ode_step", (OdeStep, "bool with_mean", "str? backend"), "Tensor next, Tensor mean"
)
_STEP_OUT = Operator(
    "ode_step_out", (OdeStep, "str? backend", "Tensor(a!) out", "Tensor(b!)? mean_out"), ""
)


def compute(step: OdeStep, with_mean: bool, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The next points (B, N), and with_mean the mean (B, N), for a step that has a field.

    The formula in plain torch replaces the operator where a derivative is needed, and where gamma
    or z_exp is symbolic in a compiled graph.
    """
    if transforms.forward_mode() or is_symbolic(step.gamma, step.z_exp) or _wants_gradient(step):
        check(step)
        return formulas.ode_step(step, with_mean)
    result, mean = _STEP(step, with_mean, requested(backend))
    return result, mean if with_mean else None


def compute_into(step: OdeStep, out: Tensor, mean_out: Tensor | None, backend: str | None) -> None:
    """Writes the next points into out (B, N) and the mean into mean_out (B, N).

    out may be any input.
    """
    if is_symbolic(step.gamma, step.z_exp):
        check(step)
        _check_outputs(step, out, mean_out)
        result, mean = formulas.ode_step(step, mean_out is not None)
        out.copy_(result)
        if mean_out is not None and mean is not None:
            mean_out.copy_(mean)
        return
    _STEP_OUT(step, requested(backend), out, mean_out)


def check(step: OdeStep) -> None:
    """Raises ValueError or TypeError if a tensor of the step is not allowed."""
    x = step.x
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}.")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (B, N) with N ≥ 1, got {tuple(x.shape)}.")
    check_like("slope", step.slope, x, x.shape, x.dtype)
    if step.field_z is not None:
        check_like("field_z", step.field_z, x, x.shape[:1], x.dtype)
    if step.history is not None:
        check_like("history", step.history, x, x.shape, x.dtype)
    if step.row_levels is not None:
        check_like("row_levels", step.row_levels, x, (3, x.shape[0]), wide_dtype(x.device))


def _wants_gradient(step: OdeStep) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in step
    )


def forward(step: OdeStep, with_mean: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    """The implementation of ode_step."""
    _check(step, with_mean)
    transforms.check_no_tangent("ode_step", *step)
    chosen = choose_for(backend, step.x)
    result, mean = chosen.ode_step(step, with_mean)
    return _contiguous(result, step.x.new_empty(0) if mean is None else mean)


def _check(step: OdeStep, with_mean: bool) -> None:
    check(step)
    if with_mean and step.field_z is None:
        raise ValueError("with_mean must be False without field_z, where slope is the mean.")


def _contiguous(result: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """As _fake() promises a compiler."""
    return result.contiguous(), mean.contiguous()


def _fake(step: OdeStep, with_mean: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    _check(step, with_mean)
    x = step.x
    mean = x.new_empty(x.shape if with_mean else 0)
    return x.new_empty(x.shape), mean


def _transformed(step: OdeStep, with_mean: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    _check(step, with_mean)
    result, mean = formulas.ode_step(step, with_mean)
    return _contiguous(result, step.x.new_empty(0) if mean is None else mean)


def forward_into(step: OdeStep, backend: str | None, out: Tensor, mean_out: Tensor | None) -> None:
    """The implementation of ode_step_out."""
    check(step)
    _check_outputs(step, out, mean_out)
    if step.x.shape[0] == 0:
        return
    inputs = [step.x, step.slope]
    if step.history is not None:
        inputs.append(step.history)
    if step.field_z is not None:
        inputs.append(step.field_z[:, None])
    if step.row_levels is not None:
        inputs.append(step.row_levels.T)
    # Where the kernels cannot write to the layout of an output, the result is copied to it.
    direct = out if _writable(out, inputs) else None
    direct_mean = mean_out if mean_out is None or _writable(mean_out, inputs) else None
    chosen = choose_for(backend, step.x)
    result, mean = chosen.ode_step(step, mean_out is not None, direct, direct_mean)
    mark_written(direct, direct_mean)  # kernels write past torch
    if direct is None:
        out.copy_(result)
    if mean_out is not None and mean is not None and direct_mean is None:
        mean_out.copy_(mean)


def _fake_out(step: OdeStep, backend: str | None, out: Tensor, mean_out: Tensor | None) -> None:
    check(step)
    _check_outputs(step, out, mean_out)


def _refuse_transforms(*_: Any) -> None:
    raise RuntimeError(
        "out is given under torch.func or forward-mode differentiation, which do not support "
        "writing into out; call the step without out."
    )


def _check_outputs(step: OdeStep, out: Tensor, mean_out: Tensor | None) -> None:
    if _wants_gradient(step) or (torch.is_grad_enabled() and out.requires_grad):
        raise RuntimeError(
            "out is given, but an input or out requires grad, and a step with out has no gradient; "
            "call the step without out, or use torch.no_grad()."
        )
    if transforms.forward_mode() or transforms.in_torch_func():
        _refuse_transforms()
    check_like("out", out, step.x, step.x.shape, step.x.dtype)
    if mean_out is None:
        return
    if step.field_z is None:
        raise ValueError("mean_out must not be given to a step that takes the mean as an input.")
    check_like("mean_out", mean_out, step.x, step.x.shape, step.x.dtype)
    check_separate(out, mean_out)


def check_separate(out: Tensor, mean_out: Tensor) -> None:
    """Raises ValueError if out and mean_out share memory, as far as :func:`share_memory` tells."""
    if share_memory(out, mean_out):
        raise ValueError("mean_out and out must not overlap in memory.")


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a value in common.

    Of tensors without addresses, as in traces and transforms, only the same tensor is seen.
    """
    if a is b:
        return a.numel() > 0
    if (
        torch.compiler.is_compiling()
        or transforms.in_torch_func()
        or not all(type(value) is Tensor and not value.is_meta for value in (a, b))
    ):
        return False
    if a.numel() == 0 or b.numel() == 0 or not _overlap(a, b):
        return False
    return a.dtype != b.dtype or _share_values(a, b)


def _share_values(a: Tensor, b: Tensor) -> bool:
    """Whether a value of a lies in b too. Tensors that interleave have only addresses in common."""
    start = min(a.data_ptr(), b.data_ptr())
    end = max(_addresses(a)[1], _addresses(b)[1])
    taken = torch.zeros((end - start) // a.element_size(), dtype=torch.bool, device="cpu")
    in_a, in_b = (
        taken.as_strided(
            value.shape, value.stride(), (value.data_ptr() - start) // value.element_size()
        )
        for value in (a, b)
    )
    in_a.fill_(True)
    return bool(in_b.any())


def _writable(out: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether kernels can write to out.

    They can if its features are contiguous, its rows do not overlap each other, and each input
    has the same memory layout or does not overlap it.
    """
    rows, features = out.shape
    row_stride, feature_stride = out.stride()
    if (features > 1 and feature_stride != 1) or (rows > 1 and row_stride < features):
        return False
    for value in inputs:
        same = value.data_ptr() == out.data_ptr() and value.stride() == out.stride()
        if not same and _overlap(out, value):
            return False
    return True


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors overlap."""
    (a_start, a_end), (b_start, b_end) = _addresses(a), _addresses(b)
    return a_start < b_end and b_start < a_end


def _addresses(values: Tensor) -> tuple[int, int]:
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    start = values.data_ptr()
    return start, start + extent * values.element_size()


_STEP.register(
    forward,
    fake=_fake,
    transformed=_transformed,
    gradient=no_gradient(
        "torch.ops.pfgm.ode_step has no gradient; pfgm.euler_step and the other steps have one."
    ),
)
_STEP_OUT.register(forward_into, fake=_fake_out, transformed=_refuse_transforms)
