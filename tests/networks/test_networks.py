"""The networks: conditioning, configuration, sizes, messages, and that they learn."""

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import pfgm
from pfgm.networks import (
    MLP,
    DDPMpp,
    Denoiser,
    EDMDenoiser,
    UNet,
    build,
    embedding,
    field_from_mean,
)
from pfgm.networks.unet import Attention

FIELD_NETWORKS = ("mlp", "unet")
MLP_OPTIONS: dict[str, Any] = {"width": 24, "depth": 2}
UNET_OPTIONS: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "heads": 2}
EXTREME_Z = [1e-10, 1e-6, 1e-3, 0.1, 1.0, 40.0, 500.0]
EXTREME_NORM = [0.0, 1e-6, 1.0, 30.0, 3000.0, 1e5]


def make(name: str, seed: int = 0, shape: tuple[int, ...] = (1, 8, 8), **options: Any) -> Any:
    torch.manual_seed(seed)
    defaults = MLP_OPTIONS if name == "mlp" else UNET_OPTIONS
    return build(name, {"shape": shape, **defaults, **options})


def scramble(net: torch.nn.Module, scale: float = 0.1) -> None:
    """Changes the layers that start at zero, so that a test depends on the whole network."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))


@pytest.fixture(params=FIELD_NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def net(name: str) -> Any:
    net = make(name)
    scramble(net)
    return net


def grid(n: int) -> tuple[Tensor, Tensor]:
    """Points at every pair of extreme ‖x‖ and extreme z."""
    directions = torch.randn(len(EXTREME_NORM) * len(EXTREME_Z), n)
    directions /= directions.norm(dim=1, keepdim=True)
    norms = torch.tensor(EXTREME_NORM).repeat_interleave(len(EXTREME_Z))
    return directions * norms[:, None], torch.tensor(EXTREME_Z).repeat(len(EXTREME_NORM))


def test_a_network_in_float64_takes_points_in_float32(net: Any) -> None:
    x, z = torch.randn(3, 1, 8, 8), torch.rand(3) + 0.1
    expected = net(x, z)
    torch.testing.assert_close(net.double()(x, z), expected, rtol=1e-3, atol=1e-3)


def test_outputs_and_gradients_are_finite_at_the_extremes(net: Any) -> None:
    x, z = grid(64)
    x = x.view(-1, 1, 8, 8).requires_grad_()
    z.requires_grad_()
    field_x, field_z = net(x, z)
    assert field_x.shape == x.shape
    assert field_z.shape == z.shape
    assert field_x.dtype == field_z.dtype == torch.float32
    for row in range(len(x)):  # a sum over rows would let one row hide another's overflow
        assert torch.isfinite(field_x[row]).all()
        assert torch.isfinite(field_z[row])
        gradients = torch.autograd.grad(
            field_x[row].square().sum() + field_z[row].square(),
            [x, z, *net.parameters()],
            retain_graph=True,
        )
        assert all(torch.isfinite(g).all() for g in gradients)
    assert (field_z < 0).all()
    norms = torch.cat([field_x.flatten(1), field_z[:, None]], 1).norm(dim=1)
    assert (norms <= 8 * (1 + 1e-6)).all()


def test_backbone_inputs_are_of_order_one(name: str) -> None:
    net = make(name)
    seen: list[Tensor] = []
    net.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x, z = grid(64)
    net(x.view(-1, 1, 8, 8), z)
    assert seen[0].flatten(1).square().mean(1).max() <= 1.0 + 1e-5
    embedding = net.embedding(x.norm(dim=1) / 8, z)
    assert embedding.abs().max() < 10


def test_embedding_is_flat_below_its_floor_and_varies_above(name: str) -> None:
    embedding = make(name).embedding
    rms = torch.full((4,), 0.85)
    values = embedding(rms, torch.tensor([1e-10, 1e-6, 0.1, 0.2]))
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)
    assert (values[2] - values[3]).abs().max() > 1e-3


def test_the_field_gives_back_the_mean(net: Any) -> None:
    """mean = x − z v_x/v_z, as in the solvers, is accurate in float32."""
    z = torch.logspace(-3, math.log10(18.0), 60)
    noise = torch.randn(60, 64) * z[:, None]
    for tail in (1.0, 10.0):  # Student-t noise: up to many times z
        x = (torch.randn(60, 64).clamp(-1, 1) + tail * noise).view(-1, 1, 8, 8)
        with torch.no_grad():
            field_x, field_z = net(x, z)
            mean = net.mean(x, z)
        recovered = x - (z / field_z).view(-1, 1, 1, 1) * field_x
        scale = x.abs().flatten(1).amax(1).clamp_min(1.0)
        error = (recovered - mean).abs().flatten(1).amax(1)
        assert (error <= 2e-6 * scale).all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_field_has_the_digits_of_x_minus_mean(name: str, offset: float) -> None:
    """Far from the origin and close to the data, where a rounded mean has lost them."""
    shape = (3,) if name == "mlp" else (1, 4, 4)
    net = make(name, shape=shape, center=offset)
    scramble(net, 0.02)
    x = offset + torch.randn(20, *shape)
    z = torch.logspace(-4, 0, 20)
    result = net(x, z)[0].flatten(1).double()
    wide = copy.deepcopy(net).double()
    expected = wide(x.double(), z.double())[0].flatten(1)
    error = (result - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2e-5


def test_the_exact_substitution_of_v_z_changes_nothing(name: str) -> None:
    """The v_z that v_x implies is that of the network, below z_exp and above."""
    net = make(name, gamma=5.0)
    scramble(net)
    z = torch.logspace(-3, math.log10(18.0), 60)
    x = (torch.randn(60, 64) * (1 + 3 * z[:, None])).view(-1, 1, 8, 8)
    with torch.no_grad():
        field_x, field_z = net(x, z)
    n = field_x.flatten(1).norm(dim=1) / 8
    e_x = n * (5 + (25 * n**2 + (1 - n**2) * z**2).sqrt()) / (1 - n**2)
    torch.testing.assert_close(-8 * z / ((e_x**2 + z**2).sqrt() + 5), field_z, rtol=3e-5, atol=0)


def test_the_mean_is_x_where_z_vanishes(net: Any) -> None:
    x = torch.randn(5, 1, 8, 8).clamp(-1, 1)
    torch.testing.assert_close(net.mean(x, torch.full((5,), 1e-10)), x)
    assert (net.mean(x, torch.ones(5)) - x).abs().max() > 0.1


def test_field_from_mean_matches_the_formula_in_float64() -> None:
    torch.manual_seed(1)
    x, mean, z = (
        torch.randn(7, 3, 2).double(),
        torch.randn(7, 3, 2).double(),
        torch.rand(7).double(),
    )
    field_x, field_z = field_from_mean(x, z, mean, gamma=5.0)
    for row in range(7):
        e = [*(x[row] - mean[row]).flatten().tolist(), z[row].item()]
        norm = math.sqrt(sum(value**2 for value in e))
        v = [-math.sqrt(6) * value / (norm + 5.0) for value in e]
        assert [*field_x[row].flatten().tolist(), field_z[row].item()] == pytest.approx(v)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_field_is_zero_with_finite_gradient_where_e_is_zero(gamma: float) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    field_x, field_z = field_from_mean(x, torch.zeros(2), torch.ones(2, 3), gamma=gamma)
    assert not field_x.any()
    assert not field_z.any()
    if gamma > 0:
        field_x.sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


def test_tuples_and_lists_are_the_same() -> None:
    assert UNet([1, 8, 8], multipliers=[1, 2]).config == UNet((1, 8, 8), multipliers=(1, 2)).config
    assert MLP([4]).config == MLP((4,)).config


def test_numpy_numbers_are_stored_as_python_numbers() -> None:
    size, options = np.int64(8), {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1}
    for net in (
        MLP(np.array([4]).tolist(), width=size, depth=1, data_std=np.float32(0.5)),
        DDPMpp(1, size, nf=8, ch_mult=(1,), num_res_blocks=1),
        EDMDenoiser(1, size, **options),
    ):
        assert json.loads(json.dumps(net.config)) == net.config


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        *(("mlp", shape, {}) for shape in [(1,), (2,), (2, 3), (1, 5, 4)]),
        ("unet", (3, 4, 4), {"multipliers": (1,)}),
        ("unet", (3, 5, 7), {"multipliers": (2, 3)}),
        ("unet", (3, 13, 6), {"multipliers": (1, 2, 2, 2)}),
        ("unet", (3, 28, 28), {"multipliers": (1, 2, 2, 2)}),
        ("unet", (2, 4), {"multipliers": (1, 1, 1, 1)}),  # more levels than halvings
        ("unet", (2, 64), {"multipliers": (1, 2, 2)}),
        ("unet", (1, 5, 4, 6), {"multipliers": (1, 2, 2)}),
    ],
)
def test_any_shape_with_gradients_in_all_parameters(
    name: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    net = make(name, shape=shape, classes=3, **options)
    scramble(net)
    x = torch.randn(3, *shape)
    field_x, field_z = net(x, torch.rand(3), torch.tensor([0, 1, 2]))
    assert field_x.shape == x.shape
    assert field_z.shape == (3,)
    (field_x.square().sum() + field_z.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize(
    ("shape", "patch"), [((2, 12), 3), ((3, 8, 12), 2), ((1, 16, 16), 4), ((2, 8, 10, 8), 2)]
)
def test_patches_are_channels(shape: tuple[int, ...], patch: int) -> None:
    """A U-Net on patches is one on their values as channels; the field is put together again."""
    net = make("unet", shape=shape, patch=patch)
    scramble(net)
    seen: list[Tensor] = []
    net.stem.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    values, axes = patch ** len(shape[1:]), len(shape[1:])

    def give_back(*_: Any) -> Tensor:  # all but the channel of ones, as output and as gate
        return seen[0][:, :-values].repeat(1, 2, *[1] * axes)

    net.head.register_forward_hook(give_back)
    x = torch.randn(2, *shape)
    output, gate = net.backbone(x, torch.ones(2), torch.ones(2))
    assert seen[0].shape[2:] == tuple(n // patch for n in shape[1:])
    assert torch.equal(output, x)
    assert torch.equal(gate, x)
    # Values of one patch share a place: those of the first patch alone change the first place.
    corner = (slice(None), slice(None), *[slice(patch)] * axes)
    moved = x.clone()
    moved[corner] += 1
    net.backbone(moved, torch.ones(2), torch.ones(2))
    changed = (seen[1] != seen[0]).any(1).any(0)
    assert changed.flatten()[0]
    assert changed.sum() == 1


def test_rows_do_not_depend_on_each_other(net: Any) -> None:
    x, z = torch.randn(6, 1, 8, 8), torch.rand(6)
    together = net(x, z)
    alone = net(x[2:3], z[2:3])
    torch.testing.assert_close(together[0][2:3], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1][2:3], alone[1], atol=1e-5, rtol=1e-5)


def test_an_empty_batch_gives_an_empty_field(name: str) -> None:
    field_x, field_z = make(name)(torch.zeros(0, 1, 8, 8), torch.zeros(0))
    assert field_x.shape == (0, 1, 8, 8)
    assert field_z.shape == (0,)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        *(
            (UNet, {"shape": shape}, r"shape must be \(C, L\), \(C, H, W\) or \(C, D,.*got \(")
            for shape in ((8,), (2, 3), (1, 8, 3), (2, 8, 3), (1, 4, 4, 4, 4))
        ),
        (
            UNet,
            {"shape": (1, 8, 9), "patch": 2},
            r"patch must divide the axes \(8, 9\) and leave at.*got 2\.",
        ),
        (UNet, {"shape": (1, 8, 6), "patch": 2}, r"patch must divide the axes.*got 2\."),
        (UNet, {"shape": (1, 8, 8), "heads": 5}, r"heads must be 0 or a divisor.*got 5\."),
    ],
)
def test_construction_errors(
    network: type[MLP] | type[UNet], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_forward_errors(name: str, refused: Callable[..., None]) -> None:
    net = make(name)
    for x, z, sentence in (
        ((2, 64), (2,), "x must have shape (B, 1, 8, 8), got (2, 64)."),
        ((1, 8, 8), (1,), "x must have shape (B, 1, 8, 8), got (1, 8, 8)."),
        ((2, 1, 8, 8), (3,), "z must be a number or have shape (2,),…got shape (3,)."),
        ((2, 8, 8, 1), (2,), "x must have shape (B, 1, 8, 8), got…first: use x.movedim(-1, 1)."),
        ((2, 1, 8, 8), (2, 1), "z must be a number or have shape (2,),…got shape (2, 1)."),
    ):
        refused(lambda x=x, z=z: net(torch.zeros(x), torch.ones(z)), sentence)


def test_training_reduces_the_loss(name: str, losses_in_training: Callable[..., Any]) -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(4)).round() * 2 - 1
    flow = pfgm.PoissonFlow.from_data(images)
    torch.manual_seed(3)
    net = flow.network(name, **(MLP_OPTIONS if name == "mlp" else UNET_OPTIONS))
    loss = partial(flow.loss, net, images.repeat(8, 1, 1, 1), images)
    losses = losses_in_training(net, loss, steps=30, learning_rate=3e-3, seeds=3)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_labels(name: str) -> None:
    network = make(name, classes=3)
    assert network.config["classes"] == 3
    shape = (6, *network.shape)
    x, z = torch.randn(shape), torch.rand(6)
    scramble(network)
    labels = torch.tensor([0, 1, 2, -1, -7, 0])
    labelled, plain = network(x, z, labels=labels)[0], network(x, z)[0]
    same = torch.isclose(labelled, plain).flatten(1).all(1)
    assert same.tolist() == [False, False, False, True, True, False]
    with pytest.raises(ValueError, match=r"labels must be below 3, or negative.*got 3\."):
        network(x, z, labels=torch.tensor([0, 1, 3, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"labels must be.*got torch\.int64 of shape"):
        network(x, z, labels=labels[:5])
    with pytest.raises(ValueError, match="without classes"):
        make(name)(x, z, labels=labels)


@pytest.mark.parametrize("label", [3, 4])
def test_a_label_that_is_not_checked_is_never_taken_for_none(
    monkeypatch: pytest.MonkeyPatch, name: str, label: int
) -> None:
    """As on a GPU, where values are not checked."""
    monkeypatch.setattr(embedding, "checks_values", lambda device: False)
    network = make(name, classes=3)
    with pytest.raises(IndexError):
        network(torch.randn(1, *network.shape), torch.rand(1), labels=torch.tensor([label]))


def test_denoisers(tmp_path: Any, name: str) -> None:
    options = {"shape": (1, 8, 8), "width": 16, "classes": 3}
    net = Denoiser(name, options, sigma_data=0.7)
    x, sigma = torch.randn(6, 1, 8, 8), torch.logspace(-3, 2, 6)
    # Untrained, the backbone says 0, and what is left is EDM's c_skip.
    skip = 0.7**2 / (sigma**2 + 0.7**2)
    torch.testing.assert_close(net(x, sigma), skip.view(-1, 1, 1, 1) * x)
    scramble(net)
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    with_labels, without = net(x, sigma, labels), net(x, sigma)
    assert torch.isfinite(with_labels).all()
    assert torch.equal(with_labels[3], without[3])
    assert not torch.equal(with_labels[4], without[4])

    flow = pfgm.PoissonFlowPP((1, 8, 8), D=64, sigma_data=0.7)
    loss = flow.loss(net, x.clamp(-1, 1), condition={"labels": labels})
    loss.backward()
    pfgm.save(tmp_path / "net.safetensors", flow, net)
    same_flow, same = pfgm.load(tmp_path / "net.safetensors")
    assert same_flow == flow
    assert isinstance(same, Denoiser)
    assert same.config == json.loads(json.dumps(net.config))
    assert torch.equal(same(x, sigma, labels), with_labels)


def test_a_mean_that_the_field_would_ignore_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Own defines mean, which forward does not call"):
        type("Own", (MLP,), {"mean": lambda self, x, z, labels=None: x})
    own = {"mean": MLP.mean, "forward": lambda self, x, z: self.mean(x, z)}
    heir = type("Heir", (type("Own", (MLP,), own),), {"mean": MLP.mean})  # whose forward calls it
    assert heir.forward is own["forward"]


def test_attention_without_gradients_has_the_layout_of_the_fast_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = Attention(2, 16, heads=2).requires_grad_(False)
    torch.nn.init.ones_(attention.projection.weight)
    h = torch.randn(3, 16, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fits, attend = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(*inputs: Tensor) -> Tensor:
        fits.append(all(x.stride(-1) == 1 for x in inputs))
        return attend(*inputs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    expected = attention(h)
    with torch.no_grad():
        torch.testing.assert_close(attention(h), expected)
        with forward_ad.dual_level():
            attention(h)
    assert fits == [False, True, False]  # that kernel has neither tangents nor second derivatives
    (gradient,) = torch.autograd.grad(expected.sum(), h, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), h)


def test_unet_of_a_signal_is_that_of_an_image_constant_across() -> None:
    """A 1-D convolution is a 2-D one whose kernel has one row that is not zero."""
    signal, image = UNet((2, 8), width=16, heads=0), UNet((2, 8, 8), width=16, heads=0)
    scramble(signal)
    weights = {}
    for (name, value), like in zip(
        signal.state_dict().items(), image.state_dict().values(), strict=True
    ):
        if value.ndim == 3:
            wide = torch.zeros_like(like)
            wide[:, :, like.shape[2] // 2] = value
            value = wide
        weights[name] = value
    image.load_state_dict(weights)
    x, z = torch.randn(4, 2, 8), torch.rand(4)
    wide_x = x[:, :, None].expand(-1, -1, 8, -1).contiguous()
    output, gate = signal.backbone(x, x.flatten(1).norm(dim=1) / 4, z)
    wide_output, wide_gate = image.backbone(wide_x, x.flatten(1).norm(dim=1) / 4, z)
    torch.testing.assert_close(wide_output, output[:, :, None].expand_as(wide_output))
    torch.testing.assert_close(wide_gate, gate[:, :, None].expand_as(wide_gate))
