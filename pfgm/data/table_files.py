"""Files of tables: their cells as numbers or texts, and columns written as a ``.csv`` file."""

from __future__ import annotations

import csv
import gzip
import io
import re
import shlex
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.files import StrPath, write_atomic
from ..common.optional import optional
from .columns import FEW, Array, Problem, check_integers, leave_out

SEPARATORS = (",", ";", "\t")
# What pandas takes for missing values.
MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"}
MISSING |= {"1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}

UNNAMED = "Unnamed: "  # how pandas begins the name of a column that has none

_QUOTED = "\ufdd0"  # begins a cell that stands in quotes; Unicode gives it to no character
_QUOTED_CELL = r'(?m)(^|[{}\r\n])( *)"((?:[^"]|"")*)"'
# With separators of thousands, or with another sign for decimals than the file.
_OTHER_NUMBER = r"[+-]?(\d+[.,]\d+|\d{1,3}([.,'’\s]\d{3})+([.,]\d+)?)"
_MARKED = r"[+-]?\d+[.,]\d+"
_GROUP = r"[+-]?[1-9]\d{0,2}[.,]\d{3}"  # 1.234: a decimal number, or more than a thousand


class Problems(list[Problem]):
    """The problems of a table, which its error names together."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keeps a problem for the error at the end."""
        try:
            yield
        except Problem as problem:
            self.append(problem)

    def raise_all(self, name: str) -> None:
        """Raises ValueError with all of them, and the options that cure them together."""
        if len(self) == 1:
            raise ValueError(str(self[0])) from self[0]
        if self:
            columns = [shlex.quote(each.column) for each in self if each.column is not None]
            options = [*dict.fromkeys(each.option for each in self if each.option)]
            options += ["--drop-columns", *dict.fromkeys(columns)] if columns else []
            together = f" Together: {' '.join(options)}" if options else ""
            each = " ".join(str(problem).replace(name, "it") for problem in self)
            raise ValueError(f"{name} has {len(self)} problems: {each}{together}")


class CellsOfFile(NamedTuple):
    """What a file holds."""

    names: list[str]
    columns: list[Array]
    """float64, or texts with None for a missing one."""
    separator: str
    decimal: str


def read_parquet(path: Path) -> Any:
    """The DataFrame in a ``.parquet`` file."""
    _check_file(path)
    optional("pyarrow", "Parquet files need pyarrow", "parquet")
    try:
        return _pandas().read_parquet(path, engine="pyarrow")
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} must be a complete Parquet file, got another ({reason})."
        ) from error


def read_cells(
    path: Path,
    texts: Collection[str],
    problems: Problems,
    *,
    header: bool = True,
    dropped: Collection[str] = (),
    required: bool = True,
) -> CellsOfFile:
    """The columns of a file, without those that are dropped. Those in `texts` stay texts.

    Args:
        problems: gets those of columns, which are left out of the result.
        header: whether the first line has the names; without it they are x0, x1, …
        required: whether the file must have the columns that are dropped.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :meth:`pfgm.data.Table.read`.

    Warns:
        UserWarning: decimal numbers such as 1.234 may be meant as thousands.
    """
    frame, separator = _read(path, header)
    every = named_apart([str(name) for name in frame.columns])
    if required:
        check_names_of_dropped(every, dropped)
    frame = frame.set_axis(range(len(every)), axis=1)
    decimal = "." if separator == "," else _decimal(frame)
    names, columns = [], []
    for i, name in enumerate(every):
        with problems.collected():
            if name not in dropped:
                cells = frame[i].rename(name)
                columns.append(_parsed(cells, decimal, str(path), as_texts=name in texts))
                names.append(name)
    if separator != ",":
        marked = [
            name
            for name, column in zip(names, columns, strict=True)
            if column.dtype.kind == "f" and _may_group(frame[every.index(name)])
        ]
        if marked:
            warnings.warn(
                f"{path} has numbers with three digits after the mark in column {marked[0]!r}, "
                f"which are taken for decimal numbers; if {decimal!r} stands for thousands there, "
                "write them without it.",
                stacklevel=4,
            )
    return CellsOfFile(names, columns, separator, decimal)


def named_apart(names: Sequence[str]) -> list[str]:
    """The names of columns, with pandas' name for one that has none."""
    return [name or f"{UNNAMED}{i}" for i, name in enumerate(names)]


def check_names_of_dropped(names: Collection[str], dropped: Collection[str]) -> None:
    """Raises ValueError unless there are columns of these names."""
    if unknown := [name for name in dropped if name not in names]:
        raise ValueError(
            f"drop_columns must be among the columns {', '.join(names)}, got {unknown[0]!r}."
        )


def _read(path: Path, header: bool) -> tuple[Any, str]:
    """All cells of a file as texts or missing, and its separator."""
    pandas = _pandas()
    _check_file(path)
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
            text = file.read().lstrip("\r\n")
        if any(character in text for character in ("\0", _QUOTED)):
            raise ValueError("it holds bytes that are not text")
        separator, fields = _separator(text)
        # pandas would not tell "" and "NA" in quotes from cells without a value.
        marked = _QUOTED_CELL.format(separator)
        if '"' in text:
            text = re.sub(marked, rf'\1\2"{_QUOTED}\3"', text)
        frame = pandas.read_csv(
            io.StringIO(text, newline=""),
            sep=separator,
            header=None,  # so that all rows must have as many fields as the first
            dtype=str,
            skipinitialspace=True,
            skip_blank_lines=fields > 1,  # in a single column it is a missing value
            keep_default_na=False,
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8, got another encoding ({error.reason} at byte "
            f"{error.start}); save it as UTF-8."
        ) from error
    except (csv.Error, ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = " ".join(str(error).split()) or "it has no line"
        raise ValueError(
            f"{path} must be a table of lines with as many values as there are names in the first "
            f"line, got one that is empty or damaged ({reason})."
        ) from error
    names = [f"x{i}" for i in frame.columns]
    if header:
        names = frame.iloc[0].fillna("").str.removeprefix(_QUOTED)
        frame = frame.iloc[1:].reset_index(drop=True)
    return frame.apply(_without_missing).set_axis(names, axis=1), separator


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_file():
        raise ValueError(f"{path} must be a file, not a folder, pipe, socket or device.")


def _separator(text: str) -> tuple[str, int]:
    """The separator that makes the most fields of the first line, and how many.

    One that makes as many of the second line goes before.
    """
    ranked = []
    for separator in SEPARATORS:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        counts = [len(line) for line in islice(filter(None, lines), 2)]
        if not counts:
            raise ValueError("it has no line")
        ranked.append((len({*counts}) == 1 < counts[0], counts[0], separator))
    best = max(ranked, key=lambda each: each[:2])
    return best[2], best[1]


def _without_missing(cells: Any) -> Any:
    """The cells with None where a value is missing; in quotes every text is one."""
    cells = cells.astype(object)
    cells = cells.where(cells.notna() & ~cells.isin(MISSING), None)
    return cells.str.removeprefix(_QUOTED).astype(object).where(cells.notna(), None)


def _pandas() -> Any:
    return optional("pandas", "Tables need pandas", "tables")


def _decimal(frame: Any) -> str:
    commas = frame.apply(lambda column: column.str.fullmatch(r"[+-]?\d+,\d+").any())
    return "," if commas.any() else "."


def _parsed(cells: Any, decimal: str, name: str, *, as_texts: bool) -> Array:
    """The numbers of a column of texts, or its texts. Texts such as 007 are no numbers."""
    present = cells.dropna()
    if not len(present):
        return np.full(len(cells), np.nan)
    digits = present
    if decimal == ",":  # 1.234 may be a thousand
        digits = present.str.replace(".", "?", regex=False).str.replace(",", ".", regex=False)
    numbers = _pandas().to_numeric(digits, errors="coerce")
    others = present[numbers.isna()]
    zeros = bool(digits.str.match(r"\s*[+-]?0\d").any())
    if as_texts or zeros or len(others):
        if not (as_texts or zeros):
            _check_texts(others, numbers, name)
        texts: Array = cells.to_numpy(object)
        return texts
    check_integers(numbers[present.str.fullmatch(r"[+-]?\d+")], cells.name, name)
    values = np.full(len(cells), np.nan)
    # pandas reads 17 digits with an error in the last one, and Python exactly.
    values[cells.notna().to_numpy()] = digits.to_numpy(object).astype(np.float64)
    return values


def _check_texts(texts: Any, numbers: Any, name: str) -> None:
    """Raises ValueError if texts are probably numbers, or missing ones, in a column of numbers."""
    where = f"{texts.iloc[0]!r} in column {texts.name!r}"
    if texts.str.fullmatch(_OTHER_NUMBER).all():
        raise Problem(
            f"{name} must write all numbers like 1234.5, or all like 1234,5 between semicolons or "
            f"tabs, got {where}; {leave_out(texts.name)}, or write it so.",
            column=texts.name,
        )
    if numbers.nunique() > FEW:
        raise Problem(
            f"{name} must have numbers alone or texts alone in a column, got numbers and {where}; "
            f"leave the cells of missing values empty, or {leave_out(texts.name)}.",
            column=texts.name,
        )


def _may_group(cells: Any) -> bool:
    """Whether marks in the numbers of a column may stand for thousands.

    Each then has three digits after it, and a number without a mark is below a thousand.
    """
    present = cells.dropna().str.strip()
    marked = present.str.fullmatch(_MARKED)
    small = present[~marked].str.fullmatch(r"[+-]?\d{1,3}").all()
    return bool(marked.any() and small and present[marked].str.fullmatch(_GROUP).all())


def write_columns(
    path: StrPath,
    columns: Mapping[str, Sequence[object]],
    separator: str,
    decimal: str,
    header: bool = True,
) -> None:
    """Writes columns as a file. Texts stand in quotes, so that each is read as it is.

    Raises:
        OSError: the file cannot be written; an existing one is left as it was.
    """

    def cell(value: object) -> str:
        if isinstance(value, str):
            return _in_quotes(value)
        return str(value).replace(".", decimal) if isinstance(value, float) else str(value)

    # Any separator in a name may be taken for that of the file.
    special = re.compile(rf'^$|^\s|\s$|["\r\n{"".join(SEPARATORS)}]')
    names = (_in_quotes(name) if special.search(name) else name for name in columns)
    rows = (map(cell, row) for row in zip(*columns.values(), strict=True))
    text = "".join(separator.join(row) + "\n" for row in ([names] * header + [*rows]))
    write_atomic(path, lambda file: file.write(text.encode()))


def _in_quotes(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
