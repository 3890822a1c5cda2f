"""The files of the trainer of EDM and PFGM++."""

import collections
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import pfgm
from pfgm import cli
from pfgm.networks import EDMDenoiser, load_published
from pfgm.networks.config import as_json
from pfgm.networks.published.edm_files import infer_config
from pfgm.networks.published.edm_unets import EDMBlock, EDMConv, SongUNet
from pfgm.networks.published.safe_pickle import StandIn

KINDS = {"ddpmpp": EDMDenoiser, "ncsnpp": EDMDenoiser.ncsnpp}
TINY = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
CLASSES = {
    EDMDenoiser: "EDMPrecond",
    SongUNet: "SongUNet",
    EDMBlock: "UNetBlock",
    nn.Linear: "Linear",
    nn.GroupNorm: "GroupNorm",
}


class Persistent:
    """Pickled as modules of the trainer: by a function that would execute the source text."""

    def __init__(self, name, state):
        self.name, self.state = name, state

    def __reduce__(self):
        source = "raise SystemExit('the source text in the file was executed')"
        meta = {"type": "class", "version": 6, "module_src": source}
        meta |= {"class_name": self.name, "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def as_published(module, **state):
    if module is None:
        return None
    children = collections.OrderedDict(
        (name, as_published(child))
        for name, child in module._modules.items()
        if not isinstance(child, nn.Dropout)
    )
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules = children
        return container
    state |= {
        "training": True,
        "_parameters": collections.OrderedDict(module._parameters),
        "_buffers": collections.OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": collections.OrderedDict(),
        "_modules": children,
    }
    if isinstance(module, EDMBlock):
        state |= {"skip_scale": np.sqrt(0.5), "num_heads": int(module.attention)}
    return Persistent(CLASSES.get(type(module), "Conv2d"), state)


def trainers_modules():
    """The modules that the trainer's pickles name; reading the pickles must not need them."""
    persistence, dnnlib = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib")

    def _reconstruct_persistent_obj(meta):
        raise SystemExit("a function of the file was called")

    class EasyDict(dict):
        pass

    for owner, thing in ((persistence, _reconstruct_persistent_obj), (dnnlib, EasyDict)):
        thing.__module__, thing.__qualname__ = owner.__name__, thing.__name__
        setattr(owner, thing.__name__, thing)
    EasyDict.__module__ = "dnnlib.util"
    return {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": dnnlib,
        "dnnlib.util": dnnlib,
    }


def dumped(protocol):
    return lambda content, path: path.write_bytes(pickle.dumps(content, protocol))


WRITERS = {
    "training-state-000007.pt": torch.save,
    "before-zip.pt": lambda *a: torch.save(*a, _use_new_zipfile_serialization=False),
    "training-state-000007.pkl": dumped(4),
    "protocol-2.pkl": dumped(2),
}


def precond(net, **state):
    options = sys.modules["dnnlib.util"].EasyDict(dropout=net.config["dropout"])
    facts = {"img_resolution": net.shape[1], "sigma_data": net.sigma_data, "use_fp16": True}
    return as_published(net, _init_kwargs=options, **facts, **state)


def published_file(path, net, trained=None, write=torch.save, change=None, **state):
    """Writes a file as the trainer does: averaged module, trained module, optimiser state."""
    state = {"pfgmpp": True, "D": 2048, **state}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in trainers_modules().items():
            patch.setitem(sys.modules, name, module)
        trained = net if trained is None else trained
        optimiser = torch.optim.Adam(trained.parameters())
        content = {"optimizer_state": optimiser.state_dict(), "step": 7}
        content |= {"ema": precond(net, **state), "net": precond(trained, **state)}
        if change:
            change(content)
        write(content, path)
    assert "torch_utils" not in sys.modules
    return path


@pytest.mark.parametrize(("file", "name"), zip(WRITERS, [*KINDS] * 2, strict=True))
def test_training_states(tmp_path, file, name):
    net, trained = (KINDS[name](1, 8, classes=3, augment_dim=2, **TINY) for _ in range(2))
    path = published_file(tmp_path / file, net, trained, WRITERS[file])
    for written, loaded in (
        (net, load_published(path)),
        (trained, load_published(path, ema=False)),
    ):
        assert type(loaded) is EDMDenoiser
        assert loaded.config == net.config
        assert not loaded.training
        assert (loaded.D, loaded.sigma_data, loaded.classes) == (2048, 0.5, 3)
        for key, tensor in written.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor)
    flow = pfgm.PoissonFlowPP(loaded.shape, D=loaded.D, sigma_data=loaded.sigma_data)
    generator = torch.Generator().manual_seed(0)
    assert flow.sample(loaded, 2, steps=2, generator=generator).isfinite().all()


@pytest.mark.parametrize(
    ("state", "D"),
    [
        ({"pfgmpp": True, "D": 128}, 128),
        ({"pfgmpp": False, "D": 128}, float("inf")),
        ({"pfgmpp": None, "D": 128}, None),  # as EDM, which says nothing of it
    ],
)
def test_the_number_of_dimensions(tmp_path, state, D):
    net = EDMDenoiser(1, 8, sigma_data=0.6, **TINY)
    loaded = load_published(published_file(tmp_path / "state.pt", net, **state))
    assert (loaded.D, loaded.sigma_data) == (D, 0.6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "ncsnpp",
            {
                "channel_mult": (2, 2, 2),
                "num_blocks": 2,
                "attn_resolutions": (16, 8),
                "dropout": 0.3,
            },
        ),
        (
            "ddpmpp",
            {"channel_mult": (1, 3), "attn_resolutions": (), "classes": 2, "channel_mult_emb": 2},
        ),
        # ncsnpp of one level has no pyramid and no kernel to know it by
        ("ddpmpp", {"channel_mult": (2,), "model_channels": 12, "channel_mult_noise": 3}),
    ],
)
def test_architectures(tmp_path, name, options):
    net = KINDS[name](1, 16, **{"model_channels": 4, "num_blocks": 1, **options})
    path = published_file(tmp_path / "state.pt", net)
    assert load_published(path).config == net.config
    assert load_published(path, resolution=16).config == net.config


@pytest.mark.parametrize("name", KINDS)
def test_the_full_architecture_is_inferred(name, published_shapes):
    with torch.device("meta"):
        config = KINDS[name](3, 32, augment_dim=9).config
    kernel = EDMConv(1, 1, direction="up", taps=config["resample_filter"]).resample_filter
    weights = {
        key: kernel if key.endswith("resample_filter") else torch.empty(shape, device="meta")
        for key, shape in published_shapes(f"edm_{name}_cifar10").items()
    }
    state = {"sigma_data": 0.5, "_init_kwargs": {"dropout": 0.13}}
    assert as_json(infer_config(StandIn("EDMPrecond", state), weights, None)) == config


@pytest.mark.parametrize(
    ("file", "state", "option"),
    [
        ("training-state-000007.pt", {}, []),
        ("protocol-2.pkl", {"pfgmpp": None}, ["--D", "inf", "--no-ema"]),
    ],
)
def test_convert_makes_a_checkpoint(tmp_path, capsys, refusal, file, state, option):
    """The samples of the command line are those of the published network, labels included."""
    net, trained = (EDMDenoiser(1, 8, classes=3, **TINY) for _ in range(2))
    path = published_file(tmp_path / file, net, trained, WRITERS[file], **state)
    out = tmp_path / "new" / "net.safetensors"
    assert cli.main(["convert", str(path), "--out", str(out), *option]) == 0
    assert "EDMDenoiser, samples (1, 8, 8), 3 labels, PoissonFlowPP" in capsys.readouterr().out
    flow, loaded = pfgm.load(out)
    written = trained if "--no-ema" in option else net
    assert flow == pfgm.PoissonFlowPP((1, 8, 8), D=math.inf if option else 2048, sigma_data=0.5)
    for key, tensor in written.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    sample = ["sample", str(out), "--n", "2", "--steps", "2", "--label", "1"]
    assert cli.main([*sample, "--out", str(tmp_path / "x.npy"), "--device", "cpu"]) == 0
    labels = {"labels": torch.full((2,), 1)}
    prior = flow.prior(2, generator=torch.Generator().manual_seed(0))
    correct = flow.sample(
        written.eval(), 2, x_init=prior, solver="multistep", steps=2, condition=labels
    )
    drawn = torch.from_numpy(np.load(tmp_path / "x.npy"))
    torch.testing.assert_close(drawn, correct, rtol=1e-4, atol=1e-4)
    assert "solver must not be consistency" in refusal(
        *sample, "--out", tmp_path / "y.npy", "--solver", "consistency"
    )


@pytest.mark.parametrize("file", WRITERS)
def test_a_published_file_as_a_checkpoint_names_convert(tmp_path, refusal, file):
    path = published_file(tmp_path / file, EDMDenoiser(1, 8, **TINY), write=WRITERS[file])
    sentence = f"`pfgm convert {path} --out NAME.safetensors` makes one from a published file"
    sample = ["sample", path, "--out", tmp_path / "x.npy"]
    assert sentence in refusal(*sample)
    assert sentence in refusal("evaluate", path, "--out", tmp_path / "new")
    assert sorted(each.name for each in tmp_path.iterdir()) == [file]


def test_what_convert_refuses(tmp_path, refusal):
    net = EDMDenoiser(1, 8, **TINY)
    path = published_file(tmp_path / "state.pt", net)
    silent = published_file(tmp_path / "edm.pkl", net, write=dumped(4), pfgmpp=None)
    (folder := tmp_path / "a.safetensors").mkdir()
    (same := tmp_path / "state.safetensors").symlink_to(path)
    (short := tmp_path / "short.pt").write_bytes(path.read_bytes()[:5000])
    out = ["--out", tmp_path / "new" / "net.safetensors"]
    for arguments, message in (
        ([path, *out, "--D", 64], "D must be 2048, that of"),
        ([silent, *out], "does not say its D; give --D inf"),
        ([silent, *out, "--D", -1], "D must be a positive number or infinity, got -1.0"),
        ([path, *out, "--M", 291], "M is 291, but"),
        ([path, *out, "--resolution", 9], "its resolution is 8"),
        ([tmp_path / "no.pth", *out], "there is no checkpoint at"),
        ([path, "--out", tmp_path / "net.pth"], "out must end in .safetensors"),
        ([path, "--out", folder], "a folder or the published"),
        ([path, "--out", same], "the published file"),
        ([short, *out], "truncated or not a checkpoint"),
    ):
        assert message in refusal("convert", *arguments), arguments
    assert not (tmp_path / "new").exists()


def inner(content, *path):
    """The state of the network in the averaged module, or of a submodule of it."""
    state = content["ema"].state
    for name in ("model", *path):
        part = state["_modules"][name]
        state = part.state if isinstance(part, Persistent) else vars(part)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("ema"), r"it has no 'ema'; ema=False \(--no-ema\) takes the other"),
        (lambda c: inner(c)["_modules"].pop("map_layer1"), r"has no model\.map_layer1\.weight"),
        (lambda c: inner(c)["_modules"].pop("map_layer0"), r"has no model\.map_layer0\.weight"),
        (lambda c: inner(c, "enc")["_modules"].pop("8x8_conv"), "the first convolution"),
        (
            lambda c: inner(c, "dec", "8x8_up")["_parameters"].update(extra=torch.ones(1)),
            r"has model\.dec\.8x8_up\.extra, which such a network does not have",
        ),
        (
            lambda c: inner(c, "dec", "8x8_up", "norm0")["_parameters"].update(bias=torch.ones(3)),
            r"norm0\.bias must have shape \(16,\), got \(3,\)",
        ),
        (
            lambda c: vars(c["ema"]).update(name="VPPrecond"),
            "it must be EDMPrecond around SongUNet, got VPPrecond",
        ),
        (
            lambda c: vars(c["ema"].state["_modules"]["model"]).update(name="DhariwalUNet"),
            "got EDMPrecond around DhariwalUNet",
        ),
        (
            lambda c: inner(c)["_modules"].update(enc=torch.ones(3)),
            "does not hold a module where one must be",
        ),
        (
            lambda c: inner(c)["_modules"].update(again=inner(c)["_modules"]["enc"]),
            r"it has model\.again twice",
        ),
        (
            lambda c: c["ema"].state.update(sigma_data=-1.0),
            "sigma_data must be a number above 0 .*got -1.0",
        ),
        (lambda c: c["ema"].state.update(sigma_data=np.float64(1)), "sigma_data is not a number"),
        (lambda c: c.update(ema=3, net=4), "no 'model' .*, and no 'ema' or 'net'"),
    ],
)
def test_other_networks(tmp_path, change, message):
    net = EDMDenoiser(1, 8, **TINY)
    path = published_file(tmp_path / "state.pt", net, change=change)
    with pytest.raises(ValueError, match=f"is not a published network: .*{message}"):
        load_published(path)


@pytest.mark.parametrize("file", WRITERS)
def test_truncated_and_broken_files(tmp_path, file):
    path = published_file(tmp_path / file, EDMDenoiser(1, 8, **TINY), write=WRITERS[file])
    content = path.read_bytes()
    for kept in (0, 3, 50, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="truncated"):
            load_published(path)
    random = np.random.RandomState(0)
    broken = 0
    for _ in range(20):
        changed = bytearray(content)
        for place in random.randint(0, 20_000, 3):
            changed[place] = random.randint(256)
        path.write_bytes(changed)
        try:
            load_published(path)
        except ValueError:
            broken += 1
    assert broken > 5
