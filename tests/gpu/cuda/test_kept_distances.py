"""Gradients from the distances that the forward pass kept, in the CUDA kernels."""

import math

import pytest
import torch

import pfgm
from pfgm.backends import native
from pfgm.core.problems import PosteriorMean, State, Upstream
from pfgm.ops import eager
from tests.backends.accuracy import assert_accurate, assert_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
# Products, in tiles of each size on one multiprocessor or eight, and differences.
SIZES = [(40, 300, 97), (20, 190, 64), (100, 130, 65), (8, 200, 70), (40, 70, 20), (1, 1, 1)]
MEASURED = {"find_center", "find_limits", "refine"}


def keeping(x, references, radius, D):
    """The results of a forward pass that keeps its distances, and what it kept."""
    problem = PosteriorMean(x, references, radius, D)
    memory = native.room_for_distances(problem)
    return native.posterior_mean(problem, memory), native.used_room(memory)


def gradients(op, results, x, references, radius, D, kept, needs=(True, True, True)):
    mean, _, nearest, total = results
    upstream = Upstream(*op.upstream(x, radius))
    problem = PosteriorMean(x, references, radius, D)
    state = State(mean, nearest, total)
    return native.posterior_mean_backward(problem, state, upstream, needs, kept)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def check(op, x, references, radius, D, tolerance=None, change=1e-6):
    """What is kept changes no bit of the gradients. Of the results it changes only what small
    weights add, by at most 1e-6 of them, and by `change` of the sum of weights: they are more
    exact, because the gradient needs them.
    """
    arguments = x, references, radius, D
    results, kept = keeping(*arguments)
    assert kept.nbytes >= 8 * len(x) * len(references)
    assert_same(results, keeping(*arguments)[0])
    others = native.posterior_mean(PosteriorMean(*arguments))
    for one, other, most in zip(results, others, (1e-6, 1e-6, 1e-6, change), strict=True):
        torch.testing.assert_close(one, other, rtol=most, atol=0, equal_nan=True)
    actual = gradients(op, results, *arguments, kept)
    assert_same(actual, gradients(op, results, *arguments, None))
    if tolerance is not None:
        rounded = references.dtype != torch.float32  # as the gradient of the references is
        for place, wanted in enumerate(op.expected_gradients(*arguments)):
            if place != 1 or not rounded:
                assert_gradient(actual[place], wanted, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("multiprocessors", "dtype"), [(1, torch.float32), *((8, dtype) for dtype in DTYPES)], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_gradients_are_the_same_to_the_bit(op, executor, multiprocessors, dtype):
    executor.device(90, multiprocessors)
    for seed, sizes in enumerate(SIZES):
        x, references, sigma = op.problem(*sizes, dtype=dtype, seed=seed)
        D = (1.0, math.inf)[seed % 2]
        check(op, x, references, op.radius_of(sigma.clamp(min=0.05), D), D, 1e-5)


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_near_ties(op, D):
    """On an H100 errors without a bias stay in small weights without a gradient, and more of them
    count here: weight_law allows them 2e-5 (kTolerance e^-kOthers) of the sum of all weights, whose
    error is at most 1e-5 with and without a gradient."""
    x, references = op.near_ties(18, 300, 40, 3.0)
    radius = op.radius_of(torch.full((18,), 1e-3, dtype=torch.float64, device=op.device), D)
    arguments = x, references, radius, D
    check(op, *arguments, change=2e-5)
    _, lse = op.expected(*arguments)
    nearest = torch.cdist(x.double(), references.double()).amin(1).square().cpu()
    squared = radius.cpu() ** 2
    fall = nearest / squared / 2 if math.isinf(D) else (40 + D) / 2 * (nearest + squared).log()
    for results in (keeping(*arguments)[0], native.posterior_mean(PosteriorMean(*arguments))):
        assert_accurate(results[:2], op.expected(*arguments), references, 1e-5)
        torch.testing.assert_close(results[3].cpu(), (lse + fall).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_near_ties_with_two_floats(op, executor, D):
    executor.device(80, 4)
    x, references = op.near_ties(18, 300, 40, 3.0)
    radius = op.radius_of(torch.full((18,), 1e-3, dtype=torch.float64, device=op.device), D)
    check(op, x, references, radius, D)


@pytest.mark.parametrize("N", [20, 40])
def test_equal_references_and_points_on_references(op, N):
    x, references, sigma = op.problem(18, 300, N)
    references[100:200] = references[:100]
    references[200:] = references[:100]
    x[:5] = references[:5]
    sigma[:3] = 0
    check(op, x, references, sigma, 1.0)
    check(op, x, references, sigma, math.inf)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e8, 1e17])
@pytest.mark.parametrize("N", [20, 40])
def test_tiny_and_huge_scales(op, scale, N):
    x, references, sigma = (scale * value for value in op.problem(18, 300, N))
    check(op, x, references, sigma, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("N", [20, 40])
def test_values_that_are_not_finite(op, bad, N):
    for place in range(2):
        problem = op.problem(18, 300, N)
        problem[place][7, N - 1] = bad
        check(op, *problem, 1.0)


@pytest.mark.parametrize("multiprocessors", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("sizes", [(20, 190, 64), (40, 300, 97), (100, 130, 65)])
def test_references_that_float16_cannot_hold(op, executor, sizes, multiprocessors):
    """Points lie between two of these, and their gradients depend on both."""
    executor.device(90, multiprocessors)
    x, references, sigma = op.problem(*sizes)
    B, M, _ = sizes
    large = torch.tensor([3, 50, 64, 111, M - 1])
    references[large] *= 2e4
    one, other = (references[large[(torch.arange(B) + i) % 5]] for i in range(2))
    share = 0.5 + 0.01 * torch.rand(B, 1, generator=torch.Generator().manual_seed(0))
    x[:] = one + share.to(x.device) * (other - one)
    check(op, x, references, 2e4 * sigma.clamp(min=0.5), 1.0, 1e-4)


def names_of(executor, run):
    executor.launches()
    run()
    return [name for name, *_ in executor.launches()]


@pytest.mark.parametrize("N", [20, 40])
def test_the_backward_pass_measures_nothing_again(op, executor, N):
    arguments = *op.problem(40, 300, N), 1.0
    results, kept = keeping(*arguments)
    products = "differences" if N < 32 else "distances"
    measured = names_of(executor, lambda: gradients(op, results, *arguments, None))
    assert measured.count(products) == 2
    names = names_of(executor, lambda: gradients(op, results, *arguments, kept))
    assert names.count(products) == 1
    assert not MEASURED & set(names)
    assert names.count("split_rows") == (0 if N < 32 else 1)


@pytest.mark.parametrize(
    ("B", "most"), [(1, 65536), (128, 32768), (1000, 4096), (4096, 1024), (4097, 0)]
)
def test_what_is_kept_is_bounded(device, B, most):
    """Up to 2^22 pairs, 32 MiB, beside which the centre is small."""
    for M in (most, most + 1):
        x, references = (torch.empty(1, 1, device=device).expand(rows, 64) for rows in (B, M))
        room = native.room_for_distances(PosteriorMean(x, references, x[:, 0].double(), 1.0))
        assert (room is not None) == (0 < M <= most)
        if room is not None:
            assert 8 * B * M <= room.nbytes <= (32 << 20) + 4096


def test_problems_of_several_parts_keep_nothing(op, limits):
    problem = op.problem(40, 300, 40)
    for each in ({"pairs": 20_480}, {"queries": 17}, {"references": 128}):
        limits(**each)
        assert native.room_for_distances(PosteriorMean(*problem, 1.0)) is None
    limits()
    assert native.room_for_distances(PosteriorMean(*problem, 1.0)) is not None


def test_what_another_problem_kept_is_refused(op, limits):
    arguments = *op.problem(40, 300, 40), 1.0
    results, kept = keeping(*arguments)
    x, references, radius, D = arguments
    with pytest.raises(ValueError, match="kept is of another problem"):
        gradients(op, results, x, references[:200], radius, D, kept)
    with pytest.raises(ValueError, match="kept is of another problem"):
        gradients(op, results, *arguments, kept[:-8])
    limits(references=128)
    with pytest.raises(ValueError, match="kept is of another problem"):
        gradients(op, results, *arguments, kept)


def through(x, references, sigma, D):
    inputs = [value.detach().clone().requires_grad_() for value in (x, sigma, references)]
    x, sigma, references = inputs
    mean, lse = pfgm.posterior_mean(x, references, sigma=sigma, D=D, return_logsumexp=True)
    return torch.autograd.grad((mean * x.detach().cos()).sum() + (lse * 0.1).sum(), inputs)


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_gradients_are_those_of_the_operator(op, kept, monkeypatch, D):
    problem = op.problem(18, 300, 40)
    actual = through(*problem, D)
    assert kept["forward"] == kept["backward"]
    assert kept["backward"][0] > 8 * 18 * 300
    monkeypatch.setattr(eager, "enabled", False)
    assert_same(actual, through(*problem, D))
    assert kept["backward"][1] == kept["forward"][1] == 0
