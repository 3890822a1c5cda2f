"""The operations in C++ and CUDA (csrc/): SIMD kernels on the CPU, and kernels for NVIDIA GPUs.

This module, :mod:`pfgm.backends.native_calls` and :mod:`pfgm.backends.native_parts` are the only
callers of ``pfgm._native``, which takes raw addresses. The functions here bring tensors into the
layout of the kernels and keep them alive during the call. On a GPU the kernels run on torch's
current stream, with workspace from torch's allocator.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import runpy
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import GPU_REFERENCES, REFERENCES
from ..common.tensors import contiguous, contiguous_features, unfilled
from ..common.values import (
    check_distances,
    check_radius,
    checks_values,
    non_finite_message,
    radius_message,
    range_message,
    underflow_message,
)
from ..core import formulas
from ..core.problems import Needs, OdeStep, PosteriorMean, State, Upstream
from ..core.weights import check_singular, law, singular_message
from .cuda_driver import CudaRuntime, cuda_lines, has_code_for, version_text

# The failures that the CPU kernels return.
_RADIUS, _VALUE, _SINGULAR, _MEMORY, _SKETCH, _KEPT, _RANGE, _UNDERFLOW = range(1, 9)

_SOURCES = Path(__file__).parents[2] / "csrc"  # in a checkout


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why there is none.

    A broken extension raises ImportError, because it must not look like one that was not built.
    """
    if importlib.util.find_spec("pfgm._native") is None:
        if importlib.util.find_spec("pfgm.kernels") is None:
            return None, "pfgm was imported from a checkout and is not installed"
        return None, "pfgm was installed without its native extension (PFGM_NATIVE=0)"
    extension = importlib.import_module("pfgm._native")
    beside = Path(extension.__file__ or "").parent == Path(__file__).parents[1]
    if not beside and _SOURCES.is_dir():
        digest = runpy.run_path(str(_SOURCES / "source_digest.py"))["source_digest"]()
        if extension.build_info()["source_digest"] != digest:
            return None, "pfgm was installed from other sources than those of this checkout"
    return extension, ""


_native, _why_missing = _load()
if "checkout" in _why_missing:
    warnings.warn(
        f"{_why_missing}, so it computes slowly, in plain torch. Install it: pip install .",
        RuntimeWarning,
        stacklevel=2,
    )


def extension() -> ModuleType:
    """The module ``pfgm._native``.

    Raises:
        RuntimeError: pfgm was installed without it.
    """
    if _native is None:
        raise RuntimeError(f"{_why_missing}.")
    return _native


def has_extension() -> bool:
    """Whether pfgm was installed with its native extension."""
    return _native is not None


def supports(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
) -> str | None:
    reason = unable(device, dtype, references)
    # Without a GPU there are only fake tensors, of which a graph for a GPU may be made.
    if reason is None and _on_cuda(device) and torch.cuda.is_available():
        return _device_reason(device)
    return reason


def unable(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
) -> str | None:
    """As :func:`supports`, as far as it is known before the kernels for a GPU are loaded: the
    driver may compile them then."""
    if _native is None:
        return _why_missing
    if _on_cuda(device):
        return _unable_on_cuda(device, dtype, references)
    if device.type != "cpu":
        return f"its kernels run on the CPU and on NVIDIA GPUs, not on {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def gpu_of(value: Any) -> torch.device | None:
    """The GPU, which torch calls "cuda", of a tensor; None for anything else."""
    return value.device if type(value) is Tensor and value.is_cuda else None


def _unable_on_cuda(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None
) -> str | None:
    info = extension().build_info()
    if info["cuda_architectures"] is None:
        return f"its extension was built without CUDA: {info['without_cuda']}"
    if torch.version.hip is not None:
        return "its GPU kernels are for NVIDIA GPUs"
    if dtype != torch.float32:
        return f"it computes in float32 on a GPU, not {dtype}"
    if references is not None and references not in GPU_REFERENCES:
        names = ", ".join(map(str, GPU_REFERENCES))
        return f"on a GPU it reads references in {names}, not {references}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(_index(device)) < (8, 0):
        return "its GPU kernels need compute capability 8.0 (Ampere) or later"
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


_able: set[int] = set()
"""The GPUs that run the kernels. Others may do so later: one may be busy or out of memory."""


def _device_reason(device: torch.device) -> str | None:
    index = _index(device)
    if index in _able:
        return None
    architectures = str(extension().build_info()["cuda_architectures"])
    compiles = not has_code_for(torch.cuda.get_device_capability(index), architectures)
    runtime, driver = extension().cuda_versions()
    if compiles and driver >= runtime:  # an older driver does not know this PTX
        _warn_of_compilation(index)
    if problem := extension().cuda_problem(index):
        reason = f"its GPU kernels cannot run on cuda:{index}: {problem}"
        if compiles and driver < runtime:
            reason += (
                f" (the driver, for CUDA {version_text(driver)}, cannot compile them: update it to "
                f"one for CUDA {version_text(runtime)} or later)"
            )
        _warn_of_unused_gpu(reason)
        return reason
    _able.add(index)
    return None


@functools.cache
def _warn_of_compilation(index: int) -> None:
    """Warns, once for each GPU, of a first call that takes long."""
    major, minor = torch.cuda.get_device_capability(index)
    warnings.warn(
        f"the driver compiles the CUDA kernels for cuda:{index} (sm_{major}{minor}), which takes "
        f"some 20 seconds; CMAKE_CUDA_ARCHITECTURES={major}{minor} at installation does it there",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_of_unused_gpu(reason: str) -> None:
    """Warns, once for each reason, that another backend than this one has to compute on a GPU."""
    warnings.warn(f"the native backend is not used while {reason}", RuntimeWarning, stacklevel=2)


def describe() -> str:
    architectures = extension().build_info()["cuda_architectures"]
    threads = torch.get_num_threads()
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    cpu = f"C++ on the CPU, {extension().cpu_isa()}, {count}"
    return cpu if architectures is None else f"{cpu}; CUDA kernels for {architectures}"


def build_lines() -> list[str]:
    """How the extension was built, and the GPUs that its CUDA runtime finds, for ``pfgm info``."""
    if _native is None:
        return [f"extension  not built: {_why_missing}"]
    info = _native.build_info()
    architectures = info["cuda_architectures"] or "none"
    version, driver = _native.cuda_versions()
    runtime = CudaRuntime(version, driver, info["cuda_driver"])
    return [
        f"extension  {info['compiler']}, CUDA architectures: {architectures}",
        *cuda_lines(runtime, *_native.cuda_devices()),
    ]


def native_problem(problem: PosteriorMean, all_references: int = 0) -> object:
    """The problem in the form that the extension takes, with addresses in place of tensors.

    all_references is the number in all parts if the references are one part of several.
    """
    x, references, radius, D, sketch, difference = problem
    if sketch is not None:
        check_sketch(sketch, x, references)
    return extension().Problem(
        **_sizes(references, x.dtype),
        queries=x.shape[0],
        x=x.data_ptr(),
        x_stride=x.stride(0),
        y=references.data_ptr(),
        y_stride=references.stride(0),
        radius=radius.data_ptr(),
        dimensions=D,
        threads=torch.get_num_threads(),
        sketch=address(sketch),
        all_references=all_references,
        difference=difference,
    )


def _sizes(references: Tensor, dtype: torch.dtype) -> dict[str, int]:
    """References and the dtype of their points, as the functions of the extension take them."""
    return {
        "type": REFERENCES[dtype].number,
        "reference_type": REFERENCES[references.dtype].number,
        "references": len(references),
        "features": references.shape[1],
    }


def sketch(references: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the CPU kernels keep of references, to bound their distances from points of a dtype.

    With it they need not read references that are too far away. It holds bytes where the processor
    multiplies bytes fast and the references are not bytes themselves (csrc/cpu/byte_screen.h), else
    the mean and deviation of each 32 features (csrc/cpu/line_screen.h).
    """
    size = 0 if _on_cuda(references.device) else _sketch_size(references, dtype)
    if size == 0:
        return None
    references = contiguous_features(references)
    out = torch.empty(size, dtype=dtype, device=references.device)
    extension().sketch(
        **_sizes(references, dtype),
        y=address_and_stride(references),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def _sketch_size(references: Tensor, dtype: torch.dtype) -> int:
    """The number of values of a dtype that hold a sketch."""
    size: int = extension().sketch_bytes(**_sizes(references, dtype))
    return size // dtype.itemsize


_SKETCH_OF_THESE = "the result of sketch() for these references"


def check_sketch(sketch: Tensor, x: Tensor, references: Tensor) -> None:
    """Raises ValueError unless it is one for points x (B, *S) and references (M, *S)."""
    shape = (_sketch_size(references.flatten(1), x.dtype),)
    aligned = sketch.is_contiguous() and sketch.data_ptr() % 64 == 0
    if sketch.shape != shape or sketch.dtype != x.dtype or not aligned:
        raise ValueError(
            f"sketch must be {_SKETCH_OF_THESE}, of shape {shape} and dtype {x.dtype}, got shape "
            f"{tuple(sketch.shape)} and dtype {sketch.dtype}."
        )


def check_status(status: tuple[int, int], x: Tensor, references: Tensor, radius: Tensor) -> None:
    failure, row = status
    if failure == _RADIUS:
        raise ValueError(radius_message(radius, row))
    if failure == _VALUE:
        raise ValueError(non_finite_message(x, references))
    if failure == _RANGE:
        raise ValueError(range_message(x, references, row))
    if failure == _UNDERFLOW:
        raise ValueError(underflow_message(x, row))
    if failure == _SINGULAR:
        raise ValueError(singular_message(row))
    if failure == _SKETCH:
        raise ValueError(f"sketch must be {_SKETCH_OF_THESE}, got that of others.")
    if failure == _KEPT:
        raise ValueError(
            "the values that the forward pass kept were changed before the backward pass."
        )
    if failure == _MEMORY:
        raise MemoryError("posterior_mean needs a workspace that does not fit into memory.")


def current_stream(device: torch.device) -> tuple[int, int]:
    """The index of a GPU that holds a tensor, and the address of torch's current stream on it."""
    index: int = device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _cuda_stream(device: torch.device) -> object:
    """A GPU and torch's current stream on it, in the form that the extension takes."""
    index, stream = current_stream(device)
    return extension().CudaStream(device=index, handle=stream)


def _run_on_cuda(
    x: Tensor, problem: object, io: object, backward: bool, kept: Tensor | None
) -> None:
    stream, keeps = _cuda_stream(x.device), 0 if kept is None else len(kept)
    size = extension().posterior_mean_workspace_cuda(problem, stream, backward, keeps)
    workspace = unfilled(size, x.device)
    name = "posterior_mean_backward_cuda" if backward else "posterior_mean_cuda"
    at = extension().CudaWorkspace(at=workspace.data_ptr(), bytes=size)
    getattr(extension(), name)(problem, io, stream, at)


def room_for_distances(problem: PosteriorMean) -> Tensor | None:
    """Memory for the distances that a forward pass can keep for its backward pass.

    None if it keeps none.
    """
    x, references = problem.x, problem.references
    of = extension().kept_bytes_cuda if _on_cuda(x.device) else extension().kept_bytes
    size: int = of(**_sizes(references, x.dtype), queries=len(x))
    return unfilled(size, x.device) if size > 0 else None


def used_room(memory: Tensor | None) -> Tensor | None:
    """The part of the memory that the forward pass used; None if it kept nothing."""
    if memory is None or _on_cuda(memory.device):
        return memory
    # The CPU kernels say it in the first 8 bytes. They may run out of room, and then keep nothing.
    used = int(memory[:8].view(torch.int64))
    return memory[:used] if used > 0 else None


def _memory(kept: Tensor | None) -> tuple[int, int]:
    return (0, 0) if kept is None else (kept.data_ptr(), len(kept))


def posterior_mean(
    problem: PosteriorMean, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in :class:`~pfgm.backends.Backend`; fills the memory ``kept``."""
    problem = problem.laid_out()
    x, references, radius = problem[:3]
    mean = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    logsumexp, nearest, total = (
        torch.empty(len(x), dtype=torch.float64, device=x.device) for _ in range(3)
    )
    io = extension().Forward(
        mean=mean.data_ptr(),
        logsumexp=logsumexp.data_ptr(),
        nearest=nearest.data_ptr(),
        total=total.data_ptr(),
        kept=_memory(kept),
    )
    native_form = native_problem(problem)
    if not _on_cuda(x.device):
        check_status(extension().posterior_mean(native_form, io), x, references, radius)
        return mean, logsumexp, nearest, total
    if checks_values(x.device):
        check_radius(radius, problem.D)
    _run_on_cuda(x, native_form, io, False, kept)
    check_distances(nearest, x, references)
    return mean, logsumexp, nearest, total


def posterior_mean_backward(
    problem: PosteriorMean,
    state: State,
    upstream: Upstream,
    needs: Needs,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As in :class:`~pfgm.backends.Backend`; ``kept`` is the used memory of the forward pass."""
    problem = problem.laid_out()
    x, references, radius = problem[:3]
    state, upstream = State(*map(contiguous, state)), Upstream(*map(contiguous, upstream))
    grad_x, grad_references, grad_radius = gradients = tuple(
        torch.empty(of.shape, dtype=dtype, device=x.device) if needed else None
        for of, dtype, needed in zip(
            (x, references, radius), (x.dtype, x.dtype, torch.float64), needs, strict=True
        )
    )
    io = backward_io(state, upstream, gradients, kept=_memory(kept))
    native_form = native_problem(problem)
    if _on_cuda(x.device):
        constant = law(problem.D, x.shape[1]).is_constant(state.nearest, radius)
        check_singular(constant, upstream.grad_logsumexp)
        _run_on_cuda(x, native_form, io, True, kept)
    else:
        status = extension().posterior_mean_backward(native_form, io)
        check_status(status, x, references, radius)
    if grad_references is not None:
        grad_references = grad_references.to(references.dtype)
    return grad_x, grad_references, grad_radius


def backward_io(
    state: State, upstream: Upstream, gradients: Sequence[Tensor | None], **sums: Any
) -> object:
    """The inputs and results of a backward pass in the form that the extension takes."""
    inputs = upstream._asdict() | state._asdict()
    grad_x, grad_references, grad_radius = map(address, gradients)
    return extension().Backward(
        **{name: value.data_ptr() for name, value in inputs.items()},
        grad_x=grad_x,
        grad_references=grad_references,
        grad_radius=grad_radius,
        **sums,
    )


def _native_field(
    difference: Tensor, z: Tensor, gamma: float, field_x: Tensor | None, field_z: Tensor | None
) -> object:
    return extension().NormalisedField(
        type=REFERENCES[difference.dtype].number,
        rows=difference.shape[0],
        features=difference.shape[1],
        difference=address_and_stride(difference),
        z=z.data_ptr(),
        gamma=gamma,
        field_x=address_and_stride(field_x),
        field_z=address(field_z),
        threads=torch.get_num_threads(),
    )


def normalised_field(difference: Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    difference, z = contiguous_features(difference), z.contiguous()
    field_x, field_z = difference.new_empty(difference.shape), difference.new_empty(len(difference))
    field = _native_field(difference, z, gamma, field_x, field_z)
    if _on_cuda(difference.device):
        extension().normalised_field_cuda(field, _cuda_stream(difference.device))
    else:
        extension().normalised_field(field)
    return field_x, field_z


def normalised_field_backward(
    grad_field_x: Tensor, grad_field_z: Tensor, difference: Tensor, z: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    if _on_cuda(difference.device):
        return formulas.normalised_field_backward(grad_field_x, grad_field_z, difference, z, gamma)
    difference, z = contiguous_features(difference), z.contiguous()
    grad_field_x, grad_field_z = contiguous_features(grad_field_x), grad_field_z.contiguous()
    grad_difference = difference.new_empty(difference.shape)
    grad_z = torch.empty(len(difference), dtype=torch.float64, device=difference.device)
    extension().normalised_field_backward(
        _native_field(difference, z, gamma, None, None),
        grad_field_x=address_and_stride(grad_field_x),
        grad_field_z=grad_field_z.data_ptr(),
        grad_difference=grad_difference.data_ptr(),
        grad_z=grad_z.data_ptr(),
    )
    return grad_difference, grad_z


def ode_step(
    step: OdeStep, with_mean: bool, out: Tensor | None = None, mean_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    step = step.laid_out()
    x, slope, field_z, history, z, toward, blend, row_levels, gamma, z_exp, exact = step
    out, mean_out = step.outputs(with_mean, out, mean_out)
    shared = array("d", (z, toward, blend))
    native_step = extension().OdeStep(
        type=REFERENCES[x.dtype].number,
        rows=x.shape[0],
        features=x.shape[1],
        x=address_and_stride(x),
        slope=address_and_stride(slope),
        field_z=address(field_z),
        history=address_and_stride(history),
        levels=shared.buffer_info()[0] if row_levels is None else row_levels.data_ptr(),
        level_stride=0 if row_levels is None else 1,
        gamma=gamma,
        z_exp=z_exp,
        exact=exact,
        next=address_and_stride(out),
        mean=address_and_stride(mean_out),
        threads=torch.get_num_threads(),
    )
    if _on_cuda(x.device):
        extension().ode_step_cuda(native_step, _cuda_stream(x.device))
    else:
        extension().ode_step(native_step)
    return out, mean_out


def address_and_stride(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
