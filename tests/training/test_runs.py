"""Runs from one configuration."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from pfgm import cli, metrics
from pfgm.metrics import distances
from pfgm.training import TrainConfig
from pfgm.training.checks import warn_of_range, warn_of_scales
from pfgm.training.runs import RunConfig, start

SMALL = TrainConfig(
    steps=6,
    batch_size=16,
    reference_batch=32,
    warmup=2,
    learning_rate=1e-3,
    checkpoint_every=3,
    precision="float32",
)


def run(folder, *, training=SMALL, resume=False, report=lambda line: None, **settings):
    config = RunConfig(**{"width": 16, "samples": 20, **settings}, training=training)
    return start(config, folder, progress=False, report=report, resume=resume)


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def test_a_configuration_is_stored_in_its_file(tmp_path):
    config = RunConfig(
        data="x.npy", method="pfgm++", D=64.0, multipliers=(1, 2), training=changed(steps=7)
    )
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == RunConfig.load(tmp_path) == config
    (tmp_path / "part.json").write_text('{"method": "edm", "training": {"steps": 5}}')
    assert RunConfig.load(tmp_path / "part.json") == RunConfig(
        method="edm", training=TrainConfig(steps=5)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"methd": "edm"}', "no setting 'methd'; known are D, blocks, data"),
        ('{"training": {"stepz": 5}}', "no setting 'stepz'"),
        ('{"method": "vae"}', r"method must be one of auto, pfgm, pfgm\+\+, edm, got 'vae'\."),
        ('{"data": 5}', r"data must be a text, a name or a path, got 5\."),
        ('{"init": {}}', r"init must be a text, a name or a path, got \{\}\."),
        ('{"teacher": ""}', r"teacher must name a file or a folder, got ''; leave it out\."),
        ('{"flow": null}', r"flow must be a dict of hyper-parameters and.*got None\."),
        ('{"flow": {"nope": 1}}', r"names in flow must be among M, center,.*got 'nope'\."),
        ('{"method": "edm", "flow": {"M": 9}}', r"names in flow must be among.*got 'M'\."),
        ('{"fit_levels": 5}', r"fit_levels must be a list of numbers of steps, got 5\."),
        ('{"training": {"clip": null}}', r"clip must be a number above 0, got None\."),
        ('{"training": {"ema": "0.9"}}', r"ema must be at least 0 and below 1, got '0\.9'\."),
        ('{"training": {"ema": 1.0}}', r"ema must be at least 0 and below 1, got 1\.0\."),
        ('{"training": {"reference_batch": 64}}', r"reference_batch must be at least.*size\."),
        ('{"training": {"minutes": 0}}', r"minutes must be a number above 0 .* got 0\."),
        ('{"training": {"minutes": Infinity}}', r"minutes must be a number .* got inf\."),
        ('{"training": {"steps": 5, "minutes": 3}}', "only one of steps and minutes may be given"),
        ('{"D": -1}', r"D must be a positive number, got -1\."),
        ('{"D": "128"}', r"D must be a positive number, got '128'\."),
        ('{"range": [0, 1, 2]}', r"range must be two numbers, the lower.*got \[0, 1, 2\]\."),
        ('{"range": 1}', r"range must be two numbers, the lower first, got 1\."),
        ('{"range": [0, "1"]}', r"range must be two numbers, the lower first, got \[0, '1'\]\."),
        ('{"range": [1, 0]}', r"range must be two numbers, the lower first, got \[1, 0\]\."),
        ('{"fit_levels": [0]}', r"fit_levels must be an integer of at least 1.*got 0\."),
        ('{"fit_levels": [500]}', "fit_levels must be at.*got 500: with more, the sch"),
        ('{"fit_levels": [5], "teacher": "x"}', "only one of.*got both: the solver"),
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
        ({"multipliers": (1, 1), "blocks": 2, "patch": 2}, "UNet"),
        ({"network": "ddpmpp", "width": 8, "multipliers": (1, 2), "blocks": 1}, "DDPMpp"),
        ({"network": "ncsnpp", "width": 8, "multipliers": (1, 1), "method": "edm"}, "Denoiser"),
        ({"method": "pfgm++", "D": 64.0}, "Denoiser"),
        # The target of single samples.
        ({"method": "edm", "network": "mlp", "training": changed(reference_batch=0)}, "Denoiser"),
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
    run(tmp_path, network="mlp", flow={"M": 200, "z_max": 30.0, "gamma": 2.0})
    flow, network = pfgm.load(tmp_path)
    assert (flow.M, flow.z_max, flow.gamma, network.gamma) == (200, 30.0, 2.0, 2.0)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The folder of a run on digits."""
    folder = tmp_path_factory.mktemp("earlier")
    run(folder)
    return folder


@pytest.fixture
def started(earlier, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(earlier, tmp_path / "started")


def test_a_run_is_resumed_with_its_own_settings(started):
    run(started, resume=True, hold="memory", samples=30, training=changed(steps=8))
    with pytest.raises(ValueError, match=r"data is 'other.npy'; the run in .* has 'digits'"):
        run(started, resume=True, data="other.npy")
    with pytest.raises(ValueError, match="start several with torchrun"):
        run(started.parent / "shared", shared=True)


def test_a_run_from_before_there_were_layouts_reads_images(tmp_path):
    path = tmp_path / "config.json"
    RunConfig(data=str(tmp_path / "grey.npy")).save(path)
    content = json.loads(path.read_text())
    del content["layout"], content["resize"]
    path.write_text(json.dumps(content))
    assert RunConfig.load(tmp_path).layout == "images"
    assert RunConfig.load(path).layout == "auto"  # a recipe
    assert RunConfig.load(tmp_path).reading == {
        "value_range": None,
        "layout": "images",
        "resize": None,
        "label_column": "",
        "drop_missing": False,
        "drop_columns": (),
        "header": True,
    }


def test_a_run_without_a_weighting_goes_on_with_the_published_one(tmp_path):
    losses = {}
    for weighting in ("auto", "balanced", "published"):
        run(tmp_path / weighting, network="mlp", weighting=weighting)
        losses[weighting] = (tmp_path / weighting / "log.csv").read_text().splitlines()[-1]
    loss = {name: float(line.split(",")[1]) for name, line in losses.items()}
    assert loss["auto"] == loss["balanced"] > loss["published"]
    path = tmp_path / "published" / "config.json"
    content = json.loads(path.read_text())
    del content["weighting"]
    path.write_text(json.dumps(content))
    assert RunConfig.load(tmp_path / "published").weighting == "published"
    assert RunConfig.load(path).weighting == "auto"  # a recipe
    with pytest.raises(ValueError, match="weighting is 'balanced'; the run in"):
        run(tmp_path / "published", resume=True, weighting="balanced")
    for method in ("pfgm", "edm"):
        with pytest.raises(
            ValueError, match=rf"method must be pfgm\+\+ with D = 64, got '{method}'"
        ):
            RunConfig(method=method, D=64.0)
    RunConfig(method="edm", D=math.inf)
    with pytest.raises(ValueError, match=r"weighting must be auto with.*got 'balanced'\."):
        RunConfig(method="edm", weighting="balanced")


def test_a_run_says_what_it_trains_on_what_and_what_it_writes(tmp_path):
    lines, training = [], TrainConfig(steps=2, batch_size=16, reference_batch=32)
    run(tmp_path / "run", training=training, report=lines.append)
    shown = " ".join(" ".join(lines).split())
    for part in (
        "digits: 1398 rows of shape (1, 8, 8), float32, values -1 to 1, labels 0 to 9, which",
        "flow PFGM, the default for images and signals (--method)",
        "UNet with 105,826 parameters on cpu",
        "2 steps of 16 samples against 32 references, learning rate 0.006 (warm-up 0 steps",
        "decay cosine), weights averaged with decay 0, in ",
        f"{tmp_path / 'run'}: config.json, a checkpoint every 100 steps and at the end, log.csv",
    ):
        assert part in shown


def test_evaluations_leave_figures_and_pictures_and_do_not_change_the_training(
    tmp_path, earlier, monkeypatch
):
    found, compared = [], []

    def neighbour_distances(real, *arguments, **options):
        found.append(real)
        return distances.neighbour_distances(real, *arguments, **options)

    def precision_recall(*arguments, neighbours):
        figures = distances.precision_recall(*arguments, neighbours=neighbours)
        assert figures == distances.precision_recall(*arguments)
        compared.append(figures)
        return figures

    monkeypatch.setattr(metrics, "neighbour_distances", neighbour_distances)
    monkeypatch.setattr(metrics, "precision_recall", precision_recall)
    evaluated = run(tmp_path, training=changed(evaluate_every=4))
    plain = pfgm.load(earlier).network
    assert all(map(torch.equal, plain.parameters(), evaluated.parameters()))
    with (tmp_path / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["4", "6"]
    assert all(float(row["frechet_distance"]) > 0 for row in rows)
    assert [(float(row["precision"]), float(row["recall"])) for row in rows] == compared
    assert len(found) == 1  # once a run
    pictures = sorted(path.name for path in tmp_path.glob("samples-*.png"))
    assert pictures == ["samples-00000004.png", "samples-00000006.png"]


@pytest.mark.parametrize("hold", ["memory", "device"])
def test_data_in_files_with_mirror_images(tmp_path, hold):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    lines, images = [], {"data": str(tmp_path / "images.npy"), "flips": True}
    trained = run(tmp_path / hold, hold=hold, **images)
    other = run(tmp_path / "other", report=lines.append, **images)
    assert "80 rows of shape (1, 8, 8), half of them mirror images, bytes, " in lines[0]
    for a, b in zip(trained.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "flow"),
    [(19_999, "PFGM, the default for images and signals"), (20_000, "PFGM++ with D = 128, the")],
)
def test_the_number_of_images_chooses_the_flow(tmp_path, count, flow):
    np.save(tmp_path / "images.npy", np.arange(count * 16, dtype=np.uint8).reshape(-1, 4, 4))
    lines, images = [], {"data": str(tmp_path / "images.npy"), "samples": 4}
    training = changed(steps=1, reference_batch=16)
    run(tmp_path / "run", training=training, report=lines.append, **images)
    assert flow in " ".join(lines[0].split())


def test_points_have_evaluations_and_no_pictures(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(60, 2)))
    run(tmp_path / "run", data=str(tmp_path / "points.npy"), training=changed(evaluate_every=6))
    assert not list((tmp_path / "run").glob("*.png"))
    assert (tmp_path / "run" / "evaluations.csv").exists()


def test_data_settings_and_earlier_weights_choose_the_flow(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(60, 2)))
    points, lines = {"data": str(tmp_path / "points.npy")}, []
    run(tmp_path / "auto", report=lines.append, **points)
    assert "PFGM++ with D = 128, the default for rows of numbers (--method)" in lines[0]
    assert RunConfig.load(tmp_path / "auto").method == "pfgm++"
    run(tmp_path / "auto", **points, resume=True, training=changed(steps=8))
    for settings, expected in (
        ({"method": "pfgm"}, pfgm.PoissonFlow),
        ({"flow": {"M": 9}}, pfgm.PoissonFlow),
        ({"weighting": "published"}, pfgm.PoissonFlow),
        ({"D": 7}, 7),
        ({"method": "edm"}, math.inf),
    ):
        run(tmp_path / "first", **points, **settings)
        run(tmp_path / "second", **{**points, "init": str(tmp_path / "first"), "width": None})
        for name in ("first", "second"):
            flow = pfgm.load(tmp_path / name).flow
            assert expected in (type(flow), getattr(flow, "D", None))
            shutil.rmtree(tmp_path / name)


def test_the_command_starts_from_a_recipe_and_resumes_from_the_folder(tmp_path, capsys):
    recipe = RunConfig(method="edm", width=16, samples=20, training=SMALL)
    recipe.save(tmp_path / "recipe.json")
    out = tmp_path / "run"
    arguments = ["train", "--out", str(out)]
    assert cli.main([*arguments, "--config", str(tmp_path / "recipe.json"), "--steps", "4"]) == 0
    saved = RunConfig.load(out)
    assert saved == dataclasses.replace(recipe, training=changed(steps=4).resolved())
    assert cli.main([*arguments, "--resume", "--steps", "8"]) == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert json.loads((out / "latest.json").read_text())["step"] == 8
    longer = dataclasses.replace(saved.training, steps=8)  # and the same warm-up, decay, …
    assert RunConfig.load(out).training == longer
    assert cli.main([*arguments, "--resume", "--batch-size", "32"]) == 2
    assert "batch_size is 32; the run in" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(tmp_path / "new"), "--resume"]) == 2
    assert "there is no configuration" in capsys.readouterr().err
    assert cli.main([*arguments, "--config", str(tmp_path / "recipe.json")]) == 2
    assert "holds a run already" in capsys.readouterr().err


def images_of(tmp_path, low, high, name="images.npy", shape=(40, 1, 8, 8), dtype=np.float32):
    draw = np.random.default_rng(0).random(shape, dtype=np.float32)
    images = (low + (high - low) * draw).astype(dtype)
    images.flat[0], images.flat[1] = low, high
    np.save(tmp_path / name, images)
    return tmp_path / name


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [
        (0, 255, r"from 0 to 255, .* --range 0 255 on the command line, or by data / 127\.5 - 1"),
        (0, 1, r"from 0 to 1, .* --range 0 1 on the command line, or by 2 \* data - 1"),
        (-2.5, 3, r"from -2\.5 to 3, .* --range -2\.5 3 on the command line"),
    ],
)
def test_images_of_another_range_give_a_warning_with_the_remedy(tmp_path, low, high, remedy):
    path = str(images_of(tmp_path, low, high))
    with pytest.warns(UserWarning, match=remedy) as warned:
        run(tmp_path / "run", data=path)
    assert len([each for each in warned if "--range" in str(each.message)]) == 1


def test_an_own_loop_gets_the_warning_of_the_range_once(recwarn):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net, config = pfgm.networks.MLP((1, 8, 8), width=4), TrainConfig(steps=1, batch_size=8)
    message = r"values from .*, or by 2 \* data - 1 in Python"
    for make in (pfgm.PoissonFlow.from_data, lambda y: pfgm.PoissonFlowPP.from_data(y, D=128)):
        for data in (images, images.numpy(), pfgm.ReferenceSet(images)):
            with pytest.warns(UserWarning, match=message) as warned:
                flow = make(data)
            assert [warning.filename for warning in warned] == [__file__]
            pfgm.training.Trainer(flow, net, images, config)
        make(2 * images - 1)
        make((255 * images).byte())
    assert not recwarn
    with pytest.warns(UserWarning, match=message) as warned:
        pfgm.training.Trainer(pfgm.PoissonFlow((1, 8, 8), M=200), net, images, config)
    assert [warning.filename for warning in warned] == [__file__]


def test_only_bytes_are_taken_for_bytes():
    images = torch.linspace(0, 65535, 128).reshape(2, 1, 8, 8)
    with pytest.warns(UserWarning, match="--range 0 65535 on the command line, or by 2"):
        warn_of_range(images)


def test_a_table_of_different_scales_gives_one_warning():
    spreads = torch.tensor([1.0, 300.0, 0.0, 0.2])
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * spreads
    for data in (table, pfgm.ReferenceSet(table)):
        flow = pfgm.PoissonFlow.from_data(data)
        net = flow.network("mlp", width=4)
        message = r" in column 1 and 0\.\d+ in column 3: .* 1 in place of each std of 0"
        with pytest.warns(UserWarning, match=message) as warned:
            pfgm.training.Trainer(flow, net, data, TrainConfig(steps=1, batch_size=8))
        assert [warning.filename for warning in warned] == [__file__]


def test_other_data_give_no_warning(recwarn):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vectors = 9 * images.abs().flatten(1)[:, :2]
    for fine in (images, ((images + 1) * 127.5).byte(), vectors, images * math.nan):
        warn_of_range(fine)
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    table *= torch.tensor([1.0, 300.0, 0.0, 0.2])
    for fine in (
        table[:, :1],
        table[:, [0, 3]],
        table.new_zeros(5, 2),
        table.repeat(1, 16),  # as many columns as a small image has pixels
        table.view(50, 1, 2, 2),
        table.new_full((5, 2), math.nan),
    ):
        warn_of_scales(fine)
    assert not recwarn


def test_a_range_is_kept_by_resumed_runs_and_evaluations(tmp_path, refusal, recwarn):
    """It gives the weights of the same run on data that have been converted before."""
    path = images_of(tmp_path, 0, 255)
    np.save(tmp_path / "unit.npy", np.load(path) / 127.5 - 1)
    settings = changed(decay="none", ema=0.0, beta2=0.99)
    plain = run(tmp_path / "plain", data=str(tmp_path / "unit.npy"), training=settings)
    train = ["train", "--width", "16", "--batch-size", "16", "--reference-batch", "32"]
    train += ["--warmup", "2", "--learning-rate", "1e-3", "--decay", "none"]
    train += ["--ema", "0", "--beta2", "0.99", "--out", str(tmp_path / "run")]
    assert cli.main([*train, "--steps", "3", "--data", str(path), "--range", "0", "255"]) == 0
    assert RunConfig.load(tmp_path / "run").range == (0.0, 255.0)
    train.append("--resume")
    assert cli.main([*train, "--steps", "6"]) == 0
    assert "range is (0.0, 1.0)" in refusal(*train, "--range", "0", "1")
    flow = pfgm.load(tmp_path / "run").flow
    assert flow.upper_norm == pytest.approx(pfgm.load(tmp_path / "plain").flow.upper_norm)
    for a, b in zip(
        pfgm.load(tmp_path / "run").network.parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    evaluate = ["evaluate", str(tmp_path / "run"), "--n", "20", "--steps", "2"]
    assert cli.main([*evaluate, "--out", str(tmp_path / "figures")]) == 0
    figures = json.loads((tmp_path / "figures" / "metrics.json").read_text())
    assert figures["median_distance_to_train"]["samples"] < 50  # in bytes it would be thousands
    assert not [str(warning.message) for warning in recwarn if "--range" in str(warning.message)]


def test_a_run_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    images_of(tmp_path, -1, 1)
    other = tmp_path / "other"
    other.mkdir()
    images_of(other, -1, 1, shape=(30, 1, 8, 8))
    monkeypatch.chdir(tmp_path)
    run("run", data="images.npy")
    run("run", data="images.npy", resume=True)
    stored = RunConfig.load("run")
    monkeypatch.chdir(other)
    assert RunConfig.load("../run").data == stored.data == str(tmp_path / "images.npy")
    assert RunConfig.load("../run/config.json") == stored
    run("../run", data="../images.npy", resume=True)
    with pytest.raises(ValueError, match=r"data is 'images.npy'; the run in .* has '/"):
        run("../run", data="images.npy", resume=True)
    evaluate = ["evaluate", "../run", "--n", "20", "--steps", "2", "--out", "x"]
    assert cli.main(evaluate) == 0
    assert json.loads(Path("x/metrics.json").read_text())["counts"]["searched"] == 40
    (tmp_path / "images.npy").rename("moved.npy")
    run("../run", data="moved.npy", resume=True)
    assert RunConfig.load("../run").data == str(other / "moved.npy")


def test_a_relative_path_in_the_configuration_of_an_earlier_version(tmp_path, monkeypatch, recwarn):
    RunConfig(data="folder:cats").save(tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)
    assert RunConfig.load("config.json").data == "folder:cats"  # a recipe
    with pytest.warns(UserWarning, match=rf"'folder:cats' .*; folder:{tmp_path}/cats is taken"):
        assert RunConfig.load(tmp_path).data == "folder:cats"
    for data in ("digits", "cifar10", "folder:~/cats", "/x.npy"):
        RunConfig(data=data).save(tmp_path / "config.json")
        assert RunConfig.load(tmp_path).absolute.data == data
    assert not recwarn


@pytest.mark.parametrize("option", ["init", "teacher"])
def test_a_run_starts_from_a_network_of_the_package(tmp_path, monkeypatch, option):
    """config.json keeps the name, which is no path."""
    monkeypatch.chdir(tmp_path)
    settings = changed(steps=1, learning_rate=1e-9, ema=0.0, batch_size=2, reference_batch=2)
    plain, config = pfgm.load("digits").network, {option: "digits", "labels": True}
    for steps in (1, 2):
        training = dataclasses.replace(settings, steps=steps)
        network = run("run", **config, width=None, training=training, resume=steps == 2)
        for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert getattr(RunConfig.load("run"), option) == "digits"
    path = RunConfig(**{option: "./digits"}).absolute
    assert getattr(path, option) == str(tmp_path / "digits")


def test_a_run_starts_from_the_weights_of_another(tmp_path, capsys):
    first = run(tmp_path / "first", network="mlp")
    path, lines = str(images_of(tmp_path, -0.3, 0.5)), []
    settings = {"data": path, "init": str(tmp_path / "first"), "width": None}
    training = changed(steps=4, learning_rate=1e-9, ema=0.0, checkpoint_every=1)
    run(tmp_path / "second", training=training, report=lines.append, **settings)
    assert f"starting from the weights in {tmp_path / 'first'}" in lines[0]
    assert "hyper-parameters of the flow that differ: " in lines[0]
    flow, second = pfgm.load(tmp_path / "second")
    assert flow != pfgm.load(tmp_path / "first").flow
    assert flow.upper_norm == pfgm.PoissonFlow.from_data(pfgm.ReferenceSet(path)).upper_norm
    assert type(second).__name__ == "MLP"
    assert second.config == first.config  # with the scaling that the weights were trained for
    for a, b in zip(second.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    # A resumed run needs the earlier one no more, and goes on as if it had not stopped.
    settings["training"] = changed(steps=6, checkpoint_every=1)
    whole = run(tmp_path / "whole", **settings)
    latest = {"step": 5, "weights": "step-00000005.safetensors", "state": "step-00000005.state.pt"}
    (tmp_path / "whole" / "latest.json").write_text(json.dumps(latest))
    (tmp_path / "first").rename(tmp_path / "moved")
    again = run(tmp_path / "whole", resume=True, **settings)
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "edm"}, "has the flow pfgm; the settings and the data ask for edm"),
        ({"method": "pfgm++"}, r"ask for pfgm\+\+ with D = 128"),
        ({"network": "mlp"}, "has network unet; .* ask for mlp"),
        ({"width": 32}, "has width 16; .* ask for 32"),
        ({"multipliers": (1, 1)}, r"has multipliers \(1, 2\); .* ask for \(1, 1\)"),
        ({"labels": True}, "has labels 0; .* ask for 10"),
        ({"flow": {"gamma": 2.0}}, "has gamma 5.0; .* ask for 2.0"),
        ({"data": "points.npy"}, r"has samples of shape \(1, 8, 8\); .* ask for \(2,\)"),
        ({"teacher": "x"}, r"only one of init and teacher may be given, got both\."),
    ],
)
def test_weights_that_do_not_fit(tmp_path, monkeypatch, earlier, changes, message):
    images_of(tmp_path, 0, 9, name="points.npy", shape=(60, 2))
    monkeypatch.chdir(tmp_path)
    weights = str(earlier / "step-00000006.safetensors")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **{"width": None, "init": weights, **changes})
    assert not (tmp_path / "run").exists()


def test_settings_that_the_teacher_decides_are_named(tmp_path, earlier):
    lines, teacher = [], str(earlier / "step-00000006.safetensors")
    run(tmp_path, teacher=teacher, width=32, method="edm", report=lines.append)
    assert lines[0].startswith("ignored, since the teacher decides: method, width\n")


def test_a_run_with_nothing_left_to_do_says_so(started):
    lines = []
    run(started, report=lines.append, resume=True)
    assert lines == [
        "resuming at step 6: nothing is left of 6 steps; give more with --steps",
        f"checkpoint: {started}\nnext: pfgm sample {started} --n 100 --out samples.png\n"
        f"      pfgm evaluate {started} --out {started / 'evaluation'}",
    ]


def test_a_run_whose_last_evaluation_is_left_says_so_and_makes_it(started):
    lines = []
    for _ in range(2):
        run(started, training=changed(evaluate_every=6), report=lines.append, resume=True)
    assert lines[0] == "resuming at step 6 of 6, whose evaluation is left"
    assert lines[2].startswith("resuming at step 6: nothing is left")
    with (started / "evaluations.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["6"]


def test_a_resumed_run_refuses_fewer_steps_than_it_has_done(started):
    before = (started / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"steps must be at least 6, the step of.*got 4\."):
        run(started, resume=True, training=changed(steps=4))
    assert (started / "config.json").read_bytes() == before


def test_a_run_that_fails_at_its_first_steps_leaves_nothing(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("broken")

    monkeypatch.setattr(pfgm.PoissonFlow, "loss", broken)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("about the run")
    for folder in ("new/run", "old"):
        with pytest.raises(ValueError, match="broken"):
            run(tmp_path / folder, network="mlp")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "notes.txt"]


def test_the_configuration_of_a_run_holds_versions(earlier):
    content = json.loads((earlier / "config.json").read_text())
    assert content["versions"] == {"pfgm": pfgm.__version__, "torch": torch.__version__}
    assert RunConfig.load(earlier).training == SMALL.resolved()


def test_the_recipes_are_configurations():
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.json"))
    assert {recipe.stem for recipe in recipes} == {
        "avatars",
        "cifar10",
        "cifar10-8gpus",
        "digits",
        "fashion-mnist",
    }
    for recipe in recipes:
        RunConfig.load(recipe)
    folder = recipes[0].parent
    assert RunConfig.load(folder / "avatars.json").data == "avatars"
    one, eight = (RunConfig.load(folder / f"{name}.json") for name in ("cifar10", "cifar10-8gpus"))
    assert one.flow == {"M": 291, "z_max": 40.0, "upper_norm": 3000.0}
    assert (one.network, one.training.batch_size, one.training.reference_batch) == (
        "ddpmpp",
        128,
        4096,
    )
    assert eight == dataclasses.replace(one, blocks=8)
    assert eight.training.batch_size % 8 == 0


def test_levels_are_fitted_once_and_kept_when_the_run_is_resumed(tmp_path, monkeypatch):
    rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "x.npy", rows)
    settings = {"data": str(tmp_path / "x.npy"), "fit_levels": (2, 3)}
    run(tmp_path / "run", **settings)
    levels = pfgm.load(tmp_path / "run").flow.fitted_levels
    assert {solver: sorted(steps) for solver, steps in levels.items()} == {"multistep": [2, 3]}
    monkeypatch.setattr(pfgm.PoissonFlow, "fit_levels", None)
    run(tmp_path / "run", training=changed(steps=8), resume=True, **settings)
    assert pfgm.load(tmp_path / "run").flow.fitted_levels == levels
    with pytest.raises(ValueError, match=r"fit_levels is \(2,\); the run in"):
        run(tmp_path / "run", resume=True, **{**settings, "fit_levels": (2,)})


def test_settings_that_the_data_or_the_network_do_not_have(tmp_path):
    data = {"points": (60, 2), "signals": (40, 2, 16), "volumes": (40, 1, 4, 4, 4)}
    for name, shape in data.items():
        data[name] = str(tmp_path / f"{name}.npy")
        np.save(data[name], np.random.default_rng(0).normal(size=shape).astype(np.float32))
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    for settings, message in (
        *(
            ({"data": path, "flips": True}, r"flips is for images \(C, H, W\), got rows of shape")
            for path in data.values()
        ),
        ({"data": data["points"], "labels": True}, "labels must be False for .*, which has none"),
        ({"data": data["points"], "network": "ddpmpp"}, r"takes square images .* shape \(2,\)"),
        ({"data": data["points"], "blocks": 2}, "blocks is 2, but the network is 'mlp'"),
        ({"network": "ddpmpp", "patch": 2}, "patch is 2, but the network is 'ddpmpp', which has n"),
        ({"training": changed(reference_batch=0)}, "reference_batch is 0.*PoissonFlowPP alone"),
        *(
            ({"data": path, "layout": "images"}, "layout is for arrays .*, got 'images' for")
            for path in ("digits", str(tmp_path / "t.csv"), f"folder:{tmp_path}")
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", **settings)
    with pytest.raises(ValueError, match="layout is for arrays"):
        pfgm.data.open(tmp_path / "t.csv", layout="as-is")
    assert not (tmp_path / "run").exists()
    (tmp_path / "config.json").write_text('{"data": "digits", "layout": "images"}')
    assert RunConfig.load(tmp_path).layout == "auto"  # of a run that ignored it
