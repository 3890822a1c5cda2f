"""The posterior mean as a differentiable function where the operator is not called.

The operator computes its distances again in the backward pass, and takes its references as one
tensor. :class:`Differentiable` has a gradient where distances are kept (:mod:`pfgm.ops.eager`), and
where references are a set (:mod:`pfgm.references.posterior_mean`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..common import transforms
from ..core.problems import State, Upstream
from .posterior_mean import pulled_back, result_tangent

Inputs = tuple[Tensor, Tensor | None, Tensor]
"""x (B, N), references (M, N) or None where they have no gradient, and radius (B,)."""


class Source(Protocol):
    """How results and derivatives are computed."""

    @property
    def difference(self) -> bool:
        """Whether the result is x − mean in place of the mean."""

    def results(self, *inputs: Any) -> tuple[Tensor | None, ...]:
        """Mean or difference, log-sum-exp, nearest and total, and what the gradient needs too."""

    def gradients(
        self,
        inputs: Inputs,
        state: State,
        rest: Sequence[Tensor],
        upstream: Upstream,
        needs: tuple[bool, bool, bool],
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs. Those that are not needed may be anything.

        The state has the mean also where the result is a difference. ``rest`` are the results
        after the first four.
        """

    def tangents(self, inputs: Inputs, tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The tangents of mean and log-sum-exp."""


class Differentiable(transforms.Rowwise):
    """(x, references, radius, source) → the results of the source."""

    shared = (1,)

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if transforms.in_torch_func():
            return super().apply(*arguments)  # type: ignore[no-untyped-call]
        # torch.autograd.Function would look for default arguments at each call, which is slow.
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]

    @staticmethod
    def forward(
        x: Tensor, references: Tensor | None, radius: Tensor, source: Source
    ) -> tuple[Tensor | None, ...]:
        return source.results(x, references, radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.source = inputs
        result, _, *rest = output
        ctx.others = len(rest)
        ctx.save_for_backward(*tensors, result, *rest)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(value for value in rest if value is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, references, radius, result, nearest, total, *rest = ctx.saved_tensors
        source, needs = ctx.source, ctx.needs_input_grad[:3]

        def compute(mean: Tensor, upstream: Upstream) -> Sequence[Tensor | None]:
            state = State(mean, nearest, total)
            of_inputs: Sequence[Tensor | None]
            of_inputs = source.gradients((x, references, radius), state, rest, upstream, needs)
            return of_inputs

        likes = x, result, radius
        return (*pulled_back(compute, likes, source.difference, gradients, needs), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, logsumexp = ctx.source.tangents(ctx.saved_tensors[:3], tangents[:3])
        result = result_tangent(mean, tangents[0], ctx.source.difference)
        return (result, logsumexp, *[None] * ctx.others)
