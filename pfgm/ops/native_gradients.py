"""The posterior mean and its gradients by the native kernels, without the dispatcher of torch.

This way is open where nothing but autograd is at work, and costs less than the operators. The
forward pass keeps squared distances, and the backward pass does not compute them again:

- On the CPU, with many features, those of the references that count, at most 40 MiB
  (csrc/cpu/kept_distances.h). Results are those of the operator; gradients from kept distances
  differ by their rounding.
- On a GPU, all of them where the kernels take them at once: up to 2²² pairs of a point and a
  reference, 32 MiB (csrc/cuda/partition.h). Results are those of the operator to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import choose, native, native_direct, requested
from ..backends.problems import PosteriorMean, State, Upstream
from ..common import transforms
from . import posterior_mean


def compute(
    problem: PosteriorMean, backend: str | None, check: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Mean or difference (B, N), log-sum-exp, nearest and total (B,), of which the last two have no
    gradient.

    None where this way is closed or no gradient is wanted.

    The backward pass calls ``check`` first, which may raise an error.
    """
    if torch.compiler.is_compiling() or not native_direct.enabled or not torch.is_grad_enabled():
        return None
    tensors = problem.x, problem.references, problem.radius
    gpu = _gpu_of(problem.x)
    if (
        not any(tensor.requires_grad for tensor in tensors)
        or not all(transforms.is_plain(tensor, gpu) for tensor in tensors)
        or not transforms.only_autograd(gpu)
    ):
        return None
    posterior_mean.check(problem)
    x, references, _ = tensors
    backend = requested(backend)
    if len(x) == 0 or choose(backend, x.device, x.dtype, references.dtype) is not native:
        return None
    found = _PosteriorMean.apply(*tensors, problem, check)  # type: ignore[no-untyped-call]
    result, logsumexp, nearest, total, _ = found
    return result, logsumexp, nearest, total


def _gpu_of(value: Tensor) -> torch.device | None:
    return value.device if native.on_gpu(value) else None


class _PosteriorMean(torch.autograd.Function):
    """(x, references, radius, problem, check) → result, log-sum-exp, nearest, total, kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        problem: PosteriorMean,
        check: Callable[[], None] | None,
    ) -> tuple[Tensor | None, ...]:
        problem = problem._replace(x=x, references=references, radius=radius)
        memory = native.room_for_distances(problem)
        result, logsumexp, nearest, total = native.posterior_mean(problem, memory)
        kept = native.used_room(memory)
        ctx.rest, ctx.check = problem[3:], check
        ctx.save_for_backward(x, references, radius, result, nearest, total, kept)
        ctx.mark_non_differentiable(*(t for t in (nearest, total, kept) if t is not None))
        return result, logsumexp, nearest, total, kept

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
        mean, grad_mean = posterior_mean.mean_and_gradient(x, result, grad_result, difference)
        state, upstream = State(mean, nearest, total), Upstream(grad_mean, grad_logsumexp)
        given = (problem, state, upstream, needs)
        # What was not at work in the forward pass may be here. The operator refuses a second
        # derivative.
        batched = any(map(torch._C._functorch.is_legacy_batchedtensor, (grad_mean, grad_logsumexp)))
        found: tuple[Tensor | None, ...]
        if (
            torch.is_grad_enabled()
            or batched
            or not transforms.is_ordinary(grad_mean, grad_logsumexp, gpu=_gpu_of(x))
        ):
            found = posterior_mean.call_backward(*given, "native")
        else:
            found = native.posterior_mean_backward(*given, kept)
        grad_x, *rest = (g if needed else None for g, needed in zip(found, needs, strict=True))
        if difference and grad_x is not None:
            grad_x = grad_x + grad_result
        return (grad_x, *rest, None, None)
