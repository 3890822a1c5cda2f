"""The CUDA kernels without a GPU: their PTX in the executor of tests/ptx."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import executor
from pfgm.backends import native

NAMES = ("shared", "cuda")

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
    """The running tests of the CUDA kernels."""
    return run_kernel_tests(NAMES, executor.environment(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_the_executor(running, name):
    process, output = running[name]
    assert process.wait() == 0, output.read_text()


@pytest.fixture(scope="module")
def running_slow(folder, run_kernel_tests):
    return run_kernel_tests(NAMES, executor.environment(folder), "-m", "slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_slow_tests_in_the_executor(running_slow, name):
    process, output = running_slow[name]
    assert process.wait() == 0, output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["executor_test", "cuda_arithmetic_test"])
def test_programs(folder, name):
    """What kernels compute in the executor, what it finds wrong, the arithmetic of the kernels."""
    executor.run(folder / "tests/ptx" / name)


@pytest.mark.slow
def test_the_trials_of_check_take_each_kernel_that_can_be_chosen(folder):
    """On an A100, an H100, an RTX 3090 and an RTX 4090, by the plan's own choice. Nothing runs."""
    program = Path(__file__).with_name("launched.py")
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PFGM_PTX": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {name: [] for name in ("80", "86", "89", "90")}
