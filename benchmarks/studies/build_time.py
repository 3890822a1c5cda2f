"""Times a full build of the extension, without CUDA and, if nvcc is found, with it.

python -m benchmarks.studies.build_time
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time

from benchmarks.common.folders import ROOT
from benchmarks.common.machine import store


def build_seconds(cuda: str) -> float:
    """Seconds of a build with PFGM_CUDA set to ``cuda``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder]
        environment = {**os.environ, "PFGM_CUDA": cuda}
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def main() -> None:
    result = {"without CUDA": build_seconds("0")}
    if shutil.which("nvcc"):
        result["with CUDA"] = build_seconds("1")
    print(result)
    print(store("build", result))


if __name__ == "__main__":
    main()
