"""The times of :func:`pfgm.backends.check`: backends and what they have to beat."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from .backend import BACKENDS
from .trials import SIZES, Place, data_of

_TIMING = 2.0  # seconds


def plain_mean(x: Tensor, references: Tensor, z: Tensor) -> Tensor:
    """The mean in plain torch: matrix product, softmax, matrix product."""
    squared = x.square().sum(1)[:, None] + references.square().sum(1) - 2 * x @ references.T
    scores = -(x.shape[1] + 1) / 2 * torch.log(squared + z[:, None] ** 2)
    return scores.softmax(1) @ references


def seconds_of(size: str, name: str, device: torch.device) -> list[float]:
    """Seconds of a call of a backend or contender, and of the backend torch, in turns. TF32, which
    would change what that computes, is timed alone."""
    data = data_of(*SIZES[size]).to(Place(BACKENDS["torch"], device, torch.float32))
    plain, names = plain_mean, [name, "torch"]
    if name == "compiled TF32":
        torch.backends.cuda.matmul.allow_tf32 = True
        plain, names = torch.compile(plain_mean), [name]

    def timed(name: str, count: int = 1) -> float:
        started = time.perf_counter()
        for _ in range(count):
            if name in BACKENDS:
                mean = BACKENDS[name].posterior_mean(data.problem)[0]
            else:
                mean = plain(data.x, data.references, data.sigma.float())
        mean[0, 0].item()  # waits for the device
        return (time.perf_counter() - started) / count

    counts = [1 + int(0.02 / min(timed(each), timed(each))) for each in names]
    ends = time.perf_counter() + _TIMING
    turns: list[list[float]] = []
    while not turns or (time.perf_counter() < ends and len(turns) < 50):
        turns.append([timed(each, count) for each, count in zip(names, counts, strict=True)])
    return [statistics.median(times) for times in zip(*turns, strict=True)]
