"""What benchmarks/gpu.py and benchmarks/roofline.py do without a GPU."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import roofline
import torch

ROOT = Path(__file__).resolve().parent.parent


# ---- the command ------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: the command would measure")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_package_is_put_together_outside_the_checkout(tmp_path):
    package = gpu.assemble(tmp_path / "package")
    program = "import pfgm, pfgm.kernels.variant; print(pfgm.__file__, pfgm.kernels.__file__)"
    log = tmp_path / "log"
    status = gpu.run_logged(
        [sys.executable, "-c", program],
        log,
        gpu.environment_with(package, dry=False),
        60,
    )
    assert status == 0, log.read_text()
    assert all(Path(file).is_relative_to(package) for file in log.read_text().split()[-2:])


def test_a_command_that_takes_too_long_is_stopped(tmp_path):
    log = tmp_path / "log"
    program = "import time; print('begun', flush=True); time.sleep(60)"
    assert gpu.run_logged([sys.executable, "-c", program], log, dict(os.environ), 1) == 124
    assert log.read_text().split("\n")[:2] == ["begun", "stopped after 1 s"]
    assert gpu.last_line(log) == "stopped after 1 s"


# ---- time and budget --------------------------------------------------------------------------


class Ticking:
    """A clock that a call moves on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def call():
            self.now += seconds

        return call

    def seconds(self, call):
        before = self.now
        call()
        return self.now - before


def test_paths_take_turns_and_use_every_copy():
    clock, order = Ticking(), []

    def call(name, seconds):
        return lambda: (order.append(name), clock.takes(seconds)())

    paths = {"a": [call("a0", 1), call("a1", 2)], "b": [call("b0", 8)]}
    found = gpu.take_turns(paths, clock.seconds, 4)
    assert order == ["a0", "b0", "b0", "a1", "a0", "b0", "b0", "a1"]
    assert found == {"a": [1, 2, 1, 2], "b": [8, 8, 8, 8]}


def test_quantiles():
    found = gpu.quantiles([float(v) for v in range(100, -1, -1)])
    assert found == {"median": 50, "tenth": 10, "ninetieth": 90}
    assert gpu.quantiles([3.0]) == {"median": 3, "tenth": 3, "ninetieth": 3}


def device(clock):
    return gpu.Device("cpu", clock.seconds, 0)


def subject(clock, name, estimate, **paths):
    ways = {path: lambda call=call: gpu.Way([call, call]) for path, call in paths.items()}
    return gpu.Subject(name, lambda _: ways, estimate, rounds=2)


def test_what_does_not_fit_the_budget_is_left_out_and_named():
    clock = Ticking()
    chosen = [
        subject(clock, "first", 50, triton=clock.takes(10)),  # 2 calls, and 2 turns
        subject(clock, "long", 70, triton=clock.takes(1)),
        subject(clock, "short", 20, triton=clock.takes(1)),
    ]
    kept = []
    rows, left_out = gpu.run_subjects(
        chosen,
        device(clock),
        gpu.Budget(100, clock),
        keep=lambda rows, left_out: kept.append((len(rows), len(left_out))),
    )
    assert kept == [(1, 0), (1, 1), (2, 1)]
    assert [row.subject for row in rows] == ["first", "short"]
    assert left_out == ["long"]
    assert "Left out, the time was up: long." in gpu.report(rows, left_out, device(clock))


def test_a_path_that_fails_is_reported_and_the_others_count():
    def broken():
        raise ValueError("no such luck")

    clock = Ticking()
    chosen = [subject(clock, "some", 1, triton=broken, torch=clock.takes(3))]
    rows, _ = gpu.run_subjects(chosen, device(clock), gpu.Budget(100, clock))
    by_path = {row.path: row for row in rows}
    assert by_path["torch"].seconds["median"] == 3
    assert by_path["triton"].seconds == {}
    text = gpu.report(rows, [], device(clock))
    assert "| some | failed |" in text
    assert "some: triton: ValueError: no such luck" in text


def test_a_subject_that_cannot_be_built_is_reported():
    def broken(_):
        raise OSError("no images")

    clock = Ticking()
    rows, _ = gpu.run_subjects(
        [gpu.Subject("lost", broken, 1)], device(clock), gpu.Budget(9, clock)
    )
    assert gpu.failures_of(rows) == ["lost: all: OSError: no images"]


def row(path, median, graph=None, **errors):
    in_graph = {} if graph is None else {"median": graph}
    return gpu.Row("forward", path, {"median": median}, in_graph, 1e-5, errors, "")


def test_the_table_compares_with_the_best_of_torch():
    rows = [
        row("triton", 2e-5, 1e-5, mean=1e-6, field=3e-6),
        row("torch", 8e-5, 7e-5),
        row("compiled, tf32", 6e-5, 5e-5),
        row("published formula", 2e-3),
        row("copy", 1e-5, 0.9e-5),
    ]
    line = gpu.summary(rows).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "forward", "20 µs", "3 ×", "0.5 ×", "10 µs", "5 ×", "0.9 ×", "100 ×", "3e-06"
    ]  # fmt: skip


# ---- what is computed -------------------------------------------------------------------------


def test_steps_in_torch_agree_with_the_library():
    """Published substitution and log grid aside, which at this level and length hardly differ."""
    for solver in ("euler", "heun", "multistep"):
        step = gpu.Step(solver, 20.0, 20.0 * 0.999, 20.0 / 0.999)
        at = gpu.Points(*(t.double() for t in gpu.points(4, 64, 20.0)))
        plain = gpu.published_step(step, at)
        ours = gpu.our_step(step, "reference", gpu.Points(*(t.clone() for t in at)))
        for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (plain, ours)), strict=True):
            assert (a - b).norm() <= 2e-4 * (b - at.x).norm() + 1e-5 * b.norm(), solver


def test_field_in_torch_agrees_with_the_library():
    generator = torch.Generator().manual_seed(0)
    x, references = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    case = gpu.Case(x, torch.rand(8, generator=generator).double() + 0.5, references)
    found = gpu.field_formula(case)
    right = gpu.pfgm.field_fn(case.x, case.z, case.references, backend="reference")
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_are_those_of_the_result():
    generator = torch.Generator().manual_seed(0)
    x, references = torch.randn(2, 8, 5, generator=generator)
    case = gpu.Case(x, torch.ones(8), references)
    mean, logsumexp = gpu.posterior_paths.truth(case)
    exact = gpu.forward_errors(case, lambda: (mean, logsumexp))
    assert max(exact.values()) == 0
    off = gpu.forward_errors(case, lambda: (mean, logsumexp + 0.5 * logsumexp.abs().clamp(min=1)))
    assert math.isclose(off["logsumexp"], 0.5)
    shift = torch.zeros_like(mean)
    shift[3, 2] = 0.1 * references.double().norm(dim=1).max()
    assert math.isclose(
        gpu.forward_errors(case, lambda: (mean + shift, logsumexp))["mean"], 0.1, rel_tol=1e-6
    )


# ---- the roofline sheet -----------------------------------------------------------------------


def test_the_page_is_what_the_script_writes():
    text = roofline.PAGE.read_text()
    assert roofline.with_report(text) == text


def test_products_are_counted_as_a_loop_counts_them():
    shape = roofline.Shape("tiny", 2, 3, 5)
    products = sums = 0
    for _pair in itertools.product(range(shape.B), range(shape.M)):
        for _feature in range(shape.N):
            products += 2  # x·y
            sums += 2  # w y
    assert roofline.distances(shape, products=1).tensor == products
    assert roofline.distances(shape).tensor == 3 * products
    assert roofline.weighted_sum(shape, products=1).tensor == sums
    assert roofline.distances_and_projections(shape, products=1).tensor == 2 * products
    assert roofline.gradient_of_references(shape, products=1).tensor == 2 * sums


def test_bytes_are_those_of_the_tensors():
    B, M, N = 2, 3, 5
    shape = roofline.Shape("tiny", B, M, N)
    x, references, bytes_ = torch.zeros(B, N), torch.zeros(M, N), torch.zeros(M, N).byte()
    squared, weights = torch.zeros(B, M, dtype=torch.float64), torch.zeros(B, M)
    moved = x.nbytes + squared.nbytes
    assert roofline.distances(shape).moved == moved + references.nbytes
    assert roofline.distances(shape, reference_bytes=1).moved == moved + bytes_.nbytes
    assert roofline.weights(shape).moved == squared.nbytes + weights.nbytes
    for solver, passes in {"euler": 3, "heun": 4, "multistep": 5}.items():
        assert roofline.ode_step(solver, B, N).moved == passes * x.nbytes
        assert gpu.step_bytes(solver, B * N) == passes * x.nbytes


def test_the_slowest_unit_is_the_bound():
    work = roofline.Work(tensor=495e9, single=67e6, double=34e6, moved=3.35e6)
    assert work.bound() == "tensor cores"
    assert math.isclose(work.floor(), 1e-3)
    assert roofline.ode_step("euler", 128).bound() == "memory"
