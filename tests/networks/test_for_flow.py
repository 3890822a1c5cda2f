"""The networks that a flow makes: they fit its samples, its scale and its parametrisation."""

import math

import pytest
import torch
from torch.nn import Linear

import pfgm
from pfgm.networks import MLP, DDPMpp, Denoiser, EDMDenoiser, FieldNetwork, UNet

IMAGES = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
SIGNALS = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(0))
TABLE = 5 + 3 * torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
SMALL = {"width": 8, "classes": 3}
PUBLISHED = {"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}
EDM = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}


class Own(MLP):
    pass


@pytest.mark.parametrize(
    ("data", "kind", "settings", "field", "denoiser"),
    [
        (IMAGES, "auto", SMALL, UNet, "unet"),
        (IMAGES, "mlp", SMALL, MLP, "mlp"),
        (SIGNALS, "auto", SMALL, UNet, "unet"),
        (IMAGES, "ddpmpp", PUBLISHED, DDPMpp, "ddpmpp"),
        (IMAGES, "edm", EDM, None, EDMDenoiser),
        (TABLE, "auto", SMALL, MLP, "mlp"),
        (TABLE, Own, SMALL, Own, None),
    ],
)
def test_a_network_fits_its_flow(data, kind, settings, field, denoiser):
    if field is not None:
        flow = pfgm.PoissonFlow.from_data(data)
        net = flow.network(kind, **settings)
        assert type(net) is field
        assert flow.loss(net, data[:8], data).isfinite()
        if isinstance(net, FieldNetwork):
            assert (net.gamma, net.config["classes"]) == (flow.gamma, 3)
            center = 0 if flow.spread is None else flow.center.float()
            assert torch.equal(net.center, torch.as_tensor(center).float())
            assert net.data_std == pytest.approx(float(data.std()), rel=0.03)
            assert net.scale == (1 if flow.spread is None else flow.spread)
    if denoiser is not None:
        plus = pfgm.PoissonFlowPP.from_data(data, D=64)
        net = plus.network(kind, **settings)
        assert net.sigma_data == plus.sigma_data
        if denoiser is EDMDenoiser:
            assert type(net) is EDMDenoiser
        else:
            assert (type(net), net.config["network"]) == (Denoiser, denoiser)
        assert plus.loss(net, data[:8]).isfinite()


def test_the_scale_follows_from_the_published_rule_unless_it_is_given():
    flow = pfgm.PoissonFlow((3, 32, 32), data_norm=30.0)
    assert flow.network("mlp", width=8).data_std == pytest.approx(30 / math.sqrt(3072), rel=0.02)
    assert flow.network("mlp", width=8, data_std=0.7).data_std == 0.7


@pytest.mark.parametrize(
    ("error", "message", "D", "kind", "settings"),
    [
        (ValueError, r"net must be one of auto, .*, got 'vit'\.", 1, "vit", {}),
        (ValueError, r"net must be one of auto, .*, got 'edm'\.", 1, "edm", {}),
        (ValueError, r"takes square images .* got samples of shape \(3,\)", 1, "ddpmpp", {}),
        (ValueError, r"takes square images .* got samples of shape \(3,\)", 64, "edm", {}),
        (TypeError, "unexpected keyword argument 'layers'", 1, "mlp", {"layers": 2}),
        (
            TypeError,
            "net must be a name or a module for a PoissonFlowPP, got the class Own",
            64,
            Own,
            {},
        ),
        (
            TypeError,
            "a module of your own or a subclass of FieldNetwork, got <class",
            1,
            Linear,
            {},
        ),
        (TypeError, "a module of your own or a subclass of FieldNetwork, got None", 64, None, {}),
        (
            TypeError,
            "no setting 'width'; its settings are predicts, .*, variance_preserving",
            1,
            Linear(3, 3),
            {"width": 8},
        ),
    ],
)
def test_what_no_network_fits(error, message, D, kind, settings):
    flow = pfgm.PoissonFlow((3,), spread=1.0) if D == 1 else pfgm.PoissonFlowPP((3,), D=D)
    with pytest.raises(error, match=message):
        flow.network(kind, **settings)
