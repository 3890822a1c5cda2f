"""The columns of a table: numbers and texts, as values inside and outside."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np

FEW = 20  # different numbers, up to which a column takes no others
_MOST_TEXTS = 100
_MOST_DECIMALS = 8
_SHOWN = 3  # texts in a message

Array = np.ndarray[Any, Any]


class Problem(ValueError):
    """What keeps a table from being read, with the option that cures it.

    Attributes:
        option: such as "--drop-missing"; empty if none does.
        column: the column that --drop-columns leaves out; None if another option is meant.
    """

    def __init__(self, message: str, option: str = "", column: str | None = None) -> None:
        super().__init__(message)
        self.option, self.column = option, column


def leave_out(column: str) -> str:
    """How a column is left out, for messages."""
    return f"leave it out with --drop-columns {shlex.quote(column)} (drop_columns=[{column!r}])"


def check_integers(numbers: Any, key: str, name: str) -> None:
    """Raises ValueError if float64 does not hold the integers of a column."""
    if len(numbers) and max(int(numbers.max()), -int(numbers.min())) > 2**53:
        raise Problem(
            f"{name} must have integers up to 2^53, got {numbers.abs().max()} in column {key!r}; "
            f"{leave_out(key)} if it numbers the rows.",
            column=key,
        )


def frame_values(column: Any, name: str) -> Array:
    """The values of a column of a DataFrame."""
    kind = column.dtype.kind
    if kind in "iu":
        check_integers(column.dropna(), column.name, name)
    if kind in "iuf":
        values: Array = column.to_numpy(np.float64, na_value=np.nan)
        return values
    texts = column.astype(object).where(column.notna(), None).to_numpy()
    truths = {str(each) for each in texts if isinstance(each, (bool, np.bool_))}
    if both := truths & {each for each in texts if isinstance(each, str)}:
        raise Problem(
            f"{name} must hold {min(both)} as a text or as a truth value, got both in column "
            f"{column.name!r}; {leave_out(str(column.name))}, or make texts of it.",
            column=str(column.name),
        )
    if kind == "b" or all(isinstance(each, (str, bool, type(None))) for each in texts):
        return np.array([each if each is None else _plain(each) for each in texts], dtype=object)
    raise Problem(
        f"{name} must hold numbers, texts and truth values, got {column.dtype} in column "
        f"{column.name!r}; {leave_out(str(column.name))}, or make numbers or texts of it.",
        column=str(column.name),
    )


def _plain(value: Any) -> str | bool:
    return str(value) if isinstance(value, str) else bool(value)


@dataclass(frozen=True)
class Numbers:
    """A column of numbers, which are standardised inside: (value − center) / scale.

    The defaults keep each number as it is.
    """

    name: str
    center: float = 0.0
    scale: float = 1.0
    low: float | None = None
    high: float | None = None
    decimals: int | None = None
    """Digits after the point of all values; 0 for integers, None for more than 8."""
    values: tuple[float, ...] = ()
    """All values, ascending, if they are few."""
    kind: str = "numbers"

    width = 1

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        finite = all(map(math.isfinite, (self.center, self.scale, *self.values, *bounds)))
        decimals = self.decimals is None or self.decimals in range(_MOST_DECIMALS + 1)
        if not finite or self.scale <= 0 or bounds != sorted(bounds) or not decimals:
            raise ValueError(f"column {self.name!r} has no usable scale, range or decimals.")

    def encode(self, values: Array, table: str) -> Array:
        """(n,) to (n, 1). Raises ValueError if they are no numbers."""
        if values.dtype.kind == "O" and any(isinstance(value, str) for value in values):
            raise ValueError(f"column {self.name!r} of {table} must hold numbers, got texts.")
        numbers = np.asarray(values, np.float64)
        encoded = ((numbers - self.center) / self.scale)[:, None]
        if not bool(np.isfinite(encoded.astype(np.float32)).all()):
            raise ValueError(f"column {self.name!r} of {table} must hold finite numbers.")
        return encoded

    def decode(self, rows: Array) -> list[Any]:
        """(n, 1) to n numbers."""
        numbers = rows[:, 0] * self.scale + self.center
        if self.values:
            seen = np.array(self.values)
            numbers = seen[np.searchsorted((seen[1:] + seen[:-1]) / 2, numbers)]
        elif self.decimals is not None:
            numbers = numbers.round(self.decimals) + 0.0  # without -0.0
        elif self.low is None:  # as they are: the shortest texts of float32
            numbers = numbers.astype(np.float32).astype(str).astype(np.float64)
        else:  # the digits that float32 has inside
            digits = 7 - math.floor(math.log10(self.scale))
            numbers = np.array([round(number, digits) for number in numbers.tolist()])
        numbers = numbers.clip(
            -math.inf if self.low is None else self.low,
            math.inf if self.high is None else self.high,
        )
        return [int(value) for value in numbers] if self.decimals == 0 else numbers.tolist()


@dataclass(frozen=True)
class Texts:
    """A column of texts or truth values: one-hot inside, or one number if there are two of them.

    The columns inside have mean 0, and standard deviations whose mean square is 1.
    """

    name: str
    values: tuple[str | bool, ...]
    center: tuple[float, ...]
    scale: float
    kind: str = "texts"

    def __post_init__(self) -> None:
        known = all(isinstance(value, (str, bool)) for value in self.values)
        if not known or not 0 < len(self.values) <= _MOST_TEXTS:
            raise ValueError(f"column {self.name!r} has no usable texts.")
        finite = all(map(math.isfinite, (*self.center, self.scale)))
        if not finite or len(self.center) != self.width or self.scale <= 0:
            raise ValueError(f"column {self.name!r} has no usable center or scale.")

    @property
    def width(self) -> int:
        """The number of columns inside."""
        return 1 if len(self.values) <= 2 else len(self.values)

    def encode(self, values: Array, table: str) -> Array:
        """(n,) to (n, width). Raises ValueError for a value that is not known."""
        index_of = {str(value): index for index, value in enumerate(self.values)}
        if unknown := [value for value in values if str(value) not in index_of]:
            raise ValueError(
                f"column {self.name!r} of {table} must hold values that were seen, got "
                f"{unknown[0]!r}."
            )
        corners = self._corners()[[index_of[str(value)] for value in values]]
        return (corners - self.center) / self.scale

    def decode(self, rows: Array) -> list[Any]:
        """(n, width) to the nearest n values."""
        inside = rows * self.scale + self.center
        if self.width == 1:
            places = (inside[:, 0] > 0.5).astype(int) * (len(self.values) - 1)
        else:
            places = inside.argmax(1)
        return [self.values[place] for place in places]

    def _corners(self) -> Array:
        return np.eye(len(self.values))[:, -self.width :] * (len(self.values) > 1)


Column = Numbers | Texts


def learn_column(name: str, values: Array, table: str) -> Column:
    """The column of these values: float64, or texts and truth values; none are missing."""
    if values.dtype.kind != "f":
        return _learn_texts(name, values, table)
    if len(wrong := values[~(np.abs(values) <= 1e150)]):
        raise Problem(
            f"column {name!r} of {table} must hold numbers between -1e150 and 1e150, got "
            f"{wrong[0]:g}; {leave_out(name)}.",
            column=name,
        )
    seen = np.unique(values)
    exact = np.abs(seen).max() <= 2**53
    digits = (d for d in range(_MOST_DECIMALS + 1) if exact and (seen.round(d) == seen).all())
    few = tuple(seen.tolist()) if len(seen) <= FEW else ()
    center = float(values.mean())
    spread = float(np.abs(values - center).max()) or 1.0  # its square may underflow
    scale = spread * float(((values - center) / spread).std()) or 1.0
    return Numbers(name, center, scale, seen[0].item(), seen[-1].item(), next(digits, None), few)


def _learn_texts(name: str, values: Array, table: str) -> Texts:
    seen = tuple(sorted({*values.tolist()}, key=lambda value: (isinstance(value, str), value)))
    if len(seen) > _MOST_TEXTS:
        shown = ", ".join(map(repr, seen[:_SHOWN]))
        each = " (another one in each row)" * (len(seen) == len(values))
        raise Problem(
            f"column {name!r} of {table} must hold numbers or at most {_MOST_TEXTS} different "
            f"texts, got {len(seen)}{each}, such as {shown}; {leave_out(name)}, or make numbers of "
            "it.",
            column=name,
        )
    plain = Texts(name, seen, (0.0,) * (1 if len(seen) <= 2 else len(seen)), 1.0)
    corners = plain.encode(values, table)
    scale = math.sqrt(float(corners.var(0).mean())) or 1.0
    return Texts(name, seen, tuple(corners.mean(0).tolist()), scale)


def column_from(content: Any) -> Column:
    """The column of a dictionary, as JSON holds it."""
    arguments = {**content}
    for key in ("values", "center"):
        if isinstance(arguments.get(key), list):
            arguments[key] = tuple(arguments[key])
    kind = {"numbers": Numbers, "texts": Texts}[arguments["kind"]]
    column: Column = kind(**arguments)
    return column
