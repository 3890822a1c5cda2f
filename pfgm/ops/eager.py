"""Direct calls: the native kernels without torch's dispatcher.

The operators let torch differentiate, transform, trace and compile. On small tensors they take many
times as long as the kernels. Where nothing but autograd is active, two functions leave them out:

- :func:`one_call` takes the arguments of a public function, and computes all of it in one call of
  the native kernels. It returns None where that is not possible, also for an argument that is not
  allowed, so that only the operators have checks with messages. On a GPU values are not checked,
  and nothing waits for it.
- :func:`differentiated` computes the posterior mean with a gradient. The forward pass keeps
  distances for the backward pass; gradients then differ from those of the operator by the rounding
  of these distances.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import choose_for, native, native_calls, requested
from ..backends.passes import known as native_passed
from ..common.values import debugging
from ..core.problems import PosteriorMean, State, Upstream
from . import posterior_mean as mean_operator
from .differentiable import Differentiable

enabled = True
"""Whether anything may pass. Tests turn it off."""

posterior_mean, field, step = native_calls.posterior_mean, native_calls.field, native_calls.step
"""The functions of :func:`one_call`."""
EULER, HEUN, MULTISTEP = native_calls.EULER, native_calls.HEUN, native_calls.MULTISTEP
"""The methods of a step."""

T = TypeVar("T")
Results = tuple[Tensor, Tensor, Tensor, Tensor]

_MAX_CHECKED = 1 << 16  # values that one thread checks sooner than torch's operators start
_NUMBERS = (float, int)


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
    """Whether torch's dispatcher can be skipped.

    The values must be numbers, None or plain tensors in the memory of the CPU, or of the given GPU.
    Nothing but autograd may be active: no mode, transform, trace, autocast, profiler or
    forward-mode differentiation. Unless ``gradients`` is set, no gradient may be wanted.
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


def differentiated(
    problem: PosteriorMean, backend: str | None, check: Callable[[], None] | None = None
) -> Results | None:
    """The results of :func:`pfgm.ops.posterior_mean.compute`, with gradients, by the native
    kernels.

    None where that is not possible, or no gradient is wanted. The backward pass calls ``check``
    first, which may raise an error.
    """
    tensors = problem.x, problem.references, problem.radius
    gpu = native.gpu_of(problem.x)
    if (
        not _wants_gradients()
        or not any(tensor.requires_grad for tensor in tensors)
        or not passes(gpu, *tensors, problem.sketch, gradients=True)
        or len(problem.x) == 0
    ):
        return None
    mean_operator.check(problem)
    backend = requested(backend)
    if choose_for(backend, problem.x, problem.references) is not native:
        return None
    source = _Kept(problem.D, problem.sketch, problem.difference, backend, check)
    # The fifth result is the memory of the distances, for the backward pass alone.
    result, logsumexp, nearest, total, _ = Differentiable.apply(*tensors, source)
    return result, logsumexp, nearest, total


class _Kept(NamedTuple):
    """The posterior mean by the native kernels, which keep squared distances for its gradient.

    On the CPU, with many features, they keep those of the references that count, at most 40 MiB
    (csrc/cpu/kept_distances.h); on a GPU all of them where they are taken at once, at most 32 MiB
    (csrc/cuda/workspace.h).
    """

    D: float
    sketch: Tensor | None
    difference: bool
    backend: str | None
    check: Callable[[], None] | None

    def results(self, x: Tensor, references: Tensor, radius: Tensor) -> tuple[Tensor | None, ...]:
        problem = PosteriorMean(x, references, radius, self.D, self.sketch, self.difference)
        memory = native.room_for_distances(problem)
        results = native.posterior_mean(problem, memory)
        return *results, native.used_room(memory)

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        state: State,
        rest: Sequence[Tensor],
        upstream: Upstream,
        needs: tuple[bool, bool, bool],
    ) -> Sequence[Tensor | None]:
        if self.check is not None:
            self.check()
        problem = PosteriorMean(*inputs, self.D, self.sketch)
        # What was not active in the forward pass may be here. The operator refuses a second
        # derivative.
        batched = any(map(torch._C._functorch.is_legacy_batchedtensor, upstream))
        if _wants_gradients() or batched or not passes(native.gpu_of(problem.x), *upstream):
            gradients: tuple[Tensor, ...]
            gradients = mean_operator.BACKWARD(upstream, state, list(needs), problem, self.backend)
            return gradients
        return native.posterior_mean_backward(problem, state, upstream, needs, *rest)

    def tangents(self, *_: object) -> NoReturn:
        raise AssertionError("forward-mode differentiation takes the operators")


def one_call(
    function: Callable[..., T | None], backend: str | None, *operands: Any, **options: Any
) -> T | None:
    """The result of :data:`posterior_mean`, :data:`field` or :data:`step`; None where it cannot
    answer.

    Operands are tensors, numbers and None, the points first.
    """
    gpu = native.gpu_of(operands[0])
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
    return function(gpu, *operands, **options)


def _takes_native(gpu: torch.device) -> bool:
    """Whether to ask the native kernels on a GPU: they compute there, or the environment names
    them. What it names otherwise must not load them."""
    return native_passed(gpu) or os.environ.get("PFGM_BACKEND") == "native"


def all_finite(values: Tensor) -> bool:
    """True if no value of a tensor is NaN or infinite."""
    few = values.numel() <= _MAX_CHECKED and native.gpu_of(values) is None
    if few and passes(None, values, gradients=True):
        finite = native_calls.all_finite(values)
        if finite is not None:
            return finite
    # A finite sum has finite terms only, and takes a twentieth of the time. It may overflow.
    return bool(values.detach().sum().isfinite()) or bool(values.isfinite().all())
