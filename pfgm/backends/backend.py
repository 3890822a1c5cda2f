"""What every backend provides, and the backends by name."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from ..core.problems import Needs, OdeStep, PosteriorMean, State, Upstream
from . import native, products, reference, triton


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

        The sketch is a summary of the references, valid while they stay the same. dtype is that of
        x in those calls. None if the backend has no use for one.
        """

    def posterior_mean(self, problem: PosteriorMean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean (B, N) in the dtype of x, and log-sum-exp, nearest and total (B,) in float64.

        Nearest and total are those of :class:`~pfgm.core.problems.State`.
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


BACKENDS: dict[str, Backend] = {
    "native": cast(Backend, native),
    "triton": cast(Backend, triton),
    "torch": cast(Backend, products),
    "reference": cast(Backend, reference),
}
