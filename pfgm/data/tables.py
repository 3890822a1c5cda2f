"""Tables of numbers: .csv files and DataFrames, which pandas reads."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..common.checks import natural
from ..common.files import StrPath, write_csv
from ..common.tensors import as_int64
from .rows import check_samples

__all__ = ["LABEL_NAMES", "is_frame", "is_series", "load_table", "round_columns", "save_table"]

LABEL_NAMES = ("labels", "label", "y")
"""Names of the arrays and columns that hold labels."""


def is_frame(value: object) -> TypeGuard[Any]:
    """Whether a value is a DataFrame. Without pandas imported there are none."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def is_series(value: object) -> bool:
    """Whether a value is a Series, a column of a DataFrame."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.Series)


def load_table(table: Any) -> tuple[Tensor, Tensor | None, tuple[str, ...], tuple[str, ...]]:
    """The numbers of a DataFrame or of a .csv file.

    A .csv file begins with a line of names. The column named labels, label or y, if there is one,
    has labels: integers from 0, or names, which are numbered in alphabetical order. All other
    columns are numbers, or True and False, which become 1 and 0.

    Args:
        table: the DataFrame, or the path of the file.

    Returns:
        The rows (n, columns), float32, in the order of the columns; the labels (n,), int64, or
        None; the names of the classes, by label, if they have names; and those of the columns.

    Raises:
        ImportError: a file needs pandas, and it is not installed.
        ValueError: the file is damaged or has no line of names, a column holds text, a value is
            missing or not finite as float32, or there is no row or no column.

    >>> import pandas
    >>> load_table(pandas.DataFrame({"height": [1.5, 2.0], "y": ["oak", "elm"]}))
    (tensor([[1.5000],
            [2.0000]]), tensor([1, 0]), ('elm', 'oak'), ('height',))
    """
    name, frame = ("the table", table) if is_frame(table) else (str(table), _read(Path(table)))
    column = next((label for label in LABEL_NAMES if label in frame.columns), None)
    labels, names = (None, ()) if column is None else _labels(frame[column], name)
    if column is not None:
        frame = frame.drop(columns=column)
    check_samples(frame.shape, name)
    rows = np.stack([_numbers(frame.iloc[:, i], name) for i in range(frame.shape[1])], 1)
    return torch.from_numpy(rows), labels, names, tuple(str(each) for each in frame.columns)


def save_table(
    path: StrPath,
    samples: Tensor,
    columns: Sequence[str] = (),
    labels: Sequence[object] | None = None,
) -> None:
    """Writes samples to a ``.csv`` file, which :func:`load_table` reads back without loss.

    Args:
        path: the file. If writing fails, an existing file is left as it was.
        samples: (n, columns), float32.
        columns: the names of the columns; without names they are x0, x1 and so on.
        labels: n labels, or their names, for a last column "labels".

    Raises:
        OSError: the file cannot be written.
        ValueError: columns or labels are of another number.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_table(f"{folder}/t.csv", torch.tensor([[0.1, 2.0]]), ["height", "age"], ["oak"])
    ...     print(Path(f"{folder}/t.csv").read_text(), end="")
    height,age,labels
    0.1,2.0,oak
    """
    head = [*(columns or [f"x{number}" for number in range(samples.shape[1])])]
    if len(head) != samples.shape[1]:
        raise ValueError(
            f"columns are {len(head)} names; allowed are {samples.shape[1]}, one for each column."
        )
    # The shortest texts of float32 numbers.
    lines: Iterable[list[object]] = ([*row.astype(str)] for row in samples.detach().cpu().numpy())
    if labels is not None:
        head.append(LABEL_NAMES[0])
        lines = ([*line, label] for line, label in zip(lines, labels, strict=True))
    write_csv(path, chain([head], lines))


def round_columns(samples: Tensor, data: Tensor, most: int = 20) -> Tensor:
    """Samples of a table, with columns of few values rounded to the values in the data.

    A flow draws continuous values. A column that has at most ``most`` different values in the data,
    such as 0 and 1 or a number of rooms, takes the nearest of them; half-way the lower one. Other
    columns stay as they are.

    Args:
        samples: (n, columns), in the units of the data.
        data: (m, columns), the rows that were learnt.
        most: the largest number of different values of a column that is rounded.

    Returns:
        A new tensor (n, columns) of the dtype and device of the samples.

    Raises:
        ValueError: the shapes do not fit together, or most is negative.

    >>> table = torch.tensor([[0.0, 1.7], [1.0, 2.9], [1.0, 4.2]])
    >>> round_columns(torch.tensor([[0.4, 2.1], [1.3, 9.0]]), table, most=2)
    tensor([[0.0000, 2.1000],
            [1.0000, 9.0000]])
    """
    if samples.ndim != 2 or data.ndim != 2 or samples.shape[1] != data.shape[1] or not len(data):
        raise ValueError(
            f"samples has shape {tuple(samples.shape)} and data {tuple(data.shape)}; allowed are "
            "(n, columns) and (m, columns) with m of at least 1."
        )
    most = natural("most", most)
    rounded = samples.clone()
    for column, seen in enumerate(data.to(samples).unbind(1)):
        values = seen.unique()  # sorted
        if len(values) <= most:
            borders = (values[1:] + values[:-1]) / 2
            rounded[:, column] = values[torch.bucketize(samples[:, column].contiguous(), borders)]
    return rounded


def _read(path: Path) -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ImportError("Tables need pandas; in a checkout: pip install '.[tables]'") from error
    try:
        # One name more or less than columns would shift the numbers by a column.
        frame = pandas.read_csv(path, index_col=False, skipinitialspace=True)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is empty, damaged or not a table ({error}); allowed are lines of numbers with "
            "commas between them, after a line of names."
        ) from error
    if all(_is_number(str(name)) for name in frame.columns):
        raise ValueError(f"{path} begins with numbers; allowed is a line of names before them.")
    return frame


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _labels(column: Any, name: str) -> tuple[Tensor, tuple[str, ...]]:
    if column.isna().any():
        raise ValueError(
            f"{name} has no value in column {column.name!r} of row {_first(column.isna())}; "
            "allowed is a label for each row."
        )
    if column.dtype.kind in "iu":
        if len(column) and column.min() < 0:
            raise ValueError(
                f"{name} has the label {column.min()} in column {column.name!r}; allowed are "
                "integers from 0, or names."
            )
        values = torch.from_numpy(column.to_numpy(np.dtype(column.dtype.str)).copy())
        return as_int64(f"column {column.name!r} of {name}", values), ()
    if column.dtype.kind == "f":
        raise ValueError(
            f"{name} has {column.dtype} in column {column.name!r}; allowed are integers from 0, or "
            "names."
        )
    names = sorted({str(label) for label in column})
    numbers = {label: number for number, label in enumerate(names)}
    return torch.tensor([numbers[str(label)] for label in column], device="cpu"), tuple(names)


def _numbers(column: Any, name: str) -> np.ndarray[Any, Any]:
    """The values of a column, float32."""
    if column.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} has {column.dtype} in column {column.name!r}; allowed are numbers, and names "
            f"in a column called {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}."
        )
    with np.errstate(over="ignore"):
        values: np.ndarray[Any, Any] = column.to_numpy(np.float32)
    if not (finite := np.isfinite(values)).all():
        raise ValueError(
            f"{name} has the value {column.iloc[_first(~finite)]} in column {column.name!r} of row "
            f"{_first(~finite)}; allowed are finite numbers."
        )
    return values


def _first(where: Any) -> int:
    """The number of the first row where it is true; rows count from 0, without the names."""
    return int(np.argmax(np.asarray(where)))
