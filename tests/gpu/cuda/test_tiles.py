"""Tiles of the CUDA kernel ``distances``, and blocks that share out the features of a tile. Values
at the edges of tiles are problems of tests/gpu/test_problems.py."""

import pytest
import torch

# Queries, references, features and multiprocessors → queries and references of a tile, slices.
# Those with slices are problems: their slices have different numbers of trips.
TILINGS = {
    (32, 200, 97, 1): (32, 64, 1),
    (33, 200, 97, 1): (64, 64, 1),
    (65, 200, 97, 4): (128, 128, 1),  # blocks for half of the multiprocessors
    (65, 200, 97, 5): (64, 64, 1),
    (17, 65, 1040, 6): (32, 64, 3),
    (40, 129, 1040, 9): (64, 64, 3),
    (97, 127, 1552, 3): (128, 128, 3),  # with slices there are
}
LARGE, SLICED = (100, 129, 64, 1), (40, 129, 1040, 9)


def launches(executor, run):
    executor.launches()
    run()
    return executor.launches()


@pytest.fixture
def tiled(op, executor):
    """tiled(sizes) → a problem on a device of so many multiprocessors, and a function that checks a
    radius, or one for each point, and the tiles that are taken."""

    def tiled(B, M, N, multiprocessors):
        executor.device(80, multiprocessors)
        x, references, sigma = op.problem(B, M, N)

        def check(radius=sigma):
            own = torch.as_tensor(radius, dtype=sigma.dtype).expand(B).contiguous().to(x.device)
            done = launches(executor, lambda: op.check(x, references, own, 1.0))
            (grid,) = (one.grid for one in done if one.name == "distances")
            queries, rows, slices = TILINGS.get((B, M, N, multiprocessors), (128, 128, 1))
            assert grid == (-(-M // rows), -(-B // queries), slices)

        return x, references, check

    return tiled


@pytest.mark.parametrize("sizes", TILINGS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_tiles_and_slices(tiled, sizes):
    _, _, check = tiled(*sizes)
    check()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow
def test_slices_of_chunks(op, executor, limits):
    """A smaller last chunk has slices of its own, in the memory of the others."""
    x, references, sigma = op.problem(40, 300, 1040)
    limits(references=128)
    for multiprocessors in (8, 16):
        executor.device(90, multiprocessors)
        done = launches(executor, lambda: op.check(x, references, sigma, 1.0))
        grids = [one.grid for one in done if one.name == "distances"]
        assert len(grids) == 3
        assert all(grid[2] > 1 for grid in grids)
        op.check_gradients(x, references, sigma.clamp(min=0.05), 1.0)


@pytest.mark.parametrize("M", [127, 129])
@pytest.mark.usefixtures("poisoned")
def test_no_value_is_read_before_it_has_arrived(op, executor, M):
    """It would be NaN, and its distances would be refined. Here no distance needs that."""
    x, references, _ = op.problem(100, M, 452)
    radius = torch.full((100,), 300.0, dtype=torch.float64, device=x.device)
    executor.device(90, 1)
    for order in (0, 1, 77):
        executor.order(order)
        done = launches(executor, lambda: op.check(x, references, radius, 1.0))
        (refined,) = (one.counts["shuffle"] for one in done if one.name == "refine")
        assert refined == 0


@pytest.mark.parametrize("at", [0, 63, 64, 127, 128])
@pytest.mark.parametrize("sizes", [LARGE, SLICED], ids=str)
def test_the_nearest_reference_is_found_in_every_tile_of_minima(tiled, sizes, at):
    """A query lies at a reference of each tile of 64; all others are far away."""
    x, references, check = tiled(*sizes)
    generator = torch.Generator().manual_seed(1)
    references.copy_(3 * torch.randn(references.shape, generator=generator))
    x[:] = references[torch.arange(len(x)) % len(references)]
    x[::2] = references[at]
    check(1e-3)


@pytest.mark.parametrize(
    ("sizes", "at"),
    [*((LARGE, at) for at in (5, 70, 128)), *((sizes, 5) for sizes in list(TILINGS)[-3:])],
    ids=str,
)
def test_a_reference_out_of_range_of_float16(tiled, sizes, at):
    """Its products are not finite, and it is refined. It changes nothing in other tiles."""
    _, references, check = tiled(*sizes)
    references[at] *= 1e6
    check()
