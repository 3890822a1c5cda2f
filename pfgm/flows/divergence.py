"""The divergence of the posterior mean: the trace of its Jacobian, exact or estimated.

``denoise(x, level)`` returns the posterior mean, or the field that implies it, as for
:mod:`pfgm.solvers`. A network must compute each row of a batch on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..common import draws
from ..common.tensors import flat_rows, wide_dtype
from ..common.values import checks_values
from ..functional import Field, euler_step
from ..solvers import DenoiseFunction

Divergence = Callable[[Tensor, Tensor, bool], Tensor]
"""``(mean, x, differentiable) -> div mean`` (B,), for mean and x (B, *S)."""
Estimator = Callable[[Tensor, torch.Generator | None], Divergence]
"""Makes the divergence of a run that starts at points x; the generator draws its probe."""

_NO_DERIVATIVE = (
    "the network's result has no gradient in x, which the divergence needs; the network must not "
    "use torch.no_grad or detach."
)


def _jacobian_product(
    mean: Tensor, x: Tensor, vector: Tensor, keep: bool, differentiable: bool
) -> Tensor:
    """vectorᵀ ∂mean/∂x of each row, (B, N) in :func:`wide_dtype`."""
    (product,) = torch.autograd.grad(
        mean, x, vector, retain_graph=keep, create_graph=differentiable, allow_unused=True
    )
    if product is None:
        raise ValueError(_NO_DERIVATIVE)
    return flat_rows(product).to(wide_dtype(x.device))


def _hutchinson(probe: Tensor) -> Divergence:
    """vᵀ (∂mean/∂x) v with one probe v for the whole run; unbiased because E[v vᵀ] = I.

    (Skilling 1989, Hutchinson 1990.)
    """

    def divergence(mean: Tensor, x: Tensor, differentiable: bool) -> Tensor:
        vector = probe.to(mean.dtype)
        product = _jacobian_product(mean, x, vector, differentiable, differentiable)
        return (product * flat_rows(probe)).sum(1)

    return divergence


def _rademacher(x: Tensor, generator: torch.Generator | None) -> Divergence:
    bits = draws.integers(2, x.shape, generator, device=x.device)
    return _hutchinson(bits.to(x.dtype) * 2 - 1)


def _gaussian(x: Tensor, generator: torch.Generator | None) -> Divergence:
    return _hutchinson(draws.normal(x.shape, generator, dtype=x.dtype, device=x.device))


def _exact(x: Tensor, generator: torch.Generator | None) -> Divergence:
    """The trace, one product for each dimension: torch.func cannot differentiate the operators."""
    N = math.prod(x.shape[1:])

    def divergence(mean: Tensor, x: Tensor, differentiable: bool) -> Tensor:
        total = x.new_zeros(len(x), dtype=wide_dtype(x.device))
        for i in range(N):
            unit = torch.zeros_like(mean, memory_format=torch.contiguous_format)
            unit.view(len(x), N)[:, i] = 1
            keep = differentiable or i < N - 1
            total = total + _jacobian_product(mean, x, unit, keep, differentiable)[:, i]
        return total

    return divergence


ESTIMATORS: dict[str, Estimator] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "exact": _exact,
}


class MeanAndDivergence:
    """The posterior mean and its divergence as a function of points, with a count of evaluations.

    Args:
        denoise: the posterior mean, or the field that implies it.
        x: points (B, *S); the network receives points of this shape and dtype.
        divergence: one of :data:`ESTIMATORS`, made for x.
        differentiable: whether the results keep their graph.
        report: called with the level after each evaluation.
    """

    def __init__(
        self,
        denoise: DenoiseFunction,
        x: Tensor,
        divergence: Divergence,
        differentiable: bool,
        report: Callable[[float], None],
    ) -> None:
        self._denoise, self._divergence, self._report = denoise, divergence, report
        self._shape, self._dtype, self._differentiable = x.shape, x.dtype, differentiable
        self.nfe = 0

    def __call__(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """mean (B, N) and div mean (B,) at points (B, N), all in :func:`wide_dtype`."""
        self.nfe += 1
        with torch.enable_grad():
            points = x.to(self._dtype).view(self._shape)
            if not points.requires_grad:
                points = points.detach().requires_grad_()
            mean = self._mean(points, level)
            divergence = self._divergence(mean, points, self._differentiable)
        if checks_values(x.device) and not bool(divergence.isfinite().all()):
            raise ValueError(f"the divergence of the network is NaN or infinity at {level:.6g}.")
        self._report(level)
        mean = flat_rows(mean).to(x.dtype)
        return (mean, divergence) if self._differentiable else (mean.detach(), divergence.detach())

    def _mean(self, points: Tensor, level: float) -> Tensor:
        prediction = self._denoise(points, level)
        parts = prediction[:2] if isinstance(prediction, Field) else (prediction,)
        if checks_values(points.device) and not all(bool(p.isfinite().all()) for p in parts):
            raise ValueError(f"the network returned NaN or infinity at {level:.6g}.")
        if not any(part.requires_grad for part in parts):
            raise ValueError(_NO_DERIVATIVE)
        if isinstance(prediction, Field):
            return euler_step(points, prediction, level, 0.0)
        return prediction
