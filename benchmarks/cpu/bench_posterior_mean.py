"""The posterior mean on real images: time beside its peers, error against float64.

    pytest benchmarks/cpu/bench_posterior_mean.py --benchmark-only --store

Every group is one subject, its rows take turns (turns.py). ``extra_info`` holds the worst errors
over the batch in the terms of the accuracy contract, and for a gradient relative to its norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.common.posterior_paths import (
    PATHS,
    errors,
    native,
    to_bytes,
    true_gradient,
    truth,
    with_backward,
)
from benchmarks.common.subjects import Case, cifar_shape, digits_shape, fashion_shape, patches
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay

pytestmark = pytest.mark.benchmark(timer=replay)


class Subject(NamedTuple):
    case: Callable[[], Case]
    small: Callable[[], Case]  # for a run that only sees whether everything works
    paths: tuple[str, ...]
    turns: int
    backward: bool = False


PEERS = ("torch path", "torch path, compiled")
SUBJECTS = {
    "forward, CIFAR-10 shape": Subject(
        cifar_shape,
        lambda: cifar_shape(8, 64),
        ("native", "native, 1 thread", "native, uint8", *PEERS),
        21,
    ),
    "forward, CIFAR-10 shape, B = 32": Subject(
        lambda: cifar_shape(32),
        lambda: cifar_shape(2, 64),
        ("native", *PEERS, "published formula", "KeOps"),
        5,
    ),
    "forward, Fashion-MNIST": Subject(
        fashion_shape,
        lambda: fashion_shape(8, 256),
        ("native", "native, 1 thread", "native, uint8", *PEERS),
        7,
    ),
    "forward, digits": Subject(
        digits_shape,
        lambda: digits_shape(8, 64),
        ("native", "native, 1 thread", *PEERS, "KeOps"),
        101,
    ),
    "forward, CIFAR-10 shape, B = 4096": Subject(
        lambda: cifar_shape(4096), lambda: cifar_shape(16, 64), ("native", *PEERS), 3
    ),
    "forward and backward in x, CIFAR-10 shape": Subject(
        cifar_shape, lambda: cifar_shape(8, 64), ("native", *PEERS), 15, backward=True
    ),
    "forward and backward in x, digits": Subject(
        digits_shape, lambda: digits_shape(8, 64), ("native", *PEERS), 101, backward=True
    ),
}
ROWS = [
    pytest.param(subject, path, id=f"{subject}: {path}")
    for subject, (*_, paths, _, _) in SUBJECTS.items()
    for path in paths
    if path in PATHS
]


def prepared(subject: Subject, case: Case) -> dict[str, Callable[[], Any]]:
    wrap = with_backward if subject.backward else lambda path: path
    return {name: wrap(PATHS[name])(case) for name in subject.paths if name in PATHS}


def error(subject: Subject, case: Case, path: Callable[[], Any], right: Any) -> dict[str, float]:
    result = path()
    if subject.backward:
        return {"gradient": float((result[0] - right).norm() / right.norm())}
    return errors(case, result, right)


def right_answers(subject: Subject, case: Case) -> dict[str, Any]:
    """For each path: bytes are not the same references as their float32 values, to the digits that
    a point next to one of them needs."""
    right = true_gradient(case) if subject.backward else truth(case)
    answers = dict.fromkeys(subject.paths, right)
    if "native, uint8" in answers:
        exact = to_bytes(case.references).double() / 127.5 - 1
        answers["native, uint8"] = truth(case._replace(references=exact))
    return answers


@functools.lru_cache(maxsize=1)
def measure(name: str) -> Measured:
    subject = SUBJECTS[name]
    case = subject.case()
    torch._dynamo.reset()
    paths = prepared(subject, case)
    measured = measure_paths(paths, subject.turns, {"B, M, N": shape(case)})
    right = right_answers(subject, case)
    found = {name: error(subject, case, path, right[name]) for name, path in paths.items()}
    return measured._replace(facts={**measured.facts, "errors": found})


def shape(case: Case) -> tuple[int, ...]:
    return (len(case.x), *case.references.shape)


def judge(path: str, found: dict[str, float]) -> None:
    if path.startswith("native"):
        assert max(found.values()) <= 2e-5


@pytest.mark.parametrize(("name", "path"), ROWS)
def bench_posterior_mean(name: str, path: str, benchmark: Any) -> None:
    if benchmark.disabled:
        subject = SUBJECTS[name]
        case = subject.small()
        run = prepared(subject, case)[path]
        benchmark(run)
        judge(path, error(subject, case, run, right_answers(subject, case)[path]))
        return
    measured = measure(name)
    found = measured.facts["errors"][path]
    add_row(benchmark, name, path, measured, errors=found)
    judge(path, found)


SIZES = (1_000, 10_000, 100_000, 1_000_000)


@functools.lru_cache(maxsize=1)
def measure_sizes() -> Measured:
    images = patches(max(SIZES))
    cases = {M: images._replace(references=images.references[:M]) for M in SIZES}
    paths = {f"M = {M}": native(case) for M, case in cases.items()}
    return measure_paths(paths, 7, {"B, N": images.x.shape})


@pytest.mark.parametrize("M", SIZES)
def bench_number_of_references(M: int, benchmark: Any) -> None:
    """The same queries against more and more patches of photographs, N = 192."""
    if benchmark.disabled:
        case = patches(256)
        judge("native", errors(case, benchmark(native(case)), truth(case)))
        return
    measured = measure_sizes()
    each = {f"M = {m}": min(measured.seconds[f"M = {m}"]) / m for m in SIZES}
    nanoseconds = {"nanoseconds a reference": 1e9 * each[f"M = {M}"]}
    add_row(benchmark, "number of references", f"M = {M}", measured, **nanoseconds)
