"""The C++ kernels against the oracle: tile edges, accuracy, threads, memory, range of values."""

import functools
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import problems
from benchmarks.common.folders import ROOT
from benchmarks.common.problems import radius_of
from benchmarks.cpu.bench_memory import extra_megabytes
from pfgm import field_fn, posterior_mean
from pfgm.backends import native, reference
from pfgm.common.tensors import dequantise
from pfgm.core.arithmetic import squared_distances
from pfgm.core.problems import PosteriorMean, State, Upstream
from tests.backends.accuracy import assert_accurate

if os.environ.get("PFGM_NATIVE") == "0":
    pytest.skip("PFGM_NATIVE=0", allow_module_level=True)

NARROW = [torch.bfloat16, torch.float16, torch.uint8]
# At tile edges: queries 4, 6, 48 (bounds), 384 (block); references 2, 8 to 64 (tile), 128, 512 and
# 2048 (chunk); features the lanes 2 to 16, 64 (additions), 128, 256, 512 (bounds), 768.
EDGES = [
    (1, 1, 1), (3, 2, 5), (5, 63, 16), (6, 64, 17), (7, 65, 767), (6, 3, 768), (13, 9, 769),
    (2, 67, 1023), (4, 66, 1025), (5, 2047, 3), (5, 2048, 31), (5, 2049, 33), (3, 4100, 15),
    (383, 5, 4), (384, 6, 8), (391, 70, 2), (48, 513, 511), (47, 300, 512), (48, 700, 512),
    (49, 130, 785), (51, 130, 3073), (1009, 130, 1),
    # Few features: at blocks of 64 queries, panels of 64 features.
    (1, 1, 511), (1, 5000, 2), (65, 3, 1), (64, 64, 16), (65, 65, 17), (66, 2049, 63),
    (67, 700, 64), (5, 2100, 65), (130, 130, 2), (7, 4200, 129), (9, 300, 511),
]  # fmt: skip


problem = functools.partial(problems.problem, between=0.5, spread=0.2)


def forward(x, references, radius, D, module=native):
    mean, logsumexp, _, _ = module.posterior_mean(PosteriorMean(x, references, radius, D))
    return mean, logsumexp


def backward(x, references, radius, D, G, g, needs=(True, True, True), module=native):
    arguments = PosteriorMean(x, references, radius, D)
    mean, _, nearest, total = module.posterior_mean(arguments)
    state = State(mean, nearest, total)
    return module.posterior_mean_backward(arguments, state, Upstream(G, g), needs)


def row_error(actual, expected, scale):
    return ((actual.double() - expected).norm(dim=1) / scale).max().item()


def assert_gradient(actual, expected, tolerance):
    """Checks every row and the whole gradient: an error of one row must not hide in the norm.

    In a row much smaller than the others, large terms cancel and leave their rounding errors. These
    errors are compared with the typical row, and in float64 with a thousandth of it.
    """
    floor = 1.0 if tolerance > 1e-8 else 1e-3
    actual, expected = (t.double().reshape(len(t), -1) for t in (actual, expected))
    rows, norm = expected.norm(dim=1), expected.norm()
    assert norm > 0
    allowed = tolerance * torch.maximum(rows, floor * norm / len(rows) ** 0.5)
    assert ((actual - expected).norm(dim=1) <= allowed).all()
    cosine = (actual * expected).sum() / (actual.norm() * norm)
    assert 1 - cosine <= max(tolerance**2, 1e-13)
    assert abs(actual.norm() / norm - 1) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW])
@pytest.mark.parametrize("sizes", [(1, 300, 512), (5, 2100, 785), (31, 70, 1025), (50, 2100, 600)])
def test_a_sketch_changes_no_bit(isa, sizes, dtype):
    point_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, references, sigma = problem(*sizes, dtype=point_dtype, reference_dtype=dtype)
    sketch = native.sketch(references, point_dtype)
    for D in (1.0, math.inf):
        radius = radius_of(sigma, D)
        arguments = PosteriorMean(x, references, radius, D)
        with_sketch = arguments._replace(sketch=sketch)
        plain, sketched = native.posterior_mean(arguments), native.posterior_mean(with_sketch)
        assert all(torch.equal(a, b) for a, b in zip(plain, sketched, strict=True))
        mean, _, nearest, total = plain
        upstream = Upstream(torch.ones_like(mean), torch.zeros_like(total))
        saved = State(mean, nearest, total), upstream, (True, True, True)
        plain = native.posterior_mean_backward(arguments, *saved)
        sketched = native.posterior_mean_backward(with_sketch, *saved)
        assert all(torch.equal(a, b) for a, b in zip(plain, sketched, strict=True))


def test_the_bounds_of_a_sketch_hold_over_many_features():
    """With a single float32 sum per lane, the bound of the nearest reference would exceed the
    other's."""
    lanes, additions, ulp = 16, 8000, 2.0**-6
    choice = torch.rand(additions * lanes, generator=torch.Generator().manual_seed(0)) < 0.556
    nearest = torch.full((additions * lanes,), 32 + 0.55 * ulp, dtype=torch.float64)
    other = torch.where(choice, 32 + 1.45 * ulp, 32 - 0.55 * ulp).double()
    references = torch.stack(
        [(line / 32).sqrt().float().repeat_interleave(32) for line in (other, nearest)]
    )
    x, sigma = torch.zeros(1, references.shape[1]), torch.tensor([0.01], dtype=torch.float64)
    sketch = native.sketch(references, torch.float32)
    arguments = PosteriorMean(x, references, sigma, math.inf, sketch=sketch)
    mean, *_ = native.posterior_mean(arguments)
    assert torch.equal(mean[0], references[1])


def test_a_sketch_of_strided_rows():
    _, references, _ = problem(3, 64, 1200)

    def bits(rows):
        return native.sketch(rows, torch.float32).view(torch.int32)

    wanted = bits(references[::2, 100:700].contiguous())
    assert torch.equal(bits(references[::2, 100:700]), wanted)
    assert torch.equal(bits(references.T[100:700].T[::2]), wanted)
    assert native.sketch(references[:, :511], torch.float32) is None


def test_a_sketch_of_other_references():
    x, references, radius = problem(3, 64, 600)
    for sketch in (
        native.sketch(references[:63], torch.float32),
        native.sketch(references, torch.float64),
        native.sketch(references, torch.float32)[:-1],
    ):
        with pytest.raises(
            ValueError, match=r"sketch must be the result of sketch\(\) for these references,"
        ):
            native.posterior_mean(PosteriorMean(x, references, radius, 1.0, sketch=sketch))


@functools.lru_cache(maxsize=2)  # the same for each instruction set
def at_edges(sizes, dtype, D, least=0.0):
    """x, references, radius, D, the gradients of the mean and the log-sum-exp, and what is expected
    of the forward pass and of them. No sigma is below the least."""
    x, references, sigma = problem(*sizes, dtype=dtype)
    sigma = sigma.clamp(min=least)
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
    # The factor sigma² makes the score as large as the gradient of the mean.
    g = sigma**2 * torch.randn(len(x), generator=generator, dtype=torch.float64)
    radius = radius_of(sigma, D)
    wide = x.double(), references.double(), radius, D
    gradients = backward(*wide, G.double(), g, module=reference) if least else None
    return (x, references, radius, D, G, g), forward(*wide, reference), gradients


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
@pytest.mark.parametrize("sizes", EDGES)
def test_forward_at_tile_edges(isa, sizes, D):
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
        inputs, expected, _ = at_edges(sizes, dtype, D)
        assert_accurate(forward(*inputs[:4]), expected, inputs[1], tolerance)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("sizes", EDGES)
def test_backward_at_tile_edges(isa, sizes, D):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        # The mean is in float32, whose rounding is visible beside a small sigma.
        inputs, _, expected = at_edges(sizes, dtype, D, least=0.05)
        for actual, wanted in zip(backward(*inputs), expected, strict=True):
            assert_gradient(actual, wanted, tolerance)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sizes", [(5, 2049, 33), (7, 65, 769)])
def test_narrow_references_at_tile_edges(isa, oracle, sizes, dtype):
    x, references, sigma = problem(*sizes, reference_dtype=dtype)
    assert_accurate(
        forward(x, references, sigma, 1.0), oracle(x, references, sigma, 1.0), references, 5e-6
    )


def test_every_float16_is_read_correctly(isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite()]
    mean, _ = forward(values.float()[None], values[None], torch.ones(1).double(), 1.0)
    assert torch.equal(mean[0], values.float())  # one reference is the mean


@pytest.mark.parametrize("N", [5, 600])
def test_small_float16_without_subnormal_numbers(isa, N):
    # The smallest float16 are subnormal, but no float32 that holds them is.
    bits = torch.arange(-(N // 2), N - N // 2).to(torch.float32)
    values = bits * 2.0**-24
    references = values.to(torch.float16).expand(9, N)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        mean, _ = forward(torch.zeros(60, N), references, torch.ones(60).double(), 1.0)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(mean, values.expand(60, N), rtol=1e-6, atol=0)


def test_every_uint8_is_read_correctly(isa):
    values = torch.arange(256).to(torch.uint8)
    for dtype, error in ((torch.float32, 8e-8), (torch.float64, 0)):
        x = values.to(dtype)[None]
        mean, _ = forward(x, values[None], torch.ones(1).double(), 1.0)
        assert (mean[0] - (values.double() / 127.5 - 1)).abs().max() <= error


@pytest.mark.parametrize("copies", [1, 17, 3000])
@pytest.mark.parametrize("N", [1, 40, 600])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_references_that_float32_does_not_hold(dtype, N, copies):
    # x is a reference rounded to float32. Only float64 can represent the distance between them.
    one = torch.full((1, N), 3, dtype=torch.uint8)
    exact = one.double() / 127.5 - 1
    references = (one if dtype == torch.uint8 else exact).expand(copies, N)
    x = exact.float().expand(50, N)
    mean, lse = forward(x, references, torch.zeros(50).double(), 1.0)
    squared = (x[0].double() - exact[0]).square().sum()
    expected = math.log(copies) - (N + 1) / 2 * math.log(squared)
    torch.testing.assert_close(lse, torch.full_like(lse, expected), rtol=1e-9, atol=0)
    assert (mean - exact).abs().max() <= 2e-7


@pytest.mark.parametrize("D", [1.0, 2048.0, 1e6, math.inf])
def test_accuracy_contract(stress, oracle, D):
    for x, references, name in stress:
        for sigma in (1e-10, 1e-4, 1e-2, 1e-1, 1.0, 10.0, 1e3):
            radius = torch.full((len(x),), radius_of(sigma, D), dtype=torch.float64)
            expected = oracle(x, references, radius, D)
            try:
                assert_accurate(forward(x, references, radius, D), expected, references, 2e-5)
            except AssertionError as error:
                raise AssertionError(f"{name}, sigma {sigma}") from error
            if D != 1.0:
                continue
            field, wanted = field_of(x, radius, references), true_field(x, radius, expected[0])
            assert row_error(field, wanted, math.sqrt(x.shape[1])) <= 2e-5, (name, sigma)


@pytest.mark.parametrize("sigma", [1e-8, 1e-5, 1e-3])
@pytest.mark.parametrize("M", [6, 2100])
def test_gradients_at_small_sigma(backend, M, sigma):
    # lse is -d²/(2 sigma²), too large to give the weights exactly. Two references are nearest, at
    # the same distance; the others are far away.
    references = torch.full((M, 2), 9.0, dtype=torch.float64)
    references[0], references[M - 1] = torch.tensor([[0.0, 3.0], [0.0, -3.0]])
    references.requires_grad_()
    x = torch.tensor([[4.0, 0.0]], dtype=torch.float64, requires_grad=True)
    mean = posterior_mean(x, references, sigma=sigma, D=math.inf, backend=backend)
    grad_x, grad_y = torch.autograd.grad(mean[0, 0], (x, references))
    # Along the first axis the weights do not change.
    assert grad_x.abs().max() <= 1e-12 / sigma
    assert torch.equal(grad_y[1 : M - 1], torch.zeros(M - 2, 2, dtype=torch.float64))
    torch.testing.assert_close(grad_y[[0, M - 1], 0], torch.full((2,), 0.5).double())
    # Along the second: ∂mean/∂x = Var/σ² = 9/σ².
    mean = posterior_mean(x, references, sigma=sigma, D=math.inf, backend=backend)
    (grad_x,) = torch.autograd.grad(mean[0, 1], x)
    assert grad_x[0, 1].item() == pytest.approx(9 / sigma**2, rel=1e-12)


def test_gradients_far_away_and_close_by(oracle_gradients):
    # Where Σ c_j (x − y_j) cancels, and where c_j leaves the range of float32.
    generator = torch.Generator().manual_seed(0)
    unit = torch.randn(12, 8, generator=generator)
    for scale, offset, sigma, D in (
        (1.0, 1e3, 30.0, math.inf),
        (1.0, 1e3, 30.0, 1e6),
        (1e25, 1e25, 1e25, 1.0),
        (1e-22, 1e-22, 1e-22, 1.0),
        (1e-22, 1e-22, 1e-22, math.inf),
    ):
        references = scale * unit
        x = scale * unit[:3] + offset * torch.randn(3, 8, generator=generator)
        radius = torch.full((3,), radius_of(sigma, D), dtype=torch.float64)
        G, none = torch.randn(3, 8, generator=generator), torch.zeros(3, 8)
        g = torch.ones(3, dtype=torch.float64)
        for upstream in ((G, 0 * g), (none, g)):
            expected = oracle_gradients(x, references, radius, D, *upstream)
            actual = backward(x, references, radius, D, *upstream)
            for one, wanted in zip(actual, expected, strict=True):
                assert_gradient(one, wanted, 1e-5)


def equally_near(N, offset, copies):
    """Points and references, for each k = 1 … 8 a point with k references at exactly the same
    distance, among others. They are k copies, or mirror images of each other."""
    generator = torch.Generator().manual_seed(N)

    def on_grid(low, high):  # whose squares and their sums float64 holds exactly
        values = torch.rand(8, N, generator=generator, dtype=torch.float64)
        return ((low + (high - low) * values) * 256).round() / 256

    x, arm = on_grid(offset - 1, offset + 1), on_grid(0.25, 1.25)
    signs = torch.randint(0, 2, (8, 8, N), generator=generator) * 2 - 1
    if copies:
        signs = torch.ones_like(signs)
    near = [x[k] + sign * arm[k] for k in range(8) for sign in signs[k, : k + 1]]
    others = offset + 3 * torch.randn(12, N, generator=generator, dtype=torch.float64)
    y = torch.cat([torch.stack(near), others])
    return x.float(), y[torch.randperm(len(y), generator=generator)].float()


def true_gradients(x, y, radius, D, G, g):
    """[(gradient, natural scale of its rows)] in x, y and radius, in long double. They are computed
    relative to the nearest reference, because the plain formula (conftest.py) cancels at σ = 1e-6.

    The natural scale of a row is the largest of its true gradient, |G| and |g| √(w (1 + w d²)),
    with w = (N + D)/s or 1/σ². |G| is the gradient of a mean that follows x. The last term is the
    gradient of the log-sum-exp of the nearest reference alone, at a distance of at least that of
    the noise. The scale of a reference is the largest of the rows in which it counts, each with its
    largest gradient of a reference.
    """
    x, y, G = (v.double().numpy() for v in (x, y, G))
    g, radius = (v.numpy().astype(np.longdouble) for v in (g, radius))
    grad_x, grad_y, grad_r = (np.zeros(v.shape, np.longdouble) for v in (x, y, radius))
    scales = np.zeros((len(x), len(y)))  # of references in each row
    scale_x, scale_r = np.zeros(len(x)), np.zeros(len(x))
    for b, r in enumerate(radius):
        apart = x[b] - y
        squared = np.square(apart).sum(1).astype(np.longdouble)
        nearest = int(squared.argmin())
        s, excess = squared[nearest] + r**2, squared - squared[nearest]
        if math.isinf(D):
            w, log_p = np.full(len(y), 1 / r**2), -excess / (2 * r**2)
        else:
            exponent = x.shape[1] + np.longdouble(D)
            w, log_p = exponent / (s + excess), -exponent / 2 * np.log1p(excess / s)
        p = np.exp(log_p) / np.exp(log_p).sum()
        seen = p > 1e-25
        p, w0, w, excess, apart = p[seen], w[nearest], w[seen], excess[seen], apart[seen]
        t = (y[seen] - y[nearest]).astype(np.longdouble) @ G[b]
        t += g[b] - p @ t
        c, moment = -p * t * w, (p * t * excess * w).sum()
        own = np.outer(p, G[b]) - c[:, None] * apart
        grad_x[b] = c @ apart
        grad_y[seen] += own
        if math.isinf(D):
            grad_r[b] = (moment + g[b] * squared[nearest] / r**2) / r
        else:
            grad_r[b] = -r * w0 * (g[b] - moment / exponent)
        lone = abs(g[b]) * np.sqrt(w0 * (1 + w0 * squared[nearest]))
        least = max(np.linalg.norm(G[b]), lone)
        scale_x[b] = max(least, np.linalg.norm(grad_x[b].astype(float)))
        scale_r[b] = max(least, abs(grad_r[b]))
        scales[b, seen] = max(least, np.linalg.norm(own.astype(float), axis=1).max())
    scale_y = scales.max(0)
    scale_y[scale_y == 0] = scales.max()
    return (grad_x, scale_x), (grad_y, scale_y), (grad_r, scale_r)


def assert_true_gradients(x, y, sigma, D, G, g):
    radius = torch.full((len(x),), radius_of(sigma, D), dtype=torch.float64)
    expected = true_gradients(x, y, radius, D, G, g)
    for one, (wanted, scale) in zip(backward(x, y, radius, D, G, g), expected, strict=True):
        off = (one.double().numpy() - wanted).reshape(len(wanted), -1).astype(np.float64)
        assert (np.linalg.norm(off, axis=1) <= 1e-4 * scale).all(), sigma


def test_gradients_with_a_reference_just_too_far_to_count():
    """In a later chunk of references with few features."""
    x = torch.zeros(16, 2)
    references = 50 + torch.rand(4096, 2, generator=torch.Generator().manual_seed(0))
    references[5] = torch.tensor([1.0, 0.0])
    references[3000] = torch.tensor([0.0, 1 + 5e-6])

    def gradient(dtype):
        points = x.to(dtype, copy=True).requires_grad_()
        mean, logsumexp = posterior_mean(
            points, references.to(dtype), sigma=1e-4, D=math.inf, return_logsumexp=True
        )
        (mean.sum() + logsumexp.sum()).backward()
        return points.grad.double()

    torch.testing.assert_close(gradient(torch.float32), gradient(torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
@pytest.mark.parametrize("N", [1, 2, 3, 64, 784, 3072])
def test_gradients_where_references_are_equally_near(threads, N, D):
    threads(1)
    generator = torch.Generator().manual_seed(1)
    G, g = torch.randn(8, N, generator=generator), torch.randn(8, generator=generator).double()
    for offset, copies in ((0, True), (10, True), (10, False)):
        x, y = equally_near(N, offset, copies)
        for sigma in (1e-6, 1e-4, 1e-3, 0.02, 0.1, 1.0):
            for upstream in ((G, 0 * g), (0 * G, g)):
                assert_true_gradients(x, y, sigma, D, *upstream)


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_gradients_where_each_digit_occurs_three_times(threads, D):
    digits = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_digits().data)
    digits = ((digits - digits.mean()) / digits.std()).float()
    generator = torch.Generator().manual_seed(0)
    x = digits[::300] + 2e-4 * torch.randn(6, 64, generator=generator)
    G = torch.randn(6, 64, generator=generator)
    references = digits.repeat(3, 1)  # in chunks of 2048
    for count in (1, 2):
        threads(count)
        assert_true_gradients(x, references, 2e-4, D, G, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
@pytest.mark.parametrize("N", [1, 2])
def test_gradients_where_the_nearest_is_close_beside_the_spread(threads, N, D):
    threads(1)
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(5000, N, generator=generator)
    x = references[:40] + 1e-3 * torch.randn(40, N, generator=generator)
    G = torch.randn(40, N, generator=generator)
    for sigma in (1e-4, 1e-3, 1e-2):
        assert_true_gradients(x, references, sigma, D, G, torch.zeros(40, dtype=torch.float64))


def built_to_defeat(name, N, dtype):
    """(x, references, sigma) for which a slightly too high bound would lose references that count.

    48 points are enough for the bounds to be used.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = noise(N).clamp(-1, 1)
    sigma = torch.logspace(-2, 0, 48, dtype=torch.float64)
    x = base + sigma[:, None] * noise(48, N)
    steps = torch.linspace(0, 1, 900, dtype=torch.float64)[:, None]
    if name == "bound is the distance":  # all differences are alike along a line of features
        references = base + 0.1 * steps.flip(0)
        x = base + 1 + 0.005 * torch.arange(48)[:, None]
    elif name == "far from the origin":  # where rounding of the bound is larger than the distance
        references = base + 300 + 0.01 * steps * noise(900, N).sign()
        x = references[::19] + 1e-3 * noise(48, N)
    elif name == "bound is nothing":  # the same mean and deviation in every line
        order = torch.rand(900, N // 32, 32, generator=generator).argsort(2)
        lines = base[: N // 32 * 32].view(1, -1, 32).expand(900, -1, -1)
        references = base.repeat(900, 1)
        references[:, : N // 32 * 32] = lines.gather(2, order).flatten(1)
    elif name == "nearest comes last":
        references = base + steps.flip(0) * noise(900, N)
    elif name == "one is enormous":
        references = base + steps * noise(900, N)
        references[450] = 1e25
    elif name == "all count":
        references = base + 0.05 * noise(900, N)
        x = base + noise(48, N)
    elif name == "one feature is enormous":  # bytes keep nothing of the others
        references = base + 0.05 * steps * noise(900, N)
        references[:, 3] += 1e3
        x[:, 3] += 1e3
    elif name == "nearly constant beside its offset":  # the middle of a row is rounded
        references = 1e4 + 0.05 * torch.rand(900, N, generator=generator, dtype=torch.float64)
        x = references[:48] + 0.015 * noise(48, N)
        sigma = torch.full((48,), 0.05, dtype=torch.float64)
    elif name == "two values":  # a row has the range of one unit in the last place
        x = 1 + 2.0**-23 * (noise(48, N) > 0)
        references = 1 - 0.001 * steps * noise(900, N).abs()
    elif name == "no spread within a row":  # bytes are all zero
        references = steps.expand(900, N)
        x = (0.5 + sigma[:, None]).expand(48, N)
    return x.to(dtype), references.to(dtype), sigma


@functools.lru_cache(maxsize=2)  # the same for each instruction set
def defeat_results(name, N, dtype, D):
    """x, references, radius, and mean and log-sum-exp by the plain formulas, relative to the
    nearest reference."""
    x, references, sigma = built_to_defeat(name, N, dtype)
    squared = squared_distances(x.double(), references.double())
    radius = radius_of(sigma, D)
    r = radius[:, None]
    nearest = squared.amin(1, keepdim=True)
    if math.isinf(D):
        largest, below = -nearest / (2 * r**2), (squared - nearest) / (2 * r**2)
    else:
        s = nearest + r**2
        largest, below = -(N + D) / 2 * s.log(), (N + D) / 2 * ((squared - nearest) / s).log1p()
    weights = (-below).exp()
    total = weights.sum(1, keepdim=True)
    mean = weights @ references.double() / total
    return (x, references, radius), (mean, (largest + total.log())[:, 0])


@pytest.mark.parametrize(("N", "D"), [(512, math.inf), (1023, 128.0), (545, 1.0)])
@pytest.mark.parametrize(
    "name",
    [
        "bound is the distance",
        "far from the origin",
        "bound is nothing",
        "nearest comes last",
        "one is enormous",
        "all count",
        "one feature is enormous",
        "nearly constant beside its offset",
        "two values",
        "no spread within a row",
    ],
)
def test_inputs_built_to_defeat_the_bounds(isa, name, N, D):
    # float64 has 1e-16 of d²/sigma², which is up to 3e7.
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        inputs, expected = defeat_results(name, N, dtype, D)
        assert_accurate(forward(*inputs, D), expected, inputs[1][:400], tolerance)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_bounds_of_narrow_references(isa, dtype, sigma):
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 700, generator=generator) * 2 - 1
    spread = torch.linspace(0, 0.2, 900)[:, None] * torch.randn(900, 700, generator=generator)
    references = base + spread
    if dtype == torch.uint8:
        references = (127.5 * (references + 1)).round().clamp(0, 255)
    references = references.to(dtype)
    x = base + sigma * torch.randn(50, 700, generator=generator)
    radius = torch.full((50,), sigma, dtype=torch.float64)
    wide = dequantise(references, torch.float64)
    for D in (1.0, math.inf):
        at = radius_of(radius, D)
        expected = forward(x.double(), wide, at, D, reference)
        assert_accurate(forward(x, references, at, D), expected, wide[:400], 2e-5)


@pytest.mark.parametrize("sizes", [(48, 70, 4096), (50, 130, 4097), (49, 65, 9000)])
def test_bounds_over_several_panels(isa, sizes):
    x, references, sigma = problem(*sizes)
    expected = forward(x.double(), references.double(), sigma, 1.0, reference)
    assert_accurate(forward(x, references, sigma, 1.0), expected, references, 2e-5)


@pytest.mark.parametrize("scale", [1e-39, 1e-30, 1e-21, 1e-20, 1e-19, 1e-12, 1e12, 1e18])
def test_bounds_at_any_scale(isa, scale):
    x, references, sigma = problem(50, 200, 600)
    wide = tuple(scale * t.double() for t in (x, references, sigma))
    x, references = wide[0].float(), wide[1].float()
    expected = forward(x.double(), references.double(), wide[2], math.inf, reference)
    actual = forward(x, references, wide[2], math.inf)
    error = (actual[0].double() - expected[0]).abs().max() / references.double().abs().max()
    assert error <= (1e-5 if scale > 1e-38 else 2e-2)  # numbers below 1e-38 have few digits


@pytest.mark.parametrize("where", ["x", "references"])
def test_bounds_take_the_largest_values(isa, where):
    x, references, sigma = problem(50, 200, 600)
    (x if where == "x" else references)[37, 123] = 3e38
    assert forward(x, references, sigma, 1.0)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("D", [1.0, math.inf])
def test_few_and_many_queries_give_the_same_results(D, dtype):
    # Few queries do not use the bounds.
    x, references, sigma = problem(60, 2100, 784, reference_dtype=dtype)
    radius = radius_of(sigma, D)
    mean, lse = forward(x, references, radius, D)
    for b in range(0, 60, 5):
        few = slice(b, b + 5)
        one_mean, one_lse = forward(x[few], references, radius[few], D)
        torch.testing.assert_close(mean[few], one_mean, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse[few], one_lse, rtol=1e-7, atol=1e-6)


# ---- rounding errors that do not average out ----


def true_field(x, radius, mean):
    E = torch.cat([x.double() - mean, radius[:, None]], 1)
    return -math.sqrt(x.shape[1]) * E / (E.norm(dim=1, keepdim=True) + 5)


def field_of(x, radius, references):
    field = field_fn(x, radius, references, backend="native")
    return torch.cat([field[0], field[1][:, None]], 1)


def field_error(actual, expected):
    return ((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def with_terms_that_repeat(name, N, copies):
    """Points and references at the same distance, or nearly: many features add the same number."""
    generator = torch.Generator().manual_seed(N)
    x = torch.zeros(16, N)
    if name == "constant":
        one = torch.full((2, N), 0.63738866)
        one[1] *= 1 + 8.4654e-5
        one[1, ::2] *= -1
        return x, one.repeat(copies, 1)
    if name == "brighter":  # x has as many values as features
        x = torch.randn(1, N, generator=generator).repeat(16, 1)
        shift = torch.full((2, N), 0.63738866)
        shift[1] *= 1 + 8.4654e-5
        shift[1, ::2] *= -1
        return x, (x[:1] + shift).repeat(copies, 1)
    if name == "binary":
        images = torch.zeros(2, N)
        for image in images:
            image[torch.randperm(N, generator=generator)[: N // 2]] = 0.7
        return x, images.repeat(copies, 1)
    x[:, 0] = torch.linspace(1, 2, 16)  # one feature is larger than the sum of the others
    return x, 0.05 * (torch.rand(9 * copies, N, generator=generator) < 0.5)


@pytest.mark.parametrize("copies", [9, 22, 40])
@pytest.mark.parametrize("N", [48, 64, 256, 500, 784, 1000, 3072])
@pytest.mark.parametrize("name", ["constant", "brighter", "binary", "one feature"])
def test_terms_that_repeat(isa, oracle, oracle_gradients, name, N, copies):
    x, references = with_terms_that_repeat(name, N, copies)
    radius = torch.full((16,), 0.0493, dtype=torch.float64)
    mean, lse = oracle(x, references, radius, 1.0)
    expected = true_field(x, radius, mean)
    field = field_of(x, radius, references)
    assert field_error(field, expected) <= 1e-5
    actual_mean, actual_lse = forward(x, references, radius, 1.0)
    assert row_error(actual_mean, mean, references.double().norm(dim=1).max()) <= 1e-5
    # A sum that is nearly one term has that term's rounding in every distance.
    missed = {48: 2e-5, 64: 3e-5, 784: 2e-5, 1000: 2e-5} if name == "one feature" else {}
    assert (actual_lse - lse).abs().max() <= missed.get(N, 1e-5)
    for row in (slice(0, 1), slice(15, 16)):
        alone = field_of(x[row], radius[row], references)
        assert field_error(alone, field[row].double()) <= 5e-6
    G = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(16, dtype=torch.float64)
    wanted = oracle_gradients(x, references, radius, 1.0, G, zero, needs_references=False)
    actual = backward(x, references, radius, 1.0, G, zero, needs=(True, False, False))
    assert_gradient(actual[0], wanted[0], 3e-5)


@pytest.mark.parametrize("block", [(0.35, 0.65), (0.0, 0.5)])
@pytest.mark.parametrize(("N", "tolerance"), [(300, 2e-5), (511, 2e-5), (784, 2e-5), (3072, 2e-5)])
def test_terms_that_repeat_in_a_block_of_the_references(isa, oracle, N, tolerance, block):
    """As in data sorted by class."""
    begin, end = (int(share * 300) for share in block)
    constant = torch.full((N,), 0.711)
    references = torch.randn(300, N, generator=torch.Generator().manual_seed(N))
    references *= constant.norm() / references.norm(dim=1, keepdim=True)
    references[begin:end] = constant
    x, radius = torch.zeros(2, N), torch.full((2,), 0.6, dtype=torch.float64)
    mean, _ = oracle(x, references, radius, 1.0)
    field = field_of(x.repeat(8, 1), radius.repeat(8), references)
    assert field_error(field[:2], true_field(x, radius, mean)) <= tolerance


@pytest.mark.parametrize("B", [2, 9])
def test_two_groups_of_equal_references_with_few_features(isa, oracle, B):
    """Where the score multiplies errors of distances by 255."""
    N = 63
    one = torch.full((2, N), 0.5671)
    one[1] *= 1 + 2e-4
    one[1, ::2] *= -1
    radius = torch.full((B,), 0.5671 * math.sqrt(N / 510), dtype=torch.float64)
    mean, _ = oracle(torch.zeros(B, N), one.repeat(12, 1), radius, math.inf)
    actual, _ = forward(torch.zeros(B, N), one.repeat(12, 1), radius, math.inf)
    assert row_error(actual, mean, mean.norm(dim=1)) <= 5e-6


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("D", [1.0, 0.5, 0.1, 0.01, 1e-6, 1e-20])
def test_a_far_reference_counts_where_weights_fall_slowly(isa, oracle, D, B, dtype, difference):
    near, far = torch.linspace(-1, 1, 50, dtype=dtype), torch.tensor([1e5, 1e9, 1e20, 1e30])
    references = torch.cat([near, far.to(dtype)])[:, None]
    x, radius = torch.linspace(-0.9, 1.1, B, dtype=dtype)[:, None], torch.full((B,), 0.3).double()
    mean, _ = oracle(x, references, radius, D)
    problem = PosteriorMean(x, references, radius, D, difference=difference)
    expected = x.double() - mean if difference else mean
    tolerance = 2e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        native.posterior_mean(problem)[0].double(), expected, rtol=tolerance, atol=tolerance / 10
    )


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("D", [0.1, 1.0, math.pi, 100.0])
def test_points_that_are_rounded_references(isa, oracle, D, B):
    """Their distances in float32 are 0, but those in float64 decide."""
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    references[:100] = 1.2345678901234 + 1e-7 * references[:100]
    x, radius = references[:B].float(), torch.zeros(B, dtype=torch.float64)
    mean, _ = oracle(x, references, radius, D)
    difference = native.posterior_mean(PosteriorMean(x, references, radius, D, difference=True))[0]
    torch.testing.assert_close(difference.double(), x.double() - mean, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize(("scale", "size"), [(1e15, 1e25), (1e-12, 1e-31), (1e3, 1e-33), (1, 1e25)])
@pytest.mark.parametrize(("B", "N"), [(2, 2), (20, 2), (20, 64), (3, 600)])
def test_upstream_gradients_of_any_size(isa, oracle_gradients, B, N, scale, size, D):
    """Of which products with differences leave the range of float32."""
    generator = torch.Generator().manual_seed(N)
    references = scale * torch.randn(40, N, generator=generator)
    x = references[:B] + scale * torch.randn(B, N, generator=generator)
    radius = torch.full((B,), scale * math.sqrt(N), dtype=torch.float64)
    radius *= 1 if math.isinf(D) else 10 * math.sqrt(N)
    G = size * torch.randn(B, N, generator=generator)
    g = size * scale * torch.randn(B, generator=generator, dtype=torch.float64)
    for upstream in ((G, 0 * g), (0 * G, g), (G, g)):
        wanted = oracle_gradients(x, references, radius, D, *upstream)
        actual = backward(x, references, radius, D, *upstream)
        for gradient, correct in zip(actual, wanted, strict=True):
            assert_gradient(gradient.double() / size, correct / size, 2e-5)


@pytest.mark.parametrize("B", [1, 9, 70])
@pytest.mark.parametrize(("N", "pairs"), [(784, 16), (3072, 3), (300, 40), (2, 2), (2, 2000)])
def test_the_field_midway_between_opposite_references(isa, N, pairs, B):
    generator = torch.Generator().manual_seed(N)

    def on_grid(rows):  # so that the sum and the difference of two are exact
        return (torch.rand(rows, N, generator=generator) * 256).round() / 256

    middle, arms = 2 * on_grid(1) - 1, 0.25 + on_grid(pairs)
    references = torch.cat([middle + arms, middle - arms])
    radius = torch.full((B,), 1.3e-4, dtype=torch.float64)
    field = field_of(middle.repeat(B, 1), radius, references)
    assert (field[:, :-1].norm(dim=1) <= 1e-8 * field[:, -1].abs()).all()


@pytest.mark.parametrize("B", [5, 50, 130])
def test_a_sketch_of_bytes_serves_any_number_of_points(isa, B):
    """With a sketch that is wrong the result is wrong."""
    x, references, sigma = problem(B, 70, 600, reference_dtype=torch.uint8)
    arguments = PosteriorMean(x, references, sigma.clamp(min=1), math.inf)
    right, *_ = native.posterior_mean(arguments)
    sketch = 100 * native.sketch(references, torch.float32)
    wrong, *_ = native.posterior_mean(arguments._replace(sketch=sketch))
    assert not torch.allclose(right, wrong)


# ---- few features: rows of float32 beside lists in float64 (csrc/cpu/dense_rows.h) ----


def assert_right(x, references, radius, D, oracle, oracle_gradients, tolerance=5e-6):
    """Means, log-sum-exps and gradients of random upstreams beside the plain formulas."""
    expected = oracle(x, references, radius, D)
    assert_accurate(forward(x, references, radius, D), expected, references, tolerance)
    generator = torch.Generator().manual_seed(2)
    G = torch.randn(x.shape, generator=generator)
    g = torch.randn(len(x), generator=generator, dtype=torch.float64)
    for upstream in ((G, 0 * g), (0 * G, g)):
        wanted = oracle_gradients(x, references, radius, D, *upstream, needs_references=False)
        actual = backward(x, references, radius, D, *upstream, needs=(True, False, True))
        assert_gradient(actual[0], wanted[0], 4 * tolerance)
        if upstream[1].any():
            assert_gradient(actual[2], wanted[2], 4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
@pytest.mark.parametrize("N", [2, 17, 130])
def test_few_features_with_references_of_each_dtype(isa, oracle, oracle_gradients, N, dtype):
    x, references, sigma = problem(20, 2300, N, reference_dtype=dtype)
    for D in (1.0, math.inf):
        radius = radius_of(sigma.clamp(min=0.05), D)
        assert_right(x, references, radius, D, oracle, oracle_gradients)


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
@pytest.mark.parametrize("near", [0, 1, 16, 17, 64, 300])
@pytest.mark.parametrize("N", [3, 70])
def test_some_references_near_and_many_barely_visible(oracle, oracle_gradients, N, near, D):
    """The near ones are a list. The others, of weights from e^-15 to e^-24, are a row."""
    generator = torch.Generator().manual_seed(near)

    def directions(count):
        values = torch.randn(count, N, generator=generator, dtype=torch.float64)
        return values / values.norm(dim=1, keepdim=True)

    one = torch.ones(1, dtype=torch.float64)
    squared = 0.5 + torch.rand(2500, generator=generator, dtype=torch.float64)
    fall = 15 + 9 * torch.rand(2500, generator=generator, dtype=torch.float64)
    fall[torch.randperm(2500, generator=generator)[: near + 1]] *= 0.01
    if math.isinf(D):
        radius, squared = 0.3 * one, 1 + 2 * 0.09 * fall
    else:
        radius = one
        squared = 2 * torch.exp(2 * fall / (N + D)) - 1
    x = torch.randn(1, N, generator=generator)
    references = (x.double() + squared.sqrt()[:, None] * directions(2500)).float()
    scale = torch.linspace(0.9, 1.1, 9).double()[:, None] * x.double()
    many, radius = scale.float().contiguous(), radius.expand(9).contiguous()
    assert_right(many, references, radius, D, oracle, oracle_gradients, 1e-5)


@pytest.mark.parametrize("N", [1, 2, 5, 100])
@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e-10, 1.0, 1e10, 1e17, 1e25])
def test_few_features_of_any_scale(isa, oracle, oracle_gradients, N, scale):
    x, references, sigma = problem(40, 300, N)
    x, references = scale * x, scale * references
    for D in (1.0, math.inf):
        radius = scale * radius_of(sigma.clamp(min=0.05), D)
        expected = oracle(x, references, radius, D)
        assert_accurate(forward(x, references, radius, D), expected, references, 5e-6)
        G, zero = torch.ones_like(x), torch.zeros(40, dtype=torch.float64)
        wanted = oracle_gradients(x, references, radius, D, G, zero, needs_references=False)
        actual = backward(x, references, radius, D, G, zero, needs=(True, False, False))
        assert_gradient(actual[0], wanted[0], 2e-5)


@pytest.mark.parametrize("N", [2, 30])
def test_few_features_where_one_is_enormous(isa, N):
    """Each reference is near the largest float32, so that a sum of a few would overflow."""
    x, references, sigma = problem(20, 3000, N)
    x[:, 0] = references[:, 0] = 3e38
    mean, _ = forward(x, references, sigma.clamp(min=0.5), 1.0)
    expected, _ = forward(x.double(), references.double(), sigma.clamp(min=0.5), 1.0, reference)
    torch.testing.assert_close(mean[:, 0], expected[:, 0].float(), rtol=1e-6, atol=0)
    assert (mean[:, 1:] - expected[:, 1:]).abs().max() <= 5e-6


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("N", [1, 2, 130])
def test_few_features_far_from_the_origin(oracle, N, offset):
    # Weights are as good as beside the origin: the differences are exact.
    x, references, sigma = problem(66, 2100, N)
    x, references = x + offset, references + offset
    for D in (1.0, 1e6, math.inf):
        radius = radius_of(sigma, D)
        mean, lse = forward(x, references, radius, D)
        wanted, wanted_lse = oracle(x, references, radius, D)
        # Sums in float32 are rounded to a few units in the last place of the offset.
        allowed = math.sqrt(N) * (5e-6 + offset * 2**-20)
        assert row_error(mean, wanted, allowed) <= 1
        assert ((lse - wanted_lse).abs() / wanted_lse.abs().clamp(min=1)).max() <= 5e-6


@pytest.mark.parametrize("N", [1, 2, 64])
@pytest.mark.parametrize("copies", [1, 16, 17, 700, 5000])
def test_few_features_on_a_reference(isa, N, copies):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, N, generator=generator)
    others = one + 1 + torch.rand(100, N, generator=generator)
    references = torch.cat([one.expand(copies, N), others])[torch.randperm(copies + 100)]
    x, none = one.expand(70, N).contiguous(), torch.zeros(70, dtype=torch.float64)
    for D in (1.0, 64.0, math.inf):
        mean, lse = forward(x, references, none, D)
        assert torch.equal(mean, x)
        expected = math.log(copies) if math.isinf(D) else math.inf
        torch.testing.assert_close(lse, torch.full_like(lse, expected), rtol=1e-12, atol=1e-12)
        grads = backward(
            x, references, none, D, torch.ones_like(x), none, needs=(True, False, True)
        )
        assert not grads[0].any()
        assert not grads[2].any()


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *(((5, 4201, 9), dtype) for dtype in (torch.float32, torch.float64, *NARROW[:2])),
        *((sizes, torch.float32) for sizes in ((150, 4201, 2), (150, 2100, 70), (50, 200, 600))),
    ],
)
def test_values_that_are_not_finite_are_named(isa, threads, sizes, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, references, sigma = problem(*sizes, dtype=wide, reference_dtype=dtype)
    for count, bad in ((1, math.nan), (3, math.inf), (3, -math.inf)):
        threads(count)
        for name, values in (("x", x), ("references", references)):
            for row in {0, len(values) // 2, min(len(values) - 1, 2048), len(values) - 1}:
                before, values[row, -1] = values[row, -1].clone(), bad
                with pytest.raises(ValueError, match=rf"{name} must .*\(first in row {row}\)"):
                    forward(x, references, sigma, 1.0)
                values[row, -1] = before


@pytest.mark.parametrize("needs", [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
def test_gradients_that_are_not_needed(needs):
    needs = tuple(map(bool, needs))
    x, references, sigma = problem(9, 70, 20)
    G, g = torch.ones_like(x), torch.ones(9, dtype=torch.float64)
    everything = backward(x, references, sigma, 1.0, G, g)
    for part, whole, needed in zip(
        backward(x, references, sigma, 1.0, G, g, needs), everything, needs, strict=True
    ):
        assert (part is not None) == needed
        assert part is None or torch.equal(part, whole)


def everything(B, M, N, D=1.0, seed=0):
    """All results of one problem, also the gradients of the queries without those of the
    references."""
    x, references, sigma = problem(B, M, N, seed=seed)
    radius = radius_of(sigma, D)
    G, g = x.cos(), sigma.cos()
    result = forward(x, references, radius, D)
    every = backward(x, references, radius, D, G, g)
    without = backward(x, references, radius, D, G, g, needs=(True, True, False))
    return *result, *every, *without[:2]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_outputs_are_written_whole(isa, monkeypatch):
    expected = everything(391, 70, 33)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert_same(everything(391, 70, 33), expected)


SCRIPT = """
import hashlib, torch
from benchmarks.common.problems import problem
from pfgm.backends import native
from pfgm.core.problems import PosteriorMean, State, Upstream
torch.set_num_threads(2)
x, references, radius = problem(37, 2100, 21)
problem = PosteriorMean(x, references, radius, 1.0)
mean, lse, nearest, total = native.posterior_mean(problem)
result = native.posterior_mean_backward(
    problem, State(mean, nearest, total), Upstream(x, radius), (True, False, True))
bits = b"".join(t.numpy().tobytes() for t in (mean, lse, result[0], result[2]))
print(hashlib.sha256(bits).hexdigest())
"""


def printed_by(script, **environment):
    """What a process prints."""
    command = [sys.executable, "-c", script]
    options = {"env": os.environ | environment, "cwd": ROOT}
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is Linux's")
def test_results_do_not_depend_on_uninitialised_memory(capsys, threads):
    # glibc fills allocated memory with the complement of this byte, and freed memory with the byte.
    filled = printed_by(SCRIPT, MALLOC_PERTURB_="128")
    threads(2)
    exec(SCRIPT, {})
    assert capsys.readouterr().out == filled


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_memory_is_bounded_whatever_the_number_of_references(monkeypatch):
    # A (B, M) matrix alone would be 138 MB, a (B, M, N) tensor 553 MB in float32.
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert extra_megabytes(576, 60_000, 4, "float32", "native", "backward") < 64


VARYING = """
import torch
from benchmarks.cpu.peak_memory import kilobytes
from pfgm.backends import native
from pfgm.core.problems import PosteriorMean
torch.set_num_threads(2)
x, references = torch.rand(384, 2000), torch.rand(250, 2000)
radius = torch.full((384,), 0.5, dtype=torch.float64)
def call(B, N):
    mean, *_ = native.posterior_mean(PosteriorMean(x[:B, :N], references[:, :N], radius[:B], 1.0))
    return mean.nbytes
call(1, 1)
before = kilobytes("VmHWM")
largest = max(call(B, N) for N in range(200, 2000, 100) for B in (384, 250, 100))
print((kilobytes("VmHWM") - before) / 1024 - largest / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_memory_is_bounded_when_every_call_has_another_shape():
    assert float(printed_by(VARYING)) <= 64


@pytest.mark.parametrize(
    ("sizes", "D"),
    [
        ((7, 2100, 1100), 1.0), ((7, 2100, 1100), math.inf), ((50, 2100, 784), 1.0),
        ((391, 300, 20), 1.0), ((391, 300, 20), math.inf), ((201, 2300, 2), 1.0),
        ((201, 2300, 2), math.inf), ((201, 2300, 17), 1.0), ((201, 2300, 200), math.inf),
    ],
)  # fmt: skip
def test_threads_do_not_change_a_bit(threads, sizes, D):
    threads(1)
    expected = everything(*sizes, D)
    assert_same(everything(*sizes, D), expected)
    for count in (2, 3, 8):
        threads(count)
        assert_same(everything(*sizes, D), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
def test_few_queries_with_few_features_wake_no_thread():
    # On a busy machine each of the many short steps would wait for the other thread.
    script = """
import os, torch, pfgm
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
short, long = (torch.randn(s, generator=generator) for s in ((200_000, 2), (500, 600)))
torch.set_num_threads(2)
counts = [len(os.listdir("/proc/self/task"))]
for y, B in ((short, 7), (long, 20)):
    pfgm.posterior_mean(y[:B], y, r=0.5)
    counts.append(len(os.listdir("/proc/self/task")))
print(*counts)
"""
    before, short, long = map(int, printed_by(script).split())
    assert short == before < long


def test_calls_from_several_threads_at_once():
    sizes = [(9 + i, 300 + i, 40 + i) for i in range(8)]
    expected = [everything(*size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for actual, wanted in zip(
                pool.map(lambda size: everything(*size), sizes), expected, strict=True
            ):
                assert_same(actual, wanted)


INTERRUPTED = """
import os, signal, sys, threading, time, torch
from pfgm.backends import native
from pfgm.core.problems import PosteriorMean, State, Upstream

def check(call, threads, references, features):
    torch.set_num_threads(threads)
    x = torch.rand(65, features)  # a block of queries and one more
    radius = torch.ones(65, dtype=torch.float64)
    few = torch.rand(70, features)
    short = PosteriorMean(x, few, radius, 4.0)
    expected = native.posterior_mean(short)
    y = few[:1].expand(references, features)  # as long as if each lay elsewhere
    long = PosteriorMean(x, y, radius, 4.0)
    mean, lse, nearest, total = native.posterior_mean(PosteriorMean(x, y[:1], radius, 4.0))
    calls = {
        "forward": lambda: native.posterior_mean(long),
        "backward": lambda: native.posterior_mean_backward(
            long, State(mean, nearest, total * len(y)), Upstream(mean, lse), (True, False, True)
        ),
        "op": lambda: torch.ops.pfgm.posterior_mean(x, y, radius, 4.0),
    }
    sent = []

    def interrupt():
        time.sleep(0.3)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    waited = "never"
    try:
        calls[call]()
    except KeyboardInterrupt:
        waited = (time.process_time() - sent[0]) / threads
    same = map(torch.equal, native.posterior_mean(short), expected)
    print(waited, all(same), flush=True)

for arguments in sys.argv[1:]:
    call, *sizes = arguments.split()
    check(call, *map(int, sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_beside_computing_threads():
    """Calls with one thread each, and with two."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.forks", "12", "20", "1", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 failed") == 2


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_a_long_call_is_interrupted():
    """Within 0.5 s of the threads' processor time: other processes may keep the machine busy."""
    # With 400 features each thread has its own blocks; with 600 the threads share blocks.
    calls = [("forward", 2, 400), ("forward", 1, 600), ("backward", 2, 600), ("op", 2, 600)]
    arguments = [f"{call} {threads} 3000000 {features}" for call, threads, features in calls]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    for call, line in zip(calls, lines, strict=True):
        waited, same = line.split()
        assert float(waited) <= 0.5, call
        assert same == "True", call


def test_the_instruction_set_can_be_chosen(isa):
    assert native.extension().cpu_isa() == isa
    assert isa in native.describe()


def test_an_unknown_instruction_set_raises(monkeypatch):
    best = native.extension().cpu_isa()
    monkeypatch.setenv("PFGM_CPU_ISA", "")
    assert native.extension().cpu_isa() == best
    monkeypatch.setenv("PFGM_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"PFGM_CPU_ISA is 'sse9'; .* can run .*portable"):
        forward(*problem(2, 3, 4), 1.0)


def test_the_backward_pass_checks_values():
    x, references, sigma = problem(5, 70, 9)
    arguments = PosteriorMean(x, references, sigma, 1.0)
    mean, lse, nearest, total = native.posterior_mean(arguments)
    references[69, 8] = math.nan
    with pytest.raises(ValueError, match="references must be finite"):
        native.posterior_mean_backward(
            arguments, State(mean, nearest, total), Upstream(mean, lse), (True, True, True)
        )


@pytest.mark.parametrize("scale", [1e25, 1e38, 1e-20, 1e-22, 1e-25, 1e-38])
@pytest.mark.parametrize("fraction", [0.3, 10.0])  # few references compete, and all of them
@pytest.mark.parametrize("D", [1.0, math.inf])
def test_squares_out_of_the_range_of_float32(oracle, scale, fraction, D):
    x, references, _ = problem(5, 70, 9)
    x, references = scale * x, scale * references
    radius = torch.full((5,), fraction * scale, dtype=torch.float64)
    expected = oracle(x, references, radius, D)
    mean, lse = forward(x, references, radius, D)
    assert row_error(mean / scale, expected[0] / scale, 1.0) <= 2e-6
    torch.testing.assert_close(lse, expected[1], rtol=1e-6, atol=1e-6)


def test_one_reference_out_of_range(oracle):
    x, references, sigma = problem(5, 70, 9)
    references[69] = 1e30
    expected = oracle(x, references, sigma, 1.0)
    mean, _ = forward(x, references, sigma, 1.0)
    assert row_error(mean, expected[0], 1.0) <= 1e-5


def test_squares_out_of_the_range_of_float64():
    x = torch.full((1, 2), 1e200, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"so far apart .* overflows torch\.float64"):
        forward(x, -x, torch.ones(1, dtype=torch.float64), 1.0)


def test_size_of_the_extension() -> None:
    # Kernels are compiled once for the type of points, not for each type of references too.
    extension = native.extension()
    if extension.build_info()["cuda_architectures"]:
        pytest.skip("holds CUDA kernels")
    assert Path(extension.__file__).stat().st_size < 4 << 20


@pytest.mark.parametrize(
    ("folder", "asks", "file"),
    [
        ("csrc/cpu", "gaussian", "weight_law.h"),
        ("csrc/cuda", "gaussian", "weight_law.h"),
        ("kernels", "if .*gaussian", "law.py"),
    ],
)
def test_the_law_of_weights_stands_in_one_file(folder, asks, file) -> None:
    sources = [path for path in (ROOT / folder).iterdir() if path.is_file()]
    asking = {path.name for path in sources if re.search(asks, path.read_text(), re.I)}
    assert asking == {file}
