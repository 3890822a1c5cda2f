"""Every CUDA kernel waits for earlier launches, in all threads and before all that the shim sees.

That it waits before it accesses memory is in its source and its machine code
(tests/kernels/test_cuda_codegen.py).
"""

from __future__ import annotations

import pytest
import torch

import pfgm
from benchmarks.codegen import cuda as codegen_cuda

# Launches that have another name than their kernel.
OTHER_NAMES = {
    "warpgroup_distances": "distances",
    "warpgroup_sum": "weighted_sum",
    "ode_step_kernel": "ode_step",
    "normalised_field_kernel": "normalised_field",
}
PROBLEMS = {  # (B, M, N) → the architecture and the multiprocessors
    (8, 70, 96): (90, 4),  # differences
    (40, 129, 1040): (80, 9),  # slices
    (100, 129, 96): (80, 1),  # tiles of 128 × 128
    (97, 127, 1552): (90, 3),  # of warpgroups, in slices
    (256, 129, 256): (90, 1),  # sums of warpgroups
    (300, 40, 64): (90, 4),  # so many queries that order_queries sorts them
}


@pytest.fixture
def backend():
    return "native"


def test_every_kernel_waits_first(op, shim, device):
    shim.counts(True)
    for sizes, (architecture, multiprocessors) in PROBLEMS.items():
        shim.device(architecture, multiprocessors)
        x, references, radius = op.problem(*sizes)
        op.compute(x, references, radius, 1.0)
        op.gradients(x, references, radius, 1.0)
    shim.device(90, 1)
    op.compute(*op.problem(129, 129, 96), 1.0, "medium")
    x, slope = torch.randn(2, 70, 20, device=device)
    z = torch.linspace(1, 2, 70, device=device)
    pfgm.field_fn(x, z, slope, backend="native")
    pfgm.euler_step(x, pfgm.Field(slope, -z), z, z / 2, backend="native")
    launches = shim.counts(False)

    names = {OTHER_NAMES.get(name, name) for name in codegen_cuda.declared()}
    assert {name for name, *_ in launches} == names
    for name, _, threads, _, blocks in launches:
        assert set(blocks["wait_for_earlier_launches"]) == {threads}, name
