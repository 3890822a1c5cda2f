"""Details of the CUDA kernels that keep digits, each in a problem that depends on it."""

import math

import pytest
import torch

from pfgm.backends import native
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean


def kept(x, references, radius):
    """What a forward pass keeps at D = ∞: distances, and what centres and scales references."""
    problem = PosteriorMean(x, references, radius, math.inf)
    memory = native.room_for_distances(problem)
    native.posterior_mean(problem, memory)
    return memory.cpu()


@pytest.mark.parametrize(("B", "M", "N", "multiprocessors"), [(66, 130, 64, 1), (17, 65, 1040, 6)])
def test_products_of_bytes_have_no_bias(op, executor, B, M, N, multiprocessors):
    """1/255 in float32 makes references too large by 2^-24. Norms of points and of references are
    corrected for it, in tiles and in slices of the features: else they are off by twice as much.
    Points that are divided by it are rounded, to 0.4·2^-24 less on average."""
    executor.device(90, multiprocessors)
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(0, 256, (M, N), generator=generator).to(torch.uint8)
    y = dequantise(references, torch.float64)
    for size in (0.1, 3.0):  # of points: norms of references count, or those of points
        x = size * torch.randn(B, N, generator=generator)
        far = torch.full((B,), 1e3 * N, dtype=torch.float64)  # nothing is computed again
        memory = kept(*(t.to(op.device) for t in (x, references, far)))
        stride = -(-M // 32) * 32
        distances = memory[: 8 * B * stride].view(torch.float64).view(B, stride)[:, :M]
        exact = torch.cdist(x.double(), y).square()
        assert abs(((distances - exact) / exact).mean()) < 2.0**-24


@pytest.mark.parametrize("N", [300, 9000])
def test_the_scales_are_those_of_all_features(op, N):
    """float16 would not hold the last features in a scale of the first 256."""
    references = torch.randn(16, N, generator=torch.Generator().manual_seed(0))
    references[:, :-20] *= 1e-6
    radius = torch.full((16,), 1e3, dtype=torch.float64)
    memory = kept(*(t.to(op.device) for t in (2 * references, references, radius)))
    scale, value_scale = (memory[k : k + 4].view(torch.float32).item() for k in (-512, -256))
    ordered = references.sort(0)[0]
    center = references.clamp(ordered[1], ordered[-2]).mean(0)
    assert 2**4 <= scale * (references - center).abs().max() < 2**5
    assert 2**11 <= value_scale * references.abs().max() < 2**12


def test_many_chunks_that_add_little(op, limits):
    """All 1999 other weights together are 8 times as large as the last digit of the first one in
    float32, and those of a chunk are smaller than half of it."""
    limits(references=128)
    references = torch.ones(2000, 1)
    references[0] = 0
    radius = torch.tensor([1 / 43], dtype=torch.float64).sqrt()  # 21.5 nats lower
    tensors = (t.to(op.device) for t in (torch.zeros(1, 1), references, radius))
    _, logsumexp, _, total = op.module.posterior_mean(PosteriorMean(*tensors, math.inf))
    expected = 1999 * math.exp(-21.5)
    assert total.item() - 1 == pytest.approx(expected, rel=0.1)
    assert logsumexp.item() == pytest.approx(expected, rel=0.1)


def test_gradient_of_a_reference_that_has_nearly_all_weight(op):
    """Its coefficient is what G·y differs from Σ p G·y, in digits that float32 does not have of the
    sum. It counts, because the points are far from it beside σ."""
    B, N = 18, 40
    references = torch.randn(2 * B, N, generator=torch.Generator().manual_seed(0))
    apart = references[B:] - references[:B]
    sigma = torch.full((B,), 1e-3, dtype=torch.float64)
    nats = torch.linspace(10, 14, B)[:, None]
    shift = 1e-6 * nats / apart.norm(dim=1, keepdim=True) ** 2
    x = references[:B] + (0.5 - shift) * apart
    op.check_gradients(*(t.to(op.device) for t in (x, references, sigma)), math.inf, 1e-4)


def test_sums_of_halves_end_at_their_limit(op, executor, limits):
    limits(halved=70)
    for M, halves in ((70, True), (71, False)):
        executor.launches()
        op.check(*op.problem(18, M, 40), 1.0)
        (launch,) = (each for each in executor.launches() if each.name == "weighted_sum")
        assert (launch.counts["mma of tf32"] == 0) is halves
