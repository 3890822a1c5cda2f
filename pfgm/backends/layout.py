"""Tensors in the layout that kernels read and write: contiguous features, contiguous vectors."""

from __future__ import annotations

from torch import Tensor

from ..common.tensors import contiguous_features
from .problems import OdeStep, PosteriorMean


def laid_out(problem: PosteriorMean) -> PosteriorMean:
    """The same posterior mean, with tensors copied where their layout requires it."""
    x, references, radius, D, precision, sketch = problem
    x, references = contiguous_features(x), contiguous_features(references)
    return PosteriorMean(x, references, radius.contiguous(), D, precision, sketch)


def laid_out_step(step: OdeStep) -> OdeStep:
    """The same step, with tensors copied where their layout requires it."""
    x, slope, field_z, history, levels, gamma, z_exp, exact = step
    return OdeStep(
        contiguous_features(x),
        contiguous_features(slope),
        None if field_z is None else field_z.contiguous(),
        None if history is None else contiguous_features(history),
        levels.contiguous() if isinstance(levels, Tensor) else levels,
        gamma,
        z_exp,
        exact,
    )


def step_outputs(
    x: Tensor, with_mean: bool, out: Tensor | None, mean_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The outputs of a step from x (B, N): those given, and new ones for those that are not.

    The second is None where the mean is not asked for.
    """
    if out is None:
        out = x.new_empty(x.shape)
    if not with_mean:
        return out, None
    return out, x.new_empty(x.shape) if mean_out is None else mean_out
