"""Samplers of diffusers for the score models, with the settings of its pipelines and the papers.

A VE network gives the score (mean − x)/σ², a VP network the noise (x − mean)/σ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfgm.flows import Flow, Network
from pfgm.training.model_files import Loaded

Sampler = Callable[[Flow, Network, int, int, torch.Generator], tuple[Tensor, int]]
"""(flow, network, number of samples, steps, generator) → samples (n, *S) and evaluations."""

_CHAIN = 1000  # steps of VP's chain, with β from 1e-4 to 0.02: the ends of VP's β(t)/1000


def predictor_corrector(
    flow: Flow, network: Network, n: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """VE: reverse diffusion and Langevin steps in turn (arXiv 2011.13456, algorithm 2)."""
    from diffusers import ScoreSdeVeScheduler

    scheduler = ScoreSdeVeScheduler(
        num_train_timesteps=steps, sigma_min=flow.last_level, sigma_max=flow.first_level
    )
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    x = _normal(flow, n, generator) * scheduler.init_noise_sigma
    mean = x
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=True):
        score = (flow.denoise(network, x, sigma) - x) / sigma**2
        x = scheduler.step_correct(score, x, generator=generator).prev_sample
        score = (flow.denoise(network, x, sigma) - x) / sigma**2
        moved = scheduler.step_pred(score, t, x, generator=generator)
        x, mean = moved.prev_sample, moved.prev_sample_mean
    return mean, 2 * steps


def ddpm(
    flow: Flow, network: Network, n: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """VP: ancestral sampling (arXiv 2006.11239, algorithm 2)."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(_CHAIN, timestep_spacing="trailing")
    return _along_chain(scheduler, flow, network, n, steps, generator, {"generator": generator})


def ddim(
    flow: Flow, network: Network, n: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """VP: the deterministic sampler of arXiv 2010.02502.

    Without clipping, the default of diffusers: a step from a clipped mean and the predicted noise
    leaves the ODE.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(_CHAIN, timestep_spacing="trailing", clip_sample=False)
    return _along_chain(scheduler, flow, network, n, steps, generator, {})


def _along_chain(
    scheduler: Any,
    flow: Flow,
    network: Network,
    n: int,
    steps: int,
    generator: torch.Generator,
    options: dict[str, Any],
) -> tuple[Tensor, int]:
    scheduler.set_timesteps(steps)
    x = _normal(flow, n, generator)
    for t in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[t]  # x = √ᾱ (data + σ noise)
        sigma = float((1 / kept - 1).sqrt())
        x = scheduler.step(_noise(flow, network, x / kept.sqrt(), sigma), t, x, **options)[0]
    return x, len(scheduler.timesteps)


def euler(
    flow: Flow, network: Network, n: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """VP: Euler's method on the ODE in σ, over the levels of the chain."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        _CHAIN, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    x = _normal(flow, n, generator) * scheduler.init_noise_sigma
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        scheduler.scale_model_input(x, t)  # required by step(); the network scales its input itself
        x = scheduler.step(_noise(flow, network, x, sigma), t, x)[0]
    return x, len(scheduler.timesteps)


def _noise(flow: Flow, network: Network, x: Tensor, sigma: float) -> Tensor:
    return (x - flow.denoise(network, x, sigma)) / sigma


def _normal(flow: Flow, n: int, generator: torch.Generator) -> Tensor:
    """Standard normal points (n, *S)."""
    return torch.randn(n, *flow.shape, generator=generator)


@torch.no_grad()
def draw(
    sampler: Sampler, loaded: Loaded, n: int, steps: int, *, seed: int, batch: int
) -> tuple[Tensor, int]:
    """Samples (n, *S) of a peer, and the evaluations of the network."""
    generator = torch.Generator().manual_seed(seed)
    parts, evaluations = [], 0
    for rows in torch.arange(n).split(batch):
        part, evaluations = sampler(*loaded, len(rows), steps, generator)
        parts.append(part)
    return torch.cat(parts), evaluations


PEERS: dict[str, tuple[str, Sampler]] = {
    "VE, predictor–corrector": ("VE", predictor_corrector),
    "VP, DDPM": ("VP", ddpm),
    "VP, DDIM": ("VP", ddim),
    "VP, Euler": ("VP", euler),
}
"""Name of a sampler → the method whose network it takes, and the sampler."""

SDE = ("VE, predictor–corrector", "VP, DDPM")


def evaluations_of(name: str, steps: int) -> int:
    """The network's evaluations in so many steps of a sampler."""
    return 2 * steps if name == "VE, predictor–corrector" else steps
