"""The posterior mean on the CPU, whose backward pass reuses the distances of the forward pass.

The forward pass keeps the squared distances of the references that count, at most 40 MiB
(csrc/cpu/kept_distances.h). The operator ``posterior_mean`` has no output for them, so this way is
taken only where nothing but autograd is at work. Elsewhere the backward pass computes the distances
again. Results are the same; gradients differ by their rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, native, native_direct, requested
from ..backends.problems import PosteriorMean, State, Upstream
from ..common import transforms
from . import posterior_mean


def compute(problem: PosteriorMean, backend: str | None) -> tuple[Tensor, Tensor] | None:
    """Mean (B, N) and log-sum-exp (B,), or None where this way is not open or has no use."""
    tensors = problem[:3]
    if (
        torch.compiler.is_compiling()
        or not native_direct.enabled
        or not torch.is_grad_enabled()
        or not any(tensor.requires_grad for tensor in tensors)
        or not all(type(tensor) is Tensor and tensor.is_cpu for tensor in tensors)
        or not transforms.only_autograd()
    ):
        return None
    posterior_mean.check(problem)
    x, references, _ = tensors
    backend = backend or requested()
    if len(x) == 0 or choose(backend, x.device, x.dtype, references.dtype) is not native:
        return None
    kept = native.room_for_distances(problem)
    if kept is None:
        return None
    found = _PosteriorMean.apply(*tensors, problem, kept)  # type: ignore[no-untyped-call]
    mean, logsumexp, *_ = found
    return mean, logsumexp


class _PosteriorMean(torch.autograd.Function):
    """(x, references, radius, problem, memory) → mean, log-sum-exp, nearest, total, kept."""

    @staticmethod
    def forward(
        x: Tensor, references: Tensor, radius: Tensor, problem: PosteriorMean, memory: Tensor
    ) -> tuple[Tensor, ...]:
        problem = problem._replace(x=x, references=references, radius=radius)
        found = native.posterior_mean(problem, memory)
        used = int(memory[:8].view(torch.int64))
        return (*found, memory[:used])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, references, radius, problem, _ = inputs
        mean, _, nearest, total, kept = output
        ctx.rest = problem[3:]
        ctx.save_for_backward(x, references, radius, mean, nearest, total, kept)
        ctx.mark_non_differentiable(nearest, total, kept)

    @staticmethod
    def backward(
        ctx: Any, grad_mean: Tensor, grad_logsumexp: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        x, references, radius, *state, kept = ctx.saved_tensors
        problem = PosteriorMean(x, references, radius, *ctx.rest)
        given = (problem, State(*state), Upstream(grad_mean, grad_logsumexp), needs)
        # A transform may be at work here that was not in the forward pass.
        batched = any(map(torch._C._functorch.is_legacy_batchedtensor, (grad_mean, grad_logsumexp)))
        if len(kept) == 0 or batched or not transforms.only_autograd():
            found = posterior_mean.call_backward(*given, "native")
        else:
            found = _Gradient.apply(*problem[:3], *state, *given[2], ctx.rest, needs, kept)
        wanted = (g if needed else None for g, needed in zip(found, needs, strict=True))
        return (*wanted, None, None)


class _Gradient(posterior_mean.OnceDifferentiable):
    """The backward pass with the kept distances."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, rest, needs, kept = arguments
        problem = PosteriorMean(*tensors[:3], *rest)
        state, upstream = State(*tensors[3:6]), Upstream(*tensors[6:])
        return native.posterior_mean_backward(problem, state, upstream, tuple(needs), kept)
