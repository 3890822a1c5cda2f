"""Communication between the processes that hold the references, with torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.merging import relative_weight
from ..core.problems import State

_DTYPES = (torch.float32, torch.float64)


def reduce_values(
    values: Tensor,
    group: dist.ProcessGroup | None,
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> Tensor:
    """The sum, or another reduction, of a few values over the processes, as a tensor on the CPU."""
    # NCCL does not reduce tensors on the CPU.
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    shared = values.to(device, copy=True)
    dist.all_reduce(shared, operation, group=group)
    return shared.cpu()


class Ranks:
    """Exchanges points and results between the processes of a group, or of all.

    All processes must create it together, each with its own points x (B, N), and call its methods
    together. B may differ between them; if N or the dtype does, all raise ValueError.
    """

    def __init__(self, group: dist.ProcessGroup | None, x: Tensor) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        own = torch.tensor([len(x), x.shape[1], _DTYPES.index(x.dtype)], device=x.device)
        self._counts, features, dtypes = torch.stack(self._all_gather(own)).T.tolist()
        if len(set(features)) > 1 or len(set(dtypes)) > 1:
            sizes = [f"{n} in {_DTYPES[d]}" for n, d in zip(features, dtypes, strict=True)]
            raise ValueError(
                f"x has {', '.join(sizes)} values a row in processes 0 to {self.size - 1}; all "
                "must have the same."
            )

    def _all_gather(self, values: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.contiguous(), group=self._group)
        return gathered

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (B, ...) of all processes, concatenated in the order of their ranks."""
        # all_gather needs tensors of equal size.
        padded = rows.new_zeros(max(self._counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        pairs = zip(self._all_gather(padded), self._counts, strict=True)
        return torch.cat([each[:count] for each, count in pairs])

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this process among gathered rows."""
        parts: tuple[Tensor, ...] = rows.split(self._counts)
        return parts[self._rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, elementwise."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def least(self, values: Tensor) -> Tensor:
        """The minimum over the processes, elementwise."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.contiguous().clone()
        dist.all_reduce(values, operation, group=self._group)
        return values


def merge_over_ranks(state: State, x: Tensor, radius: Tensor, D: float, ranks: Ranks) -> State:
    """The state over the references of all processes, for the points x and radius of all.

    The state that each process gives is over its own references.
    """
    least = ranks.least(state.nearest)
    weight = relative_weight(state.nearest, least, radius, D, x.shape[1]) * state.total
    total = ranks.sum(weight)
    # Sent in the dtype of x, which halves the bytes in float32.
    mean = ranks.sum(((weight / total)[:, None] * state.mean).to(x.dtype))
    return State(mean, least, total)
