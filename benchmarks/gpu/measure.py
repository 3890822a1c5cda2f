"""Measures subjects within a budget. A path that fails does not stop the others."""

from __future__ import annotations

import functools
import math
import os
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks.common.turns import Call, host_seconds, take_turns
from benchmarks.gpu.clock import (
    Budget,
    Device,
    call_all,
    graph_of,
    quantiles,
)
from benchmarks.gpu.subjects import Paths, Subject, Way

LOST = 3  # status of a process that lost the device; another process can continue
PATIENCE = 60.0  # seconds beyond twice its estimate after which a subject hangs


class Row(NamedTuple):
    """The measurements of one path."""

    subject: str
    path: str
    """"all" if the whole subject failed."""
    seconds: dict[str, float]
    """Quantiles of the time of a call."""
    graph: dict[str, float]
    """The same of a call within a CUDA graph."""
    host: float
    """Seconds that the host takes for a call."""
    errors: dict[str, float]
    failure: str
    moved: int = 0
    """The least bytes to read and write; 0 if no floor is computed."""


def attempt(action: Callable[[], Any], failures: list[str]) -> Any:
    """The action's result, or None with the exception among the failures.

    A GPU is rarely available, so the rest of the run must go on.
    """
    try:
        return action()
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return None


def prepare(paths: Paths, device: Device, failures: dict[str, list[str]]) -> dict[str, Way]:
    """The ways that run. Their first calls include compilation.

    Waits for the device after each way, so that an error on the device is noted for that way.
    """

    def run(path: Way) -> None:
        call_all(path.calls)
        device.wait()

    ready = {}
    for name, build in paths.items():
        failures[name] = []
        path = attempt(build, failures[name])
        if path is not None:
            attempt(functools.partial(run, path), failures[name])
            if not failures[name]:
                ready[name] = path
    return ready


def graph_times(
    ready: dict[str, Way], device: Device, rounds: int, failures: dict[str, list[str]]
) -> dict[str, list[float]]:
    """Seconds of a call within a graph, which holds one call for each copy of the inputs."""
    captured = {
        name: graph
        for name, path in ready.items()
        if device.real and path.capturable
        if (graph := attempt(functools.partial(graph_of, path.calls), failures[name]))
    }
    seconds = take_turns({name: [graph] for name, graph in captured.items()}, device.clock, rounds)
    return {name: [t / len(ready[name].calls) for t in times] for name, times in seconds.items()}


def measure(subject: Subject, device: Device, rounds: int) -> list[Row]:
    """Measures all paths of a subject."""
    failures: dict[str, list[str]] = {}
    torch._dynamo.reset()
    if device.real:
        torch.cuda.empty_cache()
    ready = prepare(subject.paths(device), device, failures)
    times = take_turns({name: path.calls for name, path in ready.items()}, device.clock, rounds)
    errors = {
        name: attempt(path.errors, failures[name]) for name, path in ready.items() if path.errors
    }
    host = {name: statistics.median(host_times(path.calls, device)) for name, path in ready.items()}
    graphs = graph_times(ready, device, rounds, failures)
    return [
        Row(
            subject.name,
            name,
            quantiles(times[name]) if name in times else {},
            quantiles(graphs[name]) if name in graphs else {},
            host.get(name, math.nan),
            errors.get(name) or {},
            "; ".join(reasons),
            ready[name].moved if name in ready else 0,
        )
        for name, reasons in failures.items()
    ]


def host_times(calls: list[Call], device: Device) -> list[float]:
    """Seconds of the host for a call, without waiting for the device."""
    seconds = []
    for call in calls[:8]:
        seconds.append(host_seconds(call))
        device.wait()
    return seconds


def run_subjects(
    chosen: list[Subject],
    device: Device,
    budget: Budget,
    rounds: int | None = None,
    keep: Callable[[list[Row], list[str]], None] = lambda rows, left_out: None,
) -> tuple[list[Row], list[str]]:
    """Measures subjects, and returns the rows and the names of the subjects left out.

    Leaves out subjects that do not fit the budget, and all subjects after the device was lost
    (:func:`lost`). After each subject it calls ``keep`` with the results so far.
    """
    rows: list[Row] = []
    left_out: list[str] = []
    for subject in chosen:
        if not budget.allows(subject.estimate) or lost(device):
            left_out.append(subject.name)
            keep(rows, left_out)
            continue
        print(f"{subject.name} ({budget.left():.0f} s left)", flush=True)
        failures: list[str] = []
        run = functools.partial(measure, subject, device, rounds or subject.rounds)
        with ended_after(2 * subject.estimate + PATIENCE):
            measured = attempt(run, failures)
        rows += measured or [Row(subject.name, "all", {}, {}, math.nan, {}, "; ".join(failures))]
        keep(rows, left_out)
    return rows, left_out


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Ends this process if the block takes longer, as with a kernel that never ends."""
    timer = threading.Timer(seconds, os._exit, [LOST])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def lost(device: Device) -> bool:
    """Whether no kernel can run in this process any more, as after an illegal memory access."""
    failures: list[str] = []
    attempt(device.wait, failures)
    return bool(failures)


def implementation(path: str) -> str:
    """The implementation that a path uses: "cuda" of "cuda, uint8"."""
    return path.split(", ")[0]


def suspect(rows: list[Row], ours: tuple[str, ...]) -> str:
    """The implementation that probably broke the device: the first to fail in the last subject."""
    for row in rows:
        if row.subject == rows[-1].subject and row.failure and implementation(row.path) in ours:
            return implementation(row.path)
    return ours[-1] if ours else "torch"
