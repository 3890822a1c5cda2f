"""Checks of argument values: done by the CPU kernels on the way, on other devices on request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_debug = False


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Checks values on every device while the context is open, for the whole process.

    On the CPU non-finite values are always noticed. Elsewhere a check would make the host wait for
    the device, so NaN propagates unless this is on.

    >>> import pfgm
    >>> with pfgm.debug_checks():
    ...     mean = pfgm.posterior_mean(torch.zeros(1, 2), torch.ones(3, 2), r=1.0)
    """
    global _debug
    previous, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = previous


def is_number(value: object) -> bool:
    """Whether value is a real number of Python or NumPy; True and False are none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


LARGEST = sys.float_info.max
"""Below infinity, with which torch.compile makes no condition of a number that varies."""


def varies(*values: float) -> bool:
    """Whether one of these numbers may be another at the next call of what is being compiled."""
    # An argument of an op that is a number would be compiled anew for each of its values.
    return torch.compiler.is_compiling() and not all(
        torch.fx.experimental.symbolic_shapes.has_static_value(value) for value in values
    )


def usable_device(name: str) -> torch.device:
    """The device of a name, "auto" being cuda where there is a GPU, else cpu.

    Raises:
        ValueError: there is no such device, or it cannot be used.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here: {reason}") from error
    return device


def checks_values(device: torch.device) -> bool:
    """Whether values on this device are looked at."""
    return device.type == "cpu" or _debug


def first_bad_row(values: Tensor) -> int | None:
    if not values.is_floating_point():
        return None
    for start in range(0, len(values), 4096):
        rows = values[start : start + 4096]
        bad = ~torch.isfinite(rows).flatten(1).all(1)
        if bool(bad.any()):
            return start + int(bad.nonzero()[0])
    return None


def radius_message(radius: Tensor, row: int) -> str:
    """The sentence for a radius that is negative or not finite, whatever the caller names it."""
    return (
        f"r, sigma or z is {radius[row].item()} in row {row}; only finite values of at least 0 "
        "are allowed."
    )


def check_radius(radius: Tensor) -> None:
    """Raises ValueError for the first radius that is negative or not finite."""
    bad = ~((radius >= 0) & torch.isfinite(radius))
    if bool(bad.any()):
        raise ValueError(radius_message(radius, int(bad.nonzero()[0])))


def non_finite_message(x: Tensor, references: Tensor, name: str) -> str:
    """The sentence for a distance that was not finite: which argument, and which row of it."""
    for argument, values in ((name, x), ("references", references)):
        row = first_bad_row(values)
        if row is not None:
            return (
                f"{argument} holds NaN or infinity (first in row {row}); only finite values are "
                "allowed."
            )
    return (
        f"{name} and references lie so far apart that their squared distance overflows {x.dtype}."
    )
