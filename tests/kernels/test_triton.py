"""The Triton kernels where there is no GPU: in the interpreter, and as compiled, in the executor of
tests/ptx."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.common import executor

NAMES = ("shared", "triton")
triton_only = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@pytest.fixture(scope="module")
def running(run_kernel_tests):
    """The running tests of the Triton kernels."""
    return run_kernel_tests(NAMES, {"TRITON_INTERPRET": "1"})


@triton_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs on the GPU itself")
@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(running, name):
    process, output = running[name]
    assert process.wait() == 0, output.read_text()


@triton_only
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs on the GPU itself")
@pytest.mark.parametrize(
    "tests",
    [["-k", "test_problem"], ["-m", "slow", "-k", "test_single_changes"]],
    ids=["problems", "changes"],
)
def test_in_the_executor(run_kernel_tests, tests):
    """Triton compiles for a GPU of capability 8.0."""
    if reason := executor.why_unbuilt():
        pytest.skip(f"Triton's kernels are NOT TESTED as compiled: {reason}")
    environment = executor.environment(executor.build())
    environment |= {"PFGM_PTX_TRITON": "80", "PFGM_TUNE": "0"}
    process, output = run_kernel_tests(["shared"], environment, *tests)["shared"]
    assert process.wait() == 0, output.read_text()


@triton_only
def test_the_interpreter_is_not_left_on():
    code = "import pfgm; print(pfgm.backends.available()['triton'])"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for value, usable in (("1", "True"), ("0", "False")):
        shown = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"TRITON_INTERPRET": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"usable={usable}" in shown.stdout
