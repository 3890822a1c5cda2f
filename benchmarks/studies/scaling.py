"""What grows how: with rows, values and points, from a file of any size, and with processes.

    python -m benchmarks.studies.scaling [--folder /tmp]

- The field of points from a file of ``rows`` images, read in place, beside a set of 100000 rows of
  the same images in memory. Also opening the file, the pass over it that a flow needs for its
  scale, the batch of a training step, and the peak memory of each, in a process of its own.
- The field and the posterior mean of 256 points over Fashion-MNIST, which 1, 2 and 4 processes
  (gloo) share. The bytes of a call are counted twice: those of the tensors that are given to
  torch.distributed, and those that the system sends through its loopback device.

Each process has one thread. Seconds are those of the processor, the least of a few turns, unless
they are called seconds of the clock: the machine is shared with other programs. Paths that are
compared take turns. The images are crops of photographs as bytes; the largest file has 7.7 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import spawn

import pfgm
from benchmarks.common.rows import Row
from benchmarks.common.study import Study, run
from benchmarks.common.subjects import fashion_mnist, perturbed, photograph_bytes
from benchmarks.cpu.peak_memory import kilobytes
from pfgm.training.batches import Batches

ROWS = (100_000, 1_000_000, 10_000_000)
SIZES = (8, 16, 32)
"""Width of the images; a row has 3 · width² values."""
POINTS, PROCESSES = (64, 256), (1, 2, 4)
IN_MEMORY = ROWS[0]
TURNS, REFERENCES, CALLS = 5, 512, 8
_PART = 50_000  # rows of a file that are made at once
OPERATIONS: dict[str, Callable[..., Any]] = {
    "field": lambda x, z, references: pfgm.field_fn(x, z, references),
    "mean": lambda x, z, references: pfgm.posterior_mean(x, references, sigma=z, D=128),
}


# ---- in processes of their own ------------------------------------------------------------------


def in_processes(function: Callable[..., Row], count: int, *arguments: Any) -> list[Row]:
    """The rows function(*arguments) of each of these processes, which form a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_process, (count, port, function, arguments, results), nprocs=count)
    rows = dict(results.get() for _ in range(count))
    return [rows[rank] for rank in range(count)]


def _process(
    rank: int,
    count: int,
    port: int,
    function: Callable[..., Row],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    results.put((rank, function(*arguments)))
    dist.barrier()
    dist.destroy_process_group()


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - processor, time.perf_counter() - clock


def peak_megabytes(call: Callable[[], Any]) -> float:
    """The most memory of this process during a call, beyond that before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1024


# ---- rows and values ----------------------------------------------------------------------------


def write_images(path: Path, rows: int, size: int) -> None:
    """A file of random crops of photographs, bytes (rows, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 3, size, size)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, _PART):
            count = min(_PART, rows - start)
            file.write(photograph_bytes(count, size, generator).numpy().data)
        os.fsync(file.fileno())


def from_a_file(path: str, points: int) -> Row:
    """Figures of this process with a file."""
    references = pfgm.ReferenceSet(path)
    turns = TURNS if len(references) < ROWS[-1] else 2
    chosen = references[torch.linspace(0, len(references) - 1, points).long()]
    case = perturbed(pfgm.data.to_unit(chosen), points)
    x, z = case.x.view(chosen.shape), case.z
    part = pfgm.ReferenceSet(references[:IN_MEMORY])
    calls = {
        "opened": lambda: pfgm.ReferenceSet(path),
        "statistics": lambda: pfgm.PoissonFlow.from_data(pfgm.ReferenceSet(path)),
    }
    row: Row = {name: timed(call)[0] for name, call in calls.items()}
    row["peak MiB"] = peak_megabytes(lambda: pfgm.field_fn(x, z, references))
    for _ in range(2):  # the second call makes summaries of rows in memory
        pfgm.field_fn(x[:2], z[:2], part)
    seconds = [
        (
            *timed(lambda: pfgm.field_fn(x, z, references)),
            timed(lambda: pfgm.field_fn(x, z, part))[0],
        )
        for _ in range(turns)
    ]
    row["file"], row["file, clock"], row["memory"] = map(min, zip(*seconds, strict=True))
    times_as_many = len(references) / len(part)
    row["file / memory, a row"] = statistics.median(a / (b * times_as_many) for a, _, b in seconds)
    return row | training_batches(references)


def training_batches(references: pfgm.ReferenceSet) -> Row:
    """Seconds and memory of the batches of training steps: the first of an epoch, and others."""
    batches = Batches(
        references, None, size=64, references=REFERENCES, seed=0, device=torch.device("cpu")
    )
    first: list[float] = []
    peak = peak_megabytes(lambda: first.append(timed(lambda: batches.at(0))[0]))
    others = [timed(lambda step=step: batches.at(step))[0] for step in range(1, 21)]  # type: ignore[misc]
    return {
        "first batch": first[0],
        "first batch, peak MiB": peak,
        "batch": statistics.median(others),
    }


def of_files(options: argparse.Namespace, rows: int, size: int, points: int) -> Row:
    """Figures of a file of this size, which is then deleted."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "images.npy"
        write_images(path, rows, size)
        (row,) = in_processes(from_a_file, 1, str(path), points)
        return {"values": 3 * size**2, "gigabytes": path.stat().st_size / 1e9, **row}


# ---- processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the bytes of tensors that this process gives to all_gather and all_reduce."""
    given = {"all_gather": 0, "all_reduce": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(gathered: list[Tensor], values: Tensor, **options: Any) -> None:
        given["all_gather"] += values.nbytes
        gather(gathered, values, **options)

    def all_reduce(values: Tensor, *operation: Any, **options: Any) -> None:
        given["all_reduce"] += values.nbytes
        reduce(values, *operation, **options)

    with (
        mock.patch.object(dist, "all_gather", all_gather),
        mock.patch.object(dist, "all_reduce", all_reduce),
    ):
        yield given


def bytes_given(points: int, values: int, processes: int, operation: str) -> dict[str, int]:
    """The bytes of :func:`counted`, by the code: for float32 points, as many in each process.

    The points and their levels are gathered; nearest, total and mean of all points are reduced. A
    field, which may lose digits to cancellation, has one byte more for each point.
    """
    own = points // processes
    sizes = 3 * 8  # number of points and values, and dtype
    return {
        "all_gather": sizes + own * (4 * values + 8 + (operation == "field")),
        "all_reduce": points * (4 * values + 2 * 8),
    }


def bytes_sent(given: dict[str, int], processes: int) -> float:
    """What each process sends for them if messages go around a ring, as gloo's and NCCL's do."""
    others = processes - 1
    return others * given["all_gather"] + 2 * others / processes * given["all_reduce"]


def loopback_bytes() -> int:
    """The bytes that this machine has sent to itself."""
    (line,) = (each for each in Path("/proc/net/dev").read_text().splitlines() if "lo:" in each)
    return int(line.split(":")[1].split()[8])


def shared(path: str, points: int) -> Row:
    """Figures of this process of a group that shares the file's rows."""
    count, rank = dist.get_world_size(), dist.get_rank()
    whole = pfgm.ReferenceSet(path)
    case = perturbed(pfgm.data.to_unit(whole[:]), points)
    x, z = case.x.view(points, *whole.shape[1:]), case.z
    own = slice(points * rank // count, points * (rank + 1) // count)
    part = whole.shard().to() if count > 1 else whole.to()
    alone = whole.to() if rank == 0 else None
    row: Row = {"MiB of rows": sum(chunk.nbytes for chunk in part.chunks()) / 2**20}
    for name, operation in OPERATIONS.items():
        row[name] = of_operation(operation, (x, z), own, part, alone)
    return row


def of_operation(
    operation: Callable[..., Any],
    of_all: tuple[Tensor, Tensor],
    own: slice,
    part: pfgm.ReferenceSet,
    alone: pfgm.ReferenceSet | None,
) -> Row:
    """Figures of one operation of this process, beside one process with all rows and points."""
    x, z = (each[own] for each in of_all)

    def together() -> None:
        operation(x, z, part)
        dist.barrier()

    with counted() as given:
        peak = peak_megabytes(together)
    together()  # which makes the summaries of rows
    seconds, one = [], []
    for _ in range(TURNS):
        if alone is not None:
            one.append(timed(lambda: operation(*of_all, alone)))
        dist.barrier()
        seconds.append(timed(together))
    dist.barrier()
    before = loopback_bytes()
    for _ in range(CALLS):
        together()
    sent = (loopback_bytes() - before) / CALLS / dist.get_world_size()
    row: Row = {
        "processor": min(seconds)[0],
        "clock": min(each for _, each in seconds),
        "peak MiB": peak,
        "bytes given": given,
        "bytes sent": sent,
    }
    if alone is not None:
        row["one process"] = min(one)[0]
        pairs = zip(one[1:], seconds[1:], strict=True)
        row["one process / these, clock"] = statistics.median(a[1] / b[1] for a, b in pairs)
        row["one process / this, processor"] = min(one)[0] / min(seconds)[0]
    return row


def of_processes(options: argparse.Namespace, processes: int) -> Row:
    """Figures of the first process, and the least and the most of all."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "fashion.npy"
        np.save(path, fashion_mnist().view(-1, 1, 28, 28).numpy())
        rows = in_processes(shared, processes, str(path), POINTS[-1])
    return rows[0] | {
        f"{name} in all, processor": math.fsum(row[name]["processor"] for row in rows)
        for name in OPERATIONS
    }


# ---- the study ----------------------------------------------------------------------------------


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """Processes; then values, points and rows, each alone."""
    yield from ({"processes": count} for count in PROCESSES)
    few, middle = POINTS[0], SIZES[1]
    yield from ({"rows": ROWS[0], "size": size, "points": few} for size in SIZES)
    yield {"rows": ROWS[0], "size": middle, "points": POINTS[1]}
    yield from ({"rows": rows, "size": middle, "points": few} for rows in ROWS[1:])


def measure(options: argparse.Namespace, processes: int = 0, **setting: int) -> Row:
    """The figures of a file, or of processes."""
    return of_processes(options, processes) if processes else of_files(options, **setting)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="for the files; else that of the system")


STUDY = Study("scaling", settings, measure, add_arguments=add_arguments, threads=1)

if __name__ == "__main__":
    run(STUDY, __doc__)
