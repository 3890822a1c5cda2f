"""posterior_mean, field_fn and the steps of the ODE, each in one call of the extension.

The way through the operators of :mod:`pfgm.ops` lets torch differentiate, transform, trace and
compile. On small tensors it takes many times as long as the kernels. The functions here take the
same arguments and call the same kernels at once, where nothing needs the operators
(:func:`pfgm.common.transforms.is_ordinary`). Everywhere else they return None: also where an
argument is not allowed, so that only the other way has checks with messages.

On a GPU, values are not checked and nothing waits for it. Levels in tensors on the GPU stay there.
Under :func:`pfgm.debug_checks` the operators answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.checks import as_float, debugging
from ..common.transforms import is_ordinary
from . import native, requested
from .problems import PRECISIONS

__all__ = ["EULER", "HEUN", "MULTISTEP", "all_finite", "field", "posterior_mean", "sample", "step"]

EULER, HEUN, MULTISTEP = 0, 1, 2
"""The methods of :func:`step`."""

SketchOf = Callable[[int, Tensor, Tensor, str], Tensor | None]
"""The function :meth:`pfgm.references.part.Part.sketch` of references in a set."""

enabled = native.has_extension()
"""Whether the functions, and :mod:`pfgm.ops.native_gradients`, may answer. Tests turn them off."""

_native: Any = native.extension() if native.has_extension() else None
_POINTS = {dtype: native.TYPES[dtype] for dtype in (torch.float32, torch.float64)}
_SUBSTITUTIONS = ("exact", "published")
_MAX_CHECKED = 1 << 16  # values that one thread checks sooner than torch's operators start


def _sizes(
    x: Any, references: Any, gpu: torch.device | None, sketch_of: SketchOf | None
) -> tuple[int, int, int, int, int] | None:
    """Both types, B, M and N of tensors that the kernels can read; None of anything else."""
    if type(x) is not Tensor or type(references) is not Tensor:
        return None
    shape, of_references = x.shape, references.shape
    kind, reference_kind = _POINTS.get(x.dtype), native.TYPES.get(references.dtype)
    if (
        kind is None
        or reference_kind is None
        or not shape
        or not of_references
        or shape[1:] != of_references[1:]
        or not x.is_contiguous()
        or not references.is_contiguous()
    ):
        return None
    # A set on a GPU is computed in chunks, of which the results are merged.
    if gpu is not None and (sketch_of is not None or not _runs_on(gpu, x.dtype, references.dtype)):
        return None
    B, M, values = shape[0], of_references[0], x.numel()
    return (kind, reference_kind, B, M, values // B) if values and M else None


def _level(value: Any, B: int, dimensions: int) -> float | tuple[int, int, int] | None:
    """A level of points (B, *S) as the extension takes it: a number, or address, type and stride.

    A tensor is one value, (B,), or (B, 1, …, 1) with as many dimensions as the points.
    """
    if type(value) is float:
        return value
    if type(value) is int:
        return as_float(value)
    if type(value) is not Tensor or (kind := _POINTS.get(value.dtype)) is None:
        return None
    own = value.ndim
    if own == 0:
        return value.data_ptr(), kind, 0
    if value.numel() != B or not (own == 1 or (own == dimensions and value.shape[0] == B)):
        return None
    return value.data_ptr(), kind, 1 if value.is_contiguous() else value.stride()[0]


def _sketch_address(sketch_of: SketchOf | None, x: Tensor, references: Tensor) -> int:
    if sketch_of is None or (sketch := sketch_of(0, references, x, "native")) is None:
        return 0
    native.check_sketch(sketch, x, references)
    return sketch.data_ptr()


def _gpu_of(x: Any) -> torch.device | None:
    """The GPU of a tensor; None for one in CPU memory, and for anything else."""
    return x.device if type(x) is Tensor and native.on_gpu(x) else None


def _takes(backend: str | None, precision: str, gpu: torch.device | None, *values: Any) -> bool:
    """Whether the kernels answer at once: for ordinary tensors and numbers."""
    if torch.compiler.is_compiling() or not enabled:
        return False
    # The extension looks at PFGM_BACKEND itself, in a tenth of the time that os.environ takes.
    name = requested(backend)
    return (
        (not name or name == "native")
        and precision in PRECISIONS
        and (gpu is None or not debugging())
        and is_ordinary(*values, gpu=gpu)
    )


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


def _allocator(gpu: torch.device) -> Callable[[int], Tensor]:
    """A function that allocates a workspace of so many bytes."""
    return functools.partial(torch.empty, dtype=torch.uint8, device=gpu)


def posterior_mean(
    x: Tensor,
    references: Any,
    level: Any,
    factor: float,
    D: Any,
    with_logsumexp: bool,
    backend: str | None,
    precision: str,
    sketch_of: SketchOf | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """The mean (B, *S), and the log-sum-exp (B,) if it is wanted. r is the level times the factor.

    D is finite. Diffusion takes the way through torch's operators.
    """
    gpu = _gpu_of(x)
    if not _takes(backend, precision, gpu, x, references, level):
        return None
    sizes = _sizes(x, references, gpu, sketch_of)
    if sizes is None or (radius := _level(level, sizes[2], x.ndim)) is None:
        return None
    mean = torch.empty_like(x)
    logsumexp = x.new_empty(sizes[2], dtype=torch.float64) if with_logsumexp else None
    given = (
        *sizes,
        x.data_ptr(),
        references.data_ptr(),
        radius,
        factor,
        D,
        mean.data_ptr(),
        0 if logsumexp is None else logsumexp.data_ptr(),
    )
    if gpu is None:
        sketch = _sketch_address(sketch_of, x, references)
        done = _native.direct_posterior_mean(*given, sketch, torch.get_num_threads())
    else:
        place = native.current_stream(gpu)
        of_products = native.PRECISIONS[precision]
        done = _native.direct_posterior_mean_cuda(*given, of_products, *place, _allocator(gpu))
    return (mean, logsumexp) if done else None


def field(
    x: Tensor,
    z: Any,
    references: Any,
    gamma: Any,
    backend: str | None,
    precision: str,
    sketch_of: SketchOf | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The normalised field v_x (B, *S) and v_z (B,), for a γ that is allowed."""
    gpu = _gpu_of(x)
    if not _takes(backend, precision, gpu, x, references, z):
        return None
    sizes = _sizes(x, references, gpu, sketch_of)
    if sizes is None or (radius := _level(z, sizes[2], x.ndim)) is None:
        return None
    field_x, field_z = torch.empty_like(x), x.new_empty(sizes[2])
    given = (
        *sizes,
        x.data_ptr(),
        references.data_ptr(),
        radius,
        gamma,
        field_x.data_ptr(),
        field_z.data_ptr(),
    )
    if gpu is None:
        sketch = _sketch_address(sketch_of, x, references)
        done = _native.direct_field(*given, sketch, torch.get_num_threads())
    else:
        place = native.current_stream(gpu)
        of_products = native.PRECISIONS[precision]
        done = _native.direct_field_cuda(*given, of_products, *place, _allocator(gpu))
    return (field_x, field_z) if done else None


def step(
    method: int,
    x: Tensor,
    slope: Tensor,
    field_z: Tensor | None,
    history: Tensor | None,
    levels: tuple[Any, Any, Any],
    constants: tuple[Any, Any, str],
    with_mean: bool,
    out: Tensor | None,
    mean_out: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None] | None:
    """The next points (B, *S), and the mean (B, *S) if it is wanted.

    Args:
        method: EULER, HEUN or MULTISTEP.
        x, slope, field_z, history: those of :class:`~pfgm.backends.problems.OdeStep`, of shape
            (B, *S) and (B,).
        levels: z, z_next and z_previous, of which EULER and HEUN do not use the last.
        constants: γ, z_exp and the formula of the substitution.
        with_mean: whether the mean is wanted, from a field.
        out, mean_out: tensors to write to, or None.
    """
    gamma, z_exp, substitution = constants
    given = (x, slope, field_z, history, out, mean_out, gamma, z_exp, *levels)
    gpu = _gpu_of(x)
    if (
        type(x) is not Tensor
        or type(slope) is not Tensor
        or (history is None) != (method == EULER)
        or not _takes(backend, "high", gpu, *given)
    ):
        return None
    shape, dtype = x.shape, x.dtype
    kind, values = _POINTS.get(dtype), x.numel()
    if (
        kind is None
        or values == 0
        or not x.is_contiguous()
        or substitution not in _SUBSTITUTIONS
        or bool in (type(gamma), type(z_exp))
        or (gpu is not None and not _runs_on(gpu, dtype, None))
    ):
        return None
    for rows in (slope, history, out, mean_out):
        if rows is not None and (
            type(rows) is not Tensor
            or rows.dtype is not dtype
            or rows.shape != shape
            or not rows.is_contiguous()
        ):
            return None
    B = shape[0]
    if field_z is not None and (
        type(field_z) is not Tensor
        or field_z.dtype is not dtype
        or field_z.shape != shape[:1]
        or not field_z.is_contiguous()
    ):
        return None
    dimensions = len(shape)
    found = [_level(level, B, dimensions) for level in levels]
    if None in found:
        return None
    result = torch.empty_like(x) if out is None else out
    mean = mean_out
    if with_mean and mean is None:
        mean = torch.empty_like(x)
    arguments = (
        method,
        kind,
        B,
        values // B,
        x.data_ptr(),
        slope.data_ptr(),
        0 if field_z is None else field_z.data_ptr(),
        0 if history is None else history.data_ptr(),
        *found,
        gamma,
        z_exp,
        substitution == "exact",
        result.data_ptr(),
        0 if mean is None else mean.data_ptr(),
    )
    if gpu is None:
        done = _native.direct_step(*arguments, torch.get_num_threads())
    else:
        by_row = tuple in map(type, found)
        levels_of_rows = torch.empty(3, B, dtype=torch.float64, device=gpu) if by_row else None
        place = native.current_stream(gpu)
        done = _native.direct_step_cuda(*arguments, *place, native.address(levels_of_rows))
    if not done:
        return None
    for written in (out, mean_out):
        if written is not None:
            _mark_written(written)
    return result, mean


def all_finite(values: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite."""
    if not torch.compiler.is_compiling() and enabled and values.numel() <= _MAX_CHECKED:
        kind = _POINTS.get(values.dtype)
        if kind is not None and is_ordinary(values.detach()) and values.is_contiguous():
            found: bool = _native.direct_all_finite(kind, values.data_ptr(), values.numel())
            return found
    return bool(values.isfinite().all())


def sample(rows: Tensor) -> int:
    """A number that changes with a sample of the bytes of contiguous rows in the CPU's memory.

    It takes 64 windows of 64 bytes from a large tensor, and all bytes of a tiny one. It is 0 for
    other rows, and without the extension.
    """
    if _native is None or not rows.is_cpu or not rows.is_contiguous():
        return 0
    found: int = _native.direct_sample(rows.data_ptr(), rows.nbytes)
    return found


def _mark_written(values: Tensor) -> None:
    """Tells torch that a tensor was written to, as its own operators do."""
    if not values.is_inference():
        torch.autograd.graph.increment_version(values)
