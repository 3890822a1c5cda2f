"""benchmarks/claims: every claim in miniature, and its parts."""

import csv
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import pfgm
from benchmarks.claims import (
    dimensions,
    examine,
    jobs,
    measures,
    methods,
    peers,
    quality,
    step_size,
)
from benchmarks.claims import presets as claim_presets
from benchmarks.claims.registry import CLAIMS

ROOT = Path(__file__).resolve().parents[2]
MINIATURE = dataclasses.replace(
    claim_presets.PRESETS["quick"],
    width=8,
    steps=4,
    batch_size=32,
    references=64,
    seeds=(0,),
    methods=("PFGM", "PFGM++ 128", "EDM", "VE", "VP"),
    samples=32,
    sampling_batch=32,
    classifier_epochs=1,
    evaluations=(3,),
    tolerances=(1.0,),
    sde_steps=(2,),
    chain_steps=(2,),
    euler_steps=(2, 3),
    euler_samples=16,
    weak_methods=("PFGM", "VE", "VP"),
    weak_evaluations=2,
    weak_sde_steps=2,
    dimensions=(1, 128, math.inf),
    noises=(0.5,),
    bits=(2,),
    reference_counts=(32, 64),
    probe_rows=32,
    timing_turns=1,
    dequantised_copies=1,
    likelihood_rows=2,
    likelihood_tolerance=1.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("claims")
    examine.keep_preset(MINIATURE, path)
    measures.train_classifier(MINIATURE, path)
    return path


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Runs jobs in this process, because starting others would take longer than the jobs."""

    def one_by_one(chosen, preset, folder, workers):
        for job in chosen:
            yield job, job.rows(preset, folder)

    monkeypatch.setattr(jobs, "_in_processes", one_by_one)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# The others take 4 to 9 seconds each.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("step-size", "dimensions") else pytest.mark.slow)
        for name in CLAIMS
    ],
)
def test_a_claim_in_miniature(name, folder):
    tables = examine.examine(
        name, CLAIMS[name], MINIATURE, folder, command="the command", workers=1
    )
    for table, rows in tables.items():
        assert len(rows_of(folder / f"{table}.csv")) == len(rows) > 0
    assert list(folder.glob(f"{name}*.png"))
    assert json.loads((folder / f"{name}.json").read_text())["command"] == "the command"
    # The data of no picture overwrite a table.
    assert not {path.stem for path in folder.glob(f"{name}*.png")} & set(tables)


def flow_of(method):
    return methods.flow_of(method, MINIATURE)


class Predicts(torch.nn.Module):
    """A backbone that predicts the exact noise around a single image of zeros, with EDM's
    scaling."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, x, noise):
        sigma = (4 * noise).exp().view(-1, 1, 1, 1)
        # VE sees x and predicts −noise; VP sees x/√(σ² + 1) and predicts noise.
        return -x / sigma if self.method == "VE" else x * (1 + sigma**2).sqrt() / sigma


@pytest.mark.parametrize("method", ["VE", "VP"])
def test_score_models(method):
    """One that knows the noise finds the data; returned points err by the noise, by N = 64."""
    flow, network = flow_of(method), methods.Score(method, Predicts(method))
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 1.0, 10.0])
    mean = network(sigma.view(-1, 1, 1, 1) * x, sigma)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    loss, zeros = methods.loss_of(method, flow), torch.zeros(4096, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    assert float(loss(network, zeros, None, generator)) < 1e-6
    assert float(loss(lambda x, sigma: x, zeros, None, generator)) == pytest.approx(64, rel=0.01)


def test_levels():
    """VE's are uniform in log σ from the last level to the first, VP's those of a uniform t."""
    flow, u = flow_of("VE"), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    flat = pfgm.data.digits().train.flatten(1)
    farthest = max(float((flat - row).norm(dim=1).max()) for row in flat)
    assert flow.first_level == pytest.approx(farthest, rel=1e-5)
    levels = methods.trained_level("VE", flow, u)
    middle = math.sqrt(flow.first_level * flow.last_level)
    assert levels.tolist() == pytest.approx([flow.last_level, middle, flow.first_level])
    flow = flow_of("VP")
    levels = methods.trained_level("VP", flow, u)
    # ∫ β dt up to t = ½ of β = 0.1 + 19.9 t.
    middle = math.sqrt(math.expm1(0.1 * 0.5 + 19.9 * 0.5**2 / 2))
    assert levels[1:].tolist() == pytest.approx([middle, flow.first_level], rel=1e-4)
    assert float(levels[0]) == pytest.approx(1e-3, rel=0.01)  # √(β_min ε) at ε = 1e-5
    assert flow.first_level == pytest.approx(152, rel=0.01)  # EDM, section C.3.1
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DDPM's chain
    chain = (1 / (1 - beta).cumprod(0) - 1).sqrt()
    torch.testing.assert_close(methods.vp_sigma(t)[9:], chain[9:], rtol=0.05, atol=0)
    assert flow.last_level == pytest.approx(float(chain[0]), rel=0.06)
    flow = methods.from_pfgm_level(flow_of("PFGM++ 128"), MINIATURE)
    assert flow.first_level == flow_of("PFGM").first_level < flow_of("PFGM++ 128").first_level
    assert flow.D == 128


def test_a_training_that_was_stopped_continues(tmp_path, monkeypatch):
    spec, folders = methods.spec_of(MINIATURE, "EDM", 0), [tmp_path / "whole", tmp_path / "parts"]

    def stop(*_, step):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(methods.pfgm, "save", stop)  # as early weights are written
        with pytest.raises(InterruptedError):
            methods.train(spec, MINIATURE, folders[1])
    assert not methods.is_trained(spec, MINIATURE, folders[1])
    for folder in folders:
        methods.train(spec, MINIATURE, folder)
    for early in (False, True):
        a, b = (
            methods.load(spec, MINIATURE, folder, early=early).network.state_dict()
            for folder in folders
        )
        assert all(torch.equal(a[name], b[name]) for name in a)


class Counted(torch.nn.Module):
    """The exact network of a few images, which counts its evaluations."""

    def __init__(self, flow, images):
        super().__init__()
        self.exact, self.calls = flow.empirical(images), 0

    def forward(self, x, sigma):
        self.calls += 1
        return self.exact(x, sigma)


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_draw_the_data_of_an_exact_network(name):
    pytest.importorskip("diffusers")
    method, sampler = peers.PEERS[name]
    images = pfgm.data.digits().train[:4]
    flow = flow_of(method)
    network = Counted(flow, images)
    loaded = pfgm.training.model_files.Loaded(flow, network)
    samples, nfe = peers.draw(sampler, loaded, 24, 100, seed=0, batch=24)
    assert network.calls == nfe
    distance = pfgm.metrics.nearest_distance(samples, images)
    assert float(distance.max()) < 0.05
    nearest = torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1)
    assert len(nearest.unique()) == 4
    again, _ = peers.draw(sampler, loaded, 24, 100, seed=0, batch=24)
    assert torch.equal(samples, again)


@pytest.mark.parametrize("method", ["PFGM", "PFGM++ 16"])
@pytest.mark.parametrize("steps", [1, 7])
def test_uniform_levels(method, steps):
    flow = flow_of(method)
    levels = step_size.levels(flow, "uniform", steps)
    other = flow.grid(steps, "log")
    assert len(levels) == steps + 1
    assert (levels[0], levels[-1]) == (other[0], other[-1])
    inner = levels if other[-1] > 0 else levels[:-1]
    widths = [a - b for a, b in itertools.pairwise(inner)]
    assert widths == pytest.approx([widths[0]] * len(widths)) if widths else True
    assert inner[-1] == pytest.approx(flow.last_level) or steps == 1
    assert step_size.levels(flow, "rho", steps) == flow.grid(steps, "rho")


def test_quantised_weights_and_noise_on_the_output():
    for bits in (8, 3):
        layer = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(50, 4))
        before = [part.weight.detach().clone() for part in layer]
        dimensions.quantise(layer, bits)
        for part, exact in zip(layer, before, strict=True):
            for row, old in zip(part.weight.detach().flatten(1), exact.flatten(1), strict=True):
                scale = float(old.abs().max()) / (2 ** (bits - 1) - 1)
                assert float((row - old).abs().max()) <= 0.5001 * scale
                assert len(row.unique()) <= 2**bits - 1
                torch.testing.assert_close(row.abs().max(), old.abs().max())
    noisy = dimensions.Noisy(lambda x, noise: x, 0.3, torch.Generator().manual_seed(0))
    output = noisy(torch.full((100, 1, 8, 8), 2.0), torch.zeros(100))
    assert float(output.mean()) == pytest.approx(2, abs=0.01)
    assert float(output.std()) == pytest.approx(0.3, rel=0.05)


def test_variance_of_targets(folder):
    from benchmarks.claims import references

    preset = dataclasses.replace(MINIATURE, probe_rows=64)
    data = measures.data_of(preset)

    def variances(count):
        setting = {"method": "PFGM++ 128", "target": "", "references": count, "seed": 0}
        rows = references.target_variance(preset, folder, None, **setting)
        return [row["variance"] for row in rows]

    single, some, many, all_data = map(variances, (0, 64, 512, len(data.train)))
    assert all_data == [0] * len(all_data)
    assert many[4] < some[4] < single[4]
    # Far from the data the posterior is the data themselves.
    total = float(data.train.var(0).mean()) / data.rms**2
    assert single[-1] == pytest.approx(total, rel=0.1)


def test_bits_of_a_gaussian_are_its_entropy_on_its_own_data(folder):
    from benchmarks.claims import likelihood

    preset = dataclasses.replace(MINIATURE, likelihood_rows=2000)
    train = methods.dequantised(preset).flatten(1).double()
    setting = {"model": "Gaussian", "data": "train", "seed": 0}
    row = likelihood.by_gaussian(preset, folder, None, **setting)
    n, N = train.shape
    nats = 0.5 * (N * math.log(2 * math.pi) + float(train.T.cov().logdet()) + N * (n - 1) / n)
    assert row["bits_per_dim"] == pytest.approx(nats / (N * math.log(2)) + math.log2(17 / 2))


def test_needed_evaluations():
    sde, other = peers.SDE

    def rows(factor):
        """The rows of one seed; ``factor`` makes PFGM worse."""
        for series, known in {
            sde: {100: 2.0, 200: 1.05, 400: 1.0},
            other: {1000: 3.0},
            "PFGM": {5: 1.2 * factor, 10: 1.09 * factor, 20: 0.9 * factor},
            "poor": {10: 1.5},
            "lost": {10: math.nan},
        }.items():
            for evaluations, value in known.items():
                row = {"series": series, "sampler": series, "evaluations": evaluations}
                yield row | {"frechet_pixels": value, "frechet_features": value}

    both = [{**row, "seed": seed} for seed, k in enumerate((1, 1.2)) for row in rows(k)]
    needed = {r["series"]: r for r in quality.needed(both, list(rows(1))) if r["space"] == "pixels"}
    expected = {"best_sde": sde, "evaluations_of_best_sde": 200, "evaluations_to_best_sde": 10}
    expected |= {"evaluations_to_own_best": 20, "fewest_measured": 5, "times_fewer": 20}
    expected |= {"least_times_fewer": 10, "most_times_fewer": 20}
    assert expected.items() <= needed["PFGM"].items()
    for series in ("poor", "lost"):
        never = {"evaluations_to_best_sde": None, "least_times_fewer": None}
        assert never.items() <= needed[series].items()


@pytest.mark.slow
def test_jobs_in_processes_give_the_same_rows(folder, monkeypatch):
    monkeypatch.undo()
    chosen = [jobs.Job("quality", quality.training_data, {"seed": seed}) for seed in (0, 1)]
    results = list(jobs.run_jobs(chosen, MINIATURE, folder, title="t", workers=2))
    assert len(results) == 2
    for job, rows in results:
        assert rows == job.rows(MINIATURE, folder)


def test_stored_measurements_are_not_repeated(tmp_path):
    calls = []

    def measure(preset, folder, spec, value):
        calls.append(value)
        if value == "bad" and calls.count("bad") == 1:
            raise RuntimeError("it is bad")
        return {}

    chosen = [
        jobs.Job("table", measure, {"value": "a"}, cost=3),
        jobs.Job("table", measure, {"value": "bad"}, cost=2),
        jobs.Job("times", measure, {"value": "b"}, alone=True),
    ]
    with pytest.raises(RuntimeError, match="it is bad"):
        jobs.measured_tables(chosen, MINIATURE, tmp_path, title="t", workers=1)
    for _ in range(2):
        tables = jobs.measured_tables(chosen, MINIATURE, tmp_path, title="t", workers=1)
    assert tables == {"table": [{"value": "a"}, {"value": "bad"}], "times": [{"value": "b"}]}
    assert calls == ["a", "bad", "bad", "b", "b"]


def test_figures_are_reproducible(folder, tmp_path):
    """In another folder that already has every other figure. Networks are trained again."""
    examine.examine("weak", CLAIMS["weak"], MINIATURE, folder, command="", workers=1)
    known = json.loads((folder / "measured" / "weak.json").read_text())
    kept = dict(list(known.items())[::2])
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "weak.json").write_text(json.dumps(kept))
    shutil.copyfile(measures.classifier_path(folder), measures.classifier_path(tmp_path))
    examine.examine("weak", CLAIMS["weak"], MINIATURE, tmp_path, command="", workers=1)
    paths = list(folder.glob("weak*.csv"))
    assert len(paths) == 5
    for path in paths:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    examine.copy_results(folder, "weak", tmp_path / "docs")  # without networks
    assert {path.suffix for path in (tmp_path / "docs").iterdir()} == {".json", ".csv", ".png"}


def test_figures_tell_good_samples_from_bad(folder):
    preset, samples = dataclasses.replace(MINIATURE, samples=300), measures.data_of(MINIATURE).train
    good, bad = (measures.figures_of(s * samples[:300], preset, folder) for s in (1, 0.7))
    for space in ("pixels", "features"):
        assert good[f"frechet_{space}"] < bad[f"frechet_{space}"]
        assert good[f"precision_{space}"] > bad[f"precision_{space}"]
    lost = measures.figures_of(samples[:300] / 0, preset, folder)
    assert [*map(math.isnan, lost.values())] == [True] * 6


@pytest.mark.parametrize(
    ("place", "preset", "seeds", "name"),
    [
        *(("claims", "quick", 3, name) for name in CLAIMS),
        *(("claims/fashion-mnist", "cpu", 2, name) for name in ("quality", "step-size", "weak")),
    ],
)
def test_published_figures_are_complete(place, preset, seeds, name):
    folder = ROOT / "docs" / place
    known = json.loads((folder / f"{name}.json").read_text())
    command = f"python -m benchmarks.claims --only {name} --preset {preset} --out DIR"
    assert known["command"] == command
    assert known["preset"] == claim_presets.PRESETS[preset].described()
    assert not known["machine"]["commit"].endswith("-dirty")
    page = (ROOT / "docs" / "claims.md").read_text()
    pictures_of_claim = list(folder.glob(f"{name}*.png"))
    assert any(f"]({place}/{path.name})" in page for path in pictures_of_claim)
    for path in pictures_of_claim:
        assert rows_of(path.with_suffix(".csv"))
    numbers = {row["seed"] for row in rows_of(folder / f"{name}-seeds.csv")}
    assert numbers == {str(seed) for seed in range(seeds)}
