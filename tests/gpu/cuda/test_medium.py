"""Precision "medium" in the CUDA kernels: float32 references, rounded to float16 in products."""

import functools
import math

import pytest
import torch

import pfgm
from pfgm.backends import native
from pfgm.ops import eager

D_VALUES = [1.0, math.inf]
ANY, USUAL = 2e-2, 3e-3
"""The largest error of a mean, relative to the largest reference: between references at almost
equal distances, and otherwise (docs/backends.md)."""
# Each is computed in tiles of another size, on so many multiprocessors.
TILES = [(20, 90, 65, 4), (70, 190, 128, 7), (70, 300, 97, 4), (100, 129, 161, 1)]


@pytest.fixture
def backend():
    return "native"


@pytest.fixture
def mean_of(op):
    """Mean and log-sum-exp of a problem."""
    return functools.partial(op.compute, precision="medium")


@pytest.fixture
def check(op, mean_of):
    """Mean and log-sum-exp are as accurate as a tolerance says."""

    def check(x, references, radius, D, tolerance):
        expected = op.expected(x, references, radius, D)
        op.assert_accurate(mean_of(x, references, radius, D), expected, references, tolerance)

    return check


def two_vectors(B, M, N):
    """Each reference repeats one value. The rounding errors of its features are equal."""
    generator = torch.Generator().manual_seed(3)
    sign = 2.0 * (torch.rand(M, 1, generator=generator) < 0.5) - 1
    x = 1e-4 * torch.randn(B, N, generator=generator)
    return x, (1.1 * sign).expand(M, N).contiguous()


@pytest.mark.parametrize("D", D_VALUES)
@pytest.mark.parametrize("sizes", [*TILES, (20, 150, 1100, 4)])
@pytest.mark.usefixtures("poisoned")
def test_error(op, executor, check, sizes, D):
    B, M, N, multiprocessors = sizes
    executor.device(90, multiprocessors)
    x, references, sigma = op.problem(B, M, N)
    check(x, references, op.radius_of(sigma, D), D, USUAL)


@pytest.mark.parametrize("D", D_VALUES)
@pytest.mark.parametrize("N", [64, 512, 1100])
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_near_ties_far_from_the_origin(op, mean_of, N, offset, D):
    """The error is relative to the spread of the references, not to their distance from 0."""
    x, references = op.near_ties(20, 70, N, offset)
    radius = torch.full((20,), 0.05, dtype=torch.float64)
    mean, _ = mean_of(x, references, radius, D)
    expected, _ = op.expected(x, references, radius, D)
    spread = (references.double() - references.double().mean(0)).norm(dim=1).max()
    rounded = 1e-6 * references.double().norm(dim=1).max()  # float32
    assert (mean.double() - expected).norm(dim=1).max() <= ANY * spread + rounded


@pytest.mark.parametrize("N", [64, 512, 1100])
def test_rounding_errors_that_are_equal_do_not_add_up(check, N):
    """Rounded relative to a centre without a pattern they differ. Else means are off by 0.3."""
    x, references = two_vectors(20, 70, N)
    radius = torch.full((20,), 0.014 * math.sqrt(N), dtype=torch.float64)
    check(x, references, radius, 1.0, ANY)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e25])
def test_tiny_and_huge_values(op, mean_of, scale):
    x, references, sigma = (scale * value for value in op.problem(40, 150, 97))
    mean, _ = mean_of(x, references, sigma, 1.0)
    expected, _ = op.expected(x, references, sigma, 1.0)
    assert ((mean.double() - expected) / scale).norm(dim=1).max() <= USUAL * math.sqrt(97)


@pytest.mark.parametrize("D", D_VALUES)
def test_on_references_at_radius_zero(op, mean_of, D):
    _, references, _ = op.problem(20, 40, 97)
    references[7] = references[0]
    radius = torch.zeros(20, dtype=torch.float64)
    mean, _ = mean_of(references[:20].clone(), references, radius, D)
    torch.testing.assert_close(mean, references[:20], rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("near", [1e-2, 1e-3, 1e-4, 1e-5])
def test_near_a_reference(op, check, near):
    """Distances are far below the rounding errors of |x|² and |y|²."""
    _, references, _ = op.problem(40, 150, 300)
    generator = torch.Generator().manual_seed(2)
    x = references[:40] + near * torch.randn(40, 300, generator=generator)
    radius = torch.full((40,), near, dtype=torch.float64)
    check(x, references, radius, 1.0, USUAL)


def test_a_reference_out_of_range_of_float16(op, check):
    x, references, sigma = op.problem(40, 129, 64)
    references[70] *= 1e6
    check(x, references, sigma, 1.0, USUAL)


def test_values_that_are_not_finite(op, mean_of):
    x, references, sigma = op.problem(40, 129, 64)
    x[7, 5] = math.nan
    mean, lse = mean_of(x, references, sigma, 1.0)
    bad = mean.isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [7]
    assert lse.isnan().nonzero().flatten().tolist() == [7]
    references[66, 3] = math.inf
    mean, lse = mean_of(x, references, sigma, 1.0)
    assert mean.isnan().any(1).all()
    assert lse.isnan().all()


@pytest.mark.usefixtures("poisoned", "small")
def test_chunks_and_blocks(op, check):
    x, references, sigma = op.problem(36, 300, 40)
    check(x, references, sigma, 1.0, USUAL)


def test_rows_that_are_not_aligned(op, check):
    x, references, sigma = op.problem(40, 129, 66)
    for gap in (1, 2, 3):
        rows = torch.full((129, 66 + gap), math.nan)
        rows[:, gap:] = references
        check(x, rows[:, gap:], sigma, 1.0, USUAL)


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_gradients(op, executor, multiprocessors):
    executor.device(90, multiprocessors)
    x, references, sigma = op.problem(100, 150, 97)
    arguments = x, references, sigma.clamp(min=0.05), 1.0
    actual, wanted = op.gradients(*arguments, precision="medium"), op.expected_gradients(*arguments)
    for gradient, expected in zip(actual, wanted, strict=True):
        op.assert_gradient(gradient, expected, ANY)


@pytest.fixture
def products(executor):
    """products(run): matrix instructions for float16 in run(), by kernel."""

    def products(run):
        executor.launches()
        run()
        totals: dict[str, int] = {}
        for one in executor.launches():
            count = one.counts["mma"] + one.counts["mma to float16"]
            totals[one.name] = totals.get(one.name, 0) + count
        return totals

    return products


@pytest.mark.parametrize("sizes", [TILES[0], TILES[1], TILES[3]])
def test_one_product_in_place_of_three(op, executor, products, sizes):
    """Tiles are of the same size in both. Weighted sums leave out one product of three."""
    B, M, N, multiprocessors = sizes
    executor.device(80, multiprocessors)
    arguments = *op.problem(B, M, N), 1.0
    high, medium = (
        products(functools.partial(op.compute, *arguments, precision))
        for precision in ("high", "medium")
    )
    assert 3 * medium["distances"] == high["distances"]
    assert 3 * medium["weighted_sum"] == pytest.approx(2 * high["weighted_sum"], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_short_references_are_computed_as_in_high(op, mean_of, dtype):
    arguments = *op.problem(40, 129, 64, dtype=dtype), 1.0
    for actual, wanted in zip(mean_of(*arguments), op.compute(*arguments), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("sizes", [(8, 129, 64), (40, 129, 20)])
def test_differences_are_the_same(op, mean_of, sizes):
    arguments = *op.problem(*sizes), 1.0
    for actual, wanted in zip(mean_of(*arguments), op.compute(*arguments), strict=True):
        assert torch.equal(actual, wanted)


def test_the_order_of_threads_does_not_change_a_bit(op, executor, mean_of):
    arguments = *op.problem(100, 129, 97), 1.0
    for multiprocessors in (1, 4):
        executor.device(90, multiprocessors)
        results = []
        for order in (0, 1, 2, 3):
            executor.order(order)
            results.append(mean_of(*arguments))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("direct", [True, False])
def test_field_fn(op, monkeypatch, direct):
    monkeypatch.setattr(eager, "enabled", direct)
    x, references, z = op.problem(40, 129, 97)
    fields = {
        precision: pfgm.field_fn(x, z, references, backend="native", precision=precision)
        for precision in ("high", "medium")
    }
    expected = pfgm.field_fn(x.double(), z, references, backend="reference")
    error = {
        precision: (field_x.double() - expected[0]).norm(dim=1).max() / math.sqrt(97)
        for precision, (field_x, _) in fields.items()
    }
    assert error["high"] < 1e-5 < error["medium"] < USUAL


def test_a_reference_set(op):
    x, references, z = op.problem(40, 129, 97)
    held = pfgm.ReferenceSet(references)
    mean = pfgm.posterior_mean(x, held, r=z, backend="native", precision="medium")
    expected, _ = op.expected(x, references, z, 1.0)
    largest = references.double().norm(dim=1).max()
    assert (mean.double() - expected).norm(dim=1).max() <= USUAL * largest


def test_every_precision_has_a_number():
    assert native.PRECISIONS == {"high": 0, "medium": 1}
