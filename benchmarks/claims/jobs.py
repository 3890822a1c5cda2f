"""Runs jobs in several processes of one thread each, and keeps their rows.

The rows of a job depend only on its arguments: each process has one thread, so other work on the
machine cannot change them. Rows are written as soon as their job is done, so that a stopped run can
continue.
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
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from benchmarks.claims.methods import Spec
from benchmarks.claims.presets import Preset
from benchmarks.common.rows import Row
from pfgm.common.files import write_json

Tables = dict[str, list[Row]]
"""Name of a table and its CSV file → its rows."""


class Job(NamedTuple):
    """A measurement: ``run(preset, folder, spec, **setting)`` returns its figures.

    They are a row, or several rows. The row in the table has the setting before the figures.
    """

    table: str
    run: Callable[..., Row | list[Row]]
    setting: Row
    spec: Spec | None = None
    """The network that it needs."""
    cost: float = 1.0
    """Estimated time relative to other jobs; the longest start first."""
    alone: bool = False
    """Whether it measures times. Such a job runs alone, in this process, with all threads."""

    @property
    def name(self) -> str:
        """The key of its rows."""
        setting = {name: str(value) for name, value in self.setting.items()}
        return json.dumps([self.table, self.run.__name__, setting, self.spec])

    def rows(self, preset: Preset, folder: Path) -> list[Row]:
        """Its rows: setting and figures."""
        figures = self.run(preset, folder, self.spec, **self.setting)
        rows = figures if isinstance(figures, list) else [figures]
        return [{**self.setting, **row} for row in rows]


def _work(job: Job, preset: Preset, folder: Path) -> list[Row]:
    try:
        return job.rows(preset, folder)
    except (KeyboardInterrupt, SystemExit):
        os._exit(1)  # after an exception the pool would give this process the next job


def run_jobs(
    jobs: Sequence[Job], preset: Preset, folder: Path, *, title: str, workers: int
) -> Iterator[tuple[Job, list[Row]]]:
    """Yields every job with its rows when it is done, with a progress bar."""
    together = sorted((job for job in jobs if not job.alone), key=lambda job: -job.cost)
    total = sum(job.cost for job in jobs)
    with tqdm(total=round(total), desc=title, unit="step") as bar:
        for job, rows in _in_processes(together, preset, folder, workers) if together else ():
            bar.update(round(job.cost))
            yield job, rows
        for job in (job for job in jobs if job.alone):
            yield job, job.rows(preset, folder)
            bar.update(round(job.cost))


def _in_processes(
    jobs: Sequence[Job], preset: Preset, folder: Path, workers: int
) -> Iterator[tuple[Job, list[Row]]]:
    context = get_context("spawn")  # OpenMP's threads do not survive a fork
    with (
        ended_by_sigterm(),
        ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool,
    ):
        pending = {pool.submit(_work, job, preset, folder): job for job in jobs}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        except BaseException:
            # On SIGTERM a training process writes a checkpoint first.
            for worker in active_children():
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit here, so that the process ends its workers."""
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def processors() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measured_tables(
    jobs: Sequence[Job], preset: Preset, folder: Path, *, title: str, workers: int
) -> Tables:
    """Runs the jobs that no earlier run has done, and returns the tables of all jobs.

    Jobs that measure times run again.
    """
    path = folder / "measured" / f"{title}.json"
    path.parent.mkdir(exist_ok=True)
    known: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}
    missing = [job for job in jobs if job.alone or job.name not in known]
    for job, rows in run_jobs(missing, preset, folder, title=title, workers=workers):
        known[job.name] = rows
        write_json(path, known)
    tables: Tables = {}
    for job in jobs:
        tables.setdefault(job.table, []).extend(known[job.name])
    return tables
