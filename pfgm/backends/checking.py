"""``pfgm check``: runs fixed problems through the backends, compares and times them.

Everything is computed in a child process with a time limit. A backend that crashes or hangs there
is a row of the table, and a GPU's error does not outlast that process.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..common.checks import usable_device
from . import verdicts
from .backend import BACKENDS
from .trials import TRIALS, errors, name_of, seconds_in_turns
from .verdicts import SIZES, Verdict
from .worker import Answer, Worker

# The proven ones first: no kernel of another backend has run in their process.
_ORDER = ("torch", "reference", "triton", "native")
_LIMIT = 120.0  # seconds for a task, in which many kernels may be compiled
_LOSSES = 2  # processes that a backend may lose
_TURNS = {True: 0.5, False: 3.0}  # seconds for a timing, in a quick check and in a whole one


class Row(NamedTuple):
    """What a backend did with one problem."""

    backend: str
    problem: str
    error: float | None = None
    """The largest error, or None if there is no result or it was a timing."""
    allowed: float | None = None
    """The largest error that is allowed."""
    seconds: float | None = None
    """The time of a call, of problems that are timed."""
    speed: float | None = None
    """How many times as fast as plain torch, timed in turns."""
    failure: str | None = None
    """What went wrong, in a sentence; None if nothing did."""


class Report(NamedTuple):
    """The result of :func:`check`. Its text is a table."""

    device: str
    """The device, its name, and the versions that matter."""
    backends: dict[str, str | None]
    """Name → None, or why the backend cannot run."""
    rows: list[Row]
    quick: bool
    kept: str | None = None
    """Where the verdict is kept, or why it is not; None on devices without one."""

    @property
    def failures(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.failure is not None]

    @property
    def passed(self) -> tuple[str, ...]:
        """The backends that were checked and of which no row failed."""
        failed = {row.backend for row in self.failures}
        return tuple(n for n, why in self.backends.items() if why is None and n not in failed)

    @property
    def verdict(self) -> Verdict:
        """What the choice of the backend needs to know."""
        failures = {row.backend: f"{row.problem}: {row.failure}" for row in reversed(self.failures)}
        speeds: dict[str, dict[str, float]] = {size: {} for size in SIZES}
        for row in self.rows:
            if row.speed is not None:
                speeds[row.problem][row.backend] = row.speed
        return Verdict(self.passed, failures, speeds, self.quick)

    def _failure_lines(self) -> list[str]:
        """What failed. Problems of a backend that were not run for one reason share a line."""
        lines = []
        for (backend, why), rows in itertools.groupby(
            self.failures, lambda row: (row.backend, row.failure)
        ):
            problems = [row.problem for row in rows]
            what = problems[0] if len(problems) == 1 else f"{len(problems)} problems"
            lines.append(f"FAILED: {backend}, {what}: {why}")
        return lines

    def __str__(self) -> str:
        names = [name for name, why in self.backends.items() if why is None]
        lines = [self.device]
        timings = {name: f"{name}, {name_of(sizes)}" for name, sizes in SIZES.items()}
        for title, are_times in ((_ERRORS, False), (_TIMES, True)):
            cells: dict[str, dict[str, str]] = {}
            for row in self.rows:
                if (row.problem in timings) == are_times:
                    problem = timings.get(row.problem, row.problem)
                    cells.setdefault(problem, {})[row.backend] = _cell(row)
            if cells:
                lines += ["", _line(title, names)]
            lines += [_line(p, [row.get(name, "-") for name in names]) for p, row in cells.items()]
        lines.append("")
        lines += [f"{name} cannot run: {why}" for name, why in self.backends.items() if why]
        lines += self._failure_lines()
        lines.append(f"passed: {', '.join(self.passed) or 'none'}")
        return "\n".join([*lines, *([self.kept] if self.kept else [])])


_NOTHING = (
    "There is no verdict, as nothing was computed: the GPU may be busy, or have no free memory."
)
_NOT_RUN = "not run"
_ERRORS, _TIMES = "largest error", "time, and speed beside plain torch"


def _line(first: str, cells: list[str]) -> str:
    return (f"{first:56}" + "".join(f"{cell:18}" for cell in cells)).rstrip()


def _cell(row: Row) -> str:
    if row.failure is not None:
        return "not run" if row.failure.startswith(_NOT_RUN) else "FAILED"
    if row.seconds is None:
        return f"{row.error:.1e}"
    ms = 1e3 * row.seconds
    return f"{ms:.{0 if ms >= 100 else 3}{'f' if ms >= 100 else 'g'}} ms, {row.speed:.2f}×"


# ---- in the child process ----------------------------------------------------------------------


def answer(task: list[Any]) -> Any:
    """Errors of a trial by result, or the seconds of a timing."""
    kind, name, backend, device, *rest = task
    if kind == "trial":
        return errors(name, backend, torch.device(device))
    return seconds_in_turns(SIZES[name], backend, torch.device(device), *rest)


def _code(device: torch.device) -> str:
    lasting = device.type != "cuda"  # after an error, a GPU may answer nothing any more
    return f"from pfgm.backends import checking, worker; worker.serve(checking.answer, {lasting})"


# ---- in the process that asks ------------------------------------------------------------------


class _Asker:
    """Asks for one backend, until it has lost too many processes or time is up."""

    def __init__(
        self, worker: Worker, backend: str, device: torch.device, seconds: float, end: float
    ) -> None:
        self._ask, self._backend, self._device = worker.ask, backend, str(device)
        self._seconds, self._end, self._losses = seconds, end, 0

    def __call__(self, kind: str, name: str, *rest: float) -> Answer:
        left = self._end - time.monotonic()
        if left <= 0:
            return Answer(failure=f"{_NOT_RUN}: the check has taken {self._seconds:.0f} s")
        if self._losses >= _LOSSES:
            return Answer(failure=f"{_NOT_RUN}, after {_LOSSES} lost processes")
        answer = self._ask([kind, name, self._backend, self._device, *rest], min(_LIMIT, left))
        self._losses += answer.lost
        return answer


def _trial_row(ask: _Asker, backend: str, name: str) -> Row:
    value, failure, _ = ask("trial", name)
    if failure is not None:
        return Row(backend, name, failure=failure)
    allowed = {result: TRIALS[name].allowed(result) for result in value}

    def excess(result: str) -> float:
        error: float = value[result] / allowed[result]
        return math.inf if math.isnan(error) else error

    worst = max(value, key=excess)
    failure = None
    if excess(worst) > 1:
        failure = f"{worst} is off by {value[worst]:.1e}; allowed is {allowed[worst]:.1e}"
    return Row(backend, name, value[worst], allowed[worst], failure=failure)


def _timing_row(ask: _Asker, backend: str, name: str, quick: bool) -> Row:
    value, failure, _ = ask("timing", name, _TURNS[quick])
    if failure is not None:
        return Row(backend, name, failure=failure)
    own, plain = value
    return Row(backend, name, seconds=own, speed=plain / own)


def _rows(
    names: list[str],
    device: torch.device,
    quick: bool,
    seconds: float,
    report: Callable[[str], None],
) -> Iterator[Row]:
    end = time.monotonic() + seconds
    trials = [name for name, trial in TRIALS.items() if trial.quick or not quick]
    sizes = [name for name in SIZES if not (quick and name == "Fashion-MNIST")]
    with Worker(_code(device)) as worker:
        askers = {name: _Asker(worker, name, device, seconds, end) for name in names}
        failed = set()
        for backend, ask in askers.items():
            report(f"{backend} on {device}: results")
            for trial in trials:
                if TRIALS[trial].applies(backend, device):
                    row = _trial_row(ask, backend, trial)
                    failed |= {backend} if row.failure else set()
                    yield row
        for backend, ask in askers.items():
            report(f"{backend} on {device}: times")
            for size in sizes if backend not in failed else ():
                if backend != "reference" or size == "digits":  # it is not made for speed
                    yield _timing_row(ask, backend, size, quick)


def check(
    device: torch.device | str = "auto",
    *,
    quick: bool = False,
    seconds: float = 300.0,
    report: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs a fixed set of problems through each backend that can compute on a device.

    Results are compared with float64 on the CPU, and times with plain torch. On a GPU the verdict
    is kept in the user's cache folder, and decides which backend computes there from now on
    (docs/backends.md).

    Args:
        device: the device; "auto" is cuda if there is a GPU, else cpu.
        quick: fewer problems.
        seconds: after which what is left is not run, and has not passed.
        report: called with lines of text about the progress, failures and times.

    Raises:
        ValueError: there is no such device, or it cannot be used.

    >>> print(check("cpu", quick=True))  # doctest: +SKIP
    """
    place = torch.empty(0, device=usable_device(str(device))).device  # with an index
    reasons = {name: BACKENDS[name].supports(place, torch.float32) for name in _ORDER}
    able = [name for name, reason in reasons.items() if reason is None]
    rows = []
    for row in _rows(able, place, quick, seconds, report):
        rows.append(row)
        if row.failure is not None and not row.failure.startswith(_NOT_RUN):
            report(f"FAILED: {row.backend}, {row.problem}: {row.failure}")
        elif row.seconds is not None:
            report(f"{row.backend}, {name_of(SIZES[row.problem])}: {_cell(row)}")
    result = Report(verdicts.title(place), reasons, rows, quick)
    if place.type != "cuda":
        return result
    # That torch itself is wrong is a verdict too.
    torch_is_wrong = any(row.failure and row.error for row in result.rows if row.backend == "torch")
    if not result.passed and not torch_is_wrong:
        return result._replace(kept=_NOTHING)
    return result._replace(kept=verdicts.keep(place, result.verdict))
