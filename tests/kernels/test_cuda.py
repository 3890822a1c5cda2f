"""The CUDA kernels without a GPU: on the host, compiled as C++ with csrc/host_shim."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pfgm.backends import native

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("shared", "cuda")
BUILD = ROOT / "build" / "cuda_shim"
# The tools of the environment that runs the tests, activated or not.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

if native._native is None:
    pytest.skip("PFGM_NATIVE=0", allow_module_level=True)


def build() -> Path:
    """Builds the extension for the host. Only changed sources are compiled again."""
    if missing := [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=PATH) is None]:
        pytest.skip(f"the CUDA kernels are NOT TESTED: no {' and no '.join(missing)} on PATH")
    options = ["-G", "Ninja", "-DPFGM_CUDA_SHIM=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    environment = os.environ | {"PATH": PATH}
    for command in (["cmake", "-S", ROOT, "-B", BUILD, *options], ["cmake", "--build", BUILD]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (extension,) = BUILD.glob("_native*.so")
    return extension


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
