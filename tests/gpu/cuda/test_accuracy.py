"""Where 5e-6 is hardest for the CUDA kernels: half-way between two references at a small σ, far
from all of them, at D = 1e6, and next to bytes. An independent float64 result decides."""

import math

import pytest
import torch

from pfgm.backends import native
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean, State, Upstream

INF = math.inf
FLOAT, HALF, BYTE = torch.float32, torch.float16, torch.uint8
LIMIT = 5e-6  # of docs/backends.md, relative to the values or to the largest gradient


def truth(x, y, radius, D, G):
    N, x, r = x.shape[1], x.double(), radius[:, None]
    apart = x[:, None] - y
    squared = apart.square().sum(2)
    least = squared.amin(1, keepdim=True)
    if math.isinf(D):
        score, slope = (least - squared) / (2 * r**2), -1 / r**2
    else:
        score = -(N + D) / 2 * torch.log1p((squared - least) / (least + r**2))
        slope = -(N + D) / (squared + r**2)
    p = score.softmax(1)
    mean = p @ y
    c = p * (G[:, None] * (y - mean[:, None])).sum(2) * slope
    by_distance = c[:, :, None] * apart
    return mean, by_distance.sum(1), p.T @ G - by_distance.sum(0)


# Queries, references, features, D, σ, type; how far x is from a reference, None: between two.
CASES = [
    *((B, 40, 1536, INF, s, FLOAT, None) for B in (4, 16) for s in (0.1, 0.02, 0.005)),
    *((16, 100, 784, 2048.0, s, BYTE, None) for s in (0.3, 0.52)),
    (16, 64, 784, 128.0, 0.1, HALF, None),
    (16, 70, 96, 1e6, 900.0, FLOAT, 3000.0),
    (16, 70, 784, 1e6, 9.0, FLOAT, 30.0),
    *((B, 70, 784, INF, 9.0, BYTE, 30.0) for B in (4, 16)),
    *((B, 70, 96, INF, 55.0, FLOAT, 3000.0) for B in (4, 16)),
]


@pytest.mark.parametrize(("B", "M", "N", "D", "sigma", "dtype", "far"), CASES, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_within_the_limit(executor, device, capability, B, M, N, D, sigma, dtype, far):
    executor.device(capability)
    executor.set(truncate=1)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(M, N, generator=generator)
    if dtype == BYTE:
        values = ((0.4 * values + 1) * 127.5).round().clamp(0, 255)
    references = values.to(dtype)
    y = dequantise(references, torch.float64)
    noise = torch.randn(B, N, generator=generator)
    x = ((y[:B] + y[B : 2 * B]) / 2 if far is None else y[:B] + far * noise).float()
    radius = torch.full((B,), sigma * (1 if math.isinf(D) else math.sqrt(D)), dtype=torch.float64)
    G = torch.randn(B, N, generator=generator)
    problem = PosteriorMean(*(t.to(device) for t in (x, references, radius)), D)
    try:
        mean, _, nearest, total = native.posterior_mean(problem)
        upstream = Upstream(G.to(device), torch.zeros_like(nearest))
        needs = (True, dtype == FLOAT, False)
        state = State(mean, nearest, total)
        grad_x, grad_y, _ = native.posterior_mean_backward(problem, state, upstream, needs)
    finally:
        executor.set(truncate=0)
    wanted, wanted_x, wanted_y = truth(x, y, radius, D, G.double())
    assert (mean.double().cpu() - wanted).abs().max() <= LIMIT * y.abs().max()
    for actual, exact in ((grad_x, wanted_x), (grad_y, wanted_y)):
        if actual is not None and exact.abs().max() > 1e-6:
            assert (actual.double().cpu() - exact).abs().max() <= LIMIT * exact.abs().max()
