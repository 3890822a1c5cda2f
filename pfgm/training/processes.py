"""The processes of a training run (torch.distributed), one or more."""

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

_LEAVING_SECONDS = 0.2  # pause after the process group is destroyed


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer."""


@contextmanager
def joined(device: torch.device, timeout: float = 600.0) -> Iterator[torch.device]:
    """Joins the processes that torchrun has started, and leaves them at the end.

    It does nothing without torchrun, or where torch.distributed is initialised already.

    Args:
        device: the device to compute on; "cuda" becomes the GPU of this process.
        timeout: seconds to wait for another process before the run ends. It must be longer than an
            evaluation by the first process.

    Yields:
        The device of this process.

    Raises:
        ValueError: timeout is not between 0.001 and 1e8.
    """
    # torch counts the timeout in milliseconds, as an integer of limited size.
    if not 0.001 <= timeout <= 1e8:
        raise ValueError(f"timeout must be from 0.001 to 1e8 seconds, got {timeout!r}.")
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Flags and averages go through Gloo, so that the host does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        dist.destroy_process_group()
        # Gloo's threads free the tensors of a collective after it has ended, and even after the
        # group is destroyed. If the interpreter is shutting down by then, they abort the process
        # (torch 2.13). The pause lets them finish.
        time.sleep(_LEAVING_SECONDS)


class Processes:
    """The processes that train together: those of torch.distributed, or this one alone.

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
        """Whether this is the first process, which writes files and shows progress."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in any of the processes."""
        return self._reduce(float(flag), dist.ReduceOp.MAX) > 0

    def mean(self, value: float) -> float:
        """The average of the value over the processes."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.size

    def least(self, value: float) -> float:
        """The smallest value of the processes."""
        return self._reduce(value, dist.ReduceOp.MIN)

    def of_leader(self, value: float) -> float:
        """The value of the first process, by which all decide alike."""
        return self._reduce(value if self.leads else 0.0, dist.ReduceOp.SUM)

    def _reduce(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device="cpu")
        dist.all_reduce(shared, operation, group=self._group)
        return float(shared)

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes.

        All processes start with the parameters of the first one.
        """
        if self.size == 1:
            return network
        device = next(network.parameters()).device
        return DistributedDataParallel(
            network, device_ids=None if device.type == "cpu" else [device.index]
        )


@contextmanager
def reports_process_lost(processes: Processes) -> Iterator[None]:
    """Raises ProcessLost where a collective fails because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        # Gloo raises plain RuntimeErrors; their messages begin with the path of its source file.
        collective = isinstance(error, dist.DistError) or "gloo" in str(error)
        if processes.size == 1 or not collective:
            raise
        reason = " ".join(str(error).split())
        raise ProcessLost(
            f"another process of the run has ended or does not answer ({reason}); the run can be "
            "resumed from its last checkpoint."
        ) from error
