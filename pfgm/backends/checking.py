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

from ..common.checks import known_device
from . import passes, triton
from .backend import BACKENDS
from .trials import EXACT, SIZES, TRIALS, Place, Results, error_of, name_of, seconds_of
from .worker import Lost, failure_of, sender, values_of

_ORDER = ("torch", "reference", "native", "triton")
_CONTENDERS = ("plain torch", "compiled TF32")  # times alone
_KERNELS = ("native", "triton")  # which take passes on a GPU
# The problem at which a backend must not be slower than torch, to pass on a GPU.
_DECIDES = f"CIFAR-10, {name_of(SIZES['CIFAR-10'])}"
_EQUAL_ERRORS = 2  # after so many equal exceptions the turn of a backend ends
_TIMING = 2.0  # seconds


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
        """All of it, as JSON can hold it. The failure of a row says where its error is NaN."""
        finite = [
            r if r.error is None or math.isfinite(r.error) else r._replace(error=None)
            for r in self.rows
        ]
        return self._asdict() | {"rows": [r._asdict() for r in finite], "passed": self.passed}

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
        lines += [_failed(row) for row in self.rows if row.failure]
        return "\n".join([*lines, f"passed: {', '.join(self.passed) or 'none'}", *self.stored])


def _line(first: str, cells: list[str]) -> str:
    return (f"{first:48}" + "".join(f"{cell:20}" for cell in cells)).rstrip()


def _failed(row: Row) -> str:
    return f"FAILED: {row.backend}, {row.problem}: {row.failure}"


def _cell(row: Row) -> str:
    if row.failure is not None:
        return "FAILED"
    if row.seconds is None:
        return f"{row.error:.1e} / {row.allowed:.0e}"
    return f"{1e3 * row.seconds:.3g} ms" + (f", {row.speed:.2f}×" if row.speed else "")


# ---- in the child process ----------------------------------------------------------------------


def serve(backend: str, name: str, folder: str) -> None:
    """Computes the trials of a backend, and times it.

    Sends messages (what, problem, value): "doing" before each problem, then "result" with a file,
    "seconds" with times, or "failure" with a reason; before all else what is known of the device.
    """
    send = sender()
    device = torch.empty(0, device=name).device  # with an index
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        reason = None
        if backend in BACKENDS:
            reason = BACKENDS[backend].supports(device, torch.float32)
        send(["about", "title", _title(device)])
        send(["about", "kind", passes.kind_of(device)])
        send(["about", "unable", reason])
        failures: list[str] = []
        for what, problem, compute in [] if reason else _turn(backend, device, Path(folder)):
            send(["doing", problem, None])
            try:
                send([what, problem, compute()])
            except Exception as error:
                failures.append(failure_of(error))
                send(["failure", problem, failures[-1]])
                if failures.count(failures[-1]) == _EQUAL_ERRORS:
                    return


def _turn(
    backend: str, device: torch.device, folder: Path
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """What to send of which problem, and what computes it."""
    for number, (name, trial) in enumerate(TRIALS.items()):
        if backend in BACKENDS and trial.applies(backend, device):
            place, path = Place(BACKENDS[backend], device, torch.float32), folder / f"{number}.pt"
            yield "result", name, functools.partial(_saved, trial.compute, place, path)
    for name, sizes in SIZES.items():
        if backend != "reference" or name == "digits":  # it is not made for speed
            compute = functools.partial(seconds_of, sizes, backend, device, _TIMING)
            yield "seconds", f"{name}, {name_of(sizes)}", compute


def _saved(compute: Callable[[Place], Results], place: Place, path: Path) -> str:
    torch.save({name: result.cpu() for name, result in compute(place).items()}, path)
    return str(path)


def _title(device: torch.device) -> str:
    """A device and what else results depend on, in a line."""
    threads = torch.get_num_threads()
    more = f"driver {passes.driver()}" if device.type == "cuda" else f"{threads} threads"
    versions = f"torch {torch.__version__}, Triton {triton.installed()}"
    return f"{device}: {passes.kind_of(device)}, {more}, {versions}"


# ---- in this process ---------------------------------------------------------------------------


@functools.cache
def _exact(name: str) -> Results:
    return TRIALS[name].compute(EXACT)


def _trial_row(backend: str, name: str, path: str) -> Row:
    """The worst result of a trial, relative to its bound."""
    results = torch.load(path, weights_only=True)
    Path(path).unlink()
    worst, error, allowed = "", 0.0, 1.0
    for each, wanted in _exact(name).items():
        own, bound = (
            error_of(each, results[each].double(), wanted.double()),
            TRIALS[name].allowed(each),
        )
        if not own / bound <= error / allowed or not worst:
            worst, error, allowed = each, own, bound
        if math.isnan(error):
            break
    failure = None
    if not error <= allowed:
        failure = f"{worst} is off by {error:.1e}; allowed is {allowed:.1e}"
    return Row(backend, name, error, allowed, failure=failure)


def _rows(backend: str, device: str, seconds: float, about: dict[str, str | None]) -> Iterator[Row]:
    """The rows of one backend. What its process knows of the device goes to ``about``."""
    problem = "start"
    with tempfile.TemporaryDirectory() as folder:
        try:
            for what, problem, value in values_of(_code(backend, device, folder), seconds):
                if what == "about":
                    about[problem] = value
                elif what == "failure":
                    yield Row(backend, problem, failure=value)
                elif what == "seconds":
                    yield Row(backend, problem, seconds=value[0], speed=value[1] / value[0])
                elif what == "result":
                    yield _trial_row(backend, problem, value)
        except Lost as lost:
            yield Row(backend, problem, failure=str(lost))


def _code(backend: str, device: str, folder: str) -> str:
    return f"from pfgm.backends.checking import serve; serve({backend!r}, {device!r}, {folder!r})"


def _decide(backend: str, kind: str, rows: list[Row]) -> str:
    """Stores a pass, or takes it away after a wrong result. Returns what it did."""
    where = f"{backend} on {kind}"
    speed = next((row.speed for row in rows if row.problem == _DECIDES and row.speed), None)
    try:
        if any(row.failure and row.error is not None for row in rows):
            passes.take_away(kind, backend)
            return f"{where} has no pass, as a result is wrong."
        if any(row.failure for row in rows) or speed is None:
            return f"No pass of {where} is stored, as not all was computed."
        if speed < 1:
            return f"No pass of {where} is stored, as torch is faster at {_DECIDES}."
        passes.store(kind, backend)
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
    its compiled TF32. On a GPU a pass is stored for native and triton where every result is right
    and the mean at 128 × 4096 × 3072 is not slower than torch's; a wrong result takes it away.
    Where native has a pass, it computes (docs/backends.md).

    Args:
        device: the device; "auto" is cuda if there is a GPU, else cpu.
        seconds: the time that each backend has.
        report: called with lines of text about the progress and failures.

    Raises:
        ValueError: there is no such device.

    >>> print(check("cpu"))  # doctest: +SKIP
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = known_device(device, "auto")
    on_gpu = place.type == "cuda"
    about: dict[str, str | None] = {"title": str(place)}
    reasons: dict[str, str | None] = {}
    rows: list[Row] = []
    stored: list[str] = []
    for backend in (*_ORDER, *_CONTENDERS[: 1 + on_gpu]):
        report(f"{backend} on {place}")
        first, about["unable"] = len(rows), None
        for row in _rows(backend, str(place), seconds, about):
            rows.append(row)
            if row.failure is not None:
                report(_failed(row))
        if backend in BACKENDS:
            reasons[backend] = about["unable"]
        if on_gpu and backend in _KERNELS and not about["unable"] and (kind := about.get("kind")):
            stored.append(_decide(backend, kind, rows[first:]))
    return Report(str(about["title"]), reasons, rows, tuple(stored))
