"""Carries out what is to be measured: one thread a process, as many processes as processors.

What a job finds is a function of its arguments, and with one thread also of nothing that the
machine does meanwhile. It is kept as soon as it is there, so that a run which was stopped goes on
where it was.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from benchmarks.claims.presets import Preset
from pfgm.files import write_atomic

__all__ = ["Job", "Row", "Tables", "carry_out", "ended_by_sigterm", "measured", "processors"]

Row = dict[str, Any]
Tables = dict[str, list[Row]]
"""Name of a table, which is that of its CSV file, to its rows."""


class Job(NamedTuple):
    """A part of a claim: ``run(preset, folder, *arguments)`` gives its rows."""

    table: str
    run: Callable[..., list[Row]]
    arguments: tuple[Any, ...]
    cost: float = 1.0
    """About how long it takes beside the others; the longest go first."""
    alone: bool = False
    """Whether it takes times: then in this process, with all threads and nothing beside it."""

    @property
    def name(self) -> str:
        """What its rows are kept under."""
        return json.dumps([self.table, self.run.__name__, *map(str, self.arguments)])


def _start_worker() -> None:
    torch.set_num_threads(1)


def _work(job: Job, preset: Preset, folder: Path) -> list[Row]:
    try:
        return job.run(preset, folder, *job.arguments)
    except (KeyboardInterrupt, SystemExit):
        os._exit(1)  # after any exception, these two as well, it would be handed the next job


def carry_out(
    jobs: Sequence[Job], preset: Preset, folder: Path, *, title: str, workers: int
) -> Iterator[tuple[Job, list[Row]]]:
    """Every job with its rows, in the order in which they are done, behind a progress bar.

    On a GPU all are done in this process.
    """
    together = sorted((job for job in jobs if not job.alone), key=lambda job: -job.cost)
    total = sum(job.cost for job in jobs)
    with tqdm(total=round(total), desc=title, unit="step") as bar:
        if preset.device == "cpu" and together:
            for job, rows in _in_processes(together, preset, folder, workers):
                bar.update(round(job.cost))
                yield job, rows
            together = []
        for job in (*together, *(job for job in jobs if job.alone)):
            yield job, job.run(preset, folder, *job.arguments)
            bar.update(round(job.cost))


def _in_processes(
    jobs: Sequence[Job], preset: Preset, folder: Path, workers: int
) -> Iterator[tuple[Job, list[Row]]]:
    context = get_context("spawn")  # what OpenMP has started does not survive a fork
    with (
        ended_by_sigterm(),
        ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool,
    ):
        pending = {pool.submit(_work, job, preset, folder): job for job in jobs}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        except BaseException:
            # Those that train write a checkpoint first.
            for worker in active_children():
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as an exception does: with its workers."""
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measured(
    jobs: Sequence[Job], preset: Preset, folder: Path, *, title: str, workers: int
) -> Tables:
    """The tables of all jobs, in their order; those that an earlier run has done are not repeated.

    Times are taken anew.
    """
    path = folder / "measured" / f"{title}.json"
    path.parent.mkdir(exist_ok=True)
    known: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}
    missing = [job for job in jobs if job.alone or job.name not in known]
    for job, rows in carry_out(missing, preset, folder, title=title, workers=workers):
        known[job.name] = rows
        _keep(path, known)
    tables: Tables = {}
    for job in jobs:
        tables.setdefault(job.table, []).extend(known[job.name])
    return tables


def _keep(path: Path, known: dict[str, list[Row]]) -> None:
    content = json.dumps(known).encode()
    write_atomic(path, lambda file: file.write(content))
