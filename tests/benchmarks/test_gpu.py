"""benchmarks/gpu/bench_gpu.py: its paths, on the CPU."""

import pytest

from benchmarks.common import subjects
from benchmarks.gpu import bench_gpu


@pytest.mark.parametrize("path", [path for path in bench_gpu.PATHS if path != "triton"])
def test_each_path_computes_the_mean(path):
    case = subjects.perturbed(subjects.photograph_crops(300, 16), 24)
    mean = bench_gpu.call_of(path, case, compiled=lambda function: function)()
    assert mean.shape == case.x.shape
    assert bench_gpu.error(case, mean) < 2e-5
    assert bench_gpu.error(case, mean + 1e-3) > 9e-4
