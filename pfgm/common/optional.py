"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, user: str, extra: str) -> Any:
    """The module of an optional package; ``user`` begins the error, as in "Images need Pillow"."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{user}; in a checkout: pip install '.[{extra}]'") from error
