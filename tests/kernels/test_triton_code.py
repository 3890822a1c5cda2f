"""What Triton compiles for GPUs that are not there: no kernel spills registers, or needs more
shared memory than a block has.

The operations run with a driver that launches nothing, so that the kernels, types and tiles are
those of real calls.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Capability → bytes of shared memory that a block can have. What is compiled for 80 runs on 86 and
89 too, whose smaller memory counts."""
TYPES = {t: getattr(torch, t) for t in ("float32", "bfloat16", "float16", "uint8")}


def run_operations(dtype: torch.dtype) -> None:
    """Every kernel: few and many queries, few, some and many features."""
    import pfgm
    from pfgm.backends import triton
    from pfgm.core.problems import PosteriorMean, State, Upstream

    for B, M, N in ((5, 40, 5), (16, 1600, 64), (300, 1600, 3072)):
        x, radius = torch.zeros(B, N), torch.ones(B, dtype=torch.float64)
        references = torch.zeros(M, N, dtype=dtype)
        for D, difference in ((1.0, True), (math.inf, False)):
            problem = PosteriorMean(x, references, radius, D, difference=difference)
            mean, _, nearest, total = triton.posterior_mean(problem)
            state, upstream = State(mean, nearest, total), Upstream(x, radius)
            triton.posterior_mean_backward(problem, state, upstream, (True, True, True))
    for N in (5, 64, 3072, 20_000) if dtype == torch.float32 else ():
        x, z = torch.zeros(5, N), torch.ones(5, dtype=torch.float64)
        triton.normalised_field(x, z, 5.0)
        for level in (z, 1.0):
            field = pfgm.Field(x, z.float())
            for slope in (field, x):
                pfgm.multistep_step(x, slope, level, 0.5, x, 2.0, backend="triton")
                pfgm.euler_step(x, slope, level, 0.5, backend="triton")


def compile_for(capability: int, dtype: torch.dtype) -> dict[str, tuple[int, int, int]]:
    """By kernel and number: registers, bytes of spills and of shared memory."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from pfgm.backends import triton
    from pfgm.common import values
    from pfgm.core import weights

    stand_in = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_device_capability=lambda device: divmod(capability, 10),
        map_python_to_cpp_type=lambda kind: kind,
    )
    figures = {}

    def look(kernel: CompiledKernel) -> None:
        if kernel._run is None:
            kernel._run, kernel.function, kernel.module = lambda *_: None, 0, 0
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
                usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", usage)}
            spills = found["STACK"] + found["LOCAL"]
            name = f"{kernel.metadata.name} {len(figures)}"
            figures[name] = found["REG"], spills, kernel.metadata.shared

    before = getattr(driver, "_active", None)
    driver.set_active(stand_in)
    try:
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(CompiledKernel, "_init_handles", look))
            patches.enter_context(mock.patch.object(triton, "supports", return_value=None))
            for module in (values, triton, weights):  # results are not written
                patches.enter_context(
                    mock.patch.object(module, "checks_values", return_value=False)
                )
            run_operations(dtype)
    finally:
        if before is not None:
            driver.set_active(before)
    return figures


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        pytest.param(c, t, marks=[] if (c, t) == (90, "float32") else pytest.mark.slow)
        for c in SHARED
        for t in TYPES
    ],
)
def test_no_kernel_spills(capability, dtype):
    """In a process of its own: this one may have an interpreter in place of a compiler."""
    program = [sys.executable, __file__, str(capability), dtype]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len({name.split()[0] for name in figures}) >= (12 if dtype == "float32" else 10)
    wrong = {
        name: (registers, spills, shared)
        for name, (registers, spills, shared) in figures.items()
        if spills or shared > SHARED[capability] or not 0 < registers <= 255
    }
    assert wrong == {}


if __name__ == "__main__":
    print(json.dumps(compile_for(int(sys.argv[1]), TYPES[sys.argv[2]])))
