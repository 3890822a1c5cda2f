"""Tests and times the operations on a GPU, from a bare checkout, in one command of a few minutes.

    python -m benchmarks.gpu --out DIR [--budget 480] [--skip-tests] [--fashion-mnist FOLDER]

Needs torch, Triton, scikit-learn with Pillow, pytest and what the tests import, but neither an
installed pfgm nor a network: the package is put together in a temporary folder and nothing in the
checkout is written. Runs tests/triton, then times each operation beside plain torch, the published
formula and a copy on the device. results.json and the logs come to lie in DIR, and a short table is
printed last.

- Times are the device's own, between two events. The L2 cache is overwritten before each call, each
  call takes the next of several copies of its inputs, and the paths of a subject take turns. The
  device is kept busy while a call is prepared, so that what Python takes does not count; "host" is
  what it takes. A "graph" is a CUDA graph of one call with each copy, replayed, by the call.
- Errors are the worst row's against exact differences in float64, in the terms of the accuracy
  contract. For many queries they are those of a sample of rows.
- Subjects that no longer fit the budget are left out, and named.

``--dry`` runs small subjects without a GPU, in Triton's interpreter, to see that everything works.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import machine  # noqa: E402
import posterior_paths  # noqa: E402
import subjects  # noqa: E402
from report import seconds as as_text  # noqa: E402
from report import table  # noqa: E402
from roofline import STEP_TENSORS  # noqa: E402
from subjects import Case  # noqa: E402

import pfgm  # noqa: E402
from pfgm.backends.reference import normalised_field  # noqa: E402

Call = Callable[[], Any]
Clock = Callable[[Call], float]
GAMMA = 5.0
SAMPLE = 256  # rows whose error is looked at
OURS = "triton"
CYCLES = 2e9  # a second, at least


# ---- time -------------------------------------------------------------------------------------


class Budget:
    """Seconds that may be spent, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def allows(self, estimate: float) -> bool:
        return estimate <= self.left()


class Device(NamedTuple):
    """Where things are measured: by its own clock, or as a dry run by the host's."""

    name: str
    clock: Clock
    cache: int
    """Bytes of the L2 cache."""

    @property
    def real(self) -> bool:
        return self.name == "cuda"

    def copies(self, size: int) -> int:
        """How many inputs of so many bytes are twice what the cache holds."""
        return min(max(2, -(-2 * self.cache // size)), 256)

    def compiled(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        backend = "inductor" if self.real else "eager"
        return torch.compile(function, dynamic=False, backend=backend)


def gpu() -> Device:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Device("cuda", event_clock(2 * cache), cache)


def dry() -> Device:
    return Device("cpu", host_seconds, 0)


def event_clock(flushed: int) -> Clock:
    """Seconds between two events around a call, ``flushed`` bytes written before."""
    buffer = torch.empty(flushed, dtype=torch.uint8, device="cuda")
    waits: dict[Call, float] = {}

    def once(call: Call, wait: float) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        torch.cuda._sleep(int(wait * CYCLES))
        start.record()
        host = host_seconds(call)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3, host

    def seconds(call: Call) -> float:
        # The device sleeps while the host runs ahead; a call that itself waits cannot be outrun.
        for _ in range(3):
            wait = waits.setdefault(call, 5e-4)
            device, host = once(call, wait)
            if host < wait:
                break
            waits[call] = min(2 * host, 0.05)
        return device

    return seconds


def host_seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def take_turns(
    paths: Mapping[str, list[Call]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each path; a path is one call for each copy of the inputs."""
    found: dict[str, list[float]] = {name: [] for name in paths}
    names = list(paths)
    for turn in range(rounds):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            calls = paths[name]
            found[name].append(clock(calls[turn % len(calls)]))
    return found


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "tenth": ordered[round(0.1 * last)],
        "ninetieth": ordered[round(0.9 * last)],
    }


def graph_of(calls: list[Call]) -> Call:
    """All calls, captured to be replayed together."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all(calls)
    return graph.replay


# ---- subjects ---------------------------------------------------------------------------------


class Way(NamedTuple):
    """One way to a result."""

    calls: list[Call]
    errors: Callable[[], dict[str, float]] | None = None
    capturable: bool = True


Paths = dict[str, Callable[[], Way]]


class Subject(NamedTuple):
    """What is measured. Each path is prepared on its own, so that one that fails costs only it."""

    name: str
    paths: Callable[[Device], Paths]
    estimate: float
    """Seconds that it takes, compilations included, on the safe side."""
    rounds: int = 30


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def in_tf32(call: Call) -> Call:
    def run() -> Any:
        with tf32(True):
            return call()

    return run


def copies_of(case: Case, device: Device) -> list[Case]:
    """On the device, more than the L2 cache can hold."""
    size = sum(tensor.nbytes for tensor in case)
    count = device.copies(size)
    return [Case(*(tensor.to(device.name, copy=True) for tensor in case)) for _ in range(count)]


def copy_path(moved: int, device: Device) -> Way:
    """A copy that reads and writes so many bytes in all."""
    half = max(moved // 2, 1)
    shape = (device.copies(moved), 2, half)
    pairs = torch.ones(shape, dtype=torch.uint8, device=device.name)
    return Way([functools.partial(pair[0].copy_, pair[1]) for pair in pairs])


# ---- the posterior mean -----------------------------------------------------------------------


def ours(case: Case, precision: str = "high") -> Call:
    return lambda: pfgm.posterior_mean(
        case.x,
        case.references,
        r=case.z,
        return_logsumexp=True,
        backend=OURS,
        precision=precision,
    )


def published(case: Case) -> Call:
    """Its intermediate tensors are created on the default device."""
    forward = posterior_paths.published(case)

    def run() -> Any:
        with torch.device(case.x.device):
            return forward()

    return run


def published_fits(case: Case, device: Device) -> bool:
    """About four tensors (B, M, N + 1) live at a time."""
    B, (M, N) = len(case.x), case.references.shape
    wanted = 4 * 4 * B * M * (N + 1)
    return not device.real or wanted < 0.8 * torch.cuda.mem_get_info()[0]


def with_backward(forward: Callable[[Case], Call]) -> Callable[[Case], Call]:
    """Followed by the gradient of mean · x in x."""

    def prepare(case: Case) -> Call:
        leaf = case._replace(x=case.x.clone().requires_grad_())
        run = forward(leaf)

        def both() -> Any:
            mean, logsumexp = run()
            (gradient,) = torch.autograd.grad(mean, leaf.x, case.x)
            return gradient, logsumexp.detach()

        return both

    return prepare


def sampled(case: Case) -> Tensor:
    """Indices of the rows that are compared with float64."""
    B = len(case.x)
    return torch.linspace(0, B - 1, min(B, SAMPLE), device=case.x.device).long()


def rows_of(case: Case, rows: Tensor) -> Case:
    exact = case.references
    if exact.dtype == torch.uint8:
        exact = exact.double() / 127.5 - 1
    return Case(case.x[rows], case.z[rows], exact)


def forward_errors(case: Case, call: Call) -> dict[str, float]:
    rows = sampled(case)
    part = rows_of(case, rows)
    right_mean, right_logsumexp = posterior_paths.truth(part)
    mean, logsumexp = (t[rows].detach().double() for t in call())
    x, z = part.x.double(), part.z.double()
    fields = [normalised_field(x, z, m, GAMMA)[0] for m in (mean, right_mean)]
    largest = part.references.double().norm(dim=1).max()
    size = right_logsumexp.abs().clamp(min=1)
    return {
        "mean": float((mean - right_mean).norm(dim=1).max() / largest),
        "field": float((fields[0] - fields[1]).norm(dim=1).max() / math.sqrt(x.shape[1])),
        "logsumexp": float(((logsumexp - right_logsumexp).abs() / size).max()),
    }


def backward_errors(case: Case, call: Call) -> dict[str, float]:
    rows = sampled(case)
    x, z, references = (t.double() for t in rows_of(case, rows))
    x.requires_grad_()
    mean = pfgm.posterior_mean(x, references, r=z, backend="reference")
    (right,) = torch.autograd.grad(mean, x, x.detach())
    found = call()[0][rows].double()
    return {"gradient": float((found - right).norm() / right.norm())}


def field_errors(case: Case, call: Call) -> dict[str, float]:
    rows = sampled(case)
    x, z, references = (t.double() for t in rows_of(case, rows))
    right, _ = pfgm.field_fn(x, z, references, backend="reference")
    difference = call()[0][rows].double() - right
    return {"field": float(difference.norm(dim=1).max() / math.sqrt(x.shape[1]))}


Errors = Callable[[Case, Call], dict[str, float]]


def path_of(cases: list[Case], prepare: Callable[[Case], Call], errors: Errors) -> Way:
    calls = [prepare(case) for case in cases]
    return Way(calls, functools.partial(errors, cases[0], calls[0]))


def as_type(cases: list[Case], convert: Callable[[Tensor], Tensor]) -> list[Case]:
    return [case._replace(references=convert(case.references)) for case in cases]


def torch_paths(
    cases: list[Case],
    device: Device,
    formula: Callable[[Case], Any],
    errors: Errors,
    backward: bool = False,
) -> Paths:
    """A formula in plain torch: eager and compiled, with products in float32 and in TF32."""
    wrap = with_backward if backward else lambda prepare: prepare
    fast = device.compiled(formula)
    eager = wrap(lambda case: lambda: formula(case))
    compiled = wrap(lambda case: lambda: fast(case))
    ways = {
        "torch": eager,
        "torch, tf32": lambda case: in_tf32(eager(case)),
        "compiled": compiled,
        "compiled, tf32": lambda case: in_tf32(compiled(case)),
    }
    return {name: functools.partial(path_of, cases, way, errors) for name, way in ways.items()}


def gemm_formula(case: Case) -> Any:
    return posterior_paths.torch_path(case)()


def posterior_subject(build: Callable[[], Case], device: Device, types: bool = True) -> Paths:
    case = build()
    cases = copies_of(case, device)
    path = functools.partial(path_of, errors=forward_errors)
    medium = functools.partial(ours, precision="medium")
    paths: Paths = {
        OURS: lambda: path(cases, ours),
        "triton, medium": lambda: path(cases, medium),
    }
    if types:
        paths["triton, uint8"] = lambda: path(as_type(cases, posterior_paths.to_bytes), ours)
        paths["triton, bfloat16"] = lambda: path(as_type(cases, Tensor.bfloat16), ours)
    paths |= torch_paths(cases, device, gemm_formula, forward_errors)
    if published_fits(cases[0], device):
        # Its temporaries would take their memory twice, in a graph and outside.
        paths["published formula"] = lambda: path(cases[:1], published)._replace(capturable=False)
    moved = case.references.nbytes + 2 * case.x.nbytes
    paths["copy"] = lambda: copy_path(moved, device)
    return paths


def backward_subject(build: Callable[[], Case], device: Device) -> Paths:
    cases = copies_of(build(), device)
    ways: Paths = {
        OURS: lambda: path_of(cases, with_backward(ours), backward_errors)._replace(
            capturable=False
        )
    }
    return ways | {
        name: functools.partial(_uncaptured, way)
        for name, way in torch_paths(cases, device, gemm_formula, backward_errors, True).items()
    }


def _uncaptured(prepare: Callable[[], Way]) -> Way:
    """Autograd runs on a thread of its own, whose stream is not the capturing one's."""
    return prepare()._replace(capturable=False)


def field_formula(case: Case) -> tuple[Tensor, Tensor]:
    mean, _ = gemm_formula(case)
    difference = case.x - mean
    norm = (difference.square().sum(1) + case.z.square()).sqrt()
    scale = -math.sqrt(case.x.shape[1]) / (norm + GAMMA)
    return scale[:, None] * difference, scale * case.z


def our_field(case: Case) -> Call:
    return lambda: pfgm.field_fn(case.x, case.z, case.references, backend=OURS)


def field_subject(build: Callable[[], Case], device: Device) -> Paths:
    cases = copies_of(build(), device)
    whole: Paths = {OURS: lambda: path_of(cases, our_field, field_errors)}
    return whole | torch_paths(cases, device, field_formula, field_errors)


# ---- steps of the ODE -------------------------------------------------------------------------


class Points(NamedTuple):
    """Points (B, N), a network's field there, and a history of their size."""

    x: Tensor
    field_x: Tensor
    field_z: Tensor
    history: Tensor


class Step(NamedTuple):
    solver: str
    z: float
    z_next: float
    z_previous: float


def points(B: int, N: int, z: float) -> Points:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(16, N, generator=generator) * 2 - 1
    x = data[torch.arange(B) % 16] + z * torch.randn(B, N, generator=generator)
    mean = data[torch.arange(B) % 16]
    field_x, field_z = normalised_field(x, torch.full((B,), z), mean, GAMMA)
    history = mean + 0.01 * torch.randn(B, N, generator=generator)
    return Points(x, field_x, field_z, history)


def our_step(step: Step, backend: str, at: Points) -> Any:
    solver, z, z_next, z_previous = step
    if solver == "euler":
        return pfgm.euler_step(*at[:3], z, z_next, out=at.x, backend=backend)
    if solver == "heun":
        return pfgm.heun_step(at.history, *at[:3], z, z_next, out=at.x, backend=backend)
    return pfgm.multistep_step(
        *at[:3],
        z,
        z_next,
        at.history,
        z_previous,
        out=at.x,
        mean_out=at.history,
        backend=backend,
    )


def published_slope(x: Tensor, field_x: Tensor, field_z: Tensor, z: float) -> Tensor:
    """z dx/dz as in the published sampler, each intermediate in memory. The level is a number: the
    published code asks the device for it at every step."""
    if z < 5.0:
        root = math.sqrt(x.shape[1])
        norm = field_x.norm(p=2, dim=1) / root
        distance = GAMMA * norm / (1 - norm)
        distance = torch.sqrt(distance**2 + z**2)
        field_z = -root * torch.ones_like(field_z) * z / (distance + GAMMA)
    v = torch.cat([field_x, field_z[:, None]], dim=1)
    return z * v[:, :-1] * (1 / (v[:, -1] + 1e-5))[:, None]


def published_step(step: Step, at: Points) -> Any:
    """The published Euler and Heun steps; for the multistep solver its formula in torch."""
    x, field_x, field_z, history = at
    log_step = math.log(step.z_next / step.z)
    if step.solver == "euler":
        return x + log_step * published_slope(x, field_x, field_z, step.z)
    if step.solver == "heun":
        first = (x - history) / log_step
        second = published_slope(x, field_x, field_z, step.z_next)
        return history + 0.5 * log_step * (first + second)
    mean = x - published_slope(x, field_x, field_z, step.z)
    weight = -log_step / (2 * math.log(step.z_previous / step.z))
    toward = mean * (1 + weight) - history * weight
    return toward + (step.z_next / step.z) * (x - toward), mean


def step_errors(step: Step, at: Points) -> dict[str, float]:
    exact = our_step(step, "reference", Points(*(t.double() for t in at)))
    found = our_step(step, OURS, Points(*(t.clone() for t in at)))
    if step.solver == "multistep":
        exact, found = exact[0], found[0]
    difference = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
    return {"points": float(difference.max())}


def step_bytes(solver: str, values: int) -> int:
    read, written = STEP_TENSORS[solver]
    return 4 * values * (len(read) + len(written))


def step_subject(step: Step, B: int, N: int, device: Device) -> Paths:
    start = points(B, N, step.z if step.solver != "heun" else step.z_next)
    moved = step_bytes(step.solver, B * N)
    count = device.copies(moved)

    def fresh() -> list[Points]:
        return [Points(*(t.to(device.name, copy=True) for t in start)) for _ in range(count)]

    def path(function: Callable[[Points], Any], errors: bool = False) -> Way:
        compare = functools.partial(step_errors, step, fresh()[0]) if errors else None
        return Way([functools.partial(function, at) for at in fresh()], compare)

    plain = functools.partial(published_step, step)
    return {
        OURS: lambda: path(functools.partial(our_step, step, OURS), True),
        "published": lambda: path(plain),
        "compiled": lambda: path(device.compiled(plain)),
        "copy": lambda: copy_path(moved, device),
    }


# ---- all subjects -----------------------------------------------------------------------------


def photographs_like_fashion(B: int, M: int) -> Case:
    """Grey crops of photographs, in the shape of Fashion-MNIST where its files are not at hand."""
    return subjects.perturbed(subjects.photograph_crops(M, 28)[:, :1].contiguous(), B)


def many(fashion: bool) -> tuple[str, Callable[[int, int], Case]]:
    if fashion:
        return "Fashion-MNIST", subjects.fashion_shape
    return "photographs in Fashion-MNIST's shape", photographs_like_fashion


def step_subjects(dry: bool) -> list[Subject]:
    """Below z = 5 the field's z is substituted."""
    levels = {"euler": (1.0, 20.0), "heun": (1.0,), "multistep": (1.0,)}
    sizes, N = ((4,), 64) if dry else ((128, 512, 1024), 3072)
    return [
        Subject(
            f"{solver}, {B} × {N}, z = {z:g}",
            functools.partial(step_subject, Step(solver, z, 0.9 * z, 1.1 * z), B, N),
            15,
            100,
        )
        for solver, chosen in levels.items()
        for z in chosen
        for B in sizes
    ]


def all_subjects(dry: bool, fashion: bool) -> list[Subject]:
    """What matters most comes first."""
    name, large = many(fashion)
    cifar, digits = subjects.cifar_shape, subjects.digits_shape
    if dry:
        cifar = large = digits
    B, M = (8, 64) if dry else (128, 4096)

    def forward(
        title: str, case: Callable[[int, int], Case], B: int, M: int, estimate: float, types: bool
    ) -> Subject:
        build = functools.partial(case, B, M)
        paths = functools.partial(posterior_subject, build, types=types)
        rounds = 10 if B * M > 1e8 else 30
        return Subject(f"forward, {title}, {B} × {M}", paths, estimate, rounds)

    build = functools.partial(cifar, B, M)
    first = [
        forward("CIFAR-10 shape", cifar, B, M, 60, True),
        Subject("field_fn, CIFAR-10 shape", functools.partial(field_subject, build), 30),
        Subject(
            "forward and backward, CIFAR-10 shape", functools.partial(backward_subject, build), 40
        ),
    ]
    small = [forward("CIFAR-10 shape", cifar, B // 4, M, 40, False)]
    last = [
        forward("digits", digits, B, 64 if dry else 1437, 30, False),
        forward(name, large, 2 * B, 256 if dry else 60000, 50, True),
        forward(name, large, 16 if dry else 4096, 256 if dry else 60000, 60, False),
    ]
    steps = step_subjects(dry)
    middle = len(steps) // 2  # the Euler steps
    return [*first, *steps[:middle], *small, *last, *steps[middle:]]


# ---- measuring --------------------------------------------------------------------------------


class Row(NamedTuple):
    subject: str
    path: str
    seconds: dict[str, float]
    graph: dict[str, float]
    host: float
    errors: dict[str, float]
    failure: str


def attempt(action: Callable[[], Any], failures: list[str]) -> Any:
    """None where it raises: the run is not to be had again soon, the rest of it still counts."""
    try:
        return action()
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return None


def call_all(calls: list[Call]) -> None:
    for call in calls:
        call()


def prepare(paths: Paths, failures: dict[str, list[str]]) -> dict[str, Way]:
    """Those that run; the first call of each compiles what is compiled."""
    ready = {}
    for name, build in paths.items():
        failures[name] = []
        path = attempt(build, failures[name])
        if path is not None:
            attempt(functools.partial(call_all, path.calls), failures[name])
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
    ready = prepare(subject.paths(device), failures)
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
        )
        for name, found in failures.items()
    ]


def host_times(calls: list[Call], device: Device) -> list[float]:
    """What the host takes for a call, without waiting for the device."""
    found = []
    for call in calls[:8]:
        found.append(host_seconds(call))
        if device.real:
            torch.cuda.synchronize()
    return found


def run_subjects(
    chosen: list[Subject],
    device: Device,
    budget: Budget,
    rounds: int | None = None,
    keep: Callable[[list[Row], list[str]], None] = lambda rows, left_out: None,
) -> tuple[list[Row], list[str]]:
    """Rows, and the names of the subjects that the budget left out; ``keep`` gets those so far."""
    rows: list[Row] = []
    left_out: list[str] = []
    for subject in chosen:
        if not budget.allows(subject.estimate):
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


# ---- the report -------------------------------------------------------------------------------


def best(rows: list[Row], names: tuple[str, ...], kind: str) -> float | None:
    """The least median among paths."""
    found = [getattr(row, kind).get("median") for row in rows if row.path in names]
    return min((value for value in found if value is not None), default=None)


def ratio(other: float | None, ours: float | None) -> str:
    return "" if other is None or ours is None else f"{other / ours:.3g} ×"


TORCH = ("torch", "torch, tf32", "compiled", "compiled, tf32", "published")


def summary(rows: list[Row]) -> str:
    """A row a subject: time, how many times as long the best of plain torch, the published formula
    and a copy take, and the same within graphs."""
    lines = []
    for name in dict.fromkeys(row.subject for row in rows):
        part = [row for row in rows if row.subject == name]
        line = [name]
        for kind in ("seconds", "graph"):
            own = best(part, (OURS,), kind)
            line.append("failed" if own is None and kind == "seconds" else _text(own))
            line += [ratio(best(part, names, kind), own) for names in (TORCH, ("copy",))]
        as_published = best(part, ("published formula",), "seconds")
        line.append(ratio(as_published, best(part, (OURS,), "seconds")))
        worst = [value for row in part if row.path == OURS for value in row.errors.values()]
        lines.append([*line, f"{max(worst):.0e}" if worst else ""])
    header = ["", "triton", "best torch", "copy", "in a graph", "best torch", "copy"]
    return table([*header, "published formula", "worst error"], lines)


def _text(value: float | None) -> str:
    return "" if value is None else as_text(value)


def failures_of(rows: list[Row]) -> list[str]:
    return [f"{row.subject}: {row.path}: {row.failure}" for row in rows if row.failure]


def circumstances(device: Device) -> dict[str, Any]:
    import triton

    return {
        **machine.describe(),
        "device": torch.cuda.get_device_name() if device.real else "none (dry run)",
        "driver": driver() if device.real else "",
        "triton": triton.__version__,
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0]


def report(rows: list[Row], left_out: list[str], device: Device) -> str:
    parts = [summary(rows)]
    if not device.real:
        parts.append("A dry run with a few digits: the times mean nothing.")
    if left_out:
        parts.append(f"Left out, the time was up: {'; '.join(left_out)}.")
    return "\n\n".join(parts + failures_of(rows))


# ---- the command ------------------------------------------------------------------------------


def measuring(options: argparse.Namespace) -> int:
    """In a process of its own, that finds the package which was put together."""
    budget = Budget(options.budget)
    subjects.FASHION_FOLDER = options.fashion_mnist
    fashion = (options.fashion_mnist / subjects.FASHION).exists() and not options.dry
    device = dry() if options.dry else gpu()
    if not fashion:
        print(f"Fashion-MNIST is not measured: no {subjects.FASHION} in {options.fashion_mnist}.")
    conditions = circumstances(device)

    def keep(rows: list[Row], left_out: list[str]) -> None:
        content = {
            "machine": conditions,
            "rows": [row._asdict() for row in rows],
            "left out": left_out,
        }
        (options.out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
        (options.out / "table.md").write_text(report(rows, left_out, device) + "\n")

    chosen = all_subjects(options.dry, fashion)
    rows, _ = run_subjects(chosen, device, budget, 2 if options.dry else None, keep)
    ours = (row for row in rows if row.path == "all" or row.path.startswith(OURS))
    return 1 if any(row.failure for row in ours) else 0


def assemble(folder: Path) -> Path:
    """The package in pure Python, with the kernels in their place: what an installation copies."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder)]
    environment = {**os.environ, "PFGM_NATIVE": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def environment_with(package: Path, dry: bool) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PFGM_NATIVE": "0",
        **({"TRITON_INTERPRET": "1"} if dry else {}),
    }


def run_logged(command: list[str], log: Path, environment: dict[str, str], limit: float) -> int:
    """Elsewhere than in the checkout, whose bare package Python would find first."""
    with log.open("w") as stream, tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, stdout=stream, stderr=stream, timeout=limit
            )
        except subprocess.TimeoutExpired:
            stream.write(f"stopped after {limit:.0f} s\n")
            return 124
    return done.returncode


def last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "no output"


def run_tests(options: argparse.Namespace, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and last lines of tests/triton, its files side by side, as most of their time
    goes into compiling; they may take half of the whole."""
    if options.dry or options.skip_tests:
        return 0, "not run"
    files = sorted((ROOT / "tests" / "triton").glob("test_*.py"))
    logs = [options.out / f"{file.stem}.log" for file in files]
    start = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    start += ["-c", str(ROOT / "pyproject.toml")]
    with ThreadPoolExecutor(len(files)) as pool:
        running = [
            pool.submit(run_logged, [*start, str(file)], log, environment, 0.5 * options.budget)
            for file, log in zip(files, logs, strict=True)
        ]
        status = max(abs(run.result()) for run in running)
    return status, "; ".join(f"{log.stem}: {last_line(log)}" for log in logs)


def run_measurements(
    options: argparse.Namespace, environment: dict[str, str], seconds: float
) -> int:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    command += ["--out", str(options.out), "--budget", str(seconds)]
    command += ["--fashion-mnist", str(options.fashion_mnist), *["--dry"] * options.dry]
    return run_logged(command, options.out / "measure.log", environment, seconds + 10)


def orchestrate(options: argparse.Namespace) -> int:
    budget = Budget(options.budget)
    results, page = options.out / "results.json", options.out / "table.md"
    for earlier in (results, page):
        earlier.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_with(assemble(Path(folder)), options.dry)
        failed, tests = run_tests(options, environment)
        print(f"tests/triton: {tests}", flush=True)
        status = run_measurements(options, environment, budget.left() - 15)
    if not results.exists():
        print((options.out / "measure.log").read_text())
        return status or 1
    content = json.loads(results.read_text()) | {"tests/triton": tests}
    results.write_text(json.dumps(content, indent=2) + "\n")
    print(page.read_text())
    return failed or status


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (%(default)s)")
    parser.add_argument("--fashion-mnist", type=Path, default=subjects.FASHION_FOLDER)
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--dry", action="store_true", help="small, on the CPU, to see it works")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not (options.dry or torch.cuda.is_available()):
        print("Nothing is measured: torch finds no GPU here.")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    return measuring(options) if options.measure else orchestrate(options)


if __name__ == "__main__":
    sys.exit(main())
