"""Names of version 0.2 in the files of runs and networks, and what they are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLD_NAMES: dict[str, dict[str, str]] = {
    "RunConfig": {"levels": "student_levels"},
    "TrainConfig": {"references": "reference_batch"},
    "PoissonFlow": {"sigma": "noise_std"},
}
"""By the class whose arguments they are."""


def with_present_names(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a class, as read from a file, under their present names.

    >>> with_present_names("PoissonFlow", {"sigma": 0.01, "tau": 0.03})
    {'noise_std': 0.01, 'tau': 0.03}
    """
    arguments = dict(arguments)  # raises an error for what a damaged file holds instead
    names = OLD_NAMES.get(kind, {})
    present = {names.get(name, name): value for name, value in arguments.items()}
    if len(present) < len(arguments):
        old = next(name for name in names if name in arguments)
        raise ValueError(
            f"{old} is the name that {names[old]} had in version 0.2, got both; leave {old} out."
        )
    return present
