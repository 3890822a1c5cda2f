"""The networks that come with the package."""

import re
from pathlib import Path

import pytest
import torch
from sklearn.svm import SVC

import pfgm
from benchmarks.avatars import render
from pfgm.pretrained import FOLDER, PRETRAINED

MAX_BYTES = 12_000_000
SHAPES = {"avatars": (3, 32, 32), "digits": (1, 8, 8), "fashion-mnist": (1, 28, 28)}


@pytest.mark.parametrize("name", PRETRAINED)
def test_each_samples_images_of_its_labels(name):
    loaded = pfgm.load(name)
    flow, net = loaded
    assert (FOLDER / f"{name}.safetensors").stat().st_size <= MAX_BYTES
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}  # of half the bytes
    assert (loaded.label_names, loaded.card) == (PRETRAINED[name].classes, PRETRAINED[name].data)
    assert flow.shape == SHAPES[name]
    assert not net.training
    assert len(PRETRAINED[name].classes) == 10
    labels = torch.arange(10)
    generator = torch.Generator().manual_seed(0)
    samples = flow.sample(net, 10, condition={"labels": labels}, generator=generator)
    assert samples.shape == (10, *SHAPES[name])
    assert float(samples.abs().max()) < 2
    assert float((samples.abs() > 1.2).float().mean()) < 0.01
    assert flow.sample(net, 2).isfinite().all()


def test_digits_are_those_asked_for():
    digits = pfgm.data.digits()
    classifier = SVC().fit(digits.train.flatten(1).numpy(), digits.train_labels.numpy())
    flow, net = pfgm.load("digits")
    labels = torch.arange(200) % 10
    generator = torch.Generator().manual_seed(0)
    samples = flow.sample(net, 200, condition={"labels": labels}, generator=generator)
    assert classifier.score(samples.flatten(1).numpy(), labels.numpy()) >= 0.9
    # They are new: not nearer to the training data than held-out digits are, by half.
    nearest = pfgm.metrics.nearest_distance(samples, digits.train).median()
    between = pfgm.metrics.nearest_distance(digits.held_out, digits.train).median()
    assert float(nearest) > 0.5 * float(between)


def test_all_authors_are_credited():
    """In a file that the wheel holds, and in one line by `pfgm info`."""
    credits = (FOLDER / "CREDITS.md").read_text()
    assert re.findall(r"^## (.*)$", credits, flags=re.MULTILINE) == list(PRETRAINED)
    avatars = PRETRAINED["avatars"]
    rows = re.findall(
        r"^\| (.*) \| \[.*\]\(.*\) \| \[(.*)\]\(.*\) \| \[(.*)\]", credits, re.MULTILINE
    )
    assert tuple(style for style, _, _ in rows) == avatars.classes == render.STYLES
    for _, designer, licence in rows:
        assert designer in avatars.data
        assert licence in ("CC BY 4.0", "CC0 1.0")
        assert licence in avatars.data


def test_evaluation_says_where_avatars_come_from(tmp_path, refusal, monkeypatch):
    """Their data do not come with the package."""
    monkeypatch.delenv("PFGM_DATA", raising=False)
    message = refusal("evaluate", "avatars", "--out", tmp_path / "e")
    assert "`python -m benchmarks.avatars.render FOLDER`" in message
    assert "as in avatars:FOLDER" in message


def test_an_unknown_name_is_refused():
    with pytest.raises(FileNotFoundError, match=r"no file or folder cifar10; .* \(avatars, digits"):
        pfgm.load("cifar10")


def test_a_name_that_is_also_a_path_is_refused(tmp_path, monkeypatch):
    """A Path, and ./ before the name, mean the path."""
    monkeypatch.chdir(tmp_path)
    flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    pfgm.save("./digits", flow, flow.network("mlp", width=4))
    with pytest.raises(ValueError, match=r"got 'digits', which is both; write \./digits for the p"):
        pfgm.load("digits")
    for path in ("./digits", Path("digits"), tmp_path / "digits"):
        assert pfgm.load(path).flow == flow
    card = pfgm.load("./digits").card
    assert 'pfgm.load("./digits")' in card
    assert card == Path("digits/README.md").read_text()
    Path("avatars").symlink_to("nowhere")
    with pytest.raises(ValueError, match="which is both"):
        pfgm.load("avatars")
    assert pfgm.load("fashion-mnist").flow.shape == (1, 28, 28)
