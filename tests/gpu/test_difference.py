"""The digits of x − mean in every backend, where x is near its mean.

The published formula in float32 sums differences x − x_j. It is the yardstick: wherever its error
is within the tolerance, so is that of the kernels.
"""

import math

import pytest
import torch

import pfgm
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean, State, Upstream

TOLERANCE = 2e-5


def problem(B, M, N, z, offset=0.0):
    """Points at distances of the size of z from references of unit size, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    references = offset + torch.randn(M, N, generator=generator)
    noise = torch.randn(B, N, generator=generator, dtype=torch.float64)
    x = references[torch.arange(B) % M].double() + z * noise
    return x.float(), references, torch.full((B,), z, dtype=torch.float64)


def formula(x, references, radius, D):
    """Σ p_j (x − y_j), in the dtype of x."""
    differences = x[:, None] - dequantise(references, x.dtype)
    squared = differences.square().sum(2)
    r = radius.to(x.dtype)[:, None]
    if math.isinf(D):
        p = (-squared / (2 * r * r)).softmax(1)
    else:
        s = squared + r * r
        p = (s.amin(1, keepdim=True) / s) ** ((x.shape[1] + D) / 2)
        p = p / p.sum(1, keepdim=True)
    return (p[:, :, None] * differences).sum(1)


def relative_error(difference, exact, radius):
    """Of the field E = (x − mean, r)."""
    size = (exact.square().sum(1) + radius.square()).sqrt()
    return float(((difference.double().cpu() - exact).norm(dim=1) / size).max())


def check(op, x, references, radius, D=1.0):
    exact = formula(x.double(), references, radius, D)
    assert relative_error(formula(x, references, radius, D), exact, radius) < TOLERANCE
    tensors = (t.to(op.device) for t in (x, references, radius))
    arguments = PosteriorMean(*tensors, D, difference=True)
    assert relative_error(op.module.posterior_mean(arguments)[0], exact, radius) < TOLERANCE


@pytest.mark.parametrize(
    ("B", "M", "N", "z", "offset"),
    [
        (5, 70, 2, 1e-3, 1e4), (1, 1100, 1, 1e-2, 1e4), (3, 70, 33, 0.03, 0.0),
        (3, 70, 33, 0.03, 1e4), (16, 70, 64, 1e-3, 0.0), (16, 40, 64, 1e-3, 1e4),
        (16, 40, 512, 1e-3, 1e4), (2, 20, 1030, 1e-2, 1e4),
        pytest.param(16, 20, 3072, 1e-3, 0.0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_near_references(op, B, M, N, z, offset):
    check(op, *problem(B, M, N, z, offset))


@pytest.mark.parametrize(
    ("B", "N", "D"), [(3, 8, 1.0), (3, 8, math.inf), (20, 40, 64.0), (20, 40, math.inf)]
)
def test_near_and_far(op, B, N, D):
    """Rows of one launch, with one weight and with many."""
    x, references, radius = problem(B, 100, N, 1e-2)
    radius = torch.logspace(-3, 1, B, dtype=torch.float64)
    x += (radius[:, None] * torch.randn(B, N, generator=torch.Generator().manual_seed(1))).float()
    check(op, x, references, radius * (1 if math.isinf(D) else math.sqrt(D)), D)


@pytest.mark.parametrize(("B", "N", "offset"), [(3, 64, 0.0), (20, 64, 1e4)])
def test_between_two_references_that_are_close(op, B, N, offset):
    """Both count, and x − mean is small beside either."""
    x, references, radius = problem(B, 40, N, 1e-2, offset)
    step = 1e-2 * torch.randn(B, N, generator=torch.Generator().manual_seed(1))
    references = torch.cat([references, references[:B] + step])
    check(op, ((x + references[-B:]) / 2).float(), references, radius)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("B", "N", "z", "offset"), [(3, 2, 1e-3, 1e4), (18, 40, 2.0, 0.0)])
def test_chunks(op, B, N, z, offset):
    check(op, *problem(B, 140, N, z, offset))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("N", [2, 40])
def test_types_of_references(op, N, dtype):
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(0, 256, (40, N), generator=generator, dtype=torch.uint8)
    references = references if dtype == torch.uint8 else (references / 127.5 - 1).to(dtype)
    exact = dequantise(references, torch.float64)
    x = (exact[:20] + 1e-6 * torch.randn(20, N, generator=generator).double()).float()
    radius = torch.full((20,), 1e-6, dtype=torch.float64)
    expected = formula(x.double(), references, radius, 1.0)
    tensors = (t.to(op.device) for t in (x, references, radius))
    arguments = PosteriorMean(*tensors, 1.0, difference=True)
    assert relative_error(op.module.posterior_mean(arguments)[0], expected, radius) < TOLERANCE


@pytest.mark.parametrize(("N", "dtype"), [(2, torch.uint8), (40, torch.float32), (40, torch.uint8)])
def test_score(op, N, dtype):
    """∂ log-sum-exp/∂x = −(N + D) Σ p_j (x − y_j)/s_j, at points that are 1e5 times closer to a
    reference than to the origin."""
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(0, 256, (40, N), generator=generator, dtype=torch.uint8).to(dtype)
    exact = dequantise(references, torch.float64)
    x = (exact[:20] + 1e-5 * exact.abs().max() * torch.randn(20, N, generator=generator)).float()
    differences = x.double()[:, None] - exact
    radius = differences.norm(dim=2).amin(1)
    s = differences.square().sum(2) + radius[:, None] ** 2
    p = (-(N + 1) / 2 * s.log()).softmax(1)
    expected = -(N + 1) * ((p / s)[:, :, None] * differences).sum(1)
    problem = PosteriorMean(*(t.to(op.device) for t in (x, references, radius)), 1.0)
    mean, _, nearest, total = op.module.posterior_mean(problem)
    upstream = Upstream(torch.zeros_like(mean), torch.ones_like(nearest))
    state = State(mean, nearest, total)
    score, _, _ = op.module.posterior_mean_backward(problem, state, upstream, (True, False, False))
    error = (score.double().cpu() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < TOLERANCE


@pytest.mark.parametrize("times", [1e-30, 1e15])
@pytest.mark.parametrize(("B", "N"), [(3, 8), (20, 40)])
def test_tiny_and_huge_values(op, B, N, times):
    x, references, radius = problem(B, 60, N, 1e-3)
    exact = formula((x * times).double(), references * times, radius * times, math.inf)
    tensors = (t.to(op.device) for t in (x * times, references * times, radius * times))
    arguments = PosteriorMean(*tensors, math.inf, difference=True)
    result = op.module.posterior_mean(arguments)[0]
    assert relative_error(result, exact, radius * times) < TOLERANCE


@pytest.mark.parametrize(("B", "N"), [(3, 8), (20, 40)])
def test_difference_beyond_float32(op, B, N):
    """Finite points and references may be further apart than float32 holds."""
    x = torch.full((B, N), 3e38, device=op.device)
    radius = torch.ones(B, dtype=torch.float64, device=op.device)
    arguments = PosteriorMean(x, -x[:2], radius, 1.0, difference=True)
    with pfgm.debug_checks(), pytest.raises(ValueError, match="so far apart"):
        op.module.posterior_mean(arguments)
