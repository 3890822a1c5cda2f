"""The log of a training run: CSV files, and TensorBoard or Weights & Biases on request."""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ..common.files import csv_text, reserve_standard_descriptors, write_csv, write_errors
from .locks import check_unmoved

LogTo = Literal["csv", "tensorboard", "wandb"]


def check_log(to: LogTo, folder: Path | None) -> None:
    """Raises an error if a run in the folder cannot write this log."""
    if to == "csv":
        return
    if importlib.util.find_spec(to) is None:
        raise ImportError(f"log={to!r} needs {to}; in a checkout: pip install '.[{to}]'")
    if folder is None:
        raise ValueError(f"folder must be given with log={to!r}, which writes into it.")


def is_evaluated(folder: Path, step: int) -> bool:
    """Whether ``evaluations.csv`` in the folder of a run has the row of a step."""
    path = folder / "evaluations.csv"
    return path.exists() and any(int(row[0]) == step for row in _read_csv(path)[1])


class Log:
    """Values of a run by step, in ``log.csv`` and ``evaluations.csv``, and where ``to`` says.

    Rows of steps after ``step``, the checkpoint that the run continues from, are removed: a killed
    run has left them. ``settings`` are those of the run, for Weights & Biases.
    """

    def __init__(
        self,
        folder: Path | None,
        step: int = 0,
        to: LogTo = "csv",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._tables: dict[str, _Table] = {}
        self._writer: _TensorBoard | _WeightsAndBiases | None = None
        if folder is None:
            return
        reserve_standard_descriptors()
        folder.mkdir(parents=True, exist_ok=True)
        names = ("log", "evaluations")
        self._tables = {name: _Table(folder / f"{name}.csv", step) for name in names}
        if to == "tensorboard":
            self._writer = _TensorBoard(folder, step)
        elif to == "wandb":
            self._writer = _WeightsAndBiases(folder, step, settings or {})

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close(failed=kind is not None)

    @property
    def seconds(self) -> float:
        """Seconds that the run has trained, by the last row of the log; 0 without a row."""
        return self._tables["log"].last("seconds") if self._tables else 0.0

    def write(self, step: int, values: Mapping[str, float], table: str = "log") -> None:
        """Adds the values of a step; the first row of a table sets its columns."""
        if table in self._tables:
            self._tables[table].add({"step": step, **values})
        if self._writer is not None:
            self._writer.write(step, values)


class _TensorBoard:
    """Events in the folder of a run, those after ``step`` removed."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of the project pfgm, or of $WANDB_PROJECT, with the name of the folder.

    A resumed run goes on as the same one. It has the values of steps that were done again twice.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "pfgm"),
                name=folder.resolve().name,
                dir=str(folder),
                config={**settings},
                id=_newest_id(folder) if step else None,
                resume="allow",
                settings=wandb.Settings(console="off"),  # the messages of the run stay its own
            )
        except wandb.errors.UsageError as error:  # above all nobody is logged in
            raise ValueError(
                f"log='wandb' cannot start: {error} Or set WANDB_MODE=offline."
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _newest_id(folder: Path) -> str | None:
    """The id of the last run of Weights & Biases in a folder, by the name run-TIME-ID."""
    names = sorted(path.name.partition("run-")[2] for path in folder.glob("wandb/*run-*-*"))
    return names[-1].rpartition("-")[2] if names else None


class _Table:
    """A CSV file that rows are appended to."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._fields, kept = _read_csv(path) if path.exists() else ([], [])
        kept = [row for row in kept if int(row[0]) <= step]
        self._last = dict(zip(self._fields, kept[-1], strict=True)) if kept else {}
        if not kept:
            path.unlink(missing_ok=True)
            self._fields = []
            return
        write_csv(path, [self._fields, *kept])

    def last(self, name: str) -> float:
        """A value of the last row that the file held at first; 0 if there is none."""
        try:
            return float(self._last.get(name) or 0.0)
        except ValueError:  # a damaged or foreign row
            return 0.0

    def add(self, row: Mapping[str, float]) -> None:
        rows: list[Sequence[object]] = []
        check_unmoved(self._path.parent)
        with write_errors(self._path), self._path.open("a", newline="") as file:
            if not self._fields or file.tell() == 0:  # also if the file was removed
                self._fields = list(row)
                rows.append(self._fields)
            values = (row.get(name, "") for name in self._fields)
            rows.append([f"{v:.6g}" if isinstance(v, float) else v for v in values])
            file.write(csv_text(rows))


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, without rows that a killed process has left incomplete."""
    with path.open(newline="") as file:
        fields, *rows = [*csv.reader(file)] or [[]]
    return fields, [row for row in rows if len(row) == len(fields) and row[0].isdigit()]
