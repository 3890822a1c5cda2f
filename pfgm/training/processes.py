"""What the processes of a training run agree on (torch.distributed); trivial where there is one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ProcessLost", "Processes", "joined", "lost"]

_PAUSE = 0.2  # seconds


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer."""


@contextmanager
def joined(device: torch.device, timeout: float = 600.0) -> Iterator[torch.device]:
    """Joins the processes that torchrun has started, and leaves them at the end.

    Without torchrun, and where torch.distributed is initialised already, nothing is done.

    Args:
        device: what to compute on; "cuda" becomes this process's own GPU.
        timeout: seconds after which a process that does not answer is given up; more than an
            evaluation by the first takes.

    Yields:
        This process's device.

    Raises:
        ValueError: timeout is not between 0.001 and 1e8.
    """
    if (
        not 0.001 <= timeout <= 1e8
    ):  # beyond, what takes it counts in whole milliseconds, or is full
        raise ValueError(f"timeout is {timeout!r}; allowed are 0.001 to 1e8 seconds.")
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Gloo too, for what the processes agree on: that must not make anyone wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        dist.destroy_process_group()
        # Gloo's threads free a collective's tensors after the collective has ended, and need the
        # interpreter for it. They outlive the group; one that is late finds an interpreter that
        # shuts down, and aborts the process. A pause lets them finish.
        time.sleep(_PAUSE)


class Processes:
    """The processes that train together: all of torch.distributed, or this one alone.

    >>> processes = Processes()
    >>> processes.size, processes.leads, processes.any(False), processes.mean(1.5)
    (1, True, False, 1.5)
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1 and "cpu:" not in dist.get_backend_config():
            self._group = dist.new_group(backend="gloo")

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and shows things."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any of the processes says so."""
        return self._reduced(float(flag), dist.ReduceOp.MAX) > 0

    def mean(self, value: float) -> float:
        """The average over the processes."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.size

    def least(self, value: float) -> float:
        """The smallest over the processes."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def _reduced(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(shared, operation, group=self._group)
        return float(shared)

    def share(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes; all start with the first's."""
        if self.size == 1:
            return network
        device = next(network.parameters()).device
        return DistributedDataParallel(
            network, device_ids=None if device.type == "cpu" else [device.index]
        )


@contextmanager
def lost(processes: Processes) -> Iterator[None]:
    """Says in one sentence that another process is gone, where that made a collective fail."""
    try:
        yield
    except RuntimeError as error:
        if processes.size == 1 or not _of_communication(error):
            raise
        reason = " ".join(str(error).split())
        raise ProcessLost(
            f"another process of the run has ended or does not answer ({reason}); the run can be "
            "resumed from its last checkpoint."
        ) from error


def _of_communication(error: RuntimeError) -> bool:
    # Gloo raises plain RuntimeErrors that begin with the file in its sources.
    return isinstance(error, dist.DistError) or "gloo" in str(error)
