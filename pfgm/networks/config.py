"""What the constructors of the networks share: limits of their arguments, and the stored config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_WIDTH = 1 << 20
"""Most features or channels of a layer."""
MAX_DEPTH = 10_000
"""Most blocks of a network or of a resolution."""


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with tuples as lists, equal to what JSON returns after storing it."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
