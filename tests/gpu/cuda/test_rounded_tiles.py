"""Tiles of 128 references × 128 or 256 queries in precision "medium", multiplied by warpgroups."""

import math

import pytest
import torch

ANY, USUAL = 2e-2, 3e-3  # errors of a mean, as in test_medium.py
SAME = 1e-5  # the largest difference to tiles of warps, which add up a panel in another order
# Queries, references and features at the edges of tiles, groups of queries and panels. On one
# multiprocessor these tiles take least time.
SIZES = [
    (97, 65, 32), (100, 40, 36), (128, 128, 64), (129, 3, 68), (130, 129, 32), (193, 127, 100),
    (255, 129, 36), (256, 300, 160), (257, 129, 100),
]  # fmt: skip
# Queries of a tile → a problem whose tiles have slices of different lengths, and multiprocessors.
SLICED = {128: ((97, 127, 1552), 3), 256: ((201, 127, 1552), 3)}


@pytest.fixture
def backend():
    return "native"


@pytest.fixture
def run(executor):
    """run(call, sizes, multiprocessors) calls call() and makes sure that it takes such tiles.

    It returns what the call does, and the slices of the features.
    """

    def run(call, sizes, multiprocessors=1):
        B, M, N = sizes
        executor.device(90, multiprocessors)
        executor.launches()
        result = call()
        launches = [
            (one.grid, one.counts["wgmma"], one.counts["mma"] + one.counts["mma to float16"])
            for one in executor.launches()
            if one.name == "distances"
        ]
        assert launches
        queries = 128 if B <= 128 else 256
        for grid, products, others in launches:
            assert grid[:2] == (-(-M // 128), -(-B // queries))
            # Two warpgroups, four warps each, 64 queries and half a panel at a time.
            panels = -(-N // 32) * grid[0] * grid[1]
            assert (products, others) == (8 * queries // 64 * 2 * panels, 0)
        return result, {grid[2] for grid, *_ in launches}

    return run


@pytest.fixture
def mean_of(op):
    def mean_of(x, references, radius, D=1.0):
        return op.compute(x, references, radius, D, "medium")

    return mean_of


@pytest.fixture
def check(op, executor, run, mean_of):
    """Results are accurate, and those of the tiles of warps."""

    def check(x, references, radius, D, multiprocessors=1):
        sizes = len(x), *references.shape
        results, slices = run(lambda: mean_of(x, references, radius, D), sizes, multiprocessors)
        op.assert_accurate(results, op.expected(x, references, radius, D), references, ANY)
        executor.device(80, multiprocessors)
        warp_results = mean_of(x, references, radius, D)
        op.assert_accurate(results, [each.double() for each in warp_results], references, SAME)
        return slices

    return check


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.usefixtures("poisoned")
def test_error(op, check, sizes):
    D = (1.0, math.inf)[SIZES.index(sizes) % 2]
    x, references, sigma = op.problem(*sizes)
    assert check(x, references, op.radius_of(sigma, D), D) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("queries", SLICED)
@pytest.mark.usefixtures("poisoned")
def test_slices(op, check, queries, D):
    sizes, multiprocessors = SLICED[queries]
    x, references, sigma = op.problem(*sizes)
    (slices,) = check(x, references, op.radius_of(sigma, D), D, multiprocessors=multiprocessors)
    assert slices > 1


@pytest.mark.parametrize("sizes", [(100, 129, 36), (129, 127, 68), (257, 65, 32)])
@pytest.mark.usefixtures("poisoned")
def test_gradients(op, run, sizes):
    x, references, sigma = op.problem(*sizes)
    arguments = x, references, sigma.clamp(min=0.05), 1.0
    actual, _ = run(lambda: op.gradients(*arguments, precision="medium"), sizes)
    for gradient, expected in zip(actual, op.expected_gradients(*arguments), strict=True):
        op.assert_gradient(gradient, expected, ANY)


@pytest.mark.slow
@pytest.mark.parametrize("queries", SLICED)
def test_gradients_with_slices(op, run, queries):
    sizes, multiprocessors = SLICED[queries]
    x, references, sigma = op.problem(*sizes)
    arguments = x, references, sigma.clamp(min=0.05), 1.0
    actual, _ = run(lambda: op.gradients(*arguments, precision="medium"), sizes, multiprocessors)
    for gradient, expected in zip(actual, op.expected_gradients(*arguments), strict=True):
        op.assert_gradient(gradient, expected, ANY)


@pytest.mark.parametrize("sizes", [(200, 129, 36), (129, 100, 100)])
def test_both_tiles_have_the_same_bits(op, executor, sizes):
    """Panels are added up in the same order. The number of multiprocessors decides which tiles."""
    B, M, _ = sizes
    x, references, sigma = op.problem(*sizes)
    results = []
    for queries, multiprocessors in ((256, 1), (128, 2 * -(-M // 128))):
        executor.device(90, multiprocessors)
        executor.launches()
        results.append(op.compute(x, references, sigma, 1.0, "medium"))
        grids = [tuple(grid) for name, grid, *_ in executor.launches() if name == "distances"]
        assert grids == [(-(-M // 128), -(-B // queries), 1)]
    (_, lse), (_, other) = results
    assert torch.equal(lse, other)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("B", [100, 201])
def test_near_ties_far_from_the_origin(op, run, mean_of, B, offset):
    x, references = op.near_ties(B, 70, 512, offset)
    radius = torch.full((B,), 0.05, dtype=torch.float64)
    (mean, _), _ = run(lambda: mean_of(x, references, radius), (B, 70, 512))
    expected, _ = op.expected(x, references, radius, 1.0)
    spread = (references.double() - references.double().mean(0)).norm(dim=1).max()
    rounded = 1e-6 * references.double().norm(dim=1).max()  # float32
    assert (mean.double() - expected).norm(dim=1).max() <= ANY * spread + rounded


@pytest.mark.parametrize("near", [1e-2, 1e-5])
def test_near_a_reference(op, check, near):
    """Distances are far below the rounding errors of |x|² and |y|²."""
    _, references, _ = op.problem(200, 200, 300)
    generator = torch.Generator().manual_seed(2)
    x = references + near * torch.randn(200, 300, generator=generator)
    check(x, references, torch.full((200,), near, dtype=torch.float64), 1.0)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e25])
def test_tiny_and_huge_values(op, run, mean_of, scale):
    sizes = (150, 129, 100)
    x, references, sigma = (scale * value for value in op.problem(*sizes))
    (mean, _), _ = run(lambda: mean_of(x, references, sigma), sizes)
    expected, _ = op.expected(x, references, sigma, 1.0)
    assert ((mean.double() - expected) / scale).norm(dim=1).max() <= USUAL * 10


@pytest.mark.parametrize("at", [0, 63, 64, 127, 128])
def test_the_nearest_reference_is_found_in_every_tile_of_minima(op, check, device, at):
    """A query lies at a reference of each tile of 64; all others are far away."""
    B, M, N = 200, 129, 64
    references = 3 * torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(device)
    x = references[torch.arange(B) % M].clone()
    x[::2] = references[at]
    check(x, references, torch.full((B,), 1e-3, dtype=torch.float64, device=device), 1.0)


@pytest.mark.parametrize("at", [5, 70, 128])
def test_a_reference_out_of_range_of_float16(op, run, check, at):
    """Its products are not finite, and it is refined; so is its G·y in the backward pass."""
    sizes = (200, 129, 64)
    x, references, sigma = op.problem(*sizes)
    references[at] *= 1e6
    check(x, references, sigma, 1.0)
    arguments = x, references, sigma.clamp(min=0.05), 1.0
    gradients, _ = run(lambda: op.gradients(*arguments, precision="medium"), sizes)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [3, 100])
@pytest.mark.parametrize("B", [100, 200])
def test_references_that_are_not_finite(op, run, mean_of, B, at, bad):
    sizes = (B, 129, 64)
    x, references, sigma = op.problem(*sizes)
    references[at, 7] = bad
    (mean, lse), _ = run(lambda: mean_of(x, references, sigma), sizes)
    assert mean.isnan().any(1).all()
    assert lse.isnan().all()


@pytest.mark.parametrize("at", [0, 64, 127, 128, 199])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_queries_that_are_not_finite(op, run, mean_of, at, bad):
    sizes = (200, 129, 64)
    x, references, sigma = op.problem(*sizes)
    x[at, 63] = bad
    (mean, lse), _ = run(lambda: mean_of(x, references, sigma), sizes)
    assert mean.isnan().any(1).nonzero().flatten().tolist() == [at]
    assert lse.isnan().nonzero().flatten().tolist() == [at]


def test_chunks_and_blocks(op, executor, limits, mean_of):
    """The last chunk and the last block are smaller."""
    x, references, sigma = op.problem(300, 300, 100)
    limits(queries=150, references=256)
    executor.device(90, 1)
    executor.launches()
    results = mean_of(x, references, sigma)
    grids = [tuple(grid) for name, grid, *_ in executor.launches() if name == "distances"]
    assert grids == [(2, 1, 1), (1, 1, 1)] * 2
    op.assert_accurate(results, op.expected(x, references, sigma, 1.0), references, USUAL)


def test_rows_that_are_not_aligned_take_other_tiles(op, executor, mean_of, device):
    B, M, N = 200, 129, 66
    x, references, sigma = op.problem(B, M, N)
    executor.device(90, 1)
    for gap in (1, 2, 3):
        rows = torch.full((M, N + gap), math.nan, device=device)
        rows[:, gap:] = references
        executor.launches()
        results = mean_of(x, rows[:, gap:], sigma)
        assert not any(one.counts["wgmma"] for one in executor.launches())
        op.assert_accurate(results, op.expected(x, references, sigma, 1.0), references, USUAL)


@pytest.mark.parametrize("sizes", [(100, 129, 100), (200, 129, 100)])
def test_the_order_of_threads_does_not_change_a_bit(op, executor, run, mean_of, sizes):
    x, references, sigma = op.problem(*sizes)
    results = []
    for order in (0, 1, 2, 3):
        executor.order(order)
        results.append(run(lambda: mean_of(x, references, sigma), sizes)[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
