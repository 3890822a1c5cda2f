"""Samples that are drawn a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..common.checks import check_choice
from ..common.memory import allocating
from ..common.wrappers import module_of
from .conditions import Network
from .flow import Flow

Compute = Literal["float32", "bfloat16"]


class _Autocast(nn.Module):
    """A network whose layers compute in bfloat16. Its results have the dtype of x."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.module = network, module_of(network)  # by which it is found

    def forward(self, x: Tensor, level: Tensor, **condition: Any) -> Any:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            result = self.network(x, level, **condition)
        return tree_map_only(Tensor, lambda part: part.to(x.dtype), result)


def draw_prior(flow: Flow, n: int, seed: int) -> Tensor:
    """Points (n, *S) of the prior. They are drawn on the CPU, so every device gets the same."""
    with allocating(f"n is {n}, and {n} samples of shape {flow.shape}"):
        return flow.prior(n, generator=torch.Generator().manual_seed(seed))


def sample_in_batches(
    flow: Flow,
    network: Network,
    prior: Tensor,
    **options: Any,
) -> tuple[Tensor, int]:
    """As :func:`sample_batches`, in one tensor, with the most evaluations of a batch."""
    batches = sample_batches(flow, network, prior, **options)
    parts, evaluations = zip(*batches, strict=True)
    return torch.cat(parts), max(evaluations)


def sample_batches(
    flow: Flow,
    network: Network,
    prior: Tensor,
    *,
    batch_size: int,
    device: torch.device | None = None,
    labels: Tensor | None = None,
    compute: Compute = "float32",
    **options: Any,
) -> Iterator[tuple[Tensor, int]]:
    """The batches of samples one after another, each with the evaluations of the network.

    Args:
        flow, network: as for :meth:`pfgm.Flow.sample`.
        prior: (n, *S), such as :func:`draw_prior` gives.
        batch_size: samples at a time.
        device: where each batch is computed; None is the device of prior.
        labels: (n,), for a network that takes labels.
        compute: precision of the network. bfloat16 means autocast; the points of the solver keep
            their dtype.
        **options: of :meth:`pfgm.Flow.sample`, such as solver, steps and generator.
    """
    check_choice("compute", compute, get_args(Compute))
    network = _Autocast(network) if compute == "bfloat16" else network
    for start in range(0, len(prior), batch_size):
        rows = slice(start, start + batch_size)
        x = prior[rows].to(device)
        part, nfe = flow.sample(
            network,
            len(x),
            x_init=x,
            condition=None if labels is None else {"labels": labels[rows]},
            return_nfe=True,
            **options,
        )
        yield part.to(prior.device), nfe
