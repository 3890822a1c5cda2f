"""Pickles read as data: what is refused, and the cost of broken and crafted files."""

import copyreg
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

from pfgm.networks import load_published
from pfgm.networks.published.safe_pickle import open_pickle


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


EXTENSION = 201


class Evil:
    """Touches a file when its state is set."""

    def __init__(self, marker):
        self.marker = marker

    def __setstate__(self, state):
        Path(state["marker"]).touch()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


def payloads(marker):
    """Pickles that touch a file when Python reads them, and the message that refuses them."""
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
        "BUILD": (pickle.dumps(Evil(str(marker)), 2), f"{__name__}.Evil"),
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
    pickle.loads(content)  # Python itself executes it
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
        with pytest.raises(ValueError, match=f"{message}, which is refused: reading it could"):
            load_published(path)
    assert not marker.exists()


class Hidden:
    """A pickle within a pickle, in the place of a storage's bytes."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_allowed_calls_cannot_be_misused(tmp_path):
    """Calls and states without meaning are reported as malformed."""
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
        with pytest.raises(ValueError, match=r"state\.pkl is (truncated|not a published network)"):
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
    with open_pickle(path) as result:
        assert torch.equal(result.tensor(), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
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
    """Files that ask for very much time or memory."""
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
    with open_pickle(tmp_path / "state.pt") as content:
        parts = [stored.tensor() for stored in content["parts"]]
    assert all(torch.equal(part, whole[k:]) for k, part in enumerate(parts))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
