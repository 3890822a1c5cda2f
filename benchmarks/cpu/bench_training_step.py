"""A whole training step, with the target from the library or from plain torch.

    pytest benchmarks/cpu/bench_training_step.py --benchmark-only --store

A step is perturbation, target, network, gradients and Adam. One subject is the demo's step (256
digits, 1398 references, its U-Net), the other has the shape of the published CIFAR-10 step and a
small U-Net. ``none`` takes zeros as the target, so it times the rest of the step.

"outside the network" compares the step of :class:`pfgm.training.Trainer`, with the demo's network
and 128 of 1437 digits, with the same network and optimiser alone. The difference is perturbation,
target, loss and moving average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pfgm
from benchmarks.common.posterior_paths import native, torch_path
from benchmarks.common.subjects import Case, photograph_crops
from benchmarks.common.turns import ratio
from benchmarks.cpu.rows import Measured, add_row, measure_paths, replay
from pfgm.backends.reference import normalised_field
from pfgm.training import TrainConfig, Trainer

pytestmark = pytest.mark.benchmark(timer=replay)

TARGETS: dict[str, Callable[[Case], Callable[[], Any]] | None] = {
    "native": native,
    "torch path": torch_path,
    "none": None,
}
SUBJECTS = {"digits": (256, 32), "CIFAR-10 shape": (128, 8)}  # batch size, width of the network


def images_of(subject: str) -> Tensor:
    return pfgm.data.digits().train if subject == "digits" else photograph_crops(4096)


def training_step(target: str, images: Tensor, B: int, width: int) -> Callable[[], Any]:
    flow = pfgm.PoissonFlow.from_data(images)
    torch.manual_seed(0)
    net = pfgm.networks.UNet(flow.shape, width=width)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    references = images.flatten(1)
    compute = TARGETS[target]

    def run() -> None:
        chosen = torch.randint(0, len(images), (B,), generator=generator)
        x, z = flow.perturb(images[chosen], generator)
        field_x, field_z = torch.zeros_like(x), torch.zeros_like(z)
        if compute is not None:
            mean, _ = compute(Case(x.flatten(1), z, references))()
            field_x, field_z = normalised_field(x.flatten(1) - mean, z, flow.gamma)
            field_x = field_x.view_as(x)
        predicted_x, predicted_z = net(x, z)
        loss = (predicted_x - field_x).square().sum() + (predicted_z - field_z).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


@functools.lru_cache(maxsize=1)
def measure(subject: str) -> Measured:
    images = images_of(subject)
    B, width = SUBJECTS[subject]
    paths = {target: training_step(target, images, B, width) for target in TARGETS}
    return measure_paths(paths, 9, {"B, M, N": (B, *images.flatten(1).shape)})


def whole_step(images: Tensor, B: int) -> Callable[[], Any]:
    flow = pfgm.PoissonFlow.from_data(images)
    config = TrainConfig(batch_size=B, references=len(images))
    trainer = Trainer(flow, pfgm.networks.UNet(flow.shape), images, config, progress=False)

    def run() -> None:
        trainer._train_step()
        trainer.step += 1

    return run


def network_step(images: Tensor, B: int) -> Callable[[], Any]:
    flow = pfgm.PoissonFlow.from_data(images)
    net = pfgm.networks.UNet(flow.shape)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-4)
    x, z = flow.perturb(images[:B], torch.Generator().manual_seed(0))

    def run() -> None:
        field_x, field_z = net(x, z)
        (field_x.square().sum() + field_z.square().sum()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return run


STEPS = {"whole step": whole_step, "network alone": network_step}


@functools.lru_cache(maxsize=1)
def measure_outside() -> Measured:
    digits = pfgm.data.digits()
    images = torch.cat([digits.train, digits.held_out])[:1437]
    paths = {name: step(images, 128) for name, step in STEPS.items()}
    measured = measure_paths(paths, 15, {"B, M, N": (128, 1437, 64)}, warm=True)
    outside = 1 - 1 / ratio(measured.seconds, "whole step", "network alone")
    return measured._replace(facts=measured.facts | {"share outside the network": outside})


@pytest.mark.parametrize("path", STEPS)
def bench_outside_the_network(path: str, benchmark: Any) -> None:
    if benchmark.disabled:
        benchmark(STEPS[path](pfgm.data.digits().train[:64], 4))
        return
    add_row(benchmark, "training step, outside the network", path, measure_outside())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("subject", SUBJECTS)
def bench_training_step(subject: str, target: str, benchmark: Any) -> None:
    if benchmark.disabled:
        benchmark(training_step(target, images_of(subject)[:64], 4, SUBJECTS[subject][1]))
        return
    add_row(benchmark, f"training step, {subject}", target, measure(subject))
