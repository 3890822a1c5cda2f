"""``pfgm check``: a report on the backends. It stores a pass, and nothing else.

Each backend computes all its trials in one child process, which has a budget of time; this process
computes the exact results on the CPU, and makes no context on a GPU. A backend that crashes or
hangs there is a row of the table.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.devices import known_device
from . import passes, triton
from .backend import BACKENDS
from .timing import seconds_of
from .trials import EXACT, SIZES, TRIALS, Place, Results, allowed
from .worker import Lost, failure_of, sender, values_of

_ORDER = ("torch", "reference", "native", "triton")
_CONTENDERS = ("plain torch", "compiled TF32")  # times alone
# The problem at which native must not be slower than torch, to pass on a GPU.
_DECIDES = "CIFAR-10, 128 × 4096 × 3072"
_EQUAL_ERRORS = 2  # after so many equal exceptions the turn of a backend ends


class Row(NamedTuple):
    """What a backend did with one problem."""

    backend: str
    problem: str
    error: float | None = None
    """The largest error, if it is a number."""
    allowed: float | None = None
    """The largest error that is allowed, or None if there is no result, or it is a time."""
    seconds: float | None = None
    """The time of a call, of problems that are timed."""
    speed: float | None = None
    """How many times as fast as the backend torch, timed in turns."""
    failure: str | None = None
    """What went wrong, in a sentence; None if nothing did."""


class Report(NamedTuple):
    """The result of :func:`check`. Its text is a table."""

    device: str
    """The device, its name, and the versions that matter."""
    backends: dict[str, str | None]
    """Name → None, or why the backend cannot run."""
    rows: list[Row]
    stored: tuple[str, ...] = ()
    """What became of the passes on a GPU, in sentences."""

    @property
    def failures(self) -> list[Row]:
        """The rows of backends that failed."""
        return [row for row in self.rows if row.failure and row.backend in BACKENDS]

    @property
    def passed(self) -> tuple[str, ...]:
        """The backends that were checked and of which no row failed."""
        failed = {row.backend for row in self.failures}
        return tuple(n for n, why in self.backends.items() if why is None and n not in failed)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        rows = [row._asdict() for row in self.rows]
        return self._asdict() | {"rows": rows, "passed": self.passed}

    def __str__(self) -> str:
        names = [name for name, why in self.backends.items() if why is None]
        names += sorted({row.backend for row in self.rows} & set(_CONTENDERS), reverse=True)
        cells: dict[str, dict[str, str]] = {}
        for row in self.rows:
            cells.setdefault(row.problem, {})[row.backend] = _cell(row)
        lines = [self.device, "", _line("error / bound, or time and speed beside torch", names)]
        lines += [_line(p, [row.get(name, "-") for name in names]) for p, row in cells.items()]
        lines.append("")
        lines += [f"{name} cannot run: {why}" for name, why in self.backends.items() if why]
        lines += [f"FAILED: {r.backend}, {r.problem}: {r.failure}" for r in self.rows if r.failure]
        return "\n".join([*lines, f"passed: {', '.join(self.passed) or 'none'}", *self.stored])


def _line(first: str, cells: list[str]) -> str:
    return (f"{first:48}" + "".join(f"{cell:20}" for cell in cells)).rstrip()


def _cell(row: Row) -> str:
    if row.failure is not None:
        return "FAILED"
    if row.seconds is None:
        return f"{row.error:.1e} / {row.allowed:.0e}"
    return f"{1e3 * row.seconds:.3g} ms" + (f", {row.speed:.2f}×" if row.speed else "")


def serve(backend: str, name: str, exact: str) -> None:
    """Computes and times the problems of a backend; the exact results are in a file.

    Sends what is known of the device, and then the name and the row of each problem.
    """
    send = sender()
    device = torch.empty(0, device=name).device  # with an index
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        ours = backend in BACKENDS
        why = BACKENDS[backend].supports(device, torch.float32) if ours else None
        send({"title": _title(device), "kind": passes.kind_of(device), "unable": why})
        failures: list[str] = []
        for row in [] if why else _turn(backend, device, exact):
            _, problem, *_ = row.args
            send(problem)
            try:
                send(row())
            except Exception as error:
                failures.append(failure_of(error))
                send(Row(backend, problem, failure=failures[-1]))
                if failures.count(failures[-1]) == _EQUAL_ERRORS:
                    return


def _turn(backend: str, device: torch.device, exact: str) -> Iterator[functools.partial[Row]]:
    """What computes the row of each problem, by the name of the backend and the problem."""
    if backend in BACKENDS:
        place = Place(BACKENDS[backend], device, torch.float32)
        for name, wanted in torch.load(exact, weights_only=True).items():
            if TRIALS[name].applies(backend, device):
                yield functools.partial(_compared, backend, name, place, wanted)
    for name in list(SIZES)[: 1 if backend == "reference" else None]:  # it is not made for speed
        yield functools.partial(_timed, backend, name, device)


def _compared(backend: str, name: str, place: Place, exact: Results) -> Row:
    """The worst result of a trial, relative to its bound."""
    errors = TRIALS[name].errors(place, exact)
    worst = max(errors, key=lambda each: (math.isnan(errors[each]), errors[each] / allowed(each)))
    error, bound = errors[worst], allowed(worst)
    failure = None if error <= bound else f"{worst} is off by {error:.1e}; allowed is {bound:.1e}"
    return Row(backend, name, error if math.isfinite(error) else None, bound, failure=failure)


def _timed(backend: str, name: str, device: torch.device) -> Row:
    own, *others = seconds_of(name, backend, device)
    return Row(backend, name, seconds=own, speed=others[0] / own if others else None)


def _beside(row: Row, other: float | None) -> Row:
    """A row with its speed beside torch, whose seconds are given, where both were not timed in one
    process."""
    if row.seconds is None or row.speed is not None or other is None:
        return row
    return row._replace(speed=other / row.seconds)


def _title(device: torch.device) -> str:
    """A device and what else results depend on, in a line."""
    more = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    driver = f"driver {passes.driver()}, " if device.type == "cuda" else ""
    return f"{device}: {passes.kind_of(device)}, {driver}{more}, Triton {triton.installed()}"


def _answers(
    backend: str, device: str, exact: str, seconds: float
) -> tuple[dict[str, Any], list[Row]]:
    """What the process of a backend knows of the device, and its rows."""
    about, rows, problem = {}, [], "start"
    code = f"from pfgm.backends.checking import serve; serve{backend, device, exact}"
    try:
        for value in values_of(code, seconds):
            if isinstance(value, Row):
                rows.append(value)
            elif isinstance(value, str):
                problem = value
            else:
                about = value
    except Lost as lost:
        rows.append(Row(backend, problem, failure=str(lost)))
    return about, rows


def _decide(kind: str, rows: list[Row]) -> str:
    """Stores a pass of native, or takes it away after a wrong result. Returns what it did."""
    where = f"native on {kind}"
    speed = next((row.speed for row in rows if row.problem == _DECIDES and row.speed), None)
    try:
        if any(row.failure and row.allowed is not None for row in rows):
            passes.take_away(kind)
            return f"{where} has no pass, as a result is wrong."
        if any(row.failure for row in rows) or speed is None:
            return f"No pass of {where} is stored, as not all was computed."
        if speed < 1:
            return f"No pass of {where} is stored, as torch is faster at {_DECIDES}."
        passes.store(kind)
    except OSError as error:
        return f"The pass of {where} cannot be changed ({error}); PFGM_BACKEND names a backend."
    return f"The pass of {where} is stored."


def check(
    device: torch.device | str = "auto",
    *,
    seconds: float = 180.0,
    report: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs a fixed set of problems through each backend that can compute on a device.

    Results are compared with float64 on the CPU, and times with the backend torch, plain torch and
    its compiled TF32. On a GPU a pass is stored for native where every result is right and the mean
    at 128 × 4096 × 3072 is not slower than torch's; a wrong result takes it away. Where native has
    a pass, it computes (docs/backends.md).

    Args:
        device: the device; "auto" is cuda if there is a GPU, else cpu.
        seconds: the time that each backend has.
        report: called with lines of text about the progress.

    Raises:
        ValueError: there is no such device.

    >>> print(check("cpu"))  # doctest: +SKIP
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = known_device(device, "auto")
    on_gpu = place.type == "cuda"
    title, reasons = str(place), {}
    rows: list[Row] = []
    stored: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        report("exact results")
        exact = str(Path(folder) / "exact.pt")
        torch.save({name: trial.results(EXACT) for name, trial in TRIALS.items()}, exact)
        for backend in (*_ORDER, *_CONTENDERS[: 1 + on_gpu]):
            report(f"{backend} on {place}")
            about, own = _answers(backend, str(place), exact, seconds)
            title = about.get("title", title)
            seconds_of_torch = {row.problem: row.seconds for row in rows if row.backend == "torch"}
            rows += [_beside(row, seconds_of_torch.get(row.problem)) for row in own]
            if backend in BACKENDS:
                reasons[backend] = about.get("unable")
            if on_gpu and backend == "native" and about and not about["unable"]:
                stored = (_decide(about["kind"], own),)
    return Report(title, reasons, rows, stored)
