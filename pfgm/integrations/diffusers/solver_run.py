"""A solver function, run one evaluation at a time: the loops of diffusers call the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...solvers import Solver

_ROUNDING = 8  # in units of the dtype: a loop may round the points, and may scale them


class _Evaluation(Exception):
    """The solver needs the mean of these points at this level."""

    def __init__(self, x: Tensor, z: float) -> None:
        self.x, self.z = x, z


class SolverRun:
    """The steps between the evaluations of a solver function.

    A solver cannot wait for the next mean. So it starts anew for each, and receives the means of
    its earlier evaluations again. This keeps all means, and takes the steps of n evaluations n/2
    times.

    Args:
        solver: the function, with the signature that :mod:`pfgm.solvers` describes.
        grid: its levels.

    Raises:
        ValueError: the levels of its evaluations depend on the points, or one of them is 0.
    """

    levels: list[float]
    """The levels of the evaluations."""

    def __init__(self, solver: Solver, grid: Sequence[float]) -> None:
        self._solver, self._grid = solver, list(grid)
        self.levels = self._levels_at(0.0)
        if self.levels != self._levels_at(1.0) or not all(level > 0 for level in self.levels):
            raise ValueError(
                f"solver is {solver!r}, which evaluates at levels that depend on the points, or at "
                "0; a scheduler calls the network at levels above 0 that are known before. "
                "flow.sample takes such solvers, for networks of pfgm.networks.from_module."
            )
        self._start: Tensor | None = None
        self._means: list[Tensor] = []
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
        """The points of the next evaluation, or the last ones, from those of this call.

        Raises:
            ValueError: the points are not those of the step before, or the run began at a later
                call, or the solver evaluates at other levels than announced.
        """
        if call != len(self._means):
            raise ValueError(
                f"a function as solver must start at the first timestep, got timestep {call} of "
                f"{len(self.levels)}."
            )
        if self._start is None:
            self._start = x.clone()
        elif not self._expects(x):
            raise ValueError(
                "sample must be the result of the previous step with a function as solver; other "
                "solvers continue from changed samples."
            )
        self._means.append(mean.clone())  # a loop may change its prediction in place
        moved, level = self._next_evaluation(self._start)
        announced = self.levels[call + 1] if call + 1 < len(self.levels) else None
        if level != announced:
            raise ValueError(
                f"solver evaluates at {level}, where it evaluated at {announced} before; a "
                "scheduler takes solvers whose levels do not depend on the points; flow.sample "
                "takes others."
            )
        self._expected = moved
        return moved.clone()

    def _expects(self, x: Tensor) -> bool:
        assert self._expected is not None
        if x.shape != self._expected.shape:
            return False
        allowed = _ROUNDING * torch.finfo(x.dtype).eps * self._expected.abs().amax()
        return bool(((x - self._expected).abs() <= allowed).all())

    def _next_evaluation(self, x: Tensor) -> tuple[Tensor, float | None]:
        """The points and the level of the next evaluation; at the end the result and None."""
        means = iter(self._means)

        def denoise(points: Tensor, level: float) -> Tensor:
            mean = next(means, None)
            if mean is None:
                raise _Evaluation(points, level)
            return mean.clone()  # a solver may write over it

        try:
            return self._solver(denoise, x, self._grid)[0], None
        except _Evaluation as evaluation:
            return evaluation.x, evaluation.z
