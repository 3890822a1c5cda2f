"""The choice of the implementation that computes the operations.

Every backend is a module with the same functions. Its ``supports`` returns None, or the reason why
it cannot run. :func:`choose` takes native where it can run, and on a GPU has passed :func:`check`
(:mod:`pfgm.backends.passes`), else torch. A backend can be requested by name: by ``backend=``, else
by :func:`use_backend`, else by the environment variable ``PFGM_BACKEND``. If the requested backend
cannot run, an error gives the reason; no other backend takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import native, passes
from .backend import BACKENDS, Backend

if TYPE_CHECKING:
    from .checking import Report, Row, check

__all__ = [
    "Availability",
    "Backend",
    "Report",
    "Row",
    "Unavailable",
    "available",
    "check",
    "choose",
    "choose_for",
    "preferred",
    "requested",
    "use_backend",
]


_requested: str | None = None


def __getattr__(name: str) -> Any:
    """The check is imported when it is asked for: most processes never do."""
    if name not in ("Report", "Row", "check"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import checking

    return getattr(checking, name)


class Unavailable(RuntimeError):
    """The requested backend cannot run; the message says why."""


class Availability(NamedTuple):
    """Whether a backend can run, and how it computes or why it cannot."""

    usable: bool
    detail: str


def _backend_named(name: str, source: str) -> Backend:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(sorted(BACKENDS))}, got {name!r}.")
    return BACKENDS[name]


def available(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    references: torch.dtype | None = None,
) -> dict[str, Availability]:
    """Whether each backend can run, by name.

    Args:
        device: device of the points.
        dtype: dtype of the points.
        references: dtype of the references; None means any.

    >>> available()["reference"].usable
    True
    """
    availability = {}
    for name, backend in BACKENDS.items():
        reason = backend.supports(torch.device(device), dtype, references)
        availability[name] = Availability(reason is None, reason or backend.describe())
    return availability


def requested(name: str | None = None) -> str | None:
    """The name, else the one given to the innermost open :func:`use_backend`; None outside of one.

    Raises:
        TypeError: the name is no text.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(
            f"backend must be None or one of {', '.join(sorted(BACKENDS))}, got "
            f"{type(name).__name__}."
        )
    return name or _requested


def preferred(device: torch.device | str) -> tuple[str, str]:
    """The backend that computes in float32 on this device unless one is requested, and the reason.

    >>> preferred("cpu")[1]
    'the first that can run'
    """
    device = torch.device(device)
    able = (n for n in _candidates(device) if not BACKENDS[n].supports(device, torch.float32))
    name = next(able)
    if device.type != "cuda" or native.unable(device, torch.float32) is not None:
        return name, "the first that can run"
    if name == "native":
        return name, "which has passed pfgm check"
    if torch.cuda.is_available() and passes.has(passes.kind_of(device)):
        return name, "as native cannot run"
    return name, "as native has not passed pfgm check here"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend while the context is open, for the whole process.

    Whether the backend can run is checked at each call, not here.

    Raises:
        ValueError: there is no backend of that name.

    >>> import pfgm
    >>> with pfgm.use_backend("reference"):
    ...     mean = pfgm.posterior_mean(torch.zeros(1, 2), torch.ones(3, 2), r=1.0)
    """
    global _requested
    _backend_named(name, "use_backend's name")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def choose(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    references: torch.dtype | None = None,
) -> Backend:
    """The backend called ``name``, else the one in ``PFGM_BACKEND``, else native if it can run, and
    on a GPU has passed :func:`check`, else torch.

    Args:
        name: a backend, or None.
        device: device of the points.
        dtype: dtype of the points.
        references: dtype of the references; None means any.

    Raises:
        ValueError: no backend has that name.
        Unavailable: the requested backend cannot run; the message says why.
    """
    source = "backend"
    if not name and (name := os.environ.get("PFGM_BACKEND")):
        source = "PFGM_BACKEND"
    if name:
        backend = _backend_named(name, source)
        if reason := backend.supports(device, dtype, references):
            raise Unavailable(f"{source}={name!r} cannot run here: {reason}.")
        return backend
    for name in _candidates(device):
        backend = BACKENDS[name]
        if backend.supports(device, dtype, references) is None:
            return backend
    raise TypeError(f"x must be torch.float32 or torch.float64, got {dtype}.")


def choose_for(name: str | None, x: Tensor, references: Tensor | None = None) -> Backend:
    """As :func:`choose`, for points x (B, N) and references (M, N) if the operation has some."""
    return choose(name, x.device, x.dtype, None if references is None else references.dtype)


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The backends in the order in which they are tried. Others compute by name alone."""
    if device.type != "cuda" or passes.native_computes(device):
        return "native", "torch"
    return ("torch",)
