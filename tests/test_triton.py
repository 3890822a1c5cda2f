"""The Triton kernels: in the interpreter where there is no GPU, and what holds without running."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNEL_TESTS = Path(__file__).parent / "triton"
triton_only = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@triton_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/triton runs on the GPU itself")
@pytest.mark.parametrize("file", sorted(p.name for p in KERNEL_TESTS.glob("test_*.py")))
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", KERNEL_TESTS / file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
