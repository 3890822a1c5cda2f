"""Builds pfgm from a bare checkout into a folder, and runs programs that use it there."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.folders import ROOT

STOPPED = 124  # status of a program that was stopped at its time limit


class Outcome(NamedTuple):
    """The result of one check. Status 0 is a success."""

    name: str
    status: int
    text: str


def tool_path(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit on PATH or in the usual folder; None without one."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)


def has_nvcc() -> bool:
    """Whether setup.py finds nvcc: in a toolkit, or among the packages of this environment."""
    return bool(runpy.run_path(str(ROOT / "csrc" / "nvcc.py"))["settings"]())


def nvidia_smi(field: str) -> str:
    """A property of the first GPU as the driver reports it, "" if it cannot be asked."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0].strip()


def setup_command(folder: Path) -> list[str]:
    """The command that builds the package into folder/lib."""
    build = ["build", "--build-base", str(folder), "--build-lib", str(folder / "lib")]
    return [sys.executable, "setup.py", "-q", *build]


def assemble(folder: Path) -> Path:
    """Builds the package in pure Python, kernels included, and returns its folder."""
    environment = {**os.environ, "PFGM_NATIVE": "0"}
    subprocess.run(setup_command(folder), cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def assemble_with_cuda(
    folder: Path, log: Path, limit: float, dry: bool = False
) -> tuple[Path, int]:
    """Builds the package with its extension and CUDA kernels for the GPUs of this machine, in a dry
    run without CUDA; returns its folder and the status."""
    environment = {**os.environ, "PFGM_NATIVE": "1", "PFGM_CUDA": "0" if dry else "1"}
    status = run_logged(setup_command(folder), log, environment, limit, ROOT)
    return folder / "lib", status


def environment_with(package: Path, dry: bool, native: bool = False) -> dict[str, str]:
    """An environment in which Python finds the package, and ``benchmarks`` in the checkout."""
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
    """Runs a command with its output in a log, and returns its status.

    Args:
        limit: seconds after which it is stopped.
        folder: working folder, an empty one if not given. In the checkout Python would import the
            bare source tree.
    """
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
    """Kills a process and everything it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
