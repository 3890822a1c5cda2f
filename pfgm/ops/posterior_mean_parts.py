"""The operators of a posterior mean over references that come in parts, on the CPU.

``posterior_mean_add`` adds a part to the sums over the parts before it, and ``posterior_mean_end``
returns the results. They have no gradient of their own: :mod:`pfgm.references` computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native_parts
from ..common import transforms
from ..core.problems import PosteriorMean, RunningMean
from .library import Operator, check_like
from .posterior_mean import check

_WRITTEN = {"sums": "Tensor(a!)", "nearest": "Tensor(b!)", "total": "Tensor(c!)"}

_ADD = Operator("posterior_mean_add", (RunningMean, PosteriorMean), "", **_WRITTEN)
_END = Operator(
    "posterior_mean_end",
    ("Tensor x", "Tensor radius", RunningMean, "float D", "bool difference=False"),
    "Tensor mean, Tensor logsumexp",
)


def add(problem: PosteriorMean, running: RunningMean) -> None:
    """Calls the operator that adds the references of a problem."""
    _ADD(running, problem)


def end(
    x: Tensor, radius: Tensor, D: float, running: RunningMean, difference: bool
) -> tuple[Tensor, Tensor]:
    """Calls the operator that returns mean or difference, and log-sum-exp."""
    mean, logsumexp = _END(x, radius, running, D, difference)
    return mean, logsumexp


def _add(running: RunningMean, problem: PosteriorMean) -> None:
    check(problem)
    _check_running(running, problem.x)
    transforms.check_no_tangent("posterior_mean_add", *problem[:3])
    native_parts.add(problem, running)


def _end(
    x: Tensor, radius: Tensor, running: RunningMean, D: float, difference: bool
) -> tuple[Tensor, Tensor]:
    # check() wants a reference. It is not read.
    unread = x.new_empty(1, *x.shape[1:])
    problem = PosteriorMean(x, unread, radius, D, difference=difference)
    check(problem)
    _check_running(running, x)
    transforms.check_no_tangent("posterior_mean_end", x, radius)
    return native_parts.end(problem, running)


def _check_running(running: RunningMean, x: Tensor) -> None:
    """Raises ValueError unless the kernels can write to the sums of points x (B, N)."""
    check_like("sums", running.sums, x, x.shape, torch.float64)
    for name, values in (("nearest", running.nearest), ("total", running.total)):
        check_like(name, values, x, x.shape[:1], torch.float64)
    for name, values in zip(running._fields, running[:3], strict=False):
        if not values.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {values.stride()}.")
    if x.device.type != "cpu":
        raise ValueError(f"x must be on the CPU, got {x.device}.")


def _fake_end(x: Tensor, radius: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(radius)


_ADD.register(_add, fake=lambda *_: None)  # there are no results
_END.register(_end, fake=_fake_end)
