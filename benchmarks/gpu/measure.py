"""Measures subjects within a budget: a path that fails costs only itself."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
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


class Row(NamedTuple):
    subject: str
    path: str
    seconds: dict[str, float]
    graph: dict[str, float]
    host: float
    errors: dict[str, float]
    failure: str
    moved: int = 0


def attempt(action: Callable[[], Any], failures: list[str]) -> Any:
    """None where it raises: the run is not to be had again soon, the rest of it still counts."""
    try:
        return action()
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return None


def prepare(paths: Paths, device: Device, failures: dict[str, list[str]]) -> dict[str, Way]:
    """Those that run; the first call of each compiles what is compiled. What goes wrong on the
    device is that path's, not the next one's."""

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
    """Seconds of a call within a graph that holds one call for each copy."""
    captured = {
        name: graph
        for name, path in ready.items()
        if device.real and path.capturable
        if (graph := attempt(functools.partial(graph_of, path.calls), failures[name]))
    }
    found = take_turns({name: [graph] for name, graph in captured.items()}, device.clock, rounds)
    return {name: [t / len(ready[name].calls) for t in times] for name, times in found.items()}


def measure(subject: Subject, device: Device, rounds: int) -> list[Row]:
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
            "; ".join(found),
            ready[name].moved if name in ready else 0,
        )
        for name, found in failures.items()
    ]


def host_times(calls: list[Call], device: Device) -> list[float]:
    """What the host takes for a call, without waiting for the device."""
    found = []
    for call in calls[:8]:
        found.append(host_seconds(call))
        device.wait()
    return found


def run_subjects(
    chosen: list[Subject],
    device: Device,
    budget: Budget,
    rounds: int | None = None,
    keep: Callable[[list[Row], list[str]], None] = lambda rows, left_out: None,
) -> tuple[list[Row], list[str]]:
    """Rows, and the names of the subjects that the budget left out; ``keep`` gets those so far.

    A device on which something went wrong for good (:func:`lost`) ends it, all else left out.
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
        found = attempt(run, failures)
        rows += found or [Row(subject.name, "all", {}, {}, math.nan, {}, "; ".join(failures))]
        keep(rows, left_out)
    return rows, left_out


def lost(device: Device) -> bool:
    """After an illegal access by one kernel no other can run in this process."""
    failures: list[str] = []
    attempt(device.wait, failures)
    return bool(failures)


def implementation(path: str) -> str:
    """Whose path it is: "cuda" of "cuda, uint8"."""
    return path.split(", ")[0]


def suspect(rows: list[Row], ours: tuple[str, ...]) -> str:
    """Whose kernels seem to have broken the device: the first to fail in the last subject."""
    for row in rows:
        if row.subject == rows[-1].subject and row.failure and implementation(row.path) in ours:
            return implementation(row.path)
    return ours[-1]
