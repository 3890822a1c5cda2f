"""The operations in C++ (csrc/): SIMD kernels on the CPU.

The only caller of ``pfgm._native``, which takes raw addresses: everything is checked, made
row-contiguous and kept alive here.
"""

from __future__ import annotations

import importlib
import importlib.util
from array import array
from types import ModuleType

import torch
from torch import Tensor

from ..checks import non_finite_message, radius_message
from .reference import OdeStep, normalised_field, singular_message

__all__ = [
    "build_lines",
    "describe",
    "extension",
    "normalised_field",
    "ode_step",
    "posterior_mean",
    "posterior_mean_backward",
    "supports",
]

_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
}
_RADIUS, _VALUE, _SINGULAR, _MEMORY = 1, 2, 3, 4


def _load() -> ModuleType | None:
    # An extension that is there but broken must raise, not look like one that was not built.
    if importlib.util.find_spec("pfgm._native") is None:
        return None
    return importlib.import_module("pfgm._native")


_native = _load()


def extension() -> ModuleType:
    """pfgm._native; RuntimeError where pfgm was installed without it."""
    if _native is None:
        raise RuntimeError("pfgm was installed without its native extension (PFGM_NATIVE=0).")
    return _native


def supports(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
) -> str | None:
    if _native is None:
        return "pfgm was installed without its native extension (PFGM_NATIVE=0)"
    if device.type != "cpu":
        return f"its kernels run on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def describe() -> str:
    return f"C++ on the CPU, {extension().cpu_isa()}, {torch.get_num_threads()} threads"


def build_lines() -> list[str]:
    """How the extension was built and what its CUDA runtime sees, for ``pfgm info``."""
    if _native is None:
        return ["extension  not built (PFGM_NATIVE=0)"]
    info = _native.build_info()
    names, error = _native.cuda_devices()
    architectures = info["cuda_architectures"] or "none"
    return [
        f"extension  {info['compiler']}, CUDA architectures: {architectures}",
        f"CUDA       {', '.join(names) or error}",
    ]


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous features; rows may lie anywhere, also on one another."""
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _problem(x: Tensor, references: Tensor, radius: Tensor, D: float) -> object:
    return extension().Problem(
        type=_TYPES[x.dtype],
        reference_type=_TYPES[references.dtype],
        queries=x.shape[0],
        references=references.shape[0],
        features=x.shape[1],
        x=x.data_ptr(),
        x_stride=x.stride(0),
        y=references.data_ptr(),
        y_stride=references.stride(0),
        radius=radius.data_ptr(),
        dimensions=D,
        threads=torch.get_num_threads(),
    )


def _check(status: tuple[int, int], x: Tensor, references: Tensor, radius: Tensor) -> None:
    failure, row = status
    if failure == _RADIUS:
        raise ValueError(radius_message(radius, row))
    if failure == _VALUE:
        raise ValueError(non_finite_message(x, references, "x"))
    if failure == _SINGULAR:
        raise ValueError(singular_message(row))
    if failure == _MEMORY:
        raise MemoryError("posterior_mean: no memory for its workspace.")


def posterior_mean(
    x: Tensor, references: Tensor, radius: Tensor, D: float, precision: str = "high"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, references, radius = _rows(x), _rows(references), radius.contiguous()
    mean = torch.empty(x.shape, dtype=x.dtype)
    logsumexp, nearest, total = (torch.empty(len(x), dtype=torch.float64) for _ in range(3))
    status = extension().posterior_mean(
        _problem(x, references, radius, D),
        mean=mean.data_ptr(),
        logsumexp=logsumexp.data_ptr(),
        nearest=nearest.data_ptr(),
        total=total.data_ptr(),
    )
    _check(status, x, references, radius)
    return mean, logsumexp, nearest, total


def posterior_mean_backward(
    grad_mean: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    references: Tensor,
    radius: Tensor,
    mean: Tensor,
    nearest: Tensor,
    total: Tensor,
    D: float,
    needs: tuple[bool, bool, bool],
    precision: str = "high",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, references, radius = _rows(x), _rows(references), radius.contiguous()
    grad_mean, grad_logsumexp = grad_mean.contiguous(), grad_logsumexp.contiguous()
    mean, nearest, total = mean.contiguous(), nearest.contiguous(), total.contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
    grad_references = torch.empty(references.shape, dtype=x.dtype) if needs[1] else None
    grad_radius = torch.empty(radius.shape, dtype=torch.float64) if needs[2] else None
    status = extension().posterior_mean_backward(
        _problem(x, references, radius, D),
        grad_mean=grad_mean.data_ptr(),
        grad_logsumexp=grad_logsumexp.data_ptr(),
        mean=mean.data_ptr(),
        nearest=nearest.data_ptr(),
        total=total.data_ptr(),
        grad_x=_address(grad_x),
        grad_radius=_address(grad_radius),
        grad_references=_address(grad_references),
    )
    _check(status, x, references, radius)
    if grad_references is not None:
        grad_references = grad_references.to(references.dtype)
    return grad_x, grad_references, grad_radius


def ode_step(
    step: OdeStep, with_mean: bool, out: Tensor | None = None, mean_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    x, slope = _rows(step.x), _rows(step.slope)
    history = None if step.history is None else _rows(step.history)
    field_z = None if step.field_z is None else step.field_z.contiguous()
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    if with_mean and mean_out is None:
        mean_out = torch.empty(x.shape, dtype=x.dtype)
    if isinstance(step.levels, Tensor):
        levels = step.levels.contiguous()
        address, level_stride = levels.data_ptr(), 1
    else:
        shared = array("d", step.levels)
        address, level_stride = shared.buffer_info()[0], 0
    extension().ode_step(
        type=_TYPES[x.dtype],
        rows=x.shape[0],
        features=x.shape[1],
        x=_address_and_stride(x),
        slope=_address_and_stride(slope),
        field_z=_address(field_z),
        history=_address_and_stride(history),
        levels=address,
        level_stride=level_stride,
        gamma=step.gamma,
        z_exp=step.z_exp,
        exact=step.exact,
        next=_address_and_stride(out),
        mean=_address_and_stride(mean_out if with_mean else None),
        threads=torch.get_num_threads(),
    )
    return out, mean_out if with_mean else None


def _address_and_stride(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
