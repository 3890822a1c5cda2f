"""Packages that only some functions need."""

from __future__ import annotations

import importlib
import sys
from typing import Any, TypeGuard


def optional(module: str, user: str, extra: str) -> Any:
    """The module of an optional package; ``user`` begins the error, as in "Images need Pillow"."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{user}; in a checkout: pip install '.[{extra}]'") from error


def is_frame(value: object) -> TypeGuard[Any]:
    """Whether a value is a DataFrame. Without pandas imported there are none."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def is_series(value: object) -> bool:
    """Whether a value is a Series, a column of a DataFrame."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.Series)
