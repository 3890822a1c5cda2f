"""The settings of :class:`pfgm.training.Trainer`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..common.checks import check_choice, check_seed

__all__ = ["TrainConfig"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are those published for CIFAR-10 (PFGM, appendix B.1)."""

    steps: int = 100_000
    """Optimiser steps."""
    batch_size: int = 128
    """Samples in a step, of all processes together."""
    references: int = 4096
    """Samples whose field is the target; they contain the batch. All data are taken if there are
    fewer, or if the data are sharded over processes. 0, for PFGM++ only, means the single-sample
    target."""
    learning_rate: float = 2e-4
    """Adam's learning rate after the warm-up."""
    beta2: float = 0.999
    """Adam's decay of the squared gradient; a short run needs a lower value."""
    warmup: int = 5000
    """Steps in which the learning rate rises linearly."""
    decay: Literal["none", "cosine"] = "none"
    """How the learning rate falls from the end of the warm-up to the last step."""
    clip: float = 1.0
    """Maximum norm of the gradient; a longer gradient is scaled down."""
    ema: float = 0.9999
    """Decay of the averaged weights; it is min(ema, (1 + t)/(10 + t)) at step t."""
    accumulate: int = 1
    """Parts in which a batch goes through the network, to save memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network. bfloat16 means autocast, with weights in float32."""
    compile: bool = False
    """Whether to compile the network (torch.compile)."""
    label_dropout: float = 0.1
    """Share of the labels that are dropped, so that the network also learns the field without
    labels, which guidance needs."""
    checkpoint_every: int = 5000
    """Steps between checkpoints."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 means none."""
    log_every: int = 50
    """Steps between reports of the loss."""
    seed: int = 0
    """Seed of batches, perturbation and dropout."""

    def __post_init__(self) -> None:
        smallest = {"steps": 1, "batch_size": 1, "references": 0, "warmup": 0, "accumulate": 1}
        smallest |= {"checkpoint_every": 1, "evaluate_every": 0, "log_every": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < 2**63:
                raise ValueError(
                    f"{name} is {value!r}; allowed is an integer of at least {least}, below 2^63."
                )
        check_seed(self.seed)
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} is {value!r}; allowed is any number above 0.")
        for name in ("ema", "beta2", "label_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value!r}; allowed is 0 to below 1.")
        check_choice("decay", self.decay, ("none", "cosine"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}; allowed are divisors of batch_size, "
                f"{self.batch_size}."
            )
        if 0 < self.references < self.batch_size:
            raise ValueError(
                f"references is {self.references}; allowed is at least batch_size, "
                f"{self.batch_size}, as the references contain the batch, or 0 for none."
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate at a step: a linear warm-up, then constant or half a cosine to 0.

        >>> TrainConfig(steps=100, warmup=10, learning_rate=1.0, decay="cosine").learning_rate_at(4)
        0.5
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.decay == "none":
            return self.learning_rate
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
