"""The arguments of the operations as tuples, the same for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PosteriorMean(NamedTuple):
    """The average of M references for each of B points x, and its log-sum-exp."""

    x: Tensor
    """(B, N), float32 or float64."""
    references: Tensor
    """(M, N), any dtype that the backend reads; uint8 means u/127.5 − 1."""
    radius: Tensor
    """(B,) in float64: r, or sigma at D = ∞."""
    D: float
    """Number of augmented dimensions, above 0."""
    precision: str = "high"
    """Least precision of matrix products on a GPU: "high" or "medium"."""
    sketch: Tensor | None = None
    """What the backend's ``sketch`` has made of these references. It saves time and changes no
    result."""


class State(NamedTuple):
    """The result over some references, in a form that merges with the result over others.

    The weights follow from it in one pass, which is why the backward pass takes it.
    """

    mean: Tensor
    """(B, N)."""
    nearest: Tensor
    """(B,) in float64: squared distance of the nearest reference."""
    total: Tensor
    """(B,) in float64: total weight relative to the nearest reference."""


class Upstream(NamedTuple):
    """The gradients that the backward pass starts from."""

    mean: Tensor
    """(B, N)."""
    logsumexp: Tensor
    """(B,) in float64."""


class Tangents(NamedTuple):
    """Tangents of the inputs of the posterior mean; None where an input has none."""

    x: Tensor | None
    """(B, N)."""
    references: Tensor | None
    """(M, N)."""
    radius: Tensor | None
    """(B,)."""


Needs = tuple[bool, bool, bool]
"""Whether the gradients of x, references and radius are needed."""


class OdeStep(NamedTuple):
    """One step of the ODE: next = x + toward (mean − x) + blend (history − x)."""

    x: Tensor
    """(B, N), the points."""
    slope: Tensor
    """(B, N), their v_x, or the mean itself where field_z is None."""
    field_z: Tensor | None
    """(B,), their v_z."""
    history: Tensor | None
    """(B, N), one more point of each row; None where blend is 0."""
    levels: tuple[float, float, float] | Tensor
    """z, toward and blend: three numbers for all rows, or (3, B) in float64."""
    gamma: float
    """Softening in the field's normalisation."""
    z_exp: float
    """Below this z, v_z is replaced by what v_x implies."""
    exact: bool
    """Whether the replacement inverts the normalisation exactly, or as published."""
