"""Checks, tests and times the operations on a GPU, from a bare checkout, in one command of a few
minutes.

    python -m benchmarks.gpu --out DIR [--budget 480] [--skip-tests] [--fashion-mnist FOLDER]

Needs torch, Triton, scikit-learn with Pillow, pytest and what the tests import, and for the CUDA
kernels nvcc, CMake, Ninja and pybind11. Needs no installed pfgm and no network: it builds the
package in a temporary folder, and writes nothing into the checkout. In this order:

1. ``pfgm check --quick`` of torch and Triton. Meanwhile nvcc builds the CUDA kernels for this GPU.
2. Times of torch and Triton, until nvcc is done.
3. ``pfgm check --quick`` of all, and times of the forward pass on photographs.
4. tests/gpu, and compute-sanitizer (if found) on every CUDA kernel.
5. Times of each operation beside plain torch, the published formula, the contender
   (``contender.py``) and a copy on the device, in the order of what is most worth knowing.

DIR gets each result as soon as it is there, so a run that is cut off keeps what it knew:
checks.json, results.json, table.md and a log of each part. Later times replace earlier ones. The
table is printed last. The status is not 0 if a build, a check, a test, a sanitizer or one of the
library's paths failed.

- "triton" and "cuda" are the library's paths, by its backends triton and native.
- Times are the device's, between two events. The L2 cache is overwritten before each call. Each
  call takes the next of several copies of its inputs. The paths of a subject take turns. The device
  is kept busy while a call is prepared, so that Python's time does not count; "host" is Python's
  time. "graph" is the time of one call in a CUDA graph that holds a call for each copy.
- Errors are those of the worst row against exact differences in float64, as the accuracy contract
  counts them. If there are many queries, only a sample of them is compared.
- Subjects that do not fit the budget are left out and named.

``--dry`` goes through all of it without a GPU, to see that it works: small subjects, Triton's
interpreter, the kernels for the CPU in place of CUDA's, tests that are collected and not run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.common import subjects
from benchmarks.common.build import (
    STOPPED,
    Outcome,
    assemble,
    assemble_with_cuda,
    environment_with,
    has_nvcc,
    last_line,
    run_logged,
)
from benchmarks.common.commands import new_parser
from benchmarks.gpu.checks import run_check, run_sanitizers, run_tests
from benchmarks.gpu.clock import Budget, dry, gpu
from benchmarks.gpu.measure import LOST, Row, lost, run_subjects, suspect
from benchmarks.gpu.report import circumstances, failed, report
from benchmarks.gpu.subjects import BACKENDS, all_subjects
from pfgm.common.files import write_json

RESULTS, TABLE, CHECKS = "results.json", "table.md", "checks.json"
BUILT, MEASURE_LOG = "built", "measure.log"
FIRST_SECONDS = 75.0  # for the copy and the forward pass on photographs
LEAST_SECONDS = 60.0  # for tests; with less time left, no other measuring process is started


# ---- measuring, in a process of its own, which imports the package that was built --------------


def measure(options: argparse.Namespace) -> int:
    """Measures all subjects, and writes results.json and table.md after each.

    Rows that are there of subjects that are not measured now stay.
    """
    budget = Budget(options.budget, until=options.until)
    subjects.FASHION_FOLDER = options.fashion_mnist
    fashion = (options.fashion_mnist / subjects.FASHION).exists() and not options.dry
    device = dry() if options.dry else gpu()
    if not fashion:
        print(f"Fashion-MNIST is not measured: no {subjects.FASHION} in {options.fashion_mnist}.")
    conditions = circumstances(device)
    ours, results = tuple(options.ours), options.out / RESULTS
    known = json.loads(results.read_text())["rows"] if results.exists() else []
    earlier = [Row(**row) for row in known]

    def keep(rows: list[Row], left_out: list[str]) -> None:
        new = {row.subject for row in rows}
        every = [*rows, *(row for row in earlier if row.subject not in new)]
        content = {
            "machine": conditions,
            "rows": [row._asdict() for row in every],
            "left out": left_out,
            "suspect": suspect(rows, ours) if rows and lost(device) else None,
        }
        write_json(results, content)
        (options.out / TABLE).write_text(report(every, left_out, device) + "\n")

    chosen = all_subjects(options.dry, fashion, ours)
    rows, _ = run_subjects(chosen, device, budget, 2 if options.dry else None, keep)
    return LOST if lost(device) else int(failed(rows))


def run_measurements(
    options: argparse.Namespace,
    environment: Mapping[str, str],
    ours: list[str],
    seconds: float,
    until: Path | None = None,
) -> int:
    """Runs :func:`measure` in a process of its own, with some of the library's paths."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", "--ours", *ours]
    command += ["--out", str(options.out), "--budget", str(seconds)]
    command += ["--fashion-mnist", str(options.fashion_mnist), *["--dry"] * options.dry]
    command += [] if until is None else ["--until", str(until)]
    return run_logged(command, options.out / MEASURE_LOG, environment, seconds + 10)


# ---- building, checking and measuring ----------------------------------------------------------


class Run:
    """A run of the command: its time, and the results of its parts, which are kept at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.budget = options, Budget(options.budget)
        self.checking = Budget(0.5 * options.budget)
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> Outcome:
        """Prints and keeps the result of a part."""
        print(line_of(outcome), flush=True)
        self.outcomes.append(outcome)
        parts = {each.name: [each.status, each.text] for each in self.outcomes}
        write_json(self.options.out / CHECKS, parts)
        return outcome

    def check(self, name: str, environment: Mapping[str, str]) -> list[str]:
        """Runs ``pfgm check``. Returns the library's paths that can be measured."""
        device, limit = "cpu" if self.options.dry else "cuda", 0.25 * self.options.budget
        outcome, able = run_check(name, device, self.options.out, environment, limit)
        self.add(outcome)
        if self.options.dry:  # Triton's interpreter would take minutes
            able.append("triton")
        return [path for path, backend in BACKENDS.items() if backend in able]

    def measure_first(
        self, environment: Mapping[str, str], ours: list[str], built: Path | None = None
    ) -> None:
        """Measures until there is a file, else the first subjects."""
        waits = built is not None and not built.exists()
        seconds = self.checking.left() if waits else FIRST_SECONDS
        until = built if waits else None
        status = run_measurements(self.options, environment, ours, seconds, until)
        failed = abs(status) if status != STOPPED else 0  # what is missing is measured later
        text = last_line(self.options.out / MEASURE_LOG)
        self.add(Outcome(f"first times of {', '.join(['torch', *ours])}", failed, text))

    def test(self, kinds: list[str], environment: Mapping[str, str]) -> None:
        """Runs the tests of some paths at once, and beside those of CUDA the sanitizers."""
        out, dry = self.options.out, self.options.dry
        with ThreadPoolExecutor(len(kinds)) as pool:
            limit = max(self.checking.left(), LEAST_SECONDS)
            tests = [pool.submit(run_tests, kind, out, environment, limit, dry) for kind in kinds]
            if "cuda" in kinds and not dry:
                for outcome in run_sanitizers(out, environment):
                    self.add(outcome)
            for each in tests:
                self.add(each.result())

    def measure(self, environment: Mapping[str, str], ours: list[str]) -> None:
        """Measures, and repeats without the kernels that broke the device or the process."""
        log, results = self.options.out / MEASURE_LOG, self.options.out / RESULTS
        while True:
            seconds = self.budget.left() - 15
            status = run_measurements(self.options, environment, ours, seconds)
            if not ours or (status >= 0 and status != LOST):
                self.add(Outcome("times", abs(status), last_line(log)))
                return
            known = json.loads(results.read_text())["suspect"] if results.exists() else None
            without = known or ours[-1]
            text = f"the device was lost, probably by {without}: see lost_{without}.json"
            self.add(Outcome(f"times with {without}", abs(status), text))
            ours = [path for path in ours if path != without]
            if results.exists():
                results.rename(self.options.out / f"lost_{without}.json")
            if not ours or self.budget.left() < LEAST_SECONDS:
                return


def build_cuda(options: argparse.Namespace, folder: Path, limit: float) -> tuple[Path, Outcome]:
    """Builds the package with the CUDA kernels, if there is nvcc, and returns its folder. A file
    :data:`BUILT` beside it says that this has ended."""
    name, log, started = "build with CUDA", options.out / "build.log", time.monotonic()
    try:
        if not (options.dry or has_nvcc()):
            return folder, Outcome(name, 0, "none: no nvcc is found; Triton's kernels are measured")
        package, status = assemble_with_cuda(folder / "cuda", log, limit, options.dry)
        if status != 0:
            text = f"FAILED, only Triton's kernels are measured ({log.name}): {last_line(log)}"
            return folder, Outcome(name, abs(status), text)
        return package, Outcome(name, 0, f"{time.monotonic() - started:.0f} s")
    finally:
        (folder / BUILT).touch()


def run_all(run: Run, folder: Path) -> None:
    """All parts, in the order of the module's docstring."""
    options = run.options
    pure = environment_with(assemble(folder / "pure"), options.dry)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build_cuda, options, folder, 0.75 * options.budget)
        # An editable installation has an extension, but perhaps of other sources.
        able = [path for path in run.check("first", pure) if path != "cuda"]
        run.measure_first(pure, able, folder / BUILT)
        package, outcome = building.result()
    run.add(outcome)
    environment, kinds = pure, ["triton"]
    if package != folder:
        environment, kinds = environment_with(package, options.dry, native=True), list(BACKENDS)
        able = run.check("all", environment)
        run.measure_first(environment, able)
    if not options.skip_tests:
        run.test(kinds, environment)
    run.measure(environment, able)


def orchestrate(options: argparse.Namespace) -> int:
    """Runs all parts, and prints the table."""
    table = options.out / TABLE
    for name in (RESULTS, CHECKS, TABLE):
        (options.out / name).unlink(missing_ok=True)
    run = Run(options)
    with tempfile.TemporaryDirectory() as name:
        run_all(run, Path(name))
    bad = [line_of(outcome) for outcome in run.outcomes if outcome.status != 0]
    known = table.read_text().rstrip() if table.exists() else "Nothing was measured."
    table.write_text("\n\n".join([known, *bad]) + "\n")
    print(table.read_text())
    return max(outcome.status for outcome in run.outcomes)


def line_of(outcome: Outcome) -> str:
    """An outcome in one line."""
    status = f" (status {outcome.status})" if outcome.status else ""
    return f"{outcome.name}{status}: {outcome.text}"


# ---- the command ------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (%(default)s)")
    parser.add_argument("--fashion-mnist", type=Path, default=subjects.FASHION_FOLDER)
    parser.add_argument("--skip-tests", action="store_true", help="build and measure only")
    parser.add_argument("--dry", action="store_true", help="a rehearsal without a GPU")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs="*", default=["triton"], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=Path, help=argparse.SUPPRESS)
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
