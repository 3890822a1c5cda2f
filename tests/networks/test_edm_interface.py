"""Networks in code that was written for EDM: levels (B, 1, 1, 1), float64, one-hot labels."""

import itertools
import math

import pytest
import torch

import pfgm
from pfgm.networks import Preconditioned, UNet, build
from pfgm.networks.edm_interface import label_numbers

SHAPE = (3, 8, 8)
DATA = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []}


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def with_weights(net):
    """The network with all weights random: at first its last layer is zero."""
    draw = seeded()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    return net.eval()


def denoiser(kind, classes=0):
    if kind == "edm":
        return with_weights(
            build("edm", {"channels": 3, "resolution": 8, "classes": classes, **SMALL})
        )
    inner = {"shape": SHAPE, "width": 16, "classes": classes}
    return with_weights(build("denoiser", {"network": kind, "config": inner}))


def edm_style_sampler(net, latents, class_labels=None, *, steps=6, sigma_min=0.002, sigma_max=80.0):
    """EDM's deterministic sampler (arXiv 2206.00364, algorithm 1), with the calls that its own
    code makes: limits from the network, float64 points, levels that are 0-dimensional tensors."""
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    ramp = torch.arange(steps, dtype=torch.float64, device=latents.device) / (steps - 1)
    levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    levels = torch.cat([net.round_sigma(levels), torch.zeros_like(levels[:1])])
    x = latents.to(torch.float64) * levels[0]
    for now, after in itertools.pairwise(levels):
        slope = (x - net(x, now, class_labels).to(torch.float64)) / now
        ahead = x + (after - now) * slope
        if after > 0:
            mean = net(ahead, after, class_labels).to(torch.float64)
            ahead = x + (after - now) * (slope + (ahead - mean) / after) / 2
        x = ahead
    return x


@pytest.mark.parametrize(("kind", "D"), [("edm", math.inf), ("unet", 64.0), ("mlp", 64.0)])
def test_a_sampler_of_edm_ends_where_the_flow_ends(kind, D):
    net = denoiser(kind, classes=4)
    assert (net.img_channels, net.img_resolution, net.label_dim) == (3, 8, 4)
    flow = pfgm.PoissonFlowPP(SHAPE, D=D)
    start = flow.prior(4, generator=seeded())
    labels = torch.tensor([2, 0, 3, -1])
    one_hot = torch.cat([torch.eye(4)[labels[:3]], torch.zeros(1, 4)])
    with torch.no_grad():
        result = edm_style_sampler(net, start / flow.sigma_max, one_hot)
        other = edm_style_sampler(net, start / flow.sigma_max)
    assert result.dtype == torch.float64
    condition = {"labels": labels}
    correct = flow.sample(net, 4, x_init=start, solver="heun", steps=6, condition=condition)
    torch.testing.assert_close(result.float(), correct, rtol=1e-4, atol=1e-4)
    assert float((other - result).abs()[:3].max()) > 1e-3
    torch.testing.assert_close(other[3], result[3])


FIELD = pfgm.PoissonFlow.from_data(DATA)
NETWORKS = {
    "edm": lambda: denoiser("edm"),
    "denoiser": lambda: denoiser("unet"),
    "published denoiser": lambda: with_weights(
        build(
            "denoiser",
            {
                "network": "ddpmpp",
                "config": {
                    "channels": 3, "resolution": 8, "nf": 8, "ch_mult": [1], "num_res_blocks": 1,
                    "attn_resolutions": [],
                },
            },
        )
    ),
    "exact denoiser": lambda: pfgm.PoissonFlowPP(SHAPE, D=64).empirical(DATA),
    "exact field": lambda: FIELD.empirical(DATA),
    "field": lambda: with_weights(UNet(SHAPE, width=16)),
    "mlp": lambda: with_weights(pfgm.networks.MLP(SHAPE, width=16)),
    "published field": lambda: with_weights(
        pfgm.networks.DDPMpp(3, 8, nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    ),
    "preconditioned": lambda: Preconditioned(Scaled()),
    "wrapped denoiser": lambda: pfgm.PoissonFlowPP(SHAPE, D=64).network(Scaled()),
    "wrapped field": lambda: FIELD.network(Scaled()),
    "k-diffusion": lambda: pfgm.as_k_diffusion(FIELD.empirical(DATA), FIELD),
}  # fmt: skip


class Scaled(torch.nn.Module):
    """x times a function of the level (B,)."""

    def forward(self, x, level):
        assert level.shape == (len(x),)
        return x * (0.1 * level).cos().view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_levels_may_have_a_dimension_for_each_of_the_samples(name):
    net = NETWORKS[name]()
    x = torch.randn(3, *SHAPE, generator=seeded())
    level = torch.tensor([0.3, 2.0, 0.5])
    with torch.no_grad():
        torch.testing.assert_close(net(x, level.view(3, 1, 1, 1)), net(x, level))
        torch.testing.assert_close(net(x, torch.tensor(0.3)), net(x, level[:1].expand(3)))
        for wrong in (torch.ones(2), torch.ones(3, 1), torch.ones(1, 1, 1, 1), torch.ones_like(x)):
            with pytest.raises(
                ValueError, match=r"^(z|sigma) must be a number or (have|a tensor of) shape"
            ):
                net(x, wrong)


@pytest.mark.parametrize("flow", [FIELD, pfgm.PoissonFlowPP(SHAPE, D=64)], ids=["pfgm", "pfgmpp"])
def test_methods_of_a_flow_take_such_levels(flow):
    x, level = DATA[:3], torch.tensor([0.3, 2.0, 0.5])
    wide = level.view(3, 1, 1, 1)
    net = flow.empirical(DATA)
    torch.testing.assert_close(flow.denoise(net, x, wide), flow.denoise(net, x, level))
    assert torch.equal(flow.noise(wide, seeded()), flow.noise(level, seeded()))
    with pytest.raises(ValueError, match=r"sigma must have shape \(B,\), or.*got \(3, 1\)\."):
        flow.noise(level.view(3, 1))
    with pytest.raises(TypeError, match=r"sigma must be a torch\.Tensor, \(B,\), got float\."):
        flow.noise(0.5)
    if flow is FIELD:
        torch.testing.assert_close(
            flow.field(net, x, wide).field_z, flow.field(net, x, level).field_z
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["edm", "unet", "mlp"])
def test_x_may_have_another_dtype_than_the_network(kind, dtype):
    net = denoiser(kind)
    x, level = DATA[:3].to(dtype), torch.tensor([0.3, 2.0, 0.5])
    result = net(x, level)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(result.float(), net(DATA[:3], level), rtol=0, atol=tolerance)


def test_one_hot_labels():
    assert label_numbers(None, 3) is None
    numbers = torch.tensor([1, -1])
    assert label_numbers(numbers, 3) is numbers
    rows = torch.tensor([[0, 0, 1.0], [0, 0, 0]])
    assert label_numbers(rows, 3).tolist() == [2, -1]
    for wrong in ([[0, 0.5, 0.5]], [[0, 1.0, 1.0]], [[0, -1.0, 0]], [[0, 2.0, 0]]):
        with pytest.raises(ValueError, match=r"labels must be.*got rows that are not "):
            label_numbers(torch.tensor(wrong), 3)
    with pytest.raises(ValueError, match=r"labels must be.*got torch\.float32 of sha"):
        denoiser("edm", classes=4)(DATA[:2], torch.ones(2), torch.zeros(2, 5))


def test_networks_without_images_have_no_resolution():
    net = build("denoiser", {"network": "mlp", "config": {"shape": [2], "width": 8}})
    assert not hasattr(net, "img_resolution")
    assert net.label_dim == 0


MAKERS = [pfgm.PoissonFlow.from_data, lambda data: pfgm.PoissonFlowPP.from_data(data, D=8)]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_flow_from_an_array(make, dtype):
    bytes_ = (127.5 * (DATA + 1)).round()
    tensor = bytes_.to(torch.uint8) if dtype == "uint8" else DATA.to(getattr(torch, dtype))
    assert make(tensor.numpy()) == make(tensor) == make(pfgm.ReferenceSet(tensor))
    with pytest.raises(TypeError, match=r"must (be|hold) uint8 or floating.*int64"):
        make(bytes_.to(torch.int64).numpy())
    flow = make(tensor)
    with pytest.raises(TypeError, match=r"references must be a torch\.Tensor or a.*got ndarray\."):
        flow.empirical(tensor.numpy())


def test_images_with_channels_last(tmp_path):
    import numpy as np

    last = DATA.movedim(1, -1).contiguous()
    for make in MAKERS:
        for data in (last, last.numpy()):
            with pytest.warns(UserWarning, match=r"shape \(8, 8, 3\), as images with channels l"):
                make(data)
    hint = r"Channels come first: use x\.movedim\(-1, 1\)"
    with pytest.raises(ValueError, match=hint):
        FIELD.loss(FIELD.empirical(DATA), last)
    with pytest.raises(ValueError, match=r"use x\.movedim"):
        pfgm.posterior_mean(last, DATA, sigma=1.0)
    with pytest.raises(ValueError, match=r"use references\.movedim"):
        pfgm.posterior_mean(DATA, last, sigma=1.0)
    with pytest.raises(ValueError, match=hint):
        denoiser("edm")(last, torch.ones(20))
    np.save(tmp_path / "nhwc.npy", last.numpy())
    assert pfgm.ReferenceSet(tmp_path / "nhwc.npy").shape[1:] == (8, 8, 3)
    opened = pfgm.data.open(str(tmp_path / "nhwc.npy"), layout="images").samples
    assert torch.equal(opened[:], DATA)
