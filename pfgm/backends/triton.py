"""The operations as Triton kernels (kernels/, installed as :mod:`pfgm.kernels`).

They run on every GPU that Triton supports, and with ``TRITON_INTERPRET=1`` on the CPU in Triton's
interpreter. Triton is imported at the first call, not with pfgm.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import GPU_REFERENCES
from ..common.tensors import contiguous_features
from ..common.values import check_distances, check_radius, checks_values
from ..core import formulas
from ..core.problems import Needs, OdeStep, PosteriorMean, State, Upstream
from ..core.weights import check_singular, law

_OLDEST = (3, 6)  # major and minor version of Triton


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def installed() -> str | None:
    """The version of the installed Triton, read without importing it if possible; None if none."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in ("triton", "pytorch-triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return str(importlib.import_module("triton").__version__)


@functools.cache
def _version() -> tuple[int, ...]:
    """Major and minor version of the installed Triton."""
    return tuple(int(part) for part in str(installed()).split(".")[:2])


def supports(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if (version := _version()) < _OLDEST:
        return (
            f"Triton {'.'.join(map(str, version))} is installed, but its kernels need "
            f"{'.'.join(map(str, _OLDEST))} or later, which newer versions of torch bring"
        )
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"its kernels run on a GPU, not on {device.type} (except under TRITON_INTERPRET=1)"
    if dtype != torch.float32:
        return f"it computes in float32, not {dtype}"
    if references is not None and references not in GPU_REFERENCES:
        return f"it reads references in {', '.join(map(str, GPU_REFERENCES))}, not {references}"
    return None


def describe() -> str:
    return f"Triton kernels, {'in the interpreter' if interpreted() else 'compiled for the GPU'}"


def _current_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def sketch(references: Tensor, dtype: torch.dtype) -> None:
    """None: a summary of the references would save no work in these kernels."""
    return None


@functools.cache
def _kernels(name: str) -> Any:
    """A module of kernels."""
    return importlib.import_module(f"..kernels.{name}", __package__)


def posterior_mean(problem: PosteriorMean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = problem.laid_out()
    x, references, radius, D = problem[:4]
    if checks_values(x.device):
        check_radius(radius, D)
    with _current_device(x):
        results: tuple[Tensor, Tensor, Tensor, Tensor]
        results = _kernels("posterior_mean").posterior_mean(
            x, references, radius, D, problem.difference
        )
    _, _, nearest, _ = results
    check_distances(nearest, x, references)
    return results


def posterior_mean_backward(
    problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, references, radius, D = problem.laid_out()[:4]
    check_singular(law(D, x.shape[1]).is_constant(state.nearest, radius), upstream.grad_logsumexp)
    with _current_device(x):
        grad_x, grad_references, grad_radius = _kernels(
            "posterior_mean_backward"
        ).posterior_mean_backward(
            *(gradient.contiguous() for gradient in upstream),
            x,
            references,
            radius,
            *(value.contiguous() for value in state),
            D,
            needs,
        )
    if grad_references is not None:
        grad_references = grad_references.to(references.dtype)
    return grad_x, grad_references, grad_radius


def normalised_field(difference: Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    kernels = _kernels("normalised_field")
    difference = contiguous_features(difference)
    field_x = difference.new_empty(difference.shape)
    field_z = difference.new_empty(difference.shape[0])
    with _current_device(difference):
        kernels.launch(difference, z.contiguous(), gamma, field_x, field_z)
    return field_x, field_z


normalised_field_backward = formulas.normalised_field_backward


def ode_step(
    step: OdeStep, with_mean: bool, out: Tensor | None = None, mean_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    kernels = _kernels("ode_step")
    step = step.laid_out()
    out, mean_out = step.outputs(with_mean, out, mean_out)
    if step.x.shape[0] > 0:
        with _current_device(step.x):
            kernels.launch(step, out, mean_out)
    return out, mean_out
