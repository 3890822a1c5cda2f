"""The digits, reading of arrays, and bytes to [-1, 1]."""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pfgm import data

SUFFIXES = [".npy", ".npz", ".safetensors"]


class Malicious:
    """Would fail the test by being unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def savez(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def save(path: Path, array: np.ndarray[Any, Any], name: str = "array") -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        savez(path, {name: array})
    else:
        save_file({name: torch.from_numpy(array)}, path)
    return path


def ramp(*shape: int) -> np.ndarray[Any, Any]:
    return np.linspace(-1, 1, int(np.prod(shape))).reshape(shape)


def test_digits_match_scikit_learn_one_by_one() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    levels, labels = datasets.load_digits(return_X_y=True)
    digits = data.digits()
    parts = {
        False: (iter(digits.train), iter(digits.train_labels)),
        True: (iter(digits.held_out), iter(digits.held_out_labels)),
    }
    for i, (image, label) in enumerate(zip(levels, labels, strict=True)):
        images_of_part, labels_of_part = parts[i % 9 in (4, 8)]
        expected = image.reshape(1, 8, 8) / 8 - 1
        np.testing.assert_array_equal(next(images_of_part).numpy(), expected)
        assert next(labels_of_part) == label
    assert all(next(left, None) is None for part in parts.values() for left in part)


def test_digits_have_the_documented_form() -> None:
    pytest.importorskip("sklearn")
    digits = data.digits()
    assert digits.train.shape == (1398, 1, 8, 8)
    assert digits.held_out.shape == (399, 1, 8, 8)
    assert digits.train.dtype == digits.held_out.dtype == torch.float32
    assert digits.train_labels.dtype == digits.held_out_labels.dtype == torch.int64
    assert digits.train_labels.shape == (1398,)
    assert set(digits.held_out_labels.tolist()) == set(range(10))
    assert digits.train.min() == -1
    assert digits.train.max() == 1


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install '\.\[demo\]'"):
        data.digits()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_become_float32(tmp_path: Path, suffix: str, dtype: Any) -> None:
    array = ramp(4, 1, 3, 2).astype(dtype)
    loaded = data.load_array(save(tmp_path / f"a{suffix}", array))
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(loaded.numpy(), array.astype(np.float32))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_stay_bytes(tmp_path: Path, suffix: str) -> None:
    array = np.arange(256, dtype=np.uint8).reshape(8, 32)
    loaded = data.load_array(str(save(tmp_path / f"a{suffix}", array)))
    assert loaded.dtype == torch.uint8
    np.testing.assert_array_equal(loaded.numpy(), array)


def test_bfloat16_is_read(tmp_path: Path) -> None:
    tensor = torch.arange(6).view(3, 2).bfloat16()
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    assert torch.equal(data.load_array(tmp_path / "a.safetensors"), tensor.float())


@pytest.mark.parametrize("array", [ramp(3, 4).astype(">f4"), np.asfortranarray(ramp(3, 4))])
def test_foreign_byte_and_memory_orders_are_read(
    tmp_path: Path, array: np.ndarray[Any, Any]
) -> None:
    loaded = data.load_array(save(tmp_path / "a.npy", array))
    assert loaded.is_contiguous()
    np.testing.assert_array_equal(loaded.numpy(), array.astype(np.float32))


def test_compressed_archives_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", ramp(5, 2))
    assert data.load_array(tmp_path / "a.npz").shape == (5, 2)


def test_the_tensor_is_independent_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", np.ones((2, 2), dtype=np.float32))
    loaded = data.load_array(path)
    with path.open("r+b") as file:
        file.seek(-16, io.SEEK_END)
        file.write(bytes(16))
    assert torch.equal(loaded, torch.ones(2, 2))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("present", [("images", "data", "x"), ("data", "x"), ("x",)])
def test_of_several_arrays_the_preferred_name_is_read(
    tmp_path: Path, suffix: str, present: tuple[str, ...]
) -> None:
    arrays = {name: np.full((2, 2), i, dtype=np.float32) for i, name in enumerate(present)}
    arrays = {"labels": np.full((2, 2), -1, dtype=np.float32), **arrays}
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        savez(path, arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    assert torch.equal(data.load_array(path), torch.zeros(2, 2))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_arrays_of_other_names_are_named_in_the_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, foo=ramp(2, 2), bar=ramp(2, 2))
    else:
        save_file({"foo": torch.zeros(2, 2), "bar": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"2 arrays \(bar, foo\).*images, data or x") as caught:
        data.load_array(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"missing{suffix}"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} does not exist"):
        data.load_array(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is empty"):
        data.load_array(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.mkdir()
    with pytest.raises(ValueError, match="is not a regular file"):
        data.load_array(path)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'\.png'; allowed are \.npy, \.npz and \.safetensors"):
        data.load_array(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncation_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", ramp(4, 3))
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated") as caught:
            data.load_array(path)
        assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("error")  # such as for a file left open
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"hello",
        pickle.dumps([1, 2]),
        bytes(200),
        b"PK\x03\x04" + bytes(99),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is truncated.*{suffix} file"):
        data.load_array(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_unpickled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="pickled"):
        data.load_array(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_object_arrays_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    array = np.empty((2, 2), dtype=object)
    array[:] = Malicious()
    path = save(tmp_path / f"a{suffix}", array)
    with pytest.raises(ValueError, match="pickled"):
        data.load_array(path)


def test_an_archive_of_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"no array at all")
    with pytest.raises(ValueError, match=r"not a \.npz file"):
        data.load_array(path)


def load_or_error(path: Path) -> Tensor | ValueError | TypeError:
    try:
        return data.load_array(path)
    except (ValueError, TypeError) as error:
        return error


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None
)
def test_damage_raises_only_the_documented_errors(
    tmp_path: Path, suffix: str, position: float, byte: int
) -> None:
    path = save(tmp_path / f"a{suffix}", ramp(2, 3).astype(np.float32), "x")
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = byte
    path.write_bytes(content)
    result = load_or_error(path)
    if isinstance(result, Tensor):
        assert torch.isfinite(result.float()).all()
    else:
        assert str(path) in str(result)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_])
def test_other_dtypes_are_refused(tmp_path: Path, suffix: str, dtype: type) -> None:
    path = save(tmp_path / f"a{suffix}", np.ones((2, 2), dtype=dtype))
    name = np.dtype(dtype).name
    with pytest.raises(TypeError, match=f"{name}; allowed are uint8 and floating") as caught:
        data.load_array(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("dtype", [complex, "U3", "f4,f4", "M8[s]"])
def test_no_numbers_at_all_are_refused(tmp_path: Path, dtype: Any) -> None:
    path = save(tmp_path / "a.npy", np.zeros((2, 2), dtype=dtype))
    with pytest.raises(TypeError, match="allowed are uint8 and floating"):
        data.load_array(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, suffix: str, value: float) -> None:
    array = np.zeros((3, 2))
    array[1, 1] = value
    path = save(tmp_path / f"a{suffix}", array)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} holds NaN or infinity"):
        data.load_array(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0)])
def test_shapes_that_are_no_samples_are_refused(
    tmp_path: Path, suffix: str, shape: tuple[int, ...]
) -> None:
    path = save(tmp_path / f"a{suffix}", np.zeros(shape))
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}; allowed is (n, *S)")):
        data.load_array(path)


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_to_unit_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{dtype}; allowed are torch.uint8"):
        data.to_unit(torch.zeros(2, dtype=dtype))
