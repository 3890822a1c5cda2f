"""What PFGM asks of networks: the exact field, the check of a field, the weighting of the loss."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from ..common.checks import shape_or_type, untouched
from ..common.wrappers import hides_its_network, network_within
from ..functional import field_fn, posterior_mean
from ..references import References
from .conditions import Condition, Network
from .targets import ExactNetwork

Weighting = Literal["balanced", "published"]
"""Weights of the levels in the loss of :class:`pfgm.PoissonFlow`."""

_SAME_GAMMA = 1e-6  # relative; the same data in float32 and float64 differ by less


class EmpiricalField(ExactNetwork):
    """The exact field of references as a network, which needs no training.

    ``forward`` takes x (B, *S) and z (B,) and returns (field_x, field_z) of :func:`pfgm.field_fn`.
    """

    def __init__(self, references: References, gamma: float = 5.0) -> None:
        super().__init__(references)
        self.gamma = gamma

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return field_fn(x, z, self.references, gamma=self.gamma)

    def mean(self, x: Tensor, z: Tensor) -> Tensor:
        """The posterior mean (B, *S) at x (B, *S) and z (B,), in the dtype of x."""
        return posterior_mean(x, self.references, r=z).to(x.dtype)


def _mean_network(net: Network) -> nn.Module | None:
    """The network inside net that is exact or predicts a mean; None if there is no single one."""
    return network_within(
        net, lambda each: isinstance(each, EmpiricalField) or hasattr(each, "data_std")
    )


def default_weighting(net: Network) -> Weighting:
    """Balanced for a network that predicts the mean, else published; warns if net hides it."""
    if _mean_network(net) is not None:
        return "balanced"
    if hides_its_network(net) and not torch.compiler.is_compiling():  # a graph holds no warning
        warnings.warn(
            f"net is a {type(net).__name__}, which hides its network, so the loss takes the "
            "published weighting; give the network itself, or weighting='balanced' for one that "
            "predicts the posterior mean, as those of pfgm.networks do, else "
            "weighting='published'.",
            stacklevel=3,
        )
    return "published"


def evaluate(
    net: Network, x: Tensor, z: Tensor, condition: Condition, gamma: float
) -> tuple[Tensor, Tensor]:
    """The network's field at x and z, with its shapes checked."""
    own = getattr(_mean_network(net), "gamma", None)
    if own is not None and abs(own - gamma) > _SAME_GAMMA * gamma:
        raise ValueError(
            f"net must have the gamma of the flow, {gamma}, got {own}; flow.network makes a "
            "network that fits."
        )
    prediction = untouched(net, "net", ("x", "z"), x, z, **condition)
    if not isinstance(prediction, (tuple, list)) or len(prediction) != 2:
        raise ValueError(
            "net must return (field_x, field_z), the field at x and z, got "
            f"{type(prediction).__name__}; a denoiser is a network of PoissonFlowPP."
        )
    field_x, field_z = prediction
    if [getattr(each, "shape", None) for each in prediction] != [x.shape, z.shape]:
        raise ValueError(
            f"net must return tensors of the shapes of x and z, {tuple(x.shape)} and "
            f"{tuple(z.shape)}, got {' and '.join(map(shape_or_type, prediction))}."
        )
    return field_x, field_z
