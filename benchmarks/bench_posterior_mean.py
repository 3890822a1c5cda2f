"""The posterior mean on real images: time beside plain torch, error against float64.

    pytest benchmarks/bench_posterior_mean.py --benchmark-only

Queries are perturbed as in training (spec: PFGM, algorithm 2). ``extra_info`` of each row holds its
worst errors over the rows of the batch, in the terms of the accuracy contract: the mean relative to
the largest norm of a reference, the field relative to √N, the log-sum-exp relative to its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pfgm
from pfgm.functional import normalised_field

GAMMA = 5.0


class Case(NamedTuple):
    """Perturbed queries, their z, and references, all flat."""

    x: Tensor
    z: Tensor
    references: Tensor


def digits_case() -> Case:
    """The demo's training step: 256 queries, 1398 references, 64 features."""
    images = pfgm.data.digits().train
    return _perturbed(images, 256)


def cifar_shape_case() -> Case:
    """The published step for CIFAR-10: 128 queries, 4096 references, 3072 features.

    Digits enlarged to 3 × 32 × 32, in three positions to make up the number.
    """
    images = F.interpolate(pfgm.data.digits().train, size=(32, 32), mode="bilinear")
    shifted = [images.roll(shift, dims=3) for shift in (0, 2, -2)]
    return _perturbed(torch.cat(shifted)[:4096].expand(-1, 3, -1, -1).contiguous(), 128)


def _perturbed(images: Tensor, queries: int) -> Case:
    flow = pfgm.PoissonFlow.from_data(images)
    chosen = torch.linspace(0, len(images) - 1, queries).long()
    x, z = flow.perturb(images[chosen], torch.Generator().manual_seed(0))
    return Case(x.flatten(1), z, images.flatten(1))


def torch_path(case: Case) -> tuple[Tensor, Tensor]:
    """GEMM, softmax, GEMM: the fastest way in plain torch, and the baseline to beat."""
    x, z, y = case
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    scores = -(x.shape[1] + 1) / 2 * torch.log(squared + z[:, None] ** 2)
    return scores.softmax(1) @ y, scores.logsumexp(1)


def library(backend: str) -> Callable[[Case], tuple[Tensor, Tensor]]:
    def run(case: Case) -> tuple[Tensor, Tensor]:
        return pfgm.posterior_mean(
            case.x, case.references, r=case.z, return_logsumexp=True, backend=backend
        )

    return run


PATHS = {
    "native": library("native"),
    "reference": library("reference"),
    "torch path": torch_path,
}
CASES = {"digits": digits_case, "CIFAR-10 shape": cifar_shape_case}


def errors(case: Case, mean: Tensor, logsumexp: Tensor) -> dict[str, float]:
    """Worst row against float64, as the accuracy contract counts."""
    x, z, y = (t.double() for t in case)
    true_mean, true_lse = pfgm.posterior_mean(x, y, r=z, return_logsumexp=True, backend="reference")
    field = torch.cat([*_field(x, z, mean.double())], 1)
    true_field = torch.cat([*_field(x, z, true_mean)], 1)
    return {
        "mean": float((mean - true_mean).norm(dim=1).max() / y.norm(dim=1).max()),
        "field": float((field - true_field).norm(dim=1).max() / math.sqrt(x.shape[1])),
        "logsumexp": float(((logsumexp - true_lse).abs() / true_lse.abs().clamp(min=1)).max()),
    }


def _field(x: Tensor, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    field_x, field_z = normalised_field(x, z, mean, GAMMA)
    return field_x, field_z[:, None]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", CASES)
def bench_posterior_mean(shape: str, path: str, benchmark: Any) -> None:
    case = CASES[shape]()
    benchmark.group = f"posterior_mean {shape}"
    mean, logsumexp = benchmark.pedantic(PATHS[path], args=(case,), rounds=7, warmup_rounds=1)
    found = errors(case, mean, logsumexp)
    benchmark.extra_info |= {
        "B, M, N": (*case.x.shape[:1], *case.references.shape),
        "threads": torch.get_num_threads(),
        "errors": found,
    }
    if path == "native":
        assert max(found.values()) <= 2e-5
