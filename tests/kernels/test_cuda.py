"""The CUDA kernels without a GPU: their PTX in the executor of tests/ptx."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import executor
from pfgm.backends import native

PATTERNS = ("test_*.py", "cuda/test_*.py")
CSRC = Path(__file__).resolve().parents[2] / "csrc/cuda"

if native._native is None:
    pytest.skip("PFGM_NATIVE=0", allow_module_level=True)
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("the executor of PTX needs Linux on x86-64", allow_module_level=True)


@pytest.fixture(scope="module")
def folder() -> Path:
    if reason := executor.why_unbuilt():
        pytest.skip(f"the CUDA kernels are NOT TESTED: {reason}")
    return executor.build()


@pytest.fixture(scope="module")
def running(folder, run_kernel_tests):
    """running(marks) → the running tests of the CUDA kernels by their pattern, all at once."""

    @functools.cache
    def run(marks):
        environment = executor.environment(folder)
        return {p: run_kernel_tests([p], environment, "-m", marks) for p in PATTERNS}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("marks", ["not slow", "slow"])
def test_in_the_executor(running, pattern, marks):
    process, output = running(marks)[pattern]
    assert process.wait() == 0, output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["executor_test", "cuda_arithmetic_test"])
def test_programs(folder, name):
    """What kernels compute in the executor, what it finds wrong, the arithmetic of the kernels."""
    executor.run(folder / "tests/ptx" / name)


@pytest.mark.slow
def test_launches(folder):
    """The trials of check take each kernel that can be chosen, and both passes compute distances in
    the same launch, on an A100, an H100, and RTX 3090, 4090 and 5090. Nothing runs."""
    program = Path(__file__).with_name("launched.py")
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PFGM_PTX": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {name: [] for name in ("80", "86", "89", "90", "120")}


@pytest.mark.slow
def test_the_build_says_which_nvcc_made_it(folder):
    """A pass of pfgm check is of that one."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert f"V{executor._load(str(folder)).build_info()['nvcc']}\n" in said


def test_one_ptx_is_the_proof_for_all_gpus():
    """Code for sm_80 runs on all of them, compiled by the driver: no kernel has other code for some
    of them."""
    sources = [*CSRC.glob("*.h"), *CSRC.glob("*.cu")]
    assert len(sources) > 20
    assert [path.name for path in sources if "__CUDA_ARCH" in path.read_text()] == []


def test_the_polynomial_of_log1p():
    """Its coefficients in the source have the error that the comment beside them says."""
    source = (CSRC / "weight_law.h").read_text().replace(" ", "")
    first = re.search(r"floatq=(-?[\d.]+)f\*m([+-][\d.]+)f;", source)
    assert first is not None
    numbers = [*first.groups(), *re.findall(r"q=q\*m([+-][\d.]+)f;", source)]
    m = torch.linspace(-0.25, 0.5, 1000, dtype=torch.float64)
    m = m[m.abs() > 1e-3]
    q = functools.reduce(lambda sum, number: sum * m + float(number), numbers, 0.0)
    assert (1 - m / 2 + m**2 * q - torch.log1p(m) / m).abs().max() <= 9e-9
