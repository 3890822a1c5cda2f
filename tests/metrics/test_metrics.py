"""The metrics against scipy, closed forms, and plain loops."""

import hashlib
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pfgm import data, metrics
from pfgm.metrics import distances

Array = np.ndarray[Any, np.dtype[np.float64]]
Refused = Callable[[Callable[[], object], str], None]
METRICS: list[Callable[..., object]] = [
    metrics.frechet_distance,
    metrics.precision_recall,
    metrics.nearest_distance,
    metrics.density_coverage,
    lambda a, b, **options: metrics.kernel_distance(a, b, subsets=None, **options).mean,
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


def apart(p: Array, q: Array) -> float:
    return math.sqrt(math.fsum((p - q) ** 2))


def radii(members: Array, k: int) -> list[float]:
    """The distance of each member to its k-th nearest other one."""
    return [
        sorted(apart(p, q) for j, q in enumerate(members) if j != i)[k - 1]
        for i, p in enumerate(members)
    ]


def precision_recall_by_loops(samples: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    def inside(points: Array, members: Array) -> float:
        balls = [*zip(members, radii(members, k), strict=True)]
        return sum(any(apart(q, p) <= r for p, r in balls) for q in points) / len(points)

    a, b = samples.double().flatten(1).numpy(), real.double().flatten(1).numpy()
    return inside(a, b), inside(b, a)


SEEDS = st.integers(0, 2**31)


def sizes(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    """Sizes of two sets."""
    return st.tuples(st.integers(least, most), st.integers(least, most))


@given(sizes(8, 40), st.integers(1, 6), st.floats(0.1, 100), SEEDS)
@settings(max_examples=40, deadline=None)
def test_frechet_agrees_with_scipy(
    sizes: tuple[int, int], dimension: int, scale: float, seed: int
) -> None:
    mix = normal(dimension, dimension, seed=seed)
    a = normal(sizes[0], dimension, seed=seed + 1) @ mix
    b = normal(sizes[1], dimension, seed=seed + 2) * scale + 1
    expected = frechet_by_scipy(a, b)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("n", [2, 20, 200])
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 3.0])
def test_frechet_of_a_scaled_set_with_singular_covariance(n: int, factor: float) -> None:
    a = normal(n, 64)
    a[:, 32:] = a[:, :32]
    a = a - a.mean(0)
    expected = (abs(factor) - 1) ** 2 * float(a.square().sum()) / (n - 1)
    assert metrics.frechet_distance(a, a * factor) == pytest.approx(expected, rel=1e-12, abs=1e-11)
    assert 0 <= metrics.frechet_distance(a, a.flip(0)) < 1e-10


@st.composite
def pairs_of_sets(draw: st.DrawFn, smallest: int, smallest_real: int) -> tuple[Tensor, Tensor]:
    """Samples and real data of up to 15 points. Few levels make many ties and duplicates."""
    sizes = draw(st.integers(smallest, 15)), draw(st.integers(smallest_real, 15))
    levels = draw(st.sampled_from([2, 5, 10**6]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    samples, real = (torch.randint(levels, (n, 1, 2), generator=generator).double() for n in sizes)
    return samples, real


@given(pairs_of_sets(4, 4), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_precision_recall_agrees_with_loops(sets: tuple[Tensor, Tensor], k: int) -> None:
    expected = precision_recall_by_loops(*sets, k)
    assert metrics.precision_recall(*sets, k) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    a, b = normal(13, 3), normal(17, 3, seed=1)
    expected = metrics.precision_recall(a, b), metrics.nearest_distance(a, b)
    density = metrics.density_coverage(a, b)
    kernel = metrics.kernel_distance(a, b, subsets=None).mean
    monkeypatch.setattr(distances, "_MAX_DISTANCES", chunk)
    assert metrics.precision_recall(a, b) == expected[0]
    assert torch.equal(metrics.nearest_distance(a, b), expected[1])
    assert metrics.density_coverage(a, b) == density
    assert metrics.kernel_distance(a, b, subsets=None).mean == pytest.approx(kernel, rel=1e-12)


def test_results_are_python_floats_and_need_no_gradient() -> None:
    a, b = normal(9, 4).requires_grad_(), normal(8, 4, seed=1)
    assert type(metrics.frechet_distance(a, b)) is float
    assert {type(value) for value in metrics.precision_recall(a, b)} == {float}
    assert {type(value) for value in metrics.density_coverage(a, b)} == {float}
    assert {type(value) for value in metrics.kernel_distance(a, b)} == {float}
    assert not metrics.nearest_distance(a, b).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_computation_is_in_float64_whatever_the_dtype(dtype: torch.dtype) -> None:
    a, b = (normal(20, 6, seed=i).to(dtype) for i in range(2))
    for metric in METRICS:
        torch.testing.assert_close(metric(a, b), metric(a.double(), b.double()), rtol=0, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("b", "features", "sentence"),
    [
        (torch.zeros(9, 1, 3), None, "…must have samples of the same shape, got (3,) and (1, 3)."),
        *(
            (torch.zeros(shape), None, f"…must have shape (n, *S), n samples…, got {shape}.")
            for shape in ((0, 3), (9, 0), (9,), ())
        ),
        *(
            (
                torch.zeros(9, 3, dtype=dtype),
                None,
                f"TypeError: …must be floating point, got {dtype}…",
            )
            for dtype in (torch.uint8, torch.int64, torch.complex64)
        ),
        (torch.zeros(9, 3, device="meta"), None, "…must be on one device, got cpu and meta."),
        (normal(9, 3), lambda x: x.sum(1), "features of…must have shape (9, F)…got (9,)."),
        (
            normal(9, 3),
            Tensor.long,
            "TypeError: features of…must be floating point, got torch.int64…",
        ),
        (normal(9, 3), lambda x: x / 0, "features of…must be finite, got NaN or…(first in row 0)."),
    ],
)
def test_what_every_metric_refuses(
    metric: Callable[..., object], refused: Refused, b: Tensor, features: Any, sentence: str
) -> None:
    refused(lambda: metric(normal(9, 3), b, features=features), sentence)


def kernel_distance_by_loops(a: Tensor, b: Tensor, degree: int) -> float:
    rows_a, rows_b = (x.double().flatten(1).tolist() for x in (a, b))

    def kernel(x: list[float], y: list[float]) -> float:
        return (math.fsum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** degree

    def within(rows: list[list[float]]) -> float:
        pairs = [(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return math.fsum(kernel(x, y) for x, y in pairs) / len(pairs)

    across = math.fsum(kernel(x, y) for x in rows_a for y in rows_b) / (len(a) * len(b))
    return within(rows_a) + within(rows_b) - 2 * across


@given(sizes(2, 12), st.integers(1, 5), st.integers(1, 4), SEEDS)
@settings(max_examples=60, deadline=None)
def test_kernel_distance_agrees_with_loops(
    sizes: tuple[int, int], dimension: int, degree: int, seed: int
) -> None:
    a = normal(sizes[0], dimension, seed=seed)
    b = normal(sizes[1], dimension, seed=seed + 1) * 2 + 1
    expected = kernel_distance_by_loops(a, b, degree)
    distance = metrics.kernel_distance(a, b, degree=degree, subsets=None)
    assert distance.mean == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert math.isnan(distance.deviation)


def test_kernel_distance_is_a_function_of_the_generator() -> None:
    a, b = normal(40, 3), normal(30, 3, seed=1)

    def distance(seed: int) -> metrics.KernelDistance:
        draw = torch.Generator().manual_seed(seed)
        return metrics.kernel_distance(a, b, subsets=5, generator=draw)

    assert distance(0) == distance(0) != distance(1)


def test_subsets_are_drawn_without_replacement() -> None:
    a, b = normal(12, 3), normal(12, 3, seed=1)
    whole = metrics.kernel_distance(a, b, subsets=None).mean
    distance = metrics.kernel_distance(a, b, subsets=4, subset_size=12)
    assert distance.mean == pytest.approx(whole, rel=1e-12)
    assert distance.deviation < 1e-12
    single = metrics.kernel_distance(a, b, subsets=1, subset_size=12)
    assert single.mean == pytest.approx(whole, rel=1e-12)
    assert math.isnan(single.deviation)


@pytest.mark.parametrize("power", [-1060, -600, 600, 1010])
def test_metrics_of_distances_do_not_depend_on_the_unit(power: int) -> None:
    """Squares of these distances overflow or underflow float64."""
    a, b = normal(20, 3).double(), normal(30, 3, seed=1).double() + 2
    big_a, big_b = (torch.ldexp(x, torch.tensor(power)) for x in (a, b))
    for metric in (metrics.precision_recall, metrics.density_coverage):
        assert metric(big_a, big_b) == metric(a, b)
    wanted = torch.ldexp(metrics.nearest_distance(a, b), torch.tensor(power))
    rtol = 1e-3 if power == -1060 else 1e-12  # such small numbers have few digits
    torch.testing.assert_close(metrics.nearest_distance(big_a, big_b), wanted, rtol=rtol, atol=0)


def test_a_sample_far_away_changes_no_other_distance() -> None:
    a, b = normal(20, 3).double(), normal(30, 3, seed=1).double()
    wanted = metrics.nearest_distance(a, b)
    for far in (1e50, 1e170, 1e300):
        a[0], wanted[0] = far, math.sqrt(3) * far
        torch.testing.assert_close(metrics.nearest_distance(a, b), wanted, rtol=1e-12, atol=0)


def density_coverage_by_loops(samples: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    a, b = samples.double().flatten(1).numpy(), real.double().flatten(1).numpy()
    balls = [*zip(b, radii(b, k), strict=True)]
    inside = [[apart(s, p) <= r for p, r in balls] for s in a]
    density = sum(sum(row) for row in inside) / (k * len(a))
    return density, sum(map(any, zip(*inside, strict=True))) / len(b)


@given(pairs_of_sets(1, 6), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_density_coverage_agrees_with_loops(sets: tuple[Tensor, Tensor], k: int) -> None:
    expected = density_coverage_by_loops(*sets, k)
    assert metrics.density_coverage(*sets, k) == pytest.approx(expected)


def test_neighbours_may_be_those_of_features() -> None:
    rows = normal(30, 2, 3)
    whole = metrics.neighbour_distances(rows, 2, features=lambda x: x[:, 0, :1].long().double())
    assert bool((whole == whole.round()).all())
    plain = metrics.neighbour_distances(rows, 4)
    torch.testing.assert_close(plain, metrics.neighbour_distances(rows.flatten(1), 4))


def test_known_neighbours_change_nothing() -> None:
    samples, real = normal(20, 3), normal(30, 3, seed=1)
    for metric, k in ((metrics.precision_recall, 3), (metrics.density_coverage, 5)):
        for known in (k, 7):
            neighbours = metrics.neighbour_distances(real, known)
            assert metric(samples, real, k, neighbours=neighbours) == metric(samples, real, k)
        for wrong in (neighbours[1:], neighbours[:, : k - 1], neighbours[0]):
            with pytest.raises(
                ValueError, match=rf"neighbours must have shape \(30, {k} or more\), the.*got \("
            ):
                metric(samples, real, k, neighbours=wrong)


@pytest.mark.parametrize("metric", METRICS)
class TestFeatures:
    def test_are_compared_in_place_of_the_samples(self, metric: Callable[..., object]) -> None:
        a, b, mix = normal(150, 2, 4), normal(140, 2, 4, seed=1), normal(8, 3, seed=2)
        figure = metric(a, b, features=lambda x: x.flatten(1) @ mix)
        torch.testing.assert_close(figure, metric(a.flatten(1) @ mix, b.flatten(1) @ mix))

    def test_are_evaluated_in_batches_without_gradients(
        self, metric: Callable[..., object]
    ) -> None:
        seen = []

        def features(x: Tensor) -> Tensor:
            seen.append(x)
            assert not torch.is_grad_enabled()
            assert not x.requires_grad
            return x

        a, b = normal(150, 3).requires_grad_(), normal(70, 3, seed=1)
        metric(a, b, features=features)
        assert [len(x) for x in seen] == [64, 64, 22, 64, 6]
        assert torch.equal(torch.cat(seen), torch.cat([a, b]))

    def test_take_any_dtype(self, metric: Callable[..., object]) -> None:
        draw = torch.Generator().manual_seed(0)
        a, b = (torch.randint(256, (20, 3), generator=draw).to(torch.uint8) for _ in range(2))
        figure = metric(a, b, features=data.to_unit)
        torch.testing.assert_close(figure, metric(data.to_unit(a), data.to_unit(b)))

    @pytest.mark.parametrize("bound", [False, True])
    def test_of_a_module_are_those_of_evaluation_mode(
        self, metric: Callable[..., object], bound: bool
    ) -> None:
        module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).double()
        module[0].eval()
        features = module.forward if bound else module
        a, b = normal(20, 3), normal(20, 3, seed=1)
        figure = metric(a, b, features=features)
        assert [m.training for m in module.modules()] == [True, False, True, True]
        assert int(module[2].num_batches_tracked) == 0
        module.eval()
        with torch.no_grad():
            torch.testing.assert_close(figure, metric(module(a), module(b)))

    def test_that_raise_leave_the_module_as_it_was(self, metric: Callable[..., object]) -> None:
        module = nn.Linear(7, 2).double()
        with pytest.raises(RuntimeError, match="shape"):
            metric(normal(9, 3), normal(9, 3), features=module)
        assert module.training
        assert torch.is_grad_enabled()


def fake_fidelity(
    monkeypatch: pytest.MonkeyPatch, calculate: Callable[..., dict[str, float]]
) -> None:
    module = types.ModuleType("torch_fidelity")
    module.__dict__.update(
        calculate_metrics=calculate,
        KEY_METRIC_FID="frechet_inception_distance",
        KEY_METRIC_ISC_MEAN="inception_score_mean",
        KEY_METRIC_ISC_STD="inception_score_std",
    )
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that passes for the official weights."""
    (tmp_path / "w.pth").write_bytes(b"weights")
    checksum = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr("pfgm.metrics.inception._CHECKSUM", checksum)
    return tmp_path / "w.pth"


def test_inception_metrics_hands_bytes_to_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    seen: dict[str, Any] = {}

    def calculate(**options: Any) -> dict[str, float]:
        seen.update(options)
        return {
            "frechet_inception_distance": 3.5,
            "inception_score_mean": 2.5,
            "inception_score_std": 0.5,
        }

    fake_fidelity(monkeypatch, calculate)
    grey = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 2, 2).expand(4, 2, 2)
    colour = torch.arange(48).to(torch.uint8).view(2, 3, 2, 4)
    figures = metrics.inception_metrics(grey, colour, splits=4, batch_size=7, weights=weights)
    assert figures == metrics.InceptionMetrics(fid=3.5, score=2.5, score_deviation=0.5)
    assert len(seen["input1"]) == 4
    expected = torch.tensor([[0, 0], [128, 255]], dtype=torch.uint8).expand(3, 2, 2)
    assert torch.equal(seen["input1"][2], expected)
    assert torch.equal(torch.stack([seen["input2"][i] for i in range(2)]), colour)
    assert (seen["fid"], seen["isc"], seen["isc_splits"]) == (True, True, 4)
    assert (seen["cuda"], seen["batch_size"], seen["cache"]) == (False, 7, False)
    assert seen["feature_extractor_weights_path"] == str(weights)
    weights.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="must be torch-fidelity's file of weights"):
        metrics.inception_metrics(grey, colour, splits=4, weights=weights)


def test_inception_metrics_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"torch-fidelity.*pip install '\.\[fid\]'"):
        metrics.inception_metrics(torch.zeros(10, 8, 8), torch.zeros(10, 8, 8))


GREY = torch.zeros(10, 8, 8)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (torch.zeros(10, 2, 8, 8), "samples must have shape (n,…2, got (10, 2, 8, 8)."),
        (torch.zeros(10, 64), "samples must have shape (n, C,…least 2, got (10, 64)."),
        (torch.zeros(1, 8, 8), "samples must have shape (n, C,…2, got (1, 8, 8)."),
        (GREY.to("meta").byte(), "samples and real must be on one device, got meta and cpu."),
        (GREY[:9], "splits must be at most 9, the number of samples, got 10."),
    ],
)
def test_inception_metrics_refuses(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, samples: Tensor, sentence: str
) -> None:
    fake_fidelity(monkeypatch, lambda **_: {})
    refused(lambda: metrics.inception_metrics(samples, GREY), sentence)


def test_torch_fidelity_itself_agrees_with_our_distance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the real package, on random weights: the real ones would need a network."""
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="torch-fidelity is not installed: inception_metrics() was only run against a fake",
    )
    extractor = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(extractor, "load_state_dict", lambda *_: None)
        network = extractor("random", ["2048", "logits_unbiased"])
        torch.manual_seed(0)
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), weights)
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr("pfgm.metrics.inception._CHECKSUM", checksum)
    draw = torch.Generator().manual_seed(0)
    samples, real = torch.randint(256, (2, 12, 3, 16, 16), generator=draw).to(torch.uint8)
    real = real // 2
    figures = metrics.inception_metrics(samples, real, splits=1, weights=weights)
    ours = metrics.frechet_distance(samples, real, features=lambda x: network(x)[0])
    assert figures.fid == pytest.approx(ours, rel=1e-3)
    with torch.no_grad():
        p = network(samples)[1].double().softmax(1)
    divergence = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert figures.score == pytest.approx(float(divergence.exp()), rel=1e-5)
    assert figures.score_deviation == 0


def exact(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def hard_sets(kind: str, N: int) -> tuple[Tensor, Tensor]:
    """Samples and real rows (·, N) whose distances a product of matrices gets wrong."""
    a, b = normal(40, N), normal(60, N, seed=1)
    if kind == "far from 0":
        return a * 1e-6 + 1e6, b * 1e-6 + 1e6
    if kind == "few levels":
        return a.round(), b.round()
    if kind == "near ties":
        return torch.nextafter(b[:40], b[20:]), b
    if kind == "constant":
        return torch.ones(40, N).double(), torch.full((60, N), 3.0).double()
    if kind == "clusters":
        return a + 1e7 * (a[:, :1] > 0), b + 1e7 * (b[:, :1] > 0)
    if kind == "rows far away":
        a[0], b[3] = 1e50, -1e60
        return a, b
    scales = 10.0 ** torch.arange(-120, 60, 3, dtype=torch.float64)[:, None]
    return a * scales[20:], b * scales


HARD = ("far from 0", "few levels", "near ties", "constant", "clusters", "rows far away", "scales")


@pytest.mark.parametrize("N", [1, 3, 300])
@pytest.mark.parametrize("kind", HARD)
def test_products_decide_as_exact_differences_do(kind: str, N: int) -> None:
    """To the bit, also where a radius is the distance of a pair."""
    a, b = hard_sets(kind, N)
    across, within = exact(a, b), exact(b, b).sort(1).values[:, 1:4]
    assert torch.equal(metrics.nearest_distance(a, b), across.amin(1))
    assert torch.equal(metrics.neighbour_distances(b, 3), within)
    radii = exact(a, a).sort(1).values[:, 3:4]
    for real_radii in (within[:, 2], across[7]):
        neighbours = real_radii[:, None].expand(-1, 5)
        inside, covered = across <= real_radii, across <= radii
        figures = metrics.precision_recall(a, b, neighbours=neighbours)
        assert figures == (int(inside.any(1).sum()) / 40, int(covered.any(0).sum()) / 60)
        figures = metrics.density_coverage(a, b, neighbours=neighbours)
        assert figures == (int(inside.sum()) / 200, int(inside.any(0).sum()) / 60)


def test_few_distances_are_computed_from_differences_in_short_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = torch.rand(400, 3072), torch.rand(300, 3072)
    terms: dict[str, list[int]] = {"cdist": [], "addmm": []}
    cdist, addmm = torch.cdist, torch.addmm

    def differences(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        terms["cdist"].append(x.numel() * y.shape[-2])
        return cdist(x, y, **options)

    def products(sums: Tensor, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        terms["addmm"].append(x.numel() * y.shape[1])
        return addmm(sums, x, y, **options)

    whole = exact(a.double(), b.double()).amin(1)
    monkeypatch.setattr(torch, "cdist", differences)
    monkeypatch.setattr(torch, "addmm", products)
    assert torch.equal(metrics.nearest_distance(a, b), whole)
    assert sum(terms["addmm"]) == a.numel() * len(b)
    assert sum(terms["cdist"]) <= 2 * a.numel()
    assert max(terms["cdist"]) <= 2**28
    tiny = torch.rand(400, 3072, dtype=torch.float64) * 1e-200  # all from differences
    metrics.nearest_distance(tiny, tiny)
    assert max(terms["cdist"]) <= 2**28


def test_many_rows_beside_few_are_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = normal(5, 30), normal(80, 30, seed=1)
    expected = frechet_by_scipy(few, many)
    monkeypatch.setattr(torch.linalg, "qr", None)
    assert metrics.frechet_distance(few, many) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(many, few) == pytest.approx(expected, rel=1e-6)


def test_progress_of_neighbours_counts_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def progress_bar(parts: list[slice], *arguments: Any, **options: Any) -> list[slice]:
        bars.append((len(parts), options["disable"]))
        return parts

    monkeypatch.setattr(distances, "progress_bar", progress_bar)
    monkeypatch.setattr(distances, "_MAX_DISTANCES", 40)
    metrics.neighbour_distances(normal(20, 3), 3, progress=True)
    metrics.neighbour_distances(normal(20, 3), 3)
    assert bars == [(10, False), (10, True)]


A, B = normal(8, 2), normal(10, 2)
SHAPE = "must have shape (n, *S), n samples of shape S with n at least"
FAR = torch.tensor([[1.5e308], [-1.5e308]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: metrics.frechet_distance(A, B[:1]), f"b {SHAPE} 2, got (1, 2)."),
        (lambda: metrics.precision_recall(A, B[:3], 3), f"real {SHAPE} 4, got (3, 2)."),
        (lambda: metrics.density_coverage(A, B[:5], 5), f"real {SHAPE} 6, got (5, 2)."),
        (lambda: metrics.neighbour_distances(A[:4], 4), f"x {SHAPE} 5, got (4, 2)."),
        (
            lambda: metrics.frechet_distance(A * 1e155, B),
            "a and b hold values so large that their Fréchet distance overflows.",
        ),
        (lambda: metrics.frechet_distance(A * 1e200, B), "a and b hold values…overflows."),
        (lambda: metrics.neighbour_distances(FAR, 1), "samples lie so far…overflow float64."),
        (lambda: metrics.kernel_distance(A * 1e100, B), "a and b hold values so…overflows."),
        (lambda: metrics.kernel_distance(A * 1e30, A), "a and b hold values so…overflows."),
    ],
)
def test_refusals(refused: Refused, call: Callable[[], object], sentence: str) -> None:
    refused(call, sentence)
