"""The posterior mean and its gradients in CUDA: tiles, and the order of threads."""

import math

import pytest
import torch

from pfgm.backends import native
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean, State, Upstream
from tests.backends.accuracy import assert_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
CENTERING = ("find_center", "split_rows")
AFTER = ("find_limits", "refine", "weigh", "list_references", "weighted_sum", "merge")


def test_which_kernels_run(op, executor):
    def kernels(B, M, N):
        executor.names()
        op.compute(*op.problem(B, M, N), 1.0)
        return executor.names()

    in_order = [*AFTER[:3], "order_queries", *AFTER[3:]]
    assert kernels(15, 40, 600) == ["differences", *AFTER]
    assert kernels(16, 40, 31) == ["differences", *AFTER]
    assert kernels(16, 40, 32) == [*CENTERING, "distances", *AFTER]
    assert kernels(33, 40, 31) == ["differences", *in_order]
    assert kernels(33, 40, 64) == [*CENTERING, "distances", *in_order]


@pytest.mark.parametrize("D", [0.5, 1e6, math.inf])
def test_randomised_shapes(op, D):
    generator = torch.Generator().manual_seed(int(min(D, 7)))
    for trial in range(12):
        B, M, N = (int(torch.randint(1, n, (), generator=generator)) for n in (70, 200, 90))
        x, references, sigma = op.problem(B, M, N, dtype=DTYPES[trial % 4], seed=trial)
        op.check(x, references, op.radius_of(sigma, D), D)


@pytest.mark.slow
@pytest.mark.parametrize("B", [70, 256, 300])
@pytest.mark.parametrize("N", [20, 40, 66])
@pytest.mark.usefixtures("poisoned")
def test_sorted_queries_in_chunks(op, executor, limits, B, N):
    """Radii differ much, so that groups of queries list very different numbers of references."""
    limits(references=256)
    x, references, sigma = op.problem(B, 600, N)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    sigma = torch.logspace(-3, 1, B, dtype=sigma.dtype)[order]
    executor.names()
    op.check(x, references, op.radius_of(sigma, 1.0), 1.0)
    assert "order_queries" in executor.names()


@pytest.mark.usefixtures("poisoned")
def test_parts_of_lists(op, executor, limits):
    """Lists of more panels than a part has, and of none."""
    x, references, sigma = op.problem(64, 2048, 40)
    x[32:] = references[0]  # they need one reference of the first chunk
    sigma[32:] = 1e-5
    for multiprocessors, parts, chunk in ((1, 1 << 23, 2048), (1000, 1 << 23, 256), (1, 1, 2048)):
        executor.device(90, multiprocessors)
        limits(parts=parts, queries=64, references=chunk)
        op.check(x, references, op.radius_of(sigma, 1.0), 1.0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("halved", [pytest.param(0, marks=pytest.mark.slow), 1 << 20])
@pytest.mark.parametrize("sizes", [(31, 65, 33), (33, 31, 40), (70, 333, 40), (97, 1000, 36)])
def test_gathered_weights(op, executor, limits, sizes, halved):
    """Weights in halves and in float32, of groups and panels that are not full. All but the first
    32 queries need one reference, so that their lists are empty in later chunks."""
    B, M, N = sizes
    x, references, sigma = op.problem(B, M, N)
    x[32:] = references[0]
    sigma[32:] = 1e-5
    radius = op.radius_of(sigma, 1.0)
    for multiprocessors, chunk in ((1, M), (1000, M), (40, 128)):
        executor.device(90, multiprocessors)
        limits(references=chunk, halved=halved)
        op.check(x, references, radius, 1.0)


@pytest.mark.usefixtures("poisoned")
def test_gathered_coefficients(op, executor, limits):
    """Those of the gradient, over several chunks and groups that are not full."""
    x, references, sigma = op.problem(70, 333, 40)
    for multiprocessors, chunk in ((1, 333), (40, 128)):
        executor.device(90, multiprocessors)
        limits(references=chunk)
        op.check_gradients(x, references, op.radius_of(sigma, 1.0), 1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_blocks_that_share_a_list(op, executor):
    """There are more of them if there are more multiprocessors, at most one for each of the 193
    panels of both groups, and enough that none has more than 192."""
    x, references, sigma = op.problem(40, 6176, 64)
    for multiprocessors, blocks in ((1, 6), (20, 40), (1000, 386)):
        executor.device(90, multiprocessors)
        executor.launches()
        op.check(x, references, op.radius_of(sigma, 1.0), 1.0)
        (grid,) = (one[1] for one in executor.launches() if one[0] == "list_references")
        assert tuple(grid) == (blocks, 1, 1)


@pytest.mark.slow
def test_more_references_than_a_chunk_can_have(op):
    x, references, sigma = op.problem(2, 66_000, 3)
    op.check(x, references, op.radius_of(sigma, 1.0), 1.0)


def workspace_of(device, B, M, N, backward):
    """Bytes."""
    x, references = (torch.empty(1, N, device=device).expand(rows, N) for rows in (B, M))
    radius = torch.empty(B, dtype=torch.float64, device=device)
    problem = native.native_problem(PosteriorMean(x, references, radius, 1.0))
    stream = native._cuda_stream(x.device)
    return native.extension().posterior_mean_workspace_cuda(problem, stream, backward)


MOST = {False: 270 << 20, True: 480 << 20}  # of a forward and a backward pass


@pytest.mark.parametrize("backward", MOST)
def test_workspace_is_bounded(device, backward):
    for B, N in ((1, 3072), (128, 3072), (1400, 3072), (5000, 20), (32, 100_000), (7903, 1056)):
        sizes = {workspace_of(device, B, M, N, backward) for M in (1_000_000, 4_000_000)}
        assert len(sizes) == 1
        assert max(sizes) <= MOST[backward]


@pytest.mark.parametrize("backward", MOST)
@pytest.mark.parametrize("multiprocessors", [108, 132, 170])
def test_workspace_of_slices_is_bounded(executor, device, multiprocessors, backward):
    """Slices take the memory of weighted sums, which is at most 48 MiB."""
    executor.device(90, multiprocessors)
    for sizes in (
        (16, 4096, 3072), (128, 4096, 3072), (128, 9000, 3072), (512, 4096, 3072),
        (700, 2048, 3072), (16, 60_000, 40_000), (32, 70_000, 3072),
    ):  # fmt: skip
        assert workspace_of(device, *sizes, backward) <= MOST[backward]


def test_huge_numbers_of_dimensions(op):
    """The exponent may be larger than float32 holds. The limit is D = ∞."""
    x, references, sigma = op.problem(40, 300, 3, seed=3)
    sigma = sigma.clamp(min=0.2)
    G = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)

    def gradients(D):
        scale = 1 if math.isinf(D) else math.sqrt(D)
        problem = PosteriorMean(x, references, sigma * scale, D)
        mean, _, nearest, total = op.module.posterior_mean(problem)
        state, upstream = State(mean, nearest, total), Upstream(G, torch.zeros_like(sigma))
        grad_x, grad_y, grad_radius = op.module.posterior_mean_backward(
            problem, state, upstream, (True, True, True)
        )
        return grad_x, grad_y, scale * grad_radius

    expected = gradients(math.inf)
    for D in (1e30, 5e38, 1e39, 1e45):
        for gradient, wanted in zip(gradients(D), expected, strict=True):
            assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max()


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


@pytest.mark.parametrize(
    ("D", "capability"), [(1.0, 80), (math.inf, 80), (2048.0, 89), (1.0, 90), (math.inf, 90)]
)
def test_accuracy_contract_on_photographs(op, device, executor, photographs, D, capability):
    executor.device(capability, multiprocessors=16)
    generator = torch.Generator().manual_seed(0)
    as_float = dequantise(photographs, torch.float32)
    for references in (photographs, as_float):
        sigma = torch.logspace(-3, 2, 18, dtype=torch.float64)
        pairs = (as_float[:18] + as_float[20:38]) / 2
        points = torch.where((torch.arange(18) % 3 == 0)[:, None], pairs, as_float[:18])
        x = points + sigma[:, None].float() * torch.randn(18, 3072, generator=generator)
        tensors = (x.to(device), references.to(device), op.radius_of(sigma, D).to(device))
        op.check(*tensors, D, tolerance=2e-5)


@pytest.mark.parametrize(("far", "capability"), [(5e9, 80), (1e12, 89), (5e9, 90), (1e30, 90)])
def test_a_far_reference_changes_no_other_distance(op, executor, far, capability):
    """Some lanes find the distances to two references together."""
    executor.device(capability)
    for at, sizes in (
        (69, (5, 70, 9)),
        (69, (20, 200, 40)),
        (101, (40, 200, 97)),
        (68, (20, 200, 1024)),
    ):
        x, references, _ = op.problem(*sizes)
        references[at] = far
        assert op.mean_error(x, references, torch.full((sizes[0],), 10.0).double(), 1.0) <= 1e-5


@pytest.mark.parametrize("B", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_every_value_of_narrow_references_is_read_correctly(op, device, B):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[values.isfinite() & (values.float().abs() < 1e38)].to(device)
        x, radius = values.float().expand(B, -1), torch.ones(B, dtype=torch.float64, device=device)
        mean, _ = op.compute(x, values[None], radius, 1.0)
        assert torch.equal(mean, values.float().expand(B, -1))  # one reference is the mean
    values = torch.arange(256, device=device).to(torch.uint8)
    mean, _ = op.compute(values.float().expand(B, -1), values[None], radius, 1.0)
    assert (mean.double() - (values.double() / 127.5 - 1)).abs().max() <= 1.2e-7


def on_a_sphere(B, M, N, squared):
    """Queries at the origin, and references whose squared distances are `squared` and some 2^-32
    more or less. Their features have 12 digits, so that float32 holds the squares."""
    generator = torch.Generator().manual_seed(2)
    wanted = 2**22 * squared - 1
    candidates = torch.randn(40_000, N - 1, generator=generator)
    candidates *= wanted**0.5 / candidates.norm(dim=1, keepdim=True)
    one = candidates.round()[candidates.round().double().square().sum(1) == wanted][0]
    signs = 2 * torch.randint(0, 2, (M, N - 1), generator=generator) - 1
    last = 1 + torch.randint(-20, 21, (M, 1), generator=generator) / 2**11
    return torch.zeros(B, N), torch.cat([signs * one, last], 1) / 2**11


@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**50])
@pytest.mark.parametrize("squared", [1.0, 1.5])
@pytest.mark.parametrize("sizes", [(4, 90, 6), (20, 90, 40)])
def test_differences_far_below_float32_decide(op, device, sizes, squared, scale):
    """A nat is a difference of 1e-9 of the squared distances. Some of these are below 1, and some
    are not."""
    x, references = (scale * t.to(device) for t in on_a_sphere(*sizes, squared))
    radius = torch.full((len(x),), 1e-3 * scale, dtype=torch.float64, device=device)
    op.check(x, references, radius, 2e9)
    mean, _ = op.compute(x, references, radius, 2e9)
    center = references.mean(0)
    assert (mean - center).norm(dim=1).min() > 0.1 * center.norm()


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("sizes", [(4, 40, 33), (20, 40, 512)])
def test_distances_over_sigma_beyond_float32(op, device, sizes, D):
    """Only the nearest references have a weight, also where they are not met exactly."""
    _, references, _ = op.problem(*sizes)
    references[7] = references[3] = references[0]
    for radius_of_all, apart in ((1e-30, 1e-3), (1e-160, 0.0), (1e-160, 1e-3), (1e-23, 1e-12)):
        x = references[: sizes[0]].clone() + apart
        radius = torch.full((len(x),), radius_of_all, dtype=torch.float64, device=device)
        problem = PosteriorMean(x, references, radius, D)
        mean, _, _, total = op.module.posterior_mean(problem)
        if not math.isinf(D) and apart > 0:  # others have a weight too
            op.check(x, references, radius, D)
            continue
        torch.testing.assert_close(mean, references[: sizes[0]], rtol=2.0**-20, atol=0.0)
        assert total[0].item() == 3.0
        assert total[1].item() == 1.0


def feature_errors(op, x, references, radius, D):
    """The largest error of each feature of the mean, relative to its largest value (N,)."""
    mean, _ = op.compute(x, references, radius, D)
    expected, _ = op.expected(x, references, radius, D)
    largest = dequantise(references.cpu(), torch.float64).abs().amax(0)
    return (mean.double().cpu() - expected).abs().amax(0) / largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_different_sizes(op, dtype):
    x, references, sigma = op.problem(40, 300, 96, dtype=dtype)
    sizes = (10.0 ** torch.linspace(-30, 8, 96)).to(references.device)
    references = (references.float() * sizes).to(dtype)
    x = x * sizes
    sigma = sigma.clamp(min=1) * sizes.max().item()
    op.check(x, references, sigma, 96.0)
    # Where a few features hold the distances, the 22 bits of these leave errors of 1e-5 in weights
    # that fall steeply. Here they fall less, and sums have less.
    assert feature_errors(op, x, references, op.radius_of(sigma, 96.0), 96.0).max() <= 1e-6


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("factor", [30.0, 1e3, 1e20])
def test_a_reference_that_float16_cannot_hold_in_sums(op, factor, D):
    x, references, sigma = op.problem(40, 300, 96)
    references[70] *= factor  # it is not in the sample that finds the power of two
    x[3] = references[70] * 1.001
    radius = op.radius_of(sigma, D)
    mean, _ = op.compute(x, references, radius, D)
    expected, _ = op.expected(x, references, radius, D)
    rows = expected.norm(dim=1)
    assert ((mean.double().cpu() - expected).norm(dim=1) / rows).max() <= 1e-5
    assert rows[3] > 10 * rows[4]


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e36])
def test_sums_of_tiny_and_huge_references(op, scale):
    x, references, sigma = op.problem(40, 300, 96)
    errors = feature_errors(op, x * scale, references * scale, sigma * scale, 1.0)
    assert errors.max() <= 1e-5


def test_gradients_of_many_queries(op):
    """More queries than one list holds."""
    x, references, sigma = op.problem(2100, 5, 3)
    op.check_gradients(x, references, sigma.clamp(min=0.05), 1.0)


@pytest.mark.parametrize(
    ("power", "D"),
    [
        (-100, 1.0), (100, 1.0), (-50, 1e9), (50, 1e9), (100, 1e9), (-100, math.inf),
        (50, math.inf), (100, math.inf),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [(4, 40, 33), (20, 40, 40)])
def test_gradients_do_not_depend_on_the_unit(op, sizes, power, D):
    """N + D over s and 1/σ² may be out of the range of float32. Where G·y or a sum of coefficients
    would be, G is left out and g has another size."""
    x, references, sigma = op.problem(*sizes)
    radius = op.radius_of(sigma.clamp(min=0.05), D)
    G, g = op.upstream(x, sigma)
    unit, far = 2.0**power, abs(power) > 50
    if far:
        G = torch.zeros_like(G)

    def gradients(unit, g, needs_y):
        problem = PosteriorMean(x * unit, references * unit, radius * unit, D)
        mean, _, nearest, total = op.module.posterior_mean(problem)
        state, needs = State(mean, nearest, total), (not needs_y, needs_y, not needs_y)
        results = op.module.posterior_mean_backward(problem, state, Upstream(G, g), needs)
        return [gradient for gradient in results if gradient is not None]

    for needs_y in (False, True):
        shrink = far and not needs_y  # gradients are then 1/unit times as large
        actual = gradients(unit, g if shrink else g * unit, needs_y)
        for gradient, wanted in zip(actual, gradients(1.0, g, needs_y), strict=True):
            assert gradient.any()
            assert_gradient(gradient * unit if shrink else gradient, wanted.cpu(), 1e-5)


@pytest.mark.parametrize("sizes", [(4, 90, 6), (20, 90, 40)])
def test_gradients_where_differences_far_below_float32_decide(op, device, sizes):
    x, references = (t.to(device) for t in on_a_sphere(*sizes, 1.0))
    radius = torch.full((len(x),), 0.5, dtype=torch.float64, device=device)
    op.check_gradients(x, references, radius, 2e9, tolerance=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(op):
    x, references, sigma = op.problem(20, 70, 33, device="cuda:1")
    op.check(x, references, sigma, 1.0)
    assert torch.cuda.current_device() == 0
