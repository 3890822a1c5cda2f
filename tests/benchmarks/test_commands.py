"""Commands that measure name the backend that computes."""

import importlib
import json
import os
import pkgutil
import sys
from types import SimpleNamespace

import pytest

from benchmarks import studies
from benchmarks.claims import __main__ as claims
from benchmarks.claims.presets import PRESETS
from benchmarks.common.folders import RESULTS
from benchmarks.studies import weighting
from pfgm.cli import demo

STUDIES = {module.name for module in pkgutil.iter_modules(studies.__path__)}


def stop(*arguments, **options):
    raise SystemExit


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_a_study_names_its_backend(monkeypatch, name):
    monkeypatch.setenv("PFGM_BACKEND", "")
    monkeypatch.setattr(demo, "run", stop)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.studies.{name}").main()
    assert os.environ["PFGM_BACKEND"] == "native"


@pytest.mark.parametrize(
    ("preset", "chosen", "expected"),
    [("quick", "", "native"), ("gpu", "", "torch"), ("gpu", "triton", "triton")],
)
def test_claims_name_their_backend(monkeypatch, tmp_path, preset, chosen, expected):
    monkeypatch.setenv("PFGM_BACKEND", chosen)
    monkeypatch.setattr(claims.torch, "use_deterministic_algorithms", lambda *a, **o: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(claims, "prepare", stop)
    with pytest.raises(SystemExit):
        claims.run(SimpleNamespace(workers=1), PRESETS[preset], tmp_path)
    assert os.environ["PFGM_BACKEND"] == expected


def test_means_over_the_seeds_are_those_that_are_stored():
    result = json.loads((RESULTS / "weighting.json").read_text())["result"]
    means = {(row["method"], row["labels"]): row for row in weighting.means(result["rows"])}
    assert len(means) == len(result["means"])
    for row in result["means"]:
        row.pop("seeds")
        assert means[row["method"], row["labels"]] == pytest.approx(row)
