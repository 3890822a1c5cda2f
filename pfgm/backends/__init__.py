"""The choice of the implementation that computes the operations.

Every backend is a module with the same functions. Its ``supports`` returns None, or the reason why
it cannot run. :func:`choose` takes the first backend that can run. A backend can be requested by
name: by ``backend=``, else by :func:`use_backend`, else by the environment variable
``PFGM_BACKEND``. If the requested backend cannot run, an error gives the reason; no other backend
takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import native, products, reference, triton
from .problems import Needs, OdeStep, PosteriorMean, State, Upstream

__all__ = [
    "Availability",
    "Backend",
    "Unavailable",
    "available",
    "choose",
    "preferred",
    "requested",
    "use_backend",
]


class Backend(Protocol):
    """What every backend module provides; shapes as in :mod:`pfgm.ops`."""

    def supports(
        self, device: torch.device, dtype: torch.dtype, references: torch.dtype | None = None
    ) -> str | None:
        """None if the backend can compute, else the reason why not.

        device and dtype are those of x; references is the dtype of the references.
        """

    def describe(self) -> str:
        """One line on how the backend computes, for ``pfgm info``."""

    def sketch(self, references: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A tensor that saves time at later calls over the same references (M, N).

        dtype is that of x in those calls. The sketch is valid while the references stay the same.
        It is None if the backend has no use for one.
        """

    def posterior_mean(self, problem: PosteriorMean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean (B, N) in the dtype of x, and log-sum-exp, nearest and total (B,) in float64.

        Nearest and total are those of :class:`~pfgm.backends.problems.State`.
        """

    def posterior_mean_backward(
        self, problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, references and radius; None for those that are not needed."""

    def normalised_field(
        self, difference: Tensor, z: Tensor, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """v_x (B, N) and v_z (B,) from x − mean (B, N) and z (B,) in float64."""

    def normalised_field_backward(
        self,
        grad_field_x: Tensor,
        grad_field_z: Tensor,
        difference: Tensor,
        z: Tensor,
        gamma: float,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x − mean (B, N) and z (B,) from those of v_x and v_z."""

    def ode_step(
        self,
        step: OdeStep,
        with_mean: bool,
        out: Tensor | None = None,
        mean_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next points (B, N), and the mean (B, N) if with_mean is set and the step has a field.

        out and mean_out have contiguous features. Each is one of the inputs, or overlaps none.
        """


_BACKENDS: dict[str, Backend] = {
    "native": cast(Backend, native),
    "triton": cast(Backend, triton),
    "torch": cast(Backend, products),
    "reference": cast(Backend, reference),
}
_ON_GPU = (
    "its calls are predicted from machine code to take less time than Triton's at most shapes; "
    "neither was measured on a GPU (docs/roofline.md)"
)
_requested: str | None = None


class Unavailable(RuntimeError):
    """The requested backend cannot run; the message says why."""


class Availability(NamedTuple):
    """Whether a backend can run, and how it computes or why it cannot."""

    usable: bool
    detail: str


def _backend_named(name: str, source: str) -> Backend:
    if not isinstance(name, str) or name not in _BACKENDS:
        raise ValueError(f"{source} is {name!r}; allowed are {', '.join(sorted(_BACKENDS))}.")
    return _BACKENDS[name]


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
    found = {}
    for name, backend in _BACKENDS.items():
        reason = backend.supports(torch.device(device), dtype, references)
        found[name] = Availability(reason is None, reason or backend.describe())
    return found


def requested(name: str | None = None) -> str | None:
    """The name, else the one given to the innermost open :func:`use_backend`; None outside of one.

    Raises:
        TypeError: the name is no text.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(
            f"backend is a {type(name).__name__}; allowed are None, {', '.join(sorted(_BACKENDS))}."
        )
    return name or _requested


def preferred(device: torch.device | str) -> tuple[str, str]:
    """The backend that computes in float32 on this device unless one is requested, and why it.

    >>> preferred("cpu")[1]
    'the first that can run'
    """
    name = next(name for name, found in available(device).items() if found.usable)
    native_on_gpu = name == "native" and torch.device(device).type == "cuda"
    return name, _ON_GPU if native_on_gpu else "the first that can run"


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
    """The backend called ``name``, else the one in ``PFGM_BACKEND``, else the first that can run of
    native, triton and torch.

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
    for backend in _BACKENDS.values():
        if backend.supports(device, dtype, references) is None:
            return backend
    raise TypeError(f"x has dtype {dtype}; allowed are torch.float32 and torch.float64.")
