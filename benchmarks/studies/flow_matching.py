"""A network of flow matching, sampled by Euler's method and by this library.

    python -m benchmarks.studies.flow_matching

Independent conditional flow matching (I-CFM, arXiv 2302.00482) in a plain loop of PyTorch, as in
torchcfm's examples: the U-Net of the library with 16 channels, 300 steps of Adam with batches of
128, no labels and no averaged weights. The same network then draws 1000 samples

- by Euler's method with evenly spaced times, the loop of flow matching;
- by :func:`~pfgm.integrations.flow_matching.as_denoiser` and the multistep solver, as a network of
  PFGM++ with D = ∞.

Figures are Fréchet distances to the held-out images, in pixels and in the features of a small
classifier.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import pfgm
from benchmarks.common.models import model
from benchmarks.common.rows import Row, over_seeds
from benchmarks.common.study import Study, run
from benchmarks.studies.flows import Images, Velocity, images_of
from pfgm.common.tensors import over_samples
from pfgm.evaluation import draw_samples
from pfgm.integrations.flow_matching import as_denoiser

DATA = ("digits", "fashion-mnist")
SEEDS = (0, 1, 2)
EVALUATIONS = (5, 10, 20)
STEPS, BATCH, RATE, SAMPLES = 300, 128, 2e-3, 1000
FIGURES = ("pixels", "features")


def loss(net: nn.Module, x1: Tensor) -> Tensor:
    """The loss of I-CFM with sigma = 0: v(t, x_t) learns x1 − x0 on straight lines."""
    x0, t = torch.randn_like(x1), torch.rand(len(x1))
    xt = torch.lerp(x0, x1, over_samples(t, x1))
    error: Tensor = net(t=t, x=xt) - (x1 - x0)
    return error.square().mean()


def trained(train: Tensor, seed: int) -> nn.Module:
    """A network v(t, x), trained from a seed."""
    small = train.shape[-1] <= 8
    sizes = {"multipliers": (1, 2)} if small else {"multipliers": (1, 2, 2), "patch": 2}
    _, network = model("edm", train, width=16, seed=seed, **sizes)
    net = Velocity(network.get_submodule("backbone"))
    adam = torch.optim.Adam(net.parameters(), lr=RATE)
    torch.manual_seed(seed)
    for _ in range(STEPS):
        step_loss = loss(net, train[torch.randint(len(train), (BATCH,))])
        adam.zero_grad()
        step_loss.backward()
        adam.step()
    return net.eval()


@torch.no_grad()
def by_euler(net: nn.Module, x: Tensor, evaluations: int) -> Tensor:
    """Samples from noise x at t = 0, along the velocity in equal steps of time."""
    for t in torch.arange(evaluations) / evaluations:
        x = x + net(t=t.expand(len(x)), x=x) / evaluations
    return x


def by_multistep(net: nn.Module, shape: tuple[int, ...], evaluations: int, seed: int) -> Tensor:
    """Samples of the same network by the multistep solver."""
    flow = pfgm.PoissonFlowPP(shape, D=math.inf)
    options: dict[str, Any] = {"solver": "multistep", "steps": evaluations}
    samples, nfe = draw_samples(flow, as_denoiser(net), SAMPLES, seed=seed, **options)
    assert nfe == evaluations
    return samples


def figures(samples: Tensor, images: Images) -> Row:
    """The distances of samples to the held-out images."""
    samples, held_out, rows = samples.clamp(-1, 1), images.held_out, images.classifier.rows
    return {
        "pixels": pfgm.metrics.frechet_distance(samples, held_out),
        "features": pfgm.metrics.frechet_distance(rows(samples), rows(held_out)),
    }


def measure(options: argparse.Namespace, data: str, seed: int) -> Row:
    """Trains a network, and measures its samples by both ways."""
    images = images_of(data)
    net, shape = trained(images.train, seed), tuple(images.train.shape[1:])
    noise = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(seed))
    return {
        f"{way} {count}": figures(
            by_euler(net, noise, count)
            if way == "euler"
            else by_multistep(net, shape, count, seed),
            images,
        )
        for way in ("euler", "multistep")
        for count in EVALUATIONS
    }


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """Each seed on each set of data."""
    yield from ({"data": data, "seed": seed} for data in DATA for seed in SEEDS)


def means(rows: list[Row]) -> list[Row]:
    """Means over the seeds, a row for each sampler and number of evaluations."""
    flat = [
        {"data": row["data"], "sampler": name, **each}
        for row in rows
        for name, each in row.items()
        if isinstance(each, dict)
    ]
    return over_seeds(flat, ["data", "sampler"], FIGURES)


STUDY = Study("flow_matching", settings, measure, means, threads=1)

if __name__ == "__main__":
    run(STUDY, __doc__)
