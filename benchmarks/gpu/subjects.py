"""The subjects: each operation by the library's kernels and by their competitors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pfgm
from benchmarks.common import posterior_paths, subjects
from benchmarks.common.ode_steps import Points, Step, our_step, points, published_step, step_errors
from benchmarks.common.posterior_paths import GAMMA, library
from benchmarks.common.subjects import Case
from benchmarks.common.turns import Call
from benchmarks.gpu import contender
from benchmarks.gpu.clock import Device

COMPARED_ROWS = 256  # at most, of a result, with float64
BACKENDS = {"triton": "triton", "cuda": "native"}
"""The library's paths → the backend of each."""
CONTENDER = "contender"
"""The path of :mod:`benchmarks.gpu.contender`."""
PLAIN_COPY = "a copy"
"""The subject whose rate the memory floors are computed with."""


class Way(NamedTuple):
    """One way to compute a result."""

    calls: list[Call]
    """One for each copy of the inputs."""
    errors: Callable[[], dict[str, float]] | None = None
    capturable: bool = True
    """Whether a CUDA graph can hold the calls."""
    moved: int = 0
    """The least bytes to read and write; 0 if no floor is computed."""


Paths = dict[str, Callable[[], Way]]
"""Name → function that prepares the way. Each is prepared separately, so that a failure costs only
that path."""


class Subject(NamedTuple):
    """One operation at one size, by all its paths."""

    name: str
    paths: Callable[[Device], Paths]
    estimate: float
    """Seconds that it takes at most, with compilation."""
    rounds: int = 30


def in_tf32(call: Call) -> Call:
    """The call with products of float32 matrices in TF32."""

    def run() -> Any:
        matmul = torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, True
        try:
            return call()
        finally:
            matmul.allow_tf32 = before

    return run


def copies_of(case: Case, device: Device) -> list[Case]:
    """Copies of a case on the device, together more than the L2 cache holds."""
    size = sum(tensor.nbytes for tensor in case)
    count = device.copies(size)
    return [Case(*(tensor.to(device.name, copy=True) for tensor in case)) for _ in range(count)]


def copy_path(moved: int, device: Device) -> Way:
    """A copy that reads and writes ``moved`` bytes in all."""
    half = max(moved // 2, 1)
    shape = (device.copies(moved), 2, half)
    pairs = torch.ones(shape, dtype=torch.uint8, device=device.name)
    return Way([functools.partial(pair[0].copy_, pair[1]) for pair in pairs], moved=2 * half)


def plain_copy(size: int) -> Subject:
    """A copy as a subject of its own."""
    return Subject(PLAIN_COPY, lambda device: {"copy": lambda: copy_path(size, device)}, 5)


# ---- the posterior mean -----------------------------------------------------------------------


def published(case: Case) -> Call:
    """The published formula, which makes its tensors on the default device: the case's."""
    forward = posterior_paths.published(case)

    def run() -> Any:
        with torch.device(case.x.device):
            return forward()

    return run


def published_fits(case: Case, device: Device) -> bool:
    """Whether the published formula has memory for about four tensors (B, M, N + 1)."""
    B, (M, N) = len(case.x), case.references.shape
    wanted = 4 * 4 * B * M * (N + 1)
    return not device.real or wanted < 0.8 * torch.cuda.mem_get_info()[0]


def points_of(case: Case) -> Tensor:
    """The direction of the gradients: they are those of mean · x in x."""
    return case.x.detach()


with_backward = functools.partial(posterior_paths.with_backward, direction=points_of)


def compared_rows(case: Case) -> Tensor:
    """Indices of the rows that are compared with float64, evenly spaced."""
    B = len(case.x)
    return torch.linspace(0, B - 1, min(B, COMPARED_ROWS), device=case.x.device).long()


def part_of(case: Case, rows: Tensor) -> Case:
    """Some queries, with the references in floating point."""
    references = case.references
    if references.dtype == torch.uint8:
        references = posterior_paths.from_bytes(references)
    return Case(case.x[rows], case.z[rows], references)


def forward_errors(case: Case, call: Call) -> dict[str, float]:
    """Errors of a posterior mean and its log-sum-exp."""
    rows = compared_rows(case)
    part = part_of(case, rows)
    mean, logsumexp = call()
    exact = posterior_paths.exact_result(part)
    return posterior_paths.errors(part, (mean[rows], logsumexp[rows]), exact)


def backward_errors(case: Case, call: Call) -> dict[str, float]:
    """The relative error of a gradient."""
    rows = compared_rows(case)
    exact = posterior_paths.exact_gradient(part_of(case, rows), points_of)
    return {"gradient": posterior_paths.relative_error(call()[0][rows].double(), exact)}


def field_errors(case: Case, call: Call) -> dict[str, float]:
    """The error of PFGM's field, as the accuracy contract counts it."""
    rows = compared_rows(case)
    x, z, references = (t.double() for t in part_of(case, rows))
    exact, _ = pfgm.field_fn(x, z, references, backend="reference")
    difference = call()[0][rows].double() - exact
    return {"field": float(difference.norm(dim=1).max() / math.sqrt(x.shape[1]))}


Errors = Callable[[Case, Call], dict[str, float]]


def way_on(cases: list[Case], prepare: Callable[[Case], Call], errors: Errors) -> Way:
    """A way that takes each case in rotation."""
    calls = [prepare(case) for case in cases]
    return Way(calls, functools.partial(errors, cases[0], calls[0]))


def with_references(cases: list[Case], convert: Callable[[Tensor], Tensor]) -> list[Case]:
    """The cases with their references converted."""
    return [case._replace(references=convert(case.references)) for case in cases]


def torch_paths(
    cases: list[Case],
    device: Device,
    formula: Callable[[Case], Any],
    errors: Errors,
    backward: bool = False,
) -> Paths:
    """A formula in plain torch, eager and compiled, with products in float32 and in TF32."""
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
    return {name: functools.partial(way_on, cases, way, errors) for name, way in ways.items()}


def gemm_formula(case: Case) -> Any:
    """Posterior mean and log-sum-exp in plain torch."""
    return posterior_paths.torch_path(case)()


def our_means(name: str, cases: list[Case], types: bool) -> Paths:
    """One of the library's paths, for references of float32 or of each type."""
    mean = functools.partial(library, backend=BACKENDS[name])

    def path(convert: Callable[[Tensor], Tensor]) -> Way:
        converted = with_references(cases, convert)
        # The references must be read once; everything else is small beside them.
        moved = converted[0].references.nbytes
        return way_on(converted, mean, forward_errors)._replace(moved=moved)

    paths: Paths = {name: lambda: path(lambda references: references)}
    if types:
        paths[f"{name}, uint8"] = lambda: path(posterior_paths.to_bytes)
        paths[f"{name}, bfloat16"] = lambda: path(Tensor.bfloat16)
    return paths


def posterior_subject(
    build: Callable[[], Case], device: Device, ours: tuple[str, ...], types: bool = True
) -> Paths:
    """The paths to a posterior mean."""
    case = build()
    cases = copies_of(case, device)
    paths: Paths = {}
    for name in ours:
        paths |= our_means(name, cases, types)
    paths |= torch_paths(cases, device, gemm_formula, forward_errors)
    rival = contender.path(device.compiled)
    paths[CONTENDER] = functools.partial(way_on, cases, rival, forward_errors)
    if published_fits(cases[0], device):
        # A graph would hold its temporaries a second time.
        paths["published formula"] = lambda: way_on(cases[:1], published, forward_errors)._replace(
            capturable=False
        )
    moved = case.references.nbytes + 2 * case.x.nbytes
    paths["copy"] = lambda: copy_path(moved, device)
    return paths


def backward_subject(build: Callable[[], Case], device: Device, ours: tuple[str, ...]) -> Paths:
    """The paths to a posterior mean and its gradient."""
    cases = copies_of(build(), device)
    ways: Paths = {}
    for name in ours:
        both = with_backward(functools.partial(library, backend=BACKENDS[name]))
        ways[name] = functools.partial(way_on, cases, both, backward_errors)
    ways |= torch_paths(cases, device, gemm_formula, backward_errors, True)
    return {name: functools.partial(_uncaptured, way) for name, way in ways.items()}


def _uncaptured(prepare: Callable[[], Way]) -> Way:
    """A way that no graph holds: autograd runs on another thread, in a stream not captured."""
    return prepare()._replace(capturable=False)


def field_formula(case: Case) -> tuple[Tensor, Tensor]:
    """PFGM's field in plain torch."""
    mean, _ = gemm_formula(case)
    difference = case.x - mean
    norm = (difference.square().sum(1) + case.z.square()).sqrt()
    scale = -math.sqrt(case.x.shape[1]) / (norm + GAMMA)
    return scale[:, None] * difference, scale * case.z


def our_field(backend: str, case: Case) -> Call:
    """PFGM's field by the library."""
    return lambda: pfgm.field_fn(case.x, case.z, case.references, backend=backend)


def field_subject(build: Callable[[], Case], device: Device, ours: tuple[str, ...]) -> Paths:
    """The paths to PFGM's field."""
    cases = copies_of(build(), device)
    paths: Paths = {}
    for name in ours:
        field = functools.partial(our_field, BACKENDS[name])
        paths[name] = functools.partial(way_on, cases, field, field_errors)
    return paths | torch_paths(cases, device, field_formula, field_errors)


# ---- steps of the ODE -------------------------------------------------------------------------


def step_bytes(solver: str, values: int) -> int:
    """The least bytes that a step of so many values reads and writes: each tensor once."""
    tensors = {"euler": 3, "heun": 4, "multistep": 5}  # x, v_x and the history
    return 4 * values * tensors[solver]


def step_subject(step: Step, B: int, N: int, device: Device, ours: tuple[str, ...]) -> Paths:
    """The paths to a step."""
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
    """Grey crops of photographs in Fashion-MNIST's shape, where its files are missing."""
    return subjects.perturbed(subjects.photograph_crops(M, 28)[:, :1].contiguous(), B)


def many_references(fashion: bool) -> tuple[str, Callable[[int, int], Case]]:
    """The subject with most references, by name."""
    if fashion:
        return "Fashion-MNIST", subjects.fashion_shape
    return "photographs in Fashion-MNIST's shape", photographs_like_fashion


def step_subjects(dry: bool, ours: tuple[str, ...]) -> list[Subject]:
    """Steps of each solver. Below z = 5 they substitute field_z."""
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
    """All subjects, the most important first, because the budget may not suffice for all."""
    name, large = many_references(fashion)
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
    steps = step_subjects(dry, ours)
    middle = len(steps) // 2  # the Euler steps
    return [
        plain_copy(1 << 12 if dry else 1 << 30),
        forward("CIFAR-10 shape", cifar, B, M, 60, True),
        forward(name, large, B if dry else 2 * B, 70 if dry else 60000, 50, not dry),
        forward("digits", digits, B, 64 if dry else 1437, 30, False),
        Subject("field_fn, CIFAR-10 shape", field, 30),
        Subject("forward and backward, CIFAR-10 shape", backward, 40),
        *steps[:middle],
        forward(name, large, 4 if dry else 4096, 70 if dry else 60000, 60, False),
        forward("CIFAR-10 shape", cifar, B // 4, M, 40, False),
        *steps[middle:],
    ]
