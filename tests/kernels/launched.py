"""Prints, as JSON, what is wrong with the launches of the CUDA kernels on some GPUs: kernels that
problems of many sizes take, and no trial of pfgm check takes; distances that the two passes compute
in different launches. Kernels are chosen and launched in the executor of PTX, but do not run.

    PFGM_PTX=FOLDER python tests/kernels/launched.py
"""

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common import executor
from pfgm.backends import trials
from pfgm.backends.backend import BACKENDS
from pfgm.backends.trials import TRIALS, Data, Place, Trial
from pfgm.core.problems import State, Upstream

GPUS = {80: 108, 86: 84, 89: 128, 90: 132, 120: 170}  # capability → multiprocessors
POINTS = (1, 3, 20, 40, 66, 97, 130, 300, 590, 1020)
REFERENCES = (1, 40, 300, 1100, 2100, 4100, 20000)
FEATURES = (1, 31, 36, 100, 484, 1030, 2070, 3076)
WIDTHS = (1, 31, 36, 97, 784, 1040, 1041, 3072, 6150, 8200, 20000)
MOST = 1 << 28  # values of references

CPU = torch.device("cpu")
PLACE = Place(BACKENDS["native"], CPU, torch.float32)


def values(B: int, M: int, N: int, D: float = 1.0, dtype: torch.dtype = torch.float32) -> Data:
    """Uninitialised: no kernel reads them."""
    y, rows = torch.empty(M, N, dtype=dtype), torch.empty(B).double()
    return Data(torch.empty(B, N), y, rows, torch.empty(B, N), rows, D)


def compute(B: int, M: int, N: int, dtype: torch.dtype, D: float) -> None:
    """A mean, also as a difference, and its gradients."""
    data = values(B, M, N, D, dtype)
    trials._difference(PLACE, data)
    trials._mean(PLACE, data, needs=(True, M * N < 1 << 24, True))


def many_sizes() -> None:
    types = torch.float32, torch.bfloat16, torch.float16, torch.uint8
    for B, M, N in itertools.product(POINTS, REFERENCES, FEATURES):
        if M * N <= MOST and B * N <= MOST:
            for dtype, D in itertools.product(types, (1.0, math.inf)):
                compute(B, M, N, dtype, D)
    for features in WIDTHS:
        trials._normalised(PLACE, values(5, 1, features))
        trials._steps(PLACE, values(5, 1, features))


@functools.cache
def trials_with_data() -> list[Trial]:
    """Without graphs, as nothing runs."""
    return [
        trial._replace(
            data=functools.partial(Data._make, trial.data()),
            run=None if trial.run is trials._in_a_graph else trial.run,
        )
        for trial in TRIALS.values()
        if trial.references != torch.float64
    ]


def all_trials() -> None:
    for trial in trials_with_data():
        trial.results(PLACE)


def kernels(machine: executor.Executor, run: Callable[[], None]) -> set[str]:
    """The names, in the PTX, of the kernels that were launched."""
    machine.launches()
    run()
    return {launch.entry for launch in machine.launches()}


# In the last three the passes have different numbers of parts of lists on an H100.
SLICED = [
    (130, 900, 2048),
    (300, 4100, 1030),
    (300, 1265, 4096),
    (300, 2200, 4096),
    (650, 2200, 2048),
]


def differing_passes(machine: executor.Executor) -> list[str]:
    """Problems whose distances both passes do not compute in the same launch, of rows that begin at
    any address: what the forward pass keeps would have other bits than what is computed again."""

    def first_distances() -> tuple[str, tuple[int, int, int]]:
        launches = machine.launches()
        return next((each.entry, each.grid) for each in launches if each.name == "distances")

    differing = []
    for B, M, N in SLICED:
        data = values(B, 1, N)._replace(references=torch.empty(M, N + 1)[:, 1:])
        problem = data.problem
        machine.launches()
        mean, _, nearest, total = PLACE.backend.posterior_mean(problem)
        forward = first_distances()
        given = State(mean, nearest, total), Upstream(data.G, data.g), (True, False, True)
        PLACE.backend.posterior_mean_backward(problem, *given)
        if first_distances() != forward:
            differing.append(f"distances of {B} × {M} × {N}")
    return differing


def main() -> None:
    assert executor.FOLDER is not None
    machine = executor.Executor(executor.FOLDER)
    machine.set(skip=1)
    wrong = {}
    with (
        executor.in_place_of_a_gpu(executor.FOLDER),
        mock.patch.object(Place, "gpu", CPU),
    ):
        for capability, multiprocessors in GPUS.items():
            machine.device(capability, multiprocessors)
            reached = kernels(machine, all_trials)
            assert reached, "nothing was launched"
            wrong[capability] = sorted(kernels(machine, many_sizes) - reached)
            wrong[capability] += differing_passes(machine)
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
