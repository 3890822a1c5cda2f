"""The posterior mean and its gradients in CUDA against the oracle."""

from __future__ import annotations

import math

import pytest
import torch

import pfgm
from pfgm.backends import native, reference
from pfgm.backends.problems import PosteriorMean, State, Upstream

OP = torch.ops.pfgm.posterior_mean
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
KERNELS = ("refine", "weigh", "weighted_sum", "merge")
# At the edges of tiles (queries 8, 32, 64; references 32, 64; features 4, 32, 128), and where
# products take over from differences: 16 queries and 32 features.
SHAPES = [
    (1, 1, 1),
    (4, 16, 64),
    (8, 63, 4),
    (9, 65, 31),
    (15, 33, 257),
    (16, 64, 32),
    (17, 65, 33),
    (32, 31, 127),
    (33, 129, 20),
    (40, 150, 97),
    (64, 70, 128),
    (65, 130, 129),
]
# One pass: slices of 384 and 192 features, tiles of 16 references, 64 and 128 queries.
PASS_SHAPES = [
    (16, 16, 512),
    (17, 15, 515),
    (40, 300, 768),
    (64, 33, 769),
    (65, 70, 576),
    (128, 17, 577),
    (100, 40, 1100),
]


def problem(B, M, N, *, dtype=torch.float32, seed=0, device="cpu"):
    """Points between their own reference and another: some rows have one weight, some many."""
    generator = torch.Generator().manual_seed(seed)
    references = torch.rand(M, N, generator=generator) * 2 - 1
    if dtype == torch.uint8:
        references = ((references + 1) * 127.5).round()
    references = references.to(dtype)
    y = reference.dequantise(references, torch.float32)
    index, other = (torch.randint(0, M, (B,), generator=generator) for _ in range(2))
    fraction = 0.5 * torch.rand(B, 1, generator=generator)
    x = y[index] + fraction * (y[other] - y[index]) + 0.2 * torch.randn(B, N, generator=generator)
    levels = 10 ** (3 * torch.rand(B, generator=generator, dtype=torch.float64) - 2)
    return x.to(device), references.to(device), levels.to(device)


def radius_of(sigma, D):
    return sigma if math.isinf(D) else sigma * math.sqrt(D)


def compute(x, references, radius, D):
    return native.posterior_mean(PosteriorMean(x, references, radius, D))[:2]


def right(oracle, x, references, radius, D):
    return oracle(x.cpu(), references.cpu(), radius.cpu(), D)


def assert_accurate(result, expected, references, tolerance=1e-5):
    (mean, lse), (wanted_mean, wanted_lse) = result, expected
    largest = reference.dequantise(references.cpu(), torch.float64).norm(dim=1).max().item()
    assert (mean.double().cpu() - wanted_mean).norm(dim=1).max() <= tolerance * largest
    assert ((lse.cpu() - wanted_lse).abs() <= tolerance * wanted_lse.abs().clamp(min=1)).all()


def assert_same(mean, references):
    """A product of parts in TF32 may round the last bits off."""
    torch.testing.assert_close(mean, references, rtol=2.0**-21, atol=0.0)


def check(oracle, x, references, radius, D, tolerance=1e-5):
    result = compute(x, references, radius, D)
    assert_accurate(result, right(oracle, x, references, radius, D), references, tolerance)


# ---- forward ----


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_forward(oracle, device, sizes, dtype):
    for seed, D in enumerate((1.0, math.inf, 64.0)):
        x, references, sigma = problem(*sizes, dtype=dtype, seed=seed, device=device)
        check(oracle, x, references, radius_of(sigma, D), D)


@pytest.mark.parametrize("sizes", PASS_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_one_pass_and_two(oracle, device, shim, sizes, dtype):
    D = (1.0, math.inf, 64.0)[(sizes[0] + DTYPES.index(dtype)) % 3]
    x, references, sigma = problem(*sizes, dtype=dtype, device=device)
    one, two = {"single_pass", "merge_passes"}, {"distances", *KERNELS}
    for capability, kernels in ((90, one), (80, two)):
        shim.device(capability, multiprocessors=40)
        shim.launches()
        check(oracle, x, references, radius_of(sigma, D), D)
        assert set(shim.launches()) == kernels


def test_which_kernels_run(device, shim):
    def kernels(B, M, N):
        shim.launches()
        compute(*problem(B, M, N, device=device), 1.0)
        return shim.launches()

    two_passes = ["distances", *KERNELS]
    assert kernels(15, 40, 600) == ["differences", *KERNELS]
    assert kernels(16, 40, 31) == ["differences", *KERNELS]
    assert kernels(16, 40, 511) == two_passes
    assert kernels(16, 40, 512) == ["single_pass", "merge_passes"]
    assert kernels(129, 3, 512) == two_passes  # more than a tile of queries
    assert kernels(16, 2, 3073) == two_passes  # more than 8 slices of 384
    assert kernels(65, 1, 3073) == two_passes  # more than 16 slices of 192
    shim.device(89)
    assert kernels(16, 40, 512) == two_passes


def test_clusters_share_the_references_out(oracle, device, shim):
    x, references, sigma = problem(20, 700, 512, device=device)
    for multiprocessors in (2, 6, 40, 132):
        shim.device(90, multiprocessors)
        check(oracle, x, references, radius_of(sigma, 1.0), 1.0)


@pytest.mark.parametrize("D", [0.5, 1e6, math.inf])
def test_randomised_shapes(oracle, oracle_gradients, device, D):
    generator = torch.Generator().manual_seed(int(min(D, 7)))
    for trial in range(12):
        B, M, N = (int(torch.randint(1, n, (), generator=generator)) for n in (70, 200, 90))
        x, references, sigma = problem(B, M, N, dtype=DTYPES[trial % 4], seed=trial, device=device)
        check(oracle, x, references, radius_of(sigma, D), D)


# ---- the order of threads and blocks, parts and shapes change nothing but rounding ----


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("sizes", [(5, 70, 33), (20, 150, 97), (20, 70, 520)])
def test_the_order_of_threads_does_not_change_a_bit(device, shim, sizes, capability):
    shim.device(capability, multiprocessors=20)
    x, references, sigma = problem(*sizes, device=device)
    results = []
    for order in (0, 1, 2, 3):
        shim.order(order)
        results.append(everything(x, references, sigma, 1.0))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_twice_the_same_bits(device):
    x, references, sigma = problem(20, 90, 33, device=device)
    first, second = (everything(x, references, sigma, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def small(shim):
    """Chunks of 128 references, blocks of 17 queries, few parts."""
    shim.limits(pairs=600, parts=1, queries=17, references=128)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("N", [20, 40])
@pytest.mark.usefixtures("poisoned", "small")
def test_chunks_and_blocks(oracle, device, N, D):
    for dtype in DTYPES:
        x, references, sigma = problem(36, 300, N, dtype=dtype, device=device)
        check(oracle, x, references, radius_of(sigma, D), D)


@pytest.mark.usefixtures("small")
def test_the_nearest_may_come_first_or_last(oracle, device):
    x, references, _ = problem(3, 290, 8, device=device)
    radius = torch.full((3,), 1e-3, dtype=torch.float64, device=device)
    for order in (references, references.flip(0).contiguous()):
        check(oracle, x, order, radius, 1.0)


def test_more_references_than_a_chunk_can_have(oracle, device):
    x, references, sigma = problem(2, 66_000, 3, device=device)
    check(oracle, x, references, radius_of(sigma, 1.0), 1.0)


def test_workspace_is_bounded(device):
    for B, N, backward in ((1, 3072, False), (128, 3072, True), (5000, 20, True)):
        x = torch.empty(1, N, device=device).expand(B, N)
        radius = torch.empty(B, dtype=torch.float64, device=device)
        sizes = []
        for M in (1_000_000, 4_000_000):
            references = torch.empty(1, N, device=device).expand(M, N)
            place = native._place(x.device)
            given = native._problem(PosteriorMean(x, references, radius, 1.0))
            sizes.append(native.extension().posterior_mean_workspace_cuda(given, place, backward))
        assert sizes[0] == sizes[1] <= 100 << 20


# ---- what products cannot tell ----


def near_ties(B, M, N, offset, device):
    """Points between two references that are much nearer to each other than to the origin."""
    generator = torch.Generator().manual_seed(1)
    references = torch.randn(M, N, generator=generator).mul_(2**-6).add_(offset)
    pair = references[torch.randint(0, M, (2, B), generator=generator)]
    x = pair.mean(0) + 1e-3 * torch.randn(B, N, generator=generator)
    return x.to(device), references.to(device)


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("N", [64, 513])
def test_near_ties_far_from_the_origin(oracle, device, N, offset):
    x, references = near_ties(20, 70, N, offset, device)
    radius = torch.full((20,), 0.05, dtype=torch.float64, device=device)
    mean, _ = compute(x, references, radius, 1.0)
    expected, _ = right(oracle, x, references, radius, 1.0)
    # Relative to the spread; of the offset only what parts in TF32 leave away.
    error = (mean.double().cpu() - expected).norm(dim=1).max()
    assert error <= 1e-5 * 2**-6 * math.sqrt(N) + 2.0**-20 * offset * math.sqrt(N)


@pytest.fixture(scope="module")
def photographs():
    """32 × 32 crops of real photographs."""
    from sklearn.datasets import load_sample_images

    crops = []
    for image in load_sample_images().images:
        for top in range(0, 384, 48):
            for left in range(0, 608, 76):
                crops.append(torch.from_numpy(image[top : top + 32, left : left + 32].copy()))
    return torch.stack(crops).flatten(1)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("D", [1.0, 2048.0, math.inf])
def test_accuracy_contract_on_photographs(oracle, device, shim, photographs, D, capability):
    shim.device(capability, multiprocessors=16)
    generator = torch.Generator().manual_seed(0)
    as_float = reference.dequantise(photographs, torch.float32)
    for references in (photographs, as_float):
        sigma = torch.logspace(-3, 2, 18, dtype=torch.float64)
        pairs = (as_float[:18] + as_float[20:38]) / 2
        points = torch.where((torch.arange(18) % 3 == 0)[:, None], pairs, as_float[:18])
        x = points + sigma[:, None].float() * torch.randn(18, 3072, generator=generator)
        given = (x.to(device), references.to(device), radius_of(sigma, D).to(device))
        check(oracle, *given, D, tolerance=2e-5)


# ---- limits ----


@pytest.mark.parametrize("sizes", [(3, 40, 33), (20, 40, 33), (20, 40, 512)])
@pytest.mark.parametrize("D", [1.0, 64.0])
def test_on_references_at_radius_zero(device, sizes, D):
    B = sizes[0]
    _, references, _ = problem(*sizes, device=device)
    references[7] = references[0]
    radius = torch.zeros(B, dtype=torch.float64, device=device)
    mean, lse = compute(references[:B].clone(), references, radius, D)
    assert_same(mean, references[:B])
    assert lse.isposinf().all()


@pytest.mark.parametrize("sizes", [(3, 40, 33), (20, 40, 33), (20, 40, 512)])
def test_diffusion_at_sigma_zero(device, sizes):
    B = sizes[0]
    _, references, _ = problem(*sizes, device=device)
    references[7] = references[0]
    x = references[:B].clone()
    x[1] += 1e-3
    mean, lse = compute(x, references, torch.zeros(B, dtype=torch.float64, device=device), math.inf)
    assert_same(mean, references[:B])
    assert lse[0].item() == pytest.approx(math.log(2))
    assert lse[1].isneginf()
    assert lse[2].item() == 0.0


@pytest.mark.parametrize("N", [40, 600])
@pytest.mark.parametrize("D", [1.0, math.inf])
def test_one_reference_is_its_own_mean(device, N, D):
    x, references, sigma = problem(20, 1, N, device=device)
    mean, _ = compute(1e4 * x, references, sigma, D)
    assert_same(mean, references.expand(20, -1))


@pytest.mark.parametrize("N", [40, 600])
def test_far_away_the_mean_is_that_of_all(device, N):
    x, references, _ = problem(20, 50, N, device=device)
    radius = torch.full((20,), 1e18, dtype=torch.float64, device=device)
    mean, lse = compute(x, references, radius, 1.0)
    torch.testing.assert_close(mean, references.mean(0).expand(20, -1), rtol=0, atol=1e-6)
    assert lse.isfinite().all()


@pytest.mark.parametrize("scale", [1e-33, 1e-25, 2.0**-60, 2.0**60, 1e25, 1e38])
@pytest.mark.parametrize("sizes", [(4, 40, 33), (20, 40, 33), (20, 40, 512)])
@pytest.mark.parametrize("D", [1.0, math.inf])
def test_very_small_and_very_large_values(oracle, device, sizes, scale, D):
    x, references, sigma = problem(*sizes, device=device)
    x, references, sigma = x * scale, references * scale, sigma * scale
    mean, lse = compute(x, references, sigma, D)
    wanted_mean, wanted_lse = right(oracle, x, references, sigma, D)
    assert ((mean.double().cpu() - wanted_mean) / scale).norm(dim=1).max() <= 1e-4
    torch.testing.assert_close(lse.cpu(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_one_reference_out_of_range(oracle, device):
    for sizes in ((5, 70, 9), (20, 70, 40), (20, 70, 512)):
        x, references, sigma = problem(*sizes, device=device)
        references[69] = 1e30
        mean, _ = compute(x, references, sigma, 1.0)
        expected, _ = right(oracle, x, references, sigma, 1.0)
        assert (mean.double().cpu() - expected).norm(dim=1).max() <= 1e-4


def test_sigma_whose_square_is_zero_in_float32(device):
    _, references, _ = problem(3, 40, 33, device=device)
    sigma = torch.full((3,), 1e-23, dtype=torch.float64, device=device)
    mean, _ = compute(references[:3].clone(), references, sigma, math.inf)
    assert_same(mean, references[:3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sizes", [(3, 70, 33), (20, 70, 33), (20, 70, 512)])
def test_values_that_are_not_finite(device, sizes, bad):
    x, references, sigma = problem(*sizes, device=device)
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


@pytest.mark.parametrize("B", [1, 20])
def test_every_value_of_narrow_references_is_read_right(device, B):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[values.isfinite() & (values.float().abs() < 1e38)].to(device)
        x, radius = values.float().expand(B, -1), torch.ones(B, dtype=torch.float64, device=device)
        mean, _ = compute(x, values[None], radius, 1.0)
        assert torch.equal(mean, values.float().expand(B, -1))  # one reference is the mean
    values = torch.arange(256, device=device).to(torch.uint8)
    mean, _ = compute(values.float().expand(B, -1), values[None], radius, 1.0)
    assert (mean.double() - (values.double() / 127.5 - 1)).abs().max() <= 1.2e-7


def test_bytes_near_the_middle(oracle, device):
    """u/127.5 − 1 of 127 and 128 is a small difference of rounded numbers."""
    generator = torch.Generator().manual_seed(3)
    references = torch.randint(127, 129, (70, 33), generator=generator, dtype=torch.uint8)
    x = (0.01 * torch.randn(20, 33, generator=generator)).to(device)
    sigma = torch.full((20,), 0.02, dtype=torch.float64, device=device)
    check(oracle, x, references.to(device), sigma, 1.0)


# ---- layouts ----


@pytest.mark.parametrize("N", [33, 64, 513])
def test_strides_and_alignment(oracle, device, N):
    for dtype in DTYPES:
        x, references, sigma = problem(18, 70, N, dtype=dtype, device=device)
        expected = right(oracle, x, references, sigma, 1.0)
        for offset, extra in ((0, 64), (7, 17), (1, 31)):
            wide = torch.full((70, N + extra + offset), 77, dtype=dtype, device=device)
            apart = wide[:, offset : offset + N].copy_(references)
            far = torch.full((18, N + 9), math.nan, device=device)[:, 4 : 4 + N].copy_(x)
            assert_accurate(compute(far, apart, sigma, 1.0), expected, references)
        for points in (x.T.contiguous().T, x[:1].expand(18, -1)):
            check(oracle, points, references, sigma, 1.0)


def test_no_points(device):
    x, references, sigma = problem(3, 5, 4, device=device)
    mean, *_ = OP(x[:0], references, sigma[:0], 1.0, "native")
    assert mean.shape == (0, 4)


# ---- gradients ----


def upstream(x, radius):
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(x.shape, generator=generator).to(x.device)
    size = radius.cpu().square().clamp(max=1)
    return G, (size * torch.randn(len(x), generator=generator)).to(x.device)


def gradients(x, references, radius, D, needs=(True, True, True)):
    G, g = upstream(x, radius)
    given = PosteriorMean(x, references, radius, D)
    mean, _, nearest, total = native.posterior_mean(given)
    state = State(mean, nearest, total)
    return native.posterior_mean_backward(given, state, Upstream(G, g), needs)


def everything(x, references, radius, D):
    given = PosteriorMean(x, references, radius, D)
    return (*native.posterior_mean(given), *gradients(x, references, radius, D))


def assert_gradient(actual, expected, tolerance=1e-5):
    """Relative to the row, or to the typical row where large terms cancel in it."""
    actual, expected = (t.double().reshape(len(t), -1) for t in (actual.cpu(), expected))
    rows = expected.norm(dim=1)
    typical = expected.norm() / len(rows) ** 0.5
    assert ((actual - expected).norm(dim=1) <= tolerance * rows.clamp(min=typical)).all()


def check_gradients(oracle_gradients, x, references, radius, D):
    G, g = upstream(x, radius)
    given = (t.cpu() for t in (x, references, radius))
    expected = oracle_gradients(*given, D, G.cpu(), g.cpu())
    narrow = references.dtype != torch.float32
    for actual, wanted in zip(gradients(x, references, radius, D), expected, strict=True):
        if not (narrow and actual.shape == references.shape):
            assert_gradient(actual, wanted)


@pytest.mark.parametrize("sizes", [*SHAPES, (20, 40, 600)])
@pytest.mark.parametrize("D", [1.0, 64.0, math.inf])
@pytest.mark.usefixtures("poisoned")
def test_gradients(oracle_gradients, device, sizes, D):
    x, references, sigma = problem(*sizes, device=device)
    # The backward pass is given the mean rounded to float32, which shows beside a small sigma.
    check_gradients(oracle_gradients, x, references, radius_of(sigma.clamp(min=0.05), D), D)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("N", [20, 40])
@pytest.mark.usefixtures("poisoned", "small")
def test_gradients_of_chunks_and_blocks(oracle_gradients, device, N, D):
    x, references, sigma = problem(36, 300, N, device=device)
    check_gradients(oracle_gradients, x, references, radius_of(sigma.clamp(min=0.05), D), D)


def test_gradients_of_many_queries(oracle_gradients, device):
    """More than one list of them holds."""
    x, references, sigma = problem(2100, 5, 3, device=device)
    check_gradients(oracle_gradients, x, references, sigma.clamp(min=0.05), 1.0)


def test_only_the_gradients_that_are_needed(device):
    x, references, sigma = problem(5, 17, 9, device=device)
    every = gradients(x, references, sigma, 1.0)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        some = gradients(x, references, sigma, 1.0, needs)
        for needed, one, other in zip(needs, some, every, strict=True):
            assert torch.equal(one, other) if needed else one is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_narrow_references(oracle_gradients, device, dtype):
    x, references, sigma = problem(20, 40, 40, dtype=dtype, device=device)
    G, g = upstream(x, sigma)
    _, actual, _ = gradients(x, references, sigma, 1.0)
    given = (x.cpu(), references.cpu().double(), sigma.cpu())
    _, wanted, _ = oracle_gradients(*given, 1.0, G.cpu(), g.cpu())
    assert actual.dtype == dtype
    assert_gradient(actual, wanted, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_gradients_vanish_at_the_limits(device, D):
    _, references, _ = problem(3, 20, 9, device=device)
    x = references[:3].clone()
    radius = torch.zeros(3, dtype=torch.float64, device=device)
    given = PosteriorMean(x, references, radius, D)
    mean, lse, nearest, total = native.posterior_mean(given)
    state, needs = State(mean, nearest, total), (True, True, True)
    upstream = Upstream(torch.ones_like(x), torch.zeros_like(lse))
    grad_x, _, grad_radius = native.posterior_mean_backward(given, state, upstream, needs)
    assert not grad_x.any()
    assert not grad_radius.any()
    upstream = Upstream(torch.ones_like(x), torch.ones_like(lse))
    with pfgm.debug_checks(), pytest.raises(ValueError, match="row 0 of x is infinite"):
        native.posterior_mean_backward(given, state, upstream, needs)


# ---- as torch sees it ----


@pytest.mark.parametrize("wanted", [(), (0, 1, 2)])
def test_opcheck(device, wanted):
    arguments = list(problem(3, 5, 4, device=device))
    for index in wanted:
        arguments[index].requires_grad_()
    torch.library.opcheck(OP, (*arguments, 1.0, "native"))


def test_field_fn_and_log_density_differentiate(device):
    x, references, sigma = problem(20, 40, 520, device=device)
    results = []
    for name, dtype in (("native", torch.float32), ("reference", torch.float64)):
        points = x.detach().to(dtype).requires_grad_()
        field_x, field_z = pfgm.field_fn(points, sigma, references, backend=name)
        density = pfgm.log_density(points, references, sigma=sigma, D=64.0, backend=name)
        loss = field_x.square().sum() + field_z.sum() + density.sum()
        results.append(torch.autograd.grad(loss, points)[0].double())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4 * results[1].abs().max().item())


def test_field_fn_in_a_compiled_function(device):
    x, references, sigma = problem(5, 17, 9, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def target(x, z):
        field_x, field_z = pfgm.field_fn(x, z, references, backend="native")
        return field_x * 2, field_z

    expected_x, expected_z = pfgm.field_fn(x.double(), sigma, references, backend="reference")
    field_x, field_z = target(x, sigma)
    torch.testing.assert_close(field_x.double(), 2 * expected_x, rtol=0, atol=1e-5)
    torch.testing.assert_close(field_z.double(), expected_z, rtol=0, atol=1e-5)


def test_what_it_does_not_compute_is_said(device):
    x, references, sigma = problem(3, 5, 4, device=device)
    for given, message in (
        ((x.double(), references), "computes in float32 on a GPU, not torch.float64"),
        ((x, references.double()), "reads references in torch.float32, .* not torch.float64"),
    ):
        with pytest.raises(pfgm.backends.Unavailable, match=message):
            OP(*given, sigma, 1.0, "native")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("sizes", [(5, 70, 33), (40, 150, 97), (40, 150, 520)])
def test_field_fn_in_a_cuda_graph(device, sizes):
    x, references, z = problem(*sizes, device=device)
    expected = pfgm.field_fn(x, z, references, backend="native")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pfgm.field_fn(x, z, references, backend="native")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = pfgm.field_fn(x, z, references, backend="native")
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(oracle):
    x, references, sigma = problem(20, 70, 33, device="cuda:1")
    check(oracle, x, references, sigma, 1.0)
    assert torch.cuda.current_device() == 0
