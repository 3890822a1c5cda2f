"""The likelihood of data under a flow: its density, followed along the ODE up to the prior.

    d log p/dt = −div(x − mean) = −(N − div mean) along dx/dt = x − mean,  t = log σ,
    log p(x at the last level) = log p(latent at the first) + N log(σ_first/σ_last) − ∫ div mean dt

(PFGM, arXiv 2209.11178, section 3.3; the change of variables of arXiv 1810.01367, equation 8.) The
solver integrates div mean alone; the known term N log(σ_first/σ_last) is added at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_choice
from ..common.hints import with_hints
from ..common.messages import progress_bar
from ..common.numbers import positive, whole
from ..common.tensors import common_device, evaluating, wide_dtype
from ..core.dormand_prince import dormand_prince
from ..functional import log_density
from ..solvers import SOLVERS, Solver, SolverFunction, as_solver, rk45
from .conditions import Condition, Network
from .divergence import ESTIMATORS, MeanAndDivergence
from .sampling import MOST_STEPS, Sampling


class LogLikelihood(NamedTuple):
    """What :meth:`pfgm.PoissonFlow.log_likelihood` returns."""

    nats: Tensor
    """(B,), the log-density of each sample at the flow's last level, float64."""
    bits_per_dim: Tensor
    """(B,), −log₂ p/N + log₂(L/2) for L grey levels, float64."""
    latent: Tensor
    """(B, *S), the points of the prior that the samples come from, in the dtype of x."""
    nfe: int
    """Evaluations of the network. Each takes one product with its Jacobian, or N for "exact"."""


class Likelihood(Sampling):
    """Log-densities of data."""

    @with_hints
    def log_likelihood(
        self,
        net: Network,
        x: Tensor,
        *,
        estimator: str = "rademacher",
        solver: str | SolverFunction = "rk45",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        steps: int = 256,
        grey_levels: int = 256,
        prior_log_prob: Callable[[Tensor], Tensor] | None = None,
        condition: Condition | None = None,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
        progress: bool = False,
    ) -> LogLikelihood:
        """Log-density of data x (B, *S) under the flow, by its ODE from data up to the prior.

            log p(x) = log p_prior(latent) + ∫ div dt,  div = N − div mean,  t = log σ

        along dx/dt = x − mean. This is the density at the flow's last level, z_min or sigma_min:
        that of data with noise of this level.

        The prior is the perturbation kernel at the first level around one point: the center of a
        PoissonFlow with a spread, else 0. Data are not all at that point. This leaves an error that
        neither the network nor the tolerances reduce (the guide "Likelihood"). If the density at
        the first level is known, pass it as prior_log_prob, for example
        ``lambda latent: pfgm.log_density(latent, data, sigma=flow.first_level, D=flow.D)``. With
        ``flow.empirical(data)`` the result is then the exact mixture at the last level.

        Args:
            net: the network, in evaluation mode while it runs; must treat rows separately.
            x: (B, *S), float32 or float64. Bytes and other whole numbers have no density: add
                uniform noise, x = 2 (k + u)/L − 1 with k in 0 … L − 1, u ~ U[0, 1).
            estimator: of the divergence. "rademacher" and "gaussian" are vᵀ (∂mean/∂x) v with one
                probe v for each sample and the whole run, unbiased in nats (Skilling 1989,
                Hutchinson 1990). "exact" takes N products with the Jacobian in each evaluation.
            solver: "rk45"; another solver of the ODE, or a function with the signature of
                :mod:`pfgm.solvers`, on the flow's grid. Where x is many σ_last away from all data
                that the network knows, the ODE is stiff; a higher last level helps.
            rtol, atol: tolerances of rk45 for the density and for (x_t − x)/σ_t, which is in units
                of the noise. The sample with the largest error counts, so the steps and the last
                digits of the results depend on the batch.
            steps: of solvers on the grid; rk45 chooses its own.
            grey_levels: L, the number of grey levels of the data, for bits per dimension.
            prior_log_prob: from latent (B, *S) to log-densities (B,), in place of the prior.
            condition: keyword arguments of the network, such as {"labels": labels}, labels (B,).
            generator: of the probes, on the device of x.
            differentiable: whether to keep the graph for gradients in x and in the network's
                parameters, which takes memory for each evaluation. Exact networks
                (``flow.empirical``) can be differentiated only once, which the divergence does.
            progress: whether to show a progress bar.

        Raises:
            ValueError: an argument is out of range, shapes do not fit, the result of the network or
                of prior_log_prob is not finite, or the former has no gradient in x.
            TypeError: x is not floating point.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlowPP((2,), D=float("inf"), sigma_min=1.0)
        >>> net = flow.empirical(torch.zeros(1, 2))
        >>> flow.log_likelihood(net, torch.zeros(1, 2), estimator="exact").nats  # log(1/2π)
        tensor([-1.8379], dtype=torch.float64)
        """
        hint = ": whole numbers have no density, add uniform noise, 2 (x + u)/grey_levels − 1"
        self._check_x(x, hint=hint)
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"x must be torch.float32 or torch.float64, got {x.dtype}: half precision changes "
                "the density by tenths of a nat."
            )
        check_choice("estimator", estimator, ESTIMATORS)
        if not callable(solver):
            check_choice("solver", solver, SOLVERS)
        whole("steps", steps, 1, MOST_STEPS)
        whole("grey_levels", grey_levels, 2)
        common_device(x.device, generator)
        rtol, atol = positive("rtol", rtol), positive("atol", atol)
        predict = self._predictor(net, x, condition, None, None)
        grid, count = self._rising_grid(steps), len(x)
        # Autograd works neither in inference mode nor on tensors made there.
        with (
            evaluating(net),
            torch.inference_mode(False),
            torch.set_grad_enabled(differentiable),
            _progress_reported(grid, progress) as report,
        ):
            x = x.clone() if x.is_inference() else x
            x = x if differentiable else x.detach()
            wide = x.reshape(count, self.N).to(wide_dtype(x.device))
            divergence = ESTIMATORS[estimator](x, generator)
            evaluate = MeanAndDivergence(predict, x, divergence, differentiable, report)
            integral = wide.new_zeros(count)
            if count > 0:
                chosen = as_solver(solver)
                integrate = _rk45 if chosen.function is rk45 else _jointly(chosen)
                wide, integral = integrate(evaluate, wide, grid, rtol, atol)
                _check_each("the latent or its density", wide.sum(1) + integral, torch.isfinite)
            latent = wide.to(x.dtype).view(x.shape)
            prior = _checked_prior((prior_log_prob or self._prior_log_prob)(latent), count)
            known = self.N * math.log(grid[-1] / grid[0])
            nats = prior.to(wide.dtype) + known - integral
            bits = -nats / (self.N * math.log(2)) + math.log2(grey_levels) - 1
        return LogLikelihood(nats, bits, latent, evaluate.nfe)

    def _prior_log_prob(self, latent: Tensor) -> Tensor:
        return centred_prior(latent - self._center(latent), self.first_level, self.D)

    def _rising_grid(self, steps: int) -> list[float]:
        """The levels of a number of steps, from the last level up to the first."""
        grid = self.grid(steps)
        # There is no density at level 0: leave out the step to it, and take one more above.
        return (grid if grid[-1] > 0 else self.grid(steps + 1)[:-1])[::-1]


def centred_prior(latent: Tensor, level: float, D: float) -> Tensor:
    """Log-density (B,) of a flow's prior: the perturbation kernel at its first level around 0.

    >>> centred_prior(torch.zeros(1, 1), 1.0, D=1.0)  # Cauchy: log(1/π)
    tensor([-1.1447], dtype=torch.float64)
    """
    # In float64, because the exponent N + D multiplies rounding errors.
    wide = latent.to(wide_dtype(latent.device))
    return log_density(wide, wide.new_zeros(1, *wide.shape[1:]), sigma=level, D=D)


Integrator = Callable[
    [MeanAndDivergence, Tensor, Sequence[float], float, float], tuple[Tensor, Tensor]
]
"""From points x (B, N), in wide_dtype, to those at the last level and ∫ div mean dt (B,)."""


@torch.no_grad()
def _largest_row_error(error: Tensor) -> Tensor:
    """The largest error of any row, of x (root mean square) or of the density.

    An average over rows, or over x and the density, would hide a large error of a few.
    """
    points = error[:, :-1].square().mean(1).sqrt()
    return torch.maximum(points, error[:, -1].abs()).max()


def _rk45(
    evaluate: MeanAndDivergence, x: Tensor, levels: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Dormand–Prince in t = log σ for w = (x − x_start)/σ, dw/dt = (x_start − mean)/σ.

    The tolerances of w are in units of the noise, at every level. Those of x would be in units of
    the data.
    """
    ends = torch.tensor([levels[0], levels[-1]], dtype=x.dtype, device=x.device).log()

    def slope(t: Tensor, state: Tensor) -> Tensor:
        level = math.exp(float(t))
        mean, divergence = evaluate(x + level * state[:, :-1], level)
        return torch.cat([(x - mean) / level, divergence.unsqueeze(1)], 1)

    # step_t ends the last step at ends[1]. By default the solver steps beyond it and interpolates,
    # which is less accurate than the tolerance.
    # max_step is a factor e in σ. Where the slope hardly changes steps grow, and a longer one
    # could skip the next change. For normal data in one dimension this limit takes the
    # error from 2e-4 to 1e-5 nats, with as many evaluations.
    options = {"norm": _largest_row_error, "step_t": ends[1:], "max_step": 1.0}
    state = x.new_zeros(len(x), x.shape[1] + 1)
    state = dormand_prince(slope, state, ends, rtol, atol, options)
    return x + levels[-1] * state[:, :-1], state[:, -1]


def _jointly(solver: Solver) -> Integrator:
    """The integral I as one more coordinate of the points, for any solver of the ODE.

    It solves ds/dt = s − mean(s) for s = (x, I). So the mean of I is I − div mean.
    """

    def integrate(
        evaluate: MeanAndDivergence, x: Tensor, levels: Sequence[float], rtol: float, atol: float
    ) -> tuple[Tensor, Tensor]:
        def joint_mean(state: Tensor, level: float) -> Tensor:
            mean, divergence = evaluate(state[:, :-1].contiguous(), level)
            return torch.cat([mean, (state[:, -1] - divergence).unsqueeze(1)], 1)

        state, _ = solver(joint_mean, torch.cat([x, x.new_zeros(len(x), 1)], 1), levels)
        return state[:, :-1].contiguous(), state[:, -1]

    return integrate


def _checked_prior(log_prob: Tensor, count: int) -> Tensor:
    if not isinstance(log_prob, Tensor) or log_prob.shape != (count,):
        got = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
        raise ValueError(f"prior_log_prob must return a tensor of shape ({count},), got {got}.")
    _check_each("prior_log_prob", log_prob, lambda values: ~values.isnan())
    return log_prob


def _check_each(name: str, values: Tensor, allowed: Callable[[Tensor], Tensor]) -> None:
    """Raises ValueError for the first row whose value is not allowed."""
    bad = ~allowed(values)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} is {values[row].item()} in row {row}.")


@contextmanager
def _progress_reported(
    levels: Sequence[float], progress: bool
) -> Iterator[Callable[[float], None]]:
    """A function that moves a progress bar to a level, in percent of the way in log σ."""
    if not progress:
        yield lambda level: None
        return
    with progress_bar(total=100, desc="likelihood", unit="%") as bar:

        def show(level: float) -> None:
            way = math.log(level / levels[0]) / math.log(levels[-1] / levels[0])
            bar.set_postfix(level=f"{level:.3g}", refresh=False)
            bar.update(max(round(100 * way) - bar.n, 0))  # some evaluations look ahead

        yield show
