"""Puts pfgm together in a folder of its own, and runs what uses it from there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.folders import ROOT

STOPPED = 124  # the status of what ran out of time


class Outcome(NamedTuple):
    """What became of one check: 0 is well."""

    name: str
    status: int
    text: str


def found_tool(name: str, named: str = "") -> str | None:
    """A tool of the CUDA toolkit: as the environment names it, on the path or where it is usual."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    found = os.environ.get(named) or shutil.which(name)
    return found or (str(usual) if usual.exists() else None)


def nvidia_smi(field: str) -> str:
    """What the driver says of the first GPU, "" where it cannot be asked."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0].strip()


def architecture(capability: str) -> str:
    """For CMake: machine code for one device alone. "" leaves it those of CMakeLists.txt."""
    digits = capability.replace(".", "")
    if not digits.isdigit():
        return ""
    return f"{digits}a-real" if digits == "90" else f"{digits}-real"


def setup_command(folder: Path) -> list[str]:
    build = ["build", "--build-base", str(folder), "--build-lib", str(folder / "lib")]
    return [sys.executable, "setup.py", "-q", *build]


def assemble(folder: Path) -> Path:
    """The package in pure Python, with the kernels in their place: what an installation copies."""
    environment = {**os.environ, "PFGM_NATIVE": "0"}
    subprocess.run(setup_command(folder), cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def assemble_with_cuda(folder: Path, nvcc: str, log: Path, limit: float) -> tuple[Path, int]:
    """The package with its extension and CUDA kernels; the status of the build."""
    environment = {**os.environ, "PFGM_NATIVE": "1", "PFGM_CUDA": "1", "CUDACXX": nvcc}
    if found := architecture(nvidia_smi("compute_cap")):
        environment["CMAKE_CUDA_ARCHITECTURES"] = found
    status = run_logged(setup_command(folder), log, environment, limit, ROOT)
    return folder / "lib", status


def environment_with(package: Path, dry: bool, native: bool = False) -> dict[str, str]:
    """An environment that finds the package, and after it the checkout, for ``benchmarks``."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", ""), str(ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PFGM_NATIVE": "1" if native else "0",
        **({"TRITON_INTERPRET": "1"} if dry else {}),
    }


def run_logged(
    command: list[str],
    log: Path,
    environment: Mapping[str, str],
    limit: float,
    folder: Path | None = None,
) -> int:
    """In an empty folder if none is given: in the checkout Python would find the bare package."""
    with log.open("w") as stream, tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            command,
            cwd=folder or empty,
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            return process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            _stop(process)
            stream.write(f"stopped after {limit:.0f} s\n")
            return STOPPED
        except BaseException:
            _stop(process)
            raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: compilers, or the program that a tool looks at."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
