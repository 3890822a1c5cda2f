"""Checks the kernels on this device: ``pfgm check``, their tests, and compute-sanitizer.

    python -m benchmarks.gpu.checks DEVICE SECONDS FILE

runs ``pfgm check --quick`` on a device for some seconds, and writes what follows to a file.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.build import STOPPED, Outcome, last_line, run_logged, tool_path
from benchmarks.common.folders import ROOT
from pfgm import backends

Environment = Mapping[str, str]
SMOKE = [sys.executable, "-m", "benchmarks.gpu.smoke"]
TOOLS = ("memcheck", "racecheck")
TOOL_SECONDS, SPARE_SECONDS = 90.0, 30.0
ERROR_STATUS = 86  # of compute-sanitizer, if it found an error
_ERRORS = re.compile(r"ERROR SUMMARY: (?P<summary>(?P<errors>\d+) errors?)")
_HAZARDS = re.compile(
    r"RACECHECK SUMMARY: "
    r"(?P<summary>\d+ hazards? displayed \((?P<errors>\d+) errors?, \d+ warnings?\))"
)


class Checked(NamedTuple):
    """The result of ``pfgm check``."""

    outcome: Outcome
    able: list[str]
    """The backends that can be measured: they run here, and did not end their processes."""


def check(device: str, seconds: float, file: Path) -> int:
    """Runs the check in this process."""
    say = functools.partial(print, flush=True)
    report = backends.check(device, quick=True, seconds=seconds, report=say)
    lost = {row.backend for row in report.failures if "lost processes" in str(row.failure)}
    able = [name for name, why in report.backends.items() if why is None and name not in lost]
    passed = f"passed: {', '.join(report.passed) or 'none'}"
    content = {"able": able, "text": passed, "rows": [row._asdict() for row in report.rows]}
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(report)
    return int(bool(report.failures))


def run_check(name: str, device: str, out: Path, environment: Environment, limit: float) -> Checked:
    """Runs the check in a process of its own."""
    log, file = out / f"check_{name}.log", out / f"check_{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.checks", device, str(limit), str(file)]
    # Its verdict is kept beside the results: it may be of a check that had too little time.
    own = {**environment, "XDG_CACHE_HOME": str(out), "TRITON_INTERPRET": "0"}
    status, title = run_logged(command, log, own, limit + SPARE_SECONDS), f"pfgm check, {name}"
    if not file.exists():
        return Checked(Outcome(title, abs(status) or 1, last_line(log)), [])
    content = json.loads(file.read_text())
    return Checked(Outcome(title, abs(status), content["text"]), content["able"])


def side_by_side(run: Callable[[Any], Outcome], what: Sequence[Any]) -> list[Outcome]:
    """Runs all at once."""
    with ThreadPoolExecutor(len(what) or 1) as pool:
        return list(pool.map(run, what))


def run_tests(
    kind: str, out: Path, environment: Environment, limit: float, dry: bool = False
) -> Outcome:
    """Runs the files of tests/gpu and tests/gpu/KIND at once: each keeps mostly one core busy.

    A dry run only collects them.
    """
    folder, name = ROOT / "tests" / "gpu", f"tests/gpu, {kind}"
    start = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    start += ["-c", str(ROOT / "pyproject.toml"), *["--collect-only"] * dry]

    def run(file: Path) -> Outcome:
        log = out / f"{kind}_{file.stem}.log"
        status = run_logged([*start, str(file)], log, environment, limit)
        return Outcome(name, abs(status), f"{file.stem}: {last_line(log)}")

    files = [*folder.glob("test_*.py"), *folder.glob(f"{kind}/test_*.py")]
    outcomes = side_by_side(run, sorted(files))
    text = "; ".join(each.text for each in outcomes) or "no files"
    return Outcome(name, max((each.status for each in outcomes), default=0), text)


def run_sanitizer(tool: str, command: str, out: Path, environment: Environment) -> Outcome:
    """Runs problems that take nearly all CUDA kernels under a tool of compute-sanitizer."""
    log = out / f"{tool}.log"
    start = [command, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--print-limit", "20"]
    # Other kernels and errors of the API are torch's; the library raises its own errors.
    start += ["--kernel-name", "kernel_substring=pfgm", "--report-api-errors", "no"]
    start += SMOKE
    # Without torch's cache the tool sees where each tensor ends.
    small = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = run_logged(start, log, small, TOOL_SECONDS)
    return sanitizer_outcome(tool, status, log.read_text(errors="replace"))


def sanitizer_outcome(tool: str, status: int, text: str) -> Outcome:
    """The outcome of a run. It is clean only if the tool's summary says so."""
    name = f"compute-sanitizer {tool}"
    if status == STOPPED:
        return Outcome(name, status, f"stopped after {TOOL_SECONDS:.0f} s; {_progress(text)}")
    match = (_HAZARDS if tool == "racecheck" else _ERRORS).search(text)
    if match is None:
        return Outcome(name, status or 1, f"no summary, status {status}; {_progress(text)}")
    if status == ERROR_STATUS and match["errors"] == "0":
        status = 0  # warnings alone
    summary = f"{match['summary']}; {_progress(text)}"
    return Outcome(name, status or int(match["errors"] != "0"), summary)


def _progress(text: str) -> str:
    """How many parts the program ran, and the tool's first complaint."""
    lines = text.splitlines()
    done = [line for line in lines if line.startswith("done: ")]
    complaints = [line.lstrip("= ") for line in lines if line.startswith("========= ")]
    first = [line for line in complaints if line and not re.match("COMPUTE|.*SUMMARY", line)][:1]
    return "; ".join([f"{len(done)} parts ran", *first])


def run_sanitizers(out: Path, environment: Environment) -> list[Outcome]:
    """Runs all tools of compute-sanitizer at once, if it is found."""
    command = tool_path("compute-sanitizer")
    if command is None:
        return [Outcome("compute-sanitizer", 0, "not run: it is not found")]
    return side_by_side(lambda tool: run_sanitizer(tool, command, out, environment), TOOLS)


if __name__ == "__main__":
    sys.exit(check(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])))
