"""Tables: ``.csv`` files and DataFrames, as rows of numbers inside and as they are outside."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.files import StrPath
from ..common.optional import is_frame
from .columns import (
    FEW,
    Array,
    Column,
    Numbers,
    Problem,
    Texts,
    column_from,
    frame_values,
    learn_column,
    leave_out,
)
from .rows import LABEL_NAMES, check_samples
from .table_files import (
    MISSING,
    SEPARATORS,
    UNNAMED,
    Problems,
    check_names_of_dropped,
    named_apart,
    read_cells,
    read_parquet,
    write_columns,
)

_MOST_LABELS = 1000
_SHOWN = 5  # rows, columns or texts in a message

Cells = dict[str, Array]
"""The values of columns by name: float64, or texts and truth values with None for a missing one."""


class EncodedRows(NamedTuple):
    """Rows of a table as a flow learns them."""

    rows: Tensor
    """(n, features), float32."""
    labels: Tensor | None
    """(n,), int64: places in :attr:`Label.values`; None without a column of labels."""


@dataclass(frozen=True)
class Label:
    """The column of labels."""

    name: str
    place: int
    """Its place among all columns."""
    values: tuple[str | bool | int, ...]
    """The labels, in order; the label of a row is a place here."""


@dataclass(frozen=True)
class Table:
    """What is known about the columns of a table: data alone, as a checkpoint keeps it.

    Numbers are standardised inside. Outside they have the decimals of the file and stay within the
    range that was seen; where at most 20 different ones were seen, they are these. Texts are
    one-hot inside and texts outside.

    Read one with :meth:`read`.

    >>> import pandas
    >>> flats = pandas.DataFrame({"rooms": [1, 2, 2, 4], "city": ["Ulm", "Bonn", "Ulm", "Bonn"]})
    >>> table = Table.read(flats)
    >>> table.encode(flats).rows.shape
    torch.Size([4, 2])
    >>> table.decode(table.encode(flats).rows)
    {'rooms': [1, 2, 2, 4], 'city': ['Ulm', 'Bonn', 'Ulm', 'Bonn']}
    """

    columns: tuple[Column, ...]
    label: Label | None = None
    separator: str = ","
    decimal: str = "."
    header: bool = True
    """Whether files begin with a line of names."""
    dropped: tuple[str, ...] = ()
    """The columns that are left out, in other files too."""

    @classmethod
    def read(
        cls,
        source: Any,
        *,
        label_column: str | None = None,
        drop_missing: bool = False,
        drop_columns: Sequence[str] = (),
        header: bool = True,
    ) -> Table:
        """Learns the columns of a table.

        Args:
            source: a DataFrame, or the path of a ``.csv``, ``.tsv``, ``.csv.gz`` or ``.parquet``
                file. Text begins with a line of names. Its separator is a comma, a semicolon or a
                tab; with another one than a comma, numbers may have decimal commas. A value is
                missing where a cell is empty, NA or the like; in quotes these are texts.
            label_column: the name of the column of labels, texts or integers. By default the one
                that is named labels, label or y, if there is one; "" takes none for labels.
            drop_missing: leave out rows without a value in some column.
            drop_columns: the names of columns to leave out. The first one is left out anyway if it
                has no name and another value in each row.
            header: False for a file without the line of names; the columns are then x0, x1, …

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: the source is neither a DataFrame nor a path.
            ImportError: a file needs pandas, and it is not installed.
            ValueError: the file is damaged or has no names, names are alike, a value is missing or
                not finite, a column has too many different texts, texts beside many numbers or
                another type, or there is no row or no column. All problems of columns are in one
                message, with the options that cure them.

        Warns:
            UserWarning: a first column without a name is left out; a first column may only number
                or name the rows; or numbers such as 1.234 between semicolons or tabs, which are
                decimal numbers here, may be meant as thousands.
        """
        _check_dropped(drop_columns)
        problems, known = Problems(), cls((), header=header, dropped=tuple(drop_columns))
        name, cells, separator, decimal = _cells(source, known, problems)
        cells = _complete(cells, name, drop_missing, problems)
        with problems.collected():
            label = _learn_label(cells, label_column, name)
        columns = []
        for key, column in cells.items():
            if problems or label is None or key != label.name:
                with problems.collected():
                    columns.append(learn_column(key, column, name))
        problems.raise_all(name)
        rows = len(next(iter(cells.values()))) if cells else 0
        check_samples((rows, len(columns)), name)
        _warn_of_row_names(cells, name)
        return replace(
            known, columns=tuple(columns), label=label, separator=separator, decimal=decimal
        )

    @classmethod
    def numbers(cls, names: Sequence[str]) -> Table:
        """A table of plain numbers, which are the same inside and outside."""
        return cls(tuple(Numbers(name) for name in names))

    @property
    def plain(self) -> bool:
        """Whether nothing is known about the columns but their names (:meth:`numbers`)."""
        return all(column == Numbers(column.name) for column in self.columns)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels as texts, by their place; empty if each is its own place."""
        values = () if self.label is None else self.label.values
        return () if values == tuple(range(len(values))) else tuple(map(str, values))

    def encode(self, source: Any, *, drop_missing: bool = False) -> EncodedRows:
        """The rows of a table with these columns, in any order; it may lack the labels.

        Args:
            source, drop_missing: as for :meth:`read`.

        Raises:
            FileNotFoundError, ImportError, ValueError: as for :meth:`read`; or a column is missing
                or too many, or holds a text or a label that this table has not.
        """
        problems = Problems()
        name, cells, *_ = _cells(source, self, problems)
        problems.raise_all(name)
        known = [column.name for column in self.columns]
        labelled = self.label is not None and self.label.name in cells
        wanted = [*known, *([self.label.name] if self.label is not None and labelled else [])]
        if others := [key for key in cells if key not in wanted]:
            raise ValueError(f"{name} must have the columns {_list(known)}, got {others[0]!r} too.")
        if missing := [key for key in wanted if key not in cells]:
            raise ValueError(f"{name} must have a column {missing[0]!r}, got {_list([*cells])}.")
        cells = _complete({key: cells[key] for key in wanted}, name, drop_missing, problems)
        problems.raise_all(name)
        rows = self._encoded(cells, name)
        labels = None
        if self.label is not None and labelled:
            index_of = {str(value): index for index, value in enumerate(self.label.values)}
            values = [*map(str, _label_values(cells[self.label.name], self.label.name, name))]
            if unknown := [value for value in values if value not in index_of]:
                raise ValueError(
                    f"{name} must have labels among {_list(self.label.values)} in column "
                    f"{self.label.name!r}, got {unknown[0]}."
                )
            labels = torch.tensor([index_of[value] for value in values], device="cpu")
        return EncodedRows(rows, labels)

    def _encoded(self, cells: Cells, name: str) -> Tensor:
        rows = [column.encode(cells[column.name], name) for column in self.columns]
        return torch.from_numpy(np.concatenate(rows, 1).astype(np.float32))

    def decode(self, rows: Tensor, labels: Tensor | None = None) -> dict[str, list[Any]]:
        """The columns of rows, with the values that a file holds.

        Args:
            rows: (n, features), as of :meth:`encode` or from a flow.
            labels: (n,), places of labels, for the column of labels.

        Raises:
            ValueError: the shapes do not fit this table or each other.
        """
        width = sum(column.width for column in self.columns)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"rows must have the shape (n, {width}), got {tuple(rows.shape)}.")
        values = rows.detach().cpu().double().numpy()
        parts = np.split(values, np.cumsum([column.width for column in self.columns])[:-1], 1)
        decoded = [
            (column.name, column.decode(part))
            for column, part in zip(self.columns, parts, strict=True)
        ]
        if labels is not None:
            label = self.label or Label(LABEL_NAMES[0], len(decoded), ())
            if labels.shape != rows.shape[:1]:
                raise ValueError(f"labels must be ({len(rows)},), got {tuple(labels.shape)}.")
            places = labels.tolist()
            named = [label.values[place] for place in places] if label.values else places
            decoded.insert(label.place, (label.name, named))
        return dict(decoded)

    def nearest(self, rows: Tensor) -> Tensor:
        """The nearest rows that a file can hold, (n, features) float32."""
        decoded = self.decode(rows)
        cells = {key: np.array(column, dtype=object) for key, column in decoded.items()}
        return self._encoded(cells, "rows")

    def write(self, path: StrPath, rows: Tensor, labels: Tensor | None = None) -> None:
        """Writes rows as a ``.csv`` file, as :meth:`decode` returns them, with texts in quotes.

        Raises:
            OSError: the file cannot be written; an existing one is left as it was.
            ValueError: as for :meth:`decode`.
        """
        decoded = self.decode(rows, labels)
        write_columns(path, decoded, self.separator, self.decimal, self.header)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Table:
        """The table of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the content is not one.
        """
        label = content["label"]
        if label is not None:
            label = Label(str(label["name"]), int(label["place"]), tuple(label["values"]))
        separator, decimal = content["separator"], content["decimal"]
        if separator not in SEPARATORS or decimal not in (".", ","):
            raise ValueError(f"a table has the separators {separator!r} and {decimal!r}.")
        columns = tuple(column_from(column) for column in content["columns"])
        header, dropped = bool(content.get("header", True)), content.get("dropped", ())
        return cls(columns, label, separator, decimal, header, tuple(map(str, dropped)))


def _cells(source: Any, known: Table, problems: Problems) -> tuple[str, Cells, str, str]:
    """The name of a table for messages, its columns, its separator and its decimal point.

    Digits stay texts where texts are known. Without known columns, a first column without a name
    that has another value in each row is left out.
    """
    if not (is_frame(source) or isinstance(source, (str, os.PathLike))):
        raise TypeError(
            "source must be a DataFrame or the path of a .csv file, got "
            f"{type(source).__name__}; make a DataFrame of it."
        )
    parquet = not is_frame(source) and os.fspath(source).lower().endswith(".parquet")
    if is_frame(source) or parquet:
        name, separator, decimal = str(source) if parquet else "the table", ",", "."
        source = read_parquet(Path(source)) if parquet else source
        every = named_apart([str(each) for each in source.columns])
        names, columns = [], []
        if not known.columns:
            check_names_of_dropped(every, known.dropped)
        for i, key in enumerate(every):
            with problems.collected():
                if key not in known.dropped:
                    columns.append(frame_values(source.iloc[:, i], name))
                    names.append(key)
    else:
        name = str(source)
        names, columns, separator, decimal = read_cells(
            Path(source),
            _text_columns(known),
            problems,
            header=known.header,
            dropped=known.dropped,
            required=not known.columns,
        )
    if (not names and not problems) or (names and not len(columns[0])):
        rows = len(columns[0]) if columns else 0
        raise ValueError(f"{name} must have rows and columns, got {rows} × {len(names)}.")
    if alike := [key for key in names if names.count(key) > 1]:
        raise ValueError(f"{name} must have different names of columns, got {alike[0]!r} twice.")
    cells = dict(zip(names, columns, strict=True))
    if not known.columns and known.header and not is_frame(source):
        _check_names(cells, name)
    _leave_out_index(cells, known, name, problems)
    return name, cells, separator, decimal


def _leave_out_index(cells: Cells, known: Table, name: str, problems: Problems) -> None:
    """Removes a first column without a name that tells the rows apart; others are problems."""
    kept = [column.name for column in known.columns]
    unnamed = [key for key in cells if key.startswith(UNNAMED) and key not in kept]
    first = next(iter(cells), None)
    for key in unnamed:
        column = cells.pop(key)
        if key == first and _tells_rows_apart(column):
            if not known.columns:
                warnings.warn(
                    f"{name} has a first column without a name that tells the rows apart and is "
                    "left out.",
                    stacklevel=4,
                )
        else:
            problems.append(
                Problem(
                    f"{name} must have a name for each column, got {key!r}; name it, or "
                    f"{leave_out(key)}.",
                    column=key,
                )
            )


def _tells_rows_apart(column: Array) -> bool:
    present = [*column.tolist()]
    return len({*present}) == len(present) and None not in present


def _warn_of_row_names(cells: Cells, name: str) -> None:
    """Warns of a first column that seems to number or to name the rows."""
    first, column = next(iter(cells.items()))
    numbers = column.dtype.kind == "f" and bool((np.diff(column) == 1).all())
    texts = column.dtype.kind == "O" and _tells_rows_apart(column)
    if len(column) > FEW and (numbers or texts):
        warnings.warn(
            f"{name} has another value in each row of column {first!r}; if it only numbers or "
            f"names the rows, {leave_out(first)}.",
            stacklevel=3,
        )


def _check_dropped(names: object) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):  # type: ignore
        raise TypeError(f"drop_columns must be a list of names of columns, got {names!r}.")


def _text_columns(known: Table) -> set[str]:
    """The names of the columns, and of labels, that hold texts."""
    texts = {column.name for column in known.columns if isinstance(column, Texts)}
    if known.label is not None and any(isinstance(each, str) for each in known.label.values):
        texts.add(known.label.name)
    return texts


def _check_names(cells: Cells, name: str) -> None:
    """Raises ValueError if what should be names is probably the first row, or all names in one."""
    numeric = [key for key, column in cells.items() if column.dtype.kind == "f"]
    digits = [key for key in numeric if _is_number(key)]
    unnamed = digits and all(key in (*digits, *MISSING) for key in numeric)
    own = [key for key, column in cells.items() if column.dtype.kind == "O" and key in set(column)]
    if own or unnamed:
        raise ValueError(
            f"{name} must begin with a line of names, such as x,y; got {_list([*cells])} in its "
            "first line. Write the names above it, or read it with --no-header (header=False)."
        )
    if len(cells) == 1 and not numeric:
        raise ValueError(
            f"{name} must have columns between commas, semicolons or tabs, got texts in its only "
            f"column {next(iter(cells))!r}."
        )


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _complete(cells: Cells, name: str, drop_missing: bool, problems: Problems) -> Cells:
    """The columns without the rows in which a value is missing: a problem unless it is asked for.

    After a problem each column has its own values alone.
    """
    missing = {
        key: np.isnan(column)
        if column.dtype.kind == "f"
        else np.array([each is None for each in column])
        for key, column in cells.items()
    }
    for key in [key for key, column in missing.items() if column.all()]:
        del missing[key]
        problems.append(
            Problem(
                f"{name} must have values in each column, got none in {key!r}; {leave_out(key)}.",
                column=key,
            )
        )
    if not any(column.any() for column in missing.values()):
        return {key: cells[key] for key in missing}
    bad = np.logical_or.reduce([*missing.values()])
    if not drop_missing:
        columns = [key for key, column in missing.items() if column.any()]
        rows = [int(row) + 1 for row in np.flatnonzero(bad)]
        problems.append(
            Problem(
                f"{name} must have a value in each cell, got none in {len(rows)} rows "
                f"({_list(rows)}, counted from 1) in the columns {_list(columns)}; fill them in, "
                "or leave these rows out with --drop-missing (drop_missing=True).",
                "--drop-missing",
            )
        )
        return {key: cells[key][~column] for key, column in missing.items()}
    if bad.all():
        most = max(missing, key=lambda key: int(missing[key].sum()))
        problems.append(
            Problem(
                f"{name} must have rows without missing values, got none; most are missing in "
                f"{most!r}: {leave_out(most)}.",
                column=most,
            )
        )
        return {key: cells[key][~column] for key, column in missing.items()}
    return {key: cells[key][~bad] for key in missing}


def _list(values: Iterable[object]) -> str:
    values = [*values]
    shown = ", ".join(map(str, values[:_SHOWN]))
    return shown + (", …" if len(values) > _SHOWN else "")


def _learn_label(cells: Cells, wanted: str | None, name: str) -> Label | None:
    found = (
        [key for key in LABEL_NAMES if key in cells and _may_be_labels(cells[key])]
        if wanted is None
        else [wanted] * bool(wanted)
    )
    if len(found) > 1:
        raise ValueError(
            f"{name} must have one column of labels, got {_list(found)}; name it with "
            "--label-column (label_column=…)."
        )
    if not found:
        return None
    if found[0] not in cells:
        raise ValueError(f"label_column must be one of {_list(cells)}, got {wanted!r}.")
    values = sorted(
        {*_label_values(cells[found[0]], found[0], name)}, key=lambda v: (isinstance(v, str), v)
    )
    if len(values) > _MOST_LABELS:
        raise ValueError(
            f"column {found[0]!r} of {name} must have at most {_MOST_LABELS} different labels, got "
            f"{len(values)}."
        )
    return Label(found[0], [*cells].index(found[0]), tuple(values))


def _may_be_labels(column: Array) -> bool:
    """Whether a column holds texts or integers up to 2^53."""
    integers = column.dtype.kind == "f" and bool((column == np.round(column)).all())
    return column.dtype.kind != "f" or (integers and float(np.abs(column).max()) <= 2**53)


def _label_values(column: Array, key: str, name: str) -> list[Any]:
    if not _may_be_labels(column):
        raise ValueError(
            f"column {key!r} of {name} must have texts or integers up to 2^53 as labels, got "
            "other numbers."
        )
    return [int(value) for value in column] if column.dtype.kind == "f" else [*column]
