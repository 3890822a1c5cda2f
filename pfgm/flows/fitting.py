"""Levels fitted to data: those at which a solver follows the exact field of the data best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_choice
from ..common.hints import with_hints
from ..common.messages import progress_bar
from ..common.numbers import check_seed, whole
from ..common.tensors import dequantise, flat_rows
from ..references import References, ReferenceSet
from ..solvers import GRID_SOLVERS, SolverFunction
from .sampling import MOST_STEPS, Sampling, checked_grid
from .targets import Targets

_MOST_REFERENCES = 10_000
_EXACT_STEPS = 200
_MOST_FITTED = 100
_INVISIBLE = 0.01  # an error in units of the data's spread
_LAST = (0.1, 0.2, 0.4)  # starts of the last step, in units of the standard deviation of a value
_FIRST_MOVE, _LEAST_MOVE = 0.25, 0.03  # of a level in the search, in log z


class Fitting(Sampling, Targets):
    """Levels that follow from the data."""

    @with_hints
    def fit_levels(
        self,
        references: References,
        steps: int,
        *,
        solver: str | SolverFunction | None = None,
        points: int = 512,
        seed: int = 0,
        progress: bool = False,
    ) -> list[float]:
        """Finds the levels at which a solver with few steps follows the exact field best.

        Points of the prior follow the exact field of the references with 200 steps, and with
        ``steps`` steps at candidate levels. The levels minimise the mean of

            log(0.01 + ‖x − x*‖/R)

        where x is the end with few steps, x* the end with many, and R the root mean square distance
        of the references from their mean. The logarithm keeps the few points that end at different
        references from dominating. Align Your Steps (arXiv
        2404.14507) minimises a bound of the error of a trained network instead; here no network is
        needed.

        The search starts at the best of the schedules "log" and "rho" and moves one level at a time
        as long as this helps. The result is kept in ``fitted_levels``, and :meth:`sample` uses it
        for this solver and number of steps unless a schedule or ``last`` is given.
        :func:`pfgm.save` and :func:`pfgm.load` keep it with the network. The same arguments give
        the same levels. The time grows with the square of ``steps``.

        Args:
            references: (M, *S), the training data. Of more than 10 000, that many are drawn.
            steps: the number of solver steps, 1 to 100.
            solver: "euler", "heun" or "multistep"; None is the default of the flow. Also a function
                (:mod:`pfgm.solvers`), whose levels are returned and not kept: they are the schedule
                of :meth:`sample`.
            points: the number of points of the prior.
            seed: seed of the points and of the references that are drawn.
            progress: whether to show a progress bar.

        Returns:
            The ``steps`` + 1 levels, decreasing. For :class:`pfgm.PoissonFlow` they are z, for
            :class:`pfgm.PoissonFlowPP` sigma.

        Raises:
            ValueError: an argument is out of range, or references are divided among processes.

        >>> import pfgm, torch
        >>> data = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> flow = pfgm.PoissonFlow.from_data(data)
        >>> levels = flow.fit_levels(data, steps=5)
        >>> flow.grid(5, "fitted") == levels
        True
        """
        solver = self.defaults.solver if solver is None else solver
        if not callable(solver):
            check_choice("solver", solver, GRID_SOLVERS)
        check_fitted_steps("steps", steps)
        points = whole("points", points)
        check_seed(seed)
        self._check_references(references)
        rows = _drawn(references, seed)
        with torch.no_grad():
            error = self._error_of(rows, solver, points, seed)
            levels = self._search(error, steps, rows, progress)
        if isinstance(solver, str):
            self.fitted_levels.setdefault(solver, {})[steps] = levels
        return list(levels)

    def _error_of(
        self, rows: Tensor, solver: str | SolverFunction, points: int, seed: int
    ) -> Callable[[Sequence[float]], float]:
        """The mean log error of the solver's ends as a function of its levels."""
        net = self.empirical(rows)
        x = self.prior(points, generator=torch.Generator().manual_seed(seed)).to(rows.device)
        exact = self.solve(net, x, self.grid(_EXACT_STEPS, "log"), solver="multistep")[0]
        spread = _spread(rows)

        def error(levels: Sequence[float]) -> float:
            ends = self.solve(net, x, levels, solver=solver)[0]
            distance = flat_rows(ends - exact).double().norm(dim=1) / spread
            return float((distance + _INVISIBLE).log().mean())

        return error

    def _search(
        self,
        error: Callable[[Sequence[float]], float],
        steps: int,
        rows: Tensor,
        progress: bool,
    ) -> list[float]:
        deviation = _spread(rows) / math.sqrt(self.N)
        lasts = [last * deviation for last in _LAST]
        lasts = [last for last in lasts if self.last_level < last < self.first_level]
        spacings = itertools.product((None, *lasts), ("log", "rho"))
        start = min((self.grid(steps, name, last) for last, name in spacings), key=error)
        with progress_bar(desc="fitting levels", unit="trial", disable=not progress) as bar:

            def shown(levels: Sequence[float]) -> float:
                bar.update()
                return error(levels)

            return _moved(shown, start)

    def _restore_fitted(self, described: Any) -> None:
        """Takes over levels as :meth:`_describe_fitted` gives them."""
        try:
            fitted = [
                (solver, int(steps), [*levels])
                for solver, by_steps in described.items()
                for steps, levels in by_steps.items()
            ]
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "fitted_levels must hold lists of levels by solver and number of steps, as in "
                f"{{'heun': {{'2': [80.0, 1.0, 0.0]}}}}, got {described!r}."
            ) from error
        for solver, steps, given in fitted:
            check_choice("the solver of fitted levels", solver, GRID_SOLVERS)
            levels, ends = checked_grid(given), self.grid(steps, "log")
            same = (math.isclose(levels[at], ends[at], rel_tol=1e-6) for at in (0, -1))
            if len(levels) != len(ends) or not all(same):
                raise ValueError(
                    f"the levels fitted for {solver} with {steps} steps must be {len(ends)} levels "
                    f"from {ends[0]} to {ends[-1]}, got {levels}."
                )
            # The ends are computed from the data, so another machine rounds them otherwise.
            self.fitted_levels.setdefault(solver, {})[steps] = [ends[0], *levels[1:-1], ends[-1]]

    def _describe_fitted(self) -> dict[str, dict[str, list[float]]]:
        """The fitted levels for JSON, by solver and number of steps."""
        return {
            solver: {str(steps): levels for steps, levels in by_steps.items()}
            for solver, by_steps in self.fitted_levels.items()
        }


def check_fitted_steps(name: str, steps: int) -> None:
    """Raises ValueError unless levels can be fitted for so many steps."""
    whole(name, steps, 1, MOST_STEPS)
    if steps > _MOST_FITTED:
        raise ValueError(
            f"{name} must be at most {_MOST_FITTED}, got {steps}: with more, the schedules hardly "
            "differ."
        )


def _moved(error: Callable[[Sequence[float]], float], levels: list[float]) -> list[float]:
    """The levels after moving one inner level at a time, as long as this lowers the error.

    A move multiplies or divides a level by a factor. If no move helps, the factor shrinks.
    """
    least, move = error(levels), _FIRST_MOVE
    while move > _LEAST_MOVE:
        helped = False
        for i in range(1, len(levels) - 1):
            for factor in (math.exp(move), math.exp(-move)):
                level = levels[i] * factor
                if not levels[i + 1] < level < levels[i - 1]:
                    continue
                moved = [*levels[:i], level, *levels[i + 1 :]]
                if (new_error := error(moved)) < least:
                    least, levels, helped = new_error, moved, True
                    break
        if not helped:
            move /= 2
    return levels


def _drawn(references: References, seed: int) -> Tensor:
    """At most 10 000 of the references, as float32 on their device."""
    if isinstance(references, ReferenceSet) and references.sharded:
        raise ValueError(
            "references must be a tensor, or a ReferenceSet that is not divided among processes."
        )
    generator = torch.Generator().manual_seed(seed)
    held = references if isinstance(references, ReferenceSet) else ReferenceSet(references)
    numbers = held.draw(min(len(held), _MOST_REFERENCES), generator=generator)
    return dequantise(held[numbers], torch.float32)


def _spread(rows: Tensor) -> float:
    """The root mean square of the distances of rows from their mean; 1 if all are equal."""
    wide = flat_rows(rows).double()
    return float((wide - wide.mean(0)).square().sum(1).mean().sqrt()) or 1.0
