"""PFGM++ and diffusion: perturbation kernel, preconditioning, loss, sampling."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import pfgm
from benchmarks.common.problems import seeded
from pfgm import PoissonFlowPP
from pfgm.networks import Preconditioned
from pfgm.solvers import GRID_SOLVERS, SOLVERS

DS = [1.0, 16.0, math.inf]


@pytest.fixture
def generator():
    return seeded(0)


@pytest.fixture
def data(generator):
    return torch.randn(40, 2, generator=generator)


class Backbone(torch.nn.Module):
    def forward(self, x, noise):
        return x


@pytest.mark.parametrize("D", DS)
def test_config_rebuilds_the_flow(D):
    flow = PoissonFlowPP((3, 4), D=D, sigma_max=50.0)
    again = PoissonFlowPP(**json.loads(json.dumps(flow.config)))
    assert again == flow
    assert again.D == D
    assert hash(again) == hash(flow)
    assert flow != flow.with_D(7)
    assert repr(flow).startswith("PoissonFlowPP((3, 4), D=")


def test_levels_are_the_same_at_every_D():
    flow = PoissonFlowPP((2,), D=math.inf)
    other = flow.with_D(128)
    assert other.config == {**flow.config, "D": 128.0}
    assert other.radius(80.0) == pytest.approx(80 * math.sqrt(128))
    assert other.sigma(other.radius(3.0)) == pytest.approx(3.0)
    assert flow.radius(80.0) == math.inf
    pfgm_flow = pfgm.PoissonFlow.cifar10()
    assert (pfgm_flow.sigma(40.0), pfgm_flow.radius(40.0)) == (40.0, 40.0)  # the level is z


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *(
            ({"D": D}, f"D must be a positive number or infinity, got {D}.")
            for D in (0.0, math.nan, True, "a")
        ),
        ({"D": None}, "D must be a positive number or infinity, got None. For a published file…."),
        ({"D": 2, "sigma_min": 9.0, "sigma_max": 8.0}, "sigma_min must be…got 9.0."),
        *(
            ({"D": 2, "P_mean": bad}, f"P_mean must be a finite number, got {bad!r}.")
            for bad in (math.inf, "0.5", True)
        ),
    ],
)
def test_bad_hyper_parameters(refused, arguments, sentence):
    refused(lambda: PoissonFlowPP((2,), **arguments), sentence)


@pytest.mark.parametrize("D", [1.0, 3.0, 16.0, math.inf])
def test_noise_has_the_students_distribution(generator, D):
    """‖n‖²/(N σ²) is F-distributed with N and D degrees of freedom, χ²_N/N at D = ∞."""
    from scipy import stats

    flow, sigma = PoissonFlowPP((5,), D=D), 0.7
    noise = flow.noise(torch.full((20_000,), sigma, dtype=torch.float64), generator)
    statistic = (noise.square().sum(1) / (5 * sigma**2)).numpy()
    law = stats.chi2(5, scale=1 / 5) if math.isinf(D) else stats.f(5, D)
    assert stats.kstest(statistic, law.cdf).pvalue > 1e-3
    # and its direction is uniform
    direction = noise / noise.norm(dim=1, keepdim=True)
    assert direction.mean(0).abs().max() < 0.02


def test_small_D_stays_finite(generator):
    flow = PoissonFlowPP((2,), D=0.01)
    assert flow.noise(torch.ones(2000), generator).isfinite().all()


def test_perturb_and_prior(generator):
    flow = PoissonFlowPP((3, 4), D=16)
    x, sigma = flow.perturb(torch.zeros(4000, 3, 4), generator)
    logs = sigma.log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.06)
    assert logs.std().item() == pytest.approx(1.2, abs=0.05)
    assert x.shape == (4000, 3, 4)
    rms = flow.prior(4000, generator=generator).flatten(1).square().mean().sqrt()
    assert rms.item() == pytest.approx(80 * math.sqrt(16 / 14), rel=0.05)  # variance D/(D − 2)
    as_bytes, _ = flow.perturb(torch.full((2, 3, 4), 255, dtype=torch.uint8), generator)
    assert as_bytes.dtype == torch.float32
    again = [flow.prior(3, generator=seeded(5)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("D", DS)
def test_loss_is_the_weighted_error(data, D):
    flow = PoissonFlowPP((2,), D=D)

    def net(x, sigma):
        return 0.5 * x

    loss = flow.loss(net, data, generator=seeded(3))
    x, sigma = flow.perturb(data, seeded(3))
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    expected = (weight * (0.5 * x - data).square().sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    stable = flow.loss(net, data, data, seeded(3))
    target = pfgm.posterior_mean(x, data, sigma=sigma, D=D)
    torch.testing.assert_close(stable, (weight * (0.5 * x - target).square().sum(1)).mean())
    assert float(flow.loss(flow.empirical(data), data, data)) <= 1e-6


@pytest.mark.parametrize(
    ("mean", "options", "warned"),
    [(0.0, {}, False), (5.0, {}, False), (20.0, {}, True), (20.0, {"sigma_max": 9.0}, False)],
)
def test_data_far_from_0_give_a_warning(data, mean, options, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PoissonFlowPP.from_data(data + mean, D=8, **options)
    assert [str(w.message).startswith("data have a spread of") for w in caught] == [True] * warned


def test_edms_preconditioning_warns_at_small_D(data):
    for D, warned in ((1, True), (3.9, True), (4, False), (math.inf, False)):
        flow = PoissonFlowPP((2,), D=D)
        net = AveragedModel(Preconditioned(Backbone()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            flow.loss(net, data)
            flow.loss(lambda x, sigma: x, data)  # how this one scales its input is not known
        assert [str(w.message).startswith(f"D is {D:g}; EDM's") for w in caught] == [True] * warned


def test_labels_restrict_the_references(data):
    flow = PoissonFlowPP((2,), D=16)
    labels = torch.arange(40) % 3
    labels[:5] = -1
    seen = {}

    def net(x, sigma, labels):
        seen.update(x=x, sigma=sigma, labels=labels)
        return torch.zeros_like(x)

    every = torch.arange(40) % 3
    condition = {"labels": labels}
    loss = flow.loss(
        net, data, data, torch.Generator(), condition=condition, reference_labels=every
    )
    targets = [
        pfgm.posterior_mean(
            seen["x"][i : i + 1],
            data if label < 0 else data[every == label],
            sigma=seen["sigma"][i : i + 1],
            D=16,
        )
        for i, label in enumerate(labels.tolist())
    ]
    weight = (seen["sigma"] ** 2 + 0.25) / (0.5 * seen["sigma"]) ** 2
    expected = (weight * torch.cat(targets).square().sum(1)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("D", [1.0, 16.0, 2048.0, math.inf])
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_of_the_exact_denoiser_are_the_data(data, generator, D, solver):
    flow = PoissonFlowPP((2,), D=D)
    steps = 60 if SOLVERS[solver].order == 1 else 30
    samples = flow.sample(flow.empirical(data), 50, solver=solver, steps=steps, generator=generator)
    # At small D a few lines end between two neighbours.
    assert pfgm.metrics.nearest_distance(samples, data).quantile(0.9) < 2e-3
    near = torch.cdist(samples, data).argmin(1)
    assert len(near.unique()) > 15


def test_the_grid_is_edms():
    flow = PoissonFlowPP((2,), D=4)
    assert flow.grid(18) == [*pfgm.solvers.rho_grid(80.0, 0.002, 17), 0.0]
    assert flow.grid(1) == [80.0, 0.0]
    assert flow.grid(4, "rho", last=0.5) == [*pfgm.solvers.rho_grid(80.0, 0.5, 3), 0.0]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn(data, solver):
    flow = PoissonFlowPP((2,), D=math.inf)
    net, start = flow.empirical(data), flow.prior(60, generator=seeded(1))
    options = {"solver": solver, "steps": 40, "x_init": start}
    plain = flow.sample(net, 60, **options)
    noisy = [flow.sample(net, 60, churn=30.0, generator=seeded(s), **options) for s in (2, 2, 3)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], plain)
    assert pfgm.metrics.nearest_distance(noisy[0], data).max() < 1e-2
    never = flow.sample(net, 60, churn=30.0, churn_range=(1e3, 1e4), **options)
    assert torch.equal(never, plain)


def conditional(x, sigma, labels=None):
    """The exact mean of one point a label, and of both without one."""
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    both = pfgm.posterior_mean(x, points, sigma=sigma, D=16)
    return both if labels is None else points[labels]


def test_guidance_extrapolates_the_means(generator):
    flow = PoissonFlowPP((2,), D=16)
    labels, x = torch.tensor([0, 1]), flow.prior(2, generator=generator)
    labelled = {"labels": labels}
    with_, without = (flow.denoise(conditional, x, 5.0, c) for c in (labelled, {}))
    slope = flow._predictor(conditional, x, labelled, 3.0, None)
    torch.testing.assert_close(slope(x, 5.0), without + 3 * (with_ - without))
    assert (
        flow.sample(conditional, 2, steps=9, condition=labelled, guidance=2.0, return_nfe=True)[1]
        == 18
    )
    for weight, expected in ((1.0, labelled), (0.0, None)):
        runs = [
            flow.sample(conditional, 2, x_init=x, **options)
            for options in ({"condition": labelled, "guidance": weight}, {"condition": expected})
        ]
        torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


DATA, FLOW, FIELDS = torch.eye(2), PoissonFlowPP((2,), D=16), pfgm.PoissonFlow((2,), spread=1.0)
DENOISER, LABELS = FLOW.empirical(DATA), torch.arange(2)
SAMPLED = partial(FLOW.sample, DENOISER, 3)
UNET = pfgm.networks.UNet((1, 8, 8), width=8)
LOSS = partial(FLOW.loss, lambda x, sigma, labels: x, DATA, DATA)
TOO_FEW = {"labels": torch.zeros(1)}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: FLOW.with_D(math.inf).sigma(1.0), "D must be finite for levels…got infinity."),
        (partial(FLOW.with_D(4).sample, AveragedModel(DENOISER), 3), "net must have the D…."),
        *(
            (partial(flow.loss, None, DATA, condition=TOO_FEW), "condition['labels'] must…(1,).")
            for flow in (FLOW, FIELDS)
        ),
        (partial(LOSS, condition={"labels": LABELS}), "reference_labels must have…got None."),
        (
            partial(LOSS, condition={"labels": LABELS}, reference_labels=0 * LABELS),
            "labels must be in reference_labels, or…got 1.",
        ),
        (partial(LOSS, reference_labels=LABELS), "labels must be given with reference…got None."),
        *(
            (partial(SAMPLED, churn=1.0, churn_range=wrong), "churn_range must be two levels….")
            for wrong in ((2, 1), 5)
        ),
        (partial(SAMPLED, churn=1.0, solver="multistep"), "solver must be one of…'multistep'."),
        (partial(SAMPLED, solver=["euler"]), "solver must be one of euler, heun,…['euler']."),
        (partial(SAMPLED, schedule=5), "schedule must be one of log, rho,…or levels, got 5."),
        (partial(SAMPLED, schedule=[1.0]), "schedule must be two or more finite levels…."),
        (partial(SAMPLED, schedule=["a", 0]), "schedule must be two or more…got [nan, 0.0]."),
        (partial(SAMPLED, schedule=[3.0, 4.0]), "schedule is not decreasing: 4.0 at…follows 3.0."),
        (partial(SAMPLED, guidance=math.nan), "guidance must be a finite number, got nan."),
        (
            partial(FLOW.sample, conditional, 2, condition={"colour": 1}),
            "condition has 'colour'; the conditions of this network….",
        ),
        (
            partial(FLOW.sample, conditional, 2, condition=TOO_FEW),
            "condition['labels'] must have 2 rows like x, got shape (1,).",
        ),
        (lambda: FLOW.sample(lambda x, sigma: x[:, :1], 3), "net must return…(3, 1). Networ…."),
        (lambda: FLOW.sample(FIELDS.empirical(DATA), 3), "net must return…got tuple. Networ…."),
        (
            lambda: FLOW.sample(lambda x, s: x / (s > 30)[:, None], 3, solver="euler", steps=5),
            "the network returned NaN or infinity in step 1, at 17.5….",
        ),
        (
            lambda: Preconditioned(UNET)(torch.zeros(2, 1, 8, 8), torch.ones(2)),
            "backbone must…got tuple. Networks of t….",
        ),
        *(
            (partial(Preconditioned, made), "…which is a denoiser with EDM's preconditioning….")
            for made in (
                PoissonFlowPP((1, 8, 8), D=16).network("unet", width=8),
                Preconditioned(torch.nn.Identity()),
            )
        ),
        (partial(FLOW.network, UNET), "TypeError: net must be a name or…of your own, got a UNet…."),
        # As the only row of a table that is standardised.
        (
            lambda: PoissonFlowPP.from_data(torch.zeros(1, 3), D=128),
            "data must have a value other than 0, got zeros alone; a …zeros.",
        ),
    ],
)
def test_refusals(refused, call, sentence):
    refused(call, sentence)


@pytest.mark.parametrize("kind", ["PoissonFlow", "PoissonFlowPP"])
@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])  # of fused steps alone
def test_a_step_is_at_most_three_kernels(monkeypatch, seeing_mode, kind, solver):
    """Without the check of values, as on a GPU."""
    x = torch.ones(4, 2)
    field_x, field_z = 0.1 * x, -torch.ones(4)
    if kind == "PoissonFlow":
        flow, result = pfgm.PoissonFlow((2,), data_norm=1.0), (field_x, field_z)
    else:
        flow, result = PoissonFlowPP((2,), D=16), field_x
    monkeypatch.setattr("pfgm.solvers.checks_values", lambda device: False)
    counts = []
    for steps in (10, 20):
        seeing_mode.seen.clear()
        with seeing_mode:
            flow.sample(lambda x, level: result, 4, solver=solver, steps=steps, x_init=x)
        memory = ("empty", "detach", "view", "alias", "_to_copy", "clone")
        counts.append(sum(not any(word in call for word in memory) for call in seeing_mode.seen))
    evaluations = GRID_SOLVERS[solver].evaluations
    assert (counts[1] - counts[0]) / 10 <= 3 * evaluations
