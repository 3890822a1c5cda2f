"""Weights in float32, and rows of weights that several programs share."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from pfgm.kernels import posterior_mean, weights
from pfgm.kernels.tuning import Config

SHARED = Config({"BLOCK": 16})
# Slow in the interpreter.
slow = functools.partial(
    pytest.param, marks=[] if torch.cuda.is_available() else [pytest.mark.slow]
)


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def pieces(monkeypatch):
    """Pieces so small that a few hundred references have many."""
    for module in (weights, posterior_mean):
        monkeypatch.setattr(module, "WEIGH", SHARED)


@triton.jit
def weights_of(
    excess, nearest, radius, out, exponent: tl.float64, G: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.arange(0, BLOCK)
    rate = weights.score_rate(tl.load(nearest), tl.load(radius), exponent, G)
    value = weights.relative_weight(tl.load(excess + index), rate, exponent, G)
    tl.store(out + index, value)


def compute_weights(device, excess, nearest, radius, exponent):
    """Weights in float32 at squared distances nearest + excess."""
    count = len(excess)
    result = torch.empty(count, device=device)
    scalars = (torch.tensor([v], dtype=torch.float64, device=device) for v in (nearest, radius))
    weights_of[(1,)](
        torch.as_tensor(excess, device=device), *scalars, result,
        0.5 if math.isinf(exponent) else exponent, G=math.isinf(exponent), BLOCK=count,
    )  # fmt: skip
    return result.cpu().numpy().astype(np.longdouble)


def scores():
    """Nats below the largest score."""
    generator = np.random.default_rng(0)
    return np.concatenate([10 ** generator.uniform(-9, 0, 512), generator.uniform(0, 34, 512)])


@pytest.mark.parametrize("scale", [2.0**-200, 1e-9, 1.0, 2.0**200])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 5.0, 32.5, 1536.5, 1e9, 1e200, math.inf])
def test_weights_in_float32(device, exponent, scale):
    nats = scores()
    nearest, radius = 0.75 * scale, 0.5 * math.sqrt(scale)
    if math.isinf(exponent):
        excess = nats * 2 * radius**2
        exact = excess.astype(np.longdouble) / (2 * radius**2)
    else:
        s = nearest + radius**2
        excess = s * np.expm1(nats / exponent)
        exact = np.longdouble(exponent) * np.log1p(excess.astype(np.longdouble) / s)
    result = compute_weights(device, excess, nearest, radius, exponent)
    error = np.abs(result * np.exp(exact) - 1)
    assert (error <= 5e-7 * np.maximum(1, exact)).all()


@pytest.mark.parametrize("exponent", [0.5, 1536.5, math.inf])
def test_limits_of_weights(device, exponent):
    excess = np.array([0.0, 2.0**-290, 2.0**-149, 1.0, 1e30, 1e80, math.inf, math.nan])
    result = compute_weights(device, excess, 0.0, 0.0, exponent)
    assert result[0] == 1.0
    assert not result[1:7].any()
    assert np.isnan(result[7])
    result = compute_weights(device, excess, 1.0, 1.0, exponent)
    assert result[:3].tolist() == [1.0, 1.0, 1.0]
    assert result[6] == 0.0
    assert np.isnan(result[7])


@pytest.mark.parametrize(
    ("sizes", "D"),
    [
        ((3, 290, 5), 1.0), ((3, 290, 5), math.inf), ((17, 131, 40), 64.0),
        slow((17, 131, 40), math.inf), ((5, 33, 1), 1.0), ((5, 33, 1), 1e9),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("pieces", "poisoned")
def test_rows_in_pieces(op, sizes, D):
    x, references, sigma = op.problem(*sizes)
    assert weights.pieces_of(sizes[1]) > 2
    op.check(x, references, op.radius_of(sigma, D), D)


@pytest.mark.usefixtures("poisoned")
def test_rows_of_more_than_a_thousand_references(op):
    x, references, sigma = op.problem(2, 2100, 3)
    assert weights.pieces_of(2100) == 3
    op.check(x, references, sigma, 1.0)


@pytest.mark.usefixtures("pieces", "small", "poisoned")
def test_pieces_and_chunks(op):
    """The nearest is in the first, a middle or the last piece and chunk."""
    x, references, _ = op.problem(3, 290, 8)
    radius = torch.full((3,), 0.3, dtype=torch.float64, device=x.device)
    for shift in (0, 100, 289):
        op.check(x, references.roll(shift, 0).contiguous(), radius, 1.0)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.usefixtures("pieces")
def test_equal_references_in_several_pieces(op, D):
    x, references, sigma = op.problem(4, 90, 33)
    references[[3, 40, 41, 77]] = references[0].clone()
    radius = op.radius_of(sigma, D)
    x[0] = references[0] + 1e-3
    op.check(x, references, radius, D)
    x[0], radius[0] = references[0], 0.0
    mean, lse = op.compute(x, references, radius, D)
    torch.testing.assert_close(mean[0], references[0], rtol=2.0**-21, atol=0.0)
    assert lse[0].item() == (pytest.approx(math.log(5)) if math.isinf(D) else math.inf)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**110])
@pytest.mark.parametrize("B", [slow(3), 20])
@pytest.mark.usefixtures("pieces")
def test_very_small_and_very_large_values_in_pieces(op, B, scale):
    x, references, sigma = op.problem(B, 40, 33)
    op.check(x * scale, references * scale, sigma * scale, 1.0)


@pytest.mark.usefixtures("pieces")
def test_near_ties_far_from_the_origin_in_pieces(op):
    x, references = op.near_ties(20, 70, 64, 100.0)
    radius = torch.full((20,), 0.05, dtype=torch.float64, device=x.device)
    bound = (1e-5 * 2**-6 + 4e-7 * 100.0) * math.sqrt(64)
    assert op.mean_error(x, references, radius, 1.0) <= bound


@pytest.mark.parametrize("sizes", [(3, 40, 9), slow((17, 40, 9))])
@pytest.mark.usefixtures("pieces")
def test_pieces_twice_the_same_bits(op, sizes):
    problem = op.problem(*sizes)
    first, second = (op.everything(*problem, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("row", [10, slow(200), 289])
@pytest.mark.usefixtures("pieces", "small")
def test_a_value_that_is_not_finite_reaches_the_results(op, row):
    """It is in the first, a middle or the last chunk."""
    x, references, sigma = op.problem(3, 290, 9)
    references[row, 2] = math.nan
    mean, _, nearest, total = posterior_mean.posterior_mean(x, references, sigma, 1.0)
    for result in (mean, nearest, total):
        assert result.isnan().all()
