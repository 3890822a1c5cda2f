"""The operations in plain torch, on any device: ground truth.

Squared distances are sums of squared differences. Weights are relative to that of the nearest
reference. Everything is computed in float64; with float32 input only the output is rounded. Tests
compare the other backends with these results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import formulas
from ..core.arithmetic import Arithmetic
from ..core.problems import Needs, OdeStep, PosteriorMean, State, Upstream
from . import chunked


def supports(
    device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
) -> str | None:
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {dtype}"
    return None


def describe() -> str:
    return f"exact differences in plain torch {torch.__version__}, chunked"


def sketch(references: Tensor, dtype: torch.dtype) -> None:
    """None: a summary of the references would save no work here."""
    return None


def posterior_mean(problem: PosteriorMean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return chunked.posterior_mean(problem, Arithmetic(problem))


def posterior_mean_backward(
    problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return chunked.posterior_mean_backward(problem, state, upstream, needs, Arithmetic(problem))


normalised_field = formulas.normalised_field
normalised_field_backward = formulas.normalised_field_backward


def ode_step(
    step: OdeStep, with_mean: bool, out: Tensor | None = None, mean_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    result, mean = formulas.ode_step(step, with_mean)
    if out is not None:
        result = out.copy_(result)
    if mean is not None and mean_out is not None:
        mean = mean_out.copy_(mean)
    return result, mean
