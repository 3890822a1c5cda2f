"""The posterior mean and its gradients in every backend against the oracle."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import pfgm
from pfgm.backends import triton
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean, State, Upstream
from tests.backends.accuracy import assert_accurate, assert_gradient

# Slow in the interpreter.
slow = functools.partial(
    pytest.param, marks=[] if torch.cuda.is_available() else [pytest.mark.slow]
)
# Differences; products in matrix units; one pass over the references in CUDA.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
SIZES = [(3, 40, 33), (20, 40, 33), slow((20, 40, 512))]


def assert_same(mean, references):
    """Products of TF32 parts may round off the last bits."""
    torch.testing.assert_close(mean, references, rtol=2.0**-21, atol=0.0)


# ---- chunks and blocks change nothing but rounding ----


@pytest.mark.usefixtures("small")
def test_the_nearest_may_come_first_or_last(op):
    x, references, _ = op.problem(3, 290, 8)
    radius = torch.full((3,), 1e-3, dtype=torch.float64, device=x.device)
    for order in (references, references.flip(0).contiguous()):
        op.check(x, order, radius, 1.0)


@pytest.mark.usefixtures("poisoned", "small")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(20, 1.0), slow(20, math.inf), slow(40, 1.0), (40, math.inf)])
def test_chunks_and_blocks(op, N, D, dtype):
    x, references, sigma = op.problem(36, 300, N, dtype=dtype)
    op.check(x, references, op.radius_of(sigma, D), D)
    if dtype == torch.float32:
        op.check_gradients(x, references, op.radius_of(sigma.clamp(min=0.05), D), D)


@pytest.mark.skipif(triton.interpreted(), reason="NumPy computes in one order")
def test_twice_the_same_bits(op):
    problem = op.problem(17, 40, 33)
    first, second = (op.everything(*problem, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- distances that must be refined ----


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("N", [64, 513])
def test_near_ties_far_from_the_origin(op, backend, N, offset):
    x, references = op.near_ties(20, 70, N, offset)
    radius = torch.full((20,), 0.05, dtype=torch.float64, device=x.device)
    # Relative to the spread. Matrix units truncate, which is left in the weights of two references
    # that are nearly equally far. Of the offset only the rounding of TF32 parts may be lost.
    lost = {"native": 2.0**-20, "triton": 4e-7}[backend]
    bound = (2e-5 * 2**-6 + lost * offset) * math.sqrt(N)
    assert op.mean_error(x, references, radius, 1.0) <= bound


@pytest.mark.parametrize(("nats", "D"), [slow(9.0, math.inf), (13.0, 1.0)])
def test_many_small_weights(op, nats, D):
    """One reference is near, others have a weight e^-nats times as large. The centre is far away,
    so distances have large errors before they are refined."""
    generator = torch.Generator().manual_seed(4)
    B, M, N, r = 16, 30, 64, 0.3
    near = torch.randn(1, N, generator=generator)
    directions = torch.randn(M, N, generator=generator)
    apart = r * math.sqrt(2 * nats if math.isinf(D) else math.expm1(2 * nats / (N + D)))
    around = near + apart * torch.nn.functional.normalize(directions, dim=1)
    far = 5 + torch.randn(M, N, generator=generator)
    references = torch.cat([near, around, far]).to(op.device)
    x = (near + 1e-4 * torch.randn(B, N, generator=generator)).to(op.device)
    radius = torch.full((B,), r, dtype=torch.float64, device=op.device)
    mean, lse = op.compute(x, references, radius, D)
    wanted_mean, wanted_lse = op.expected(x, references, radius, D)
    assert (mean.double().cpu() - wanted_mean).norm(dim=1).max() <= 6e-5 * apart
    assert ((lse.cpu() - wanted_lse).abs() <= 1e-5 * wanted_lse.abs().clamp(min=1)).all()


@pytest.mark.parametrize(("B", "N", "apart", "radius"), [(20, 33, 0.01, 0.02), (4, 2, 1e-6, 1e-8)])
def test_bytes_near_the_middle(op, backend, B, N, apart, radius):
    """u/127.5 − 1 of 127 and 128 is a small difference of rounded numbers."""
    generator = torch.Generator().manual_seed(3)
    references = torch.randint(127, 129, (70, N), generator=generator, dtype=torch.uint8)
    x = dequantise(references[:B], torch.float32) + apart * torch.randn(B, N, generator=generator)
    radii = torch.full((B,), radius, dtype=torch.float64)
    tolerance = {"native": 1e-5, "triton": 1e-6}[backend]
    op.check(*(t.to(op.device) for t in (x, references, radii)), 1.0, tolerance)


@pytest.mark.parametrize("D", [1.0, 64.0, math.inf])
def test_the_weight_of_many_references(op, D):
    """1000 references a few nats below one. Together they have a weight of the size of its own."""
    nats = torch.linspace(1, 12, 8, dtype=torch.float64)
    radius = (0.5 / nats).sqrt() if math.isinf(D) else torch.expm1(2 * nats / (1 + D)).rsqrt()
    references = torch.ones(1001, 1, device=op.device)
    references[0] = 0
    x = torch.zeros(8, 1, device=op.device)
    results = op.module.posterior_mean(PosteriorMean(x, references, radius.to(op.device), D))
    torch.testing.assert_close(results[3].cpu(), 1 + 1000 * (-nats).exp(), rtol=1e-6, atol=0)


# ---- limits ----


@pytest.mark.parametrize("D", [1.0, slow(64.0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_on_references_at_radius_zero(op, device, sizes, D):
    B = sizes[0]
    _, references, _ = op.problem(*sizes)
    references[7] = references[0]
    radius = torch.zeros(B, dtype=torch.float64, device=device)
    mean, lse = op.compute(references[:B].clone(), references, radius, D)
    assert_same(mean, references[:B])
    assert lse.isposinf().all()


@pytest.mark.parametrize("radius", [1e-160, 1e-300])
def test_log_sum_exp_on_a_reference_where_the_square_of_the_radius_underflows(op, device, radius):
    x, references, _ = op.problem(20, 40, 33)
    x[:] = references[:20]
    radii = torch.full((20,), radius, dtype=torch.float64, device=device)
    _, logsumexp = op.compute(x, references, radii, 2.0)
    expected = torch.full_like(logsumexp, -35 * math.log(radius))
    torch.testing.assert_close(logsumexp, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("sizes", SIZES)
def test_diffusion_at_sigma_zero(op, device, sizes):
    B = sizes[0]
    _, references, _ = op.problem(*sizes)
    references[7] = references[0]
    x = references[:B].clone()
    x[1] += 1e-3
    sigma = torch.zeros(B, dtype=torch.float64, device=device)
    mean, lse = op.compute(x, references, sigma, math.inf)
    assert_same(mean, references[:B])
    assert lse[0].item() == pytest.approx(math.log(2))
    assert lse[1].isneginf()
    assert lse[2].item() == 0.0


@pytest.mark.parametrize("N", [40, slow(600)])
@pytest.mark.parametrize("D", [1.0, math.inf])
def test_one_reference_is_its_own_mean(op, N, D):
    x, references, sigma = op.problem(20, 1, N)
    mean, _ = op.compute(1e4 * x, references, sigma, D)
    assert_same(mean, references.expand(20, -1))


@pytest.mark.parametrize("N", [40, slow(600)])
def test_far_away_the_mean_is_that_of_all(op, device, N):
    x, references, _ = op.problem(20, 50, N)
    radius = torch.full((20,), 1e18, dtype=torch.float64, device=device)
    mean, lse = op.compute(x, references, radius, 1.0)
    torch.testing.assert_close(mean, references.mean(0).expand(20, -1), rtol=0, atol=1e-6)
    assert lse.isfinite().all()


def test_sigma_whose_square_is_zero_in_float32(op, device):
    _, references, _ = op.problem(3, 40, 33)
    sigma = torch.full((3,), 1e-23, dtype=torch.float64, device=device)
    mean, _ = op.compute(references[:3].clone(), references, sigma, math.inf)
    assert_same(mean, references[:3])


@pytest.mark.parametrize("sizes", SIZES)
def test_values_that_are_not_finite(op, sizes):
    bad = math.nan if sizes == SIZES[0] else math.inf
    x, references, sigma = op.problem(*sizes)
    with pfgm.debug_checks():
        spoiled = references.clone()
        spoiled[36, 5] = bad
        with pytest.raises(ValueError, match=r"references must be finite, got .*row 36"):
            op.compute(x, spoiled, sigma, 1.0)
        x[2, 32] = bad
        with pytest.raises(ValueError, match=r"x must be finite, got .*row 2"):
            op.compute(x, references, sigma, 1.0)
        with pytest.raises(ValueError, match=r"got -1\.0"):
            op.compute(x, references, torch.full_like(sigma, -1.0), 1.0)


def test_no_points(op, backend):
    x, references, sigma = op.problem(3, 5, 4)
    mean, *_ = torch.ops.pfgm.posterior_mean(x[:0], references, sigma[:0], 1.0, backend=backend)
    assert mean.shape == (0, 4)


@pytest.mark.parametrize(
    "scale", [1e-33, slow(1e-25), slow(2.0**-60), slow(2.0**60), slow(1e25), 1e38]
)
@pytest.mark.parametrize("sizes", [(4, 40, 33), *SIZES[1:]])
@pytest.mark.parametrize("D", [1.0, slow(math.inf)])
def test_very_small_and_very_large_values(op, sizes, scale, D):
    x, references, sigma = op.problem(*sizes)
    op.check(x * scale, references * scale, sigma * scale, D)


@pytest.mark.parametrize("dtype", [DTYPES[0], *map(slow, DTYPES[1:])])
@pytest.mark.parametrize("N", [33, slow(64), slow(513)])
def test_strides_and_alignment(op, device, N, dtype):
    x, references, sigma = op.problem(18, 70, N, dtype=dtype)
    expected = op.expected(x, references, sigma, 1.0)
    for offset, extra in ((0, 64), (7, 17), (1, 31)):
        wide = torch.full((70, N + extra + offset), 77, dtype=dtype, device=device)
        apart = wide[:, offset : offset + N].copy_(references)
        far = torch.full((18, N + 9), math.nan, device=device)[:, 4 : 4 + N].copy_(x)
        assert_accurate(op.compute(far, apart, sigma, 1.0), expected, references, 1e-5)
    for points in (x.T.contiguous().T, x[:1].expand(18, -1)):
        op.check(points, references, sigma, 1.0)


# ---- gradients ----


@pytest.mark.parametrize(("B", "D"), [(4, math.inf), (20, 64.0)])
@pytest.mark.parametrize(("nats", "tolerance"), [(13.0, 1e-5), (22.0, 1e-3)])
def test_gradients_beside_one_reference(op, B, D, nats, tolerance):
    """All other weights are e^-nats of one. So are the gradients, beside which G·y is huge."""
    generator, N = torch.Generator().manual_seed(1), 40
    near = 3 + torch.randn(1, N, generator=generator)
    away = torch.nn.functional.normalize(torch.randn(70, N, generator=generator))
    away[0] = 0
    apart = math.sqrt(2 * nats if math.isinf(D) else D * math.expm1(2 * nats / (N + D)))
    x = near + 1e-3 * torch.randn(B, N, generator=generator)
    radius = op.radius_of(torch.ones(B, dtype=torch.float64), D)
    tensors = [t.to(op.device) for t in (x, near + apart * away, radius)]
    problem = PosteriorMean(*tensors, D)
    mean, _, nearest, total = op.module.posterior_mean(problem)
    upstream = Upstream(op.upstream(*tensors[::2])[0], torch.zeros_like(nearest))
    state = State(mean, nearest, total)
    actual = op.module.posterior_mean_backward(problem, state, upstream, (True, True, True))
    given = (t.cpu() for t in upstream)
    expected = op.oracle_gradients(x, problem.references.cpu(), radius, D, *given)
    for gradient, wanted in zip(actual, expected, strict=True):
        assert_gradient(gradient, wanted, tolerance)


def test_only_the_gradients_that_are_needed(op):
    problem = op.problem(5, 17, 9)
    every = op.gradients(*problem, 1.0)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        some = op.gradients(*problem, 1.0, needs)
        for needed, one, other in zip(needs, some, every, strict=True):
            assert torch.equal(one, other) if needed else one is None


@pytest.mark.parametrize("sizes", [(5, 17, 9), (20, 40, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_narrow_references(op, sizes, dtype):
    x, references, sigma = op.problem(*sizes, dtype=dtype)
    _, actual, _ = op.gradients(x, references, sigma, 1.0)
    _, wanted, _ = op.expected_gradients(x, references.double(), sigma, 1.0)
    assert actual.dtype == dtype
    assert_gradient(actual, wanted, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("B", "scale"), [(3, 1e6), slow(17, 1e3), (17, 1e4), slow(17, 1e6)])
def test_gradients_beside_a_reference_far_from_the_others(op, B, scale):
    """Products in float16 cannot hold it."""
    x, references, sigma = op.problem(B, 40, 40)
    references[39] *= scale
    x[0] = references[39] * (1 + 1e-3)
    op.check_gradients(x, references, sigma.clamp(min=0.05), 1.0, tolerance=1e-4)


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_gradients_vanish_at_the_limits(op, device, D):
    _, references, _ = op.problem(3, 20, 9)
    x = references[:3].clone()
    radius = torch.zeros(3, dtype=torch.float64, device=device)
    problem, needs = PosteriorMean(x, references, radius, D), (True, True, True)
    mean, lse, nearest, total = op.module.posterior_mean(problem)
    state = State(mean, nearest, total)
    upstream = Upstream(torch.ones_like(x), torch.zeros_like(lse))
    grad_x, _, grad_radius = op.module.posterior_mean_backward(problem, state, upstream, needs)
    assert not grad_x.any()
    assert not grad_radius.any()
    upstream = Upstream(torch.ones_like(x), torch.ones_like(lse))
    with (
        pfgm.debug_checks(),
        pytest.raises(ValueError, match="in row 0 of x the gradient of the log-sum-exp"),
    ):
        op.module.posterior_mean_backward(problem, state, upstream, needs)


# ---- as torch sees it ----


@pytest.mark.parametrize("wanted", [(), slow((0, 1, 2))])
def test_opcheck(op, backend, wanted):
    arguments = op.problem(3, 5, 4)
    for index in wanted:
        arguments[index].requires_grad_()
    torch.library.opcheck(torch.ops.pfgm.posterior_mean, (*arguments, 1.0), {"backend": backend})


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sizes", [(5, 17, 9), slow((17, 20, 520))])
def test_field_fn_and_log_density_differentiate(op, backend, sizes):
    x, references, sigma = op.problem(*sizes)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        points = x.detach().to(dtype).requires_grad_()
        field_x, field_z = pfgm.field_fn(points, sigma, references, backend=name)
        density = pfgm.log_density(points, references, sigma=sigma, D=64.0, backend=name)
        loss = field_x.square().sum() + field_z.sum() + density.sum()
        results.append(torch.autograd.grad(loss, points)[0].double())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4 * results[1].abs().max().item())


@pytest.mark.usefixtures("way")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("sizes", [(5, 70, 33), (40, 150, 97), (40, 150, 520)])
def test_field_fn_in_a_cuda_graph(op, backend, sizes):
    x, references, z = op.problem(*sizes)
    expected = pfgm.field_fn(x, z, references, backend=backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pfgm.field_fn(x, z, references, backend=backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = pfgm.field_fn(x, z, references, backend=backend)
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    # Within a capture Triton's configurations are not measured, so that tiles may differ.
    atol = {"native": 0.0, "triton": 1e-6}[backend]
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=atol)
