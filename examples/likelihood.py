"""Bits per dimension of held-out digits under noisy training digits.

    python examples/likelihood.py

The exact flow of the training digits needs no training, and its density at each level sigma is
known: a mixture of normal distributions of that sigma around the training digits. So the result of
the ODE can be compared with the exact value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pfgm

GREY_LEVELS = 17  # the values of a digit are 0 … 16


def dequantised(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images with uniform noise, because whole numbers have no density."""
    k = (images + 1) * 8
    return 2 * (k + torch.rand(k.shape, generator=generator)) / GREY_LEVELS - 1


def bits(nats: Tensor) -> Tensor:
    """Bits per dimension of images with 64 pixels."""
    return -nats / (64 * math.log(2)) + math.log2(GREY_LEVELS / 2)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    digits = pfgm.data.digits()
    train = dequantised(digits.train, generator)
    held_out = dequantised(digits.held_out, generator)[:64]

    print("bits per dimension of held-out digits (± standard error of the estimated divergence)")
    print("sigma   ODE     with the true prior   exact    evaluations")
    for sigma_min in (0.8, 0.4, 0.2):
        flow = pfgm.PoissonFlowPP((1, 8, 8), D=math.inf, sigma_min=sigma_min)

        def mixture(x: Tensor, sigma: float) -> Tensor:
            return pfgm.log_density(x, train, sigma=sigma, D=math.inf)

        net = flow.empirical(train)
        ode = flow.log_likelihood(net, held_out, grey_levels=GREY_LEVELS, generator=generator)
        # The latents stay the same; only the density at the first level is replaced.
        true = ode.nats + mixture(ode.latent, flow.first_level)
        true -= pfgm.flows.likelihood.centred_prior(ode.latent, flow.first_level, flow.D)
        exact = mixture(held_out, sigma_min)
        error = bits(true) - bits(exact)
        deviation = error.std() / math.sqrt(len(error))
        print(
            f"{sigma_min:5.2f}   {ode.bits_per_dim.mean():.4f}  {bits(true).mean():.4f}"
            f" ± {deviation:.4f}       {bits(exact).mean():.4f}   {ode.nfe}"
        )


if __name__ == "__main__":
    main()
