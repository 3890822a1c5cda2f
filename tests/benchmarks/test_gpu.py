"""benchmarks/gpu/bench_gpu.py: its paths, on the CPU."""

import pytest

from benchmarks.common import subjects
from benchmarks.gpu import bench_gpu


@pytest.mark.parametrize("path", [path for path in bench_gpu.PATHS if path != "triton"])
def test_each_path_computes_the_mean(path):
    case = subjects.perturbed(subjects.photograph_crops(300, 16), 24)
    mean = bench_gpu.call_of(path, case, compiled=lambda function: function)()
    assert mean.shape == case.x.shape
    # That of plain torch depends on the processor's matrix products: 2.2e-5 was seen.
    most = 1e-4 if path in ("plain torch", "compiled TF32") else 2e-5
    assert bench_gpu.error(case, mean) < most
    assert bench_gpu.error(case, mean + 1e-3) > 9e-4
