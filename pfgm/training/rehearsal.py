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
_BFLOAT16_CAPABILITY = (8, 0)  # of GPUs with fast bfloat16
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


def fastest_precision(
    shape: Sequence[int],
    device: torch.device,
    rehearsal: Callable[[], Callable[[Compute], object]],
    processes: Processes,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Compute, list[float]]:
    """The precision of the fastest steps; and their seconds in each, if they had to be timed.

    On a CPU steps are timed, as some emulate bfloat16; of a GPU the capability tells. Rows of
    numbers, whose last digits may matter, stay in float32.

    Args:
        shape: of a sample.
        rehearsal: makes the function that is timed, which takes a precision.
    """
    if len(shape) > 1 and device.type == "cpu":
        step = rehearsal()
        steps = [partial(step, precision) for precision in get_args(Compute)]
        seconds = seconds_of(steps, processes, clock)
        return "bfloat16" if bfloat16_pays(seconds) else "float32", seconds
    fast = len(shape) > 1 and device.type == "cuda"
    fast = fast and torch.cuda.get_device_capability(device) >= _BFLOAT16_CAPABILITY
    return "bfloat16" if fast else "float32", []


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
    if device.type == "cpu" and evaluations < _LEAST_SHARE * _TIMED_ROWS:
        return "float32", ""
    classes = label_count(network)
    labels = torch.zeros(_TIMED_ROWS, dtype=torch.int64, device="cpu") if classes else None

    def step(compute: Compute) -> object:
        prior, how = draw_prior(flow, _TIMED_ROWS, seed=0), {"solver": "euler", "steps": 1}
        return sample_in_batches(
            flow, network, prior, batch_size=_TIMED_ROWS, labels=labels, compute=compute, **how
        )

    chosen, seconds = fastest_precision(flow.shape, device, lambda: step, Processes(), clock)
    if seconds:
        return chosen, f"bfloat16 is {seconds[0] / seconds[1]:.1f} times as fast as float32"
    return chosen, "the GPU is fast with it" if chosen == "bfloat16" else ""
