"""What gpu.py measures: each operation by the library's kernels and by what they compete with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pfgm
from benchmarks.common import posterior_paths, subjects
from benchmarks.common.subjects import Case
from benchmarks.common.turns import Call
from benchmarks.gpu.clock import Device
from benchmarks.machine_code.roofline import STEP_TENSORS
from pfgm.backends.reference import normalised_field

GAMMA = 5.0
SAMPLE = 256  # rows whose error is looked at
BACKENDS = {"triton": "triton", "cuda": "native"}  # of the library's paths
PLAIN_COPY = "a copy"  # its rate is that of the memory floors


class Way(NamedTuple):
    """One way to a result."""

    calls: list[Call]
    errors: Callable[[], dict[str, float]] | None = None
    capturable: bool = True
    moved: int = 0
    """Bytes that it must read and write at least; 0 where that is not looked at."""


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
    return Way([functools.partial(pair[0].copy_, pair[1]) for pair in pairs], moved=2 * half)


def plain_copy(size: int) -> Subject:
    return Subject(PLAIN_COPY, lambda device: {"copy": lambda: copy_path(size, device)}, 5)


# ---- the posterior mean -----------------------------------------------------------------------


def our_mean(backend: str, case: Case, precision: str = "high") -> Call:
    return lambda: pfgm.posterior_mean(
        case.x,
        case.references,
        r=case.z,
        return_logsumexp=True,
        backend=backend,
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


def reading(way: Way, case: Case) -> Way:
    """The references have to be read once; all else is little beside them."""
    return way._replace(moved=case.references.nbytes)


def our_means(name: str, cases: list[Case], types: bool) -> Paths:
    """By one of the library's paths, from references of each type."""
    mean = functools.partial(our_mean, BACKENDS[name])

    def path(convert: Callable[[Tensor], Tensor]) -> Way:
        converted = as_type(cases, convert)
        return reading(path_of(converted, mean, forward_errors), converted[0])

    paths: Paths = {name: lambda: path(lambda references: references)}
    if types:
        paths[f"{name}, uint8"] = lambda: path(posterior_paths.to_bytes)
        paths[f"{name}, bfloat16"] = lambda: path(Tensor.bfloat16)
    return paths


def posterior_subject(
    build: Callable[[], Case], device: Device, ours: tuple[str, ...], types: bool = True
) -> Paths:
    case = build()
    cases = copies_of(case, device)
    paths: Paths = {}
    for name in ours:
        paths |= our_means(name, cases, types)
    medium = functools.partial(our_mean, "triton", precision="medium")
    paths["triton, medium"] = lambda: path_of(cases, medium, forward_errors)
    paths |= torch_paths(cases, device, gemm_formula, forward_errors)
    if published_fits(cases[0], device):
        # Its temporaries would take their memory twice, in a graph and outside.
        paths["published formula"] = lambda: path_of(cases[:1], published, forward_errors)._replace(
            capturable=False
        )
    moved = case.references.nbytes + 2 * case.x.nbytes
    paths["copy"] = lambda: copy_path(moved, device)
    return paths


def backward_subject(build: Callable[[], Case], device: Device, ours: tuple[str, ...]) -> Paths:
    cases = copies_of(build(), device)
    ways: Paths = {}
    for name in ours:
        both = with_backward(functools.partial(our_mean, BACKENDS[name]))
        ways[name] = functools.partial(path_of, cases, both, backward_errors)
    ways |= torch_paths(cases, device, gemm_formula, backward_errors, True)
    return {name: functools.partial(_uncaptured, way) for name, way in ways.items()}


def _uncaptured(prepare: Callable[[], Way]) -> Way:
    """Autograd runs on a thread of its own, whose stream is not the capturing one's."""
    return prepare()._replace(capturable=False)


def field_formula(case: Case) -> tuple[Tensor, Tensor]:
    mean, _ = gemm_formula(case)
    difference = case.x - mean
    norm = (difference.square().sum(1) + case.z.square()).sqrt()
    scale = -math.sqrt(case.x.shape[1]) / (norm + GAMMA)
    return scale[:, None] * difference, scale * case.z


def our_field(backend: str, case: Case) -> Call:
    return lambda: pfgm.field_fn(case.x, case.z, case.references, backend=backend)


def field_subject(build: Callable[[], Case], device: Device, ours: tuple[str, ...]) -> Paths:
    cases = copies_of(build(), device)
    paths: Paths = {}
    for name in ours:
        field = functools.partial(our_field, BACKENDS[name])
        paths[name] = functools.partial(path_of, cases, field, field_errors)
    return paths | torch_paths(cases, device, field_formula, field_errors)


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


def step_errors(step: Step, backend: str, at: Points) -> dict[str, float]:
    exact = our_step(step, "reference", Points(*(t.double() for t in at)))
    found = our_step(step, backend, Points(*(t.clone() for t in at)))
    if step.solver == "multistep":
        exact, found = exact[0], found[0]
    difference = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
    return {"points": float(difference.max())}


def step_bytes(solver: str, values: int) -> int:
    read, written = STEP_TENSORS[solver]
    return 4 * values * (len(read) + len(written))


def step_subject(step: Step, B: int, N: int, device: Device, ours: tuple[str, ...]) -> Paths:
    start = points(B, N, step.z if step.solver != "heun" else step.z_next)
    moved = step_bytes(step.solver, B * N)
    count = device.copies(moved)

    def fresh() -> list[Points]:
        return [Points(*(t.to(device.name, copy=True) for t in start)) for _ in range(count)]

    def path(function: Callable[[Points], Any]) -> Way:
        return Way([functools.partial(function, at) for at in fresh()])

    def our_path(backend: str) -> Way:
        compare = functools.partial(step_errors, step, backend, fresh()[0])
        return path(functools.partial(our_step, step, backend))._replace(errors=compare)

    plain = functools.partial(published_step, step)
    paths: Paths = {name: functools.partial(our_path, BACKENDS[name]) for name in ours}
    return paths | {
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


def step_subjects(dry: bool, ours: tuple[str, ...]) -> list[Subject]:
    """Below z = 5 the field's z is substituted."""
    levels = {"euler": (1.0, 20.0), "heun": (1.0,), "multistep": (1.0,)}
    sizes, N = ((4,), 64) if dry else ((128, 512, 1024), 3072)
    return [
        Subject(
            f"{solver}, {B} × {N}, z = {z:g}",
            functools.partial(step_subject, Step(solver, z, 0.9 * z, 1.1 * z), B, N, ours=ours),
            15,
            100,
        )
        for solver, chosen in levels.items()
        for z in chosen
        for B in sizes
    ]


def all_subjects(dry: bool, fashion: bool, ours: tuple[str, ...]) -> list[Subject]:
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
        paths = functools.partial(posterior_subject, build, ours=ours, types=types)
        rounds = 10 if B * M > 1e8 else 30
        return Subject(f"forward, {title}, {B} × {M}", paths, estimate, rounds)

    build = functools.partial(cifar, B, M)
    field = functools.partial(field_subject, build, ours=ours)
    backward = functools.partial(backward_subject, build, ours=ours)
    first = [
        plain_copy(1 << 12 if dry else 1 << 30),
        forward("CIFAR-10 shape", cifar, B, M, 60, True),
        Subject("field_fn, CIFAR-10 shape", field, 30),
        Subject("forward and backward, CIFAR-10 shape", backward, 40),
    ]
    small = [forward("CIFAR-10 shape", cifar, B // 4, M, 40, False)]
    last = [
        forward("digits", digits, B, 64 if dry else 1437, 30, False),
        forward(name, large, B if dry else 2 * B, 70 if dry else 60000, 50, not dry),
        forward(name, large, 4 if dry else 4096, 70 if dry else 60000, 60, False),
    ]
    steps = step_subjects(dry, ours)
    middle = len(steps) // 2  # the Euler steps
    return [*first, *steps[:middle], *small, *last, *steps[middle:]]
