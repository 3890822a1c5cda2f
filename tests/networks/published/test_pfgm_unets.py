"""The networks published with PFGM: names, shapes and outputs are the published ones."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from pfgm.networks import DDPMpp, NCSNpp
from pfgm.networks.published.pfgm_unets import Resampling

FIXTURES = Path(__file__).parent / "fixtures"
NETWORKS = {"ddpmpp": DDPMpp, "ncsnpp": NCSNpp}
SMALL = {"nf": 64, "ch_mult": (1, 2, 4), "num_res_blocks": 1, "attn_resolutions": (8,)}
TINY = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_published_ones(name, fixture_weights):
    expected = np.load(FIXTURES / f"{name}_small.npz")
    net = NETWORKS[name](3, 16, **SMALL).eval()
    net.load_state_dict(fixture_weights(f"{name}_small"))
    with torch.no_grad():
        result = net(torch.from_numpy(expected["x"]), torch.from_numpy(expected["z"]))
    for values, correct in zip(result, ("field_x", "field_z"), strict=True):
        torch.testing.assert_close(values, torch.from_numpy(expected[correct]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "blocks", "tensors", "values"),
    [
        ("ddpmpp", 4, 564, 61_805_572),
        ("ddpmpp", 8, 956, 106_633_732),
        ("ncsnpp", 4, 571, 62_760_068),
    ],
)
def test_the_cifar10_configuration(name, blocks, tensors, values, published_shapes):
    with torch.device("meta"):
        net = NETWORKS[name](3, 32, num_res_blocks=blocks)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert (len(shapes), sum(p.numel() for p in net.parameters())) == (tensors, values)
    if blocks == 4:
        assert list(shapes.items()) == list(published_shapes(f"{name}_cifar10").items())


@pytest.mark.parametrize("name", NETWORKS)
def test_they_start_small_and_train(name, losses_in_training):
    torch.manual_seed(0)
    net = NETWORKS[name](1, 8, **TINY)
    x, z = torch.rand(16, 1, 8, 8) * 2 - 1, torch.rand(16) + 0.1
    assert max(float(part.detach().abs().max()) for part in net(x, z)) < 1e-3
    flow = pfgm.PoissonFlow.from_data(x)
    losses = losses_in_training(
        net, partial(flow.loss, net, x, x), steps=20, learning_rate=2e-3, seeds=3
    )
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert flow.sample(net, 2, steps=2).isfinite().all()


def test_smooth_resampling_keeps_constants_and_smooth_images():
    resampling = Resampling(smooth=True)
    constant = torch.full((1, 2, 8, 8), 3.0)
    # At the border zeros come in.
    assert torch.allclose(resampling.down(constant)[..., 1:-1, 1:-1], torch.tensor(3.0))
    assert torch.allclose(resampling.up(constant)[..., 2:-2, 2:-2], torch.tensor(3.0))
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    down = resampling.down(ramp)[0, 0, 4, 1:-1]
    assert torch.allclose(down, torch.arange(2.5, 14, 2)[: len(down)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nf": 6}, r"nf must be a multiple of 4, got 6\."),
        ({"resolution": 30}, r"resolution must be a multiple of 8, as 4 levels.*got 30\."),
        ({"progressive_input": "sum"}, r"progressive_input must be one of.*got 'sum'\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        DDPMpp(**{"channels": 3, "resolution": 32, **options})
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1,.*got \(2, 1, 4, 4\)\."):
        DDPMpp(1, 8, **TINY)(torch.randn(2, 1, 4, 4), torch.rand(2))
