"""Array files and memory maps: read in place, loaded or refused; bytes to [-1, 1]."""

import io
import json
import math
import mmap
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy
from safetensors.torch import save_file
from torch import Tensor

import pfgm
from pfgm import data
from pfgm.data.rows import OnDisk, Source

Array = np.ndarray[Any, Any]
SUFFIXES = [".npy", ".npz", ".safetensors"]


def open_rows(path: Path) -> Tensor:
    """All rows of a file that is opened, not loaded."""
    source = pfgm.data.open(path).samples
    return source.read(0, len(source))


class Malicious:
    """Would fail the test by being unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def save_all(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


def save(path: Path, array: Array, name: str = "array") -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
        return path
    return save_all(path, {name: array})


def ramp(*shape: int, dtype: Any = np.float32) -> Array:
    return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)


def contents(source: Source) -> Array:
    return source.read(0, len(source)).numpy()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_common_dtypes_are_read_in_place(tmp_path: Path, suffix: str, dtype: Any) -> None:
    array = ramp(7, 1, 3, 2, dtype=dtype)
    source = pfgm.data.open(str(save(tmp_path / f"a{suffix}", array))).samples
    assert isinstance(source, OnDisk)
    np.testing.assert_array_equal(contents(source), array, strict=True)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_numpy_format(tmp_path: Path, version: tuple[int, int]) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        npy.write_array(file, ramp(5, 2), version)
    source = pfgm.data.open(tmp_path / "a.npy").samples
    assert isinstance(source, OnDisk)
    np.testing.assert_array_equal(contents(source), ramp(5, 2))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.asfortranarray(ramp(3, 4)), np.float32),
        (ramp(3, 4, dtype=">f4"), np.float32),
        (ramp(3, 4, dtype=">f2"), np.float16),
        (ramp(3, 4, dtype=">f8"), np.float32),
        (ramp(3, 4, dtype=np.longdouble), np.float32),
    ],
)
def test_foreign_orders_and_widths_are_loaded(
    tmp_path: Path, suffix: str, array: Array, dtype: Any
) -> None:
    path = save(tmp_path / f"a{suffix}", array)
    source = pfgm.data.open(path).samples
    assert source.tensor is not None
    np.testing.assert_array_equal(contents(source), array.astype(dtype), strict=True)
    assert source.tensor.is_contiguous()


def test_an_archive_behind_other_bytes(tmp_path: Path) -> None:
    """As in self-extracting archives: positions count from where the archive begins."""
    path = save(tmp_path / "a.npz", ramp(4, 3))
    path.write_bytes(b"#" * 1234 + path.read_bytes())
    source = pfgm.data.open(path).samples
    assert isinstance(source, OnDisk)
    np.testing.assert_array_equal(contents(source), ramp(4, 3))


def test_members_with_extra_fields(tmp_path: Path) -> None:
    """The length of a local header is in the header itself, not in the directory of the archive."""
    buffer = io.BytesIO()
    np.save(buffer, ramp(4, 3))
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w") as archive,
        archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as member,
    ):
        member.write(buffer.getvalue())
    source = pfgm.data.open(tmp_path / "a.npz").samples
    assert isinstance(source, OnDisk)
    np.testing.assert_array_equal(contents(source), ramp(4, 3))


def test_bfloat16_and_metadata_in_safetensors(tmp_path: Path) -> None:
    tensor = torch.arange(30).view(5, 2, 3).bfloat16()
    tensors = {"labels": torch.arange(5), "images": tensor, "z": torch.zeros(3)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"images": "of numbers"})
    source = pfgm.data.open(tmp_path / "a.safetensors").samples
    assert isinstance(source, OnDisk)
    assert source.dtype == torch.bfloat16
    assert torch.equal(source.take(torch.tensor([4, 0])), tensor[[4, 0]])
    assert torch.equal(open_rows(tmp_path / "a.safetensors"), tensor.float())


def test_narrow_floats_in_safetensors_are_loaded(tmp_path: Path) -> None:
    tensor = torch.arange(6).view(3, 2).to(torch.float8_e4m3fn)
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    source = pfgm.data.open(tmp_path / "a.safetensors").samples
    assert source.tensor is not None
    assert torch.equal(source.tensor, tensor.float())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("present", [("images", "data", "x"), ("data", "x"), ("x",)])
def test_of_several_arrays_the_preferred_name_is_read(
    tmp_path: Path, suffix: str, present: tuple[str, ...]
) -> None:
    arrays = {name: ramp(3, 2) + 100 * i for i, name in enumerate(present)}
    arrays = {"before": ramp(5, 5), **arrays, "z": ramp(2, 2)}
    path = save_all(tmp_path / f"a{suffix}", arrays)
    assert isinstance(pfgm.data.open(path).samples, OnDisk)
    np.testing.assert_array_equal(open_rows(path).numpy(), ramp(3, 2))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_arrays_of_other_names_are_named_in_the_error(tmp_path: Path, suffix: str) -> None:
    path = save_all(tmp_path / f"a{suffix}", {"foo": ramp(2, 2), "bar": ramp(2, 2)})
    with pytest.raises(
        ValueError, match=r" must hold one array, or one.*got 2 arrays \(bar, foo\)\."
    ) as caught:
        open_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".zip"])
def test_empty_files_and_devices_are_named(tmp_path: Path, suffix: str) -> None:
    empty, device = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    empty.touch()
    device.symlink_to("/dev/zero")
    damaged = "must be a complete zip" if suffix == ".zip" else "is empty"
    for path, problem in ((empty, damaged), (device, "must be a file or a folder, not a pipe")):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {problem}"):
            pfgm.data.open(path)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    with pytest.raises(
        ValueError, match=r" must be a folder of images or end.*got the suffix '\.png'\."
    ):
        pfgm.data.open(path)
    table = path.rename(tmp_path / "a.xlsx")
    with pytest.raises(ValueError, match=r" must be a folder of.*got the suffix '\.xlsx'; a ta"):
        pfgm.data.open(table)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncation_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", ramp(4, 3))
    whole = path.read_bytes()
    for size in (*range(1, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(path))} (must be a complete|is truncated)"
        ):
            open_rows(path)


@pytest.mark.filterwarnings("error")  # such as for a file left open
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"hello",
        pickle.dumps(Malicious()),
        bytes(200),
        b"PK\x03\x04" + bytes(99),
        (2**63).to_bytes(8, "little") + b"{}",
        (5000).to_bytes(8, "little") + b"[" * 5000,
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} must be a complete {suffix}"):
        open_rows(path)


@pytest.mark.parametrize("damage", ["another member", "encrypted", "unknown version", "number"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / ("a.npy" if damage == "unknown version" else "a.npz")
    if damage == "number":  # whose checksum in the archive no longer agrees
        np.savez_compressed(path, np.random.default_rng(0).random((400, 5)))
    else:
        save(path, ramp(4, 3))
    content = bytearray(path.read_bytes())
    if damage == "encrypted":
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    else:
        content[5000 if damage == "number" else 6] ^= 8
    path.write_bytes(content)
    if damage == "another member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images", b"no array at all")
    with pytest.raises(ValueError, match=r"must be a complete \.np[yz] file of plain numbers: it "):
        open_rows(path)


@pytest.mark.parametrize("dtype", ["i8", "i1", "?", complex, "U3", "f4,f4", "M8[s]", object])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: Any) -> None:
    """Objects unread, in memory, in files and in memory maps."""
    array = np.zeros((2, 2), dtype)
    if dtype is object:
        array[:] = Malicious()
    known = SUFFIXES if dtype in ("i8", "i1", "?") else [".npy", ".npz"]
    paths = [save(tmp_path / f"a{suffix}", array) for suffix in known]
    sources = [("data", array), *((str(path), path) for path in paths)]
    if dtype is not object:
        sources.append((str(paths[0]), np.load(paths[0], mmap_mode="r")))
    for name, source in sources:
        remedy = r"; convert them, as by astype\('float32'\)\.$"
        message = f"^{re.escape(name)} must hold uint8 or floating-point numbers, got .*{remedy}"
        with pytest.raises(TypeError, match=message):
            pfgm.data.open(source)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (3,)])
def test_shapes_that_are_no_samples_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Numbers (n,) are samples in memory, and not in files."""
    paths = [save(tmp_path / f"a{suffix}", np.zeros(shape)) for suffix in SUFFIXES]
    sources = [(str(path), path) for path in paths]
    if shape != (3,):
        mapped = np.load(save(tmp_path / "b.npy", ramp(8)), mmap_mode="r")
        part = mapped[: math.prod(shape)].reshape(shape)
        sources += [("data", each) for each in (torch.zeros(shape), np.zeros(shape), part)]
    if len(shape) == 2:
        path = tmp_path / "c.bin"
        sources.append((str(path), np.memmap(path, np.float32, "w+", shape=shape)))
    for name, source in sources:
        message = f"{name} must have shape (n, *S), n samples of shape S with at least one number, "
        with pytest.raises(ValueError, match=re.escape(f"{message}got {shape}")):
            pfgm.data.open(source)


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("'<f4', 'fortran_order': False", "(-2, -3)", r" must be a complete \.npy file"),
        ("'<f4', 'fortran_order': False", "(2, 3.0)", r" must be a complete \.npy file"),
        ("'<f4', 'fortran_order': False", "(2, True)", r" must be a complete \.npy file"),
        ("'<f4', 'fortran_order': False", "(2, 'x')", r" must be a complete \.npy file"),
        ("'>f4', 'fortran_order': True", "(10000000, 100000000)", "4000000000000000 bytes of num"),
    ],
)
def test_malformed_and_huge_shapes_are_refused(
    tmp_path: Path, form: str, shape: str, message: str
) -> None:
    header = f"{{'descr': {form}, 'shape': {shape}}}\n".encode()
    path = tmp_path / "a.npy"
    path.write_bytes(npy.magic(1, 0) + len(header).to_bytes(2, "little") + header + bytes(24))
    with pytest.raises(ValueError, match=message):
        open_rows(path)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-2, -3]},
        {"shape": [2.0, 3]},
        {"shape": "23"},
        {"shape": None},
        {"shape": [2, 2]},
        {"data_offsets": [-4, 20]},
        {"data_offsets": [24, 0]},
        {"data_offsets": [0, 24, 48]},
        {"data_offsets": [8, 32]},
        {"data_offsets": [0, 10**30]},
        {"dtype": "F9"},
        {"dtype": ["F32"]},
    ],
)
def test_damaged_safetensors_headers_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    for changes in ({}, change):
        header = json.dumps({"x": ENTRY | changes}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + ramp(2, 3).tobytes())
        if not changes:
            np.testing.assert_array_equal(open_rows(path).numpy(), ramp(2, 3))
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))} (must be a complete|is truncated)"
    ):
        open_rows(path)


def result_or_error(path: Path) -> Tensor | ValueError | TypeError:
    try:
        return open_rows(path)
    except (ValueError, TypeError) as error:
        return error


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=80,
    deadline=None,
    derandomize=True,
)
def test_damage_raises_only_the_documented_errors(
    tmp_path: Path, suffix: str, position: float, byte: int
) -> None:
    path = save(tmp_path / f"a{suffix}", ramp(2, 3), "x")
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = byte
    path.write_bytes(content)
    result = result_or_error(path)
    if isinstance(result, Tensor):
        assert result.ndim >= 2
        assert result.numel() > 0
    else:
        assert str(path) in str(result)


@pytest.mark.parametrize("offset", [0, 1, 4096, mmap.ALLOCATIONGRANULARITY + 12])
@pytest.mark.parametrize(
    "part",
    [
        lambda a: a,
        lambda a: a[3:9],
        lambda a: a[3:9][2:4],
        lambda a: a.reshape(40, 3, 2),
        lambda a: a[1].reshape(2, 3),
        lambda a: a[-1:],
        lambda a: a.view(np.uint8),
    ],
)
def test_memory_maps_are_read_from_their_file(tmp_path: Path, offset: int, part: Any) -> None:
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(offset) + ramp(40, 6).tobytes() + b"more")
    mapped = np.memmap(path, np.float32, "r", offset, (40, 6))
    source = pfgm.data.open(part(mapped)).samples
    assert isinstance(source, OnDisk)
    assert source.path == path
    np.testing.assert_array_equal(contents(source), part(ramp(40, 6)), strict=True)


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_changes_through_a_map_are_seen(tmp_path: Path, mode: Any) -> None:
    mapped = np.load(save(tmp_path / "a.npy", ramp(4, 2)), mmap_mode=mode)
    mapped[1] = -1
    np.testing.assert_array_equal(contents(pfgm.data.open(mapped).samples), mapped)


@pytest.mark.parametrize(
    ("dtype", "part"),
    [
        ("<f4", lambda a: a[::2]),
        ("<f4", lambda a: a[:, 1:3]),
        ("<f4", lambda a: a.T),
        ("<f4", lambda a: a[::-1]),
        ("<f4", lambda a: a + 1),
        (">f4", lambda a: a),
        (">f8", lambda a: a),
    ],
)
def test_maps_of_another_order_are_copied(tmp_path: Path, dtype: str, part: Any) -> None:
    mapped = np.load(save(tmp_path / "a.npy", ramp(8, 4, dtype=dtype)), mmap_mode="r")
    source = pfgm.data.open(part(mapped)).samples
    assert source.tensor is not None
    del mapped
    np.testing.assert_array_equal(contents(source), part(ramp(8, 4)), strict=True)


def test_a_map_of_a_file_without_a_name(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w+b", buffering=0) as file:
        file.write(ramp(4, 2).tobytes())
        mapped: Any = np.memmap(io.FileIO(file.fileno(), closefd=False), np.float32, shape=(4, 2))
        source = pfgm.data.open(mapped).samples
    np.testing.assert_array_equal(contents(source), ramp(4, 2))


def test_maps_of_numbers_and_columns_of_maps(tmp_path: Path) -> None:
    numbers = np.load(save(tmp_path / "a.npy", ramp(8)), mmap_mode="r")
    column = np.load(save(tmp_path / "b.npy", ramp(8, 2)), mmap_mode="r")[:, 0]
    for mapped in (numbers, column):
        np.testing.assert_array_equal(contents(pfgm.data.open(mapped).samples), mapped)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            flow = pfgm.PoissonFlow.from_data(mapped)
        assert flow == pfgm.PoissonFlow.from_data(pfgm.ReferenceSet(mapped))


def test_a_map_whose_file_is_gone_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", ramp(8, 2))
    mapped = np.load(path, mmap_mode="r")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        pfgm.data.open(mapped)


def test_to_unit_of_every_byte() -> None:
    images = torch.arange(256, dtype=torch.uint8)
    unit = data.to_unit(images)
    assert unit.dtype == torch.float32
    expected = np.arange(256) / 127.5 - 1
    np.testing.assert_allclose(unit.numpy(), expected, rtol=0, atol=1.2e-7)
    assert unit.min() == -1
    assert unit.max() == 1
    assert torch.equal(images, torch.arange(256, dtype=torch.uint8)), "the argument is unchanged"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_to_unit_leaves_floats(dtype: torch.dtype) -> None:
    images = torch.tensor([[-3.0, 0.25], [1.0, 500.0]], dtype=dtype)
    unit = data.to_unit(images)
    assert unit.dtype == torch.float32
    assert torch.equal(unit, images.float())
