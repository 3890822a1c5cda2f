"""Where the build finds nvcc, and when pip has to bring it. setup.py and build_backend.py use this.

CUDA 13.0 is the one release of nvcc that pip can bring: its packages for CUDA 12 have no nvcc, and
drivers of CUDA 13.0 do not compile the PTX of later releases.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = tuple(
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
)
OLDEST_DRIVER = 580  # of CUDA 13
CAPABILITY = 8.0  # the least that the kernels need
USUAL_HOME = "/usr/local/cuda"


def toolkit() -> str | None:
    """nvcc of an installed CUDA toolkit."""
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), USUAL_HOME)
    usual = (shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)
    return named or next(filter(None, usual), None)


def settings() -> dict[str, str]:
    """The environment variables with which CMake finds nvcc: none if there is no nvcc."""
    if named := toolkit():
        return {"CUDACXX": named}
    for folder in sys.path:
        home = Path(folder, "nvidia", "cu13")
        if (home / "bin" / "nvcc").is_file():
            # nvcc looks for libraries in a folder lib64, which the packages do not have.
            paths = filter(None, (str(home / "lib"), os.environ.get("LIBRARY_PATH")))
            return {"CUDACXX": str(home / "bin" / "nvcc"), "LIBRARY_PATH": os.pathsep.join(paths)}
    return {}


def driver() -> int | None:
    """The major version of NVIDIA's driver; None without a GPU that can run the kernels."""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
        lines = [line.split(",") for line in gpus.splitlines()]
        return next((int(v.split(".")[0]) for v, c in lines if float(c) >= CAPABILITY), None)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def requirements() -> list[str]:
    """What pip has to bring for the build: nvcc, where a GPU can use it and there is none."""
    off = "0" in (os.environ.get("PFGM_CUDA"), os.environ.get("PFGM_NATIVE"))
    wanted = not off and toolkit() is None and (driver() or 0) >= OLDEST_DRIVER
    return list(PACKAGES) if wanted else []


def why_none() -> str:
    """Why the build has no nvcc, and how to have one."""
    version = driver()
    if version is None:
        return (
            f"no nvcc was found, and no GPU of compute capability {CAPABILITY} for which pip would "
            "bring it. Install the CUDA toolkit first, or pfgm where nvidia-smi shows the GPU"
        )
    if version < OLDEST_DRIVER:
        return (
            f"no nvcc was found, and pip has one for NVIDIA drivers from {OLDEST_DRIVER} on, not "
            f"for {version}. Update the driver, or install the toolkit of CUDA 12 first"
        )
    return (
        "no nvcc was found, which pip brings, but not with --no-build-isolation. Before that run "
        f"pip install {' '.join(PACKAGES)}"
    )
