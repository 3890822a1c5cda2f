"""Runs from one configuration."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from pfgm import cli
from pfgm.training import TrainConfig
from pfgm.training.runs import RunConfig, start

SMALL = TrainConfig(
    steps=6, batch_size=16, references=32, warmup=2, learning_rate=1e-3, checkpoint_every=3
)


def run(folder, *, training=SMALL, resume=False, **settings):
    config = RunConfig(**{"width": 16, "samples": 20, **settings}, training=training)
    return start(config, folder, progress=False, report=lambda line: None, resume=resume)


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def test_a_configuration_is_stored_in_its_file(tmp_path):
    config = RunConfig(
        data="x.npy", method="pfgm++", D=64.0, multipliers=(1, 2), training=changed(steps=7)
    )
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == RunConfig.load(tmp_path) == config
    assert RunConfig.of(config.settings, config.training) == config
    (tmp_path / "part.json").write_text('{"method": "edm", "training": {"steps": 5}}')
    assert RunConfig.load(tmp_path / "part.json") == RunConfig(
        method="edm", training=TrainConfig(steps=5)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"methd": "edm"}', "no setting 'methd'; known are D, blocks, data"),
        ('{"training": {"stepz": 5}}', "no setting 'stepz'"),
        ('{"training": {"steps": 0}}', "steps is 0"),
        ('{"method": "vae"}', "method is 'vae'; allowed are pfgm"),
        ('{"D": -1}', "D is -1"),
        ('{"samples": 3}', "samples is 3; allowed are 4 to 10000000"),
        ("[1]", "holds a list where settings"),
        ("{", "is not the configuration of a run"),
    ],
)
def test_bad_configurations(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no configuration"):
        RunConfig.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "UNet"),
        ({"network": "mlp"}, "MLP"),
        ({"multipliers": (1, 1), "blocks": 2}, "UNet"),
        ({"network": "ddpmpp", "width": 8, "multipliers": (1, 2), "blocks": 1}, "DDPMpp"),
        ({"network": "ncsnpp", "width": 8, "multipliers": (1, 1), "method": "edm"}, "Denoiser"),
        ({"method": "pfgm++", "D": 64.0}, "Denoiser"),
        ({"method": "edm", "network": "mlp"}, "Denoiser"),
    ],
)
def test_each_method_trains_and_samples(tmp_path, settings, kind):
    run(tmp_path, **settings)
    flow, network = pfgm.load(tmp_path)
    assert type(network).__name__ == kind
    expected = {"pfgm++": 64.0, "edm": math.inf}.get(settings.get("method"), 1.0)
    assert expected == flow.D
    assert flow.sample(network, 3, steps=3).shape == (3, 1, 8, 8)


def test_hyper_parameters_of_the_flow(tmp_path):
    run(tmp_path, flow={"M": 200, "z_max": 30.0, "gamma": 2.0})
    flow, network = pfgm.load(tmp_path)
    assert (flow.M, flow.z_max, flow.gamma, network.gamma) == (200, 30.0, 2.0, 2.0)
    with pytest.raises(TypeError, match="'zmax'"):
        run(tmp_path / "other", flow={"zmax": 30.0})


def test_a_run_is_resumed_with_its_own_settings(tmp_path):
    run(tmp_path)
    run(tmp_path, resume=True, hold="memory", samples=30, training=changed(steps=8))
    with pytest.raises(ValueError, match=r"data is 'other.npy'; the run in .* has 'digits'"):
        run(tmp_path, resume=True, data="other.npy")
    with pytest.raises(ValueError, match="start several with torchrun"):
        run(tmp_path / "shared", shared=True)


def test_the_single_sample_target(tmp_path):
    run(tmp_path, method="edm", training=changed(references=0))
    with pytest.raises(ValueError, match=r"references is 0.*PoissonFlowPP alone"):
        run(tmp_path / "other", training=changed(references=0))


def test_evaluations_leave_figures_and_pictures(tmp_path):
    run(tmp_path, labels=True, training=changed(evaluate_every=4))
    with (tmp_path / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["4", "6"]
    assert all(float(row["frechet_distance"]) > 0 for row in rows)
    pictures = sorted(path.name for path in tmp_path.glob("samples-*.png"))
    assert pictures == ["samples-00000004.png", "samples-00000006.png"]
    assert pfgm.load(tmp_path).network.config["classes"] == 10


def test_evaluations_do_not_change_the_training(tmp_path):
    plain = run(tmp_path / "plain")
    evaluated = run(tmp_path / "evaluated", training=changed(evaluate_every=2))
    for a, b in zip(plain.parameters(), evaluated.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hold", ["memory", "device"])
def test_data_in_files_with_mirror_images(tmp_path, hold):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    trained = run(tmp_path / hold, data=str(tmp_path / "images.npy"), flips=True, hold=hold)
    other = run(tmp_path / "other", data=str(tmp_path / "images.npy"), flips=True)
    for a, b in zip(trained.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_points_in_the_plane(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(60, 2)))
    run(tmp_path / "run", data=str(tmp_path / "points.npy"), training=changed(evaluate_every=6))
    assert not list((tmp_path / "run").glob("*.png"))
    assert (tmp_path / "run" / "evaluations.csv").exists()
    with pytest.raises(ValueError, match="has no labels"):
        run(tmp_path / "labels", data=str(tmp_path / "points.npy"), labels=True)
    with pytest.raises(ValueError, match=r"allowed for it are square images .* not \(2,\)"):
        run(tmp_path / "net", data=str(tmp_path / "points.npy"), network="ddpmpp")
    with pytest.raises(ValueError, match="blocks is 2, but the network is an mlp"):
        run(tmp_path / "blocks", data=str(tmp_path / "points.npy"), blocks=2)


def test_the_command_starts_from_a_recipe_and_resumes_from_the_folder(tmp_path, capsys):
    recipe = RunConfig(method="edm", width=16, samples=20, training=SMALL)
    recipe.save(tmp_path / "recipe.json")
    out = tmp_path / "run"
    arguments = ["train", "--out", str(out)]
    assert cli.main([*arguments, "--config", str(tmp_path / "recipe.json"), "--steps", "4"]) == 0
    saved = RunConfig.load(out)
    assert saved == dataclasses.replace(recipe, training=changed(steps=4))
    assert cli.main([*arguments, "--resume", "--steps", "8"]) == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert json.loads((out / "latest.json").read_text())["step"] == 8
    assert cli.main([*arguments, "--resume", "--batch-size", "32"]) == 2
    assert "batch_size is 32; the run in" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(tmp_path / "new"), "--resume"]) == 2
    assert "there is no configuration" in capsys.readouterr().err
    assert cli.main([*arguments, "--config", str(tmp_path / "recipe.json")]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_the_recipes_are_configurations():
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.json"))
    assert {recipe.stem for recipe in recipes} == {"cifar10", "cifar10-8gpus", "fashion-mnist"}
    for recipe in recipes:
        RunConfig.load(recipe)
    folder = recipes[0].parent
    one, eight = (RunConfig.load(folder / f"{name}.json") for name in ("cifar10", "cifar10-8gpus"))
    assert one.flow == {"M": 291, "z_max": 40.0, "upper_norm": 3000.0}
    assert (one.network, one.training.batch_size, one.training.references) == ("ddpmpp", 128, 4096)
    assert eight == dataclasses.replace(one, blocks=8)
    assert eight.training.batch_size % 8 == 0


def test_levels_are_fitted_once_and_kept_when_the_run_is_resumed(tmp_path, monkeypatch):
    rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "x.npy", rows)
    settings = {"data": str(tmp_path / "x.npy"), "fit_levels": (2, 3)}
    run(tmp_path / "run", **settings)
    levels = pfgm.load(tmp_path / "run").flow.fitted_levels
    assert {solver: sorted(found) for solver, found in levels.items()} == {"multistep": [2, 3]}
    monkeypatch.setattr(pfgm.PoissonFlow, "fit_levels", None)
    run(tmp_path / "run", training=changed(steps=8), resume=True, **settings)
    assert pfgm.load(tmp_path / "run").flow.fitted_levels == levels
    with pytest.raises(ValueError, match=r"fit_levels is \(2,\); the run in"):
        run(tmp_path / "run", resume=True, **{**settings, "fit_levels": (2,)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit_levels": (0,)}, "fit_levels is 0"),
        ({"fit_levels": (500,)}, "fit_levels is 500; allowed are at most 100"),
        ({"fit_levels": (5,), "teacher": "x"}, "both fit_levels and teacher"),
    ],
)
def test_levels_that_cannot_be_fitted(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)
