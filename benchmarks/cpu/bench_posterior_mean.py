"""The posterior mean on real images: time beside its peers, error against float64.

    pytest benchmarks/cpu/bench_posterior_mean.py --benchmark-only --store

Each group is one subject, whose paths take turns. ``extra_info`` holds the errors of the worst row,
as the accuracy contract counts them, or the relative error of a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.common.posterior_paths import (
    ONE_THREAD,
    PATHS,
    Path,
    errors,
    exact_gradient,
    exact_result,
    from_bytes,
    native,
    native_set,
    on_one_thread,
    relative_error,
    to_bytes,
    with_backward,
)
from benchmarks.common.subjects import (
    Case,
    cifar_shape,
    digits_shape,
    fashion_near_data,
    fashion_shape,
    plane,
)
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay

pytestmark = pytest.mark.benchmark(timer=replay)


class Subject(NamedTuple):
    """Data, and the paths that compute on them."""

    case: Callable[..., Case]
    paths: tuple[str, ...]
    turns: int
    sizes: tuple[int, ...] = ()
    """Arguments of ``case``."""
    backward: bool = False


PEERS = ("torch path", "torch path, compiled")
EACH = ("native", *PEERS, *(path + ONE_THREAD for path in ("native", *PEERS)))
SUBJECTS = {
    "forward, CIFAR-10 shape": Subject(
        cifar_shape, (*EACH, "native, uint8", "native, in a set"), 21
    ),
    "forward, CIFAR-10 shape, B = 32": Subject(
        cifar_shape, (*EACH, "published formula"), 11, sizes=(32,)
    ),
    "forward, Fashion-MNIST": Subject(
        fashion_shape, (*EACH, "native, uint8", "native, in a set"), 7
    ),
    "forward, digits": Subject(digits_shape, EACH, 101),
    "forward, CIFAR-10 shape, B = 4096": Subject(cifar_shape, ("native", *PEERS), 3, sizes=(4096,)),
    "forward and backward in x, CIFAR-10 shape": Subject(cifar_shape, EACH, 15, backward=True),
    "forward and backward in x, digits": Subject(digits_shape, EACH, 101, backward=True),
    "forward, points in the plane": Subject(plane, EACH, 51),
}
ROWS = [
    pytest.param(name, path, id=f"{name}: {path}")
    for name, subject in SUBJECTS.items()
    for path in subject.paths
]


def prepare(subject: Subject, case: Case) -> dict[str, Callable[[], Any]]:
    """The call of each path."""
    calls = {}
    for name in subject.paths:
        path = PATHS[name.removesuffix(ONE_THREAD)]
        call = (with_backward(path) if subject.backward else path)(case)
        calls[name] = on_one_thread(call) if name.endswith(ONE_THREAD) else call
    return calls


def errors_of(
    subject: Subject, case: Case, path: Callable[[], Any], exact: Any
) -> dict[str, float]:
    """The errors of one path."""
    result = path()
    if subject.backward:
        return {"gradient": relative_error(result[0], exact)}
    return errors(case, result, exact)


def exact_results(subject: Subject, case: Case) -> dict[str, Any]:
    """The exact result for each path.

    The exact result for uint8 references differs: rounding a reference changes the result of a
    point close to it.
    """
    exact = exact_gradient(case) if subject.backward else exact_result(case)
    results = dict.fromkeys(subject.paths, exact)
    if "native, uint8" in results:
        references = from_bytes(to_bytes(case.references))
        results["native, uint8"] = exact_result(case._replace(references=references))
    return results


@functools.lru_cache(maxsize=1)
def measure(name: str) -> Measured:
    subject = SUBJECTS[name]
    case = subject.case(*subject.sizes)
    torch._dynamo.reset()
    paths = prepare(subject, case)
    measured = measure_paths(paths, subject.turns, {"B, M, N": shape(case)})
    exact = exact_results(subject, case)
    errors = {name: errors_of(subject, case, path, exact[name]) for name, path in paths.items()}
    return measured._replace(facts={**measured.facts, "errors": errors})


def shape(case: Case) -> tuple[int, ...]:
    return (len(case.x), *case.references.shape)


def check(path: str, errors: dict[str, float]) -> None:
    """Fails where the library breaks the accuracy contract of the CPU."""
    if path.startswith("native"):
        assert max(errors.values()) <= 2e-5


@pytest.mark.parametrize(("name", "path"), ROWS)
def bench_posterior_mean(name: str, path: str, benchmark: Any) -> None:
    if benchmark.disabled:
        subject = SUBJECTS[name]
        case = subject.case(8, 64)
        run = prepare(subject, case)[path]
        benchmark(run)
        check(path, errors_of(subject, case, run, exact_results(subject, case)[path]))
        return
    measured = measure(name)
    errors = measured.facts["errors"][path]
    add_row(benchmark, name, path, measured, errors=errors)
    check(path, errors)


SETS: dict[str, Path] = {
    "tensor, forward": native,
    "used set, forward": native_set,
    "tensor, forward and backward": with_backward(native),
    "used set, forward and backward": with_backward(native_set),
}


@functools.lru_cache(maxsize=1)
def measure_sets() -> Measured:
    case = fashion_near_data()
    paths = {name: path(case) for name, path in SETS.items()}
    return measure_paths(paths, 7, {"B, M, N": shape(case), "z": float(case.z[0])})


@pytest.mark.parametrize("path", SETS)
def bench_reference_set(path: str, benchmark: Any) -> None:
    """A set in memory beside a tensor, for points near the data. It gives the same bits."""
    if benchmark.disabled:
        case = fashion_near_data(8, 256)
        results = benchmark(SETS[path](case))
        expected = SETS[path.replace("used set", "tensor")](case)()
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
        return
    add_row(benchmark, "references in a set, z = 0.1", path, measure_sets())
