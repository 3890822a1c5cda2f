"""The checkpoints of PFGM."""

import numpy as np
import pytest
import torch

import pfgm
from pfgm import cli
from pfgm.networks import DDPMpp, NCSNpp, load_published
from pfgm.networks.published.pfgm_files import infer_architecture

NETWORKS = {"ddpmpp": DDPMpp, "ncsnpp": NCSNpp}


def published_file(path, net, seed=1):
    """Writes a file as the published trainer does: DataParallel prefixes, averages in a list."""
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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpmpp", {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1}),
        ("ncsnpp", {"nf": 8, "ch_mult": (1, 1, 3), "num_res_blocks": 2}),
        (
            "ddpmpp",
            {"nf": 4, "ch_mult": (2, 2, 1, 3), "num_res_blocks": 3, "attn_resolutions": (16, 8)},
        ),
        # ncsnpp of one level has no pyramid to know it by
        ("ddpmpp", {"nf": 8, "ch_mult": (2,), "num_res_blocks": 2, "resolution": 16}),
    ],
)
def test_published_checkpoints(tmp_path, name, options):
    net = NETWORKS[name](**{"channels": 1, "resolution": 32, **options})
    content = published_file(tmp_path / "checkpoint_7.pth", net)
    with torch.device("meta"):  # the weights lie on the CPU, whatever the default device
        loaded = load_published(tmp_path / "checkpoint_7.pth", ema=False)
    assert type(loaded) is type(net)
    assert loaded.config == net.config
    assert not loaded.training
    for key, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    averaged = load_published(tmp_path / "checkpoint_7.pth")
    trained = [p for p in averaged.parameters() if p.requires_grad]
    pairs = zip(trained, content["ema"]["shadow_params"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_convert_makes_a_checkpoint(tmp_path, capsys):
    """The samples of the command line are those of the published network."""
    net = DDPMpp(3, 32, nf=8, ch_mult=(1, 2), num_res_blocks=1)
    published_file(tmp_path / "checkpoint_7.pth", net)
    out = tmp_path / "net.safetensors"
    assert cli.main(["convert", str(tmp_path / "checkpoint_7.pth"), "--out", str(out)]) == 0
    assert capsys.readouterr().err == ""
    flow, loaded = pfgm.load(out)
    averaged = load_published(tmp_path / "checkpoint_7.pth")
    assert flow == pfgm.PoissonFlow.cifar10()
    for key, tensor in averaged.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    sample = ["sample", str(out), "--n", "1", "--steps", "2", "--device", "cpu"]
    assert cli.main([*sample, "--out", str(tmp_path / "x.npy")]) == 0
    prior = flow.prior(1, generator=torch.Generator().manual_seed(0))
    drawn = torch.from_numpy(np.load(tmp_path / "x.npy"))
    correct = flow.sample(averaged, 1, x_init=prior, steps=2)
    torch.testing.assert_close(drawn, correct, rtol=1e-4, atol=1e-3)


def test_convert_needs_the_flow_of_other_data(tmp_path, refusal):
    net = DDPMpp(1, 64, nf=8, ch_mult=(1, 2, 1), num_res_blocks=1)
    path, out = tmp_path / "checkpoint_7.pth", tmp_path / "net.safetensors"
    published_file(path, net)
    convert = ["convert", str(path), "--out", str(out)]
    message = "for samples (1, 64, 64) and no M; give the --M that it was trained with"
    assert message in refusal(*convert)
    assert "D is 1, but" in refusal(*convert, "--M", 296, "--D", 1)
    assert not out.exists()
    assert cli.main([*convert, "--M", "296", "--z-max", "50"]) == 0
    assert pfgm.load(out).flow == pfgm.PoissonFlow((1, 64, 64), M=296, z_max=50)


def test_the_full_architecture_is_inferred():
    with torch.device("meta"):
        for kind, blocks in ((DDPMpp, 8), (NCSNpp, 4)):
            net = kind(3, 32, num_res_blocks=blocks)
            loaded, config = infer_architecture(net.state_dict(), None)
            assert loaded is kind
            assert loaded(**config).config == net.config


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_bad_checkpoints(tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"
    net = DDPMpp(1, 32, nf=8, ch_mult=(1, 2), num_res_blocks=1)

    def without(name):
        return lambda content: content["model"].pop(f"module.all_modules.{name}")

    def with_(name, value):
        return lambda content: content["model"].update({f"module.all_modules.{name}": value})

    for message, change in (
        (r"has no all_modules\.3\.Dense_0\.bias", without("3.Dense_0.bias")),
        (r"has all_modules\.99\.bias, which such", with_("99.bias", torch.ones(1))),
        (r"a published network: its.*got \(3,\)\.", with_("3.Dense_0.weight", torch.ones(3))),
        ("no all_modules.2.weight, the first", without("2.weight")),
        ("residual blocks do not fit", without("5.Conv_0.weight")),
        (
            r" is not a published.*got 3\. ema=False",
            lambda content: content["ema"].update(shadow_params=[torch.ones(1)] * 3),
        ),
        (
            r" is not a published network: its.*got another shape\.",
            lambda content: content["ema"]["shadow_params"].__setitem__(0, torch.ones(1)),
        ),
        ("reading it could execute code", with_("evil", Evil())),
    ):
        content = published_file(path, net)
        change(content)
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_published(path)
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
    with pytest.raises(ValueError, match="no level has attention"):
        load_published(path)
    assert load_published(path, resolution=32).config == flat.config


@pytest.mark.parametrize(
    "model",
    [
        {3: torch.ones(1)},
        {"all_modules.2.weight": torch.ones(0, 1, 3, 3)},
        {"all_modules.2.weight": torch.ones(8, 1, 3, 3), "all_modules.3.NIN_0.W": torch.ones(())},
    ],
)
def test_malformed_checkpoints(tmp_path, model):
    torch.save({"model": model}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="is not a published network:"):
        load_published(tmp_path / "checkpoint.pth")
