"""The one gate past torch's dispatcher, for the operations and their gradients on every backend.

The operators let torch differentiate, transform, trace and compile. On small tensors they take many
times as long as the kernels. Where nothing but autograd is active, an operation is computed without
them, in one of two ways:

- :func:`posterior_mean`, :func:`normalised_field` and :func:`ode_step` take the arguments of an
  operator, checked, and call its implementation. One autograd.Function has the gradients of the
  posterior mean. What the forward pass of the native kernels keeps saves distances in the backward
  pass; gradients then differ from those of the operator by the rounding of these distances.
- :func:`one_call` takes the arguments of a public function, and computes all of it in one call of
  the native kernels. It returns None where that is not possible, also for an argument that is not
  allowed, so that only the other way has checks with messages. On a GPU values are not checked,
  and nothing waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import Backend, choose_for, native, native_calls, requested
from ..backends.passes import known as native_passed
from ..common.checks import debugging
from ..common.tensors import mark_written
from ..core.problems import OdeStep, PosteriorMean, State, Upstream
from . import normalised_field as field_operator
from . import ode_step as step_operator
from . import posterior_mean as mean_operator

enabled = True
"""Whether anything may pass. Tests turn it off."""

EULER, HEUN, MULTISTEP = native_calls.EULER, native_calls.HEUN, native_calls.MULTISTEP
"""The methods of a step."""

Results = tuple[Tensor, Tensor, Tensor, Tensor]

_MAX_CHECKED = 1 << 16  # values that one thread checks sooner than torch's operators start
_NUMBERS = (float, int)


# ---- who may pass ----------------------------------------------------------------------------

# Names that are looked up once: a call of the CPU kernels on small tensors takes microseconds.
_strided = torch.strided
# Other tracers than Dynamo have a mode, or tensors of their own.
_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_in_torch_func = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
# For any type of device, in half the time of asking for one.
_any_autocast = torch._C._is_any_autocast_enabled
_autocasting = torch.is_autocast_enabled  # of the type of device, "cuda" if none is given
_profiling = torch._C._autograd._profiler_enabled
_wants_gradients = torch.is_grad_enabled


def passes(gpu: torch.device | None, *values: Any, gradients: bool = False) -> bool:
    """True if the dispatcher can be skipped: only numbers, None and plain tensors, whose values lie
    in the memory of the CPU or of the given GPU as they are, and nothing but autograd is active: no
    mode, transform, trace, autocast, profiler or forward-mode differentiation.

    Unless ``gradients`` is set, none may be wanted.
    """
    if (
        _compiling()
        or not enabled
        or _dispatch_modes()
        or _function_modes()
        or _in_torch_func()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or (_any_autocast() and (_autocasting("cpu") or (gpu is not None and _autocasting())))
        or _profiling()
    ):
        return False
    refuses_gradients = not gradients and _wants_gradients()
    for value in values:
        if type(value) is Tensor:
            if (
                not (value.is_cpu if gpu is None else value.device == gpu)
                or value.layout is not _strided
                or (refuses_gradients and value.requires_grad)
                or value.is_neg()  # a view that stands for its negated memory
                or value._is_zerotensor()  # zeros without memory
            ):
                return False
        elif value is not None and type(value) not in _NUMBERS:
            return False
    return True


def _gpu_of(value: Any) -> torch.device | None:
    """The GPU of a tensor; None for one in CPU memory, and for anything else."""
    return value.device if type(value) is Tensor and native.on_gpu(value) else None


# ---- an operator without the dispatcher ------------------------------------------------------


def posterior_mean(problem: PosteriorMean, backend: str | None) -> Results:
    """As :func:`pfgm.ops.posterior_mean.compute`."""
    gpu = _gpu_of(problem.x)
    if passes(gpu, problem.x, problem.references, problem.radius, problem.sketch):
        return mean_operator.forward(problem, requested(backend))
    return differentiated(problem, backend) or mean_operator.compute(problem, backend)


def normalised_field(
    difference: Tensor, z: Tensor, gamma: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """As :func:`pfgm.ops.normalised_field.compute`."""
    if passes(_gpu_of(difference), difference, z, gamma):
        return field_operator.forward(difference, z, gamma, requested(backend))
    return field_operator.compute(difference, z, gamma, backend)


def ode_step(
    step: OdeStep,
    with_mean: bool,
    out: Tensor | None,
    mean_out: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`pfgm.ops.ode_step.compute`; with ``out`` as ``compute_into``."""
    # torch.compile of torch 2.6 takes no slice of a named tuple.
    x, slope, field_z, history, z, toward, blend, rows, gamma, z_exp, _ = step
    numbers = (z, toward, blend, gamma, z_exp)
    if not passes(_gpu_of(x), x, slope, field_z, history, rows, *numbers, out, mean_out):
        if out is None:
            return step_operator.compute(step, with_mean, backend)
        step_operator.compute_into(step, out, mean_out, backend)
        return out, mean_out
    name = requested(backend)
    if out is None:
        result, mean = step_operator.forward(step, with_mean, name)
        return result, mean if with_mean else None
    step_operator.forward_into(step, name, out, mean_out)
    mark_written(out, mean_out)
    return out, mean_out


def differentiated(
    problem: PosteriorMean, backend: str | None, check: Callable[[], None] | None = None
) -> Results | None:
    """The results of :func:`posterior_mean`, with gradients and without the dispatcher.

    None where that is not possible, or no gradient is wanted. The backward pass calls ``check``
    first, which may raise an error.
    """
    tensors = problem.x, problem.references, problem.radius
    gpu = _gpu_of(problem.x)
    if (
        not _wants_gradients()
        or not any(tensor.requires_grad for tensor in tensors)
        or not passes(gpu, *tensors, problem.sketch, gradients=True)
    ):
        return None
    mean_operator.check(problem)
    x, references, _ = tensors
    backend = requested(backend)
    chosen = choose_for(backend, x, references)
    if len(x) == 0:
        return None
    results = _WithGradients.apply(*tensors, problem, chosen, backend, check)  # type: ignore[no-untyped-call]
    result, logsumexp, nearest, total, _ = results
    return result, logsumexp, nearest, total


class _WithGradients(torch.autograd.Function):
    """(x, references, radius, problem, chosen, backend, check) → results, and what native keeps.

    The native kernels keep squared distances: on the CPU, with many features, those of the
    references that count, at most 40 MiB (csrc/cpu/kept_distances.h); on a GPU all of them where
    they are taken at once, at most 32 MiB (csrc/cuda/workspace.h).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        problem: PosteriorMean,
        chosen: Backend,
        backend: str | None,
        check: Callable[[], None] | None,
    ) -> tuple[Tensor | None, ...]:
        problem = problem._replace(x=x, references=references, radius=radius)
        kept: Tensor | None = None
        if chosen is native:
            memory = native.room_for_distances(problem)
            results = native.posterior_mean(problem, memory)
            kept = native.used_room(memory)
        else:
            results = chosen.posterior_mean(problem)
        result, _, nearest, total = results
        ctx.rest, ctx.chosen, ctx.backend, ctx.check = problem[3:], chosen, backend, check
        ctx.save_for_backward(x, references, radius, result, nearest, total, kept)
        ctx.mark_non_differentiable(*(t for t in (nearest, total, kept) if t is not None))
        return *results, kept

    @staticmethod
    def backward(
        ctx: Any, grad_result: Tensor, grad_logsumexp: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.check is not None:
            ctx.check()
        needs = ctx.needs_input_grad[:3]
        x, references, radius, result, nearest, total, kept = ctx.saved_tensors
        problem = PosteriorMean(x, references, radius, *ctx.rest)
        difference = problem.difference
        problem = problem._replace(difference=False)
        mean, grad_mean = mean_operator.mean_and_gradient(x, result, grad_result, difference)
        state, upstream = State(mean, nearest, total), Upstream(grad_mean, grad_logsumexp)
        arguments = (problem, state, upstream, needs)
        # What was not active in the forward pass may be here. The operator refuses a second
        # derivative.
        batched = any(map(torch._C._functorch.is_legacy_batchedtensor, upstream))
        gradients: tuple[Tensor | None, ...]
        if _wants_gradients() or batched or not passes(_gpu_of(x), *upstream):
            gradients = mean_operator.call_backward(*arguments, ctx.backend)
        elif kept is not None:
            gradients = native.posterior_mean_backward(*arguments, kept)
        else:
            gradients = ctx.chosen.posterior_mean_backward(*arguments)
        grad_x, *rest = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        if difference and grad_x is not None:
            grad_x = grad_x + grad_result
        return (grad_x, *rest, None, None, None, None)


# ---- a public function in one call -----------------------------------------------------------


def one_call(
    name: str, backend: str | None, operands: tuple[Any, ...], options: tuple[Any, ...]
) -> Any:
    """The result of a function of :mod:`pfgm.backends.native_calls`; None where it cannot answer.

    Operands are tensors, numbers and None, the points first.
    """
    gpu = _gpu_of(operands[0])
    chosen = requested(backend)
    # The kernels look at PFGM_BACKEND themselves, in a tenth of the time that os.environ takes.
    if (
        (chosen and chosen != "native")
        or not native_calls.available
        or (gpu is not None and debugging())
        or not passes(gpu, *operands)
        or (gpu is not None and not chosen and not _takes_native(gpu))
    ):
        return None
    return getattr(native_calls, name)(gpu, *operands, *options)


def _takes_native(gpu: torch.device) -> bool:
    """Whether to ask the native kernels on a GPU: they compute there, or the environment names a
    backend. The kernels then check whether that is native."""
    return native_passed(gpu) or bool(os.environ.get("PFGM_BACKEND"))


def all_finite(values: Tensor) -> bool:
    """True if no value of a tensor is NaN or infinite."""
    few = values.numel() <= _MAX_CHECKED and not native.on_gpu(values)
    if few and passes(None, values, gradients=True):
        finite = native_calls.all_finite(values)
        if finite is not None:
            return finite
    return bool(values.isfinite().all())
