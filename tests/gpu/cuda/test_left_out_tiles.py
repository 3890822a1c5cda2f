"""Tiles of 64 references whose smallest distance is beyond all weights: the CUDA ``weigh`` reads no
distances of them."""

import math

import pytest
import torch

FEATURES = [20, 40]  # distances from differences, and from products
D_VALUES = [1.0, 64.0, math.inf]
TILE, WORD = 64, 32


@pytest.fixture
def turns(executor):
    """turns(run) are the turns of warps in each launch of ``weigh`` in run(), if a block has at
    most 8192 references. A warp takes up to four words in a turn, and votes for each of them."""

    def turns(run):
        executor.launches()
        run()
        launches = [one for one in executor.launches() if one.name == "weigh"]
        return [(one.counts["ballot"] - 8 * math.prod(one.grid)) // 4 for one in launches]

    return turns


def tiles(op, B, M, N, near):
    """References of a tile are near each other and far from those of other tiles. Points are near
    some of tile ``near``."""
    generator = torch.Generator().manual_seed(6)
    centres = 4 * torch.randn(-(-M // TILE), N, generator=generator)
    references = centres[torch.arange(M) // TILE] + 0.2 * torch.randn(M, N, generator=generator)
    own = references[TILE * near : TILE * near + TILE]
    x = own[torch.randint(0, len(own), (B,), generator=generator)]
    x = x + 0.2 * torch.randn(B, N, generator=generator)
    sigma = torch.full((B,), 0.1, dtype=torch.float64)
    return x.to(op.device), references.to(op.device), sigma.to(op.device)


def words(M, tile):
    """Words of a tile that have references."""
    return -(-min(TILE, M - TILE * tile) // WORD)


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.parametrize(
    ("M", "near", "D"),
    [
        (64, 0, 1.0), (65, 1, math.inf), (127, 1, 64.0), (300, 4, math.inf), (300, 2, 1.0),
        (1100, 16, 64.0),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_all_tiles_but_one(op, turns, M, near, D, N):
    x, references, sigma = tiles(op, 18, M, N, near)
    problem = x, references, op.radius_of(sigma, D)
    assert turns(lambda: op.check(*problem, D)) == [18 * words(M, near)]
    op.check_gradients(*problem, D, tolerance=1e-4)


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.usefixtures("poisoned")
def test_all_tiles_of_a_later_chunk(op, limits, turns, N):
    """What one chunk says of the nearest reference holds for the next ones."""
    limits(references=128)
    for near, expected in ((0, [36, 0, 0]), (1, [36, 0, 0])):
        problem = tiles(op, 18, 300, N, near)
        assert turns(lambda problem=problem: op.check(*problem, math.inf)) == expected
    first, second, last = turns(lambda: op.check(*tiles(op, 18, 300, N, 4), math.inf))
    assert min(first, second) >= 0
    assert last == 18 * words(300, 4)


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.usefixtures("poisoned")
def test_no_tile(op, turns, N):
    """All references are the same, so all weights are equal."""
    x, references, sigma = op.problem(18, 300, N)
    references = references[:1].expand(300, N).contiguous()
    for D in D_VALUES:
        problem = x, references, op.radius_of(sigma, D)
        # Of 10 words, two warps have two.
        assert turns(lambda problem=problem, D=D: op.check(*problem, D)) == [18 * 8]


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.parametrize("D", D_VALUES)
@pytest.mark.usefixtures("poisoned")
def test_points_on_a_reference(op, turns, N, D):
    """At a limit only equal references have a weight, here two of different tiles."""
    x, references, sigma = tiles(op, 18, 300, N, 2)
    references[7] = references[130]
    x[:] = references[130]
    mean = None

    def run():
        nonlocal mean
        mean, _ = op.compute(x, references, 0 * sigma, D)

    assert turns(run) == [18 * 4]
    torch.testing.assert_close(mean, x)


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.parametrize("scale", [1e-25, 2.0**-60, 2.0**60, 1e25])
@pytest.mark.usefixtures("poisoned")
def test_tiny_and_huge_values(op, turns, N, scale):
    problem = tiles(op, 18, 300, N, 3)
    x, references, sigma = (scale * each for each in problem)
    for D in (1.0, math.inf):
        assert turns(lambda D=D: op.compute(x, references, sigma, D)) == [18 * 2]
        assert op.mean_error(x, references, sigma, D) <= 1e-4 * scale


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [1, 4])
@pytest.mark.usefixtures("poisoned")
def test_several_rounds(op, executor, multiprocessors):
    """Blocks with more words than a warp looks at together, and the last references of a chunk."""
    executor.device(90, multiprocessors)
    generator = torch.Generator().manual_seed(7)
    x, references, sigma = op.problem(4, 20_011, 3)
    # Tiles become near each other, so that some are left out.
    references = references[references[:, 0].argsort()]
    sigma = 10 ** torch.linspace(-3, 0, 4, dtype=torch.float64)
    x[0] = references[-1] + 1e-3 * torch.randn(3, generator=generator)
    for D in D_VALUES:
        op.check(x, references, op.radius_of(sigma, D), D)
