"""The Triton kernels where there is no GPU: in the interpreter, and as compiled, in the executor of
tests/ptx."""

import importlib.util

import pytest
import torch

import pfgm
from benchmarks.common import executor

triton_only = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@triton_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs on the GPU itself")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(run_kernel_tests, marks):
    patterns, environment = ["test_*.py", "triton/test_*.py"], {"TRITON_INTERPRET": "1"}
    process, output = run_kernel_tests(patterns, environment, "-m", marks)
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
    environment |= {"PFGM_PTX_TRITON": "80"}
    process, output = run_kernel_tests(["test_*.py"], environment, *tests)
    assert process.wait() == 0, output.read_text()


@triton_only
@pytest.mark.parametrize(("value", "usable"), [("1", True), ("0", False)])
def test_the_interpreter_is_not_left_on(monkeypatch, value, usable):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert pfgm.backends.available()["triton"].usable == usable
