"""Steps of the ODE by the library and in torch: as published, each intermediate in memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pfgm
from benchmarks.common.posterior_paths import GAMMA
from pfgm.backends.reference import normalised_field

Z_EXP = 5.0  # below this level the sampler replaces the network's field_z


class Points(NamedTuple):
    """Points (B, N), a network's field there, and the solver's history (B, N)."""

    x: Tensor
    field_x: Tensor
    field_z: Tensor
    history: Tensor


class Step(NamedTuple):
    """One step of a solver, from level z to z_next."""

    solver: str
    z: float
    z_next: float
    z_previous: float


def points(B: int, N: int, z: float) -> Points:
    """Points around random data at level z."""
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(16, N, generator=generator) * 2 - 1
    x = data[torch.arange(B) % 16] + z * torch.randn(B, N, generator=generator)
    mean = data[torch.arange(B) % 16]
    field_x, field_z = normalised_field(x - mean, torch.full((B,), z), GAMMA)
    history = mean + 0.01 * torch.randn(B, N, generator=generator)
    return Points(x, field_x, field_z, history)


def our_step(step: Step, backend: str, at: Points) -> Any:
    """The step by the library, in place."""
    solver, z, z_next, z_previous = step
    field = pfgm.Field(at.field_x, at.field_z)
    if solver == "euler":
        return pfgm.euler_step(at.x, field, z, z_next, out=at.x, backend=backend)
    if solver == "heun":
        return pfgm.heun_step(at.history, at.x, field, z, z_next, out=at.x, backend=backend)
    return pfgm.multistep_step(
        at.x,
        field,
        z,
        z_next,
        at.history,
        z_previous,
        out=at.x,
        mean_out=at.history,
        backend=backend,
    )


def slope(x: Tensor, field_x: Tensor, field_z: Tensor, z: float) -> Tensor:
    """z dx/dz at points (B, N).

    The level is a number here; the published code asks the device for it at every step.
    """
    if z < Z_EXP:
        root = math.sqrt(x.shape[1])
        norm = field_x.norm(p=2, dim=1) / root
        distance = GAMMA * norm / (1 - norm)
        distance = torch.sqrt(distance**2 + z**2)
        field_z = -root * torch.ones_like(field_z) * z / (distance + GAMMA)
    v = torch.cat([field_x, field_z[:, None]], dim=1)
    return z * v[:, :-1] * (1 / (v[:, -1] + 1e-5))[:, None]


def published_step(step: Step, at: Points) -> Any:
    """The published Euler or Heun step, or the multistep formula in torch."""
    x, field_x, field_z, history = at
    log_step = math.log(step.z_next / step.z)
    if step.solver == "euler":
        return x + log_step * slope(x, field_x, field_z, step.z)
    if step.solver == "heun":
        first = (x - history) / log_step
        second = slope(x, field_x, field_z, step.z_next)
        return history + 0.5 * log_step * (first + second)
    mean = x - slope(x, field_x, field_z, step.z)
    weight = -log_step / (2 * math.log(step.z_previous / step.z))
    toward = mean * (1 + weight) - history * weight
    return toward + (step.z_next / step.z) * (x - toward), mean


def step_errors(step: Step, backend: str, at: Points) -> dict[str, float]:
    """The largest relative error of a row."""
    exact = our_step(step, "reference", Points(*(t.double() for t in at)))
    result = our_step(step, backend, Points(*(t.clone() for t in at)))
    if step.solver == "multistep":
        exact, result = exact[0], result[0]
    difference = (result.double() - exact).norm(dim=1) / exact.norm(dim=1)
    return {"points": float(difference.max())}
