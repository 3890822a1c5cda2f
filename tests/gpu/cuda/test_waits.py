"""Every CUDA kernel waits for earlier launches before it accesses global memory, in all threads.
The executor looks at this in each launch on an sm_90; here each kernel is launched on one."""

import pytest
import torch

import pfgm
from benchmarks.codegen import cuda as codegen_cuda

PROBLEMS = {  # (B, M, N) → the multiprocessors and the type of references
    (8, 70, 96): (4, torch.float32),  # differences
    (40, 129, 1040): (9, torch.uint8),  # slices, which warps multiply
    (97, 127, 1552): (3, torch.float32),  # of warpgroups, in slices
    (256, 129, 256): (1, torch.float32),  # sums of warpgroups
    (300, 40, 64): (4, torch.float32),  # so many queries that order_queries sorts them
}


@pytest.fixture
def backend():
    return "native"


def test_every_kernel_waits_first(op, executor, device):
    executor.launches()
    for sizes, (multiprocessors, dtype) in PROBLEMS.items():
        executor.device(90, multiprocessors)
        x, references, radius = op.problem(*sizes, dtype=dtype)
        op.compute(x, references, radius, 1.0)
        op.gradients(x, references, radius, 1.0)
    x, slope = torch.randn(2, 70, 20, device=device)
    z = torch.linspace(1, 2, 70, device=device)
    pfgm.field_fn(x, z, slope, backend="native")
    pfgm.euler_step(x, pfgm.Field(slope, -z), z, z / 2, backend="native")
    kernels = {launch.kernel for launch in executor.launches()}
    assert kernels == set(codegen_cuda.declared())
    assert executor.errors() == []
