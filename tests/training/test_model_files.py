import csv
import importlib.util
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import pfgm
from pfgm import cli
from pfgm.training import TrainConfig
from pfgm.training.runs import RunConfig, start


def test_a_folder_in_the_layout_of_hugging_face(tmp_path):
    flow = pfgm.PoissonFlow.from_data(torch.randn(50, 2, 16))
    net = flow.network("unet", width=16)
    torch.nn.init.normal_(net.head.weight)
    pfgm.save(tmp_path / "model", flow, net)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "model_index.json",
    }
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["library_name"] == "pfgm"
    assert pfgm.PoissonFlow(**config["flow"]) == flow
    assert pfgm.networks.build(**config["network"]).config == net.config
    with safe_open(tmp_path / "model/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(net.state_dict())
    loaded_flow, loaded = model = pfgm.load(str(tmp_path / "model"))
    assert model.card == (tmp_path / "model/README.md").read_text()
    assert pfgm.load(tmp_path / "model/model.safetensors").card == model.card
    assert loaded_flow == flow
    assert not loaded.training
    x, z = torch.randn(3, 2, 16), torch.rand(3)
    for own, other in zip(net(x, z), loaded(x, z), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("shape", "classes", "task"),
    [
        ((1, 8, 8), 0, "unconditional-image-generation"),
        ((1, 8, 8), 3, "unconditional-image-generation"),
        ((2,), 0, None),
    ],
)
def test_the_hub_reads_the_card_and_its_code_samples(tmp_path, monkeypatch, shape, classes, task):
    hub = pytest.importorskip("huggingface_hub")
    flow = pfgm.PoissonFlowPP(shape, D=128)
    kind, width = ("unet", 16) if len(shape) == 3 else ("mlp", 16)
    net = flow.network(kind, width=width, classes=classes)
    names = ("cat", "dog", "eel") if classes else ()
    pfgm.save(tmp_path / "my model", flow, net, label_names=names)
    card = hub.ModelCard.load(tmp_path / "my model/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("pfgm", task)
    assert "poisson-flow" in card.data.tags
    assert card.data.license == "unknown"  # one of the hub's names, which needs no license_name
    parameters = sum(parameter.numel() for parameter in net.parameters())
    paper = "([paper](https://arxiv.org/abs/2302.04265))"
    assert f"PoissonFlowPP {paper} with D = 128, and a network Denoiser with" in card.text
    assert f" {parameters:,} parameters" in card.text
    assert ("with the labels 0 to 2 (cat, dog, eel)" in card.text) == bool(classes)
    assert pfgm.load(tmp_path / "my model").label_names == names
    if classes:
        with pytest.raises(ValueError, match=r"label_names must be the names of the 3 .*, got 2"):
            pfgm.save(tmp_path / "net.safetensors", flow, net, label_names=names[1:])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(card.text.split("```python")[1].split("```")[0], names)
    assert names["samples"].shape == (16, *shape)
    assert Path("drawn.png").exists() == (len(shape) == 3)
    assert (', "eel"' in card.text, '# or by name: ["cat"]' in card.text) == (False, bool(classes))
    (tmp_path / "my model/README.md").write_text("mine")
    pfgm.save(tmp_path / "my model", flow, net)
    assert (tmp_path / "my model/README.md").read_text() == "mine"


def test_the_card_of_a_run_tells_its_data_figures_and_picture(tmp_path, monkeypatch):
    run, hub = tmp_path / "run", pytest.importorskip("huggingface_hub")
    images = tmp_path / "private" / "shapes.npy"
    images.parent.mkdir()
    np.save(images, np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8))
    training = TrainConfig(steps=4, batch_size=8, evaluate_every=2, checkpoint_every=2)
    start(RunConfig(data=str(images), width=16, samples=10, training=training), run, progress=False)
    pfgm.load(run).save(tmp_path / "model")
    card = hub.ModelCard.load(tmp_path / "model/README.md")
    assert "Trained for 4 steps on shapes.npy. Samples after 4 steps" in card.text
    assert "private" not in card.text
    row = list(csv.DictReader((run / "evaluations.csv").open()))[-1]
    for name in ("frechet_distance", "precision", "recall"):
        assert f"{name.replace('_', ' ')} {float(row[name]):.4g}" in card.text
    assert "![samples](samples.png)" in card.text
    picture = (tmp_path / "model/samples.png").read_bytes()
    assert picture == (run / "samples-00000004.png").read_bytes()
    # An earlier checkpoint has the evaluation of its own step.
    earlier = pfgm.load(run / "step-00000002.safetensors")
    assert earlier.step == 2
    earlier.save(tmp_path / "earlier")
    assert "Samples after 2 steps" in (tmp_path / "earlier/README.md").read_text()
    # What a reader of the card does, in the folder and beside it.
    monkeypatch.chdir(tmp_path / "model")
    assert cli.main(["sample", ".", "--n", "4", "--out", "drawn.png"]) == 0
    pfgm.load("digits").save(tmp_path / "digits")
    assert (
        "Trained for 4000 steps on 1398 handwritten digits" in pfgm.load(tmp_path / "digits").card
    )


def test_the_card_of_a_table_gives_decoded_rows(tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    lines = [f"{50 + n // 2},{('Ulm', 'Bonn')[n % 2]},{n % 3}" for n in range(30)]
    (tmp_path / "flats.csv").write_text("\n".join(["area,city,label", *lines]))
    training = TrainConfig(steps=1, batch_size=8)
    config = RunConfig(data=str(tmp_path / "flats.csv"), labels=True, width=16, training=training)
    start(config, tmp_path / "run", progress=False)
    pfgm.load(tmp_path / "run").save(tmp_path / "model")
    card, names = (tmp_path / "model/README.md").read_text(), {}
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python")[1].split("```")[0], names)
    rows = names["rows"]
    assert [*rows] == ["area", "city", "label"]
    assert {*rows["city"]} <= {"Ulm", "Bonn"}
    assert all(50 <= area <= 64 for area in rows["area"])
    assert rows["label"] == [n % 3 for n in range(16)]
    monkeypatch.chdir(tmp_path / "model")
    line = card.split("`pfgm ")[1].split("`")[0]
    assert cli.main(shlex.split(line)) == 0
    assert Path("rows.csv").read_text().replace('"', "").startswith("area,city,label\n")


@pytest.mark.parametrize("flow_type", [pfgm.PoissonFlow, pfgm.PoissonFlowPP])
def test_labels_by_their_stored_names(tmp_path, flow_type, refused):
    """They mean the same wherever a condition is taken, also inside torch's wrappers."""
    torch.manual_seed(0)
    data = torch.randn(40, 3)
    flow, names = (
        flow_type.from_data(data, **({"D": 16} if flow_type is pfgm.PoissonFlowPP else {})),
        ("cat", "Flags", "big dog"),
    )
    net = flow.network("mlp", width=16, classes=3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pfgm.save(tmp_path / "m", flow, net, label_names=names)
    flow, net = pfgm.load(tmp_path / "m")
    numbers = {"labels": torch.tensor([1, 2, 0])}
    by_name = {"labels": ["Flags", "big-dog", "cat"]}
    x = flow.prior(3, generator=torch.Generator().manual_seed(1))
    for call in (
        lambda condition: flow.sample(net, 3, x_init=x, steps=3, condition=condition),
        lambda condition: flow.sample(net, 3, x_init=x, steps=3, condition=condition, guidance=2),
        lambda condition: flow.sample(
            torch.nn.DataParallel(net), 3, x_init=x, steps=3, condition=condition
        ),
        lambda condition: flow.denoise(net, x, 1.0, condition),
        lambda condition: flow.interpolate(net, data[:3], data[3:6], count=3, condition=condition),
    ):
        assert torch.equal(call(by_name), call(numbers))
    every = flow.sample(net, 3, x_init=x, steps=3, condition={"labels": ["Flags"]})
    assert torch.equal(
        every, flow.sample(net, 3, x_init=x, steps=3, condition={"labels": torch.ones(3).long()})
    )
    assert not torch.equal(every, flow.sample(net, 3, x_init=x, steps=3, condition=numbers))
    pfgm.save(tmp_path / "again", flow, net)
    assert pfgm.load(tmp_path / "again").label_names == names
    for labels, message in (
        (
            ["Flag"],
            "label must be one of the network's labels, 0 to 2 or cat, Flags, big dog, got Flag.",
        ),
        (["cat", "cat"], "condition['labels'] must have 3 rows like x, got shape (2,)."),
        (
            [1, 2, 0],
            "TypeError: labels must be a torch.Tensor of integers, of shape (3,), got list.",
        ),
    ):
        refused(lambda labels=labels: flow.sample(net, 3, condition={"labels": labels}), message)
    nameless = flow.network("mlp", width=16, classes=3)
    refused(
        lambda: flow.sample(nameless, 1, condition={"labels": ["cat"]}),
        "TypeError: labels must be a torch.Tensor of integers, of shape (1,), got list.",
    )


def test_names_of_labels_that_are_numbers(tmp_path, monkeypatch):
    """The card shows them, and its code runs."""
    flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    folder = tmp_path / "caf\u00e9"
    pfgm.save(folder, flow, flow.network("mlp", classes=3), label_names=range(3))
    card = (folder / "README.md").read_text("utf-8")
    assert "with the labels 0 to 2 (0, 1, 2)" in card
    monkeypatch.chdir(tmp_path)
    exec(card.partition("```python")[2].partition("```")[0], {})


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_path_that_is_not_utf_8_is_refused_before_the_first_file(tmp_path, refused, suffix):
    flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    refused(
        lambda: pfgm.save(tmp_path / (os.fsdecode(b"caf\xe9") + suffix), flow, flow.network("mlp")),
        f"path must be UTF-8, which safetensors reads, got …caf?{suffix}.",
    )
    assert not list(tmp_path.iterdir())


def test_diffusers_says_what_to_call(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    pfgm.save(tmp_path, flow, flow.network("mlp"))
    with pytest.raises(AttributeError, match=r"PoissonFlow; pfgm\.load reads this folder"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert pfgm.load(tmp_path)[0] == flow


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*snapshot_download"):
        pfgm.load(tmp_path / "user/model")
    for name, hint in (("user/model-1.5", True), ("a/b/c", False), ("model", False)):
        with pytest.raises(FileNotFoundError) as error:
            pfgm.load(name)
        line = f'import snapshot_download; flow, net = pfgm.load(snapshot_download("{name}"))'
        hint = hint and importlib.util.find_spec("huggingface_hub") is not None
        assert (line in str(error.value)) == hint
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        pfgm.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"PoissonFlowPipeline\.from_pretrained reads it"):
        pfgm.load(tmp_path)


@pytest.mark.parametrize("name", ["latest.json", "config.json", "model_index.json"])
def test_a_folder_of_something_else_is_kept(tmp_path, name):
    flow, net = pfgm.PoissonFlowPP((3,), D=16), torch.nn.Linear(3, 3)
    (tmp_path / name).write_text('{"library_name": "diffusers"}')
    with pytest.raises(ValueError, match=f"path must be a new folder, or .* with {name}"):
        pfgm.save(tmp_path, flow, net)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_is_replaced_by_a_model_and_by_no_run(tmp_path):
    flow, net = pfgm.PoissonFlowPP((3,), D=16), torch.nn.Linear(3, 3)
    (tmp_path / "README.md").write_text("of a hub")
    for _ in range(2):
        pfgm.save(tmp_path, flow, net)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"out must not be a folder of pfgm\.save"):
        start(RunConfig(training=TrainConfig(steps=1)), tmp_path, progress=False)
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_suffix_says_whether_it_is_a_file_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow, net = pfgm.PoissonFlowPP((3,), D=16), torch.nn.Linear(3, 3)
    for path in ("model.pt", Path("model.ckpt"), "a/model.SAFETENSORS", "model.safetensors.zip/"):
        with pytest.raises(ValueError, match=r"path must end in \.safetensors, or be a folder"):
            pfgm.save(path, flow, net)
    assert not list(tmp_path.iterdir())
    Path("models.d").mkdir()
    for path in ("file.safetensors", "model", "model-1.5", "Model-3.1-8B/", "models.d"):
        pfgm.save(path, flow, net, step=7)
        assert Path(path).is_file() == (path == "file.safetensors")
        assert pfgm.load(path, torch.nn.Linear(3, 3)).flow == flow
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError, match="it exists and is not a regular file"):
        pfgm.save("folder.safetensors", flow, net)
    for name in ("file.safetensors", "model/model.safetensors"):
        with safe_open(name, framework="pt") as file:
            assert json.loads(file.metadata()["pfgm"])["step"] == 7


def test_the_names_of_hubs_are_the_same_functions():
    assert (pfgm.from_pretrained, pfgm.save_pretrained) == (pfgm.load, pfgm.save)


def test_no_name_and_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow, net = pfgm.PoissonFlowPP((3,), D=16), torch.nn.Linear(3, 3)
    net.register_buffer("mask", torch.full((3,), -torch.inf))
    with pytest.raises(ValueError, match=r"the name of the folder must not be empty\."):
        pfgm.save("", flow, net)
    with pytest.raises(ValueError, match=r"model must be a path or a name, got an empty text\."):
        pfgm.load("")
    pfgm.save("masked.safetensors", flow, net)
    net.bias.data[1] = torch.nan
    for path in ("model", "model.safetensors"):
        with pytest.raises(ValueError, match="bias of network must be finite, got NaN"):
            pfgm.save(path, flow, net)
    assert [path.name for path in tmp_path.iterdir()] == ["masked.safetensors"]


def test_commands_take_the_folder(tmp_path, refusal):
    flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    torch.manual_seed(0)
    net = flow.network("mlp", width=16)
    model, data, out = tmp_path / "model", tmp_path / "x.npy", tmp_path / "run"
    pfgm.save(model, flow, net)
    assert torch.equal(pfgm.load(model).network.state_dict()["head.weight"], net.head.weight)
    assert cli.main(["sample", str(model), "--n", "20", "--out", str(data)]) == 0
    train = ["train", "--data", str(data), "--init", str(model), "--steps", "1"]
    assert cli.main([*train, "--batch-size", "8", "--out", str(out)]) == 0
    for checkpoint in (model, model / "model.safetensors"):
        evaluate = ["evaluate", str(checkpoint), "--n", "10", "--data", str(data)]
        assert cli.main([*evaluate, "--out", str(tmp_path / "e")]) == 0
        assert "give the data with --data" in refusal(*evaluate[:-2], "--out", tmp_path / "e")
    assert "describes a model and not a run" in refusal("train", "--config", model, "--out", out)
