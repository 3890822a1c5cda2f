"""Which implementation computes the operations, and why.

Every backend is a module with the same functions, and a ``supports`` that gives None or the reason
why it cannot run. :func:`choose` takes the first that can, in the order below; a backend that was
asked for by name (``backend=``, :func:`use_backend`, then the environment variable
``PFGM_BACKEND``) either runs or raises with its reason. Nothing falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import native, reference, triton
from .problems import OdeStep

__all__ = [
    "Availability",
    "Backend",
    "Unavailable",
    "available",
    "choose",
    "requested",
    "use_backend",
]


class Backend(Protocol):
    """What every backend module provides; shapes as in :mod:`pfgm.ops`."""

    def supports(
        self, device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
    ) -> str | None:
        """None, or why tensors of this device and dtype, and references of theirs, cannot be."""

    def describe(self) -> str:
        """One line on how it computes, for ``pfgm info``."""

    def sketch(self, references: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What can be used again of references (M, N), for x of a dtype, while they stay as they
        are; None where nothing can."""

    def posterior_mean(
        self,
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        D: float,
        precision: str = "high",
        sketch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean (B, N) and, in float64, log-sum-exp, squared distance of the nearest reference and
        total weight relative to it, each (B,). Precision is the least that is asked for, and the
        sketch that of these references: it changes the time, not the result."""

    def posterior_mean_backward(
        self,
        grad_mean: Tensor,
        grad_logsumexp: Tensor,
        x: Tensor,
        references: Tensor,
        radius: Tensor,
        mean: Tensor,
        nearest: Tensor,
        total: Tensor,
        D: float,
        needs: tuple[bool, bool, bool],
        precision: str = "high",
        sketch: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, references and radius, None where not needed."""

    def normalised_field(
        self, x: Tensor, z: Tensor, mean: Tensor, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """v_x (B, N) and v_z (B,) from x (B, N), z (B,) in float64 and mean (B, N)."""

    def ode_step(
        self,
        step: OdeStep,
        with_mean: bool,
        out: Tensor | None = None,
        mean_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next points (B, N) and, with_mean from a field, the mean (B, N).

        Outputs that are given have contiguous features; each is an input itself or apart from it.
        """


_BACKENDS: dict[str, Backend] = {
    "native": cast(Backend, native),
    "triton": cast(Backend, triton),
    "reference": cast(Backend, reference),
}
# On GPUs Triton's kernels come first, until measurements of both say otherwise.
_ORDER = {"cuda": ("triton", "native", "reference")}
_requested: str | None = None


class Unavailable(RuntimeError):
    """A backend that was asked for cannot run; the message says why."""


class Availability(NamedTuple):
    """Whether a backend can run, and how it computes or why it cannot."""

    usable: bool
    detail: str


def _named(name: str, source: str) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(f"{source} is {name!r}; allowed are {', '.join(sorted(_BACKENDS))}.")
    return _BACKENDS[name]


def available(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    references: torch.dtype | None = None,
) -> dict[str, Availability]:
    """What each backend says of tensors on ``device`` with ``dtype``, and ``references`` of theirs.

    >>> available()["reference"].usable
    True
    """
    found = {}
    for name, backend in _BACKENDS.items():
        reason = backend.supports(torch.device(device), dtype, references)
        found[name] = Availability(reason is None, reason or backend.describe())
    return found


def requested() -> str | None:
    """The name that an enclosing :func:`use_backend` asks for."""
    return _requested


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend, for the whole process, while the context is open.

    Raises:
        ValueError: there is no backend of that name. Whether it can run is seen at the call.

    >>> import pfgm
    >>> with pfgm.use_backend("reference"):
    ...     mean = pfgm.posterior_mean(torch.zeros(1, 2), torch.ones(3, 2), r=1.0)
    """
    global _requested
    _named(name, "use_backend's name")
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
    """The backend called ``name``, else the one in ``PFGM_BACKEND``, else the first that can run.

    Raises:
        ValueError: no backend has that name.
        Unavailable: the one that was asked for cannot run; the message says why.
    """
    source = "backend"
    if not name and (name := os.environ.get("PFGM_BACKEND")):
        source = "PFGM_BACKEND"
    if name:
        backend = _named(name, source)
        if reason := backend.supports(device, dtype, references):
            raise Unavailable(f"{source}={name!r} cannot run here: {reason}.")
        return backend
    for known in _ORDER.get(device.type, tuple(_BACKENDS)):
        backend = _BACKENDS[known]
        if backend.supports(device, dtype, references) is None:
            return backend
    raise TypeError(f"x has dtype {dtype}; allowed are torch.float32 and torch.float64.")
