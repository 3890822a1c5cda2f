"""The CUDA kernels without a GPU: on the host, compiled as C++ with csrc/host_shim."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import cuda_shim
from pfgm.backends import native

NAMES = ("shared", "cuda")

if native._native is None:
    pytest.skip("PFGM_NATIVE=0", allow_module_level=True)


def build() -> Path:
    """The extension for the host."""
    if reason := cuda_shim.why_unbuilt():
        pytest.skip(f"the CUDA kernels are NOT TESTED: {reason}")
    return cuda_shim.build()


@pytest.fixture(scope="module")
def running(run_kernel_tests):
    """The running tests of the CUDA kernels."""
    return run_kernel_tests(NAMES, {"PFGM_CUDA_SHIM": str(build())})


@pytest.mark.slow
def test_slow_tests_on_the_host(run_kernel_tests):
    environment = {"PFGM_CUDA_SHIM": str(build())}
    process, output = run_kernel_tests(["cuda"], environment, "-m", "slow")["cuda"]
    assert process.wait() == 0, output.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_on_the_host(running, name):
    process, output = running[name]
    assert process.wait() == 0, output.read_text()
