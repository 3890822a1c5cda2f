"""Reference sets: from a file, in memory, streamed, and in two processes.

    python -m benchmarks.studies.references [--rows 1000000]

- All 60000 images of Fashion-MNIST as bytes: a tensor, a set in memory and a set in a file. Also
  the peak memory of reading through the file, beyond the memory of the process before.
- A set in memory, which keeps sums over its rows from call to call, beside a new set in every call
  and a tensor; with few and many points, near the data and farther away.
- ``--rows`` references with N = 3072 in a file, crops of photographs: going through them, reading
  the file alone, and computing from memory alone.
- Two processes (gloo) of one thread each that share the 60000 images, beside one process.

Paths take turns in one run. A ratio is the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import spawn

import pfgm
from benchmarks.common.rows import Row
from benchmarks.common.study import Study, run
from benchmarks.common.subjects import (
    fashion_mnist,
    perturbed,
    photograph_bytes,
    photograph_crops,
)
from benchmarks.common.turns import medians, ratio, time_calls

TURNS = 7
_PART = 50_000  # rows of the large file that are made at once


# ---- Fashion-MNIST in a file ------------------------------------------------------------------

PEAK = """
import sys
import numpy as np, torch, pfgm
from benchmarks.cpu.peak_memory import kilobytes

queries = np.load(sys.argv[2])
x, z = (torch.from_numpy(queries[name]) for name in ("x", "z"))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = kilobytes("VmRSS")
references = pfgm.ReferenceSet(np.load(sys.argv[1], mmap_mode="r"))
pfgm.field_fn(x, z, references)
print((kilobytes("VmHWM") - before) / 1024)
"""


def from_a_file(folder: Path, B: int = 256) -> dict[str, Any]:
    """Times, error and peak memory of Fashion-MNIST from a file."""
    images = fashion_mnist()
    path = folder / "fashion.npy"
    np.save(path, images.numpy())
    case = perturbed(pfgm.data.to_unit(images).view(-1, 1, 28, 28), B)
    held, mapped = pfgm.ReferenceSet(images), pfgm.ReferenceSet(np.load(path, mmap_mode="r"))
    sources: dict[str, Tensor | pfgm.ReferenceSet] = {
        "tensor": images,
        "set in memory": held,
        "memory map": mapped,
    }
    fields: dict[str, Tensor] = {}

    def run(name: str) -> Callable[[], None]:
        def path() -> None:
            fields[name] = pfgm.field_fn(case.x, case.z, sources[name])[0]

        return path

    seconds = time_calls({name: run(name) for name in sources}, TURNS)
    np.savez(folder / "queries.npz", x=case.x.numpy(), z=case.z.numpy())
    exact, _ = pfgm.field_fn(case.x[:32].double(), case.z[:32], images, backend="reference")
    peak = subprocess.run(
        [sys.executable, "-c", PEAK, path, folder / "queries.npz"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "B, M, N": (B, *images.shape),
        "seconds": medians(seconds),
        "memory map / tensor": ratio(seconds, "memory map", "tensor"),
        "memory map / set in memory": ratio(seconds, "memory map", "set in memory"),
        "the same bits": torch.equal(fields["memory map"], fields["set in memory"]),
        "worst error over √N": float(
            (fields["memory map"][:32] - exact).norm(dim=1).max() / images.shape[1] ** 0.5
        ),
        "peak megabytes": float(peak.stdout),
    }


# ---- sums that a set keeps ---------------------------------------------------------------------


def kept(B: int, z: float) -> dict[str, Any]:
    """The field of B points at level z, from a used set, a new set and a tensor."""
    images = fashion_mnist()
    clean = pfgm.data.to_unit(images[:B])
    x = clean + z * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    paths: dict[str, Callable[[], Tensor]] = {
        "tensor": functools.partial(_field, x, z, images),
        "new set": functools.partial(_field, x, z, images, new=True),
        "set": functools.partial(_field, x, z, pfgm.ReferenceSet(images)),
    }
    fields = [path() for path in paths.values()]
    seconds = time_calls(paths, TURNS)
    return {
        "B, M, N": (B, *images.shape),
        "seconds": medians(seconds),
        "new set / set": ratio(seconds, "new set", "set"),
        "tensor / set": ratio(seconds, "tensor", "set"),
        "the same bits": torch.equal(fields[1], fields[2]),
    }


def _field(
    x: Tensor, z: float, references: pfgm.references.References, new: bool = False
) -> Tensor:
    if new and isinstance(references, Tensor):
        references = pfgm.ReferenceSet(references)
    return pfgm.field_fn(x, z, references)[0]


# ---- more references than fit into memory -----------------------------------------------------


def write_large(path: Path, rows: int) -> None:
    """Writes random crops of photographs as bytes (rows, 3072)."""
    generator = torch.Generator().manual_seed(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 3 * 32 * 32)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, _PART):
            count = min(_PART, rows - start)
            file.write(photograph_bytes(count, 32, generator).numpy().data)


def streamed(folder: Path, rows: int, B: int = 128) -> dict[str, Any]:
    """Times of a large file: streamed, only read, and computed from memory."""
    path = folder / "large.npy"
    write_large(path, rows)
    os.sync()  # the disk must have finished writing
    case = perturbed(photograph_crops(4096), B)
    references = pfgm.ReferenceSet(path)
    part = references[: min(rows, 200_000)]

    def forget() -> None:
        """Makes the next read come from the disk, if the system allows it."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read() -> float:
        started = time.perf_counter()
        buffer = torch.empty((references.part.chunk_rows, 3072), dtype=torch.uint8)
        for start in range(0, rows, len(buffer)):
            references.part.source.read(start, min(start + len(buffer), rows), buffer)
        return time.perf_counter() - started

    def compute(over: pfgm.ReferenceSet) -> float:
        """Seconds of the field over a set that was not used before."""
        started = time.perf_counter()
        pfgm.field_fn(case.x, case.z, over)
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {"read": [], "computed from memory": [], "streamed": []}
    compute(pfgm.ReferenceSet(part))
    for _ in range(5):
        forget()
        seconds["read"].append(read())
        forget()
        seconds["streamed"].append(compute(references))
        seconds["computed from memory"].append(compute(pfgm.ReferenceSet(part)) * rows / len(part))
    turns = zip(*seconds.values(), strict=True)
    return {
        "B, M, N": (B, rows, 3072),
        "gigabytes": path.stat().st_size / 1e9,
        "seconds": medians(seconds),
        "rate / the slower of both": statistics.median(
            max(reading, computing) / streaming for reading, computing, streaming in turns
        ),
    }


# ---- two processes ----------------------------------------------------------------------------


def _shared(rank: int, path: str, port: int, B: int, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    whole = pfgm.ReferenceSet(path).to()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    part = whole.shard()
    case = perturbed(pfgm.data.to_unit(whole[:]).view(-1, 1, 28, 28), B)
    own = slice(rank * B // 2, (rank + 1) * B // 2)
    alone: list[float] = []
    together: list[float] = []
    for _ in range(TURNS + 1):
        dist.barrier()
        if rank == 0:
            started = time.perf_counter()
            expected, _ = pfgm.field_fn(case.x, case.z, whole)
            alone.append(time.perf_counter() - started)
        dist.barrier()
        started = time.perf_counter()
        field, _ = pfgm.field_fn(case.x[own], case.z[own], part)
        dist.barrier()
        together.append(time.perf_counter() - started)
    if rank == 0:
        difference = float((field - expected[own]).abs().max())
        results.put({"one": alone[1:], "two": together[1:], "difference": difference})
    dist.destroy_process_group()


def shared(folder: Path, B: int = 256) -> dict[str, Any]:
    """Times of one process, and of two that share the references."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    path = str(folder / "fashion.npy")
    np.save(path, fashion_mnist().numpy())
    spawn(_shared, (path, port, B, results), nprocs=2)
    answers = results.get()
    seconds = {name: answers[name] for name in ("one", "two")}
    return {
        "B, M, N": (B, 60000, 784),
        "seconds": medians(seconds),
        "one process / two": ratio(seconds, "one", "two"),
        "largest difference": answers["difference"],
    }


SUBJECTS: dict[str, Callable[..., dict[str, Any]]] = {
    "from a file": from_a_file,
    "two processes": shared,
    "streamed": streamed,
}


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The subjects."""
    yield from ({"subject": name} for name in ("from a file", "two processes"))
    for B, z in itertools.product((1, 16, 64, 256), (0.1, 0.3, 1.0)):
        yield {"subject": "kept", "B": B, "z": z}
    if options.rows:
        yield {"subject": "streamed", "rows": options.rows}


def measure(options: argparse.Namespace, subject: str, **setting: Any) -> Row:
    """Seconds in all turns, and their ratios."""
    if subject == "kept":
        return kept(**setting)
    with tempfile.TemporaryDirectory() as folder:
        return SUBJECTS[subject](Path(folder), **setting)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large file; 0 is none")


STUDY = Study("references", settings, measure, add_arguments=add_arguments)

if __name__ == "__main__":
    run(STUDY, __doc__)
