"""Whether an NVIDIA driver and a GPU can run the CUDA runtime and kernels in the extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class CudaRuntime(NamedTuple):
    """The CUDA runtime in the extension, and the driver that it found.

    Versions of CUDA are 1000 × major + 10 × minor.
    """

    version: int
    """Of the runtime; 0 if the extension was built without CUDA."""
    driver: int
    """The newest version of CUDA that the driver supports; 0 without a driver."""
    oldest_driver: str | None
    """The oldest driver that can run the runtime, such as "580". None if the extension was built
    without CUDA; empty if the build knew none for its version of CUDA."""


def cuda_lines(runtime: CudaRuntime, names: Sequence[str], error: str) -> list[str]:
    """The lines of ``pfgm info`` about CUDA.

    Args:
        runtime: as the extension reports it.
        names: of the GPUs that the runtime finds.
        error: why it finds none.
    """
    gpus = ", ".join(names) or error
    if not runtime.version:
        return [f"CUDA       {gpus}"]
    line = f"CUDA       runtime {version_text(runtime.version)}, needs {_needed(runtime)}; "
    if not runtime.driver:
        return [f"{line}there is no NVIDIA driver"]
    # Within a major version an older driver runs a newer runtime.
    new_enough = runtime.driver // 1000 >= runtime.version // 1000
    line += f"the driver, for CUDA {version_text(runtime.driver)}, is "
    return [f"{line}new enough", f"GPUs       {gpus}"] if new_enough else [f"{line}too old"]


def _needed(runtime: CudaRuntime) -> str:
    if runtime.oldest_driver:
        return f"NVIDIA driver {runtime.oldest_driver} or later"
    return f"an NVIDIA driver for CUDA {runtime.version // 1000} or later"


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a build for these architectures has machine code for a GPU, as "80 90-real" has for
    8.0, 8.6, 8.9 and 9.0. For others the driver compiles PTX."""
    for each in architectures.split():
        number, _, kind = each.partition("-")
        major, minor = divmod(int(number.rstrip("af")), 10)
        # Code for "90a", which CMAKE_CUDA_ARCHITECTURES may name, runs on 9.0 alone.
        same = minor == capability[1] if number.endswith("a") else minor <= capability[1]
        if kind != "virtual" and major == capability[0] and same:
            return True
    return False


def version_text(version: int) -> str:
    """Such as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"
