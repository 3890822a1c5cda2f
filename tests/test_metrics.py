"""The metrics against scipy, closed forms, and plain loops."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pfgm import data, metrics

Array = np.ndarray[Any, np.dtype[np.float64]]
METRICS: list[Callable[[Tensor, Tensor], object]] = [
    metrics.frechet_distance,
    metrics.precision_recall,
    metrics.nearest_distance,
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def frechet_by_scipy(a: Tensor, b: Tensor) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    rows_a, rows_b = (x.double().flatten(1).numpy() for x in (a, b))
    cov_a, cov_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (rows_a, rows_b))
    root = linalg.sqrtm(cov_a @ cov_b)
    shift = rows_a.mean(0) - rows_b.mean(0)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def precision_recall_by_loops(samples: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    def distance(p: Array, q: Array) -> float:
        return math.sqrt(math.fsum((p - q) ** 2))

    def inside(points: Array, members: Array) -> float:
        balls = [
            (p, sorted(distance(p, q) for j, q in enumerate(members) if j != i)[k - 1])
            for i, p in enumerate(members)
        ]
        return sum(any(distance(q, p) <= r for p, r in balls) for q in points) / len(points)

    a, b = samples.double().flatten(1).numpy(), real.double().flatten(1).numpy()
    return inside(a, b), inside(b, a)


@given(
    sizes=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    dimension=st.integers(1, 6),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_frechet_agrees_with_scipy(
    sizes: tuple[int, int], dimension: int, scale: float, seed: int
) -> None:
    mix = normal(dimension, dimension, seed=seed)
    a = normal(sizes[0], dimension, seed=seed + 1) @ mix
    b = normal(sizes[1], dimension, seed=seed + 2) * scale + 1
    expected = frechet_by_scipy(a, b)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def diagonal_set(mean: Tensor, deviations: Tensor) -> Tensor:
    """2N samples with exactly this mean and this diagonal unbiased covariance."""
    n = len(mean)
    steps = torch.diag(deviations) * math.sqrt((2 * n - 1) / 2)
    return torch.cat([mean + steps, mean - steps])


@given(dimension=st.integers(1, 8), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_frechet_of_diagonal_gaussians(dimension: int, seed: int) -> None:
    means, deviations = normal(2, dimension, seed=seed), normal(2, dimension, seed=seed + 1).abs()
    deviations[0, 0] = 0
    a, b = (diagonal_set(m, s) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_frechet_of_a_shifted_set_is_the_square_of_the_shift(n: int) -> None:
    a = normal(n, 2, 4, 4)
    shift = normal(2, 4, 4, seed=1)
    expected = float(shift.square().sum())
    assert metrics.frechet_distance(a, a + shift) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [2, 20, 200])
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 3.0])
def test_frechet_of_a_scaled_set_with_singular_covariance(n: int, factor: float) -> None:
    a = normal(n, 64)
    a[:, 32:] = a[:, :32]
    a = a - a.mean(0)
    expected = (abs(factor) - 1) ** 2 * float(a.square().sum()) / (n - 1)
    assert metrics.frechet_distance(a, a * factor) == pytest.approx(expected, rel=1e-12, abs=1e-11)


def test_frechet_of_disjoint_supports_is_the_sum_of_the_traces() -> None:
    a, b = torch.zeros(30, 100), torch.zeros(30, 100)
    a[:, :50], b[:, 50:] = normal(30, 50), normal(30, 50, seed=1)
    expected = float(
        a.double().var(0).sum() + b.double().var(0).sum() + (a.mean(0) - b.mean(0)).square().sum()
    )
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@given(n=st.integers(2, 30), seed=st.integers(0, 2**31), offset=st.floats(-1e3, 1e3))
@settings(max_examples=40, deadline=None)
def test_frechet_is_never_negative_and_zero_on_itself(n: int, seed: int, offset: float) -> None:
    a = normal(n, 3, 5, seed=seed) + offset
    assert 0 <= metrics.frechet_distance(a, a) < 1e-10
    assert 0 <= metrics.frechet_distance(a, a.flip(0)) < 1e-10


def test_frechet_is_symmetric() -> None:
    a, b = normal(20, 30), normal(50, 30, seed=1)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))


def test_frechet_of_constant_sets_is_exact() -> None:
    assert metrics.frechet_distance(torch.ones(3, 4), torch.zeros(2, 4)) == 4


# scipy's warning: pixels that are never inked make the covariance singular.
@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_frechet_of_the_digits_train_against_held_out() -> None:
    pytest.importorskip("sklearn")
    digits = data.digits()
    distance = metrics.frechet_distance(digits.train, digits.held_out)
    assert distance == pytest.approx(0.386, abs=5e-4)
    assert distance == pytest.approx(frechet_by_scipy(digits.train, digits.held_out), rel=1e-6)


def test_frechet_needs_two_samples() -> None:
    with pytest.raises(ValueError, match=r"b has shape \(1, 3\).*at least 2"):
        metrics.frechet_distance(torch.zeros(4, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("size", [1e155, 1e200])
def test_frechet_that_overflows_raises(size: float) -> None:
    with pytest.raises(ValueError, match="overflows"):
        metrics.frechet_distance(normal(5, 3) * size, normal(5, 3, seed=1))


@given(
    sizes=st.tuples(st.integers(4, 15), st.integers(4, 15)),
    k=st.integers(1, 3),
    levels=st.sampled_from([2, 5, 10**6]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_precision_recall_agrees_with_loops(
    sizes: tuple[int, int], k: int, levels: int, seed: int
) -> None:
    # Few levels make many ties and duplicates.
    generator = torch.Generator().manual_seed(seed)
    samples, real = (torch.randint(levels, (n, 1, 2), generator=generator).double() for n in sizes)
    expected = precision_recall_by_loops(samples, real, k)
    assert metrics.precision_recall(samples, real, k) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    a, b = normal(13, 3), normal(17, 3, seed=1)
    expected = metrics.precision_recall(a, b), metrics.nearest_distance(a, b)
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    assert metrics.precision_recall(a, b) == expected[0]
    assert torch.equal(metrics.nearest_distance(a, b), expected[1])


def test_the_same_set_has_full_precision_and_recall() -> None:
    a = normal(20, 5)
    assert metrics.precision_recall(a, a) == (1, 1)


def test_sets_far_apart_have_none() -> None:
    assert metrics.precision_recall(normal(20, 5), normal(20, 5, seed=1) + 100) == (0, 0)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision() -> None:
    left, right = normal(40, 2), normal(40, 2, seed=1) + 1000
    both = torch.cat([left, right])
    assert metrics.precision_recall(left, both) == (1, 0.5)
    assert metrics.precision_recall(both, left) == (0.5, 1)


def test_the_edge_of_a_ball_belongs_to_it() -> None:
    real = torch.tensor([[0.0], [1.0]])
    samples = torch.tensor([[2.0], [-1.0], [2.5], [-1.5]])
    assert metrics.precision_recall(samples, real, k=1).precision == 0.5


def test_duplicates_count_as_neighbours() -> None:
    real = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert metrics.precision_recall(torch.tensor([[0.1], [0.0]]), real, k=1).precision == 0.5


def test_small_distances_far_from_the_origin_are_exact() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64) * 1e-6 + 1e6
    samples = real[:2] + 0.25e-6
    assert metrics.precision_recall(samples, real, k=1) == (1, 1)
    expected = (samples - real[:2]).abs().flatten()
    assert torch.equal(metrics.nearest_distance(samples, real), expected)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; allowed are whole numbers from 1"):
        metrics.precision_recall(normal(5, 2), normal(5, 2), k)


def test_more_than_k_samples_are_needed() -> None:
    assert metrics.precision_recall(normal(4, 2), normal(4, 2), k=3) == (1, 1)
    with pytest.raises(ValueError, match=r"real has shape \(3, 2\).*at least 4"):
        metrics.precision_recall(normal(4, 2), normal(3, 2), k=3)


def test_nearest_distance_agrees_with_numpy() -> None:
    a, b = normal(11, 2, 3), normal(7, 2, 3, seed=1)
    differences = a.flatten(1).numpy()[:, None] - b.flatten(1).numpy()
    expected = np.sqrt((differences**2).sum(2)).min(1)
    distances = metrics.nearest_distance(a, b)
    assert distances.shape == (11,)
    assert distances.dtype == torch.float64
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-14)


def test_nearest_distance_of_members_is_zero() -> None:
    a = normal(9, 30).float() + 100
    assert torch.equal(metrics.nearest_distance(a, a.flip(0)), torch.zeros(9).double())


def test_results_are_python_floats_and_need_no_gradient() -> None:
    a, b = normal(9, 4).requires_grad_(), normal(8, 4, seed=1)
    assert type(metrics.frechet_distance(a, b)) is float
    assert {type(value) for value in metrics.precision_recall(a, b)} == {float}
    assert not metrics.nearest_distance(a, b).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_computation_is_in_float64_whatever_the_dtype(dtype: torch.dtype) -> None:
    a, b = (normal(20, 6, seed=i).to(dtype) for i in range(2))
    for metric in METRICS:
        torch.testing.assert_close(metric(a, b), metric(a.double(), b.double()), rtol=0, atol=0)


@pytest.mark.parametrize("metric", METRICS)
class TestArguments:
    def test_different_shapes(self, metric: Callable[..., object]) -> None:
        message = r"shape \(1, 8, 8\) and .* of \(64,\); they must be the same"
        with pytest.raises(ValueError, match=message):
            metric(torch.zeros(9, 1, 8, 8), torch.zeros(9, 64))

    @pytest.mark.parametrize("shape", [(0, 3), (9, 0), (9,), ()])
    def test_no_samples(self, metric: Callable[..., object], shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=re.escape(f"has shape {shape}; allowed is (n, *S)")):
            metric(torch.zeros(9, 3), torch.zeros(shape))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, metric: Callable[..., object], value: float) -> None:
        bad = torch.zeros(9, 3)
        bad[4, 1] = value
        for arguments in ((bad, torch.zeros(9, 3)), (torch.zeros(9, 3), bad)):
            with pytest.raises(ValueError, match=r"^(a|b|samples|real) holds NaN or infinity"):
                metric(*arguments)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64])
    def test_not_floating(self, metric: Callable[..., object], dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"has dtype {dtype}; allowed are floating"):
            metric(torch.zeros(9, 3), torch.zeros(9, 3, dtype=dtype))

    def test_different_devices(self, metric: Callable[..., object]) -> None:
        with pytest.raises(ValueError, match=r"is on cpu and .* on meta; allowed is one"):
            metric(torch.zeros(9, 3), torch.zeros(9, 3, device="meta"))
