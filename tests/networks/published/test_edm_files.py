"""The networks of EDM and PFGM++, and the files of their trainer, read without executing them."""

from __future__ import annotations

import collections
import copy
import copyreg
import functools
import pickle
import struct
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pfgm
from pfgm.networks import EDMDenoiser, build, load_published
from pfgm.networks.embedding import plain
from pfgm.networks.published.edm import EDMBlock, EDMConv, SongUNet
from pfgm.networks.published.edm_files import architecture
from pfgm.networks.published.safe_pickle import StandIn, opened

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = {"ddpmpp": EDMDenoiser, "ncsnpp": EDMDenoiser.ncsnpp}
SMALL = {"model_channels": 16, "channel_mult": (1, 2, 3), "num_blocks": 1, "attn_resolutions": (8,)}
TINY = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}


def listed(name):
    """Names and shapes of the tensors of a published network, in their order."""
    lines = (FIXTURES / f"edm_{name}_params.txt").read_text().splitlines()
    return {name: tuple(map(int, shape)) for name, *shape in (line.split() for line in lines)}


def made_up(shapes):
    """The weights that the fixtures were made with: each from a seed that is its place."""
    weights = {}
    for place, (name, shape) in enumerate(shapes.items()):
        values = np.random.RandomState(place).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:])).astype(np.float32)
        else:
            values = 0.1 * values + (1 if name.endswith("weight") else 0)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


@functools.cache
def cifar10(name):
    """The network of the published configuration, without memory."""
    with torch.device("meta"):
        return KINDS[name](3, 32, augment_dim=9)


# ---- the networks ----


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_the_published_ones(name):
    fixture = np.load(FIXTURES / f"edm_{name}_small.npz")
    expected = {key: torch.from_numpy(fixture[key]) for key in fixture.files}
    weights = made_up(listed(f"{name}_small"))
    net = KINDS[name](3, 16, classes=10, augment_dim=9, **SMALL).eval()
    assert list(net.state_dict()) == list(weights)
    net.load_state_dict(weights)
    plain = KINDS[name](3, 16, augment_dim=9, **SMALL).eval()
    plain.load_state_dict({k: v for k, v in weights.items() if "map_label" not in k})
    x, sigma, labels = expected["x"], expected["sigma"], expected["labels"]
    with torch.no_grad():
        found = {
            "unconditional": plain(x, sigma),
            "unlabelled": net(x, sigma),
            "labelled": net(x, sigma, labels),
            "augmented": net(x, sigma, labels, augment=expected["augment"]),
        }
        none = net(x, sigma, torch.full((3,), -1))
    for key, values in found.items():
        torch.testing.assert_close(values, expected[key], rtol=0, atol=1e-5, msg=key)
    torch.testing.assert_close(none, found["unlabelled"], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "values"), [("ddpmpp", 55_733_891), ("ncsnpp", 56_397_827)])
def test_the_cifar10_configuration(name, values):
    net = cifar10(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert list(shapes.items()) == list(listed(f"{name}_cifar10").items())
    assert sum(p.numel() for p in net.parameters()) == values


@pytest.mark.parametrize("name", KINDS)
def test_they_start_small_and_train(name):
    torch.manual_seed(0)
    net = KINDS[name](1, 8, classes=3, **TINY)
    flow = pfgm.PoissonFlowPP((1, 8, 8), D=128)
    x, sigma = torch.linspace(-0.5, 0.5, 16).view(16, 1, 1, 1).expand(16, 1, 8, 8), torch.ones(16)
    torch.testing.assert_close(net(x, sigma / 2), x / 2, rtol=0, atol=1e-3)  # c_skip at sigma_data
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    losses = []
    for step in range(30):
        generator = torch.Generator().manual_seed(step % 3)
        condition = {"labels": torch.arange(16) % 4 - 1}
        loss = flow.loss(net, x, generator=generator, condition=condition)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert flow.sample(net, 2, steps=2).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_copies_and_dtypes(tmp_path, name):
    net = KINDS[name](1, 8, classes=3, augment_dim=2, sigma_data=0.7, **TINY).eval()
    assert build("edm", net.config).config == net.config
    flow = pfgm.PoissonFlowPP((1, 8, 8), D=64, sigma_data=0.7)
    pfgm.save(tmp_path / "net.safetensors", flow, net)
    loaded = pfgm.load(tmp_path / "net.safetensors").network
    assert type(loaded) is EDMDenoiser
    assert loaded.config == net.config
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1, 80]), torch.tensor([2, 0, 1])
    mean = net(x, sigma, labels)
    assert torch.equal(loaded(x, sigma, labels), mean)
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
            if isinstance(part, EDMConv) and part.way is not None:
                assert float(part.resample_filter.sum()) == 1
                assert torch.equal(part.resample_filter, part.resample_filter.mT)
    kernel = 64 * EDMConv(1, 1, way="up", line=(1, 3, 3, 1)).resample_filter[0, 0]
    assert torch.equal(kernel[0], torch.tensor([1.0, 3, 3, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_channels": 6}, "a layer of 6 channels; allowed are multiples of 4"),
        ({"model_channels": 132}, "a layer of 132 channels"),
        ({"resolution": 30}, "resolution is 30; allowed are multiples of 4"),
        ({"embedding_type": "learned"}, "embedding_type is 'learned'"),
        ({"encoder_type": "skip"}, "encoder_type is 'skip'"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter is \(1, 2, 1\)"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"classes": -1}, "classes is -1"),
        ({"sigma_data": 0.0}, "sigma_data is 0.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        EDMDenoiser(**{"channels": 3, "resolution": 32, **options})


def test_bad_arguments():
    net, x, sigma = EDMDenoiser(1, 8, classes=3, **TINY), torch.randn(2, 1, 8, 8), torch.ones(2)
    for arguments, message in (
        ((x[..., :4, :4], sigma), r"x and sigma have shapes \(2, 1, 4, 4\) and \(2,\)"),
        ((x, torch.tensor(1.0)), r"allowed are \(B, 1, 8, 8\) and \(B,\)"),
        ((x, sigma, torch.tensor([0, 3])), "labels holds 3; allowed is below 3"),
        ((x, sigma, torch.tensor([0.0, 1.0])), "labels has shape"),
        ((x, sigma, torch.tensor([0])), "labels has shape"),
        ((x, sigma, None, torch.ones(2, 1)), r"augment has shape \(2, 1\); allowed is \(2, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            net(*arguments)
    with pytest.raises(ValueError, match="labels given to a network without classes"):
        EDMDenoiser(1, 8, **TINY)(x, sigma, torch.tensor([0, 1]))


# ---- files as the published trainer writes them ----

CLASSES = {
    EDMDenoiser: "EDMPrecond",
    SongUNet: "SongUNet",
    EDMBlock: "UNetBlock",
    nn.Linear: "Linear",
    nn.GroupNorm: "GroupNorm",
}


class Persistent:
    """Pickles as modules of the trainer do: by a function that would execute their source text."""

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
    """What the trainer's pickles name; reading them must need none of it."""
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
    """As the trainer writes one: the averaged module, the trained one, the optimiser's state."""
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


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("name", KINDS)
def test_training_states(tmp_path, name, file):
    net, trained = (KINDS[name](1, 8, classes=3, augment_dim=2, **TINY) for _ in range(2))
    path = published_file(tmp_path / file, net, trained, WRITERS[file])
    for written, found in ((net, load_published(path)), (trained, load_published(path, ema=False))):
        assert type(found) is EDMDenoiser
        assert found.config == net.config
        assert not found.training
        assert (found.D, found.sigma_data, found.classes) == (2048, 0.5, 3)
        for key, tensor in written.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor)
    flow = pfgm.PoissonFlowPP(found.shape, D=found.D, sigma_data=found.sigma_data)
    generator = torch.Generator().manual_seed(0)
    assert flow.sample(found, 2, steps=2, generator=generator).isfinite().all()


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
    found = load_published(published_file(tmp_path / "state.pt", net, **state))
    assert (found.D, found.sigma_data) == (D, 0.6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"channel_mult": (2, 2, 2), "num_blocks": 2, "attn_resolutions": (16, 8), "dropout": 0.3},
        {"channel_mult": (1, 3), "attn_resolutions": (), "classes": 2, "channel_mult_emb": 2},
        {"channel_mult": (2,), "model_channels": 12, "channel_mult_noise": 3},
    ],
)
def test_architectures(tmp_path, name, options):
    net = KINDS[name](1, 16, **{"model_channels": 4, "num_blocks": 1, **options})
    if name == "ncsnpp" and len(net.config["channel_mult"]) == 1:
        return  # one level has no pyramid and no kernel to know it by
    path = published_file(tmp_path / "state.pt", net)
    assert load_published(path).config == net.config
    assert load_published(path, resolution=16).config == net.config


@pytest.mark.parametrize("name", KINDS)
def test_the_full_architecture_is_inferred(name):
    config = cifar10(name).config
    kernel = EDMConv(1, 1, way="up", line=config["resample_filter"]).resample_filter
    weights = {
        key: kernel if key.endswith("resample_filter") else torch.empty(shape, device="meta")
        for key, shape in listed(f"{name}_cifar10").items()
    }
    state = {"sigma_data": 0.5, "_init_kwargs": {"dropout": 0.13}}
    assert plain(architecture(StandIn("EDMPrecond", state), weights, None)) == config


# ---- refusals ----


def inner(content, *path):
    """The state of the network within the averaged module, or of what a path leads to there."""
    state = content["ema"].state
    for name in ("model", *path):
        part = state["_modules"][name]
        state = part.state if isinstance(part, Persistent) else vars(part)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("ema"), "it has no 'ema'; take the other weights with ema=False"),
        (lambda c: inner(c)["_modules"].pop("map_layer1"), r"has no model\.map_layer1\.weight"),
        (lambda c: inner(c)["_modules"].pop("map_layer0"), r"has no model\.map_layer0\.weight"),
        (lambda c: inner(c, "enc")["_modules"].pop("8x8_conv"), "the first convolution"),
        (
            lambda c: inner(c, "dec", "8x8_up")["_parameters"].update(extra=torch.ones(1)),
            r"has model\.dec\.8x8_up\.extra, which such a network has not",
        ),
        (
            lambda c: inner(c, "dec", "8x8_up", "norm0")["_parameters"].update(bias=torch.ones(3)),
            r"norm0\.bias has shape \(3,\); needed is \(16,\)",
        ),
        (lambda c: vars(c["ema"]).update(name="VPPrecond"), "it is a VPPrecond around a SongUNet"),
        (
            lambda c: vars(c["ema"].state["_modules"]["model"]).update(name="DhariwalUNet"),
            "it is a EDMPrecond around a DhariwalUNet",
        ),
        (
            lambda c: inner(c)["_modules"].update(enc=torch.ones(3)),
            "another thing in the place of a module",
        ),
        (
            lambda c: inner(c)["_modules"].update(again=inner(c)["_modules"]["enc"]),
            r"it has model\.again twice",
        ),
        (lambda c: c["ema"].state.update(sigma_data=-1.0), "sigma_data is -1.0"),
        (lambda c: c["ema"].state.update(sigma_data=np.float64(1)), "sigma_data is not a number"),
        (lambda c: c.update(ema=3, net=4), "no 'model' .*, and no 'ema' or 'net'"),
    ],
)
def test_other_networks(tmp_path, change, message):
    net = EDMDenoiser(1, 8, **TINY)
    path = published_file(tmp_path / "state.pt", net, change=change)
    with pytest.raises(ValueError, match=rf"state\.pt holds no published network: .*{message}"):
        load_published(path)


def test_another_resolution(tmp_path):
    path = published_file(tmp_path / "state.pt", EDMDenoiser(1, 8, **TINY))
    with pytest.raises(ValueError, match="it is of resolution 8; resolution is 16"):
        load_published(path, resolution=16)


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


def test_compressed_and_foreign_archives(tmp_path):
    path = tmp_path / "state.pt"
    for compression, name in ((zipfile.ZIP_DEFLATED, "data.pkl"), (zipfile.ZIP_STORED, "other")):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr(f"archive/{name}", pickle.dumps({}, 2))
        with pytest.raises(ValueError, match=r"no data\.pkl, or is compressed"):
            load_published(path)
    write_archive(path, pickle.dumps({}, 2), byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        load_published(path)


def write_archive(path, content, byteorder=b"little"):
    """A zip archive as torch.save writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", byteorder)


# ---- pickles that would do something ----

EXTENSION = 201


class Evil:
    """What it does is done when its state is set."""

    def __init__(self, marker):
        self.marker = marker

    def __setstate__(self, state):
        Path(state["marker"]).touch()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


def payloads(marker):
    """Pickles that touch a file when Python reads them, and what the refusal names."""
    command, code = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w').close()")
    return {
        "GLOBAL": (b"\x80\x02cposix\nsystem\n" + command + b"\x85R.", "holds posix.system"),
        "GLOBAL os": (b"\x80\x02cos\nsystem\n" + command + b"\x85R.", "holds os.system"),
        "eval": (b"\x80\x04" + named("builtins", "eval") + code + b"\x85R.", "builtins.eval"),
        "exec": (b"\x80\x02c__builtin__\nexec\n" + code + b"\x85R.", "__builtin__.exec"),
        "dotted": (b"\x80\x04" + named("shutil", "os.system") + command + b"\x85R.", "os.system"),
        "INST": (b"\x80\x02(" + command + b"ios\nsystem\n.", "instruction INST os system"),
        "OBJ": (b"\x80\x02(cos\nsystem\n" + command + b"o.", "holds os.system"),
        "EXT1": (b"\x80\x02\x82" + bytes([EXTENSION]) + command + b"\x85R.", "EXT1 201"),
        "BUILD": (pickle.dumps(Evil(str(marker)), 2), f"{Evil.__module__}.Evil"),
        "in a list": (b"\x80\x02]cos\nsystem\n" + command + b"\x85Ra.", "holds os.system"),
    }


@pytest.fixture
def extension():
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("kind", payloads("here"))
def test_pickled_code_is_refused_and_not_executed(tmp_path, kind):
    marker, path = tmp_path / "executed", tmp_path / "state.pt"
    content, message = payloads(marker)[kind]
    pickle.loads(content)  # Python itself is taken in
    assert marker.exists()
    marker.unlink()
    within = pickle.dumps({"ema": Hidden(content)})
    for write in (
        lambda: path.write_bytes(content),
        lambda: path.write_bytes(within),
        lambda: write_archive(path, content),
        lambda: write_archive(path, within),
    ):
        write()
        with pytest.raises(ValueError, match=f"{message}, which is refused: reading that could"):
            load_published(path)
    assert not marker.exists()


class Hidden:
    """A pickle within a pickle, in the place of a storage's bytes."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_what_is_allowed_cannot_be_misused(tmp_path):
    """Calls and states that make no sense are malformed: there is nothing for them to act on."""
    path = tmp_path / "state.pkl"
    rebuild, ordered = named("torch._utils", "_rebuild_tensor_v2"), b"ccollections\nOrderedDict\n"
    for content in (
        ordered + b"}" + text("__code__") + b"Nsb.",  # the state of a name
        ordered + ordered + b"\x85R.",
        rebuild + b")R.",
        named("torch.storage", "_load_from_bytes") + text("name") + b"\x85R.",
        named("builtins", "set") + b"]((ttta\x85R.",
        named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"N\x85R.",
        b"](K\x01K\x02s.",
        b"}(K\x01u.",
        b"N(K\x01e.",
        b"N.",
        b"h\x05.",
        b"t.",
        b")" * 10 + b"\x85" * 200_000 + b"}\x85s.",
    ):
        path.write_bytes(b"\x80\x04" + content)
        with pytest.raises(ValueError, match=r"state\.pkl (is truncated|holds no published)"):
            load_published(path)


def test_tensors_stay_within_their_storage(tmp_path):
    path = tmp_path / "state.pkl"

    class Stored:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            storage = torch.storage.TypedStorage(
                wrap_storage=torch.arange(6.0).untyped_storage(),
                dtype=torch.float32,
                _internal=True,
            )
            return torch._utils._rebuild_tensor_v2, (storage, *self.arguments, False, None)

    path.write_bytes(pickle.dumps(Stored(1, (2, 2), (3, 1))))
    with opened(path) as found:
        assert torch.equal(found.tensor(), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    for arguments in (
        (0, (7,), (1,)),  # beyond the end
        (3, (2, 2), (2, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**12,), (0,)),  # more than is there
        (0, (2,), (1, 1)),
        (0.0, (2,), (1,)),
    ):
        path.write_bytes(pickle.dumps(Stored(*arguments)))
        with pytest.raises(ValueError, match=r"state\.pkl is truncated or not a checkpoint"):
            load_published(path)


def test_small_files_take_little_time_and_memory(tmp_path):
    """What would grow without end if it were taken at its word."""
    path, rebuild = tmp_path / "state.pkl", named("torch._utils", "_rebuild_tensor_v2")
    number = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"  # of 255 bytes
    large_shape = rebuild + b"(N" + b"K\x00(" + number + b"\x94" + b"h\x00" * 20_000 + b"t)tR."
    twice = b"h\x00h\x01\x85R0"
    copied = (
        named("_codecs", "encode") + b"\x94" + text("a" * 50_000) + b"\x94\x85R0" + twice * 2000
    )
    colliding = b"}(" + b"".join(
        b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little", signed=True) + b"N"
        for k in range(1, 20_000)
    )
    embedded = pickle.dumps({})
    for _ in range(12):
        load, memoised = named("torch.storage", "_load_from_bytes"), b"\x94"
        content = b"B" + struct.pack("<I", len(embedded)) + embedded
        call = b"h\x00h\x01\x85R0"
        embedded = b"\x80\x04" + load + memoised + content + memoised + b"\x85R0" + call * 8 + b"N."
    for content in (large_shape, copied + b"N.", colliding + b"u.", embedded[2:]):
        path.write_bytes(b"\x80\x04" + content)
        started = time.perf_counter()
        with pytest.raises(ValueError, match=r"state\.pkl (is truncated|holds)"):
            load_published(path)
        assert time.perf_counter() - started < 5


def test_tensors_of_one_storage_share_it(tmp_path):
    whole = torch.arange(1000.0)
    torch.save({"parts": [whole[k:] for k in range(100)]}, tmp_path / "state.pt")
    with opened(tmp_path / "state.pt") as content:
        parts = [stored.tensor() for stored in content["parts"]]
    assert all(torch.equal(part, whole[k:]) for k, part in enumerate(parts))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@pytest.mark.parametrize(
    "model",
    [
        {3: torch.ones(1)},
        {"all_modules.2.weight": torch.ones(0, 1, 3, 3)},
        {"all_modules.2.weight": torch.ones(8, 1, 3, 3), "all_modules.3.NIN_0.W": torch.ones(())},
    ],
)
def test_checkpoints_that_make_no_sense(tmp_path, model):
    torch.save({"model": model}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"checkpoint\.pth holds no published network"):
        load_published(tmp_path / "checkpoint.pth")
