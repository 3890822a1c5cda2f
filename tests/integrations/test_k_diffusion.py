"""The flows as models of k-diffusion, with the package itself."""

import math

import pytest
import torch
from torch import nn

import pfgm
from pfgm.integrations.k_diffusion import as_k_diffusion

DATA = pfgm.data.digits().train[:100]
FIELD = pfgm.PoissonFlow.from_data(DATA)
DENOISERS = {D: pfgm.PoissonFlowPP.from_data(DATA, D=D) for D in (1.0, 128.0, math.inf)}


def label(flow):
    return f"{type(flow).__name__}-{flow.D}"


@pytest.fixture(scope="module")
def sampling():
    reason = "k-diffusion is not installed: pip install '.[peers]'"
    return pytest.importorskip("k_diffusion.sampling", reason=reason)


@pytest.mark.parametrize("flow", [FIELD, *DENOISERS.values()], ids=label)
@pytest.mark.parametrize(
    ("sampler", "solver"),
    [("sample_euler", "euler"), ("sample_heun", "heun"), ("sample_dpmpp_2m", "multistep")],
)
def test_samplers_of_k_diffusion_are_our_solvers(sampling, flow, sampler, solver, same):
    """On the exact field, at every step: points relative to their level, and means."""
    net = flow.empirical(DATA)
    model = as_k_diffusion(net, flow)
    sample = getattr(sampling, sampler)
    sigmas, x = model.get_sigmas(12), flow.prior(8, generator=torch.Generator().manual_seed(0))
    options = {"solver": solver, "schedule": sigmas.tolist()}
    correct = flow.sample(net, 8, x_init=x, **options)
    assert float((sample(model, x, sigmas, disable=True) - correct).abs().max()) < 1e-4

    theirs, ours = [], []
    sample(model, x.double(), sigmas.double(), disable=True, callback=theirs.append)
    flow.sample(net, 8, x_init=x.double(), callback=ours.append, **options)
    assert len(theirs) == len(ours) == 12
    for their, our in zip(theirs, ours, strict=True):
        assert float((their["denoised"] - our["mean"]).abs().max()) < 1e-6
        same(their["x"] / our["z"], our["x"] / our["z"], 1e-6)


def test_dpm_fast_evaluates_its_own_levels(sampling):
    model = as_k_diffusion(FIELD.empirical(DATA), FIELD)
    x = FIELD.prior(4, generator=torch.Generator().manual_seed(0))
    samples = sampling.sample_dpm_fast(model, x, model.sigma_min, model.sigma_max, 30, disable=True)
    assert float(torch.cdist(samples.flatten(1), DATA.flatten(1)).amin(1).max()) < 0.1


def test_extra_args_reach_the_network(sampling):
    class Labelled(nn.Module):
        def forward(self, x, sigma, labels):
            return labels.to(x).view(-1, 1, 1, 1).expand_as(x)

    flow = DENOISERS[math.inf]
    model = as_k_diffusion(Labelled(), flow)
    labels = torch.tensor([3, 1, 4])
    samples = sampling.sample_heun(
        model, flow.prior(3), model.get_sigmas(4), extra_args={"labels": labels}, disable=True
    )
    assert torch.equal(samples.mean((1, 2, 3)).round().long(), labels)


@pytest.mark.parametrize("flow", [FIELD, *DENOISERS.values()], ids=label)
def test_a_model_of_k_diffusion(flow):
    net = flow.empirical(DATA)
    model = as_k_diffusion(net, flow)
    x, sigma = (
        DATA[:5] + flow.noise(torch.logspace(-2, 1, 5), torch.Generator().manual_seed(0)),
        torch.logspace(-2, 1, 5),
    )
    mean = pfgm.posterior_mean(x, DATA, sigma=sigma, D=flow.D)
    torch.testing.assert_close(model(x, sigma), mean, rtol=0, atol=1e-3)
    for row in range(5):  # each at its own level
        alone = model(x[row : row + 1], sigma[row : row + 1])
        torch.testing.assert_close(alone[0], model(x, sigma)[row], rtol=0, atol=1e-4)
    assert (model.sigma_min, model.sigma_max) == (flow.last_level, flow.first_level)
    assert model.get_sigmas(1).tolist() == pytest.approx([flow.first_level, 0])
    for schedule in (None, "log", "rho"):
        sigmas = model.get_sigmas(9, schedule=schedule)
        assert sigmas.shape == (10,)
        assert sigmas[[0, -2, -1]].tolist() == pytest.approx([flow.first_level, flow.last_level, 0])
        assert bool((sigmas.diff() < 0).all())
    with pytest.raises(ValueError, match=r"sigma must be a number or.*got shape \(2,\)\."):
        model(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"steps must be an integer of at least.*got 0\."):
        model.get_sigmas(0)
    with pytest.raises(ValueError, match=r"device must be cpu,.*got 'foo': torch has no "):
        model.get_sigmas(2, device="foo")


def test_denoisers_of_k_diffusion_are_networks_of_the_flow(sampling, same):
    """The preconditioning is the same, and the denoiser samples without any change."""
    from k_diffusion.layers import Denoiser

    class Inner(nn.Module):
        def forward(self, x, sigma):
            return x.square() - sigma.view(-1, 1, 1, 1)

    flow = DENOISERS[128.0]
    theirs = Denoiser(Inner(), sigma_data=flow.sigma_data)
    ours = flow.network(Inner(), level="sigma")
    x, sigma = flow.perturb(DATA[:8].double(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x, sigma), ours(x, sigma))
    samples, correct = (
        flow.sample(net, 2, generator=torch.Generator().manual_seed(0), steps=3)
        for net in (theirs, ours)
    )
    same(samples, correct, 1e-5)


def test_the_module_in_a_model_moves_and_trains_with_it():
    net = pfgm.networks.MLP((2,), width=8, depth=1)
    model = as_k_diffusion(net, pfgm.PoissonFlow((2,), data_norm=1.0))
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    assert not model.eval().net.training
    model(torch.randn(3, 2), torch.ones(3)).sum().backward()
    assert net.head.weight.grad is not None
