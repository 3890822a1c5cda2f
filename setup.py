"""Builds csrc/ into pfgm._native with CMake and Ninja. All other settings are in pyproject.toml.

Environment variables:
    PFGM_NATIVE=0     install pure Python, without the extension
    PFGM_CUDA=auto    compile the CUDA sources if nvcc is found (1: always, 0: never); csrc/nvcc.py
                      says where it is looked for, and when pip brings it
    CXX, CMAKE_ARGS, CMAKE_CUDA_ARCHITECTURES    passed to CMake
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
source_digest = runpy.run_path(str(ROOT / "csrc" / "source_digest.py"))["source_digest"]
nvcc = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc" / "nvcc.py")))


def require_compiler() -> None:
    """Exits with a short message if there is no C++ compiler. CMake's message is a page long."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = named[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        sys.exit(
            f"pfgm: no C++ compiler found (looked for {', '.join(candidates)}). Install one "
            "(for example g++ or clang++) or name it in CXX; PFGM_NATIVE=0 installs pfgm as "
            "pure Python, without its native kernels."
        )


def environment_choice(name: str, allowed: tuple[str, ...], default: str) -> str:
    """The value of an environment variable. Exits with a message if it is not allowed."""
    value = os.environ.get(name, default)
    if value not in allowed:
        sys.exit(f"pfgm: {name} is {value!r}; allowed are {', '.join(allowed)}.")
    return value


class CMakeBuild(build_ext):
    """Builds the extension with CMake, in the place that setuptools chooses."""

    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        cuda = environment_choice("PFGM_CUDA", ("auto", "0", "1"), "auto")
        environment = os.environ | (nvcc.settings() if cuda != "0" else {})
        configure = [
            f"-DPFGM_CUDA={cuda}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPFGM_SOURCE_DIGEST={source_digest()}",
        ]
        if cuda != "0" and "CUDACXX" not in environment:
            configure.append(f"-DPFGM_NO_NVCC={nvcc.why_none()}")
        if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # --fresh, because the tools of an isolated build environment have a new path every time.
        subprocess.run(
            ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *configure],
            check=True,
            env=environment,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)


native = environment_choice("PFGM_NATIVE", ("0", "1"), "1") == "1"
setup(
    packages=[*find_packages(include=["pfgm", "pfgm.*"]), "pfgm.kernels"],
    package_dir={"pfgm.kernels": "kernels"},
    py_modules=["pfgm_command"],
    ext_modules=[Extension("pfgm._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
