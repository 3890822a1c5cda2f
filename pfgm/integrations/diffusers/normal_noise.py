"""Recognises normal noise where that of a flow is needed, by the norms of the samples."""

from __future__ import annotations

import math

from torch import Tensor

from ...common.tensors import wide_dtype
from ...flows.likelihood import centred_prior
from ...flows.plusplus import PoissonFlowPP
from ...flows.poisson import PoissonFlow

_ODDS = 1e9


def looks_normal(
    x: Tensor, D: float, sigma: float, *, center: Tensor | float = 0.0, largest: float = math.inf
) -> bool:
    """Whether x (B, *S) is far more likely as standard normal noise than as noise of a flow.

    The likelihoods are those of N(0, I) and of the perturbation kernel at level sigma (PFGM++,
    arXiv 2302.04265, equation 3), which is a Student distribution with D degrees of freedom. x
    counts as normal if the ratio of its likelihoods is above 1e9. Over noise of the flow the mean
    of this ratio is 1, so by Markov's inequality such noise is above 1e9 with a chance of at most
    1e-9.

    Args:
        center: center of the flow's noise.
        largest: largest norm of the flow's noise. Norms that were clipped to it are not used.

    >>> import torch
    >>> looks_normal(torch.randn(4, 1, 8, 8), D=128.0, sigma=80.0)
    True
    >>> looks_normal(80 * torch.randn(4, 1, 8, 8), D=128.0, sigma=80.0)
    False
    """
    x = x.detach().to(wide_dtype(x.device))
    squared_norm = x.flatten(1).square().sum(1)
    offset = x - center
    inside = offset.flatten(1).norm(dim=1) < 0.999 * largest
    log_normal = -x[:1].numel() / 2 * math.log(2 * math.pi) - squared_norm / 2
    log_odds = log_normal - centred_prior(offset, sigma, D)
    return bool(log_odds[inside].sum() > math.log(_ODDS))


def check_start(flow: PoissonFlow | PoissonFlowPP, x: Tensor, sample: Tensor) -> None:
    """Raises ValueError if a run starts from noise that other schedulers start from.

    Args:
        x: the points (B, *S) at the first level.
        sample: the same as the loop holds them, whose norm the error gives.
    """
    center = flow.center.to(x) if isinstance(flow, PoissonFlow) else 0.0
    first = flow.first_level
    if looks_normal(x, flow.D, first, center=center, largest=flow._largest_norm):
        norm = float(sample.detach().float().flatten(1).norm(dim=1).mean())
        remedy = "start from scheduler.prior(n), as PoissonFlowPipeline does"
        if math.isinf(flow.D):
            remedy += ", or make the scheduler with variance_preserving=True"
        raise ValueError(
            f"sample has the norm {norm:.3g} at the first timestep, that of standard normal noise; "
            f"the prior has level {first:.3g}: {remedy}."
        )
