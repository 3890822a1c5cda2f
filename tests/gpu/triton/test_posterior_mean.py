"""The posterior mean and its gradients in Triton: tiles, chunks, refinement."""

from __future__ import annotations

import functools
import importlib
import math

import numpy as np
import pytest
import torch
from pfgm.kernels import distances, posterior_mean

from pfgm.backends import triton
from pfgm.common.tensors import dequantise
from tests.backends.accuracy import assert_accurate

# Slow in the interpreter.
slow = functools.partial(
    pytest.param, marks=[] if torch.cuda.is_available() else [pytest.mark.slow]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
# At the edges of tiles (queries 16, 32; references 32, 64, padding 16; features 32, 64), and where
# products take over from differences: 32 features.
SHAPES = [
    (1, 1, 1), (4, 16, 64), (5, 17, 65), (15, 33, 31), (16, 64, 32), (17, 65, 33),
    (33, 129, 20), (40, 150, 97),
]  # fmt: skip


def problem(B, M, N, *, dtype=torch.float32, sigma=0.4, seed=0, device="cpu"):
    """Points around references, at noise levels a decade to each side of sigma."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        references = torch.randint(0, 256, (M, N), generator=generator, dtype=dtype)
    else:
        references = torch.randn(M, N, generator=generator).to(dtype)
    levels = sigma * torch.logspace(-1, 1, B, dtype=torch.float64)
    clean = dequantise(references, torch.float32)[torch.arange(B) % M]
    x = clean + levels[:, None].float() * torch.randn(B, N, generator=generator)
    return x.to(device), references.to(device), levels.to(device)


# ---- forward ----


@pytest.mark.parametrize(
    ("dtype", "index"),
    [
        *((torch.float32, index) for index in range(len(SHAPES))),
        *((dtype, SHAPES.index(s)) for dtype in DTYPES[1:] for s in ((5, 17, 65), (17, 65, 33))),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_forward(op, device, index, dtype):
    """Edges in float32, the reading of other types in differences and in products."""
    D = (1.0, math.inf, 64.0)[(index + DTYPES.index(dtype)) % 3]
    x, references, sigma = problem(*SHAPES[index], dtype=dtype, seed=index, device=device)
    radius = op.radius_of(sigma, D)
    op.check(x, references, radius, D)


@pytest.mark.parametrize(("B", "D"), [(3, 1.0), (20, math.inf)])
def test_many_features(op, device, B, D):
    """More than a panel of each kernel, and more than one block of ``merge``."""
    x, references, sigma = problem(B, 20, 1100, device=device)
    radius = op.radius_of(sigma, D)
    op.check(x, references, radius, D)


# ---- chunks, blocks and the order of queries change nothing but rounding ----


@pytest.mark.parametrize("N", [5, 40])
@pytest.mark.usefixtures("poisoned")
def test_pieces_and_stretches(op, device, monkeypatch, N):
    """Rows of weights that several programs share, sums in splits, segments of several tiles."""
    monkeypatch.setattr(posterior_mean, "BLOCK", 16)
    monkeypatch.setattr(distances, "PIECES", 2)
    x, references, sigma = problem(5, 150, N, device=device)
    references[[3, 129, 130, 148]] = references[0].clone()
    assert len(posterior_mean.sum_of_references(references, x.new_zeros(5, 160))) > 1
    for D in (1.0, math.inf):
        op.check(x, references, op.radius_of(sigma, D), D)
        op.check_gradients(x, references, op.radius_of(sigma, D), D)


def test_the_order_of_queries_does_not_change_a_bit(op, device, monkeypatch):
    x, references, sigma = problem(33, 40, 33, device=device)
    plain = op.compute(x, references, sigma, 1.0)
    monkeypatch.setattr(posterior_mean, "MIN_SORTED_QUERIES", 1)
    for a, b in zip(op.compute(x, references, sigma, 1.0), plain, strict=True):
        if triton.interpreted():
            # On some processors NumPy's product of a row depends on its place in the matrix.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("B", [1, 128, 100_000])
@pytest.mark.parametrize("N", [1, 3072, 200_000])
def test_workspace_and_launches_are_bounded(B, N):
    sizes = distances.sizes_of(B, 100_000, N, gradient=False)
    assert sizes == distances.sizes_of(B, 10_000_000, N, gradient=False)
    assert sizes.block * sizes.chunk <= 1.1 * distances.MAX_PAIRS
    assert sizes.block * N <= max(distances.MAX_VALUES, 16 * N)
    # Blocks of the second and third dimension of a launch are at most 65535.
    assert sizes.chunk / distances.TILE <= 65535
    assert sizes.chunk / posterior_mean.BLOCK <= distances.PIECES


# ---- distances that must be refined ----


def close_pairs(device):
    """Points between the two references of a pair, with pairs far from each other."""
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(35, 1, 64, generator=generator)
    references = pairs + 2.0**-6 * torch.randn(35, 2, 64, generator=generator)
    x = references[:20].mean(1) + 1e-3 * torch.randn(20, 64, generator=generator)
    radius = torch.full((20,), 0.05, dtype=torch.float64, device=device)
    return x.to(device), references.reshape(70, 64).to(device), radius


def refine_nothing(monkeypatch):
    """No distance has an error."""
    monkeypatch.setattr(distances, "MARGIN", 0.0)
    monkeypatch.setattr(distances, "NOISE", 0.0)


def test_without_refinement_results_are_wrong(op, device, monkeypatch):
    x, references, radius = close_pairs(device)
    assert op.mean_error(x, references, radius, 1.0) <= 1e-5 * 2**-6 * 8 + 4e-7 * 8
    refine_nothing(monkeypatch)
    assert op.mean_error(x, references, radius, 1.0) > 1e-4 * 2**-6 * 8


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_what_changes_no_weight_is_not_refined(op, device, monkeypatch, D):
    x, references, _ = problem(20, 70, 64, device=device)
    x, sigma = 30 * x, torch.full((20,), 30.0, dtype=torch.float64, device=device)
    result = op.compute(x, references, sigma, D)
    assert_accurate(result, op.expected(x, references, sigma, D), references, 1e-5)
    refine_nothing(monkeypatch)
    for refined, plain in zip(result, op.compute(x, references, sigma, D), strict=True):
        assert torch.equal(refined, plain)


@pytest.mark.parametrize("outlier", [1e4, 1e15, 1e30])
def test_references_far_from_the_others(op, device, outlier):
    """They are far larger than those whose mean is the centre."""
    x, references, sigma = problem(17, 40, 33, device=device)
    references[3] *= outlier
    x[1] = references[3] * 1.001
    op.check(x, references, sigma, 1.0)


def test_a_sample_of_equal_references(op, device):
    x, references, sigma = problem(17, 40, 33, device=device)
    references[torch.arange(16) * 40 // 16] = 0.0
    op.check(x, references, sigma, 1.0)


# ---- matrix units that truncate ----


def toward_zero(values: np.ndarray) -> np.ndarray:
    """Float64 as float32, rounded toward zero."""
    rounded = values.astype(np.float32)
    above = np.abs(rounded.astype(np.float64)) > np.abs(values)
    return np.where(above, np.nextafter(rounded, np.float32(0)), rounded)


def truncated_product(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """a @ b + total as matrix units may compute it: every instruction cuts all its addends off at
    24 bits of the largest, and rounds their sum toward zero."""
    depth = 16 if a.dtype == np.float16 else 8
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[1], depth):
        products = a[:, k : k + depth, None] * b[None, k : k + depth]
        addends = np.concatenate([products, total[:, None].astype(np.float64)], axis=1)
        largest = np.abs(addends).max(1, keepdims=True)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-300))) - 23)
        total = toward_zero((np.trunc(addends / unit) * unit).sum(1))
    return total


@pytest.fixture
def truncating(monkeypatch):
    """Products in Triton's interpreter that truncate."""
    if not triton.interpreted():
        pytest.skip("a GPU has its own matrix units")
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def product(builder, a, b, total, precision, imprecise):
        result = truncated_product(a.data, b.data, total.data)
        return interpreter.TensorHandle(result, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


def test_products_truncate():
    a, b = np.full((1, 16), 1.0, np.float16), np.full((16, 1), 1.0, np.float16)
    b[1:] = 2.0**-12
    total = np.full((1, 1), 2.0**12, np.float32)
    # At 2^12 the smallest of 24 bits is 2^-11. Half of it is lost 15 times.
    assert truncated_product(a, b, total) == 2.0**12 + 1.0


def smooth(count, N, generator):
    """Smooth curves, whose products add up in every panel, as those of photographs do."""
    waves = torch.cos(math.pi * torch.arange(6)[:, None] * torch.arange(N) / N)
    return torch.randn(count, 6, generator=generator) @ waves / 3 + 0.5


@pytest.mark.parametrize("level", [0.03, 0.3])
@pytest.mark.usefixtures("truncating")
def test_accurate_with_products_that_truncate(op, device, level):
    generator = torch.Generator().manual_seed(0)
    references = smooth(60, 320, generator)
    x = references[:17] + level * torch.randn(17, 320, generator=generator)
    sigma = torch.full((17,), level, dtype=torch.float64)
    x, references, sigma = (t.to(device) for t in (x, references, sigma))
    op.check(x, references, sigma, 1.0, tolerance=5e-6)


# ---- gradients ----


@pytest.mark.parametrize(
    ("sizes", "D"),
    [
        *(((1, 3, 2), D) for D in (1.0, 64.0, math.inf)),
        ((5, 17, 513), 64.0),
        ((17, 65, 33), 1.0),
        ((17, 65, 33), math.inf),
        slow((34, 40, 64), 64.0),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_gradients(op, device, sizes, D):
    x, references, sigma = problem(*sizes, device=device)
    radius = op.radius_of(sigma, D)
    op.check_gradients(x, references, radius, D, 2e-5)


def test_points_with_one_reference_have_no_noise_in_their_gradient(op, device):
    x, references, _ = problem(17, 40, 33, device=device)
    sigma = torch.full((17,), 1e-3, dtype=torch.float64, device=device)
    grad_x, _, _ = op.gradients(x, references, sigma, math.inf)
    # The weights of all others are below e^-1000. Only the score's part g (x − mean)/σ² is left.
    mean, _ = op.compute(x, references, sigma, math.inf)
    _, g = op.upstream(x, sigma)
    wanted = -(g / sigma**2)[:, None] * (x.double() - mean)
    assert torch.allclose(grad_x.double(), wanted, rtol=1e-5, atol=1e-6)
