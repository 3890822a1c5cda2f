"""Tiles of 128 × 128 whose products are in tensor memory (sm_100), in precision "medium".

Those in "high" are tested beside the other tiles (test_distance_tiles.py, test_slices.py).
"""

from __future__ import annotations

import math

import pytest
import torch

ANY = 2e-2  # errors of a mean, as in test_medium.py
SAME = 1e-5  # the largest difference to tiles of warps, which find the norms in another order
# Queries, references and features at the edges of tiles and panels. On one multiprocessor these
# tiles take least time.
SIZES = [(97, 65, 32), (128, 128, 64), (129, 127, 68), (130, 300, 100), (256, 129, 160)]
SLICED = (97, 127, 1552), 3  # and multiprocessors


@pytest.fixture
def backend():
    return "native"


@pytest.fixture
def run(shim):
    """run(call, sizes, multiprocessors) calls call() and makes sure that it takes such tiles.

    It returns what the call does, and the slices of the features.
    """

    def run(call, sizes, multiprocessors=1):
        B, M, N = sizes
        shim.device(100, multiprocessors)
        shim.counts(True)
        result = call()
        found = [
            (tuple(grid), sum(blocks["begin_product_in_memory"]))
            for name, grid, *_, blocks in shim.counts(False)
            if name == "distances"
        ]
        assert found
        for grid, products in found:
            assert grid[:2] == (-(-M // 128), -(-B // 128))
            assert products == 2 * -(-N // 32) * grid[0] * grid[1]  # each for half of a panel
        return result, {grid[2] for grid, _ in found}

    return run


@pytest.fixture
def check(op, shim, run):
    """Results are accurate, and those of the tiles of warps."""

    def check(x, references, radius, D, multiprocessors=1):
        given = x, references, radius, D, "medium"
        sizes = len(x), *references.shape
        found, slices = run(lambda: op.compute(*given), sizes, multiprocessors)
        op.assert_accurate(found, op.expected(x, references, radius, D), references, ANY)
        shim.device(80, multiprocessors)
        of_warps = op.compute(*given)
        op.assert_accurate(found, [each.double() for each in of_warps], references, SAME)
        return slices

    return check


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.usefixtures("poisoned")
def test_error(op, check, sizes):
    x, references, sigma = op.problem(*sizes)
    D = (1.0, math.inf)[SIZES.index(sizes) % 2]
    assert check(x, references, op.radius_of(sigma, D), D) == {1}


@pytest.mark.usefixtures("poisoned")
def test_slices(op, check):
    sizes, multiprocessors = SLICED
    x, references, sigma = op.problem(*sizes)
    (slices,) = check(x, references, sigma, 1.0, multiprocessors)
    assert slices > 1


@pytest.mark.parametrize(
    ("sizes", "multiprocessors"),
    [((100, 129, 36), 1), pytest.param(*SLICED, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("poisoned")
def test_gradients(op, run, sizes, multiprocessors):
    x, references, sigma = op.problem(*sizes)
    given = x, references, sigma.clamp(min=0.05), 1.0
    found, _ = run(lambda: op.gradients(*given, precision="medium"), sizes, multiprocessors)
    for gradient, expected in zip(found, op.expected_gradients(*given), strict=True):
        op.assert_gradient(gradient, expected, ANY)


def test_a_reference_out_of_range_of_float16(op, run, check):
    """Its products are not finite, and it is refined; so is its G·y in the backward pass."""
    sizes = (200, 129, 64)
    x, references, sigma = op.problem(*sizes)
    references[70] *= 1e6
    check(x, references, sigma, 1.0)
    given = x, references, sigma.clamp(min=0.05), 1.0
    found, _ = run(lambda: op.gradients(*given, precision="medium"), sizes)
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("order", [1, 77])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_threads_may_run_in_any_order(op, shim, precision, order):
    x, references, sigma = op.problem(130, 129, 480)
    shim.device(100, 1)
    found = []
    for each in (0, order):
        shim.order(each)
        found.append(op.compute(x, references, sigma, 1.0, precision))
    for ordered, other in zip(*found, strict=True):
        assert torch.equal(ordered, other)
