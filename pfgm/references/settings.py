"""The references and options of one call, and what its forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.tensors import flat_rows
from ..core.problems import PosteriorMean, State, Upstream
from .part import Part
from .ranks import Ranks


class Settings(NamedTuple):
    """The references and options of one call, for its forward and backward passes."""

    part: Part
    ranks: Ranks | None
    D: float
    backend: str | None
    version: object
    """Version of the rows in the forward pass."""
    difference: bool
    """Whether the result is x − mean in place of the mean."""
    continues: bool
    """Whether each chunk continues the sums of those before it, by the CPU kernels. If not, each
    chunk has a result of its own, and the results are merged."""

    def chunks(self, device: torch.device) -> Iterator[Tensor]:
        """Chunks (m, N) of the rows of this process."""
        for chunk in self.part.chunks(device):
            yield flat_rows(chunk)

    def problem(
        self, x: Tensor, chunk: Tensor, radius: Tensor, sketch: Tensor | None = None
    ) -> PosteriorMean:
        """The posterior mean over one chunk (m, N)."""
        return PosteriorMean(x, chunk, radius, self.D, sketch, self.difference)

    def check_version(self) -> None:
        """Raises RuntimeError if the rows are no longer those of the forward pass."""
        if self.part.version() != self.version:
            raise RuntimeError(
                "references is a ReferenceSet whose rows were changed in place after the forward "
                "pass; the gradient needs the rows of the forward pass."
            )


class ChunkTotals(NamedTuple):
    """Nearest and total of one chunk, each (B,), or of P chunks, each (B, P)."""

    nearest: Tensor
    total: Tensor


class Saved(NamedTuple):
    """The values that the forward pass saved, and the upstream gradients."""

    x: Tensor
    radius: Tensor
    mean: Tensor
    nearest: Tensor
    total: Tensor
    grad_mean: Tensor
    grad_logsumexp: Tensor

    @property
    def state(self) -> State:
        return State(self.mean, self.nearest, self.total)

    @property
    def upstream(self) -> Upstream:
        return Upstream(self.grad_mean, self.grad_logsumexp)

    def select(self, rows: Tensor | slice) -> Saved:
        """The same for only the points with these numbers."""
        return Saved(*(each[rows] for each in self))
