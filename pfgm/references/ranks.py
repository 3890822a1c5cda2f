"""What the processes that hold parts of the references tell one another (torch.distributed)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "total"]

_DTYPES = (torch.float32, torch.float64)


def total(
    values: Tensor,
    group: dist.ProcessGroup | None,
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> Tensor:
    """The sum, or another reduction, over the processes of a few values, on the CPU."""
    # A group of NCCL alone takes no tensors on the CPU.
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    shared = values.to(device, copy=True)
    dist.all_reduce(shared, operation, group=group)
    return shared.cpu()


class Ranks:
    """The exchange of :mod:`pfgm.references.merging` between the processes of a group.

    Queries are x (B, N).

    B may differ from process to process. Made by all of them together, as every call on it.

    Raises:
        ValueError: the processes have queries of another N or dtype; all of them raise.
    """

    def __init__(self, group: dist.ProcessGroup | None, x: Tensor) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        mine = [len(x), x.shape[1], _DTYPES.index(x.dtype)]
        all_of_them = self._all(torch.tensor(mine, device=x.device))
        self._counts, features, dtypes = torch.stack(all_of_them).T.tolist()
        if len(set(features)) > 1 or len(set(dtypes)) > 1:
            given = [f"{n} in {_DTYPES[d]}" for n, d in zip(features, dtypes, strict=True)]
            raise ValueError(
                f"x has {', '.join(given)} values a row in processes 0 to {self.size - 1}; all "
                "must have the same."
            )

    def _all(self, values: Tensor) -> list[Tensor]:
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values.contiguous(), group=self._group)
        return found

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (B, ...) of all processes, one after the other in the order of their ranks."""
        # A collective wants equal sizes: as many rows as the longest has.
        padded = rows.new_zeros(max(self._counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        pairs = zip(self._all(padded), self._counts, strict=True)
        return torch.cat([found[:count] for found, count in pairs])

    def own(self, rows: Tensor) -> Tensor:
        """Of gathered rows, those of this process."""
        parts: tuple[Tensor, ...] = rows.split(self._counts)
        return parts[self._rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of values that all of them have."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def least(self, values: Tensor) -> Tensor:
        """The minimum over the processes of values that all of them have."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.contiguous().clone()
        dist.all_reduce(values, operation, group=self._group)
        return values
