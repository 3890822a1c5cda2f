"""The backend "torch" against the oracle, in each of its forms: for the CPU, for a device that must
not be waited for, for one that is slow at float64, and for one without float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import problems
from benchmarks.common.problems import radius_of
from pfgm.backends import chunked, products, reference
from pfgm.core import arithmetic, formulas, weights
from pfgm.core.problems import PosteriorMean, State, Tangents, Upstream
from tests.backends.accuracy import assert_accurate, assert_gradient

FORMS = ("CPU", "fast float64", "slow float64", "no float64")


def take_form(name, monkeypatch):
    if name == "CPU":
        return
    monkeypatch.setattr(arithmetic, "may_wait", lambda device: False)
    for module in (arithmetic, chunked, weights):
        monkeypatch.setattr(module, "checks_values", lambda device: False)
    if name != "fast float64":
        monkeypatch.setattr(products, "_has_fast_float64", lambda device: False)
    if name == "no float64":
        for module in (arithmetic, products):
            monkeypatch.setattr(module, "wide_dtype", lambda device: torch.float32)


def tolerance_of(form):
    return 1e-4 if form == "no float64" else 2e-5


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    take_form(request.param, monkeypatch)
    return request.param


def problem(B, M, N, dtype=torch.float32):
    levels = torch.logspace(-2, 1, B, dtype=torch.float64)
    return problems.problem(B, M, N, sigma=levels, between=0.5, spread=0.2, reference_dtype=dtype)


def solve(x, references, radius, D, form, difference=False):
    """Mean, log-sum-exp, nearest and total."""
    radius = radius.float() if form == "no float64" else radius
    arguments = PosteriorMean(x, references, radius, D, difference=difference)
    return products.posterior_mean(arguments)


@pytest.mark.parametrize("D", [1.0, 1e6, math.inf])
def test_accuracy_contract(stress, oracle, form, D):
    # float32 rounds the differences of distances that decide at steep scores.
    for x, references, name in stress if form != "no float64" or D < 1e5 else ():
        for sigma in (1e-10, 1e-2, 1.0):
            sigmas = sigma * torch.tensor([1.0, 1e1, 1e3] * 3, dtype=torch.float64)
            radius = radius_of(sigmas, D)
            result = solve(x, references, radius, D, form)
            try:
                wanted = oracle(x, references, radius, D)
                assert_accurate(result, wanted, references, tolerance_of(form))
            except AssertionError as error:
                raise AssertionError(f"{name}, sigma {sigma}") from error


SIZES = [(1, 1, 1), (3, 2, 5), (5, 17, 1023), (2, 16, 1025), (4, 15, 2049), (3, 4000, 600)]
TYPES = (torch.float32, torch.float64, torch.float16, torch.uint8)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(sizes, dtype) for sizes in SIZES for dtype in TYPES[: 4 if sizes[1] < 4000 else 1]],
)
def test_sizes_at_edges(oracle, form, sizes, dtype):
    x, references, sigma = problem(*sizes, dtype)
    for D in (1.0, math.inf):
        radius = radius_of(sigma, D)
        result = solve(x, references, radius, D, form)
        assert_accurate(result, oracle(x, references, radius, D), references, tolerance_of(form))


@pytest.mark.parametrize("copies", [1, 16, 17, 200])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_limits(form, copies, offset):
    """On references, and between two of them, at r = 0 and σ = 0, with more copies than get exact
    differences where nothing waits for the device."""
    generator = torch.Generator().manual_seed(0)
    y = offset + torch.randint(-8, 9, (40, 70), generator=generator) / 8
    references = y.repeat_interleave(copies, 0)[torch.randperm(40 * copies, generator=generator)]
    zero = torch.zeros(5, dtype=torch.float64)
    mean, lse, nearest, total = solve(y[:5], references, zero, 1.0, form)
    assert torch.equal(nearest.double(), zero)
    assert torch.equal(lse.double(), zero + math.inf)
    assert torch.equal(total.double(), zero + copies)
    torch.testing.assert_close(mean, y[:5], rtol=1e-6, atol=1e-6)
    middle = (y[:5] + y[5:10]) / 2
    for sigma in (0.0, 1e-12):
        mean, lse, _, total = solve(middle, references, zero + sigma, math.inf, form)
        assert torch.equal(total.double(), zero + 2 * copies)
        torch.testing.assert_close(mean, middle, rtol=1e-6, atol=1e-6)
        _, lse, _, _ = solve(y[:5], references, zero + sigma, math.inf, form)
        torch.testing.assert_close(lse.double(), zero + math.log(copies))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30, 3e37])
@pytest.mark.parametrize("name", FORMS[:3])  # the squares of the last leave the range of float32
def test_any_scale(oracle, monkeypatch, name, scale):
    take_form(name, monkeypatch)
    x, references, sigma = problem(6, 300, 70)
    x, references, sigma = scale * x, scale * references, scale * sigma
    result = solve(x, references, sigma, 1.0, name)
    assert_accurate(result, oracle(x, references, sigma, 1.0), references, 2e-5)


@pytest.mark.parametrize("row", [0, 150])
def test_one_reference_far_away(oracle, form, row):
    """Neither the origin nor the scale may follow it so far that the others lose their digits."""
    x, references, sigma = problem(6, 300, 70)
    references[row] = 1e6
    wanted = oracle(x, references, sigma, 1.0)
    assert_accurate(solve(x, references, sigma, 1.0, form), wanted, references[1:100], 1e-3)


@pytest.mark.parametrize("queries", [1, 5])
def test_sums_over_many_equal_references_do_not_drift(form, queries):
    """A sum of float32 over all of them was off by 4e-5."""
    generator = torch.Generator().manual_seed(0)
    references = 1 + 1e-3 * torch.randn(30_000, 1, generator=generator)
    radius = torch.full((queries,), 10.0, dtype=torch.float64)
    mean = solve(references[:queries], references, radius, math.inf, form)[0].double()
    assert (mean - references.double().mean()).abs().max() < 1e-6


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_far_from_the_origin(oracle, form, offset):
    x, references, sigma = problem(6, 300, 300)
    x, references = x + offset, references + offset
    wanted = oracle(x, references, sigma, 1.0)
    spread = references[:100] - references.mean(0)
    result = solve(x, references, sigma, 1.0, form, difference=True)
    difference = x.double() - wanted[0]
    assert_accurate((result[0], result[1]), (difference, wanted[1]), spread, tolerance_of(form))


def crowded(name):
    """Points, references and radius whose squared distances are small beside the norms."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "clusters":  # of spread 1e-6, at distance 1
        means = torch.nn.functional.normalize(noise(4, 8)).repeat(16, 1) / math.sqrt(2)
        references = means + 1e-6 * noise(64, 8)
        return means[:12] + 1e-6 * noise(12, 8), references, torch.full((12,), 1e-6).double()
    if name == "sizes":
        references = torch.logspace(-7, 7, 64)[torch.randperm(64, generator=generator)]
        references = references[:, None] * noise(64, 32)
        return 1e-7 * noise(12, 32), references, torch.logspace(-7, -5, 12).double()
    references = noise(2, 16)
    references[1] = 1e12 * references[1].abs()
    references = references.flip(0) if name == "large first" else references
    x = references[int(name == "large first")] + 0.3 * noise(12, 16)
    return x, references, torch.logspace(-6, 0, 12).double()


@pytest.mark.parametrize("D", [1.0, 2048.0, math.inf])
@pytest.mark.parametrize("name", ["clusters", "sizes", "large first", "large last"])
def test_distances_small_beside_the_norms(oracle, oracle_gradients, name, D):
    x, references, sigma = crowded(name)
    radius = radius_of(sigma, D)
    mean, lse = oracle(x, references, radius, D)
    wanted = x.double() - mean
    size = wanted.norm(dim=1).hypot(sigma)
    difference, logsumexp, _, _ = solve(x, references, radius, D, "CPU", difference=True)
    assert ((difference - wanted).norm(dim=1) / size).max() < 1e-6
    assert ((logsumexp - lse).abs() / lse.abs().clamp(min=1)).max() < 1e-7
    G = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    g = sigma.square().clamp(max=1)
    arguments = PosteriorMean(x, references, radius, D)
    mean, _, nearest, total = products.posterior_mean(arguments)
    state, upstream = State(mean, nearest, total), Upstream(G, g)
    result = products.posterior_mean_backward(arguments, state, upstream, (True, True, True))
    for actual, expected in zip(
        result, oracle_gradients(x, references, radius, D, G, g), strict=True
    ):
        rows = expected.reshape(len(expected), -1)
        floor = rows.norm(dim=1).clamp(min=1e-6 * rows.norm())
        assert ((actual.double().reshape(rows.shape) - rows).norm(dim=1) / floor).max() < 2e-5


@pytest.mark.parametrize("module", [products, reference])
@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_a_point_on_a_reference_adds_no_noise_to_derivatives(oracle_gradients, module, D):
    """The factor 1/r² of the difference, which is 0, is 1e32."""
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(9, 5, generator=generator)
    x = references[[2, 5, 5]] + torch.tensor([0.0, 0.0, 1.0])[:, None]
    radius = torch.tensor([1e-16, 1e-14, 1.0], dtype=torch.float64)
    G, g = torch.randn(x.shape, generator=generator), torch.ones(3, dtype=torch.float64)
    arguments = PosteriorMean(x, references, radius, D)
    mean, _, nearest, total = module.posterior_mean(arguments)
    state = State(mean, nearest, total)
    result = module.posterior_mean_backward(arguments, state, Upstream(G, g), (True, True, True))
    wanted = oracle_gradients(x, references, radius, D, G, g)
    for actual, expected in zip(result, wanted, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    # The tangent of the log-sum-exp along all inputs is the product with their gradients.
    along = [torch.randn(v.shape, generator=generator).double() for v in (x, references)]
    state = State(mean.double(), nearest, total)
    tangents = Tangents(*along, torch.zeros_like(radius))
    _, tangent = formulas.posterior_mean_tangent(arguments, state, tangents)
    alone = oracle_gradients(x, references, radius, D, 0 * G, g)
    moved = (alone[0] * along[0]).sum() + (alone[1] * along[1]).sum()
    torch.testing.assert_close(tangent.sum(), moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2, 1.0])
def test_the_difference_keeps_its_digits(oracle, form, sigma):
    x, references, _ = problem(6, 300, 400)
    noise = torch.randn(6, 400, generator=torch.Generator().manual_seed(1))
    x = references[:6] + sigma * noise
    radius = torch.full((6,), sigma, dtype=torch.float64)
    wanted = x.double() - oracle(x, references, radius, 1.0)[0]
    difference = solve(x, references, radius, 1.0, form, difference=True)[0].double()
    tolerance = 2e-5 if form != "no float64" else 2e-5 / min(sigma, 1)
    assert ((difference - wanted).norm(dim=1) <= tolerance * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_gradients(oracle_gradients, form, D):
    generator = torch.Generator().manual_seed(2)
    for sizes in ((6, 40, 30), (5, 400, 700), (4, 2100, 1030)):
        x, references, sigma = problem(*sizes)
        radius = radius_of(sigma.clamp(min=0.05), D)
        G = torch.randn(x.shape, generator=generator)
        g = sigma.square().clamp(max=1) * torch.randn(len(x), generator=generator).double()
        wanted = oracle_gradients(x, references, radius, D, G, g)
        wide = torch.float32 if form == "no float64" else torch.float64
        arguments = PosteriorMean(x, references, radius.to(wide), D)
        mean, _, nearest, total = products.posterior_mean(arguments)
        state, upstream = State(mean, nearest, total), Upstream(G, g.to(wide))
        result = products.posterior_mean_backward(arguments, state, upstream, (True, True, True))
        for actual, expected in zip(result, wanted, strict=True):
            assert_gradient(actual, expected, 1e-4 if form != "no float64" else 1e-3)


class Watched(TorchDispatchMode):
    """Remembers the largest result of an operation, and those that wait for the device."""

    def __init__(self, references):
        super().__init__()
        self.largest, self.waits, self.references = 0, set(), references.data_ptr()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        name = function._schema.name
        if name.endswith(("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select")):
            self.waits.add(name)
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().data_ptr() != self.references
        ):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("name", FORMS)
def test_memory_is_bounded_and_nothing_waits_for_a_device(monkeypatch, name):
    take_form(name, monkeypatch)
    for bounds in ("most", "most_on_device"):
        monkeypatch.setattr(products._Products, bounds, (1 << 12, 1 << 14))
    for M in (500, 2000):
        x, references, sigma = problem(30, M, 50)
        wide = torch.float32 if name == "no float64" else torch.float64
        arguments = PosteriorMean(x, references, sigma.to(wide), 1.0)
        with Watched(references) as watched:
            mean, _, nearest, total = products.posterior_mean(arguments)
            upstream = Upstream(torch.ones_like(mean), torch.zeros_like(total))
            state = State(mean, nearest, total)
            products.posterior_mean_backward(arguments, state, upstream, (True, False, True))
        assert watched.largest <= 1 << 15
        assert bool(watched.waits) == (name == "CPU")


@pytest.mark.parametrize(
    ("capability", "fast"),
    [(c, True) for c in ((7, 0), (8, 0), (9, 0), (10, 0))]
    + [(c, False) for c in ((7, 5), (8, 6), (8, 9), (10, 3), (12, 0))],
)
def test_gpus_that_are_fast_at_float64(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    products._has_fast_float64.cache_clear()
    assert products._has_fast_float64(torch.device("cuda", 0)) == fast
    products._has_fast_float64.cache_clear()
    assert products._has_fast_float64(torch.device("cpu"))
    assert not products._has_fast_float64(torch.device("mps"))


@pytest.mark.parametrize("fast", [True, False])
def test_float32_that_may_be_rounded_is_not_used(monkeypatch, fast):
    monkeypatch.setattr(products, "_has_fast_float64", lambda device: fast)
    x, references, sigma = problem(3, 4, 5)
    arguments = PosteriorMean(x, references, sigma, 1.0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rounded = products._arithmetic(arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    assert type(rounded) is products._Products
    assert not rounded.narrow
    assert (type(products._arithmetic(arguments)) is products._Products) == fast


def test_autocast_rounds_nothing(form):
    x, references, sigma = problem(5, 200, 300)
    wide = torch.float32 if form == "no float64" else torch.float64
    arguments = PosteriorMean(x, references, 10 * sigma.to(wide), 1.0)

    def results():
        mean, lse, nearest, total = products.posterior_mean(arguments)
        upstream = Upstream(torch.ones_like(mean), torch.ones_like(total))
        saved = State(mean, nearest, total), upstream, (True, True, True)
        return mean, lse, *products.posterior_mean_backward(arguments, *saved)

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, rounded, strict=True))
