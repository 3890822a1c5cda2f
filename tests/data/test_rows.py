"""Rows from memory and from files: reading, taking, threads, pickling, memory."""

import errno
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from torch import Tensor

import pfgm
from pfgm.data import rows as sources
from pfgm.data.rows import InMemory, OnDisk, Source

SHAPE = (11, 2, 3)
ALL_DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different numbers, exact in every dtype."""
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def on_disk(folder: Path, rows: Tensor, offset: int = 5) -> OnDisk:
    """The rows in a file of their own, unaligned and followed by other bytes."""
    path = folder / "rows.bin"
    path.write_bytes(b"#" * offset + rows.view(torch.uint8).numpy().tobytes() + b"#" * 9)
    return OnDisk(path, offset, rows.dtype, tuple(rows.shape[1:]), len(rows))


@pytest.fixture(params=["memory", "disk"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    rows = numbers(*SHAPE)
    return InMemory(rows) if request.param == "memory" else on_disk(tmp_path, rows)


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (0, 1), (10, 11), (3, 8), (4, 4), (11, 11)])
def test_read(source: Source, start: int, stop: int) -> None:
    rows = source.read(start, stop)
    assert rows.shape == (stop - start, 2, 3)
    assert torch.equal(rows, numbers(*SHAPE)[start:stop])


@pytest.mark.parametrize(
    "rows",
    [[], [0], [10, 0], [3, 3, 3], [4, 5, 6], [6, 5, 4], [10, 2, 3, 2, 9, 0, 1, 10], [*range(11)]],
)
def test_take(source: Source, rows: list[int]) -> None:
    taken = source.take(torch.tensor(rows, dtype=torch.int64))
    assert taken.shape == (len(rows), 2, 3)
    assert torch.equal(taken, numbers(*SHAPE)[rows])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_dtype_off_alignment(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = numbers(*SHAPE, dtype=dtype)
    for source in (InMemory(rows), on_disk(tmp_path, rows)):
        assert source.dtype == dtype
        for part in (source.read(2, 7), source.take(torch.arange(2, 7))):
            assert part.dtype == dtype
            assert torch.equal(part, rows[2:7])


def test_rows_in_memory_are_views_and_out_is_untouched() -> None:
    rows = numbers(*SHAPE)
    source, out = InMemory(rows), torch.full(SHAPE, torch.nan)
    assert source.tensor is rows
    assert source.read(2, 4, out).data_ptr() == rows[2].data_ptr()
    assert out.isnan().all()


def test_out_is_filled_as_far_as_asked(tmp_path: Path) -> None:
    source, out = on_disk(tmp_path, numbers(*SHAPE)), torch.full((5, 2, 3), torch.nan)
    rows = source.read(4, 7, out)
    assert rows.shape == (3, 2, 3)
    assert rows.data_ptr() == out.data_ptr()
    assert torch.equal(out[:3], numbers(*SHAPE)[4:7])
    assert out[3:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"data must be one of torch\.float32,.*got {dtype}; conv"):
        pfgm.data.open(torch.zeros(2, 2, dtype=dtype))
    with pytest.raises(
        TypeError, match=rf" must be one of torch\.float32, torch\.float64,.*got {dtype}; conv"
    ):
        OnDisk(tmp_path / "x", 0, dtype, (2,), 2)


def test_arrays_share_their_memory() -> None:
    array = np.ones((4, 2))
    held = pfgm.data.open(array).samples.tensor
    assert held.dtype == torch.float64
    array[1, 1] = 5
    assert held[1, 1] == 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[::-1],
        lambda a: a[:, ::2],
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(">f4"),
        lambda a: np.frombuffer(a.tobytes(), np.float32).reshape(a.shape),  # read-only
    ],
)
def test_arrays_in_any_order(change: Any) -> None:
    array = change(np.arange(12, dtype=np.float32).reshape(3, 4))
    source = pfgm.data.open(array).samples
    assert source.dtype == torch.float32
    np.testing.assert_array_equal(source.read(0, 3).numpy(), array.astype(np.float32))


def test_reads_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours are read together, no more at once than systems allow, and short reads go on."""
    source, preadv, most = on_disk(tmp_path, numbers(*SHAPE)), os.preadv, 1000
    reads: list[tuple[int, int]] = []

    def read(descriptor: int, buffers: list[memoryview], position: int) -> int:
        reads.append((position, len(buffers[0])))
        return preadv(descriptor, [buffers[0][:most]], position)

    monkeypatch.setattr(os, "preadv", read)
    source.take(torch.tensor([9, 3, 4, 3, 2]))
    assert reads == [(5 + 2 * 24, 3 * 24), (5 + 9 * 24, 24)]
    monkeypatch.setattr(sources, "_MAX_READ_BYTES", 100)
    assert torch.equal(source.read(0, 11), numbers(*SHAPE))
    assert [size for _, size in reads[2:]] == [100, 100, 64]
    most = 7
    assert torch.equal(source.read(1, 10), numbers(*SHAPE)[1:10])
    assert torch.equal(source.take(torch.tensor([9, 2, 3])), numbers(*SHAPE)[[9, 2, 3]])


def test_a_file_too_short_is_refused(tmp_path: Path) -> None:
    on_disk(tmp_path, numbers(*SHAPE))
    path = tmp_path / "rows.bin"
    message = f"{path} is truncated: its rows end at byte 270, the file at byte 269."
    os.truncate(path, 269)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        OnDisk(path, 6, torch.float32, (2, 3), 11)
    OnDisk(path, 5, torch.float32, (2, 3), 11)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    source = on_disk(tmp_path, numbers(*SHAPE))
    os.truncate(source.path, 60)
    assert torch.equal(source.read(0, 2), numbers(*SHAPE)[:2])
    message = "must not change while it is read: it ends at byte 60,"
    with pytest.raises(OSError, match=message):
        source.read(1, 4)
    with pytest.raises(OSError, match=message):
        source.take(torch.tensor([10]))


def test_a_disk_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = on_disk(tmp_path, numbers(*SHAPE))

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=re.escape(str(source.path))) as caught:
        source.read(0, 1)
    assert caught.value.errno == errno.EIO


def test_a_file_that_was_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    source = on_disk(tmp_path, numbers(*SHAPE))
    source.path.unlink()
    source.path.write_bytes(b"another")
    assert torch.equal(source.read(0, 11), numbers(*SHAPE))


def test_the_file_is_closed_with_the_source(tmp_path: Path) -> None:
    source = on_disk(tmp_path, numbers(*SHAPE))
    descriptor = source._descriptor
    os.fstat(descriptor)
    del source
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_pickling(source: Source) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert type(copy) is type(source)
    assert (len(copy), copy.shape, copy.dtype) == (len(source), source.shape, source.dtype)
    del source
    gc.collect()
    assert torch.equal(copy.read(0, 11), numbers(*SHAPE))


def test_reading_ahead_in_a_thread(tmp_path: Path) -> None:
    rows = numbers(4096, 64)
    source = on_disk(tmp_path, rows)
    wrong, stop = [], threading.Event()

    def read_ahead() -> None:
        out = torch.empty(256, 64)
        for start in range(0, 4096 * 10, 256):
            begin = start % 4096
            if not torch.equal(source.read(begin, begin + 256, out), rows[begin : begin + 256]):
                wrong.append(begin)
        stop.set()

    thread = threading.Thread(target=read_ahead)
    thread.start()
    generator = torch.Generator().manual_seed(0)
    taken = 0
    while not stop.is_set() or taken == 0:
        chosen = torch.randint(4096, (128,), generator=generator)
        assert torch.equal(source.take(chosen), rows[chosen])
        taken += 1
    thread.join()
    assert not wrong


def write_sparse(path: Path, shape: tuple[int, ...]) -> None:
    """An array of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * int(np.prod(shape)))


IN_ANOTHER_PROCESS = """
import os, pickle, resource, sys, torch

def peak():
    # Linux counts in ru_maxrss the process that started this one, before it became this program.
    if os.path.exists("/proc/self/status"):
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

import pfgm
with open("source.pickle", "rb") as file:
    source = pickle.load(file)
out = torch.empty(1000, 1000)
out.zero_()
before = peak()
for start in range(0, 50_000, 1000):
    source.read(start, start + 1000, out)
    source.take(torch.arange(start, start + 1000, 10))
chunks = peak()
pfgm.data.open(source.path).samples[:]
print(chunks - before, peak() - before)
"""


def test_a_large_file_takes_no_memory_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 200 MB. The measurement notices when it is loaded, which shows that it works."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write_sparse(tmp_path / "large.npy", (50_000, 1000))
    monkeypatch.chdir(tmp_path)
    (folder / "source.pickle").write_bytes(pickle.dumps(pfgm.data.open("large.npy").samples))
    shown = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    in_chunks, loaded = map(float, shown.stdout.split())
    assert in_chunks < 40
    assert loaded > 150
