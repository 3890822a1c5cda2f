"""The published networks: names, shapes and outputs are those of the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from pfgm.networks import DDPMpp, Denoiser, NCSNpp, build, load_published
from pfgm.networks.published.load import _architecture
from pfgm.networks.published.pfgm_unets import Resampling

FIXTURES = Path(__file__).parent / "fixtures"
NETWORKS = {"ddpmpp": DDPMpp, "ncsnpp": NCSNpp}
SMALL = {"nf": 64, "ch_mult": (1, 2, 4), "num_res_blocks": 1, "attn_resolutions": (8,)}
TINY = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


def listed(name):
    """Names and shapes of the parameters of a published network, in their order."""
    lines = (FIXTURES / f"{name}_params.txt").read_text().splitlines()
    return {name: tuple(map(int, shape)) for name, *shape in (line.split() for line in lines)}


def made_up(shapes):
    """The weights that the fixtures were made with: each from a seed that is its place."""
    weights = {}
    for place, (name, shape) in enumerate(shapes.items()):
        values = np.random.RandomState(place).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            fan_in = shape[0] if name.endswith(".W") else np.prod(shape[1:])
            values /= np.sqrt(fan_in).astype(np.float32)
        else:
            values = 0.1 * values + (1 if name.endswith("weight") else 0)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_published_ones(name):
    expected = np.load(FIXTURES / f"{name}_small.npz")
    net = NETWORKS[name](3, 16, **SMALL).eval()
    net.load_state_dict(made_up(listed(f"{name}_small")))
    with torch.no_grad():
        found = net(torch.from_numpy(expected["x"]), torch.from_numpy(expected["z"]))
    for values, correct in zip(found, ("field_x", "field_z"), strict=True):
        torch.testing.assert_close(values, torch.from_numpy(expected[correct]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "blocks", "tensors", "values"),
    [
        ("ddpmpp", 4, 564, 61_805_572),
        ("ddpmpp", 8, 956, 106_633_732),
        ("ncsnpp", 4, 571, 62_760_068),
    ],
)
def test_the_cifar10_configuration(name, blocks, tensors, values):
    with torch.device("meta"):
        net = NETWORKS[name](3, 32, num_res_blocks=blocks)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert (len(shapes), sum(p.numel() for p in net.parameters())) == (tensors, values)
    if blocks == 4:
        assert list(shapes.items()) == list(listed(f"{name}_cifar10").items())


@pytest.mark.parametrize("name", NETWORKS)
def test_they_start_small_and_train(name):
    torch.manual_seed(0)
    net = NETWORKS[name](1, 8, **TINY)
    x, z = torch.rand(16, 1, 8, 8) * 2 - 1, torch.rand(16) + 0.1
    assert max(float(part.detach().abs().max()) for part in net(x, z)) < 1e-3
    flow = pfgm.PoissonFlow.from_data(x)
    optimiser = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for step in range(30):
        loss = flow.loss(net, x, x, torch.Generator().manual_seed(step % 3))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert flow.sample(net, 2, steps=2).isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoints_and_denoisers(tmp_path, name):
    net = build(name, {"channels": 1, "resolution": 8, **TINY}).eval()
    flow = pfgm.PoissonFlow((1, 8, 8), data_norm=5.0)
    pfgm.save(tmp_path / "net.safetensors", flow, net)
    loaded = pfgm.load(tmp_path / "net.safetensors").network
    assert type(loaded) is type(net)
    assert loaded.config == net.config
    x, z = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 40.0])
    assert torch.equal(loaded(x, z)[0], net(x, z)[0])

    denoiser = Denoiser(name, net.config)
    assert denoiser(x, z).shape == x.shape
    plusplus = pfgm.PoissonFlowPP((1, 8, 8), D=128)
    loss = plusplus.loss(denoiser, x)
    loss.backward()
    assert loss.isfinite()


def test_smooth_resampling_keeps_constants_and_what_is_smooth():
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
        ({"nf": 6}, "nf is 6; allowed are multiples of 4"),
        ({"resolution": 30}, "resolution is 30; allowed are multiples of 8"),
        ({"embedding": "learned"}, "embedding is 'learned'"),
        ({"progressive_input": "sum"}, "progressive_input is 'sum'"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        DDPMpp(**{"channels": 3, "resolution": 32, **options})
    with pytest.raises(ValueError, match="x and z have shapes"):
        DDPMpp(1, 8, **TINY)(torch.randn(2, 1, 4, 4), torch.rand(2))


# ---- published checkpoints ----


def published_file(path, net, seed=1):
    """As the published trainer writes one: DataParallel's prefixes, a list of averaged weights."""
    generator = torch.Generator().manual_seed(seed)
    averages = [
        torch.randn(p.shape, generator=generator) for p in net.parameters() if p.requires_grad
    ]
    model = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    content = {
        "model": model | {"module.sigmas": torch.ones(10)},
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": averages},
        "optimizer": {"state": {}, "param_groups": []},
        "step": 7,
    }
    torch.save(content, path)
    return content


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "options",
    [
        {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1},
        {"nf": 8, "ch_mult": (1, 1, 3), "num_res_blocks": 2},
        {"nf": 4, "ch_mult": (2, 2, 1, 3), "num_res_blocks": 3, "attn_resolutions": (16, 8)},
        {"nf": 8, "ch_mult": (2,), "num_res_blocks": 2, "resolution": 16},
    ],
)
def test_published_checkpoints(tmp_path, name, options):
    options = {"channels": 1, "resolution": 32, **options}
    net = NETWORKS[name](**options)
    content = published_file(tmp_path / "checkpoint_7.pth", net)
    if len(options["ch_mult"]) == 1 and name == "ncsnpp":
        return  # one level has no pyramid to know it by
    found = load_published(tmp_path / "checkpoint_7.pth", ema=False)
    assert type(found) is type(net)
    assert found.config == net.config
    assert not found.training
    for key, tensor in net.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)
    averaged = load_published(tmp_path / "checkpoint_7.pth")
    trained = [p for p in averaged.parameters() if p.requires_grad]
    pairs = zip(trained, content["ema"]["shadow_params"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_full_architecture_is_inferred():
    with torch.device("meta"):
        for name, kind in NETWORKS.items():
            for blocks in (4, 8):
                weights = kind(3, 32, num_res_blocks=blocks).state_dict()
                found, config = _architecture(weights, None)
                assert found is kind, name
                assert found(**config).config == kind(3, 32, num_res_blocks=blocks).config


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_bad_checkpoints(tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"
    net = DDPMpp(1, 32, nf=8, ch_mult=(1, 2), num_res_blocks=1)

    def refused(message, **changes):
        content = published_file(path, net)
        for key, change in changes.items():
            change(content[key])
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_published(path)

    weight = "module.all_modules.5.Conv_0.weight"
    refused(
        r"has no all_modules\.3\.Dense_0\.bias",
        model=lambda m: m.pop("module.all_modules.3.Dense_0.bias"),
    )
    refused(
        r"has all_modules\.99\.bias, which such",
        model=lambda m: m.update({"module.all_modules.99.bias": torch.ones(1)}),
    )
    refused(
        r"Dense_0\.weight has shape \(3,\)",
        model=lambda m: m.update({"module.all_modules.3.Dense_0.weight": torch.ones(3)}),
    )
    refused(
        "no all_modules.2.weight, the first", model=lambda m: m.pop("module.all_modules.2.weight")
    )
    refused("residual blocks are not those", model=lambda m: m.pop(weight))
    refused("has 3 averaged weights", ema=lambda e: e.update(shadow_params=[torch.ones(1)] * 3))
    refused(
        "another shape for the average",
        ema=lambda e: e["shadow_params"].__setitem__(0, torch.ones(1)),
    )
    refused("reading that could execute code", model=lambda m: m.update(evil=Evil()))
    torch.save([1], path)
    with pytest.raises(ValueError, match="has no 'model'"):
        load_published(path)
    published_file(path, net)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is truncated"):
        load_published(path)
    with pytest.raises(FileNotFoundError):
        load_published(tmp_path / "none.pth")
    assert "executed" not in capsys.readouterr().out
    flat = DDPMpp(1, 32, nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=())
    published_file(path, flat)
    with pytest.raises(ValueError, match="the resolution cannot be told"):
        load_published(path)
    assert load_published(path, resolution=32).config == flat.config
