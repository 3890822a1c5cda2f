"""The Poisson flow as a flow-matching path, beside torchcfm, flow_matching and scipy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torchdiffeq import odeint

import pfgm
from pfgm.integrations.flow_matching import PoissonFlowMatcher, as_denoiser

DS = [1.0, 16.0, 128.0, math.inf]
NEEDED = "needs the packages of pip install '.[peers]'"
POINTS = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9], [0.2, 0.1]], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kernel(D, dimensions):
    """The density of the noise, by scipy."""
    if math.isinf(D):
        return stats.multivariate_normal(np.zeros(dimensions))
    return stats.multivariate_t(np.zeros(dimensions), df=D)


def marginal(x, t, D, data=POINTS):
    """Density of x_t = t x1 + (1 − t) n over data x1, and the average of x1 − n at x_t = x."""
    law, N = kernel(D, data.shape[1]), data.shape[1]
    n = (x[:, None] - t * data) / (1 - t)  # (B, M, N): the noise that would have led to x
    p = torch.from_numpy(law.pdf(n.numpy()).reshape(n.shape[:2]))
    density = p.mean(1) / (1 - t) ** N
    return density, (p[..., None] * (data - n)).sum(1) / p.sum(1, keepdim=True)


def weights_at_the_data(distances, D):
    """Weights of the references at σ = 0: 1/d^(N + D) in the plane, the nearest one at D = ∞."""
    nearest = distances.amin(1, keepdim=True)
    return (nearest / distances) ** (2 + D) / ((nearest / distances) ** (2 + D)).sum(1, True)


def spread_points(count=64, scale=1.0):
    return scale * torch.randn(count, 2, generator=seeded(1), dtype=torch.float64)


def test_diffusion_without_references_is_torchcfms():
    matching = pytest.importorskip("torchcfm.conditional_flow_matching", reason=NEEDED)
    x0, x1 = torch.randn(2, 8, 3, 4, 4, generator=seeded())
    t = torch.rand(8, generator=seeded(1))
    theirs = matching.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(
        x0, x1, t
    )
    ours = PoissonFlowMatcher().sample_location_and_conditional_flow(x0, x1, t)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("D", DS)
def test_flow_matchings_solver_takes_the_velocity(D):
    """Its samples, and its likelihood, which differentiates the velocity in x."""
    solver = pytest.importorskip("flow_matching.solver", reason=NEEDED)
    matcher = PoissonFlowMatcher(D, POINTS)
    noise = matcher.noise((32, 2), generator=seeded(), dtype=torch.float64)
    samples = solver.ODESolver(matcher.velocity).sample(noise, step_size=0.01, method="midpoint")
    assert torch.cdist(samples, POINTS).amin(1).max() < 1e-3 * noise.norm(dim=1).max()

    law, end, x = kernel(D, 2), 0.6, spread_points(8)
    shortened = solver.ODESolver(lambda x, t: end * matcher.velocity(end * t, x))  # 1 is our 0.6
    _, log_p = shortened.compute_likelihood(
        x,
        lambda noise: torch.from_numpy(law.logpdf(noise.detach().numpy())),
        step_size=0.02,
        method="midpoint",
        exact_divergence=True,
    )
    torch.testing.assert_close(log_p, marginal(x, end, D)[0].log(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("D", DS)
@pytest.mark.parametrize("t", [0.02, 0.5, 0.9])
def test_velocity_is_the_average_of_the_conditional_ones(D, t):
    x = spread_points()
    velocity = PoissonFlowMatcher(D, POINTS).velocity(t, x)
    torch.testing.assert_close(velocity, marginal(x, t, D)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("D", DS)
def test_the_targets_agree_on_average(D):
    """Averaged against any function of x_t; the target of the references varies less."""
    count, t = 100_000, 0.6
    x1 = POINTS[torch.randint(len(POINTS), (count,), generator=seeded(2))]
    alone = PoissonFlowMatcher(D)
    x0 = alone.noise(x1.shape, generator=seeded(), dtype=torch.float64)
    _, xt, single = alone.sample_location_and_conditional_flow(x0, x1, t)
    matcher = PoissonFlowMatcher(D, POINTS)
    times, same_xt, stable = matcher.sample_location_and_conditional_flow(x0, x1, t)
    assert torch.equal(xt, same_xt)
    torch.testing.assert_close(stable, matcher.velocity(times, xt), rtol=1e-9, atol=1e-9)
    difference = single - stable
    for weight in (torch.ones_like(xt), xt.tanh(), (3 * xt.flip(1)).sin()):
        product = difference * weight
        assert (product.mean(0).abs() < 4 * product.std(0) / math.sqrt(count)).all()
    assert difference.std() > 0.3


def test_targets_keep_their_digits_near_the_data():
    """Near the data rounding removes the noise from the points; the target still has it."""
    data = pfgm.data.digits().train
    x0, x1 = torch.randn(64, 1, 8, 8, generator=seeded()), data[:64]
    matcher = PoissonFlowMatcher(math.inf, data)
    for t in (0.99, 1 - 1e-6, 1.0):
        _, _, ut = matcher.sample_location_and_conditional_flow(x0, x1, t)
        torch.testing.assert_close(ut, x1 - x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_velocity_has_the_digits_of_x_minus_mean(at_once, monkeypatch):
    """Close to the data, where a rounded mean has lost them, and far away, where it has them."""
    if not at_once:  # as on a GPU, where rows are not told apart
        monkeypatch.setattr("pfgm.functional.field.checks_values", lambda device: False)
    data = torch.randn(300, 2, generator=seeded())
    matcher, wide = PoissonFlowMatcher(1, data), PoissonFlowMatcher(1, data.double())
    t = torch.tensor([0.0, 1e-4, 0.3, 0.7, 0.999]).repeat_interleave(60)
    noise = matcher.noise(data.shape, generator=seeded(1))
    batch = (noise, data, t)
    _, x, target = matcher.sample_location_and_conditional_flow(*batch)
    _, _, wide_target = wide.sample_location_and_conditional_flow(*(g.double() for g in batch))
    velocities = matcher.velocity(t, x), wide.velocity(t.double(), x.double())
    for narrow, expected in (velocities, (target, wide_target)):
        error = (narrow - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 2e-5


@pytest.mark.parametrize("D", DS)
def test_both_ends(D):
    matcher = PoissonFlowMatcher(D, POINTS)
    x = spread_points(8)
    torch.testing.assert_close(matcher.velocity(0.0, x), POINTS.mean(0) - x, rtol=0, atol=1e-7)
    weights = weights_at_the_data(torch.cdist(x, POINTS), D)
    torch.testing.assert_close(matcher.velocity(1.0, x), 1000 * (weights @ POINTS - x))
    assert torch.equal(matcher.velocity(1.0, POINTS), torch.zeros_like(POINTS))
    start = matcher.sample_location_and_conditional_flow(None, x, 0.0, generator=seeded())
    expected = matcher.noise((8, 2), generator=seeded(), dtype=torch.float64)
    assert torch.equal(start[1], expected)
    # in float32 and far out, too
    far = 1e4 * x.float()
    velocity = PoissonFlowMatcher(D, POINTS.float()).velocity(0.0, far)
    torch.testing.assert_close(velocity, POINTS.mean(0).float() - far)


@pytest.mark.parametrize("D", DS)
def test_integration_is_sampling_and_ends_on_references(D):
    """A draw carried by torchdiffeq in t, and the same by this library in σ."""
    flow = pfgm.PoissonFlowPP((2,), D=D)
    prior = flow.prior(64, generator=seeded()).double()
    start, near, tight = 1 / (1 + flow.sigma_max), 0.999, {"rtol": 1e-7, "atol": 1e-7}
    times = torch.tensor([start, near, 1.0], dtype=torch.float64)
    velocity = PoissonFlowMatcher(D, POINTS).velocity
    _, points, end = odeint(velocity, start * prior, times, **tight)
    levels = [flow.sigma_max, (1 - near) / near]
    expected, _ = flow.solve(flow.empirical(POINTS), prior, levels, solver="rk45", **tight)
    torch.testing.assert_close(points, near * expected, rtol=0, atol=1e-4)
    distances = torch.cdist(points, POINTS).min(1)
    assert len(distances.indices.unique()) == len(POINTS)
    left = (end - POINTS[distances.indices]).norm(dim=1)
    assert (left < 0.4 * distances.values + 1e-5).all()  # 1/e of it, where 1 − t is 0.001


@pytest.mark.parametrize("kind", ["uint8", "set", "float32"])
def test_references_of_every_kind(kind):
    stored = torch.randint(0, 256, (50, 1, 4, 4), generator=seeded(), dtype=torch.uint8)
    values = stored.float() / 127.5 - 1
    references = {"uint8": stored, "set": pfgm.ReferenceSet(stored), "float32": values}[kind]
    x1 = stored[:8] if kind == "uint8" else values[:8]
    x0, t = torch.randn(8, 1, 4, 4, generator=seeded(1)), torch.full((8,), 0.3)
    sampled = PoissonFlowMatcher(16, references).sample_location_and_conditional_flow(x0, x1, t)
    expected = PoissonFlowMatcher(16, values.double()).velocity(t, sampled[1].double())
    torch.testing.assert_close(sampled[2].double(), expected, rtol=0, atol=1e-5)


def test_labels_choose_the_references():
    labels = torch.tensor([0, 1, 0, 1])
    matcher = PoissonFlowMatcher(16, POINTS, reference_labels=labels)
    x, asked = spread_points(6), torch.tensor([0, 1, -1, 1, 0, -1])
    velocity = matcher.velocity(0.4, x, labels=asked)
    for label, seen in ((0, POINTS[labels == 0]), (1, POINTS[labels == 1]), (-1, POINTS)):
        rows = asked == label
        assert torch.equal(velocity[rows], PoissonFlowMatcher(16, seen).velocity(0.4, x[rows]))
    t, xt, ut = matcher.sample_location_and_conditional_flow(
        None, POINTS, labels=labels, generator=seeded()
    )
    torch.testing.assert_close(ut, matcher.velocity(t, xt, labels=labels))
    assert matcher.velocity(0.4, x[:0], labels=asked[:0]).shape == x[:0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_those_of_the_generator(dtype):
    x1 = torch.zeros(2000, 3, dtype=dtype)
    matcher = PoissonFlowMatcher(D=4)
    t, xt, ut = matcher.sample_location_and_conditional_flow(None, x1, generator=seeded())
    again = matcher.sample_location_and_conditional_flow(None, x1, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip((t, xt, ut), again, strict=True))
    assert {t.dtype, xt.dtype, ut.dtype} == {dtype}
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
    # −u_t is the noise: its squared norm over N is F-distributed.
    assert stats.kstest((ut.square().sum(1) / 3).numpy(), stats.f(3, 4).cdf).pvalue > 1e-3


def test_half_precision_is_computed_in_float32():
    data = torch.randn(20, 2, generator=seeded())
    matcher = PoissonFlowMatcher(16, data)
    half = data.bfloat16()
    sampled = matcher.sample_location_and_conditional_flow(None, half, generator=seeded())
    same = matcher.sample_location_and_conditional_flow(None, half.float(), generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(sampled, same, strict=True))
    assert torch.equal(matcher.velocity(0.5, half), matcher.velocity(0.5, half.float()))


def gaussian_velocity(t, x, shift=None):
    """The velocity of normal data of standard deviation 0.5 at D = ∞, known exactly."""
    along = t.view(-1, *[1] * (x.ndim - 1))
    variance = (along * 0.5) ** 2 + (1 - along) ** 2
    velocity = x * (along * 0.25 - (1 - along)) / variance
    return velocity if shift is None else velocity + shift[:, None]


def test_a_velocity_network_as_a_denoiser():
    """The mean of normal data, s² x/(s² + σ²), at every level; conditions pass through."""
    net, sigma = as_denoiser(gaussian_velocity), torch.tensor([1e-3, 0.1, 0.5, 3.0, 80.0])
    x = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    expected = x * 0.25 / (0.25 + sigma.double().square()[:, None])
    torch.testing.assert_close(net(x, sigma), expected, rtol=1e-6, atol=1e-6)
    moved = net(x, sigma, shift=torch.ones(5)) - net(x, sigma)
    torch.testing.assert_close(moved, (sigma / (1 + sigma)).double()[:, None].expand(5, 2))


@pytest.mark.parametrize("D", DS)
def test_the_exact_velocity_as_a_denoiser_is_the_exact_denoiser(D):
    flow = pfgm.PoissonFlowPP((2,), D=D)
    net, exact = as_denoiser(PoissonFlowMatcher(D, POINTS).velocity), flow.empirical(POINTS)
    x, sigma = 5 * spread_points(8), torch.logspace(-2, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(net(x, sigma), exact(x, sigma), rtol=0, atol=1e-9)


def test_wrong_calls(refused):
    matcher, alone = PoissonFlowMatcher(16, POINTS), PoissonFlowMatcher(16)
    labelled = PoissonFlowMatcher(16, POINTS, reference_labels=torch.arange(4))
    sample, x1 = matcher.sample_location_and_conditional_flow, POINTS
    velocity, squeezed = matcher.velocity, as_denoiser(lambda t, x: x[:, :1])
    unlabelled = "labels must be given with reference_labels,…got None."
    for call, sentence in (
        (partial(PoissonFlowMatcher, 0), "D must be a positive number or infinity, got 0."),
        (partial(PoissonFlowMatcher, math.nan), "D must be a positive number…, got nan."),
        (partial(PoissonFlowMatcher, "inf"), "TypeError: D must be a number, got str."),
        (partial(sample, x1[:3], x1), "x0 must have the shape of x1, (4, 2), got (3, 2)."),
        (partial(sample, None, x1.long()), "TypeError: x1 must be uint8 or…use x1.float()."),
        (partial(sample, None, x1, torch.zeros(3)), "t must be a number or a…got shape (3,)."),
        (partial(sample, None, x1, 1.5), "t must be from 0 (noise) to 1 (data), got 1.5."),
        (partial(sample, None, x1, math.nan), "t must be from 0 (noise) to 1 (data), got nan."),
        (partial(alone.velocity, 0.5, x1), "references is None; the velocity needs references."),
        (partial(velocity, 0.5, x1.long()), "TypeError: x must be floating…got torch.int64."),
        (partial(velocity, torch.zeros(3), x1), "t must be a number…got shape (3,)."),
        (partial(velocity, math.nan, x1), "r, sigma or z must be…got nan in row 0."),
        (
            partial(velocity, 0.5, x1, labels=torch.zeros(4).long()),
            "reference_labels must have shape (4,) with labels,…got None.",
        ),
        (partial(labelled.velocity, 0.5, x1), unlabelled),
        (partial(labelled.sample_location_and_conditional_flow, None, x1), unlabelled),
        (
            partial(PoissonFlowMatcher, 16, reference_labels=torch.arange(4)),
            "references must be given with reference_labels, got None.",
        ),
        (partial(matcher.noise, ()), "shape must be (n, *S) with n of at least 0, got ()."),
        (partial(matcher.noise, (-1, 2)), "shape must be (n, *S)…least 0, got (-1, 2)."),
        (partial(matcher.noise, (2.0, 2)), "shape must be (n, *S)…least 0, got (2.0, 2)."),
        (
            partial(squeezed, torch.zeros(3, 2), torch.ones(3)),
            "velocity_net must return a tensor of the shape of x, (3, 2), got shape (3, 1).",
        ),
    ):
        refused(call, sentence)
