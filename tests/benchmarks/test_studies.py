"""benchmarks/studies: the harness, and the study of flows in miniature."""

import argparse
import importlib
import json
import os
import pkgutil
import sys

import pytest
import torch

from benchmarks import studies
from benchmarks.common import machine, study
from benchmarks.studies import budget, flow_matching, flows, scaling
from pfgm.integrations.flow_matching import PoissonFlowMatcher, as_denoiser
from pfgm.training import budget as fit

STUDIES = sorted(module.name for module in pkgutil.iter_modules(studies.__path__))


@pytest.fixture
def results(monkeypatch, tmp_path):
    for module in (machine, study):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


OPTIONS = {"fitted_levels": ["digits-pfgm", "--model", "none", "--steps", "5"]}


@pytest.mark.parametrize("name", STUDIES)
def test_stored_rows_are_those_of_the_settings(monkeypatch, capsys, threads, name):
    """So that nothing is measured, and all are shown; "flows" also has rates that were not best."""
    module = importlib.import_module(f"benchmarks.studies.{name}")
    monkeypatch.setattr(sys, "argv", [name, *OPTIONS.get(name, [])])
    monkeypatch.setenv("PFGM_BACKEND", "")
    monkeypatch.setattr(machine, "RESULTS", None)
    study.run(module.STUDY, module.__doc__)
    assert capsys.readouterr().out.startswith("| ")
    assert (os.environ["PFGM_BACKEND"], module.STUDY.name) == ("native", name)


def test_minutes_are_fitted_to_the_rows_of_their_study():
    stored = study.known_rows("budget")
    assert fit.read_rows() == budget.rows_of_the_fit(stored)
    assert len(stored) > 30


def test_rows_are_measured_once_and_survive_a_failure(results):
    calls = []

    def measure(n):
        calls.append(n)
        if n == 3 and calls.count(3) == 1:
            raise RuntimeError("it is bad")
        return {"square": n * n}

    settings = [{"n": n} for n in (1, 3, 2)]
    with pytest.raises(RuntimeError, match="it is bad"):
        study.measured("s", settings, measure)
    assert study.known_rows("s") == [{"n": 1, "square": 1}]
    expected = [{"n": n, "square": n * n} for n in (1, 3, 2)]
    assert study.measured("s", settings, measure) == expected == study.known_rows("s")
    assert calls == [1, 3, 3, 2]
    study.measured("s", settings[1:2], lambda n: {"square": 0}, again=True)
    assert [row["square"] for row in study.known_rows("s")] == [1, 0, 4]
    assert json.loads((results / "s.json").read_text())["machine"]["threads"]


@pytest.fixture
def small(monkeypatch, results, tmp_path):
    """The study of flows with EDM alone, 1 to 3 steps, and two rates."""
    small = {"STEPS": {"digits": (1, 2, 3)}, "FLOWS": ("EDM",)}
    small |= {"SEARCHED": 2, "RATES": (1.0, 3.0), "SAMPLES": 40, "EVALUATIONS": (10,)}
    for name, value in small.items():
        monkeypatch.setattr(flows, name, value)
    monkeypatch.setattr(sys, "argv", ["flows", "--data", "digits", "--out", str(tmp_path / "runs")])


def test_the_study_of_flows_chooses_rates_and_measures_on(small, monkeypatch, threads):
    study.run(flows.STUDY, flows.__doc__)
    known = study.known_rows("flows")
    runs = [(r["steps"], r["rate"], r["seed"]) for r in known if r["flow"] == "EDM"]
    tried = {run: r["10"]["features"] for run, r in zip(runs, known[1:5], strict=False)}
    one, two = (min((n, 1, 0), (n, 3, 0), key=tried.__getitem__)[1] for n in (1, 2))
    searched = [(1, 1, 0), (1, 3, 0), (2, 1, 0), (2, 3, 0)]
    assert runs == [*searched, (1, one, 1), (2, two, 1), (3, two, 0), (3, two, 1)]
    monkeypatch.setattr(flows, "measure", None)
    study.run(flows.STUDY, flows.__doc__)  # all rows are known


def exact_velocity(count):
    """A few images, and the velocity of flow matching toward them."""
    images = flows.images_of("digits").train[:count]
    return images, PoissonFlowMatcher(references=images).velocity


def test_every_sampler_of_an_exact_velocity_draws_the_data(monkeypatch):
    """Those of OT-CFM, and both of flow matching."""
    monkeypatch.setattr(flow_matching, "SAMPLES", 8)
    images, velocity = exact_velocity(4)
    flow, _ = flows.flow_and_network("OT-CFM", images, 0)
    drawn = [
        flow.sample(as_denoiser(velocity), 8, generator=torch.Generator().manual_seed(0), **options)
        for options in flows.samplers(flow, "OT-CFM", 20).values()
    ]
    noise = torch.randn(8, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    drawn.append(flow_matching.by_euler(velocity, noise, 20))
    drawn.append(flow_matching.by_multistep(velocity, tuple(images.shape[1:]), 20, seed=0))
    for samples in drawn:
        assert float(torch.cdist(samples.flatten(1), images.flatten(1)).amin(1).max()) < 0.05


def ot_cfm_loss(network, images):
    pytest.importorskip("torchcfm")
    condition = {"labels": torch.zeros(len(images), dtype=torch.long)}
    draw = torch.Generator().manual_seed(0)
    return flows.matching_loss(as_denoiser(network), images, None, draw, condition=condition)


@pytest.mark.parametrize(
    "loss",
    [flow_matching.loss, pytest.param(ot_cfm_loss, marks=pytest.mark.slow)],  # imports torchcfm
)
def test_the_loss_is_0_at_the_exact_velocity(loss):
    """Of one image, whose velocity at a point is that of its only line."""
    torch.manual_seed(0)
    image, velocity = exact_velocity(1)
    images = image.expand(16, -1, -1, -1)
    assert 0 <= float(loss(lambda t, x, labels=None: velocity(t, x), images)) < 1e-4
    assert 0.5 <= float(loss(lambda t, x, labels=None: 0 * x, images)) < 5


SHARED = [row for row in study.known_rows("scaling") if row.get("processes", 0) > 1]


@pytest.mark.parametrize("row", SHARED, ids=lambda row: f"{row['processes']} processes")
@pytest.mark.parametrize("operation", scaling.OPERATIONS)
def test_the_bytes_of_a_call_are_those_of_the_formula(row, operation):
    """What was given to torch.distributed, and what the system then sent, with its headers."""
    given = scaling.bytes_given(scaling.POINTS[-1], 784, row["processes"], operation)
    assert row[operation]["bytes given"] == given
    sent = scaling.bytes_sent(given, row["processes"])
    assert sent <= row[operation]["bytes sent"] < 1.1 * sent


@pytest.mark.slow  # starts processes
def test_processes_and_files_in_miniature(monkeypatch, tmp_path):
    monkeypatch.setenv("PFGM_BACKEND", "native")
    images = torch.arange(60 * 784, dtype=torch.float64).mul(0.7).sin().mul(127.5).add(127.5).byte()
    monkeypatch.setattr(scaling, "fashion_mnist", lambda: images.view(60, 784))
    monkeypatch.setattr(scaling, "POINTS", (4, 8))
    options = argparse.Namespace(folder=tmp_path)
    row = scaling.measure(options, processes=2)
    for operation in scaling.OPERATIONS:
        assert row[operation]["bytes given"] == scaling.bytes_given(8, 784, 2, operation)
    row = scaling.measure(options, rows=2000, size=8, points=4)
    assert row["values"] == 192
    assert row["gigabytes"] == pytest.approx(2000 * 192 / 1e9, rel=1e-3)
    assert not list(tmp_path.iterdir())
