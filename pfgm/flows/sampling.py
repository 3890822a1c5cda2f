"""Sampling: the prior, the levels of a run, and the flow's ODE solved through them."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from ..common.checks import check_choice, check_tensor
from ..common.devices import known_device
from ..common.hints import hint, with_hints
from ..common.memory import allocating
from ..common.messages import progress_bar
from ..common.numbers import LARGEST, as_number, is_number, whole
from ..common.tensors import evaluating, network_device
from ..functional.steps import Field, euler_step, implied_mean
from ..solvers import SCHEDULES, Callback, DenoiseFunction, SolverFunction, StepInfo, as_solver
from .conditions import (
    Condition,
    Network,
    as_condition,
    check_condition,
    check_network,
    map_tensors,
)
from .parametrisation import Parametrisation

if TYPE_CHECKING:
    from typing_extensions import Unpack

_GIVEN = ("churn", "noise")  # options that a flow sets itself
_SAME_LEVEL = 1e-3  # relative difference of levels, as of rounding to half precision
MOST_STEPS = 1_000_000  # all levels are in memory at once; published samplers take up to 1000

Projection = Callable[[Tensor, float], Tensor]
"""From points (B, *S) and their level to new points, at which the network is evaluated."""


class SampleOptions(TypedDict, total=False):
    """The types of the options of :meth:`pfgm.Flow.sample`; churn is for PoissonFlowPP."""

    solver: str | SolverFunction | None
    steps: int | None
    schedule: str | Sequence[float] | None
    last: float | None
    condition: Condition | None
    guidance: float | None
    unconditional: Condition | None
    generator: torch.Generator | None
    device: torch.device | str | None
    x_init: Tensor | None
    callback: Callback | None
    progress: bool
    rtol: float
    atol: float
    project: Projection | None
    churn: float
    churn_range: tuple[float, float]
    churn_noise: float


class Sampling(Parametrisation):
    """The prior, and runs of a solver from one level to another."""

    @abstractmethod
    def prior(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Points (n, *S) at the first level."""

    @abstractmethod
    def _grid(self, schedule: str, steps: int, last: float) -> list[float]:
        """steps + 1 levels from the first; the last step starts at ``last`` or above."""

    @overload
    def sample(
        self,
        net: Network,
        n: int,
        *,
        return_nfe: Literal[False] = ...,
        **options: Unpack[SampleOptions],
    ) -> Tensor: ...

    @overload
    def sample(
        self, net: Network, n: int, *, return_nfe: Literal[True], **options: Unpack[SampleOptions]
    ) -> tuple[Tensor, int]: ...

    def sample(
        self,
        net: Network,
        n: int,
        *,
        solver: str | SolverFunction | None = None,
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        last: float | None = None,
        condition: Condition | None = None,
        guidance: float | None = None,
        unconditional: Condition | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        x_init: Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        return_nfe: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, int]:
        """Samples (n, *S): points of the prior carried from the first level to the last.

        Args:
            net: the network; a module is in evaluation mode while it samples.
            n: the number of samples.
            solver: "euler", "heun", "multistep", "rk45", or "consistency" for few-step models
                (:mod:`pfgm.solvers`). Other networks give averages of the data with "consistency";
                this is not checked. Also a function with the signature of :mod:`pfgm.solvers`.
            steps: the number of solver steps; rk45 chooses its own. None is
                :meth:`default_steps`.
            schedule: the spacing of the levels, "log" (published for PFGM), "rho" or "fitted" (by
                :meth:`fit_levels`), or the levels themselves, decreasing from the first level of
                the flow, or from that of x_init. None is "fitted" if levels were fitted for this
                solver and number of steps and ``last`` is None, else the default of the flow.
            last: the level, z or sigma, at which the last step starts. That step goes to the end at
                once. Fewer steps suffice where the noise of this level is invisible.
            condition: keyword arguments of the network, such as {"labels": labels}, labels (n,).
                With a network that :func:`pfgm.load` has read, labels may be a list of n names that
                are stored with it, or of one name for all.
            guidance: the weight w of classifier-free guidance (arXiv 2207.12598). The posterior
                mean is mean_u + w (mean_c − mean_u), at twice the evaluations. 1 is the condition
                alone, above 1 exaggerates it. None is the condition alone, without the extra
                evaluations. Values other than 1 need a condition, or unconditional.
            unconditional: keyword arguments of the network for mean_u; none unless given.
            generator: of the prior, and of the noise that "consistency" adds.
            device: None takes the device of x_init, else of the generator, else of the network's
                parameters, else the CPU.
            x_init: (n, *S), points at the first level of the run to start from instead of the
                prior.
            callback: receives a dict (step, z, x, mean, nfe) before each step. If it returns True,
                the run stops and returns that x.
            progress: whether to show a progress bar.
            return_nfe: whether to return the number of network evaluations too.
            **options: of the solver, such as rtol and atol of rk45; project of :meth:`solve`; and
                of a :class:`pfgm.PoissonFlowPP` churn.

        Raises:
            TypeError: an argument is of another type, or no option of the solver.
            ValueError: an argument is out of range, or the network's results have wrong shapes or
                are not finite.

        Warns:
            UserWarning: the steps are so few, as heun's may be, that samples would be poor.

        >>> import pfgm, torch
        >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
        >>> net = flow.empirical(torch.eye(2))
        >>> x, nfe = flow.sample(net, 3, solver="heun", steps=8, return_nfe=True)
        >>> x.shape, nfe
        (torch.Size([3, 2]), 15)
        """
        solver, schedule = self._with_noise_of_steps(solver, steps, schedule, options, generator)
        solver = self.defaults.solver if solver is None else solver
        grid = self.grid(steps, schedule, last, solver=solver)
        if x_init is None:
            self._check_from_prior(grid)
        x, nfe = self._start(net, n, generator, device, x_init), 0
        _warn_of_long_steps(solver, grid)
        if as_solver(solver).few_step:
            options["noise"] = functools.partial(self._add_noise, generator=generator)
        if n > 0:
            x, nfe = self.solve(
                net,
                x,
                grid,
                solver=solver,
                condition=condition,
                guidance=guidance,
                unconditional=unconditional,
                callback=callback,
                progress=progress,
                **options,
            )
        return (x, nfe) if return_nfe else x

    def _with_noise_of_steps(
        self,
        solver: str | SolverFunction | None,
        steps: int | None,
        schedule: str | Sequence[float] | None,
        options: dict[str, Any],
        generator: torch.Generator | None,
    ) -> tuple[str | SolverFunction | None, str | Sequence[float] | None]:
        """The solver and the schedule of a run, which may depend on options of the flow's own.

        A flow replaces these by options of the solver, such as a function that adds noise.
        """
        return solver, schedule

    @with_hints
    def grid(
        self,
        steps: int | None = None,
        schedule: str | Sequence[float] | None = None,
        last: float | None = None,
        *,
        solver: str | SolverFunction | None = None,
    ) -> list[float]:
        """The levels of a run, from the first to the last: ``steps`` + 1 levels of a schedule.

        Arguments are those of :meth:`sample`. Levels given as ``schedule`` are checked and
        returned. Without a solver, fitted levels are those of the default solver, and they are used
        only with the schedule "fitted".

        >>> import pfgm
        >>> [round(z, 3) for z in pfgm.PoissonFlow.cifar10().grid(3, "log")]
        [40.0, 1.17, 0.034, 0.001]
        >>> [round(z, 3) for z in pfgm.PoissonFlow.cifar10().grid(3, "log", last=0.1)]
        [40.0, 2.0, 0.1, 0.001]
        """
        if solver is not None:
            as_solver(solver)  # refuses an unknown name
        steps = self.default_steps(solver or self.defaults.solver) if steps is None else steps
        if schedule is None or isinstance(schedule, str):
            whole("steps", steps, 1, MOST_STEPS)
        if schedule is None:
            schedule = self._schedule_for(solver, steps, last)
        if not isinstance(schedule, str):
            if last is not None:
                raise ValueError(
                    f"last is {last}, but schedule holds all levels; give one of them."
                )
            return checked_grid(schedule)
        check_choice("schedule", schedule, [*SCHEDULES, "fitted"])
        if schedule == "fitted":
            return self._fitted_grid(solver or self.defaults.solver, steps, last)
        if last is None:
            return self._grid(schedule, steps, self.last_level)
        if not is_number(last) or not self.last_level <= last < self.first_level:
            raise ValueError(
                f"last must be at least {self.last_level} and below {self.first_level}, got "
                f"{last!r}."
            )
        return self._grid(schedule, steps, float(last))

    def _check_from_prior(self, grid: Sequence[float]) -> None:
        """Raises ValueError unless a grid starts at the level of the prior, the first level."""
        if not math.isclose(grid[0], self.first_level, rel_tol=_SAME_LEVEL):
            raise ValueError(
                f"schedule must start at {self.first_level:.6g}, the level of the prior, got "
                f"{grid[0]:.6g}; to start elsewhere give x_init at the first level of schedule."
            )

    def _schedule_for(
        self, solver: str | SolverFunction | None, steps: int, last: float | None = None
    ) -> str:
        """The schedule of a run unless one is given: "fitted" if there are such levels."""
        levels = self.fitted_levels.get(solver, {}) if isinstance(solver, str) else {}
        fitted = last is None and steps in levels
        return "fitted" if fitted else self.defaults.schedule

    def _fitted_grid(
        self, solver: str | SolverFunction, steps: int, last: float | None
    ) -> list[float]:
        if last is not None:
            raise ValueError(f"last is {last}, but fitted levels include it; give one of them.")
        fitted = self.fitted_levels.get(solver, {}) if isinstance(solver, str) else {}
        if steps not in fitted:
            known = ", ".join(map(str, sorted(fitted))) or "none"
            raise ValueError(
                f"schedule is 'fitted', but no levels were fitted for the solver {solver!r} with "
                f"{steps} steps (fitted are those with: {known}); fit_levels finds them."
            )
        return list(fitted[steps])

    def solve(
        self,
        net: Network,
        x: Tensor,
        grid: Sequence[float],
        *,
        solver: str | SolverFunction = "rk45",
        condition: Condition | None = None,
        guidance: float | None = None,
        unconditional: Condition | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        project: Projection | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Carries points x (B, *S) along the flow through the levels of a grid, up or down.

        Other arguments are those of :meth:`sample`.

        Args:
            grid: the levels, decreasing or rising; x are points at the first of them. rk45 goes
                straight to the last level, which must differ from the first.
            project: from points and their level to new points of the same shape, at which the
                network is evaluated instead. For a projection onto a linear subspace, such as one
                that sets some coordinates and keeps the others, this is the same as replacing the
                points themselves. Points that are returned or shown to a callback are not
                projected.

        Returns:
            The points at the last level of the grid, and the number of network evaluations.
        """
        chosen = as_solver(solver)
        _check_options(solver, options)
        self._check_x(x)
        grid = _checked_levels(grid)
        if chosen.adaptive:
            options.setdefault("atol", 2e-4 * self._unit)
        predict = self._predictor(net, x, condition, guidance, unconditional)
        if project is not None:
            predict = _projected(predict, project)
        total = None if chosen.adaptive else len(grid) - 1
        center = self._center(x)
        with evaluating(net), _progress_shown(callback, total, progress) as shown:
            if chosen.adaptive and isinstance(center, Tensor):
                # The relative tolerance is meant for the distance from the center.
                predict, shown = _relative(predict, center), _absolute(shown, center)
                x, nfe = chosen(predict, x - center, grid, shown, **options)
                x = x + center
            else:
                x, nfe = chosen(predict, x, grid, shown, **options)
        return x, nfe if guidance is None else 2 * nfe

    def _predictor(
        self,
        net: Network,
        x: Tensor,
        condition: Condition | None,
        guidance: float | None,
        unconditional: Condition | None,
    ) -> DenoiseFunction:
        """The network's prediction as a function of points and level, with guidance applied."""
        check_network(net)
        conditional, without = (
            map_tensors(as_condition(name, given, net, x), lambda value: value.to(x.device))
            for name, given in (("condition", condition), ("unconditional", unconditional))
        )
        for each in (conditional, without):
            check_condition(net, each, len(x))
        if guidance is None:
            return lambda x, level: self._predict(net, x, level, conditional)
        weight = as_number(guidance)
        if not abs(weight) <= LARGEST:
            raise ValueError(f"guidance must be a finite number, got {guidance!r}.")
        if weight != 1 and not conditional and not without:
            raise ValueError(
                f"guidance is {guidance!r}, but neither condition nor unconditional is given, "
                "between which it extrapolates; give one, such as condition={'labels': labels}."
            )

        def guided(x: Tensor, level: float) -> Tensor:
            mean = self.denoise(net, x, level, without)
            return mean + weight * (self.denoise(net, x, level, conditional) - mean)

        return guided

    def _start(
        self,
        net: Network,
        n: int,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        x_init: Tensor | None,
    ) -> Tensor:
        """The points (n, *S) at which a run starts: x_init or the prior."""
        if x_init is None:
            if device is None and generator is None:
                device = network_device(net)
            with allocating(f"n is {n}, and {n} samples of shape {self.shape}"):
                return self.prior(n, generator=generator, device=device)
        check_tensor("x_init", x_init)
        if x_init.shape != (n, *self.shape) or not x_init.is_floating_point():
            raise ValueError(
                f"x_init must be floating point of shape {(n, *self.shape)}, got {x_init.dtype} of "
                f"shape {tuple(x_init.shape)}."
            )
        return x_init.detach().to(None if device is None else known_device(device))

    def _add_noise(self, x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
        return x + self.noise(x.new_full((len(x),), level), generator)


def _projected(predict: DenoiseFunction, project: Projection) -> DenoiseFunction:
    """The posterior mean at projected points.

    A field is converted to its mean, because a solver would take it for the field at its points.
    """

    def evaluate(x: Tensor, level: float) -> Tensor:
        points = project(x, level)
        if points.shape != x.shape or points.dtype != x.dtype:
            raise ValueError(
                f"project must return the shape and dtype of x, {tuple(x.shape)} and {x.dtype}, "
                f"got {tuple(points.shape)} and {points.dtype}."
            )
        prediction = predict(points, level)
        if isinstance(prediction, Field):
            return euler_step(points, prediction, level, 0.0)
        return prediction

    return evaluate


def _relative(predict: DenoiseFunction, center: Tensor) -> DenoiseFunction:
    """The posterior mean relative to the center, at points relative to the center."""

    def evaluate(x: Tensor, level: float) -> Tensor:
        points = x + center
        return implied_mean(points, predict(points, level), level) - center

    return evaluate


def _absolute(callback: Callback | None, center: Tensor) -> Callback | None:
    """The callback, for a solver whose points are relative to the center."""
    if callback is None:
        return None

    def shown(info: StepInfo) -> object:
        mean = None if info["mean"] is None else info["mean"] + center
        return callback({**info, "x": info["x"] + center, "mean": mean})

    return shown


@contextmanager
def _progress_shown(
    callback: Callback | None, total: int | None, progress: bool
) -> Iterator[Callback | None]:
    """The callback, which also moves a progress bar if progress is True."""
    if not progress:
        yield callback
        return
    with progress_bar(total=total, desc="sampling", unit="step") as bar:

        def show(info: StepInfo) -> object:
            bar.set_postfix(z=f"{info['z']:.3g}", refresh=False)
            bar.update()
            return None if callback is None else callback(info)

        yield show


def _check_options(solver: str | SolverFunction, options: Mapping[str, object]) -> None:
    """Raises TypeError unless the solver takes these options."""
    chosen = as_solver(solver)
    parameters = inspect.signature(chosen.function).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return  # it takes any, such as a functools.wraps or a partial of another function
    for name, value in options.items():
        if name not in chosen.options or (name in _GIVEN and not callable(value)):
            own = ", ".join(each for each in chosen.options if each not in _GIVEN) or "none"
            raise TypeError(
                f"solver {solver!r} takes no option {name!r}; its options are: {own}"
                f"{hint(name, SampleOptions.__annotations__)}."
            )


def _warn_of_long_steps(solver: str | SolverFunction, grid: Sequence[float]) -> None:
    """Warn the caller of ``sample`` if a step other than the last is too long for the solver."""
    longest = max(pairwise(grid[:-1]), key=lambda ends: ends[0] / ends[1], default=(1.0, 1.0))
    if longest[0] > as_solver(solver).longest_step * longest[1]:
        warnings.warn(
            f"{solver} takes a step from level {longest[0]:.3g} to {longest[1]:.3g}, which is too "
            f"long for it: {len(grid) - 1} steps are too few. multistep, with as many evaluations, "
            "gives better samples.",
            stacklevel=3,
        )


def _checked_levels(levels: Sequence[float]) -> list[float]:
    """The levels as a list. Raises ValueError unless they are finite and at least 0."""
    grid = []
    for level in levels:
        number = as_number(level)
        if not 0 <= number <= LARGEST:
            raise ValueError(f"grid must hold finite levels of at least 0, got {level!r}.")
        grid.append(float(number))
    return grid


def checked_grid(levels: Sequence[float]) -> list[float]:
    """The levels as a list. Raises ValueError unless they are decreasing and above 0."""
    if not isinstance(levels, Iterable):
        raise ValueError(
            f"schedule must be one of {', '.join(SCHEDULES)}, fitted, or levels, got {levels!r}."
        )
    grid = [float(as_number(level)) for level in levels]
    inner = grid[:-1]
    if len(grid) < 2 or not all(0 < level < math.inf for level in inner) or not grid[-1] >= 0:
        raise ValueError(
            "schedule must be two or more finite levels above 0, of which the last may be 0, got "
            f"{grid}."
        )
    for i, (level, after) in enumerate(pairwise(grid)):
        if not after < level:
            raise ValueError(
                f"schedule is not decreasing: {after} at index {i + 1} follows {level}."
            )
    return grid
