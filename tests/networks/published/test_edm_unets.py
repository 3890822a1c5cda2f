"""The networks of EDM and PFGM++: their outputs are the published ones."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pfgm
from pfgm.networks import EDMDenoiser, build, embedding
from pfgm.networks.published.edm_unets import EDMConv

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = {"ddpmpp": EDMDenoiser, "ncsnpp": EDMDenoiser.ncsnpp}
SMALL = {"model_channels": 16, "channel_mult": (1, 2, 3), "num_blocks": 1, "attn_resolutions": (8,)}
TINY = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_the_published_ones(name, fixture_weights):
    fixture = np.load(FIXTURES / f"edm_{name}_small.npz")
    expected = {key: torch.from_numpy(fixture[key]) for key in fixture.files}
    weights = fixture_weights(f"edm_{name}_small")
    net = KINDS[name](3, 16, classes=10, augment_dim=9, **SMALL).eval()
    assert list(net.state_dict()) == list(weights)
    net.load_state_dict(weights)
    plain = KINDS[name](3, 16, augment_dim=9, **SMALL).eval()
    plain.load_state_dict({k: v for k, v in weights.items() if "map_label" not in k})
    x, sigma, labels = expected["x"], expected["sigma"], expected["labels"]
    with torch.no_grad():
        result = {
            "unconditional": plain(x, sigma),
            "unlabelled": net(x, sigma),
            "labelled": net(x, sigma, labels),
            "augmented": net(x, sigma, labels, augment=expected["augment"]),
        }
        none = net(x, sigma, torch.full((3,), -1))
    for key, values in result.items():
        torch.testing.assert_close(values, expected[key], rtol=0, atol=1e-5, msg=key)
    torch.testing.assert_close(none, result["unlabelled"], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "values"), [("ddpmpp", 55_733_891), ("ncsnpp", 56_397_827)])
def test_the_cifar10_configuration(name, values, published_shapes):
    with torch.device("meta"):
        net = KINDS[name](3, 32, augment_dim=9)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert list(shapes.items()) == list(published_shapes(f"edm_{name}_cifar10").items())
    assert sum(p.numel() for p in net.parameters()) == values


@pytest.mark.parametrize("name", KINDS)
def test_they_start_small_and_train(name, losses_in_training):
    torch.manual_seed(0)
    net = KINDS[name](1, 8, classes=3, **TINY)
    flow = pfgm.PoissonFlowPP((1, 8, 8), D=128)
    x, sigma = torch.linspace(-0.5, 0.5, 16).view(16, 1, 1, 1).expand(16, 1, 8, 8), torch.ones(16)
    torch.testing.assert_close(net(x, sigma / 2), x / 2, rtol=0, atol=1e-3)  # c_skip at sigma_data
    condition = {"labels": torch.arange(16) % 4 - 1}
    loss = partial(flow.loss, net, x, None, condition=condition)
    losses = losses_in_training(net, loss, steps=20, learning_rate=5e-3, seeds=3)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert flow.sample(net, 2, steps=2).isfinite().all()


def test_a_label_that_is_not_checked_is_never_taken_for_none(monkeypatch):
    """As on a GPU, where values are not checked and NaN shows what is wrong."""
    monkeypatch.setattr(embedding, "checks_values", lambda device: False)
    net = EDMDenoiser(1, 8, classes=3, **TINY)
    mean = net(torch.randn(3, 1, 8, 8), torch.ones(3), torch.tensor([2, 3, -1]))
    assert mean.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_dtypes(name):
    net = KINDS[name](1, 8, classes=3, augment_dim=2, sigma_data=0.7, **TINY).eval()
    assert build("edm", net.config).config == net.config
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1, 80]), torch.tensor([2, 0, 1])
    mean = net(x, sigma, labels)
    other = copy.deepcopy(net)
    nn.init.ones_(other.model.dec["8x8_aux_conv"].bias)
    assert not torch.equal(other(x, sigma, labels), mean)
    assert torch.equal(net(x, sigma, labels), mean)
    double = net.double()(x.double(), sigma.double(), labels)
    torch.testing.assert_close(double, mean.double(), rtol=0, atol=1e-5)


def test_resampling_keeps_constants():
    for name in KINDS:
        net = KINDS[name](3, 16, **SMALL)
        for part in net.modules():
            if isinstance(part, EDMConv) and part.direction is not None:
                assert float(part.resample_filter.sum()) == 1
                assert torch.equal(part.resample_filter, part.resample_filter.mT)
    kernel = 64 * EDMConv(1, 1, direction="up", taps=(1, 3, 3, 1)).resample_filter[0, 0]
    assert torch.equal(kernel[0], torch.tensor([1.0, 3, 3, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_channels": 6}, "layers must have a.*got 6 from model_channels an"),
        ({"model_channels": 132}, "layers must have a.*got 132 from model_channels"),
        ({"resolution": 30}, r"resolution must be a multiple of 4, as 3 levels.*got 30\."),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter must have an.*got \(1, 2, 1\)\."),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        EDMDenoiser(**{"channels": 3, "resolution": 32, **options})


def test_bad_arguments(refused):
    net, x, sigma = EDMDenoiser(1, 8, classes=3, **TINY), torch.randn(2, 1, 8, 8), torch.ones(2)
    for arguments, sentence in (
        ((x[..., :4, :4], sigma), "x must have shape (B, 1, 8, 8), got (2, 1, 4, 4)."),
        ((x, torch.ones(3)), "sigma must be a number or have shape…of a sample, got shape (3,)."),
        ((x, sigma, torch.tensor([0, 3])), "labels must be below 3, or…for no label, got 3."),
        ((x, sigma, None, torch.ones(2, 1)), "augment must have shape (2,…is 0, got (2, 1)."),
    ):
        refused(lambda arguments=arguments: net(*arguments), sentence)
    unlabelled = EDMDenoiser(1, 8, **TINY)
    refused(
        lambda: unlabelled(x, sigma, torch.tensor([0, 1])),
        "labels given to a network without classes; build it with classes=….",
    )


def test_attention_has_four_axes_which_export_to_onnx_needs(monkeypatch):
    axes, attend = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v):
        axes.append((q.ndim, k.ndim, v.ndim))
        return attend(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    EDMDenoiser(1, 8, **TINY)(torch.randn(2, 1, 8, 8), torch.ones(2))
    assert {*axes} == {(4, 4, 4)}
