import copy
import dataclasses
import json
import random
import re
import runpy
import shutil
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import pfgm
from pfgm.common import tensor_files
from pfgm.training import checkpoint, weights_file
from pfgm.training.checkpoint import load_run, save_run


@pytest.fixture
def flow():
    return pfgm.PoissonFlow((3,), data_norm=2.0, z_min=0.01)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return pfgm.networks.MLP((3,), width=16, depth=2)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Own(nn.Module):
    """A network that pfgm does not know."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, z):
        return self.layer(x), -z


def test_the_file_alone_gives_flow_and_network(tmp_path, flow, network):
    network.train()
    pfgm.save(tmp_path / "net.safetensors", flow, network, step=7)
    loaded = pfgm.load(tmp_path / "net.safetensors")
    assert loaded.flow == flow
    assert same_weights(loaded.network, network)
    assert not loaded.network.training
    x, z = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(loaded.network(x, z)[0], network.eval()(x, z)[0])


@pytest.mark.parametrize("device", ["meta", "no device"])
def test_a_device_that_cannot_be_used_is_named(tmp_path, flow, network, device):
    pfgm.save(tmp_path / "net.safetensors", flow, network)
    with pytest.raises(ValueError, match=f"device must be one of cpu, auto, got '{device}':"):
        pfgm.load(tmp_path / "net.safetensors", device=device)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float64, torch.float64), (torch.float16, torch.float32)]
)
def test_weights_keep_their_precision(tmp_path, flow, network, dtype, expected):
    network = network.to(dtype)
    pfgm.save(tmp_path / "net.safetensors", flow, network)
    loaded = pfgm.load(tmp_path / "net.safetensors").network
    for name, value in loaded.state_dict().items():
        assert value.dtype == expected
        assert torch.equal(value, network.state_dict()[name].to(expected))
    assert flow.sample(loaded, 3, steps=2).dtype == torch.float32


def test_loading_does_not_follow_later_changes_of_the_file(tmp_path, flow, network):
    path = tmp_path / "net.safetensors"
    pfgm.save(path, flow, network)
    loaded = pfgm.load(path).network
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(64)
    path.write_bytes(content)
    assert same_weights(loaded, network)


@pytest.mark.parametrize("place", ["net.safetensors", "folder"])
def test_own_networks_are_saved_and_loaded(tmp_path, flow, place):
    network, path = Own(), tmp_path / place
    pfgm.save(path, flow, network)
    if place == "folder":
        assert json.loads((path / "config.json").read_text())["network"] is None
    with pytest.raises(ValueError, match=r"not one of pfgm\.networks; give the network to load"):
        pfgm.load(path)
    other = Own()
    assert pfgm.load(path, other).network is other
    assert same_weights(other, network)
    with pytest.raises(ValueError, match=r"\.safetensors cannot be loaded"):
        pfgm.load(path, nn.Linear(4, 4))


def test_shared_and_strided_weights(tmp_path, flow):
    class Tied(Own):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(3, 3)
            self.twin.weight = self.layer.weight
            self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())

    network, other = Tied(), Tied()
    pfgm.save(tmp_path / "net.safetensors", flow, network)
    assert same_weights(pfgm.load(tmp_path / "net.safetensors", other).network, network)


def wrapped(network, part):
    """A copy of an MLP that torch.compile wraps: "all" of it, one "block", or "none"."""
    network = copy.deepcopy(network)
    if part == "block":
        network.blocks[0] = torch.compile(network.blocks[0])
    return torch.compile(network) if part == "all" else network


PARTS = ("none", "all", "block")


@pytest.mark.parametrize(
    ("saved", "loaded", "older"),  # each pair of values
    [(a, b, (i + j) % 2 == 1) for i, a in enumerate(PARTS) for j, b in enumerate(PARTS)],
)
def test_compiled_and_plain_networks_share_files(
    tmp_path, flow, network, monkeypatch, saved, loaded, older
):
    path = tmp_path / "net.safetensors"
    with monkeypatch.context() as patch:
        if older:  # files had the names of the compiled network
            patch.setattr(weights_file, "plain_state", nn.Module.state_dict)
            patch.setattr(weights_file, "network_to_save", lambda network: network)
        pfgm.save(path, flow, wrapped(network, saved))
    other = wrapped(pfgm.networks.MLP((3,), width=16, depth=2), loaded)
    assert pfgm.load(path, other).network is other
    assert all(map(torch.equal, other.parameters(), network.parameters()))
    if not (older and saved == "all"):  # such files do not describe the network
        assert same_weights(pfgm.load(path).network, network)


class OtherFlow(pfgm.PoissonFlow):
    """A flow that a file cannot name."""


class OtherState(Own):
    """A network whose state holds more than tensors."""

    def get_extra_state(self):
        return {"calls": 3}


def test_what_a_file_cannot_hold_is_refused(tmp_path, flow, network):
    path, other, call = tmp_path / "net.safetensors", OtherFlow((3,), M=100), lambda x, z: (x, z)
    for wrong, error, message in (
        ((path, flow, call), TypeError, "network must be a.*got function, whose code "),
        ((path, other, network), TypeError, "flow must be PoissonFlow.*got OtherFlow, whose class"),
        ((path, network, flow), TypeError, "flow must be PoissonFlow.*got MLP, whose class a file"),
        ((path, flow, OtherState()), TypeError, "the state_dict of network.*dict for '_extra_stat"),
        (
            (path, flow, nn.Linear(3, 3, device="meta")),
            ValueError,
            "network must be on.*got tensor 'weight' on t",
        ),
        ((path, flow, network, "x"), ValueError, r"step must be an integer of at l.*got 'x'\."),
    ):
        with pytest.raises(error, match=message):
            pfgm.save(*wrong[:3], **dict(zip(("step",), wrong[3:], strict=False)))
    with pytest.raises(TypeError, match=r"flow must be.*got OtherFlow, whose cla"):
        pfgm.training.Trainer(other, network, torch.randn(300, 3), folder=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    pfgm.save(path, flow, network)
    with pytest.raises(TypeError, match=r"network must be a.*got function\."):
        pfgm.load(path, call)


def test_hyper_parameters_of_numpy_and_tensors_are_saved(tmp_path, network):
    sizes = np.array([3])
    flows = (
        pfgm.PoissonFlow(sizes, spread=np.float32(1), tau=torch.tensor(0.03), M=np.float32(100)),
        pfgm.PoissonFlowPP(sizes, D=np.float32(4), P_mean=np.float32(1), sigma_data=np.float32(1)),
    )
    for flow in flows:
        pfgm.save(tmp_path / "net.safetensors", flow, network)
        assert pfgm.load(tmp_path / "net.safetensors").flow == flow


def test_missing_truncated_and_foreign_files(tmp_path, flow, network):
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*net\.safetensors"):
        pfgm.load(path)
    with pytest.raises(FileNotFoundError, match=r"has no latest\.json"):
        pfgm.load(tmp_path)
    pfgm.save(path, flow, network)
    whole = path.read_bytes()
    weight = {"weight": torch.ones(2)}
    texts = ("[]", "3", "{", "[" * 100_000 + "]" * 100_000, '{"format": %s}' % ("1" * 10_000))
    foreign = [safetensors.torch.save(weight, metadata={"pfgm": text}) for text in texts]
    for content, message in (
        *((whole[:n], "is not a complete") for n in (0, 5, 100, len(whole) // 2, len(whole) - 1)),
        # The length of a header, in the first eight bytes, may look like the start of a pickle.
        ((0x280).to_bytes(8, "little") + b"{}", "is not a complete safetensors file"),
        (b"\x80\x04 a pickle, perhaps" * 10, "is not a checkpoint of pfgm but a pickled file"),
        *((content, "was not written by pfgm") for content in foreign),
        (safetensors.torch.save(weight), "was not written by pfgm"),
        (safetensors.torch.save(weight, metadata={"pfgm": '{"format": 99}'}), "has format 99"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pfgm.load(path)


def crafted(path, tensors, network=None, **changes):
    """A file of this format whose description does not fit its tensors, or itself."""
    description = {"format": 1, "step": 0, "flow": {"shape": [3], "M": 100}, "network": network}
    metadata = {"pfgm": json.dumps({**description, **changes})}
    safetensors.torch.save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        {"flow": {"shape": [3], "M": -5}},
        {"flow": {"shape": [3]}},
        {"flow": {"shape": 3, "M": 100}},
        {"flow": {"shape": [3], "M": 1e6}},
        {"flow": {"shape": [3], "M": 100, "noise_std": 1e308}},
        {"flow": 7},
        {"fitted_levels": 7},
        {"flow": {"shape": "abc", "M": 200}},
        {"network": {"name": "os.system", "config": {}}},
        {"network": {"name": "mlp", "config": {"shape": [3], "width": 1 << 20, "depth": 2}}},
        {"network": {"name": "mlp", "config": {"command": "x"}}},
        {"network": {"name": "mlp"}},
        {"network": []},
    ],
)
def test_a_description_that_does_not_fit(tmp_path, flow, network, change):
    path = tmp_path / "net.safetensors"
    description = {"flow": flow.config, "network": {"name": "mlp", "config": network.config}}
    crafted(path, network.state_dict(), **{**description, **change})
    with pytest.raises(ValueError, match=r"net\.safetensors cannot be loaded"):
        pfgm.load(path)


def run_checkpoint(folder, flow, network, step):
    save_run(folder, flow, network, {"step": step, "network": network.state_dict()})


def test_a_run_keeps_its_newest_two_checkpoints(tmp_path, flow, network):
    for step in (5, 10, 15):
        run_checkpoint(tmp_path / "run", flow, network, step)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "latest.json",
        "step-00000010.safetensors",
        "step-00000010.state.pt",
        "step-00000015.safetensors",
        "step-00000015.state.pt",
    ]
    assert same_weights(pfgm.load(tmp_path / "run").network, network)
    weights, description, state = load_run(tmp_path / "run")
    assert description["step"] == state["step"] == 15
    assert weights.keys() == network.state_dict().keys()
    # Continued from 10: later checkpoints no longer belong to the run.
    run_checkpoint(tmp_path / "run", flow, network, 12)
    assert load_run(tmp_path / "run")[2]["step"] == 12
    assert sorted(p.name for p in (tmp_path / "run").glob("*.state.pt")) == [
        "step-00000010.state.pt",
        "step-00000012.state.pt",
    ]


def test_only_checkpoints_of_the_run_are_removed(tmp_path, flow, network):
    copies = {"step-00000005-copy.safetensors", "step-best.safetensors", "step-old.state.pt"}
    for name in copies:
        (tmp_path / name).write_text("a copy of the user")
    for step in (99_999_998, 99_999_999, 100_000_000):
        run_checkpoint(tmp_path, flow, network, step)
    assert load_run(tmp_path)[2]["step"] == 100_000_000
    kept = {
        f"step-{step}.{suffix}"
        for step in (99_999_999, 100_000_000)
        for suffix in ("safetensors", "state.pt")
    }
    assert {p.name for p in tmp_path.iterdir()} == copies | kept | {"latest.json"}


@pytest.mark.parametrize("broken", ["safetensors", "state.pt", "latest.json"])
def test_an_interrupted_checkpoint_leaves_the_one_before(
    tmp_path, flow, network, monkeypatch, broken
):
    run_checkpoint(tmp_path, flow, network, 5)
    write = checkpoint.write_atomic

    def fails(path, content):
        if str(path).endswith(broken):
            raise OSError(f"{path} cannot be written: no space.")
        write(path, content)

    for module in (checkpoint, tensor_files):
        monkeypatch.setattr(module, "write_atomic", fails)
    with pytest.raises(OSError, match="no space"):
        run_checkpoint(tmp_path, flow, network, 10)
    monkeypatch.undo()
    assert load_run(tmp_path)[2]["step"] == 5
    run_checkpoint(tmp_path, flow, network, 10)
    assert load_run(tmp_path)[2]["step"] == 10


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_damaged_runs(tmp_path, flow, network, capsys):
    run_checkpoint(tmp_path, flow, network, 5)
    state = tmp_path / "step-00000005.state.pt"
    for content in ({"step": 6}, {"step": 5, "network": Payload()}):
        torch.save(content, state)
        with pytest.raises(ValueError, match="must be the complete training state"):
            load_run(tmp_path)
    assert capsys.readouterr().out == ""  # the state is never unpickled freely
    state.unlink()
    with pytest.raises(FileNotFoundError, match="no training state"):
        load_run(tmp_path)
    endless = "[" * 100_000 + "]" * 100_000
    outside = '{"weights": "../net.safetensors", "state": "x"}'
    for latest in ("", "[]", outside, '{"weights": 3}', endless, '{"step": %s}' % ("1" * 10_000)):
        (tmp_path / "latest.json").write_text(latest)
        with pytest.raises(ValueError, match="does not name a checkpoint"):
            load_run(tmp_path)


@pytest.fixture
def run(tmp_path, flow):
    """The folder of a run with checkpoints of steps 5 and 10, in small files."""
    for step in (5, 10):
        torch.manual_seed(step)
        network = pfgm.networks.MLP((3,), width=4, depth=1)
        run_checkpoint(tmp_path / "run", flow, network, step)
    return tmp_path / "run"


NEWEST = ("latest.json", "step-00000010.safetensors", "step-00000010.state.pt")


def flips(content, header):
    """Seeded positions of single bits: anywhere in the file, and as many again in the header."""
    draw = random.Random(0)
    yield from (draw.randrange(8 * len(content)) for _ in range(40))
    yield from (draw.randrange(8 * header) for _ in range(40))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NEWEST)
def test_every_flipped_bit_is_noticed(run, name):
    content = (run / name).read_bytes()
    header = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    for place in flips(content, header):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (run / name).write_bytes(damaged)
        for load in (load_run,) if name.endswith("state.pt") else (load_run, pfgm.load):
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                load(run)
            assert str(run / name) in str(caught.value)
            assert re.search(
                r"step (5|10) is intact|step-000000(05|10)\.\w+ is intact", str(caught.value)
            )


@pytest.mark.parametrize("name", NEWEST)
def test_cut_empty_and_lengthened_files(run, name):
    content = (run / name).read_bytes()
    draw = random.Random(0)
    changed = [content[: draw.randrange(len(content))] for _ in range(10)]
    for damaged in (b"", content + b"x", content + bytes(64), bytes(len(content)), *changed):
        (run / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint of step (5|10) is intact") as caught:
            load_run(run)
        assert str(run / name) in str(caught.value)


def test_files_that_do_not_belong_together(tmp_path, run, flow):
    other = tmp_path / "other"
    run_checkpoint(other, flow, pfgm.networks.MLP((3,), width=4, depth=1), 10)
    _, weights, state = NEWEST
    kept = (run / state).read_bytes()
    for source in (other / state, run / "step-00000005.state.pt"):  # of another run, another step
        shutil.copy(source, run / state)
        with pytest.raises(ValueError, match="must be the complete training state"):
            load_run(run)
    (run / state).write_bytes(kept)
    for source in (other / weights, run / "step-00000005.safetensors"):
        shutil.copy(source, run / weights)
        with pytest.raises(
            ValueError, match=r"must be the complete training state .* The checkpoint of step"
        ):
            load_run(run)
    (run / "latest.json").write_text(json.dumps({"step": 5, "weights": weights, "state": state}))
    with pytest.raises(ValueError, match="its step and its files do not belong together"):
        pfgm.load(run)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def test_the_error_names_an_intact_older_checkpoint(run, flow, network):
    damage(run / "step-00000010.safetensors")
    older = run / "step-00000005.safetensors"
    for path in (run, run / "step-00000010.safetensors"):
        with pytest.raises(
            ValueError, match=f"is damaged.*checkpoint {older} is intact: load that"
        ):
            pfgm.load(path)
    assert pfgm.load(older).flow == flow
    assert load_run(run, 5)[2]["step"] == 5
    (run / "step-00000010.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*{older} is intact"):
        pfgm.load(run)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*mine\.safetensors\.$"):
        pfgm.load(run / "mine.safetensors")  # of the user, who knows best which run it is of
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*other: it has no latest.json"):
        load_run(run / "other")
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint at .*other/step-0+10\.safetensors\.$"
    ):
        pfgm.load(run / "other" / "step-00000010.safetensors")
    damage(run / "step-00000005.state.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*10\.safetensors\.$"):
        load_run(run)
    damage(older)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*10\.safetensors\.$"):
        pfgm.load(run)


def test_a_reason_is_one_line_of_limited_length():
    assert checkpoint.reason(ValueError("a\n  b")) == "a b"
    assert checkpoint.reason(ValueError("x" * 300)) == "x" * 300
    assert checkpoint.reason(ValueError("x" * 301)) == "x" * 300 + " …"


def test_checkpoints_of_an_abandoned_continuation_are_removed(run, flow, network):
    run_checkpoint(run, flow, network, 15)
    save_run(run, flow, network, {"step": 20}, after=10)  # 15 was damaged, say
    assert sorted(p.name for p in run.glob("*.state.pt")) == [
        "step-00000010.state.pt",
        "step-00000020.state.pt",
    ]


def test_the_checksum_is_the_crc_of_the_file_with_zeros_in_its_place(tmp_path, flow, network):
    path = tmp_path / "net.safetensors"
    pfgm.save(path, flow, network, step=7)
    with safetensors.safe_open(path, framework="np") as file:  # readable without pfgm
        checksum, description = file.metadata()["checksum"], json.loads(file.metadata()["pfgm"])
    assert description["step"] == 7
    assert description["flow"]["z_min"] == 0.01
    assert description["network"]["name"] == "mlp"
    content = path.read_bytes()
    key = b'"checksum":"'
    assert content.count(key + checksum.encode()) == 1
    assert zlib.crc32(content.replace(key + checksum.encode(), key + b"0" * 8)) == int(checksum, 16)
    named = safetensors.torch.load_file(path)
    assert {k: v.shape for k, v in named.items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


def without_checksum(path):
    """Rewrites a weights file as versions without checksums did."""
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["pfgm"])
    for key in ("checksum", "state_checksum"):
        description.pop(key, None)
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"pfgm": json.dumps(description)})


def test_files_without_checksums_load_with_a_warning(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = load_run(run)[0]
        pfgm.load(run)
    without_checksum(run / "step-00000010.safetensors")
    with pytest.warns(UserWarning, match=r"step-00000010\.safetensors has no checksum"):
        weights, _, state = load_run(run)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert state["step"] == 10
    with pytest.warns(UserWarning, match="has no checksum, as an older version"):
        pfgm.load(run)
    state = run / "step-00000010.state.pt"
    for content in ([10], torch.load(run / "step-00000005.state.pt")):
        torch.save(content, state)
        with pytest.raises(ValueError, match=r"is not the training state that belongs.*step 5 is"):
            load_run(run)
    state.write_bytes(b"PK\x03\x04" + state.read_bytes()[4:200])
    with pytest.raises(ValueError, match=r"is not a complete training state.*step 5 is intact"):
        load_run(run)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("unet", {"shape": [1, 8, 8], "blocks": 100_000}),
        ("mlp", {"shape": [3], "width": 10**400}),
        ("mlp", {"shape": [10_000] * 200_000}),
        ("mlp", {"shape": [3], "classes": 10**15}),
        ("denoiser", {"network": "mlp", "config": {"shape": [3], "depth": 100_000}}),
    ],
)
def test_a_small_file_takes_little_time(tmp_path, name, config):
    path = tmp_path / "net.safetensors"
    crafted(path, {"weight": torch.ones(2)}, {"name": name, "config": config})
    started = time.process_time()
    with pytest.raises(ValueError, match=r"net\.safetensors cannot be loaded") as caught:
        pfgm.load(path)
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 1000


FIXTURES = Path(__file__).parent / "fixtures"
TAKEN = torch.tensor([[3.0, -40.0], [0.5, 20.0], [-9.0, 1.0]])


def test_the_checkpoint_of_version_0_1_loads_and_samples_as_it_did():
    """Numbers of pfgm 0.1.0, which wrote the files. See CONTRIBUTING on formats."""
    flow, network = pfgm.load(FIXTURES / "format-1")
    labels = torch.tensor([0, 1, 1])
    field_x, field_z = network(TAKEN / 9, torch.tensor([0.1, 1.0, 3.0]), labels)
    expected = torch.tensor([[-0.09977, 1.36680], [-0.02393, -1.19438], [0.42516, -0.00704]])
    torch.testing.assert_close(field_x, expected, rtol=0, atol=1e-4)
    expected = torch.tensor([-0.03051, -0.58633, -1.28472])
    torch.testing.assert_close(field_z, expected, rtol=0, atol=1e-4)
    options = {"solver": "heun", "schedule": "rho", "steps": 5, "condition": {"labels": labels}}
    samples = flow.sample(network, 3, x_init=TAKEN, **options)
    expected = torch.tensor([[0.02273, -0.48849], [0.01078, 0.44737], [-0.08301, 0.08255]])
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-3)
    assert pfgm.load(FIXTURES / "format-1").label_names == ("inner", "outer")


def test_a_run_of_version_0_1_is_resumed(tmp_path):
    written = runpy.run_path(str(FIXTURES / "write_checkpoint.py"))
    shutil.copytree(FIXTURES / "format-1", tmp_path / "run")
    flow, before = pfgm.load(tmp_path / "run")
    longer = dataclasses.replace(written["CONFIG"], steps=33)
    trainer = written["trainer"](longer, tmp_path / "run", flow)
    assert trainer.resume() == 30
    then = dataclasses.replace(written["CONFIG"], learning_rate=2e-3)  # its default then
    assert trainer.config.schedule == then.schedule
    assert not same_weights(trainer.train(), before)
    assert json.loads((tmp_path / "run" / "latest.json").read_text())["step"] == 33


@pytest.mark.parametrize("part", ["weights", "state"])
def test_a_later_format_is_named(tmp_path, flow, network, part, monkeypatch):
    state = {"step": 1, "format": 2 if part == "state" else 1}
    monkeypatch.setattr(weights_file, "_FORMAT", 2 if part == "weights" else 1)
    save_run(tmp_path, flow, network, state)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has format 2; this version .*reads format 1"):
        load_run(tmp_path)


def test_a_state_without_its_run_is_named(tmp_path, flow, network):
    save_run(tmp_path, flow, network, {"step": 1})
    data = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    trainer = pfgm.training.Trainer(flow, network, data, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"is damaged or of another program \('config'\)\."):
        trainer.resume()
