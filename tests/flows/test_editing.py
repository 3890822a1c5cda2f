import math

import pytest
import torch
from torch import nn

import pfgm
from benchmarks.common.problems import seeded
from pfgm import PoissonFlow, PoissonFlowPP
from pfgm.data import digits

DTYPES = [torch.float32, torch.float64]


def flows(shape, **options):
    return [
        PoissonFlow(shape, data_norm=options.get("data_norm", 1.5)),
        PoissonFlowPP(shape, D=16),
        PoissonFlowPP(shape, D=math.inf),
    ]


def relative(result, expected):
    return float(
        ((result - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max()
    )


class Gaussian(nn.Module):
    """The posterior mean of N(0, scale²) data at D = ∞, whose flow is known exactly."""

    scale = 0.5

    def forward(self, x, sigma):
        variance = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
        return x * self.scale**2 / (self.scale**2 + variance)

    def latent(self, flow, x):
        first, last = (self.scale**2 + s**2 for s in (flow.first_level, flow.last_level))
        return x * math.sqrt(first / last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("solver", "steps", "latent_error", "round_trip"),
    [
        ("rk45", None, 1e-3, 1e-3),
        ("heun", 200, 2e-3, 1e-4),
        ("multistep", 200, 2e-2, 1e-3),
        ("euler", 200, 0.2, 0.2),
    ],
)
def test_gaussian_data_reach_their_known_latents_and_return(
    dtype, solver, steps, latent_error, round_trip
):
    flow, net = PoissonFlowPP((3, 4), D=math.inf), Gaussian()
    x = 0.5 * torch.randn(20, 3, 4, generator=seeded(0), dtype=dtype)
    latent = flow.encode(net, x, solver=solver, steps=steps)
    assert latent.dtype == dtype
    assert relative(latent, net.latent(flow, x)) < latent_error
    assert relative(flow.decode(net, latent, solver=solver, steps=steps), x) < round_trip


@pytest.mark.parametrize(
    ("flow", "dtype"), zip(flows((1, 8, 8), data_norm=6.0), [*DTYPES, torch.float32], strict=True)
)
def test_digits_return_within_a_thousandth(flow, dtype):
    """The documented error of rk45, with the exact network, for data and for points typical of
    them."""
    references = digits().train[:100].to(dtype)
    net, x = flow.empirical(references), references[:8]
    level = torch.full((len(x),), flow.last_level, dtype=dtype)
    for start in (x, x + flow.noise(level, seeded(0))):
        latent, up = flow.encode(net, start, return_nfe=True)
        back, down = flow.decode(net, latent, return_nfe=True)
        assert relative(back, start) < 1e-3
        assert 0 < up < 1000
        assert 0 < down < 1000


@pytest.mark.parametrize("solver", ["euler", "rk45"])
def test_decode_is_sample_without_its_step_to_zero(solver):
    references = torch.randn(30, 2, generator=seeded(0), dtype=torch.float64)
    for flow in flows((2,)):
        net, latent = flow.empirical(references), flow.prior(5, generator=seeded(1)).double()
        options = {"rtol": 1e-5, "atol": 1e-5} if solver == "rk45" else {"steps": 8}
        decoded = flow.decode(net, latent, solver=solver, **options)
        sampled = flow.sample(net, 5, x_init=latent, solver=solver, **options)
        if isinstance(flow, PoissonFlowPP):
            decoded = flow.denoise(net, decoded, flow.last_level)
        torch.testing.assert_close(decoded, sampled, rtol=0, atol=1e-12)


def test_levels_options_and_bytes():
    flow = PoissonFlowPP((2,), D=16)
    net = flow.empirical(torch.eye(2))
    pixels = torch.tensor([[255, 128]], dtype=torch.uint8)
    torch.testing.assert_close(
        flow.encode(net, pixels, solver="heun"), flow.encode(net, pixels / 127.5 - 1, solver="heun")
    )
    seen = []
    flow.encode(
        net, torch.eye(2), solver="euler", schedule=[9.0, 1.0, 0.1, 0], callback=seen.append
    )
    assert [info["z"] for info in seen] == [0.1, 1.0]


def test_conditions_reach_the_network():
    flow = PoissonFlowPP((2,), D=math.inf)

    def net(x, sigma, labels):
        return labels[:, None].to(x.dtype).expand_as(x)

    condition = {"labels": torch.tensor([1, 3])}
    x = torch.zeros(2, 2)
    latent = flow.encode(net, x, condition=condition, solver="euler")
    torch.testing.assert_close(flow.decode(net, latent, condition=condition, solver="euler"), x)
    ratio = flow.first_level / flow.last_level
    torch.testing.assert_close(latent[1], torch.full((2,), 3 * (1 - ratio)), rtol=1e-4, atol=0)
    way = flow.interpolate(net, x, x, count=3, condition=condition, solver="euler")
    torch.testing.assert_close(way, torch.zeros(3, 2, 2), rtol=0, atol=1e-2)


POINTS = torch.zeros(4, 2)


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize(
    ("x", "options", "sentence"),
    [
        (torch.zeros(4, 3), {}, "…must have shape (B, *S) with…got (4, 3)."),
        (POINTS.long(), {}, "TypeError: …must be…got torch.int64…"),
        (POINTS[:0], {"solver": "rk4"}, "solver must be one of…got 'rk4'."),
        (POINTS, {"steps": 1}, "steps or schedule must leave two or more levels…."),
        (POINTS, {"schedule": [1.0, 0.0]}, "steps or schedule must leave…above 0, got [1.0]."),
        (POINTS, {"condition": {"a": 1}}, "condition has 'a'…."),
        (POINTS / 0, {}, "…NaN or infinity…."),
    ],
)
def test_bad_data(refused, method, x, options, sentence):
    flow = PoissonFlowPP((2,), D=16)
    refused(lambda: getattr(flow, method)(flow.empirical(torch.eye(2)), x, **options), sentence)
    if x.shape[1] == 3:
        refused(lambda: flow.rescale(x, 2.0), sentence)


@pytest.mark.parametrize("flow", flows((2,))[:2], ids=repr)
def test_data_are_interpolated_by_their_latents(flow):
    references = torch.randn(30, 2, generator=seeded(0))
    net, a, b = flow.empirical(references), references[:4], references[4:8]
    way = flow.interpolate(net, a, b, count=5)
    assert way.shape == (5, 4, 2)
    torch.testing.assert_close(way[0], a, rtol=0, atol=1e-3)
    torch.testing.assert_close(way[-1], b, rtol=0, atol=1e-3)
    latents = flow.encode(net, a), flow.encode(net, b)
    middle = flow.decode(net, pfgm.interpolate(*latents, [0.5])[0])
    torch.testing.assert_close(way[2], middle, rtol=0, atol=1e-3)
    assert flow.interpolate(net, a, b, weights=[0.2]).shape == (1, 4, 2)
    with pytest.raises(ValueError, match=r"x_a and x_b must.*got \(4, 2\) on cpu and \(2"):
        flow.interpolate(net, a, b[:2])


def test_rescaling_multiplies_norms_within_those_of_the_prior():
    flow = PoissonFlow((2, 3), data_norm=2.0)
    latent = flow.prior(200, generator=seeded(0), clip=False)
    norm = latent.flatten(1).norm(dim=1)
    for temperature in (0.3, 1.0, 2.5):
        rescaled = flow.rescale(latent, temperature)
        expected = (temperature * norm).minimum(norm.clamp(min=flow.upper_norm))
        expected = expected if temperature > 1 else temperature * norm
        torch.testing.assert_close(rescaled.flatten(1).norm(dim=1), expected)
        cosine = nn.functional.cosine_similarity(rescaled.flatten(1), latent.flatten(1))
        assert cosine.min() > 0.9999
    assert torch.equal(flow.rescale(latent, 1), latent)
    free = PoissonFlowPP((2, 3), D=4)
    torch.testing.assert_close(free.rescale(latent, 1e3), 1e3 * latent)
    assert torch.equal(flow.rescale(0 * latent, 2.0), 0 * latent)
