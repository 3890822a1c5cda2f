"""The posterior mean over references in chunks, which one process or several hold.

With the CPU kernels each chunk continues the sums of those before it
(:mod:`pfgm.references.continued`). With other backends each chunk has a result of its own, and the
results are merged (:mod:`pfgm.references.merged`). The results of several processes are always
merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import native_parts, requested
from ..common.transforms import forward_mode, in_torch_func
from ..common.values import check_range, check_underflow, checks_values
from ..core.problems import State, Upstream
from ..core.weights import check_singular, law
from ..ops.differentiable import Differentiable, Inputs
from ..ops.posterior_mean import OnceDifferentiable
from . import continued, merged
from .part import Part
from .ranks import Ranks, merge_over_ranks
from .settings import ChunkTotals, Saved, Settings


def compute(
    x: Tensor,
    radius: Tensor,
    part: Part,
    D: float,
    backend: str | None,
    difference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (B, N), log-sum-exp, nearest and total (B,) over the references of all processes.

    With ``difference``, x − mean is in place of the mean. The first two results are differentiable
    once in x and radius.
    """
    shared, compiled = part.processes > 1, torch.compiler.is_compiling()
    if (shared or compiled) and (forward_mode() or in_torch_func()):
        raise RuntimeError(
            "references must be a tensor for torch.func and forward-mode differentiation, got a "
            f"ReferenceSet {('shared between processes' if shared else 'in a graph')}; backward() "
            "and torch.autograd.grad work with both."
        )
    wanted = torch.is_grad_enabled() and (x.requires_grad or radius.requires_grad)
    if compiled and (wanted or part.source.tensor is None):
        # A graph knows no version of the rows, by which the backward pass sees that they changed,
        # and cannot read a file. So the graph breaks here.
        eager: Any = torch.compiler.disable(compute)
        results = eager(x, radius, part, D, backend, difference)
        result, logsumexp, nearest, total = results
        return result, logsumexp, nearest, total
    backend = requested(backend)
    continues = native_parts.supports(backend, x, part.source.dtype) and part.device == x.device
    ranks, version = part.ranks(x), part.version()
    settings = Settings(part, ranks, D, backend, version, difference, continues)
    if wanted and (results := continued.by_tensor(x, radius, settings)) is not None:
        return results
    over = _OverSet(settings)
    if wanted or forward_mode() or in_torch_func():
        results = Differentiable.apply(x, None, radius, over)
    else:  # a tenth of a millisecond faster
        with torch.no_grad():  # rows have no gradient, even if their tensor requires one
            results = over.results(x, None, radius)
    result, logsumexp, nearest, total = results[:4]
    return result, logsumexp, nearest, total


class _OverSet(NamedTuple):
    """The posterior mean over a set, for :class:`~pfgm.ops.differentiable.Differentiable`."""

    settings: Settings

    @property
    def difference(self) -> bool:
        return self.settings.difference

    def results(self, x: Tensor, _: None, radius: Tensor) -> tuple[Tensor, ...]:
        """After nearest and total come those of each chunk."""
        settings = self.settings
        ranks, D = settings.ranks, settings.D
        if settings.continues and ranks is None:
            return continued.results(x, radius, settings)
        if ranks is None:
            state, chunk_totals = merged.state(x, radius, settings)
        else:
            over_all, chunk_totals = _over_ranks(
                ranks.gather(x), ranks.gather(radius), settings, ranks
            )
            state = State(*map(ranks.own, over_all))
            if checks_values(x.device):
                # Sums that are continued are checked here, other results already in their chunk.
                check_underflow(state.nearest, radius, x)
                none = x.new_empty(0, *x.shape[1:], dtype=settings.part.source.dtype)
                check_range(state.mean, x, none, settings.difference)
        nearest, total, column = (t[:, None] for t in (state.nearest, state.total, radius))
        logsumexp = law(D, x.shape[1]).log_sum_exp(nearest, total, column).squeeze(1)
        return state.mean.to(x.dtype), logsumexp, state.nearest, state.total, *chunk_totals

    def gradients(
        self,
        inputs: Inputs,
        state: State,
        rest: Sequence[Tensor],
        upstream: Upstream,
        needs: tuple[bool, bool, bool],
    ) -> Sequence[Tensor | None]:
        x, _, radius = inputs
        settings = self.settings._replace(difference=False)
        derived = torch.is_grad_enabled() or forward_mode() or in_torch_func()
        function: Any = _Gradient.apply if derived else _Gradient.forward
        grad_x, grad_radius = function(
            x, radius, *state, *rest, *upstream, settings, (needs[0], needs[2])
        )
        return grad_x, None, grad_radius

    def tangents(self, inputs: Inputs, tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        settings = self.settings._replace(difference=False)
        mean_tangent, lse_tangent = _Tangent.apply(  # type: ignore[no-untyped-call]
            *inputs[::2], *tangents[::2], settings
        )
        return mean_tangent, lse_tangent


def _over_ranks(
    x: Tensor, radius: Tensor, settings: Settings, ranks: Ranks
) -> tuple[State, ChunkTotals]:
    """The state over the references of all processes, for the points of all.

    And nearest and total of each chunk of this process.
    """
    own, chunk_totals = (continued if settings.continues else merged).state(x, radius, settings)
    state = merge_over_ranks(own, x, radius, settings.D, ranks)
    refined = settings.continues and settings.difference and x.dtype == torch.float32
    if refined and not torch.compiler.is_compiling():
        # Each process decides for its own points, so that all compute the same ones again.
        cancelled = continued.is_cancelled(state.mean, radius, state.nearest)
        again = ranks.gather(ranks.own(cancelled))
        if again.any():
            exact, _ = _over_ranks(x[again].double(), radius[again], settings, ranks)
            for values, exact_values in zip(state, exact, strict=True):
                values[again] = exact_values.to(values.dtype)
    return state, chunk_totals


class _Gradient(OnceDifferentiable):
    """The gradients in x and radius."""

    @staticmethod
    def forward(
        x: Tensor,
        radius: Tensor,
        mean: Tensor,
        nearest: Tensor,
        total: Tensor,
        chunk_nearest: Tensor,
        chunk_total: Tensor,
        grad_mean: Tensor,
        grad_logsumexp: Tensor,
        settings: Settings,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        settings.check_version()
        saved = Saved(x, radius, mean, nearest, total, grad_mean, grad_logsumexp)
        ranks = settings.ranks
        if ranks is not None:
            # Other processes may need gradients that this one does not.
            saved, needs = Saved(*map(ranks.gather, saved)), (True, True)
        if ranks is not None or not settings.continues:  # otherwise the kernels check it
            _check_singular(saved, settings)
        if settings.continues:
            gradients = continued.gradients(saved, settings, needs)
        else:
            totals = ChunkTotals(chunk_nearest, chunk_total)
            gradients = merged.gradients(saved, totals, settings, needs)
        grad_x, grad_radius = gradients if ranks is None else map(ranks.own, gradients)
        return grad_x.to(x.dtype), grad_radius


def _check_singular(saved: Saved, settings: Settings) -> None:
    """Raises ValueError if the log-sum-exp has a gradient where the mean is constant.

    Each process checks the points of all: if one raised alone, the others would wait for it.
    """
    try:
        constant = law(settings.D, saved.x.shape[1]).is_constant(saved.nearest, saved.radius)
        check_singular(constant, saved.grad_logsumexp)
    except ValueError as error:
        rows = "" if settings.ranks is None else " Rows are numbered over all processes."
        raise ValueError(f"{error}{rows}") from error


class _Tangent(OnceDifferentiable):
    """(x, radius, their tangents, settings) → the tangents of mean and log-sum-exp."""

    @staticmethod
    def forward(
        x: Tensor,
        radius: Tensor,
        tangent_x: Tensor | None,
        tangent_radius: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        mean_tangent, lse_tangent = merged.tangents(x, radius, tangent_x, tangent_radius, settings)
        return mean_tangent.to(x.dtype), lse_tangent
