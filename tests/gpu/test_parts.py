"""References in parts, on a GPU: the merged results of parts equal the result of the whole."""

import math

import pytest
import torch

import pfgm
from pfgm.references import part as module


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_a_set_in_parts(device, backend, monkeypatch, D):
    generator, N, B = torch.Generator().manual_seed(0), 5, 6
    y = torch.rand(40, N, generator=generator) * 2 - 1
    x = y[:B] + 0.2 * torch.randn(B, N, generator=generator)
    G, g = torch.randn(B, N, generator=generator), torch.randn(B, generator=generator).double()
    sigma = torch.logspace(-1, 1, B, dtype=torch.float64)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 16 * 4 * N)

    def results(x, held, backend):
        x, level = x.clone().requires_grad_(), sigma.to(x.device).clone().requires_grad_()
        mean, lse = pfgm.posterior_mean(
            x, held, sigma=level, D=D, backend=backend, return_logsumexp=True
        )
        upstream = (mean * G.to(mean)).sum() + (lse * g.to(lse)).sum()
        return mean, lse, *torch.autograd.grad(upstream, (x, level))

    expected = results(x.double(), y.double(), "reference")
    held = pfgm.ReferenceSet(y)  # on the CPU, wherever the points are
    actual = results(x.to(device), held, backend)
    for value, correct in zip(actual, expected, strict=True):
        value, correct = value.detach().double().cpu(), correct.detach()
        scale = float(correct.abs().max())
        torch.testing.assert_close(value, correct, rtol=2e-5, atol=2e-5 * scale)
