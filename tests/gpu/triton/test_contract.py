"""The accuracy that docs/backends.md promises, where weights depend on small differences of large
distances: points half-way between two references, far from all, at any D."""

import math

import pytest
import torch

from pfgm.common.tensors import dequantise

TOLERANCE = 5e-6
SINGLE, HALF, BFLOAT, BYTE = torch.float32, torch.float16, torch.bfloat16, torch.uint8


def problem(B, M, N, dtype, kind, away):
    """Points half-way between two references, at them, or ``away`` from all."""
    generator = torch.Generator().manual_seed(B + M + N)
    references = torch.randn(M, N, generator=generator) * 0.5
    if dtype == BYTE:
        references = ((references + 1) * 127.5).round().clamp(0, 255)
    references = references.to(dtype)
    y = dequantise(references, torch.float32)
    first, second = torch.randint(0, M, (2, B), generator=generator)
    if kind == "between":
        return (y[first] + y[second]) / 2, references
    direction = torch.nn.functional.normalize(torch.randn(B, N, generator=generator), dim=1)
    return y[first] + away * math.sqrt(N) * direction, references


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sizes", "D", "dtype", "sigma"),
    [
        ((16, 60, 784), 2048.0, BYTE, 0.3), slow((16, 300, 784), 1.0, BYTE, 0.3),
        slow((16, 300, 784), 1.0, SINGLE, 0.3), slow((8, 200, 3072), 2048.0, SINGLE, 0.1),
        *(slow((4, 60, 1536), math.inf, SINGLE, sigma) for sigma in (0.1, 0.02)),
        ((4, 60, 1536), math.inf, SINGLE, 0.005), ((4, 60, 17), math.inf, SINGLE, 1e-3),
        ((4, 60, 256), math.inf, BYTE, 0.005), ((4, 60, 256), math.inf, HALF, 0.005),
        ((4, 60, 256), math.inf, BFLOAT, 0.005), ((4, 60, 256), 1e6, HALF, 0.1),
    ],
)  # fmt: skip
def test_between_two_references(op, sizes, D, dtype, sigma):
    x, references = problem(*sizes, dtype, "between", 0)
    radius = op.radius_of(torch.full((len(x),), sigma, dtype=torch.float64), D)
    op.check(*(t.to(op.device) for t in (x, references, radius)), D, TOLERANCE)


@pytest.mark.parametrize(
    ("sizes", "D", "dtype", "away", "sigma"),
    [
        ((8, 80, 64), 1e6, SINGLE, 3e2, 1e2), ((8, 80, 64), 1e6, SINGLE, 1e3, 0.1),
        ((8, 80, 64), 1e6, BYTE, 30.0, 1.0), ((4, 80, 64), math.inf, BYTE, 1e3, 10.0),
        ((8, 80, 64), 1.0, BYTE, 1e4, 1.0), ((8, 80, 9), 1e6, SINGLE, 3e2, 1e2),
        ((8, 80, 64), math.inf, SINGLE, 30.0, 3.0), ((8, 80, 9), math.inf, HALF, 30.0, 3.0),
    ],
)  # fmt: skip
def test_far_from_all(op, sizes, D, dtype, away, sigma):
    x, references = problem(*sizes, dtype, "far", away)
    radius = op.radius_of(torch.full((len(x),), sigma, dtype=torch.float64), D)
    tensors = [t.to(op.device) for t in (x, references, radius)]
    op.check(*tensors, D, TOLERANCE)
    actual = op.gradients(*tensors, D)
    expected = op.expected_gradients(x, dequantise(references, torch.float64), radius, D)
    for value, wanted in zip(actual, expected, strict=True):
        rounding = torch.finfo(value.dtype).eps if value.is_floating_point() else math.inf
        error = (value.double().cpu() - wanted).abs().max() / wanted.abs().max()
        assert error <= max(TOLERANCE, rounding)
