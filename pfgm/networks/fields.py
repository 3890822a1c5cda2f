"""The field that a posterior mean implies, and the base of the networks that predict one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.checks import check_sample_shape
from ..common.numbers import finite_values, int_tuple, positive
from ..common.tensors import is_wider, over_samples, per_row
from .config import as_json

Center = float | Sequence[Any] | Tensor
"""The average sample, (*S), or one number for all values."""

_TAIL = 10.0  # at D = 1 the noise is z/|g|, g ~ N(0, 1): above 10 z in 8 % of all draws


def field_from_mean(
    x: Tensor, z: Tensor, mean: Tensor, *, gamma: float = 5.0
) -> tuple[Tensor, Tensor]:
    """The normalised Poisson field that a posterior mean implies (PFGM, arXiv 2209.11178).

    With E = (x − mean, z) the field is v = −√N E / (‖E‖ + γ), and 0 where E = 0.

    x and mean are (B, *S), z is (B,), and γ ≥ 0. The results field_x and field_z are (B, *S) and
    (B,).

    >>> x, z = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    >>> field_x, field_z = field_from_mean(x, z, torch.zeros(1, 2), gamma=0.0)
    >>> [round(v, 4) for v in (*field_x[0].tolist(), field_z.item())]
    [-0.8485, -0.0, -1.1314]
    """
    return field_from_difference(x - mean, per_row(z, x, "z"), gamma)


def field_from_difference(difference: Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """As :func:`field_from_mean`, from x − mean (B, *S) and z (B,)."""
    e_x = difference.flatten(1)
    norm = torch.linalg.vector_norm(torch.cat([e_x, z[:, None]], 1), dim=1)
    scale = -math.sqrt(e_x.shape[1]) / (norm + gamma).clamp_min(torch.finfo(norm.dtype).tiny)
    return (e_x * scale[:, None]).view_as(difference), z * scale


def root_mean_square(x: Tensor) -> Tensor:
    """‖x‖/√N (B,) of points x (B, *S)."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norm / math.sqrt(math.prod(x.shape[1:]))


class MeanParts(NamedTuple):
    """A predicted mean, kept·x + added, and x − mean = dropped·x − added, with kept + dropped = 1.

    x and the results are relative to a network's center and in units of its scale. kept and dropped
    are computed separately, so that neither result is the small difference of large numbers.
    """

    x: Tensor
    kept: Tensor | float
    dropped: Tensor | float
    added: Tensor

    def mean(self) -> Tensor:
        return self.kept * self.x + self.added

    def difference(self) -> Tensor:
        return self.dropped * self.x - self.added


class FieldNetwork(nn.Module):
    """Base of the networks that map (x, z) to the normalised Poisson field.

    The network predicts a posterior mean, which implies the field (:func:`field_from_mean`). So
    field_x and field_z are always consistent, field_z is never positive, and far from the data the
    direction is right before any training. x − mean is formed before the mean is rounded.

    The backbone sees x scaled to order one. It returns an output, which is added to x, and a gate,
    the fraction of x to drop. Both fade out as z → 0, where the mean is x itself. This is EDM's
    preconditioning (arXiv 2206.00364), adapted to heavy-tailed noise.

    Subclasses implement `backbone` and set `config`: keyword arguments that rebuild the network and
    that JSON can store.

    Args:
        shape: sample shape S.
        data_std: root mean square of the data's values.
        gamma: γ of the field.
        center: average sample, (*S), or one number for all values.
        scale: unit of length of x and z inside the network, about the spread of the data around
            center. :meth:`pfgm.Flow.network` gives what fits a flow.

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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "mean" in vars(cls) and cls.forward is FieldNetwork.forward:
            raise TypeError(
                f"{cls.__name__} defines mean, which forward does not call; define backbone, or "
                "forward as well."
            )

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
        self.data_std = float(positive("data_std", data_std))
        self.gamma = float(positive("gamma", gamma))
        self.scale = float(positive("scale", scale))
        point = finite_values("center", center).float()
        if point.shape not in (torch.Size([]), torch.Size(self.shape)):
            raise ValueError(
                f"center must have shape {self.shape} or (), got {tuple(point.shape)}."
            )
        self._unit_std = self.data_std / self.scale
        # The part of config for all networks; without center and scale where both are defaults.
        self._scaling: dict[str, Any] = {"data_std": self.data_std, "gamma": self.gamma}
        if self.scale != 1 or bool((point != 0).any()):
            self._scaling |= {"center": point.tolist(), "scale": self.scale}
        self.register_buffer("center", point.clone().to(torch.get_default_device()), False)

    def _set_config(self, **own: Any) -> None:
        self.config = as_json({"shape": self.shape, **own, **self._scaling})

    def backbone(
        self, x: Tensor, rms: Tensor, z: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps scaled x (B, *S), ‖x‖/√N (B,) and z (B,) to output and gate logits, (B, *S) each."""
        raise NotImplementedError

    def mean(self, x: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The predicted posterior mean (B, *S) at x (B, *S) and z (B,), given labels (B,)."""
        parts = self._parts(x, self._checked_level(x, z), labels)
        return self._from_unit(parts.mean()).to(x.dtype)

    def _parts(self, x: Tensor, z: Tensor, labels: Tensor | None) -> MeanParts:
        """mean = skip (1 − c gate) x + σ_d c output, where c falls to 0 as z does."""
        if is_wider(self, x):
            x, z = x.double(), z.double()
        x, z = self._to_unit(x, z)
        rms = root_mean_square(x)
        condition = {} if labels is None else {"labels": labels}
        output, gate = self.backbone(x * over_samples(self._c_in(rms), x), rms, z, **condition)
        change = over_samples(self._c_change(z), x)
        skip, rest = (over_samples(ratio, x) for ratio in self._skip_and_rest(rms, z))
        gated = change * gate.sigmoid()
        added = self._unit_std * change * output
        return MeanParts(x, skip * (1 - gated), rest + skip * gated, added)

    # The factors below take x and z relative to center and in units of scale.

    def _to_unit(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.center) / self.scale, z / self.scale

    def _from_unit(self, mean: Tensor) -> Tensor:
        return self.center + self.scale * mean

    def _field(self, parts: MeanParts, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        difference = (self.scale * parts.difference()).to(x.dtype)
        return field_from_difference(difference, z, self.gamma)

    def _c_in(self, rms: Tensor) -> Tensor:
        return (rms.square() + self._unit_std**2).rsqrt()

    def _skip_and_rest(self, rms: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """EDM's weight of x at noise level z, reduced where ‖x‖ shows more noise than z; and 1 less
        this weight."""
        noise, data = z.square() + self._excess_noise(rms), self._unit_std**2
        return data / (data + noise), noise / (data + noise)

    def _excess_noise(self, rms: Tensor) -> Tensor:
        return (rms.square() - (2 * self._unit_std) ** 2).clamp_min(0)

    def _c_change(self, z: Tensor) -> Tensor:
        noise = _TAIL * z
        return noise * (noise.square() + self._unit_std**2).rsqrt()

    def forward(self, x: Tensor, z: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), of shapes (B, *S) and (B,), at x (B, *S) and z (B,).

        z may also be a number or (B, 1, …, 1). A network with classes takes integer labels (B,); a
        label below 0, or None, is no label. A network in float64 takes narrower x too; the field
        has the dtype of x.
        """
        z = self._checked_level(x, z)
        return self._field(self._parts(x, z, labels), x, z)

    def _checked_level(self, x: Tensor, z: Tensor) -> Tensor:
        """z as (B,). Raises ValueError if x or z has a wrong shape."""
        check_sample_shape(x, self.shape)
        return per_row(z, x, "z")
