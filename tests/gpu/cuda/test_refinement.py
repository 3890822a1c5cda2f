"""The list of the pairs whose distance is computed again, in CUDA."""

import math

import pytest
import torch

from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean
from tests.backends.accuracy import assert_gradient

FEATURES = [20, 40]  # distances from differences, and from products
MULTIPROCESSORS = [1, 3, 7, 1000]


@pytest.fixture
def refined(executor):
    """refined(run) is the number of pairs that each launch of ``refine`` takes in run()."""

    def refined(run):
        executor.launches()
        run()
        launches = [one for one in executor.launches() if one.name == "refine"]
        return [one.counts["shuffle"] // 10 for one in launches]  # 5 of two floats

    return refined


def two_vectors(op, B, M, N):
    """References that are one of two opposite vectors, all equally far from points in between."""
    generator = torch.Generator().manual_seed(3)
    bright = torch.rand(M, 1, generator=generator) < 0.5
    references = (255 * bright).expand(M, N).to(torch.uint8).contiguous()
    x = 1e-4 * torch.randn(B, N, generator=generator)
    sigma = torch.full((B,), 0.014 * math.sqrt(N), dtype=torch.float64)
    return x.to(op.device), references.to(op.device), sigma.to(op.device)


def all_near_but_one(op, B, M, N):
    """The far reference belongs to the sample whose mean is the centre. So all others are far from
    the centre, and near each other and the points."""
    generator = torch.Generator().manual_seed(5)
    references = torch.randint(250, 256, (M, N), generator=generator).to(torch.uint8)
    references[0] = 0
    x = 0.98 + 0.002 * torch.randn(B, N, generator=generator)
    radius = torch.full((B,), 0.01 * math.sqrt(N), dtype=torch.float64)
    return x.to(op.device), references.to(op.device), radius.to(op.device)


def one_near_tile(op, B, M, N):
    """References 64 to 127, which are a tile, are near each other. So are the points."""
    generator = torch.Generator().manual_seed(4)
    references = torch.randint(0, 128, (M, N), generator=generator)
    references[64:128] = torch.randint(250, 256, (64, N), generator=generator)
    references = references.to(torch.uint8)
    x = dequantise(references, torch.float32)[64 : 64 + B]
    x = x + 0.005 * torch.randn(B, N, generator=generator)
    sigma = torch.full((B,), 0.01 * math.sqrt(N), dtype=torch.float64)
    return x.to(op.device), references.to(op.device), sigma.to(op.device)


def check_gradients(op, x, references, radius, D):
    """Points are so near the mean that x − mean has few digits. Bytes have no gradient."""
    y = dequantise(references, torch.float32)
    op.check_gradients(x, y, radius, D, tolerance=1e-4)
    grad_x, _, grad_radius = op.expected_gradients(x, y, radius, D)
    actual_x, _, actual_radius = op.gradients(x, references, radius, D, (True, False, True))
    assert_gradient(actual_x, grad_x, 1e-4)
    assert_gradient(actual_radius, grad_radius, 1e-4)


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.parametrize("M", [64, 65, 127, 300])
@pytest.mark.usefixtures("poisoned")
def test_all_pairs(op, refined, M, N):
    """The list is full. It holds nothing of what lies between a row's end and the next row.

    Scores of some thousands leave less accuracy than others.
    """
    problem = two_vectors(op, 18, M, N)
    assert refined(lambda: op.check(*problem, math.inf, tolerance=1e-4)) == [18 * M]


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.parametrize("M", [2, 64, 65, 127, 300])
@pytest.mark.usefixtures("poisoned")
def test_nearly_all_pairs(op, refined, M, N):
    problem = all_near_but_one(op, 18, M, N)
    assert refined(lambda: op.check(*problem, 1.0)) == [18 * (M - 1)]
    check_gradients(op, *problem, 1.0)


@pytest.mark.parametrize("N", FEATURES)
def test_no_pair(op, refined, N):
    x, references, sigma = op.problem(18, 300, N)
    assert refined(lambda: op.check(2 * x, references, sigma.clamp(min=10), 1.0)) == [0]


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.usefixtures("poisoned")
def test_all_pairs_of_one_tile(op, refined, N):
    problem = one_near_tile(op, 18, 300, N)
    assert refined(lambda: op.check(*problem, math.inf)) == [18 * 64]
    check_gradients(op, *problem, math.inf)


@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.usefixtures("poisoned", "small")
def test_chunks_and_blocks(op, refined, N):
    """Two blocks of queries; chunks of 128, 128 and 44 references."""
    problem = all_near_but_one(op, 20, 300, N)
    counts = refined(lambda: op.check(*problem, 1.0))
    assert counts == [10 * 127, 10 * 128, 10 * 44] * 2
    check_gradients(op, *problem, 1.0)


def test_more_tiles_than_a_block_has_threads(op, refined):
    problem = all_near_but_one(op, 2, 20_000, 20)
    assert refined(lambda: op.check(*problem, 1.0)) == [2 * 19_999]


@pytest.mark.parametrize("N", [40, 96])
def test_distances_that_are_not_finite(op, refined, N):
    """They are listed where no other pair is."""
    x, references, sigma = op.problem(18, 300, N)
    references[[5, 64, 200, 299]] *= 1e30
    problem = 2 * x, references, sigma.clamp(min=10)
    assert refined(lambda: op.compute(*problem, 1.0)) == [18 * 4]
    assert op.mean_error(*problem, 1.0) <= 1e-4


def test_gradients_with_a_reference_that_float16_cannot_hold(op):
    """Its G·y is found with its distance. It is the mean of one point, whose gradient is less
    accurate: x − mean is small beside both."""
    x, references, sigma = op.problem(18, 300, 40)
    references[70] *= 3e3
    x[3] = references[70] + 0.001
    op.check_gradients(x, references, sigma.clamp(min=0.05), 1.0, tolerance=3e-4)


def test_a_point_on_a_reference_beside_one_that_is_too_large(op):
    x, references, _ = op.problem(18, 300, 40)
    references[70] = 1e30
    x[:] = references[66]
    mean, lse = op.compute(x, references, torch.zeros(18, dtype=torch.float64), 1.0)
    assert torch.equal(mean, x)
    assert lse.isposinf().all()


@pytest.mark.parametrize("N", FEATURES)
def test_distances_of_zero_beside_one_that_is_too_large(op, device, N):
    """All other references are the centre, and the points lie on them."""
    references = torch.full((300, N), 0.5, device=device)
    references[70] = 1e30
    x, radius = references[:18].clone(), torch.zeros(18, dtype=torch.float64, device=device)
    mean, lse = op.compute(x, references, radius, 1.0)
    assert torch.equal(mean, x)
    assert lse.isposinf().all()


@pytest.fixture(
    params=[(18, 300, 20, 132), (18, 300, 40, 132), (100, 129, 64, 1), (17, 65, 1040, 6)], ids=str
)
def spoiling(request, op, executor, limits):
    """spoiling(argument, places, bad) → for each place of a tensor that is set to ``bad`` the
    results, with those without it. Distances come from differences, and from products in tiles of
    both kinds and in slices. There are one chunk and several."""

    def spoiling(argument, places, bad):
        *sizes, multiprocessors = request.param
        executor.device(90, multiprocessors)
        tensors = op.problem(*sizes)
        for D, chunk in ((1.0, sizes[1]), (math.inf, 128)):
            limits(references=chunk)
            clean = op.module.posterior_mean(PosteriorMean(*tensors, D))
            for place in places:
                spoiled = [tensor.clone() for tensor in tensors]
                spoiled[argument][place] = bad
                yield op.module.posterior_mean(PosteriorMean(*spoiled, D)), clean

    return spoiling


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reference_that_is_not_finite_makes_all_results_nan(spoiling, bad):
    for results, _ in spoiling(1, ((0, 7), (-1, -1)), bad):
        assert all(result.isnan().all() for result in results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_point_that_is_not_finite_makes_its_results_nan(spoiling, bad):
    for results, clean in spoiling(0, ((2, -1), (-1, 0)), bad):
        (wrong,) = results[0].isnan().any(1).nonzero()
        others = torch.arange(len(results[0])) != wrong.item()
        for result, wanted in zip(results, clean, strict=True):
            assert result[wrong].isnan().all()
            torch.testing.assert_close(result[others], wanted[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("N", FEATURES)
@pytest.mark.usefixtures("poisoned")
def test_gradients_of_other_points_than_one_that_is_not_finite(op, bad, N, D):
    """70 references fill no whole panel: places after them must not get a weight."""
    x, references, sigma = op.problem(18, 70, N)
    radius = op.radius_of(sigma.clamp(min=0.05), D)
    needs = (True, False, True)
    wanted_x, _, wanted_radius = op.gradients(x, references, radius, D, needs)[:3]
    x[2, N - 1] = bad
    actual_x, _, actual_radius = op.gradients(x, references, radius, D, needs)[:3]
    others = torch.arange(18) != 2
    assert actual_x[2].isnan().all()
    torch.testing.assert_close(actual_x[others], wanted_x[others], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual_radius[others], wanted_radius[others], rtol=1e-4, atol=1e-4)


def test_differences_too_large_for_float32_are_cut_off(op, device):
    """Beside a point at 0, squares of the far reference do not fit float32."""
    references = torch.zeros(70, 20, device=device)
    references[1:] = 1e25 * torch.randn(69, 20, generator=torch.Generator().manual_seed(0))
    x = 1e-20 * torch.ones(4, 20, device=device)
    radius = torch.full((4,), 1e-20, dtype=torch.float64, device=device)
    mean, _ = op.compute(x, references, radius, 1.0)
    assert torch.equal(mean, torch.zeros_like(mean))


@pytest.mark.slow
@pytest.mark.parametrize("N", [20, 40, 600])
@pytest.mark.parametrize("problem", [two_vectors, all_near_but_one, one_near_tile, None])
def test_the_list_does_not_change_a_bit(op, executor, limits, problem, N):
    """Sums over references have one part each, whatever the number of multiprocessors."""
    limits(parts=1)
    tensors = problem(op, 18, 300, N) if problem else op.problem(18, 300, N)
    results = []
    for order, multiprocessors in enumerate(MULTIPROCESSORS):
        executor.order(order)
        executor.device(90, multiprocessors)
        results.append(op.everything(*tensors, math.inf))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_too_many_pairs_are_refused(op, limits):
    # A chunk has at most 2^16 references.
    limits(pairs=2**40, references=2**40, queries=2**40)
    x = torch.zeros(1, 1, device=op.device).expand(2**15 + 1, 1)
    references = torch.zeros(1, 1, device=op.device).expand(2**20, 1)
    radius = torch.ones(len(x), dtype=torch.float64, device=op.device)
    with pytest.raises(ValueError, match="too many pairs at once"):
        op.compute(x, references, radius, 1.0)


@pytest.mark.parametrize("scale", [1e20, 1e22, 1e25, 1e30])
def test_a_reference_far_from_all_others_in_the_centre(op, scale):
    """The largest distance that may be refined is then huge. In its units, squares of the other
    differences are too small for float32."""
    x, references, sigma = op.problem(40, 3, 200)
    references[2] = scale * references[2].sign()
    radius = op.radius_of(sigma.clamp(min=0.02), 128.0)
    mean, _ = op.compute(x, references, radius, 128.0)
    expected, _ = op.expected(x, references, radius, 128.0)
    near = expected.abs().amax(1) < 1e3
    assert near.sum() > 10
    assert (mean.double().cpu() - expected)[near].abs().max() < 1e-5


@pytest.mark.parametrize("N", FEATURES)
def test_ties_whose_distances_are_rounded_apart(op, N):
    """Points exactly half-way between two references, at levels far below the rounding of their
    distances: without the margin for it, only one of the two would be computed again."""
    generator = torch.Generator().manual_seed(6)
    references = torch.randn(40, N, generator=generator).half().float()
    x = (references[:18] + references[18:36]) / 2
    sigma = torch.logspace(-7, -4, 18, dtype=torch.float64)
    tensors = (t.to(op.device) for t in (x, references, sigma))
    op.check(*tensors, math.inf, tolerance=1e-6)
