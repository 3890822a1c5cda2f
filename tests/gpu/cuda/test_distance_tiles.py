"""Tiles of 128 references × 128 queries in the CUDA kernel ``distances``."""

import math

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
# Queries, references and features at the edges of tiles, panels and stages.
SIZES = [
    (100, 65, 32), (100, 127, 33), (100, 129, 63), (128, 128, 65), (241, 129, 97), (97, 300, 161),
    (100, 129, 36), (241, 129, 100), (97, 300, 164), (100, 127, 900),
]  # fmt: skip
FAST = (1, 8)  # of these


@pytest.fixture
def backend():
    return "native"


@pytest.fixture
def grids_of(executor):
    """grids_of(run) calls run() and returns the grids of its launches of ``distances``."""

    def grids_of(run):
        executor.launches()
        run()
        return [tuple(grid[:2]) for name, grid, *_ in executor.launches() if name == "distances"]

    return grids_of


def tiles(references, queries, M, B):
    return -(-M // references), -(-B // queries)


@pytest.fixture
def large(executor, grids_of):
    """large(run, sizes) calls run() on one multiprocessor and makes sure that it takes large
    tiles."""
    executor.device(80, 1)

    def large(run, sizes):
        B, M, _ = sizes
        assert set(grids_of(run)) == {tiles(128, 128, M, B)}

    return large


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        *((dtype, SIZES[i]) for dtype in DTYPES for i in FAST),
        *(
            pytest.param(torch.float32, sizes, marks=pytest.mark.slow)
            for i, sizes in enumerate(SIZES)
            if i not in FAST
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_forward(op, large, dtype, sizes):
    """Edges in float32, references of other types at two of the sizes."""
    seed = SIZES.index(sizes) + DTYPES.index(dtype)
    D = (1.0, math.inf)[seed % 2]
    x, references, sigma = op.problem(*sizes, dtype=dtype, seed=seed)
    large(lambda: op.check(x, references, op.radius_of(sigma, D), D), sizes)


@pytest.mark.parametrize("sizes", [(100, 129, 33), (241, 127, 65)])
@pytest.mark.usefixtures("poisoned")
def test_gradients(op, large, sizes):
    x, references, sigma = op.problem(*sizes)
    radius = op.radius_of(sigma.clamp(min=0.05), 1.0)
    large(lambda: op.check_gradients(x, references, radius, 1.0), sizes)


@pytest.mark.parametrize("M", [127, 129])
@pytest.mark.usefixtures("poisoned")
def test_no_value_is_read_before_it_has_arrived(op, executor, M):
    """It would be NaN, and its distances would be refined. Here no distance needs that."""
    x, references, _ = op.problem(100, M, 452)
    radius = torch.full((100,), 300.0, dtype=torch.float64, device=x.device)
    executor.device(90, 1)
    for order in (0, 1, 77):
        executor.order(order)
        executor.launches()
        op.check(x, references, radius, 1.0)
        counts = {one.name: one.counts for one in executor.launches()}
        assert counts["refine"]["shuffle"] == 0


def test_rows_that_are_not_aligned(op, large, device):
    _, M, N = sizes = (100, 129, 66)
    x, references, sigma = op.problem(*sizes)
    for gap in (1, 2, 3):
        rows = torch.full((M, N + gap), math.nan, device=device)
        rows[:, gap:] = references
        large(lambda rows=rows, gap=gap: op.check(x, rows[:, gap:], sigma, 1.0), sizes)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e25])
def test_tiny_and_huge_values(op, large, scale):
    sizes = (100, 129, 97)
    x, references, sigma = (scale * value for value in op.problem(*sizes))
    results = []
    large(lambda: results.extend(op.compute(x, references, sigma, 1.0)), sizes)
    (mean, lse), (wanted_mean, wanted_lse) = results, op.expected(x, references, sigma, 1.0)
    assert ((mean.double().cpu() - wanted_mean) / scale).norm(dim=1).max() <= 1e-4
    torch.testing.assert_close(lse.cpu(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", [0, 63, 64, 127, 128])
def test_the_nearest_reference_is_found_in_every_tile_of_minima(op, large, device, at):
    """A query lies at a reference of each tile of 64; all others are far away."""
    B, M, N = sizes = (100, 129, 64)
    references = 3 * torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(device)
    x = references[torch.arange(B) % M].clone()
    x[::2] = references[at]
    radius = torch.full((B,), 1e-3, dtype=torch.float64, device=device)
    large(lambda: op.check(x, references, radius, 1.0), sizes)


@pytest.mark.parametrize("at", [5, 70, 128])
def test_a_reference_out_of_range_of_float16(op, large, at):
    """Its products are not finite, and it is refined. It changes nothing in other tiles."""
    sizes = (100, 129, 64)
    x, references, sigma = op.problem(*sizes)
    references[at] *= 1e6
    large(lambda: op.check(x, references, sigma, 1.0), sizes)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [3, 100])
def test_references_that_are_not_finite(op, large, bad, at):
    sizes = (100, 129, 64)
    x, references, sigma = op.problem(*sizes)
    references[at, 7] = bad
    results = []
    large(lambda: results.extend(op.compute(x, references, sigma, 1.0)), sizes)
    mean, lse = results
    assert mean.isnan().any(1).all()
    assert lse.isnan().all()


def test_queries_that_are_not_finite(op, large):
    sizes = (100, 129, 64)
    x, references, sigma = op.problem(*sizes)
    x[99, 63] = math.nan
    results = []
    large(lambda: results.extend(op.compute(x, references, sigma, 1.0)), sizes)
    mean, lse = results
    assert mean[99].isnan().all()
    assert mean[:99].isfinite().all()
    assert lse[:99].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(100, 129, 97), (100, 129, 452), (100, 127, 452)])
def test_the_order_of_threads_does_not_change_a_bit(op, executor, large, sizes):
    x, references, sigma = op.problem(*sizes)
    results = []
    for order in (0, 1, 2, 3):
        executor.order(order)
        large(lambda: results.append(op.everything(x, references, sigma, 1.0)), sizes)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
