"""The classifiers in whose features samples are judged, and their files."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

import pfgm
from pfgm import cli
from pfgm.metrics import (
    CLASSIFIERS,
    Classifier,
    frechet_distance,
    load_classifier,
    save_classifier,
    train_classifier,
)


@pytest.fixture(scope="module")
def digits():
    return pfgm.data.digits()


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(u, v) for (x, u), (y, v) in pairs)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "most_bytes"),
    [
        ("avatars", (3, 32, 32), 1226, 400_000),  # attributes after the styles
        ("digits", (1, 8, 8), 10, 150_000),
        ("fashion-mnist", (1, 28, 28), 10, 150_000),
    ],
)
def test_small_classifiers_come_with_the_package(name, shape, classes, most_bytes):
    assert set(CLASSIFIERS) == set(pfgm.pretrained.PRETRAINED)
    net = load_classifier(name)
    assert not net.training
    assert (net.shape, net.classes) == (shape, classes)
    assert sum(each.nbytes for each in net.parameters()) < most_bytes
    images = torch.zeros(3, *shape)
    assert (net.rows(images).shape, net(images).shape) == ((3, 32), (3, classes))


def test_the_classifier_of_digits_knows_them(digits):
    net = load_classifier("digits")
    assert net.accuracy(digits.held_out, digits.held_out_labels) > 0.97


def test_attributes_are_learned():
    """Those of an image do not exclude each other, as labels do."""
    draw = torch.Generator().manual_seed(0)
    known = torch.rand(512, 3, generator=draw) < 0.5  # bright left, bright right, green
    images = torch.zeros(512, 2, 4, 4)
    images[:, 0, :, :2] = known[:, 0, None, None].float()
    images[:, 0, :, 2:] = known[:, 1, None, None].float()
    images[:, 1] = known[:, 2, None, None].float()
    net = train_classifier(images, known, epochs=10)
    assert net.classes == 3
    assert ((net(images) > 0) == known).float().mean() > 0.99


def test_features_tell_mirrored_digits_from_real_ones(digits):
    net = load_classifier("digits")
    half, other = digits.train[::2], net.rows(digits.train[1::2])
    real, mirrored = (frechet_distance(net.rows(x), other) for x in (half, half.flip(3)))
    assert mirrored > 10 * real


def test_training_is_the_same_for_the_same_seed(digits):
    few = digits.train[:64], digits.train_labels[:64]
    first, same, other = (train_classifier(*few, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert same_weights(first, same)
    assert not same_weights(first, other)


def test_the_command_trains_a_classifier_that_evaluates(tmp_path, capsys):
    path = tmp_path / "new" / "digits.safetensors"
    arguments = ["features", "--data", "digits", "--epochs", "2", "--out", str(path)]
    assert cli.main(arguments) == 0
    assert "right on" in capsys.readouterr().out
    figures = {}
    for features in (str(path), "none", None):
        out = tmp_path / "evaluation"
        options = [] if features is None else ["--features", features]
        sampling = ["digits", "--n", "60", "--steps", "2", "--against", "300"]
        assert cli.main(["evaluate", *sampling, *options, "--out", str(out)]) == 0
        figures[features] = json.loads((out / "metrics.json").read_text())
        shown = capsys.readouterr().out
        assert ("in features: samples" in shown) == (features != "none")
    assert "features" not in figures["none"]
    assert figures[None]["features"]["of"] == "digits"
    own = figures[str(path)]["features"]
    assert own["frechet_distance"] != figures[None]["features"]["frechet_distance"]
    assert own["against"] == "held_out"
    held_out = pfgm.ReferenceSet(pfgm.data.open("digits").held_out)
    draw = torch.Generator().manual_seed(0)
    real = held_out[held_out.draw(300, generator=draw)]
    flow, net = pfgm.load("digits")
    samples, _ = pfgm.evaluation.draw_samples(flow, net, 60, steps=2)
    features = load_classifier(path).features
    distance = frechet_distance(samples.clamp(-1, 1), real, features=features)
    assert own["frechet_distance"]["samples"] == pytest.approx(distance, rel=1e-4)


def test_a_training_that_fails_leaves_no_folder(tmp_path, refusal, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no accuracy")

    monkeypatch.setattr(pfgm.cli.features, "train_classifier", fail)
    out = tmp_path / "new" / "folder" / "x.safetensors"
    assert "no accuracy" in refusal("features", "--data", "digits", "--out", out)
    assert not list(tmp_path.iterdir())


def test_one_sentence_for_bad_input(tmp_path, refusal):
    out, unlabelled, pickled = (tmp_path / f"x.{end}" for end in ("safetensors", "npy", "pt"))
    pfgm.data.save_array(unlabelled, torch.zeros(9, 1, 8, 8))
    torch.save({}, pickled)
    evaluate = ["evaluate", "digits", "--out", tmp_path / "e", "--features"]
    train = ["features", "--out", out, "--data"]
    for arguments, sentence in (
        ([*evaluate, out], "there is no classifier at"),
        (
            [*evaluate, "fashion-mnist"],
            "features must be a classifier for the shape of the data digits",
        ),
        ([*evaluate, pfgm.pretrained.FOLDER / "digits.safetensors"], "must be a classifier"),
        ([*evaluate, pickled], "not a complete safetensors file"),
        (["features", "--data", "digits", "--out", "x.pt"], "out must end in .safetensors"),
        ([*train, "digits", "--epochs", 0], "epochs must be at least 1"),
        ([*train, unlabelled], "data must be images with labels"),
    ):
        assert sentence in refusal(*arguments)
    assert not out.exists()
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("damage", ["bit", "truncated", "config", "classes"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_classifier(path, Classifier((1, 8, 8), 3))
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-9])
    else:  # written by something else, with other tensors than it describes
        with safetensors.safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["pfgm"])
        del described["checksum"]
        config = {"config": "no", "classes": {**described["config"], "classes": 65536}}[damage]
        metadata = {"pfgm": json.dumps({**described, "config": config})}
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file(tensors, path, metadata=metadata)
    message = "checksum must be|not a complete safetensors file|other tensors than the classifier"
    with pytest.raises(ValueError, match=message):
        load_classifier(path)


TWO, ZEROS = torch.zeros(2, 1, 8, 8), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (TWO[0], ZEROS, "images must have shape (n, C, H, W), got (1, 8, 8)."),
        (TWO, torch.zeros(2), "TypeError: labels must be integers, got torch.float32."),
        (TWO, torch.zeros(3, 2) > 0, "TypeError: labels must be integers, got torch.bool."),
        (TWO, ZEROS, "labels must be 2…values from 0."),
        (TWO, torch.tensor([0, -1]), "labels must be 2…from -1."),
    ],
)
def test_what_is_no_training_set_is_refused(refused, images, labels, sentence):
    refused(lambda: train_classifier(images, labels), sentence)


def test_a_classifier_refuses_other_images(refused):
    net, wide = load_classifier("digits"), torch.zeros(2, 1, 28, 28)
    refused(lambda: net.features(wide), "x must have shape (B, 1, 8, 8), got (2, 1, 28, 28).")
    sentence = "TypeError: x must be a floating-point tensor, got torch.uint8."
    refused(lambda: net.rows(TWO.byte()), sentence)
