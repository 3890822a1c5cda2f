"""The kernels for NVIDIA's GPUs without one: their PTX runs in the executor of tests/ptx."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from pfgm.backends import native, native_calls
from pfgm.common import values

FOLDER = os.environ.get("PFGM_PTX")
"""The folder of a build with ``cmake -DPFGM_PTX=ON``."""

_ROOT = Path(__file__).resolve().parents[2]
# The tools of the running environment, activated or not.
_TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# The native backend keeps what it asks devices up to 63, and tests change the device.
_DEVICE = 100
_ARCHITECTURE = "80-virtual"
# By capability, the KiB of shared memory that a block may have.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def why_unbuilt() -> str | None:
    """Why the executor cannot be built, or None if it can."""
    tools = ("cmake", "ninja", os.environ.get("CUDACXX", "nvcc"))
    missing = [tool for tool in tools if shutil.which(tool, path=_TOOLS) is None]
    return f"no {' and no '.join(missing)} on PATH" if missing else None


def build(folder: str = "ptx", *options: str) -> Path:
    """Builds the executor, and the extension with the kernels' PTX, in a folder of build/. Only
    changed sources are compiled again. A second process waits until the first has built.

    Args:
        options: further ones of CMake.

    Returns:
        The folder.

    Raises:
        RuntimeError: it could not be built. The message has the compiler's output.
    """
    if reason := why_unbuilt():
        raise RuntimeError(f"the executor of PTX is not built: {reason}.")
    path = _ROOT / "build" / folder
    options = (
        "-DPFGM_PTX=ON",
        "-DPFGM_CUDA=1",
        f"-DCMAKE_CUDA_ARCHITECTURES={_ARCHITECTURE}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    )
    path.mkdir(parents=True, exist_ok=True)
    with (path / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(_ROOT), "-B", str(path), "-G", "Ninja", *options],
            ["cmake", "--build", str(path), "--parallel", "2"],
        ):
            environment = os.environ | {"PATH": _TOOLS}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(
                    f"the executor of PTX could not be built:\n{done.stdout}{done.stderr}"
                )
    return path


def environment(folder: Path) -> dict[str, str]:
    """For a process whose tensors in CPU memory stand for tensors on a GPU."""
    return {"PFGM_PTX": str(folder), "LD_PRELOAD": str(folder / "tests/ptx/libptx_memory.so")}


# What the host calls kernels.
_NAMES = {
    "ode_step_kernel": "ode_step",
    "normalised_field_kernel": "normalised_field",
}


def run(program: Path) -> None:
    """Runs a program of a build.

    Raises:
        RuntimeError: it failed. The message has its output.
    """
    done = subprocess.run(
        [program],
        env=os.environ | {"LD_PRELOAD": str(program.parent / "libptx_memory.so")},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{program.name}: {done.stdout}{done.stderr}")


class Launch(NamedTuple):
    """A launch. ``name`` is what the host calls it, ``kernel`` the name in the source."""

    name: str
    grid: tuple[int, int, int]  # in blocks
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory
    kernel: str
    counts: dict[str, int]  # how often warps execute some instructions
    entry: str  # the kernel's name in the PTX


class Executed(NamedTuple):
    """An instruction that has been executed: its line of a module."""

    module: int
    entry: str  # the kernel's name in the PTX
    line: int


# machine.h has them in this order.
_COUNTED = ("mma", "mma of tf32", "shuffle", "ballot")
_NAMESPACE = re.compile(r"(\d+)_GLOBAL__N_")
_IDENTIFIER = re.compile(r"(\d+)")


def source_name(name: str) -> str:
    """A kernel's mangled name without the namespace, whose name has a hash of the build."""
    # The namespace's length, its name, the kernel's length, its name, its template's arguments.
    namespace = _NAMESPACE.search(name)
    return name if namespace is None else name[namespace.end(1) + int(namespace[1]) :]


def plain_name(name: str) -> str:
    """The name in the source of a kernel whose mangled name this is."""
    name = source_name(name)
    length = _IDENTIFIER.match(name)
    return name if length is None else name[length.end() : length.end() + int(length[1])]


class Executor:
    """The executor of tests/ptx (``cudart.cpp``)."""

    def __init__(self, folder: str):
        self.library = ctypes.CDLL(
            str(Path(folder) / "tests/ptx/libptx_executor.so"), mode=ctypes.RTLD_GLOBAL
        )
        for name in ("ptx_error", "ptx_log", "ptx_text", "ptx_reached"):
            getattr(self.library, name).restype = ctypes.c_char_p
        # Without that library the bounds of memory are not known.
        self.set(anywhere="libptx_memory" not in os.environ.get("LD_PRELOAD", ""))

    def set(self, **options: int) -> None:
        """Sets options of the machine (``machine.h``) and of its device."""
        for name, value in options.items():
            if not self.library.ptx_set(name.encode(), int(value)):
                raise ValueError(f"the executor of PTX has no option {name!r}.")

    def order(self, seed: int) -> None:
        """Of warps and blocks: 0 ascending, 1 descending, others random, some instructions each."""
        self.set(order=seed, preempt=40 if seed > 1 else 0)

    def device(self, capability: int, multiprocessors: int = 4) -> None:
        self.capability = capability
        self.set(
            capability=capability,
            multiprocessors=multiprocessors,
            shared=SHARED[capability] << 10,
        )

    def launches(self) -> list[Launch]:
        """Those since the last call."""
        launches = []
        for i in range(self.library.ptx_log_size()):
            mangled, *words = self.library.ptx_log(i).decode().split(" ")
            x, y, z, threads, shared, *counts = map(int, words)
            kernel, counted = plain_name(mangled), dict(zip(_COUNTED, counts, strict=True))
            name = _NAMES.get(kernel, kernel)
            launches.append(Launch(name, (x, y, z), threads, shared, kernel, counted, mangled))
        self.library.ptx_clear_log()
        return launches

    def names(self) -> list[str]:
        """Of the launches since the last call."""
        return [launch.name for launch in self.launches()]

    def modules(self) -> list[str]:
        """The texts of PTX that are loaded."""
        return [self.library.ptx_text(i).decode() for i in range(self.library.ptx_modules())]

    def reload(self) -> None:
        """Loads all modules again. Nothing of them has been launched or executed then."""
        self.library.ptx_clear_log()
        for module, text in enumerate(self.modules()):
            self.library.ptx_reload(module, text.encode())

    def executed(self) -> Set[Executed]:
        """What kernels have executed since modules were loaded, of launches since the last call."""
        entries = {launch.entry for launch in self.launches()}
        return {
            Executed(module, entry, int(line))
            for module in range(self.library.ptx_modules())
            for entry in entries
            for line in self.library.ptx_reached(module, entry.encode()).split()
        }

    @contextmanager
    def replaced(self, module: int, text: str) -> Iterator[None]:
        """Another text of PTX in place of a module's."""
        before = self.library.ptx_text(module)
        self.library.ptx_reload(module, text.encode())
        try:
            yield
        finally:
            self.library.ptx_reload(module, before)
            self.errors()

    def errors(self) -> list[str]:
        """What the machine found wrong since the last call."""
        errors = [self.library.ptx_error(i).decode() for i in range(self.library.ptx_errors())]
        self.library.ptx_clear_errors()
        return errors


def _load(folder: str) -> ModuleType:
    """The extension of a build."""
    (path,) = Path(folder).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def in_place_of_a_gpu(folder: str) -> Iterator[None]:
    """The package takes tensors in CPU memory as those of a GPU, and calls a build's extension."""
    extension = _load(folder)
    replaced: list[tuple[Any, str, Any]] = [
        (native, "_native", extension),
        (native, "_on_cuda", lambda device: True),
        (native, "gpu_of", lambda value: getattr(value, "device", None)),
        (native, "current_stream", lambda device: (_DEVICE, 0)),
        (native_calls, "_native", extension),
        (values, "_on_cpu", lambda device: False),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
