"""How long steps take, which decides their precision, and how many fit into minutes of training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import torch
from torch import nn

from ..flows.batched_sampling import Compute, draw_prior, sample_in_batches
from ..flows.flow import Flow
from ..networks.registry import label_count
from .processes import Processes

_TURNS = 3
_LONG = 2.0  # seconds of a step that is timed only once
_FASTER = 1.2  # how much faster bfloat16 must be, as it rounds more
_SHORT = 0.02  # seconds of a step from which on it may be used; less is noise, and soon done
BFLOAT16_CAPABILITY = (8, 0)  # of GPUs with fast bfloat16
_TIMED_ROWS = 32  # samples for which an evaluation of the network is timed, eight times
_LEAST_SHARE = 50  # times as many rows must be evaluated in all, or timing costs what it saves


def seconds_of(
    steps: Sequence[Callable[[], object]],
    processes: Processes,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each of these steps, which take turns after one call that is not timed.

    The clock of the first process decides, so all processes call a step equally often.

    >>> now = iter(range(100))
    >>> seconds_of([lambda: None], Processes(), clock=lambda: next(now) / 2)
    [0.5]
    """

    def seconds(step: Callable[[], object]) -> float:
        started = clock()
        step()
        return processes.of_leader(clock() - started)

    longest = max([seconds(step) for step in steps])  # the first call is slower: it allocates
    turns = [[seconds(step) for step in steps] for _ in range(1 if longest > _LONG else _TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def bfloat16_pays(seconds: Sequence[float]) -> bool:
    """Whether bfloat16 is to be used, from the seconds of a step in float32 and in bfloat16.

    >>> bfloat16_pays([2.09, 1.06]), bfloat16_pays([1.0, 0.9]), bfloat16_pays([0.002, 0.001])
    (True, False, False)
    """
    float32, bfloat16 = seconds
    return float32 >= max(_FASTER * bfloat16, _SHORT)


def compute_of(
    flow: Flow,
    network: nn.Module,
    evaluations: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Compute, str]:
    """The precision in which sampling is fast, and why in words, by the rule of training.

    Args:
        evaluations: the rows that the network is to be evaluated at, in all. A few are soon done.
    """
    if len(flow.shape) == 1:  # the last digits of numbers may matter
        return "float32", ""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY:
        return "bfloat16", "the GPU is fast with it"
    if device.type != "cpu" or evaluations < _LEAST_SHARE * _TIMED_ROWS:
        return "float32", ""
    classes = label_count(network)
    labels = torch.zeros(_TIMED_ROWS, dtype=torch.int64, device="cpu") if classes else None
    step = partial(
        sample_in_batches,
        flow,
        network,
        draw_prior(flow, _TIMED_ROWS, seed=0),
        batch_size=_TIMED_ROWS,
        labels=labels,
        solver="euler",
        steps=1,
    )
    steps = [partial(step, compute=compute) for compute in get_args(Compute)]
    seconds = seconds_of(steps, Processes(), clock)
    chosen: Compute = "bfloat16" if bfloat16_pays(seconds) else "float32"
    return chosen, f"bfloat16 is {seconds[0] / seconds[1]:.1f} times as fast as float32"
