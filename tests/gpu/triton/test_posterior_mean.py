"""The posterior mean and its gradients in Triton against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from pfgm.kernels import distances, posterior_mean, posterior_mean_backward

import pfgm
from pfgm.backends import reference, triton
from pfgm.backends.problems import PosteriorMean, State, Upstream

OP = torch.ops.pfgm.posterior_mean
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
# At the edges of tiles (queries 4, 16, 32; references 16, 64, padding 16; features 16, 32, 64), and
# where products take over from differences: 16 queries and 32 features.
SHAPES = [
    (1, 1, 1),
    (4, 16, 64),
    (5, 17, 65),
    (15, 33, 31),
    (16, 64, 32),
    (17, 65, 33),
    (33, 129, 20),
    (40, 150, 97),
]


def problem(B, M, N, *, dtype=torch.float32, sigma=0.4, seed=0, device="cpu"):
    """Points around references, at noise levels a decade to each side of sigma."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        references = torch.randint(0, 256, (M, N), generator=generator, dtype=dtype)
    else:
        references = torch.randn(M, N, generator=generator).to(dtype)
    levels = sigma * torch.logspace(-1, 1, B, dtype=torch.float64)
    clean = reference.dequantise(references, torch.float32)[torch.arange(B) % M]
    x = clean + levels[:, None].float() * torch.randn(B, N, generator=generator)
    return x.to(device), references.to(device), levels.to(device)


def radius_of(sigma, D):
    return sigma if math.isinf(D) else sigma * math.sqrt(D)


def compute(x, references, radius, D, precision="high"):
    return triton.posterior_mean(PosteriorMean(x, references, radius, D, precision))[:2]


def assert_accurate(result, expected, references, tolerance=1e-5):
    (mean, lse), (wanted_mean, wanted_lse) = result, expected
    largest = reference.dequantise(references, torch.float64).norm(dim=1).max().item()
    assert (mean.double().cpu() - wanted_mean).norm(dim=1).max() <= tolerance * largest
    assert ((lse.cpu() - wanted_lse).abs() <= tolerance * wanted_lse.abs().clamp(min=1)).all()


def assert_same(mean, references):
    """A product in three of TF32 may round the last bit off."""
    torch.testing.assert_close(mean, references, rtol=2.0**-21, atol=0.0)


# ---- forward ----


@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_forward(oracle, device, index, dtype):
    D = (1.0, math.inf, 64.0)[(index + DTYPES.index(dtype)) % 3]
    x, references, sigma = problem(*SHAPES[index], dtype=dtype, seed=index, device=device)
    radius = radius_of(sigma, D)
    expected = oracle(x.cpu(), references.cpu(), radius.cpu(), D)
    assert_accurate(compute(x, references, radius, D), expected, references.cpu())


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_medium_precision(oracle, device, D):
    x, references, sigma = problem(17, 65, 64, device=device)
    result = compute(x, references, radius_of(sigma, D), D, "medium")
    expected = oracle(x.cpu(), references.cpu(), radius_of(sigma, D).cpu(), D)
    assert_accurate(result, expected, references.cpu(), tolerance=3e-3)


def test_an_unknown_precision_raises(device):
    x, references, sigma = problem(3, 5, 4, device=device)
    with pytest.raises(ValueError, match="precision is 'low'; allowed are high, medium"):
        pfgm.posterior_mean(x, references, sigma=sigma, precision="low")


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("B", [3, 20])
def test_many_features(oracle, device, B, D):
    """More than a panel of each kernel, and more than one block of ``merge``."""
    x, references, sigma = problem(B, 20, 1100, device=device)
    radius = radius_of(sigma, D)
    expected = oracle(x.cpu(), references.cpu(), radius.cpu(), D)
    assert_accurate(compute(x, references, radius, D), expected, references.cpu())


# ---- what chunks, blocks and the order of queries change: nothing but rounding ----


@pytest.fixture
def small(monkeypatch):
    """Chunks of 128 references, blocks of 17 queries, more than one stretch."""
    monkeypatch.setattr(distances, "PAIRS", 600)
    monkeypatch.setattr(distances, "ROWS", 17)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.usefixtures("poisoned", "small")
def test_chunks_and_blocks(oracle, device, D):
    x, references, sigma = problem(36, 300, 40, device=device)
    radius = radius_of(sigma, D)
    expected = oracle(x.cpu(), references.cpu(), radius.cpu(), D)
    assert_accurate(compute(x, references, radius, D), expected, references.cpu())


@pytest.mark.usefixtures("small")
def test_the_nearest_may_come_first_or_last(oracle, device):
    x, references, _ = problem(3, 290, 8, device=device)
    radius = torch.full((3,), 1e-3, dtype=torch.float64, device=device)
    for order in (references, references.flip(0).contiguous()):
        expected = oracle(x.cpu(), order.cpu(), radius.cpu(), 1.0)
        assert_accurate(compute(x, order, radius, 1.0), expected, references.cpu())


def test_stretches_are_used_and_merged(device):
    x, references, sigma = problem(5, 600, 7, device=device)
    pairs = distances.Pairs(distances.Problem(x, references, sigma, 1.0, "high"), slice(0, 5))
    assert posterior_mean.stretches_of(pairs, 600) > 1


def test_the_order_of_queries_does_not_change_a_bit(device, monkeypatch):
    x, references, sigma = problem(40, 90, 33, device=device)
    plain = compute(x, references, sigma, 1.0)
    monkeypatch.setattr(posterior_mean, "SORTED", 1)
    for a, b in zip(compute(x, references, sigma, 1.0), plain, strict=True):
        assert torch.equal(a, b)


def test_twice_the_same_bits(device):
    x, references, sigma = problem(20, 90, 33, device=device)
    first, second = (compute(x, references, sigma, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("B", [1, 128, 100_000])
@pytest.mark.parametrize("N", [1, 3072, 200_000])
def test_workspace_and_launches_are_bounded(B, N):
    few, many = (
        distances.Problem(
            torch.empty(B, N, device="meta"),
            torch.empty(M, N, device="meta"),
            torch.empty(B, device="meta"),
            1.0,
            "high",
        )
        for M in (100_000, 10_000_000)
    )
    assert few.chunk == many.chunk
    assert few.block * few.chunk <= 1.1 * distances.PAIRS
    assert few.block * N <= max(distances.PARTS, 16 * N)
    # Blocks of the second and third dimension of a launch are at most 65535.
    smallest = min(c["TILE"] for c in distances.distance_configs(few.shape(few.block)))
    assert few.chunk / smallest <= 65535


# ---- what products cannot tell ----


def near_ties(B, M, N, offset, device):
    """Points between two references that are much nearer to each other than to the origin."""
    generator = torch.Generator().manual_seed(1)
    references = torch.randn(M, N, generator=generator).mul_(2**-6).add_(offset)
    pair = references[torch.randint(0, M, (2, B), generator=generator)]
    x = pair.mean(0) + 1e-3 * torch.randn(B, N, generator=generator)
    return x.to(device), references.to(device)


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_near_ties_far_from_the_origin(oracle, device, offset):
    x, references = near_ties(20, 70, 64, offset, device)
    radius = torch.full((20,), 0.05, dtype=torch.float64, device=device)
    expected = oracle(x.cpu(), references.cpu(), radius.cpu(), 1.0)
    result = compute(x, references, radius, 1.0)
    # Relative to the spread, not to the offset.
    error = (result[0].double().cpu() - expected[0]).norm(dim=1).max()
    spread = 2**-6 * 8
    assert error <= 1e-5 * spread + 4e-7 * offset * 8


def test_without_refinement_they_would_be_wrong(oracle, device, monkeypatch):
    x, references = near_ties(20, 70, 64, 1.0, device)
    radius = torch.full((20,), 0.05, dtype=torch.float64, device=device)
    expected = oracle(x.cpu(), references.cpu(), radius.cpu(), 1.0)
    monkeypatch.setattr(distances.Pairs, "_refine", lambda *_: None)
    mean, _ = compute(x, references, radius, 1.0)
    assert (mean.double().cpu() - expected[0]).norm(dim=1).max() > 1e-3 * 2**-6 * 8


@pytest.fixture
def many(monkeypatch):
    """As with more tiles near the minimum than are computed again in any case."""
    monkeypatch.setattr(distances, "FEW", 0)


@pytest.mark.usefixtures("many")
def test_many_that_compete_are_refined_where_they_are_ill_conditioned(oracle, device):
    test_near_ties_far_from_the_origin(oracle, device, 1.0)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.usefixtures("many")
def test_many_that_compete_are_left_as_they_are_elsewhere(oracle, device, monkeypatch, D):
    x, references, _ = problem(20, 70, 64, device=device)
    x, sigma = 30 * x, torch.full((20,), 30.0, dtype=torch.float64, device=device)
    expected = oracle(x.cpu(), references.cpu(), sigma.cpu(), D)
    result = compute(x, references, sigma, D)
    assert_accurate(result, expected, references.cpu())
    monkeypatch.setattr(distances.Pairs, "_refine", lambda *_: None)
    for refined, plain in zip(result, compute(x, references, sigma, D), strict=True):
        assert torch.equal(refined, plain)


# ---- limits ----


@pytest.mark.parametrize("B", [3, 20])
@pytest.mark.parametrize("D", [1.0, 64.0])
def test_on_references_at_radius_zero(device, B, D):
    _, references, _ = problem(B, 40, 33, device=device)
    references[7] = references[0]
    mean, lse = compute(
        references[:B].clone(), references, torch.zeros(B, dtype=torch.float64, device=device), D
    )
    assert_same(mean, references[:B])
    assert lse.isposinf().all()


@pytest.mark.parametrize("B", [3, 20])
def test_diffusion_at_sigma_zero(device, B):
    _, references, _ = problem(B, 40, 33, device=device)
    references[7] = references[0]
    x = references[:B].clone()
    x[1] += 1e-3
    mean, lse = compute(x, references, torch.zeros(B, dtype=torch.float64, device=device), math.inf)
    assert_same(mean, references[:B])
    assert lse[0].item() == pytest.approx(math.log(2))
    assert lse[1].isneginf()
    assert lse[2].item() == 0.0


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_one_reference_is_its_own_mean(device, D):
    x, references, sigma = problem(20, 1, 40, device=device)
    mean, _ = compute(1e4 * x, references, sigma, D)
    assert_same(mean, references.expand(20, -1))


def test_far_away_the_mean_is_that_of_all(device):
    x, references, _ = problem(20, 50, 40, device=device)
    radius = torch.full((20,), 1e18, dtype=torch.float64, device=device)
    mean, lse = compute(x, references, radius, 1.0)
    assert torch.allclose(mean, references.mean(0).expand(20, -1), atol=1e-6)
    assert lse.isfinite().all()


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60, 2.0**100])
@pytest.mark.parametrize("B", [4, 20])
def test_very_small_and_very_large_values(oracle, device, B, scale):
    x, references, sigma = problem(B, 40, 33, device=device)
    x, references, sigma = x * scale, references * scale, sigma * scale
    expected = oracle(x.cpu(), references.cpu(), sigma.cpu(), 1.0)
    assert_accurate(compute(x, references, sigma, 1.0), expected, references.cpu())


def test_sigma_whose_square_is_zero_in_float32(device):
    x, references, _ = problem(3, 40, 33, sigma=1e-2, device=device)
    sigma = torch.full((3,), 1e-23, dtype=torch.float64, device=device)
    mean, _ = compute(x, references, sigma, math.inf)
    assert_same(mean, references[:3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("B", [3, 20])
def test_values_that_are_not_finite(device, B, bad):
    x, references, sigma = problem(B, 70, 33, device=device)
    with pfgm.debug_checks():
        spoiled = references.clone()
        spoiled[66, 5] = bad
        with pytest.raises(ValueError, match=r"references holds NaN or infinity .*row 66"):
            compute(x, spoiled, sigma, 1.0)
        x[2, 32] = bad
        with pytest.raises(ValueError, match=r"x holds NaN or infinity .*row 2"):
            compute(x, references, sigma, 1.0)
        with pytest.raises(ValueError, match="is -1"):
            compute(x, references, torch.full_like(sigma, -1.0), 1.0)


# ---- layouts ----


def test_strides(oracle, device):
    x, references, sigma = problem(18, 70, 33, device=device)
    wide = torch.zeros(70, 50, device=device)[:, 7:40].copy_(references)
    transposed = x.T.contiguous().T
    expanded = x[:1].expand(18, -1)
    for points in (transposed, expanded):
        expected = oracle(points.cpu(), references.cpu(), sigma.cpu(), 1.0)
        assert_accurate(compute(points, wide, sigma, 1.0), expected, references.cpu())


def test_no_points(device):
    x, references, sigma = problem(3, 5, 4, device=device)
    mean, *_ = OP(x[:0], references, sigma[:0], 1.0, "triton")
    assert mean.shape == (0, 4)


# ---- gradients ----


def gradients(x, references, radius, D, needs=(True, True, True)):
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(x.shape, generator=generator).to(x.device)
    g = (radius.cpu().square().clamp(max=1) * torch.randn(len(x), generator=generator)).to(x.device)
    given = PosteriorMean(x, references, radius, D)
    mean, _, nearest, total = triton.posterior_mean(given)
    state = State(mean, nearest, total)
    result = triton.posterior_mean_backward(given, state, Upstream(G, g), needs)
    return result, G.cpu(), g.cpu()


def assert_gradient(actual, expected, tolerance):
    """Relative to the row, or to the typical row where large terms cancel in it."""
    actual, expected = (t.double().reshape(len(t), -1) for t in (actual.cpu(), expected))
    rows = expected.norm(dim=1)
    typical = expected.norm() / len(rows) ** 0.5
    assert ((actual - expected).norm(dim=1) <= tolerance * rows.clamp(min=typical)).all()


@pytest.mark.parametrize("sizes", [(1, 3, 2), (5, 17, 65), (17, 65, 33), (34, 70, 64)])
@pytest.mark.parametrize("D", [1.0, 64.0, math.inf])
@pytest.mark.usefixtures("poisoned")
def test_gradients(oracle_gradients, device, sizes, D):
    x, references, sigma = problem(*sizes, device=device)
    radius = radius_of(sigma, D)
    result, G, g = gradients(x, references, radius, D)
    expected = oracle_gradients(x.cpu(), references.cpu(), radius.cpu(), D, G, g)
    for actual, wanted in zip(result, expected, strict=True):
        assert_gradient(actual, wanted, 2e-5)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.usefixtures("poisoned", "small")
def test_gradients_of_chunks_and_blocks(oracle_gradients, device, D):
    x, references, sigma = problem(20, 150, 33, device=device)
    radius = radius_of(sigma, D)
    result, G, g = gradients(x, references, radius, D)
    expected = oracle_gradients(x.cpu(), references.cpu(), radius.cpu(), D, G, g)
    for actual, wanted in zip(result, expected, strict=True):
        assert_gradient(actual, wanted, 2e-5)


def test_only_the_gradients_that_are_needed(device):
    x, references, sigma = problem(5, 17, 9, device=device)
    every, *_ = gradients(x, references, sigma, 1.0)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        some, *_ = gradients(x, references, sigma, 1.0, needs)
        for needed, one, other in zip(needs, some, every, strict=True):
            assert torch.equal(one, other) if needed else one is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_narrow_references(oracle_gradients, device, dtype):
    x, references, sigma = problem(5, 17, 9, dtype=dtype, device=device)
    (_, actual, _), G, g = gradients(x, references, sigma, 1.0)
    wanted = oracle_gradients(x.cpu(), references.cpu().double(), sigma.cpu(), 1.0, G, g)[1]
    assert actual.dtype == dtype
    assert_gradient(actual, wanted, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_gradients_vanish_at_the_limits(device, D):
    _, references, _ = problem(3, 20, 9, device=device)
    x = references[:3].clone()
    radius = torch.zeros(3, dtype=torch.float64, device=device)
    given = PosteriorMean(x, references, radius, D)
    mean, lse, nearest, total = triton.posterior_mean(given)
    state, needs = State(mean, nearest, total), (True, False, True)
    upstream = Upstream(torch.ones_like(x), torch.zeros_like(lse))
    grad_x, _, grad_radius = triton.posterior_mean_backward(given, state, upstream, needs)
    assert not grad_x.any()
    assert not grad_radius.any()
    upstream = Upstream(torch.ones_like(x), torch.ones_like(lse))
    with pfgm.debug_checks(), pytest.raises(ValueError, match="row 0 of x is infinite"):
        triton.posterior_mean_backward(given, state, upstream, needs)


def test_decided_points_have_no_noise_in_their_gradient(device):
    x, references, _ = problem(20, 40, 64, device=device)
    sigma = torch.full((20,), 1e-3, dtype=torch.float64, device=device)
    (grad_x, _, _), _, _ = gradients(x, references, sigma, math.inf)
    # The weights of all others are below e^-1000: what is left is the score's part g (x − mean)/σ².
    mean, *_ = triton.posterior_mean(PosteriorMean(x, references, sigma, math.inf))
    _, _, g = gradients(x, references, sigma, math.inf)
    wanted = -(g.to(device) / sigma**2)[:, None] * (x.double() - mean)
    assert torch.allclose(grad_x.double(), wanted, rtol=1e-5, atol=1e-6)


# ---- as torch sees it ----


@pytest.mark.parametrize("wanted", [(), (0, 1, 2)])
def test_opcheck(device, wanted):
    arguments = list(problem(3, 5, 4, device=device))
    for index in wanted:
        arguments[index].requires_grad_()
    torch.library.opcheck(OP, (*arguments, 1.0, "triton"))


def test_field_fn_and_log_density_differentiate(device):
    x, references, sigma = problem(5, 17, 9, device=device)
    results = []
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        points = x.detach().to(dtype).requires_grad_()
        field_x, field_z = pfgm.field_fn(points, sigma, references, backend=name)
        density = pfgm.log_density(points, references, sigma=sigma, D=64.0, backend=name)
        loss = field_x.square().sum() + field_z.sum() + density.sum()
        results.append(torch.autograd.grad(loss, points)[0].double())
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4 * results[1].abs().max().item())


def test_a_second_derivative_raises(device):
    x, references, sigma = problem(3, 5, 4, device=device)
    mean = pfgm.posterior_mean(x.requires_grad_(), references, sigma=sigma, backend="triton")
    (grad,) = torch.autograd.grad(mean.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


def test_field_fn_in_a_compiled_function(device):
    x, references, sigma = problem(5, 17, 9, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def target(x, z):
        field_x, field_z = pfgm.field_fn(x, z, references, backend="triton")
        return field_x * 2, field_z

    expected_x, expected_z = pfgm.field_fn(x.double(), sigma, references, backend="reference")
    field_x, field_z = target(x, sigma)
    assert torch.allclose(field_x.double(), 2 * expected_x, atol=1e-5)
    assert torch.allclose(field_z.double(), expected_z, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_field_fn_in_a_cuda_graph(device):
    x, references, z = problem(40, 150, 97, device=device)
    expected = pfgm.field_fn(x, z, references, backend="triton")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pfgm.field_fn(x, z, references, backend="triton")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = pfgm.field_fn(x, z, references, backend="triton")
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.allclose(result, wanted, atol=1e-6)


def test_bytes_near_the_middle(oracle, device):
    """u/127.5 − 1 of 127 and 128 is a small difference of rounded numbers."""
    generator = torch.Generator().manual_seed(3)
    references = torch.randint(127, 129, (70, 33), generator=generator, dtype=torch.uint8)
    x = 0.01 * torch.randn(20, 33, generator=generator)
    sigma = torch.full((20,), 0.02, dtype=torch.float64)
    expected = oracle(x, references, sigma, 1.0)
    result = compute(x.to(device), references.to(device), sigma.to(device), 1.0)
    assert_accurate(result, expected, references, tolerance=1e-6)


def test_other_types_are_refused_with_the_reason(device):
    x, references, sigma = problem(3, 5, 4, device=device)
    with pytest.raises(RuntimeError, match=r"computes in float32, not torch\.float64"):
        pfgm.posterior_mean(x.double(), references, sigma=sigma, backend="triton")
    with pytest.raises(RuntimeError, match=r"references in .*, not torch\.float64"):
        pfgm.posterior_mean(x, references.double(), sigma=sigma, backend="triton")


def test_every_kernel_lists_its_variants():
    for module in (distances, posterior_mean, posterior_mean_backward):
        names = [variant.name for variant in module.variants()]
        assert len(names) == len(set(names)) > 5
