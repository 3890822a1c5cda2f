"""Starts up to 1e12 spreads away: outcomes stay with the data, as in float64.

The prior of few values is a Cauchy distribution, so such starts occur. The truth is the same run in
float64 with the posterior mean as a softmax of its formula, without the field.
"""

import math
from itertools import cycle

import pytest
import torch

import pfgm
from benchmarks.common.problems import seeded
from pfgm import PoissonFlow
from pfgm.solvers import SOLVERS

DISTANCES = 10.0 ** torch.arange(13, dtype=torch.float64)  # in spreads
VALUES = [1, 2, 8, 64]


def rows_of(N, spread=1.0, center=0.0):
    return center + spread * torch.randn(50, N, generator=seeded(N))


def mean64(x, z, data):
    """The posterior mean at D = 1 in float64."""
    x, data = x.double(), data.double()
    squares = torch.cdist(x, data, compute_mode="donot_use_mm_for_euclid_dist").square()
    scores = -(x.shape[1] + 1) / 2 * (squares + z**2).log()
    return scores.softmax(1) @ data


def starts(flow, distances=DISTANCES, unit=None):
    """Points (len(distances), N) at these distances from the center, in spreads."""
    directions = torch.randn(len(distances), flow.N, generator=seeded(9), dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    unit = flow.spread if unit is None else unit
    return (flow.center + unit * distances[:, None] * directions).float()


def from_center(flow, x):
    return (x.double() - flow.center).norm(dim=1)


def reach(flow, data):
    return float(from_center(flow, data).max())


def moved(flow, data):
    """How far a mean at upper_norm is at most from that further out, with terms of higher order."""
    variance = torch.linalg.eigvalsh(data.double().T.cov().view(flow.N, flow.N)).max()
    return 1.5 * float((flow.N + 1) * variance / flow.upper_norm)


def opaque(net):
    """The network as a function, of which the flow does not know that it is exact."""
    return lambda x, z: net(x, z)


# Fields that are wrong everywhere or far away, made from points and their field.
WRONG = {
    "reversed": lambda x, v, v_z: (v, -v_z),
    "too long": lambda x, v, v_z: (1.05 * v, v_z),
    "sideways": lambda x, v, v_z: (
        torch.where(x.norm(dim=1, keepdim=True) > 5, 2 * v.roll(1, dims=1) + 0.1, v),
        v_z,
    ),
    "zero": lambda x, v, v_z: (torch.zeros_like(v), torch.zeros_like(v_z)),
    "the points": lambda x, v, v_z: (x, v_z),
    "large": lambda x, v, v_z: (torch.full_like(v, 1e30), torch.zeros_like(v_z)),
}


@pytest.mark.parametrize("N", VALUES)
def test_the_mean_of_the_exact_field_has_no_error_of_the_field(N):
    """The field in float32 holds |E| to a share of 1e-7, and nothing of it from 1e7 γ on."""
    data = rows_of(N)
    for flow in (PoissonFlow.from_data(data), PoissonFlow((N,), data_norm=math.sqrt(N))):
        x = starts(flow, unit=1.0)
        for z in (flow.first_level, 1.0, flow.last_level):
            result = flow.denoise(flow.empirical(data), x, z)
            assert result.dtype == x.dtype
            error = (result - mean64(x, z, data)).norm(dim=1).max()
            assert error < 1e-6 * N


@pytest.mark.parametrize(
    ("N", "solver"), [*zip(cycle(VALUES), SOLVERS, strict=False), (1, "rk45"), (2, "multistep")]
)
def test_samples_are_those_in_float64(N, solver):
    data = rows_of(N)
    flow = PoissonFlow.from_data(data)
    x, grid = starts(flow), flow.grid(solver=solver)
    expected, _ = SOLVERS[solver](lambda x, z: mean64(x, z, data), x.double(), grid)
    exact = flow.empirical(data)
    result = flow.sample(exact, len(x), x_init=x, solver=solver)
    network = flow.sample(opaque(exact), len(x), x_init=x, solver=solver)
    # Between two references, where paths part, rounding may choose.
    away = DISTANCES >= 1e7
    assert ((result - expected).norm(dim=1)[away] < 2e-4 * flow.spread).all()
    assert ((network - expected).norm(dim=1)[away] < moved(flow, data)).all()
    for samples in (result, network):
        assert from_center(flow, samples).max() < 1.01 * reach(flow, data)


@pytest.mark.parametrize(("spread", "center"), [(1e-12, 0.0), (1e12, 0.0), (1.0, 300.0)])
def test_samples_of_any_scale(spread, center):
    data = rows_of(2, 0.9 * spread, center)
    flow = PoissonFlow.from_data(data)
    x, exact = starts(flow), flow.empirical(data)
    for net in (exact, opaque(exact)):
        samples = flow.sample(net, len(x), x_init=x)
        assert from_center(flow, samples).max() < 1.01 * reach(flow, data)


@pytest.mark.parametrize(
    ("wrong", "solver"),
    [
        *((wrong, "multistep") for wrong in WRONG),
        *((wrong, solver) for wrong in ("reversed", "large") for solver in SOLVERS),
    ],
)
def test_no_network_draws_samples_beyond_upper_norm(wrong, solver):
    data = rows_of(2)
    flow = PoissonFlow.from_data(data)
    exact, x = flow.empirical(data), starts(flow)
    options = {"rtol": 1e-2, "atol": 1e-2} if solver == "rk45" else {}
    samples = flow.sample(
        lambda x, z: WRONG[wrong](x, *exact(x, z)), len(x), x_init=x, solver=solver, **options
    )
    assert from_center(flow, samples).max() <= flow.upper_norm * (1 + 1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("N", [1, 8])
def test_latents_and_their_data(N, solver):
    data = rows_of(N)
    flow = PoissonFlow.from_data(data)
    options = {"solver": solver, **({} if solver == "rk45" else {"steps": 20})}
    exact, exact64 = flow.empirical(data), flow.empirical(data.double())
    x = starts(flow)
    for way, least in ((flow.encode, 1e3), (flow.decode, 1e7)):
        expected = way(exact64, x.double(), **options)
        away = least <= DISTANCES
        for net, share in ((exact, 2e-5), (opaque(exact), 1e-3)):
            error = (way(net, x, **options) - expected).norm(dim=1)
            size = flow.spread + expected.norm(dim=1)
            assert (error / size)[away].max() < share


@pytest.mark.parametrize(("N", "solver"), [(1, "euler"), (4, "heun"), (1, "rk45")])
def test_the_likelihood_of_points_far_away(N, solver):
    """The density of a single charge, which the mixture is from there on."""
    data = rows_of(N)
    flow = PoissonFlow.from_data(data)
    x = starts(flow, DISTANCES[7:])
    expected = pfgm.log_density(x.double(), data.double(), r=flow.z_min)

    def prior(latent):
        return pfgm.log_density(latent.double(), data.double(), r=flow.first_level)

    exact = flow.empirical(data)
    for net in (exact, opaque(exact)):
        result = flow.log_likelihood(
            net, x, estimator="exact", solver=solver, steps=16, prior_log_prob=prior
        )
        assert ((result.nats - expected) / N).abs().max() < 1e-3
        assert (from_center(flow, result.latent) / from_center(flow, x)).isfinite().all()


@pytest.mark.parametrize("flow", [PoissonFlow((1,), spread=2.0, center=3.0), PoissonFlow.cifar10()])
@pytest.mark.parametrize("clip", [None, False, True])
def test_normal_numbers_that_are_0_give_points(flow, clip, monkeypatch):
    """A float32 from N(0, 1) is 0 in 4 of 1e8 draws."""
    monkeypatch.setattr(torch.Tensor, "normal_", lambda empty, generator: empty.zero_())
    assert torch.equal(flow.prior(2, clip=clip).double(), flow.center.expand(2, *flow.shape))
