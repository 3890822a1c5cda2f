"""Sampling with the exact field of the digits: how near to a digit the flow ends.

pytest benchmarks/bench_sampling.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pfgm

SAMPLES = 1000


@pytest.mark.parametrize(
    ("solver", "steps"), [("euler", 20), ("heun", 10), ("multistep", 20), ("rk45", 1)]
)
@pytest.mark.parametrize("schedule", ["log", "rho"])
def bench_empirical_sampling(solver: str, steps: int, schedule: str, benchmark: Any) -> None:
    digits = pfgm.data.digits().train
    flow = pfgm.PoissonFlow.from_data(digits)
    net = flow.empirical(digits)

    def sample() -> tuple[torch.Tensor, int]:
        return flow.sample(
            net,
            SAMPLES,
            solver=solver,
            steps=steps,
            schedule=schedule,
            generator=torch.Generator().manual_seed(0),
            return_nfe=True,
        )

    benchmark.group = "empirical sampling, digits"
    samples, evaluations = benchmark.pedantic(sample, rounds=1)
    distance = pfgm.metrics.nearest_distance(samples, digits)
    within = float((distance < 0.02).double().mean())
    benchmark.extra_info |= {
        "evaluations": evaluations,
        "within 0.02": within,
        "largest distance": float(distance.max()),
    }
    if (solver, steps) == ("euler", 20):
        assert within >= 0.99
