"""Blocks of the CUDA kernel ``distances`` that share out the features, and ``finish_distances``."""

import itertools
import math

import pytest
import torch

from pfgm.backends import native
from pfgm.core.problems import PosteriorMean

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
# Queries and references of a tile → a problem whose tiles have slices, and the multiprocessors.
# There are parts of tiles, odd numbers of panels, and last panels that are not whole. The slices of
# a problem have different numbers of trips.
PROBLEMS = {
    (32, 64): ((17, 65, 1040), 6),
    (64, 64): ((40, 129, 1040), 9),
    (128, 128): ((97, 127, 1552), 3),
}
TILES = pytest.mark.parametrize("tile", PROBLEMS, ids=lambda tile: "{}x{}".format(*tile))


@pytest.fixture
def backend():
    return "native"


@pytest.fixture
def sliced(executor):
    """sliced(tile, run) calls run() on a device whose blocks take these tiles and slices."""

    def sliced(tile, run):
        (B, M, _), multiprocessors = PROBLEMS[tile]
        queries, references = tile
        executor.device(80, multiprocessors)
        executor.launches()
        result = run()
        launches = [(name, tuple(grid)) for name, grid, *_ in executor.launches()]
        grids = [grid for name, grid in launches if name == "distances"]
        assert grids
        assert {grid[:2] for grid in grids} == {(-(-M // references), -(-B // queries))}
        assert all(grid[2] > 1 for grid in grids)
        assert sum(name == "finish_distances" for name, _ in launches) == len(grids)
        return result

    return sliced


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tile", "dtype"),
    [
        *itertools.product(PROBLEMS, DTYPES[:1]),
        *itertools.product([(64, 64), (128, 128)], DTYPES[1:]),
    ],
    ids=str,
)
@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.usefixtures("poisoned")
def test_forward(op, sliced, tile, dtype, D):
    sizes, _ = PROBLEMS[tile]
    x, references, sigma = op.problem(*sizes, dtype=dtype)
    sliced(tile, lambda: op.check(x, references, op.radius_of(sigma, D), D))


@pytest.mark.slow
@TILES
@pytest.mark.usefixtures("poisoned")
def test_gradients(op, sliced, tile):
    sizes, _ = PROBLEMS[tile]
    x, references, sigma = op.problem(*sizes)
    radius = op.radius_of(sigma.clamp(min=0.05), 1.0)
    sliced(tile, lambda: op.check_gradients(x, references, radius, 1.0))


@pytest.mark.slow
@TILES
def test_slices_change_no_more_than_rounding(op, executor, sliced, tile):
    """On one multiprocessor there are none."""
    sizes, _ = PROBLEMS[tile]
    x, references, sigma = op.problem(*sizes)
    results = sliced(tile, lambda: op.everything(x, references, sigma, 1.0))
    executor.device(80, 1)
    executor.names()
    whole = op.everything(x, references, sigma, 1.0)
    assert "finish_distances" not in executor.names()
    (mean, lse, nearest, _, *gradients) = results
    (whole_mean, whole_lse, whole_nearest, _, *whole_gradients) = whole
    op.assert_accurate((mean, lse), (whole_mean.double(), whole_lse), references, 2e-6)
    torch.testing.assert_close(nearest, whole_nearest, rtol=1e-6, atol=1e-6)
    for gradient, other in zip(gradients, whole_gradients, strict=True):
        op.assert_gradient(gradient, other, 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow
def test_chunks(op, executor, limits):
    """A smaller last chunk has slices of its own, in the memory of the others."""
    x, references, sigma = op.problem(40, 300, 1040)
    limits(references=128)
    for multiprocessors in (8, 16):
        executor.device(90, multiprocessors)
        executor.launches()
        op.check(x, references, sigma, 1.0)
        counts = executor.launches()
        grids = [tuple(grid) for name, grid, *_ in counts if name == "distances"]
        assert len(grids) == 3
        assert all(grid[2] > 1 for grid in grids)
        op.check_gradients(x, references, sigma.clamp(min=0.05), 1.0)


@pytest.mark.parametrize("tile", [(32, 64), (128, 128)])
def test_rows_that_are_not_aligned(op, sliced, device, tile):
    (_, M, N), _ = sizes, _ = PROBLEMS[tile]
    x, references, sigma = op.problem(*sizes)
    rows = torch.full((M, N + 1), math.nan, device=device)
    rows[:, 1:] = references
    sliced(tile, lambda: op.check(x, rows[:, 1:], sigma, 1.0))


@pytest.mark.parametrize("at", [0, 63, 64, 128])
def test_the_nearest_reference_is_found_in_every_tile_of_minima(op, sliced, device, at):
    """A query lies at a reference of each tile of 64; all others are far away."""
    (B, M, N), _ = PROBLEMS[64, 64]
    references = 3 * torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(device)
    x = references[torch.arange(B) % M].clone()
    x[::2] = references[at]
    radius = torch.full((B,), 1e-3, dtype=torch.float64, device=device)
    sliced((64, 64), lambda: op.check(x, references, radius, 1.0))


@TILES
def test_a_reference_out_of_range_of_float16(op, sliced, tile):
    """Its products are not finite, and it is refined. It changes nothing in other tiles."""
    sizes, _ = PROBLEMS[tile]
    x, references, sigma = op.problem(*sizes)
    references[5] *= 1e6
    sliced(tile, lambda: op.check(x, references, sigma, 1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("feature", [7, 1039])
def test_references_that_are_not_finite(op, sliced, bad, feature):
    """In the first slice, or in the last one."""
    sizes, _ = PROBLEMS[64, 64]
    x, references, sigma = op.problem(*sizes)
    references[100, feature] = bad
    mean, lse = sliced((64, 64), lambda: op.compute(x, references, sigma, 1.0))
    assert mean.isnan().any(1).all()
    assert lse.isnan().all()


def test_queries_that_are_not_finite(op, sliced):
    sizes, _ = PROBLEMS[32, 64]
    x, references, sigma = op.problem(*sizes)
    x[16, 1039] = math.nan
    mean, lse = sliced((32, 64), lambda: op.compute(x, references, sigma, 1.0))
    assert mean[16].isnan().all()
    assert mean[:16].isfinite().all()
    assert lse[:16].isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tiny_and_huge_values(op, sliced, scale):
    sizes, _ = PROBLEMS[64, 64]
    x, references, sigma = (scale * value for value in op.problem(*sizes))
    mean, lse = sliced((64, 64), lambda: op.compute(x, references, sigma, 1.0))
    wanted_mean, wanted_lse = op.expected(x, references, sigma, 1.0)
    assert ((mean.double().cpu() - wanted_mean) / scale).norm(dim=1).max() <= 1e-4
    torch.testing.assert_close(lse.cpu(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(32, 64), (64, 64)])
def test_the_order_of_threads_does_not_change_a_bit(op, executor, sliced, tile):
    sizes, _ = PROBLEMS[tile]
    x, references, sigma = op.problem(*sizes)
    results = []
    for order in (0, 1, 2):
        executor.order(order)
        results.append(sliced(tile, lambda: op.everything(x, references, sigma, 1.0)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backward", [False, True])
def test_workspace_is_bounded(executor, device, backward):
    """Slices take the memory of weighted sums, which is at most 48 MiB."""
    for multiprocessors in (108, 132, 170):
        executor.device(90, multiprocessors)
        for B, M, N in (
            (16, 4096, 3072), (128, 4096, 3072), (128, 9000, 3072), (512, 4096, 3072),
            (700, 2048, 3072), (16, 60_000, 40_000), (32, 70_000, 3072),
        ):  # fmt: skip
            x = torch.empty(1, N, device=device).expand(B, N)
            references = torch.empty(1, N, device=device).expand(M, N)
            radius = torch.empty(B, dtype=torch.float64, device=device)
            place = native._place(x.device)
            problem = native.native_problem(PosteriorMean(x, references, radius, 1.0))
            size = native.extension().posterior_mean_workspace_cuda(problem, place, backward)
            assert size <= (480 if backward else 270) << 20
