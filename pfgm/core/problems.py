"""The inputs and results of the operations as named tuples, the same for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common.tensors import contiguous, contiguous_features


class PosteriorMean(NamedTuple):
    """A problem: the posterior mean and the log-sum-exp of B points x over M references."""

    x: Tensor
    """(B, N), float32 or float64."""
    references: Tensor
    """(M, N), any dtype that the backend reads; uint8 means u/127.5 − 1."""
    radius: Tensor
    """(B,) in float64: r, or sigma at D = ∞."""
    D: float
    """Number of augmented dimensions, above 0."""
    sketch: Tensor | None = None
    """The result of the backend's ``sketch`` for these references. It saves time and does not
    change the result."""
    difference: bool = False
    """Whether the forward pass returns x − mean in place of the mean. Near the mean it has digits
    that a rounded mean has lost. Backward passes ignore it."""

    def laid_out(self) -> PosteriorMean:
        """The same problem with contiguous features and radius, as the kernels need them."""
        return self._replace(
            x=contiguous_features(self.x),
            references=contiguous_features(self.references),
            radius=contiguous(self.radius),
        )


class State(NamedTuple):
    """The result over some references, in a form that can be merged with the result over others.

    The backward pass takes it too, because the weights follow from it in one pass.
    """

    mean: Tensor
    """(B, N); x − mean if the problem asks for the difference, which merges in the same way."""
    nearest: Tensor
    """(B,) in float64: squared distance of the nearest reference."""
    total: Tensor
    """(B,) in float64: total weight relative to the nearest reference."""


class RunningMean(NamedTuple):
    """The sums over the references so far, for a result over references that come in parts.

    Operations change the tensors in place.
    """

    sums: Tensor
    """(B, N) in float64: the references, or their differences y − x from the points, weighted
    relative to the nearest."""
    nearest: Tensor
    """(B,) in float64, as in :class:`State`."""
    total: Tensor
    """(B,) in float64, as in :class:`State`."""
    all_references: int
    """The number of references in all parts."""


class RunningGradient(NamedTuple):
    """The sums over the references so far, for the gradients over references that come in parts.

    Operations change the tensors in place. csrc/api/posterior_mean.h defines them.
    """

    sums: Tensor | None
    """(B, N) in float64; None if x needs no gradient."""
    moments: Tensor
    """(B,) in float64."""
    pulls: Tensor
    """(B, 2) in float64."""
    all_references: int
    """The number of references in all parts."""


class Upstream(NamedTuple):
    """The gradients of mean and log-sum-exp that the backward pass starts from."""

    grad_mean: Tensor
    """(B, N)."""
    grad_logsumexp: Tensor
    """(B,) in float64."""


class Tangents(NamedTuple):
    """Tangents of the inputs of the posterior mean; None for an input without one."""

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
    """(B, N), the field's v_x at the points; the mean itself if field_z is None."""
    field_z: Tensor | None
    """(B,), the field's v_z at the points."""
    history: Tensor | None
    """(B, N), points of an earlier stage or step; None if blend is 0."""
    z: float
    """Level of all rows, as toward and blend; not read if row_levels are given."""
    toward: float
    blend: float
    row_levels: Tensor | None
    """(3, B) in float64: z, toward and blend of each row; None if they are the same."""
    gamma: float
    """Softening in the field's normalisation."""
    z_exp: float
    """Below this z, v_z is replaced by the value that v_x implies."""
    exact: bool
    """Whether the replacement inverts the normalisation exactly; False means as published."""

    def laid_out(self) -> OdeStep:
        """The same step with contiguous features and vectors, as the kernels need them."""
        return self._replace(
            x=contiguous_features(self.x),
            slope=contiguous_features(self.slope),
            field_z=None if self.field_z is None else self.field_z.contiguous(),
            history=None if self.history is None else contiguous_features(self.history),
            row_levels=None if self.row_levels is None else self.row_levels.contiguous(),
        )

    def outputs(
        self, with_mean: bool, out: Tensor | None, mean_out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tensors (B, N) for the next points and the mean: the given ones, and new ones for
        None. The second is None if the mean is not wanted."""
        out = self.x.new_empty(self.x.shape) if out is None else out
        if not with_mean:
            return out, None
        return out, self.x.new_empty(self.x.shape) if mean_out is None else mean_out
