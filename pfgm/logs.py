"""What a training run reports: a CSV file, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path
from typing import Any

from .files import write_atomic

__all__ = ["FIELDS", "Log"]

FIELDS = ("step", "loss", "lr", "seconds")


class Log:
    """Figures of a run by step, kept in ``log.csv`` and for TensorBoard.

    Rows of steps after ``step``, which a run that was killed has left behind, are removed.

    Args:
        folder: of the run; None keeps nothing.
        step: of the checkpoint that the run continues.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self._path = None if folder is None else folder / "log.csv"
        self._writer: Any = None
        if folder is None or self._path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = _rows_to(self._path, step) if step and self._path.exists() else []
        text = "".join(_line(row) for row in (FIELDS, *kept))
        write_atomic(self._path, lambda file: file.write(text.encode()))
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Adds what is known at a step; figures that are no fields go to TensorBoard alone."""
        if self._path is None:
            return
        row = [step, *(f"{figures[name]:.6g}" if name in figures else "" for name in FIELDS[1:])]
        with self._path.open("a", newline="") as file:
            file.write(_line(row))
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what TensorBoard still holds."""
        if self._writer is not None:
            self._writer.close()


def _line(row: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def _rows_to(path: Path, step: int) -> list[list[str]]:
    """Rows of the file up to a step; one that a killed process has not ended is left out."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [
        row for row in rows if len(row) == len(FIELDS) and row[0].isdigit() and int(row[0]) <= step
    ]
