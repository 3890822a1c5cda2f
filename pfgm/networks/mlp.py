"""A residual MLP for data without spatial structure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..common.numbers import whole
from .config import MAX_DEPTH, MAX_WIDTH
from .embedding import NoiseEmbedding
from .fields import Center, FieldNetwork


class MLPBlock(nn.Module):
    """Residual block: norm, scale and shift from the embedding, two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, width) and (B, width) to (B, width)."""
        scale, shift = self.modulation(embedding).chunk(2, 1)
        inner = F.silu(self.first(self.norm(h) * (1 + scale) + shift))
        outputs: Tensor = h + self.second(inner)
        return outputs


class MLP(FieldNetwork):
    """Residual MLP that predicts the normalised Poisson field of samples of any shape.

    It flattens the samples and predicts their posterior mean (:class:`FieldNetwork`).

    Args:
        shape: sample shape S, of any number of dimensions.
        width: number of hidden features.
        depth: number of residual blocks.
        classes: number of labels, which forward takes as 0 to classes − 1; 0 for none.
        data_std, gamma, center, scale: as for :class:`FieldNetwork`.

    >>> import torch
    >>> net = MLP((2,), width=32, depth=2)
    >>> field_x, field_z = net(torch.randn(5, 2), torch.rand(5))
    >>> field_x.shape, field_z.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 128,
        depth: int = 4,
        classes: int = 0,
        data_std: float = 1.0,
        gamma: float = 5.0,
        center: Center = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(shape, data_std=data_std, gamma=gamma, center=center, scale=scale)
        n = math.prod(self.shape)
        width = whole("width", width, 1, MAX_WIDTH)
        depth = whole("depth", depth, 1, MAX_DEPTH)
        classes = whole("classes", classes, 0)
        self._set_config(width=width, depth=depth, classes=classes)
        self.embedding = NoiseEmbedding(width, classes=classes)
        self.stem = nn.Linear(n, width)
        self.blocks = nn.ModuleList(MLPBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * n)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def backbone(
        self, x: Tensor, rms: Tensor, z: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps scaled x (B, *S), ‖x‖/√N (B,) and z (B,) to output and gate logits, (B, *S) each."""
        embedding = self.embedding(rms, z, labels)
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        output, gate = self.head(F.silu(self.norm(h))).chunk(2, 1)
        return output.view_as(x), gate.view_as(x)
