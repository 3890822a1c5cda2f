"""posterior_mean, field_fn and the steps of the ODE, each in one call of the extension.

:mod:`pfgm.ops.eager` decides whether they may be called. The functions here convert the arguments
of the public functions to what the extension takes: contiguous tensors in float32 or float64. They
return None for arguments that are not allowed.

On a GPU, values are not checked and nothing waits for it. Levels in tensors on the GPU stay there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import HALF, REFERENCES
from ..common.numbers import as_float
from ..common.tensors import contiguous_features, flat_rows, mark_written, unfilled
from . import native

EULER, HEUN, MULTISTEP = 0, 1, 2
"""The methods of :func:`step`."""

SketchOf = Callable[[int, Tensor, Tensor, str], Tensor | None]
"""The function :meth:`pfgm.references.part.Part.sketch` of references in a set."""

available = native.has_extension()
"""Whether there is an extension to call."""

_native: Any = native.extension() if available else None
_POINTS = {dtype: REFERENCES[dtype].number for dtype in (torch.float32, torch.float64)}
_SUBSTITUTIONS = ("exact", "published")
_NUMBERS = (float, int)
# Looked up once, as in pfgm/ops/eager.py.
_empty_like, _threads = torch.empty_like, torch.get_num_threads


# ---- arguments -------------------------------------------------------------------------------


def _level(value: Any, B: int, dimensions: int) -> float | tuple[int, int, int, Tensor] | None:
    """A level of points (B, *S) as the extension takes it: a number, or address, type and stride
    of a tensor, which comes last to stay in memory.

    A tensor is one value, (B,), or (B, 1, …, 1) with as many dimensions as the points.
    """
    if type(value) is float:
        return value
    if type(value) is int:
        return as_float(value)
    if type(value) is not Tensor:
        return None
    if value.dtype in HALF:
        value = value.float()
    if (kind := _POINTS.get(value.dtype)) is None:
        return None
    own = value.ndim
    if own == 0:
        return value.data_ptr(), kind, 0, value
    if value.numel() != B or not (own == 1 or (own == dimensions and value.shape[0] == B)):
        return None
    return value.data_ptr(), kind, 1 if value.is_contiguous() else value.stride()[0], value


_supported: set[tuple[torch.device, torch.dtype, torch.dtype | None]] = set()


def _runs_on(gpu: torch.device, dtype: torch.dtype, references: torch.dtype | None) -> bool:
    """Whether the kernels can run on a GPU for points and references of these dtypes."""
    case = gpu, dtype, references
    if case in _supported:
        return True
    if native.supports(*case) is not None:
        return False  # which may change
    _supported.add(case)
    return True


def _sketch(sketch_of: SketchOf, x: Tensor, references: Tensor) -> Tensor | None:
    if (sketch := sketch_of(0, references, x, "native")) is not None:
        native.check_sketch(sketch, x, references)
    return sketch


# ---- the posterior mean and the field --------------------------------------------------------


def _problem(
    gpu: torch.device | None,
    x: Any,
    references: Any,
    level: Any,
    sketch_of: SketchOf | None,
) -> tuple[Any, ...] | None:
    """The points and references as the kernels read them, and what the calls begin with: B, M, N,
    types, addresses and strides, level and how to compute.

    The sketch is passed as a tensor: a set may drop its own while the kernels read it.
    """
    if type(x) is not Tensor or type(references) is not Tensor:
        return None
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    reference_dtype, shape, other = references.dtype, x.shape, references.shape
    kind, stored = _POINTS.get(dtype), REFERENCES.get(reference_dtype)
    if kind is None or stored is None or not shape or not other:
        return None
    (B, *sample), (M, *other_sample), values = shape, other, x.numel()
    if (
        sample != other_sample  # lists are compared sooner than parts of a torch.Size
        or not values
        or not M
        or (radius := _level(level, B, len(shape))) is None
        or (
            gpu is not None and (sketch_of is not None or not _runs_on(gpu, dtype, reference_dtype))
        )
    ):
        return None  # a set on a GPU is computed in chunks, of which the results are merged
    N = values // B
    if x.dtype is not dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    rows, stride = references, N
    if not references.is_contiguous():
        rows = contiguous_features(flat_rows(references))
        stride = rows.stride(0)
    sketch, gpu_call = None, None
    if gpu is not None:
        gpu_call = *native.current_stream(gpu), functools.partial(unfilled, device=gpu)
    elif sketch_of is not None:
        sketch = _sketch(sketch_of, x, references)
    return (
        x,
        rows,
        B,
        M,
        N,
        kind,
        stored.number,
        x.data_ptr(),
        rows.data_ptr(),
        stride,
        radius,
        sketch,
        _threads(),
        gpu_call,
    )


def posterior_mean(
    gpu: torch.device | None,
    x: Any,
    references: Any,
    level: Any,
    factor: float,
    D: float,
    with_logsumexp: bool,
    sketch_of: SketchOf | None,
) -> tuple[Tensor, Tensor | None] | None:
    """The mean (B, *S), and the log-sum-exp (B,) if it is wanted.

    The level times the factor is r, or σ at D = ∞.
    """
    problem = _problem(gpu, x, references, level, sketch_of)
    if problem is None:
        return None
    x, _, *arguments = problem
    mean = _empty_like(x)
    logsumexp = x.new_empty(len(x), dtype=torch.float64) if with_logsumexp else None
    results = mean.data_ptr(), native.address(logsumexp), 0
    done = _native.direct_mean(*arguments, factor, D, 0.0, *results)
    return (mean, logsumexp) if done else None


def field(
    gpu: torch.device | None,
    x: Any,
    references: Any,
    z: Any,
    gamma: Any,
    sketch_of: SketchOf | None,
) -> tuple[Tensor, Tensor] | None:
    """The normalised field v_x (B, *S) and v_z (B,), for a γ that is allowed."""
    problem = _problem(gpu, x, references, z, sketch_of)
    if problem is None:
        return None
    x, _, *arguments = problem
    field_x, field_z = _empty_like(x), x.new_empty(len(x))
    results = field_x.data_ptr(), 0, field_z.data_ptr()
    done = _native.direct_mean(*arguments, 1.0, 1.0, gamma, *results)
    return (field_x, field_z) if done else None


# ---- a step ----------------------------------------------------------------------------------


def step(
    gpu: torch.device | None,
    x: Tensor,
    slope: Tensor,
    field_z: Tensor | None,
    history: Tensor | None,
    out: Tensor | None,
    mean_out: Tensor | None,
    z: Any,
    z_next: Any,
    z_previous: Any,
    method: int,
    law: tuple[Any, Any, str],
    with_mean: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """The next points (B, *S), and the mean (B, *S) if it is wanted.

    Args:
        x, slope, field_z, history: those of :class:`~pfgm.core.problems.OdeStep`, of shape
            (B, *S) and (B,).
        out, mean_out: tensors to write to, or None.
        z, z_next, z_previous: levels, of which EULER and HEUN do not use the last.
        method: EULER, HEUN or MULTISTEP.
        law: γ, z_exp and the formula of the substitution.
        with_mean: whether the mean is wanted, from a field.
    """
    gamma, z_exp, substitution = law
    if type(x) is not Tensor:
        return None
    dtype, shape = torch.float32 if x.dtype in HALF else x.dtype, x.shape
    kind = _POINTS.get(dtype)
    if (
        kind is None
        or not shape
        or slope is None
        or (history is None) != (method == EULER)
        or not x.numel()
        or substitution not in _SUBSTITUTIONS
        or type(gamma) not in _NUMBERS
        or type(z_exp) not in _NUMBERS
        or (gpu is not None and not _runs_on(gpu, dtype, None))
    ):
        return None
    B = shape[0]
    arrays: list[Any] = []  # as the kernels read them
    for rows in (x, slope, field_z, history):
        if rows is not None:
            if (
                type(rows) is not Tensor
                or not rows.is_floating_point()
                or rows.shape != (shape if rows is not field_z else shape[:1])
            ):
                return None
            if rows.dtype is not dtype or not rows.is_contiguous():
                rows = rows.to(dtype).contiguous()
        arrays.append(rows)
    for rows in (out, mean_out):
        if rows is not None and (
            type(rows) is not Tensor
            or not x.dtype is dtype is rows.dtype
            or rows.shape != shape
            or not rows.is_contiguous()
        ):
            return None
    levels = [_level(level, B, len(shape)) for level in (z, z_next, z_previous)]
    if None in levels:
        return None
    result = _empty_like(arrays[0]) if out is None else out
    mean = _empty_like(arrays[0]) if with_mean and mean_out is None else mean_out
    by_row = gpu is not None and tuple in map(type, levels)
    row_levels = torch.empty(3, B, dtype=torch.float64, device=gpu) if by_row else None
    done = _native.direct_step(
        method,
        kind,
        B,
        x.numel() // B,
        *(0 if rows is None else rows.data_ptr() for rows in arrays),
        *levels,
        as_float(gamma),
        as_float(z_exp),
        substitution == "exact",
        result.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        _threads(),
        None if gpu is None else (*native.current_stream(gpu), native.address(row_levels)),
    )
    if not done:
        return None
    mark_written(out, mean_out)
    if x.dtype is not dtype:
        result, mean = result.to(x.dtype), None if mean is None else mean.to(x.dtype)
    return result, mean


# ---- values ----------------------------------------------------------------------------------


def all_finite(values: Tensor) -> bool | None:
    """Whether no value is NaN or infinite; None for values that are not contiguous floats."""
    kind = _POINTS.get(values.dtype)
    if kind is None or not available or not values.is_contiguous():
        return None
    finite: bool = _native.all_finite(kind, values.data_ptr(), values.numel())
    return finite


def sample(rows: Tensor) -> int:
    """A number that changes with a sample of the bytes of contiguous rows in the CPU's memory.

    It takes all bytes of at most 16 KiB, and 256 windows of 64 bytes from a larger tensor. It is 0
    for other rows, and without the extension.
    """
    if _native is None or not rows.is_cpu or not rows.is_contiguous():
        return 0
    value: int = _native.sample(rows.data_ptr(), rows.nbytes)
    return value
