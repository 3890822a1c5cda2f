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
def test_stored_rows_are_those_of_the_settings(monkeypatch, capsys, name):
    """So that nothing is measured, and all are shown; "flows" also has rates that were not best."""
    module = importlib.import_module(f"benchmarks.studies.{name}")
    monkeypatch.setattr(sys, "argv", [name, *OPTIONS.get(name, [])])
    monkeypatch.setenv("PFGM_BACKEND", "")
    monkeypatch.setattr(machine, "RESULTS", None)
    threads = torch.get_num_threads()
    study.run(module.STUDY, module.__doc__)
    torch.set_num_threads(threads)
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
    small = {"SEARCHED": 2, "RATES": (1.0, 3.0), "SAMPLES": 40, "EVALUATIONS": (10,)}
    for name, value in small.items():
        monkeypatch.setattr(flows, name, value)
    monkeypatch.setattr(flows, "STEPS", {"digits": (1, 2, 3)})
    monkeypatch.setattr(flows, "FLOWS", ("EDM",))
    monkeypatch.setattr(sys, "argv", ["flows", "--data", "digits", "--out", str(tmp_path / "runs")])
    return tmp_path


def test_the_study_of_flows_chooses_rates_and_measures_on(small, monkeypatch):
    threads = torch.get_num_threads()
    study.run(flows.STUDY, flows.__doc__)
    torch.set_num_threads(threads)
    known = study.known_rows("flows")
    runs = [(r["steps"], r["rate"], r["seed"]) for r in known if r["flow"] == "EDM"]
    tried = {run: r["10"]["features"] for run, r in zip(runs, known[1:5], strict=False)}
    one, two = (min((n, 1, 0), (n, 3, 0), key=tried.__getitem__)[1] for n in (1, 2))
    searched = [(1, 1, 0), (1, 3, 0), (2, 1, 0), (2, 3, 0)]
    assert runs == [*searched, (1, one, 1), (2, two, 1), (3, two, 0), (3, two, 1)]
    monkeypatch.setattr(flows, "measure", None)
    study.run(flows.STUDY, flows.__doc__)  # all rows are known


def test_ot_cfm_of_exact_velocities_draws_the_data():
    """Every sampler of OT-CFM with the exact velocity of a few images."""
    images = flows.images_of("digits").train[:4]
    flow, _ = flows.flow_and_network("OT-CFM", images, 0)
    network = as_denoiser(PoissonFlowMatcher(references=images).velocity)
    for options in flows.samplers(flow, "OT-CFM", 20).values():
        samples = flow.sample(network, 8, generator=torch.Generator().manual_seed(0), **options)
        assert float(torch.cdist(samples.flatten(1), images.flatten(1)).amin(1).max()) < 0.05


@pytest.mark.slow  # the import of torchcfm takes seconds
def test_the_loss_of_ot_cfm_is_0_at_the_exact_velocity():
    """Of one image, whose velocity does not depend on the coupling."""
    pytest.importorskip("torchcfm")
    image = flows.images_of("digits").train[:1]
    velocity = PoissonFlowMatcher(references=image).velocity
    generator, labels = torch.Generator().manual_seed(0), torch.zeros(16, dtype=torch.long)
    arguments = image.expand(16, -1, -1, -1), None, generator
    networks = (lambda t, x, labels: velocity(t, x), 0, 1e-4), (lambda t, x, labels: 0 * x, 0.5, 5)
    for network, at_least, at_most in networks:
        net = as_denoiser(network)
        loss = flows.matching_loss(net, *arguments, condition={"labels": labels})
        assert at_least <= float(loss) < at_most


def test_both_samplers_of_exact_velocities_draw_the_data(monkeypatch):
    monkeypatch.setattr(flow_matching, "SAMPLES", 8)
    images = flows.images_of("digits").train[:4]
    velocity = PoissonFlowMatcher(references=images).velocity
    noise = torch.randn(8, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    for samples in (
        flow_matching.by_euler(velocity, noise, 20),
        flow_matching.by_multistep(velocity, tuple(images.shape[1:]), 20, seed=0),
    ):
        assert float(torch.cdist(samples.flatten(1), images.flatten(1)).amin(1).max()) < 0.05


def test_the_loss_of_flow_matching_is_0_at_the_exact_velocity():
    """Of one image, where the velocity at a point is that of its only line."""
    torch.manual_seed(0)
    image = flows.images_of("digits").train[:1]
    velocity = PoissonFlowMatcher(references=image).velocity
    for network, at_least, at_most in ((velocity, 0, 1e-4), (lambda t, x: 0 * x, 0.5, 5)):
        assert (
            at_least <= float(flow_matching.loss(network, image.expand(16, -1, -1, -1))) < at_most
        )


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
