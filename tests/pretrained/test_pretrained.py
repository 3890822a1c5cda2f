"""The networks that come with the package."""

import pytest
import torch
from sklearn.svm import SVC

import pfgm
from pfgm.pretrained import PRETRAINED, load_pretrained, pretrained_path

MAX_BYTES = 8_000_000
SHAPES = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28)}


@pytest.mark.parametrize("name", PRETRAINED)
def test_each_is_small(name):
    assert pretrained_path(name).stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("name", PRETRAINED)
def test_each_samples_images_of_its_labels(name):
    flow, net = load_pretrained(name)
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
    flow, net = load_pretrained("digits")
    labels = torch.arange(200) % 10
    generator = torch.Generator().manual_seed(0)
    samples = flow.sample(net, 200, condition={"labels": labels}, generator=generator)
    assert classifier.score(samples.flatten(1).numpy(), labels.numpy()) >= 0.9
    # They are new: not nearer to the training data than held-out digits are, by half.
    nearest = pfgm.metrics.nearest_distance(samples, digits.train).median()
    between = pfgm.metrics.nearest_distance(digits.held_out, digits.train).median()
    assert float(nearest) > 0.5 * float(between)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of digits,.*got 'cifar10'\."):
        load_pretrained("cifar10")
