"""What the networks share: scaled inputs, the noise embedding, the field built from a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import checks_values, int_tuple, positive_float

_FLOOR = 1e-3  # below z_min of the flow nothing is left to tell apart, so logarithms stop there
_TAIL = 10.0  # at D = 1 the noise is z/|g|, g ~ N(0, 1): above 10 z in 8 % of all draws only
MOST_WIDE = 1 << 20  # features or channels of a layer
MOST_DEEP = 10_000  # blocks of a network or of a level
Center = float | Sequence[Any] | Tensor
_PERIODS = (2.0, 32.0)  # of the sines, in units of the logarithm: fine enough for one noise level


def field_from_mean(
    x: Tensor, z: Tensor, mean: Tensor, *, gamma: float = 5.0
) -> tuple[Tensor, Tensor]:
    """The normalised Poisson field that a posterior mean implies.

    With E = (x − mean, z) the field is v = −√N E / (‖E‖ + γ), and 0 where E = 0. Source: PFGM, Xu
    et al. 2022, arXiv 2209.11178.

    Args:
        x: points, (B, *S).
        z: augmented coordinate, (B,).
        mean: posterior mean, (B, *S).
        gamma: γ ≥ 0.

    Returns:
        (field_x, field_z) of shapes (B, *S) and (B,).

    >>> x, z = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    >>> field_x, field_z = field_from_mean(x, z, torch.zeros(1, 2), gamma=0.0)
    >>> [round(v, 4) for v in (*field_x[0].tolist(), field_z.item())]
    [-0.8485, -0.0, -1.1314]
    """
    e_x = (x - mean).flatten(1)
    norm = torch.linalg.vector_norm(torch.cat([e_x, z[:, None]], 1), dim=1)
    scale = -math.sqrt(e_x.shape[1]) / (norm + gamma).clamp_min(torch.finfo(norm.dtype).tiny)
    return (e_x * scale[:, None]).view_as(x), z * scale


class NoiseEmbedding(nn.Module):
    """Embeds log z and log(‖x‖/√N) as sines, cosines and a two-layer perceptron.

    Both are needed: at D = 1 the noise is heavy-tailed, so z alone does not tell the distance to
    the data. Both logarithms are smooth and level off at 1e-3.

    >>> NoiseEmbedding(32)(torch.rand(5), torch.rand(5)).shape
    torch.Size([5, 32])
    """

    frequencies: Tensor

    def __init__(self, width: int, *, classes: int = 0, sines: int = 8) -> None:
        super().__init__()
        self.classes = classes
        low, high = (math.log(2 * math.pi / period) for period in reversed(_PERIODS))
        frequencies = torch.linspace(low, high, sines).exp()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(4 * sines, width)
        self.second = nn.Linear(width, width)
        if classes:
            self.labels = nn.Embedding(classes + 1, width)  # the last is that of no label
            nn.init.zeros_(self.labels.weight)

    def forward(self, rms: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B,) root mean square of x, (B,) z and (B,) labels to (B, width)."""
        logs = torch.stack([rms, z], 1).square().add(_FLOOR**2).log() / 2
        angles = (logs[:, :, None] * self.frequencies).flatten(1)
        features = torch.cat([angles.sin(), angles.cos()], 1)
        hidden = nn.functional.silu(self.first(features))
        if self.classes:
            hidden = hidden + self.labels(self._numbered(labels, rms))
        elif labels is not None:
            raise ValueError("labels given to a network without classes; build it with classes=….")
        return nn.functional.silu(self.second(hidden))

    def _numbered(self, labels: Tensor | None, rms: Tensor) -> Tensor:
        """Labels as rows of the table: what is below 0, or not there, is no label."""
        if labels is None:
            return torch.full(rms.shape, self.classes, dtype=torch.long, device=rms.device)
        if labels.shape != rms.shape or labels.is_floating_point():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; allowed are "
                f"integers of shape ({len(rms)},)."
            )
        if checks_values(labels.device) and bool((labels >= self.classes).any()):
            raise ValueError(
                f"labels holds {int(labels.max())}; allowed is below {self.classes}, and below 0 "
                "for none."
            )
        return torch.where(labels < 0, self.classes, labels)


class FieldNetwork(nn.Module):
    """Base of the networks: (x, z) to the normalised Poisson field, through a posterior mean.

    The backbone sees x scaled to order one and says how much of each value of x to keep (the gate)
    and what to add (the output). Both fade as z → 0, where the mean is x itself. The field follows
    analytically (`field_from_mean`): v_x and v_z are always consistent, v_z is never positive, and
    far from the data the direction is right before any training. In the manner of EDM's
    preconditioning (Karras et al. 2022, arXiv 2206.00364), made safe for heavy-tailed noise.

    Subclasses set `config` (keyword arguments that rebuild the architecture, JSON-able) and
    implement `backbone`.

    >>> class Untrained(FieldNetwork):
    ...     def backbone(self, x, rms, z):
    ...         return torch.zeros_like(x), torch.zeros_like(x)
    >>> net = Untrained((2,), data_std=1.0, gamma=5.0)
    >>> net.mean(torch.tensor([[1.0, 2.0]]), torch.tensor([1e-10]))
    tensor([[1., 2.]])
    >>> field_x, field_z = net(torch.randn(3, 2), torch.rand(3))
    >>> field_x.shape, field_z.shape
    (torch.Size([3, 2]), torch.Size([3]))
    """

    config: dict[str, Any]
    center: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        data_std: float,
        gamma: float,
        center: Center = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape = int_tuple("shape", shape)
        self.data_std = positive_float("data_std", data_std)
        self.gamma = positive_float("gamma", gamma)
        self.scale = positive_float("scale", scale)
        found = torch.as_tensor(center, dtype=torch.float32, device="cpu")
        if found.shape not in (torch.Size([]), torch.Size(self.shape)):
            allowed = f"{self.shape} and ()"
            raise ValueError(f"center has shape {tuple(found.shape)}; only {allowed} are allowed.")
        self._unit_std = self.data_std / self.scale
        # The part of config that says where the data lie; empty where it says nothing.
        self._place: dict[str, Any] = {}
        if self.scale != 1 or bool((found != 0).any()):
            self._place = {"center": found.tolist(), "scale": self.scale}
        self.register_buffer("center", found.clone().to(torch.get_default_device()), False)

    def backbone(
        self, x: Tensor, rms: Tensor, z: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scaled x (B, *S), ‖x‖/√N (B,) and z (B,) to output and gate logits, each (B, *S)."""
        raise NotImplementedError

    def mean(self, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The predicted posterior mean, (B, *S), at x (B, *S) and z (B,), of labels (B,)."""
        self._check(x, z)
        x, z = self._to_unit(x, z)
        rms = torch.linalg.vector_norm(x.flatten(1), dim=1) / math.sqrt(math.prod(self.shape))
        condition = {} if labels is None else {"labels": labels}
        output, gate = self.backbone(x * self._rows(self._c_in(rms)), rms, z, **condition)
        change = self._rows(self._c_change(z))
        kept = x * self._rows(self._c_skip(rms, z)) * (1 - change * gate.sigmoid())
        return self._from_unit(kept + self._unit_std * change * output)

    # In units of scale around center, where the embedding tells levels apart.

    def _to_unit(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.center) / self.scale, z / self.scale

    def _from_unit(self, mean: Tensor) -> Tensor:
        return self.center + self.scale * mean

    def _c_in(self, rms: Tensor) -> Tensor:
        return (rms.square() + self._unit_std**2).rsqrt()

    def _c_skip(self, rms: Tensor, z: Tensor) -> Tensor:
        # EDM's weight of x at noise level z, and less where ‖x‖ itself shows more noise than z.
        return self._unit_std**2 / (self._unit_std**2 + z.square() + self._excess(rms))

    def _excess(self, rms: Tensor) -> Tensor:
        return (rms.square() - (2 * self._unit_std) ** 2).clamp_min(0)

    def _c_change(self, z: Tensor) -> Tensor:
        noise = _TAIL * z
        return noise * (noise.square() + self._unit_std**2).rsqrt()

    def _rows(self, values: Tensor) -> Tensor:
        return values.view(-1, *([1] * len(self.shape)))

    def forward(self, x: Tensor, z: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), of shapes (B, *S) and (B,), at x (B, *S) and z (B,).

        A network with classes takes labels (B,), integers; below 0, or None, is no label.
        """
        return field_from_mean(x, z, self.mean(x, z, labels), gamma=self.gamma)

    def _check(self, x: Tensor, z: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape or x.ndim == 0:
            allowed = ", ".join(["B", *map(str, self.shape)])
            raise ValueError(f"x has shape {tuple(x.shape)}; only ({allowed}) is allowed.")
        if z.shape != x.shape[:1]:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; only ({len(x)},), one value a row of x, is allowed."
            )


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with tuples as lists, so that it equals what JSON gives back."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
