"""The steps of a solver, one evaluation at a time: the loops of diffusers call the network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...functional.steps import euler_step, heun_step, multistep_step

SOLVERS = ("euler", "heun", "multistep")


class SolverRun:
    """The steps between the evaluations of a solver.

    Args:
        solver: one of :data:`SOLVERS`.
        grid: its levels.
    """

    evaluations: int
    """Evaluations in each step except the last."""
    levels: list[float]
    """The levels of the evaluations. heun evaluates at both ends of each step except the last."""

    def __init__(self, solver: str, grid: Sequence[float]) -> None:
        self._solver, self._grid = solver, list(grid)
        self.evaluations = 2 if solver == "heun" else 1
        self.levels = [grid[0], *(z for z in grid[1:-1] for _ in range(self.evaluations))]
        self._mean: Tensor | None = None  # that of the last evaluation
        self._ends: tuple[Tensor, Tensor] | None = None  # of the step of heun under way

    def step(self, x: Tensor, mean: Tensor, call: int) -> Tensor:
        """The points of the next evaluation, or the last ones, from those of this call.

        Raises:
            ValueError: the run starts in the middle of a step of heun, or the shape of x changes
                there.
        """
        number, second = divmod(call, self.evaluations)
        z, next_z = self._grid[number : number + 2]
        if second:
            return self._corrected(x, mean, z, next_z)
        earlier, self._mean = self._mean, mean.clone()  # a loop may change it in place
        if self._solver == "multistep" and earlier is not None and number < len(self._grid) - 2:
            return multistep_step(x, mean, z, next_z, earlier, self._grid[number - 1])[0]
        moved = euler_step(x, mean, z, next_z)
        if self._solver == "heun":
            self._ends = x.clone(), moved.clone()
        return moved

    def _corrected(self, x: Tensor, mean: Tensor, z: float, next_z: float) -> Tensor:
        """The end of a step of heun, whose Euler step ended at x unless the loop has moved it."""
        if self._ends is None:
            raise ValueError(
                "a run must start at a timestep at which a step of heun begins, got its second "
                "evaluation; index_for_timestep gives the index of the first."
            )
        start, moved = self._ends
        if x.shape != moved.shape:
            raise ValueError(
                "sample must keep its shape within a step of heun, "
                f"{tuple(moved.shape)}, got {tuple(x.shape)}."
            )
        # The mean of the points as they were that has the slope of the given ones.
        return heun_step(start, moved, mean + (moved - x), z, next_z)
