"""Weights in float32."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from pfgm.kernels import law


@triton.jit
def weights_of(
    excess, nearest, radius, out, exponent: tl.float64, G: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.arange(0, BLOCK)
    rate = law.rate_of(tl.load(nearest), tl.load(radius), exponent, G)
    value = law.relative_weight(tl.load(excess + index), rate, exponent, G)
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
