"""The CUDA kernels, compiled for the host, under the sanitizers of addresses, undefined behaviour
and threads (csrc/tests/cuda_test.cpp), and the host shim under the same (host_shim_test.cpp)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANNOT = 77  # what .ci/sanitize returns where it cannot run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the shim of CUDA needs Linux")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_kernels(sanitizer):
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PFGM_SANITIZERS": sanitizer,
        "PFGM_SANITIZE_BUILD": str(ROOT / "build" / "sanitize"),
    }
    done = subprocess.run(
        [ROOT / ".ci" / "sanitize", "host_shim_test", "cuda_test"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == CANNOT:
        pytest.skip(f"NOT TESTED with the sanitizer of {sanitizer}: {done.stderr.strip()}")
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"
