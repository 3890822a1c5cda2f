"""Tests and times the operations on a GPU, from a bare checkout, in one command of a few minutes.

    python -m benchmarks.gpu --out DIR [--budget 480] [--skip-tests] [--fashion-mnist FOLDER]

Needs torch, Triton, scikit-learn with Pillow, pytest and what the tests import. Needs no installed
pfgm and no network: it builds the package in a temporary folder, and writes nothing into the
checkout. If nvcc is found, it builds the extension for this GPU, with CMake, Ninja and pybind11. It
runs tests/gpu, and compute-sanitizer (if found) on every CUDA kernel. Then it times each operation
beside plain torch, the published formula and a copy on the device. DIR gets results.json and the
logs, and a short table is printed last. The status is not 0 if a build, a test, a sanitizer or one
of the library's paths failed.

- "triton" and "cuda" are the library's paths, by its backends triton and native. results.json says
  for each subject which of them is faster.
- Times are the device's, between two events. The L2 cache is overwritten before each call. Each
  call takes the next of several copies of its inputs. The paths of a subject take turns. The device
  is kept busy while a call is prepared, so that Python's time does not count; "host" is Python's
  time. "graph" is the time of one call in a CUDA graph that holds a call for each copy.
- Errors are those of the worst row against exact differences in float64, as the accuracy contract
  counts them. If there are many queries, only a sample of them is compared.
- Subjects that do not fit the budget are left out and named.

``--dry`` runs small subjects without a GPU, in Triton's interpreter, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import subjects
from benchmarks.common.build import (
    Outcome,
    assemble,
    assemble_with_cuda,
    environment_with,
    found_tool,
    last_line,
    run_logged,
)
from benchmarks.common.commands import new_parser
from benchmarks.gpu.checks import run_sanitizers, run_smoke, run_tests
from benchmarks.gpu.clock import Budget, dry, gpu
from benchmarks.gpu.measure import Row, lost, run_subjects, suspect
from benchmarks.gpu.report import OURS, circumstances, failed, faster, report
from benchmarks.gpu.subjects import all_subjects

LOST = 3  # status of a process that lost the device; another process can continue
LEAST_SECONDS = 60.0  # with less time left, no other measuring process is started


# ---- measuring, in a process of its own, which imports the package that was built --------------


def measure(options: argparse.Namespace) -> int:
    """Measures all subjects and writes results.json and table.md."""
    budget = Budget(options.budget)
    subjects.FASHION_FOLDER = options.fashion_mnist
    fashion = (options.fashion_mnist / subjects.FASHION).exists() and not options.dry
    device = dry() if options.dry else gpu()
    if not fashion:
        print(f"Fashion-MNIST is not measured: no {subjects.FASHION} in {options.fashion_mnist}.")
    conditions = circumstances(device)
    ours = tuple(options.ours)

    def keep(rows: list[Row], left_out: list[str]) -> None:
        content = {
            "machine": conditions,
            "faster": faster(rows),
            "rows": [row._asdict() for row in rows],
            "left out": left_out,
            "suspect": suspect(rows, ours) if rows and lost(device) else None,
        }
        (options.out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
        (options.out / "table.md").write_text(report(rows, left_out, device) + "\n")

    chosen = all_subjects(options.dry, fashion, ours)
    rows, _ = run_subjects(chosen, device, budget, 2 if options.dry else None, keep)
    return LOST if lost(device) else int(failed(rows))


def run_measurements(
    options: argparse.Namespace, environment: dict[str, str], ours: list[str], seconds: float
) -> int:
    """Runs :func:`measure` in a process of its own, with some of the library's paths."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", "--ours", *ours]
    command += ["--out", str(options.out), "--budget", str(seconds)]
    command += ["--fashion-mnist", str(options.fashion_mnist), *["--dry"] * options.dry]
    return run_logged(command, options.out / "measure.log", environment, seconds + 10)


# ---- building and checking ---------------------------------------------------------------------


class Ready(NamedTuple):
    """What can be measured, and the results of the checks."""

    environment: dict[str, str]
    ours: list[str]
    outcomes: list[Outcome]


def build_cuda(
    options: argparse.Namespace, folder: Path, budget: Budget
) -> tuple[dict[str, str] | None, Outcome]:
    """Builds the CUDA kernels. Returns the environment that finds them, or None if there are
    none."""
    name, log = "build with CUDA", options.out / "build.log"
    if options.dry:
        return None, Outcome(name, 0, "none in a dry run")
    nvcc = found_tool("nvcc", "CUDACXX")
    if nvcc is None:
        return None, Outcome(name, 0, "none: no nvcc is found; only Triton's kernels are measured")
    before = budget.left()
    package, status = assemble_with_cuda(folder, nvcc, log, before)
    if status != 0:
        text = f"FAILED, only Triton's kernels are measured ({log.name}): {last_line(log)}"
        return None, Outcome(name, abs(status), text)
    environment = environment_with(package, dry=False, native=True)
    return environment, Outcome(name, 0, f"{before - budget.left():.0f} s")


def check_cuda(
    options: argparse.Namespace, environment: dict[str, str], limit: float
) -> list[Outcome]:
    """Runs the tests of the CUDA kernels beside the sanitizers."""
    with ThreadPoolExecutor(1) as pool:
        tests = pool.submit(run_tests, "cuda", options.out, environment, limit)
        return [*run_sanitizers(options.out, environment), tests.result()]


def get_ready(options: argparse.Namespace, folder: Path, budget: Budget) -> Ready:
    """Builds and checks. Triton's tests run beside everything for CUDA."""
    pure = environment_with(assemble(folder / "pure"), options.dry)
    checked = not (options.dry or options.skip_tests)
    with ThreadPoolExecutor(1) as pool:
        triton = (
            pool.submit(run_tests, "triton", options.out, pure, budget.left()) if checked else None
        )
        cuda, outcome = build_cuda(options, folder / "cuda", budget)
        outcomes = [reported(outcome)]
        smoke = None
        if cuda is not None:
            smoke = reported(run_smoke(options.out, cuda))
            outcomes.append(smoke)
            if checked:
                outcomes += map(reported, check_cuda(options, cuda, budget.left()))
        if triton is not None:
            outcomes.append(reported(triton.result()))
    if cuda is None or smoke is None or smoke.status != 0:
        return Ready(cuda or pure, ["triton"], outcomes)
    return Ready(cuda, list(OURS), outcomes)


def reported(outcome: Outcome) -> Outcome:
    """Prints an outcome and returns it."""
    print(line_of(outcome), flush=True)
    return outcome


def line_of(outcome: Outcome) -> str:
    """An outcome in one line."""
    status = f" (status {outcome.status})" if outcome.status else ""
    return f"{outcome.name}{status}: {outcome.text}"


# ---- the command ------------------------------------------------------------------------------


def measure_ready(options: argparse.Namespace, ready: Ready, budget: Budget) -> list[Outcome]:
    """Measures, and repeats without the kernels that broke the device or the process."""
    ours = list(ready.ours)
    outcomes: list[Outcome] = []
    log = options.out / "measure.log"
    while True:
        status = run_measurements(options, ready.environment, ours, budget.left() - 15)
        if status >= 0 and status != LOST:
            return [*outcomes, Outcome("measurements", status, last_line(log))]
        results = options.out / "results.json"
        known = json.loads(results.read_text())["suspect"] if results.exists() else None
        without = known or ours[-1]
        text = f"the device was lost, probably by {without}: see lost_{without}.json"
        outcomes.append(reported(Outcome(f"measurements with {without}", abs(status), text)))
        ours.remove(without)
        if not ours or budget.left() < LEAST_SECONDS:
            return outcomes
        if results.exists():
            results.rename(options.out / f"lost_{without}.json")


def orchestrate(options: argparse.Namespace) -> int:
    """Builds, checks and measures, and prints the table."""
    budget = Budget(options.budget)
    results, page = options.out / "results.json", options.out / "table.md"
    for earlier in (results, page):
        earlier.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        ready = get_ready(options, Path(folder), Budget(0.5 * options.budget))
        outcomes = [*ready.outcomes, *measure_ready(options, ready, budget)]
    status = max(outcome.status for outcome in outcomes)
    if not results.exists():
        print((options.out / "measure.log").read_text())
        return status or 1
    add_outcomes(results, page, outcomes)
    print(page.read_text())
    return status


def add_outcomes(results: Path, page: Path, outcomes: list[Outcome]) -> None:
    """Adds the checks to results.json, and those that failed to the page."""
    checks: dict[str, Any] = {line.name: [line.status, line.text] for line in outcomes}
    content = json.loads(results.read_text()) | {"checks": checks}
    results.write_text(json.dumps(content, indent=2) + "\n")
    bad = [line_of(outcome) for outcome in outcomes if outcome.status != 0]
    page.write_text("\n\n".join([page.read_text().rstrip(), *bad]) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (%(default)s)")
    parser.add_argument("--fashion-mnist", type=Path, default=subjects.FASHION_FOLDER)
    parser.add_argument("--skip-tests", action="store_true", help="build and measure only")
    parser.add_argument(
        "--dry", action="store_true", help="small subjects on the CPU, to see that it works"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs="+", default=["triton"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not (options.dry or torch.cuda.is_available()):
        print("Nothing is measured: torch finds no GPU here.")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    return measure(options) if options.measure else orchestrate(options)


if __name__ == "__main__":
    sys.exit(main())
