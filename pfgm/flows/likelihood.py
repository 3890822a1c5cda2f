"""The likelihood of data under a flow: its ODE solved from data to the prior, densities in tow.

    d log p/dt = −div(x − mean) = −(N − div mean) along dx/dt = x − mean,  t = log σ,
    log p(x at the last level) = log p(latent at the first) + N log(σ_first/σ_last) − ∫ div mean dt

(PFGM, arXiv 2209.11178, section 3.3; the change of variables of arXiv 1810.01367, equation 8). The
part N log(σ_first/σ_last) is known and added at the end; the solver carries ∫ div mean dt alone.

Nothing here knows of flows: ``denoise(x, level)`` is the posterior mean, or the field that implies
it, as for :mod:`pfgm.solvers`. Networks must treat the rows of a batch separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import checks_values
from ..common.messages import progress_bar
from ..common.tensors import wide_dtype
from ..functional import log_density, steps
from ..functional.steps import Field
from ..solvers import Denoiser

__all__ = ["ESTIMATORS", "SOLVERS", "LogLikelihood", "centred_prior", "log_likelihood"]


class LogLikelihood(NamedTuple):
    """What :meth:`pfgm.PoissonFlow.log_likelihood` returns."""

    nats: Tensor
    """(B,), the log-density of each sample at the flow's last level, float64."""
    bits_per_dim: Tensor
    """(B,), −log₂ p/N + log₂(levels/2), float64."""
    latent: Tensor
    """(B, *S), the points of the prior that the samples come from, in the dtype of x."""
    nfe: int
    """Evaluations of the network; each has one product with its Jacobian, "exact" has N."""


# ---- divergence ------------------------------------------------------------------------------

Divergence = Callable[[Tensor, Tensor, bool], Tensor]
"""From mean and x (B, *S), and whether it is differentiated itself, to div mean (B,)."""
Estimator = Callable[[Tensor, torch.Generator | None], Divergence]


def _product(mean: Tensor, x: Tensor, vector: Tensor, keep: bool, differentiable: bool) -> Tensor:
    """vectorᵀ ∂mean/∂x of each row, flat and wide (B, N)."""
    (product,) = torch.autograd.grad(
        mean, x, vector, retain_graph=keep, create_graph=differentiable, allow_unused=True
    )
    if product is None:
        raise ValueError(_CONSTANT)
    return product.flatten(1).to(wide_dtype(x.device))


_CONSTANT = (
    "what the network returned does not depend on x as autograd sees it; its divergence needs that "
    "(no torch.no_grad, no detach in the network)."
)


def _hutchinson(probe: Tensor) -> Divergence:
    """vᵀ (∂mean/∂x) v with the same v all along: unbiased as E[v vᵀ] = I (Skilling; Hutchinson)."""

    def divergence(mean: Tensor, x: Tensor, differentiable: bool) -> Tensor:
        vector = probe.to(mean.dtype)
        product = _product(mean, x, vector, differentiable, differentiable)
        return (product * probe.flatten(1)).sum(1)

    return divergence


def _rademacher(x: Tensor, generator: torch.Generator | None) -> Divergence:
    bits = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
    return _hutchinson(bits.to(x.dtype) * 2 - 1)


def _gaussian(x: Tensor, generator: torch.Generator | None) -> Divergence:
    return _hutchinson(torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device))


def _exact(x: Tensor, generator: torch.Generator | None) -> Divergence:
    """The trace, a product for each dimension: functorch sees no derivative of registered ops."""
    N = math.prod(x.shape[1:])

    def divergence(mean: Tensor, x: Tensor, differentiable: bool) -> Tensor:
        total = x.new_zeros(len(x), dtype=wide_dtype(x.device))
        for i in range(N):
            unit = torch.zeros_like(mean, memory_format=torch.contiguous_format)
            unit.view(len(x), N)[:, i] = 1
            keep = differentiable or i < N - 1
            total = total + _product(mean, x, unit, keep, differentiable)[:, i]
        return total

    return divergence


ESTIMATORS: dict[str, Estimator] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "exact": _exact,
}


class _Rates:
    """Mean and divergence at points, evaluations counted and shown."""

    def __init__(
        self,
        denoise: Denoiser,
        x: Tensor,
        divergence: Divergence,
        differentiable: bool,
        shown: Callable[[float], None],
    ) -> None:
        self._denoise, self._divergence, self._shown = denoise, divergence, shown
        self._shape, self._dtype, self._differentiable = x.shape, x.dtype, differentiable
        self.nfe = 0

    def __call__(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """mean (B, N) and div mean (B,) at flat points (B, N), all wide."""
        self.nfe += 1
        with torch.enable_grad():
            point = x.to(self._dtype).view(self._shape)
            if not point.requires_grad:
                point = point.detach().requires_grad_()
            mean = self._mean(point, level)
            divergence = self._divergence(mean, point, self._differentiable)
        if checks_values(x.device) and not bool(divergence.isfinite().all()):
            raise ValueError(f"the divergence of the network is NaN or infinity at {level:.6g}.")
        self._shown(level)
        mean = mean.flatten(1).to(x.dtype)
        return (mean, divergence) if self._differentiable else (mean.detach(), divergence.detach())

    def _mean(self, point: Tensor, level: float) -> Tensor:
        slope = self._denoise(point, level)
        parts = slope[:2] if isinstance(slope, Field) else (slope,)
        if checks_values(point.device) and not all(bool(p.isfinite().all()) for p in parts):
            raise ValueError(f"the network returned NaN or infinity at {level:.6g}.")
        if not any(part.requires_grad for part in parts):
            raise ValueError(_CONSTANT)
        return steps.euler(point, slope, level, 0.0)[0] if isinstance(slope, Field) else slope


# ---- solvers ---------------------------------------------------------------------------------
#
# All carry flat, wide points x (B, N) up the levels and return them with ∫ div mean dt (B,).

Solver = Callable[[_Rates, Tensor, Sequence[float], float, float], tuple[Tensor, Tensor]]


@torch.no_grad()
def _row_norm(error: Tensor) -> Tensor:
    """The largest of all rows' errors, each the larger of that of x, root mean square, and of the
    density: neither a row nor a density is outvoted."""
    points = error[:, :-1].square().mean(1).sqrt()
    return torch.maximum(points, error[:, -1].abs()).max()


def _rk45(
    rates: _Rates, x: Tensor, levels: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Dormand–Prince in t = log σ for w = (x − x_start)/σ, dw/dt = (x_start − mean)/σ.

    In w tolerances are in units of the noise at every level: on x itself atol would be a hundredth
    of z_min where it starts, and grow with σ from there.
    """
    from torchdiffeq import odeint  # here, as in pfgm.solvers

    ends = torch.tensor([levels[0], levels[-1]], dtype=x.dtype, device=x.device).log()

    def slope(t: Tensor, state: Tensor) -> Tensor:
        level = math.exp(float(t))
        mean, divergence = rates(x + level * state[:, :-1], level)
        return torch.cat([(x - mean) / level, divergence.unsqueeze(1)], 1)

    # A step to the very end: interpolated from beyond, as is the default, the tolerance is lost.
    # None longer than a factor e: where all is still, they grow until one leaps over what follows
    # (normal data in one dimension: 1e-5 nats off in place of 2e-4, for as many evaluations).
    options = {"norm": _row_norm, "step_t": ends[1:], "max_step": 1.0}
    state = x.new_zeros(len(x), x.shape[1] + 1)
    try:
        state = odeint(slope, state, ends, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:
        raise ValueError(
            f"rk45 found no step small enough ({error}): what the network returns is not finite, "
            "or not smooth."
        ) from error
    return x + levels[-1] * state[-1, :, :-1], state[-1, :, -1]


def _euler(
    rates: _Rates, x: Tensor, levels: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Euler steps for x, a trapezoid of the divergences at their ends: n + 1 evaluations."""
    mean, divergence = rates(x, levels[0])
    integral = torch.zeros_like(divergence)
    for level, following in pairwise(levels):
        x, _ = steps.euler(x, mean, level, following)
        earlier = divergence
        mean, divergence = rates(x, following)
        integral = integral + math.log(following / level) * (earlier + divergence) / 2
    return x, integral


def _heun(
    rates: _Rates, x: Tensor, levels: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Heun's steps for x and the density alike: 2n evaluations."""
    integral = x.new_zeros(len(x))
    for level, following in pairwise(levels):
        mean, earlier = rates(x, level)
        predicted, _ = steps.euler(x, mean, level, following)
        mean, divergence = rates(predicted, following)
        x = steps.heun(x, predicted, mean, level, following)
        integral = integral + math.log(following / level) * (earlier + divergence) / 2
    return x, integral


SOLVERS: dict[str, Solver] = {"euler": _euler, "heun": _heun, "rk45": _rk45}


# ---- the likelihood --------------------------------------------------------------------------


def centred_prior(latent: Tensor, level: float, D: float) -> Tensor:
    """Log-density (B,) of a flow's prior: the perturbation kernel at its first level around 0.

    >>> centred_prior(torch.zeros(1, 1), 1.0, D=1.0)  # Cauchy: log(1/π)
    tensor([-1.1447], dtype=torch.float64)
    """
    # The exponent N + D multiplies float32's rounding.
    wide = latent.to(wide_dtype(latent.device))
    return log_density(wide, wide.new_zeros(1, *wide.shape[1:]), sigma=level, D=D)


def log_likelihood(
    denoise: Denoiser,
    x: Tensor,
    grid: Sequence[float],
    prior_log_prob: Callable[[Tensor], Tensor],
    *,
    estimator: str = "rademacher",
    solver: str = "rk45",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    levels: int = 256,
    generator: torch.Generator | None = None,
    differentiable: bool = False,
    progress: bool = False,
) -> LogLikelihood:
    """:meth:`pfgm.PoissonFlow.log_likelihood` for any posterior mean and a grid of rising levels.

    >>> def denoise(x, level):  # data from a standard normal distribution, D = ∞
    ...     return x / (1 + level**2)
    >>> def prior(latent):
    ...     return centred_prior(latent, math.sqrt(1 + 80.0**2), D=math.inf)
    >>> log_likelihood(denoise, torch.zeros(1, 1), [1e-3, 80.0], prior).nats  # log(1/√(2π))
    tensor([-0.9189], dtype=torch.float64)
    """
    count, N = len(x), math.prod(x.shape[1:])
    # In inference mode, and on tensors made there, autograd is not to be had.
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(differentiable),
        _shown(len(grid), solver, progress) as shown,
    ):
        x = x.clone() if x.is_inference() else x
        x = x if differentiable else x.detach()
        wide = x.reshape(count, N).to(wide_dtype(x.device))
        rates = _Rates(denoise, x, ESTIMATORS[estimator](x, generator), differentiable, shown)
        integral = wide.new_zeros(count)
        if count > 0:
            wide, integral = SOLVERS[solver](rates, wide, grid, rtol, atol)
            _check_rows("the latent or its density", wide.sum(1) + integral, torch.isfinite)
        latent = wide.to(x.dtype).view(x.shape)
        prior = _checked_prior(prior_log_prob(latent), count).to(wide.dtype)
        nats = prior + N * math.log(grid[-1] / grid[0]) - integral
        bits = -nats / (N * math.log(2)) + math.log2(levels / 2)
    return LogLikelihood(nats, bits, latent, rates.nfe)


def _checked_prior(log_prob: Tensor, count: int) -> Tensor:
    if not isinstance(log_prob, Tensor) or log_prob.shape != (count,):
        got = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
        raise ValueError(f"prior_log_prob returned {got}; needed is a tensor of shape ({count},).")
    _check_rows("prior_log_prob", log_prob, lambda values: ~values.isnan())
    return log_prob


def _check_rows(name: str, values: Tensor, allowed: Callable[[Tensor], Tensor]) -> None:
    bad = ~allowed(values)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} is {values[row].item()} in row {row}.")


@contextmanager
def _shown(count: int, solver: str, progress: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar over evaluations where one is wanted; rk45 does not know how many."""
    if not progress:
        yield lambda level: None
        return
    total = {"euler": count, "heun": 2 * (count - 1)}.get(solver)
    with progress_bar(total=total, desc="likelihood", unit="evaluation") as bar:

        def show(level: float) -> None:
            bar.set_postfix(level=f"{level:.3g}", refresh=False)
            bar.update()

        yield show
