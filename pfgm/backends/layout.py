"""The layout of tensors that kernels need: contiguous features and contiguous vectors."""

from __future__ import annotations

from torch import Tensor

from ..common.tensors import contiguous, contiguous_features
from ..core.problems import OdeStep, PosteriorMean


def laid_out(problem: PosteriorMean) -> PosteriorMean:
    """The same problem in the layout of the kernels. Only tensors of another layout are copied."""
    return problem._replace(
        x=contiguous_features(problem.x),
        references=contiguous_features(problem.references),
        radius=contiguous(problem.radius),
    )


def laid_out_step(step: OdeStep) -> OdeStep:
    """The same step in the layout of the kernels. Only tensors of another layout are copied."""
    return step._replace(
        x=contiguous_features(step.x),
        slope=contiguous_features(step.slope),
        field_z=None if step.field_z is None else step.field_z.contiguous(),
        history=None if step.history is None else contiguous_features(step.history),
        row_levels=None if step.row_levels is None else step.row_levels.contiguous(),
    )


def step_outputs(
    x: Tensor, with_mean: bool, out: Tensor | None, mean_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The tensors that a step from x (B, N) writes to: the given ones, and new ones for None.

    The second is None if the mean is not wanted.
    """
    if out is None:
        out = x.new_empty(x.shape)
    if not with_mean:
        return out, None
    return out, x.new_empty(x.shape) if mean_out is None else mean_out
