"""A solver, run one evaluation at a time: the loops of diffusers call the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...solvers import Solver

_ROUNDING = 8  # in units of the dtype: a loop may round the points, and may scale them


class _Evaluation(Exception):
    """The solver needs the mean of these points at this level."""

    def __init__(self, x: Tensor, z: float) -> None:
        self.x, self.z = x, z


class SolverRun:
    """The steps between the evaluations of a solver.

    A solver cannot wait for the next mean. So it starts anew for each: at the step of the grid to
    which the evaluation belongs, or, if the solver does not state how many evaluations a step has,
    at the first. It receives the means of the earlier evaluations again. Without steps this keeps
    all means, and takes the steps of n evaluations n/2 times.

    Args:
        solver: the solver.
        grid: its levels.
    """

    levels: list[float]
    """The levels of the evaluations."""

    def __init__(self, solver: Solver, grid: Sequence[float]) -> None:
        self._solver, self._grid = solver, list(grid)
        self.levels = self._grid[:-1] if solver.evaluations == 1 else self._levels_at(0.0)
        known = solver.evaluations is not None or self.levels == self._levels_at(1.0)
        if not known or not all(level > 0 for level in self.levels):
            raise ValueError(
                f"solver is {solver.function!r}, which evaluates at levels that depend on the "
                "points, or at 0; a scheduler calls the network at levels above 0 that are known "
                "before. flow.sample takes such solvers, for networks of "
                "flow.network."
            )
        if solver.evaluations and self.levels[:: solver.evaluations] != self._grid[:-1]:
            raise ValueError(
                f"solver must begin each step with the first of {solver.evaluations} evaluations, "
                f"as it states, got evaluations at {self.levels} for the levels {self._grid}."
            )
        self._together = solver.evaluations or len(self.levels)  # evaluations of a start
        self._start: Tensor | None = None
        self._means: list[Tensor] = []  # since the start
        self._options: dict[str, Any] = {}
        self._expected: Tensor | None = None  # where the solver evaluates next

    def _levels_at(self, point: float) -> list[float]:
        """The levels of all evaluations, from one point (1, 1) with mean 0."""
        levels: list[float] = []

        def denoise(x: Tensor, z: float) -> Tensor:
            levels.append(z)
            return torch.zeros_like(x)

        self._solver(denoise, torch.full((1, 1), point, device="cpu"), self._grid)
        return levels

    def step(self, x: Tensor, mean: Tensor, call: int) -> Tensor:
        """The points of the next evaluation, or the last ones, from those of this call."""
        number, place = divmod(call, self._together)
        if place == 0:
            if self._solver.needs_last_mean and self._means:
                self._options = {"earlier": (self._means[0], self._grid[number - 1])}
            # Clones, because a loop may change its points and its prediction in place.
            self._start, self._means = x.clone(), [mean.clone()]
        elif place != len(self._means):
            raise ValueError(
                "a run must start at a timestep at which a step begins, with a function as solver "
                f"at the first, got timestep {call} of {len(self.levels)}."
            )
        else:
            # The mean of the expected points that has the slope of the given ones.
            self._means.append(mean + (self._checked(x) - x))
        moved, level = self._next_evaluation(number if self._solver.evaluations else 0)
        announced = self.levels[call + 1] if call + 1 < len(self.levels) else None
        if level != announced:
            raise ValueError(
                f"solver evaluates at {level}, where it evaluated at {announced} before; a "
                "scheduler takes solvers whose levels do not depend on the points; flow.sample "
                "takes others."
            )
        self._expected = moved
        return moved.clone()

    def _checked(self, x: Tensor) -> Tensor:
        """The expected points; ValueError if x may not differ from them as it does."""
        expected = self._expected
        assert expected is not None
        fits = x.shape == expected.shape
        if fits and self._solver.evaluations is None:
            allowed = _ROUNDING * torch.finfo(x.dtype).eps * expected.abs().amax()
            fits = bool(((x - expected).abs() <= allowed).all())
        if not fits:
            raise ValueError(
                "sample must be the result of the previous step with a function as solver; other "
                "solvers continue from changed samples."
            )
        return expected

    def _next_evaluation(self, step: int) -> tuple[Tensor, float | None]:
        """The points and the level of the next evaluation; at the end the result and None."""
        means = iter(self._means)

        def denoise(points: Tensor, level: float) -> Tensor:
            mean = next(means, None)
            if mean is None:
                raise _Evaluation(points, level)
            return mean.clone()  # a solver may write over it

        assert self._start is not None
        try:
            end = self._solver(denoise, self._start, self._grid[step:], **self._options)[0]
        except _Evaluation as evaluation:
            return evaluation.x, evaluation.z
        return end, None
