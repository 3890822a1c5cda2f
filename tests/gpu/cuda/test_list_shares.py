"""Sums over references for many queries on an sm_90, with products of warpgroups."""

import math

import pytest
import torch

# Queries, references and features at the edges of groups, of 64 and from 512 queries on of 128, and
# of panels and slices of the features.
SIZES = [
    (512, 127, 256), (513, 33, 260), (639, 65, 300), (640, 97, 512), (530, 160, 516),
    (256, 257, 256), (290, 190, 300), (511, 65, 516),
]  # fmt: skip

SLOW_SIZES = [*SIZES[2:5], SIZES[7]]


@pytest.fixture
def backend():
    return "native"


@pytest.fixture
def sums_of(executor):
    """sums_of(run) calls run() and returns the threads and blocks of each of its weighted sums, and
    whether these have products of warpgroups."""

    def sums_of(run):
        executor.launches()
        run()
        return [
            (one.threads, math.prod(one.grid), "WarpgroupSums" in one.entry)
            for one in executor.launches()
            if one.name == "weighted_sum"
        ]

    return sums_of


def shared(multiprocessors=1):
    """What sums_of returns for sums that share out the lists."""
    return 256, multiprocessors, True


@pytest.mark.parametrize(
    "sizes",
    [*SIZES[:2], *SIZES[5:7], *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SIZES)],
)
@pytest.mark.usefixtures("poisoned")
def test_sizes(op, executor, sums_of, sizes):
    seed = SIZES.index(sizes)
    D = (1.0, math.inf)[seed % 2]
    x, references, sigma = op.problem(*sizes, seed=seed)
    executor.device(90, 1)
    sums = sums_of(lambda: op.check(x, references, op.radius_of(sigma, D), D))
    assert sums == [shared()]


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.usefixtures("poisoned")
def test_chunks_and_parts(op, executor, limits, sums_of, multiprocessors):
    """All but the first 200 queries need one reference, so most of their lists are empty."""
    x, references, sigma = op.problem(520, 1200, 256)
    x[200:] = references[0]
    sigma[200:] = 1e-5
    expected = op.expected(x, references, sigma, 1.0)
    executor.device(90, multiprocessors)
    for chunk, parts in ((1200, 1 << 23), (1200, 400_000), (512, 1 << 23)):
        limits(references=chunk, parts=parts, queries=520)
        results = []
        sums = sums_of(
            lambda results=results: results.append(op.compute(x, references, sigma, 1.0))
        )
        assert shared(multiprocessors) in sums
        op.assert_accurate(results[0], expected, references)


@pytest.mark.usefixtures("poisoned")
def test_references_that_float16_cannot_hold(op, executor, sums_of):
    executor.device(90, 1)
    x, references, sigma = op.problem(512, 150, 256)
    references[70] *= 1e20  # it is not in the sample that finds the power of two
    x[3] = references[70] * 1.001
    results = []
    sums = sums_of(lambda: results.append(op.compute(x, references, sigma, 1.0)))
    assert sums == [shared()]
    expected, _ = op.expected(x, references, sigma, 1.0)
    errors = (results[0][0].double().cpu() - expected).norm(dim=1)
    assert (errors / expected.norm(dim=1)).max() <= 1e-5


def test_features_of_different_sizes(op, executor, sums_of):
    """Each feature relative to its own size."""
    x, references, sigma = op.problem(512, 150, 256)
    size = torch.logspace(-9, 0, 256).to(references.device)
    executor.device(90, 1)
    results = []
    sums = sums_of(lambda: results.append(op.compute(x * size, references * size, sigma, 1.0)))
    assert sums == [shared()]
    mean, _ = op.expected(x * size, references * size, sigma, 1.0)
    errors = (results[0][0].double().cpu() - mean).abs() / size.cpu()
    assert errors.max() <= 2e-5


@pytest.mark.parametrize(("gap", "aligned"), [(4, True), (3, False)])
def test_rows_that_lie_apart(op, executor, sums_of, device, gap, aligned):
    """Warps add up rows that are not aligned."""
    x, references, sigma = op.problem(512, 150, 260)
    wide = torch.full((150, 260 + gap), math.nan, device=device)
    wide[:, :260] = references
    executor.device(90, 1)
    sums = sums_of(lambda: op.check(x, wide[:, :260], sigma, 1.0))
    if aligned:
        assert sums == [shared()]
    else:
        assert [threads for threads, *_ in sums] == [128]


@pytest.mark.parametrize("N", [257, 258, pytest.param(515, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("poisoned")
def test_features_that_are_no_whole_pieces(op, executor, sums_of, device, N):
    """Rows are aligned, but copies of 16 bytes have some features more."""
    x, references, sigma = op.problem(513 if N > 512 else 256, 150, N)
    wide = torch.full((150, N + -N % 4), math.nan, device=device)
    wide[:, :N] = references
    executor.device(90, 1)
    sums = sums_of(lambda: op.check(x, wide[:, :N], sigma, 1.0))
    assert sums == [shared()]


@pytest.mark.slow
def test_the_order_of_threads_does_not_change_a_bit(op, executor):
    x, references, sigma = op.problem(515, 140, 256)
    executor.device(90, 1)
    means = []
    for order in (0, 1, 77):
        executor.order(order)
        means.append(op.compute(x, references, sigma, 1.0)[0])
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
