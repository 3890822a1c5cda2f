"""The posterior mean over references that come in parts, by the CPU kernels.

Each part, a chunk of :mod:`pfgm.references.part`, continues the sums of those before it
(csrc/api/posterior_mean.h). The kernels know the nearest reference of those, and leave out every
reference that does not count beside it. If all parts but the last have a multiple of
:func:`kernel_chunk_rows` references, the results are to the bit those of one call over all
references.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import REFERENCES
from ..common.tensors import contiguous
from ..core.problems import PosteriorMean, RunningGradient, RunningMean, State, Upstream
from . import choose, native
from .native import address


def supports(name: str | None, x: Tensor, references: torch.dtype) -> bool:
    """Whether the backend of this name, or the one chosen for None, computes in these parts.

    Raises:
        ValueError, Unavailable: as :func:`pfgm.backends.choose`.
    """
    chosen = choose(name, x.device, x.dtype, references)
    return chosen is native and x.device.type == "cpu"


def kernel_chunk_rows(features: int, references: torch.dtype) -> int:
    """The number of references that the kernels take at a time."""
    if not native.has_extension():
        return 1
    rows: int = native.extension().chunk_rows(features, REFERENCES[references].number)
    return rows


# ---- forward ---------------------------------------------------------------------------------


def begin(x: Tensor, references: int) -> RunningMean:
    """The sums for points x (B, N) before the first of this number of references."""
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    return RunningMean(_zeros(x), nearest, torch.zeros_like(nearest), references)


def add(problem: PosteriorMean, running: RunningMean) -> None:
    """Adds the references of a problem."""
    _run(problem, running, None, None)


def end(problem: PosteriorMean, running: RunningMean) -> tuple[Tensor, Tensor]:
    """Mean (B, N) and log-sum-exp (B,) over all references. Those of the problem are not used."""
    x = problem.x
    mean = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    logsumexp = torch.empty(len(x), dtype=torch.float64, device=x.device)
    _run(_without_references(problem), running, mean, logsumexp)
    return mean, logsumexp


def _run(
    problem: PosteriorMean, running: RunningMean, mean: Tensor | None, logsumexp: Tensor | None
) -> None:
    problem = problem.laid_out()
    io = native.extension().Forward(
        mean=address(mean),
        logsumexp=address(logsumexp),
        nearest=running.nearest.data_ptr(),
        total=running.total.data_ptr(),
        sums=running.sums.data_ptr(),
    )
    native_form = native.native_problem(problem, running.all_references)
    status = native.extension().posterior_mean(native_form, io)
    native.check_status(status, *problem[:3])


# ---- gradients -------------------------------------------------------------------------------


def begin_gradients(x: Tensor, references: int, needs_x: bool) -> RunningGradient:
    """The sums for points x (B, N) before the first of this number of references."""
    moments = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    pulls = torch.zeros(len(x), 2, dtype=torch.float64, device=x.device)
    return RunningGradient(_zeros(x) if needs_x else None, moments, pulls, references)


def any_ill_conditioned(problem: PosteriorMean, state: State, upstream: Upstream) -> bool:
    """Whether :func:`add_pulls` must take all parts before the first :func:`add_gradients`."""
    none = _without_references(problem)
    ill_conditioned: bool = _backward(
        native.extension().any_ill_conditioned, none, state, upstream, None
    )
    return ill_conditioned


def add_pulls(
    problem: PosteriorMean, state: State, upstream: Upstream, running: RunningGradient
) -> None:
    """Adds a part, the references of a problem, to the pulls. The state is that over all parts."""
    pulls = native.extension().posterior_mean_pulls
    native.check_status(_backward(pulls, problem, state, upstream, running), *problem[:3])


def add_gradients(
    problem: PosteriorMean,
    state: State,
    upstream: Upstream,
    running: RunningGradient,
    grad_x: Tensor | None = None,
    grad_radius: Tensor | None = None,
) -> None:
    """Adds a part, the references of a problem, to the sums. The state is that over all parts.

    A call with ``grad_x`` or ``grad_radius`` must be the last: it writes the gradients there.
    """
    gradients = native.extension().posterior_mean_backward
    status = _backward(gradients, problem, state, upstream, running, grad_x, grad_radius)
    native.check_status(status, *problem[:3])


def end_gradients(
    problem: PosteriorMean, state: State, upstream: Upstream, running: RunningGradient
) -> tuple[Tensor | None, Tensor]:
    """The gradients of x (None if it needs none) and radius over all references."""
    x, needs_x = problem.x, running.sums is not None
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    grad_radius = torch.empty(len(x), dtype=torch.float64, device=x.device)
    none = _without_references(problem)
    add_gradients(none, state, upstream, running, grad_x, grad_radius)
    return grad_x, grad_radius


def _backward(
    function: Callable[[object, object], Any],
    problem: PosteriorMean,
    state: State,
    upstream: Upstream,
    running: RunningGradient | None,
    grad_x: Tensor | None = None,
    grad_radius: Tensor | None = None,
) -> Any:
    """The result of a function of the extension, for its inputs and results of a backward pass."""
    problem = problem.laid_out()
    state, upstream = State(*map(contiguous, state)), Upstream(*map(contiguous, upstream))
    sums, moments, pulls, references = (None, None, None, 0) if running is None else running
    io = native.backward_io(
        state,
        upstream,
        (grad_x, None, grad_radius),
        sums=address(sums),
        moments=address(moments),
        pulls=address(pulls),
    )
    return function(native.native_problem(problem, references), io)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float64, device=x.device)


def _without_references(problem: PosteriorMean) -> PosteriorMean:
    return problem._replace(references=problem.references[:0], sketch=None)
