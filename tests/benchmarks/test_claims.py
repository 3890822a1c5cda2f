"""benchmarks/claims: every claim in miniature, and its parts."""

import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pfgm
from benchmarks.claims import __main__ as command_line
from benchmarks.claims import (
    dimensions,
    examine,
    jobs,
    measures,
    methods,
    peers,
    pictures,
    quality,
    step_size,
)
from benchmarks.claims import presets as claim_presets
from benchmarks.claims.registry import CLAIMS
from benchmarks.common import rows as row_tools

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


def test_training_runs_once_and_continues_after_a_stop(tmp_path):
    first, *others = (
        [
            *methods.network_of(
                methods.spec_of(MINIATURE, name, 0), MINIATURE, flow_of(name)
            ).parameters()
        ]
        for name in MINIATURE.methods
    )  # which share the backbone
    for parameters in others:
        assert all(torch.equal(a, b) for a, b in zip(parameters, first, strict=True))
    spec = methods.spec_of(MINIATURE, "EDM", 0)
    methods.train(spec, MINIATURE, tmp_path / "whole")
    run = methods.run_of(tmp_path / "whole", spec)
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert methods.is_trained(spec, MINIATURE, tmp_path / "whole")
    methods.train(spec, MINIATURE, tmp_path / "whole")
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert "early.safetensors" in before

    class Stopped(Exception):
        pass

    def stop(*_, step):
        raise Stopped

    again = methods.run_of(tmp_path / "parts", spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.pfgm, "save", stop)  # as early weights are written
        with pytest.raises(Stopped):
            methods.train(spec, MINIATURE, tmp_path / "parts")
    assert not (again / "early.safetensors").exists()
    assert not methods.is_trained(spec, MINIATURE, tmp_path / "parts")
    methods.train(spec, MINIATURE, tmp_path / "parts")
    for early in (False, True):
        a, b = (
            methods.load(spec, MINIATURE, tmp_path / name, early=early).network.state_dict()
            for name in ("whole", "parts")
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


@pytest.mark.parametrize("method", ["PFGM", "PFGM++ 16", "VE"])
@pytest.mark.parametrize("steps", [1, 2, 7])
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


def test_ratios(tmp_path):
    rows = [
        {"D": D, "seed": n, "f": f}
        for D, n, f in ((1, 0, 2.0), (1, 1, 4.0), (2, 0, 1.0), (2, 1, 1.0))
    ]
    ratios = row_tools.relative(rows, ["f"], ["seed"], lambda row: row["D"] == 2)
    means = row_tools.over_seeds(ratios, ["D"], ["f"])
    row_tools.write_csv(tmp_path / "f.csv", means)
    assert (tmp_path / "f.csv").read_text() == "D,f,f_spread\n1,3,1.41421\n2,1,0\n"


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


def test_pictures_are_saved_with_their_data(tmp_path):
    rows = [
        {"name": "a", "D": D, "f": f, "f_spread": 0.1}
        for D, f in ((1, 2.0), (64, 1.0), (math.inf, 1.5), (2, math.nan))
    ]
    words = {"xlabel": "D", "ylabel": "f", "title": "t"}
    pictures.curves(rows, "name", "D", "f", tmp_path / "f.png", **words)
    assert [row["D"] for row in rows_of(tmp_path / "f.csv")] == ["1", "64", "inf"]
    assert (tmp_path / "f.png").exists()
    pictures.curves(rows[-1:], "name", "D", "f", tmp_path / "f.png", **words)
    assert not (tmp_path / "f.png").exists()
    values = [
        {"method": "PFGM", "network": "full", "f": 1.0, "f_spread": 0.1},
        {"method": "PFGM", "network": "half", "f": 2.0},
        {"method": "EDM", "network": "full", "f": 1.5, "f_spread": 0.2},
    ]
    pictures.bars(values, "method", "network", "f", tmp_path / "b.png", "f", "t")
    assert [row["value"] for row in rows_of(tmp_path / "b.csv")] == ["1", "2", "1.5"]
    assert (tmp_path / "b.png").exists()


def test_the_classifier_learns_once(tmp_path):
    preset = dataclasses.replace(MINIATURE, classifier_epochs=4)
    written = set()
    for _ in range(2):
        examine.prepare(preset, tmp_path, 1)
        written.add(measures.classifier_path(tmp_path).stat().st_mtime_ns)
    assert len(written) == 1
    assert measures.accuracy(preset, tmp_path) > 0.85


@pytest.mark.slow
def test_jobs_in_processes_give_the_same_rows(folder, monkeypatch):
    monkeypatch.undo()
    chosen = [jobs.Job("quality", quality.training_data, {"seed": seed}) for seed in (0, 1)]
    results = list(jobs.run_jobs(chosen, MINIATURE, folder, title="t", workers=2))
    assert len(results) == 2
    for job, rows in results:
        assert rows == job.rows(MINIATURE, folder)


@pytest.mark.slow
def test_an_error_in_a_process_ends_the_run(folder, monkeypatch):
    monkeypatch.undo()
    spec = methods.spec_of(MINIATURE, "VP", 0)
    setting = {"series": "no such sampler", "setting": 1, "seed": 0}
    methods.train(spec, MINIATURE, folder)
    chosen = [jobs.Job("quality", quality.by_peer, setting, spec)]
    with pytest.raises(KeyError, match="no such sampler"):
        list(jobs.run_jobs(chosen, MINIATURE, folder, title="t", workers=1))


LONG = """
import dataclasses
from pathlib import Path
from benchmarks.claims import examine, presets, quality

preset = dataclasses.replace(presets.PRESETS["quick"], width=8, seeds=(0,), steps=2000)
examine.train(quality.CLAIM, preset, Path(FOLDER), "quality", 1)
"""


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_checkpoints_and_no_processes(tmp_path):
    program = LONG.replace("FOLDER", repr(str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    # In a session of its own, so that processes that it leaves can be found.
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        logs = tmp_path / "networks"
        until = time.monotonic() + 120
        while not list(logs.glob("*/log.csv")) and time.monotonic() < until:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    (latest,) = logs.glob("*/latest.json")
    assert 0 < json.loads(latest.read_text())["step"] < 500
    for _ in range(50):  # multiprocessing's resource tracker ends last
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a process was left")


def test_the_command_says_what_it_allows(tmp_path, capsys, monkeypatch):
    def says(status, said, *arguments, out=tmp_path / "out"):
        try:
            code = command_line.main(["--out", str(out), *arguments])
        except SystemExit as ended:  # of argparse
            code = ended.code
        assert code == status
        shown = capsys.readouterr()
        assert said in shown.out + shown.err

    says(0, "usage: python -m benchmarks.claims", "--help")
    says(2, "invalid choice: 'fid'", "--only", "fid")
    says(2, "--workers must be at least 1, got 0.", "--workers", "0")
    says(2, "error: no-such.npz does not exist.", "--data", "no-such.npz")
    for _ in range(2):
        examine.keep_preset(MINIATURE, tmp_path)
    says(2, "other settings", out=tmp_path)
    find = importlib.util.find_spec
    absent = lambda name: None if name == "diffusers" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    says(2, "error: diffusers is not installed")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(command_line, "prepare", lambda *_: sys.exit())
    for chosen, expected in (("", "native"), ("torch", "torch")):  # a named backend is kept
        monkeypatch.setenv("PFGM_BACKEND", chosen)
        with pytest.raises(SystemExit):
            command_line.run(SimpleNamespace(workers=1), MINIATURE, tmp_path)
        assert os.environ["PFGM_BACKEND"] == expected


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


def test_bytes_are_data_too(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def images(n):
        return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)

    rows = {"images": images(20), "test": images(9)}
    labels = {"labels": torch.arange(20) % 3, "test_labels": torch.arange(9) % 3}
    np.savez(tmp_path / "d.npz", **{k: v.numpy() for k, v in (rows | labels).items()})
    preset = dataclasses.replace(MINIATURE, data=str(tmp_path / "d.npz"))
    data = measures.data_of(preset)
    torch.testing.assert_close(data.held_out, rows["test"].float() / 127.5 - 1)
    noisy = methods.dequantised(preset)
    levels = ((noisy + 1) * 128).floor()
    assert data.grey_levels == 256
    assert torch.equal(levels, rows["images"].float())


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
