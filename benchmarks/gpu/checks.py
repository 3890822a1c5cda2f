"""Checks the kernels on this device: their tests, and compute-sanitizer."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common.build import STOPPED, Outcome, found_tool, last_line, run_logged
from benchmarks.common.folders import ROOT

Environment = Mapping[str, str]
SMOKE = [sys.executable, "-m", "benchmarks.gpu.smoke"]
TOOLS = ("memcheck", "racecheck")
TOOL_SECONDS = 60.0
ERROR_STATUS = 86  # of compute-sanitizer, if it found an error
_ERRORS = re.compile(r"ERROR SUMMARY: (?P<summary>(?P<errors>\d+) errors?)")
_HAZARDS = re.compile(
    r"RACECHECK SUMMARY: "
    r"(?P<summary>\d+ hazards? displayed \((?P<errors>\d+) errors?, \d+ warnings?\))"
)


def side_by_side(run: Callable[[Path], Outcome], files: list[Path]) -> list[Outcome]:
    """Runs all files at once."""
    if not files:
        return []
    with ThreadPoolExecutor(len(files)) as pool:
        return list(pool.map(run, files))


def run_tests(kind: str, out: Path, environment: Environment, limit: float) -> Outcome:
    """Runs the files of tests/gpu and tests/gpu/KIND at once: each keeps mostly one core busy."""
    folder, name = ROOT / "tests" / "gpu", f"tests/gpu, {kind}"
    start = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    start += ["-c", str(ROOT / "pyproject.toml")]

    def run(file: Path) -> Outcome:
        log = out / f"{kind}_{file.stem}.log"
        status = run_logged([*start, str(file)], log, environment, limit)
        return Outcome(name, abs(status), f"{file.stem}: {last_line(log)}")

    files = [*folder.glob("test_*.py"), *folder.glob(f"{kind}/test_*.py")]
    found = side_by_side(run, sorted(files))
    text = "; ".join(each.text for each in found) or "no files"
    return Outcome(name, max((each.status for each in found), default=0), text)


def run_smoke(out: Path, environment: Environment) -> Outcome:
    """Runs every CUDA kernel once, to find a kernel that never ends before it blocks everything
    else."""
    log = out / "smoke.log"
    status = run_logged(SMOKE, log, environment, TOOL_SECONDS)
    return Outcome("every CUDA kernel once", abs(status), last_line(log))


def run_sanitizer(tool: str, command: str, out: Path, environment: Environment) -> Outcome:
    """Runs every CUDA kernel once under a tool of compute-sanitizer."""
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
    found = (_HAZARDS if tool == "racecheck" else _ERRORS).search(text)
    if found is None:
        return Outcome(name, status or 1, f"no summary, status {status}; {_progress(text)}")
    if status == ERROR_STATUS and found["errors"] == "0":
        status = 0  # warnings alone
    summary = f"{found['summary']}; {_progress(text)}"
    return Outcome(name, status or int(found["errors"] != "0"), summary)


def _progress(text: str) -> str:
    """How many parts the program ran, and the tool's first complaint."""
    lines = text.splitlines()
    done = [line for line in lines if line.startswith("done: ")]
    complaints = [line.lstrip("= ") for line in lines if line.startswith("========= ")]
    first = [line for line in complaints if line and not re.match("COMPUTE|.*SUMMARY", line)][:1]
    return "; ".join([f"{len(done)} parts ran", *first])


def run_sanitizers(out: Path, environment: Environment) -> list[Outcome]:
    """Runs all tools of compute-sanitizer at once, if it is found."""
    command = found_tool("compute-sanitizer")
    if command is None:
        return [Outcome("compute-sanitizer", 0, "not run: it is not found")]
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        running = [pool.submit(run_sanitizer, tool, command, out, environment) for tool in TOOLS]
        return [run.result() for run in running]
