"""The versions of pfgm and torch, which are recorded beside results."""

from __future__ import annotations

import importlib.metadata

import torch


def versions() -> dict[str, str]:
    """The versions by the names of the packages."""
    return {"pfgm": importlib.metadata.version("pfgm"), "torch": torch.__version__}
