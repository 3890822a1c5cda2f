"""Kernels that are compiled and loaded while a CUDA graph is captured."""

import pytest
import torch
from pfgm.kernels import centering, distances, normalised_field, posterior_mean
from pfgm.kernels.launching import Launcher

import pfgm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_the_first_call_may_be_captured(device, monkeypatch, mode):
    generator = torch.Generator().manual_seed(0)
    x, references = (torch.randn(n, 97, generator=generator).to(device) for n in (40, 150))
    z = torch.ones(40, device=device)
    expected = pfgm.field_fn(x, z, references, backend="reference")
    for module in (centering, distances, posterior_mean, normalised_field):
        for launcher in vars(module).values():
            if isinstance(launcher, Launcher):
                monkeypatch.setattr(launcher, "prepared", {})
                launcher.kernel.device_caches.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        results = pfgm.field_fn(x, z, references, backend="triton")
    graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-4)
