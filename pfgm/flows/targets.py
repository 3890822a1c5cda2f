"""Training of a flow: perturbed points, their targets and the loss."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..common.checks import check_dtype, layout_hint
from ..references import References, ReferenceSet
from .conditions import Condition, Network, as_condition, check_rows
from .parametrisation import Parametrisation


class Targets(Parametrisation):
    """Perturbation, loss and the exact network of a flow."""

    @abstractmethod
    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Perturbed points (B, *S) around data x, and their levels (B,)."""

    @abstractmethod
    def loss(
        self,
        net: Network,
        x: Tensor,
        references: References | None = None,
        generator: torch.Generator | None = None,
        *,
        condition: Condition | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """The training loss, a scalar."""

    @abstractmethod
    def empirical(self, references: References) -> nn.Module:
        """The exact network of references (M, *S)."""

    def _checked_batch(self, x: Tensor, condition: Condition | None) -> tuple[Tensor, Condition]:
        """The clean data of a loss as floating point, one row or more, and their condition."""
        x = self._to_floating(x)
        if len(x) == 0:
            raise ValueError("x must hold at least one sample, got none.")
        condition = as_condition("condition", condition)
        check_rows(condition, x.shape[0])
        return x, condition

    def _check_references(self, references: References) -> None:
        """Raises an error unless references are samples of the flow."""
        if not isinstance(references, (Tensor, ReferenceSet)):
            raise TypeError(
                "references must be a torch.Tensor or a pfgm.ReferenceSet, which takes arrays, got "
                f"{type(references).__name__}."
            )
        if isinstance(references, Tensor):
            check_dtype("references", references)
        if references.shape[1:] != self.shape or len(references) == 0:
            raise ValueError(
                f"references must have shape (M, *S) with M ≥ 1 and S = {self.shape}, got "
                f"{tuple(references.shape)}." + layout_hint(references.shape[1:], self.shape)
            )


class ExactNetwork(nn.Module):
    """Base of the exact networks: holds references (M, *S), a tensor as a buffer."""

    references: References

    def __init__(self, references: References) -> None:
        super().__init__()
        if isinstance(references, Tensor):
            self.register_buffer("references", references, persistent=False)
        else:
            self.references = references
