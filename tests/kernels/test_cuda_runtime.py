"""The device of a thread, and attributes that are asked for once (csrc/cuda), without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_program(tmp_path):
    """It has a runtime and a driver of its own, so it is not linked with CUDA's."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        pytest.skip("NOT TESTED: no nvcc, with which CUDA's headers come")
    program = tmp_path / "runtime_test"
    source = ROOT / "csrc" / "tests" / "runtime_test.cpp"
    options = ["-std=c++17", f"-I{ROOT / 'csrc'}", "--cudart", "none"]
    build = [nvcc, *options, source, "-o", program]
    for command in (build, [program]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "as they should be" in done.stdout
