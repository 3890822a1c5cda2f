"""posterior_mean, field_fn and the steps of the ODE, each by the Triton kernels at once.

As :mod:`pfgm.backends.native_direct`: the functions answer where nothing needs the operators of
:mod:`pfgm.ops`, which take longer than the launches. Everywhere else they return None: also where
an argument is not allowed, so that only the other way has checks with messages.

They answer on a GPU where values are not checked, for contiguous tensors.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ..common.checks import checks_values
from ..common.transforms import only_autograd
from . import choose, requested, triton
from .problems import PRECISIONS, OdeStep

__all__ = ["enabled", "field", "posterior_mean", "step"]

enabled = True
"""Whether the functions may answer. Tests turn them off."""

_LEVELS = (torch.float32, torch.float64)
_NUMBERS = (float, int)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _takes(
    x: Any, references: torch.dtype | None, backend: str | None, tensors: tuple[Any, ...]
) -> bool:
    """Whether Triton's kernels answer at once: for tensors whose values lie in the memory of one
    GPU, where no gradient, mode, transform, trace, autocast or profiler is at work."""
    if type(x) is not Tensor or not _on_gpu(x) or not enabled or torch.compiler.is_compiling():
        return False
    device = x.device
    name = requested(backend) or os.environ.get("PFGM_BACKEND") or None
    if (
        name not in (None, "triton")
        or x.dtype is not torch.float32
        or not only_autograd()
        or torch.is_autocast_enabled(device.type)
        or checks_values(device)
        or not _chosen(name, device, references)
    ):
        return False
    differentiates = torch.is_grad_enabled()
    for value in (x, *tensors):
        if type(value) is not Tensor:
            if value is not None:
                return False
        elif (
            (differentiates and value.requires_grad)
            or value.device != device
            or value.layout is not torch.strided
            or not value.is_contiguous()
            or value.is_neg()
            or value._is_zerotensor()
        ):
            return False
    return True


@functools.cache
def _chosen(name: str | None, device: torch.device, references: torch.dtype | None) -> bool:
    """Whether Triton computes in float32, by this name or because none is requested."""
    if triton.supports(device, torch.float32, references) is not None:
        return False
    return name is not None or choose(None, device, torch.float32, references) is triton


def _rows(x: Tensor, references: Tensor) -> tuple[Tensor, Tensor] | None:
    """Points (B, N) and references (M, N), unless one has no values or shapes differ."""
    shape = x.shape
    if not shape or shape[1:] != references.shape[1:] or not x.numel() or not references.numel():
        return None
    if len(shape) == 2:
        return x, references
    return x.view(shape[0], -1), references.view(references.shape[0], -1)


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (B, N) in the shape of x."""
    return rows if x.ndim == 2 else rows.view(x.shape)


def _radius(level: Any, factor: float, x: Tensor) -> Tensor | None:
    """A level times a factor as (B,) in float64; None for a level that is not allowed."""
    B = x.shape[0]
    if type(level) in _NUMBERS:
        return x.new_full((B,), float(level) * factor, dtype=torch.float64)
    shape = level.shape
    if not shape or shape[0] != B or level.numel() != B or len(shape) not in (1, x.ndim):
        return None
    radius: Tensor = level.to(torch.float64)
    if len(shape) > 1:
        radius = radius.view(B)
    return radius if factor == 1.0 else radius * factor


def posterior_mean(
    x: Tensor,
    references: Any,
    level: Any,
    factor: float,
    D: Any,
    with_logsumexp: bool,
    backend: str | None,
    precision: str,
) -> tuple[Tensor, Tensor | None] | None:
    """The mean (B, *S), and the log-sum-exp (B,) if it is wanted. r is the level times the factor.

    D is finite. Diffusion takes the way through torch's operators.
    """
    found = _mean(x, references, level, factor, float(D), backend, precision, False)
    if found is None:
        return None
    _, mean, logsumexp = found
    return _shaped(mean, x), logsumexp if with_logsumexp else None


def _mean(
    x: Tensor,
    references: Any,
    level: Any,
    factor: float,
    D: float,
    backend: str | None,
    precision: str,
    difference: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Radius (B,), mean or difference (B, N), and log-sum-exp (B,)."""
    if type(references) is not Tensor or precision not in PRECISIONS:
        return None
    of_level = None if type(level) in _NUMBERS else level
    if not _takes(x, references.dtype, backend, (references, of_level)):
        return None
    if of_level is not None and of_level.dtype not in _LEVELS:
        return None
    rows = _rows(x, references)
    if rows is None or (radius := _radius(level, factor, x)) is None:
        return None
    mean, logsumexp, _, _ = triton.average(*rows, radius, D, precision, difference)
    return radius, mean, logsumexp


def field(
    x: Tensor, z: Any, references: Any, gamma: Any, backend: str | None, precision: str
) -> tuple[Tensor, Tensor] | None:
    """The normalised field v_x (B, *S) and v_z (B,), for a γ that is allowed."""
    found = _mean(x, references, z, 1.0, 1.0, backend, precision, True)
    if found is None:
        return None
    radius, difference, _ = found
    field_z = triton.field_in_place(difference, radius, float(gamma))
    return _shaped(difference, x), field_z


def step(
    step: OdeStep, with_mean: bool, out: Tensor | None, mean_out: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor | None] | None:
    """The next points (B, N), and the mean (B, N) if it is wanted, for a step that is checked.

    The outputs are those of :func:`pfgm.backends.triton.ode_step`.
    """
    # By name: torch.compile of torch 2.6 does not trace a slice of a NamedTuple.
    x = step.x
    by_row = step.levels if isinstance(step.levels, Tensor) else None
    inputs = (x, step.slope, step.field_z, step.history, by_row)
    if not _takes(x, None, backend, (*inputs[1:], out, mean_out)) or not x.numel():
        return None
    if mean_out is not None and (not with_mean or (out is not None and not _apart(out, mean_out))):
        return None
    for written in (out, mean_out):
        if written is not None and not all(_may_write(written, given) for given in inputs):
            return None
    found = triton.ode_step(step, with_mean, out, mean_out)
    for written in (out, mean_out):
        if written is not None and not written.is_inference():
            torch.autograd.graph.increment_version(written)
    return found


def _may_write(out: Tensor, given: Tensor | None) -> bool:
    """Whether the kernel may write to out: to an input, or to memory that is no input's."""
    if given is None or out is given:
        return True
    at_one_place = out.data_ptr() == given.data_ptr() and out.shape == given.shape
    return at_one_place or _apart(out, given)


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether contiguous tensors have no memory in common."""
    first, second = a.data_ptr(), b.data_ptr()
    return first + a.nbytes <= second or second + b.nbytes <= first
