"""Bits per dimension of held-out digits under the training digits, blurred.

    python examples/likelihood.py

The exact flow of the training digits has a known density at each level: normal distributions of
that width around them. So no training is needed, and what the ODE says is seen beside the truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pfgm

LEVELS = 17  # a digit's values are 0 … 16


def dequantised(images: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise over each level: only then have whole numbers a density."""
    k = (images + 1) * 8
    return 2 * (k + torch.rand(k.shape, generator=generator)) / LEVELS - 1


def bits(nats: Tensor) -> Tensor:
    return -nats / (64 * math.log(2)) + math.log2(LEVELS / 2)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    digits = pfgm.data.digits()
    train = dequantised(digits.train, generator)
    held_out = dequantised(digits.held_out, generator)[:64]

    print("bits per dimension of held-out digits (± standard error of the estimated divergence)")
    print("width   ODE     with the true prior   exact    evaluations")
    for width in (0.8, 0.4, 0.2):
        flow = pfgm.PoissonFlowPP((1, 8, 8), D=math.inf, sigma_min=width)

        def mixture(x: Tensor, sigma: float) -> Tensor:
            return pfgm.log_density(x, train, sigma=sigma, D=math.inf)

        net = flow.empirical(train)
        ode = flow.log_likelihood(net, held_out, levels=LEVELS, generator=generator)
        # The way to the latents is the same: only the density at the first level is another.
        true = ode.nats + mixture(ode.latent, flow.first_level)
        true -= pfgm.flows.likelihood.centred_prior(ode.latent, flow.first_level, flow.D)
        exact = mixture(held_out, width)
        error = bits(true) - bits(exact)
        deviation = error.std() / math.sqrt(len(error))
        print(
            f"{width:5.2f}   {ode.bits_per_dim.mean():.4f}  {bits(true).mean():.4f}"
            f" ± {deviation:.4f}       {bits(exact).mean():.4f}   {ode.nfe}"
        )


if __name__ == "__main__":
    main()
