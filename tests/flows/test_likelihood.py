import io
import math

import pytest
import torch
from torch import nn
from tqdm import tqdm

import pfgm
from benchmarks.common.problems import seeded
from pfgm import PoissonFlow, PoissonFlowPP
from pfgm.flows.likelihood import centred_prior
from pfgm.solvers import GRID_SOLVERS, SOLVERS

INFINITY = math.inf


def make_flow(kind, data):
    if kind == "pfgm":
        return PoissonFlow.from_data(data)
    return PoissonFlowPP(data.shape[1:], D=kind)


def mixture_problem(kind, N, dtype=torch.float64, M=20, B=4):
    """A flow, its references, and points typical of its last level, half of them three times as far
    away."""
    references = 0.5 * torch.randn(M, N, generator=seeded(0), dtype=torch.float64)
    flow = make_flow(kind, references)
    level = flow.last_level * torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(B // 2)
    x = references[:B] + flow.noise(level, seeded(1))
    return flow, references.to(dtype), x.to(dtype)


def mixture_at(flow, references, level):
    return lambda x: pfgm.log_density(x, references, sigma=level, D=flow.D)


def worst_error(kind, N, dtype=torch.float64, B=4, **options):
    """The error in nats per dimension from the exact mixture at the last level."""
    flow, references, x = mixture_problem(kind, N, dtype, B=B)
    result = flow.log_likelihood(
        flow.empirical(references),
        x,
        estimator="exact",
        prior_log_prob=mixture_at(flow, references, flow.first_level),
        **options,
    )
    exact = mixture_at(flow, references.double(), flow.last_level)(x.double())
    assert result.nats.dtype == torch.float64
    assert result.latent.dtype == dtype
    return float((result.nats - exact).abs().max()) / N


class Denoiser(nn.Module):
    """A small smooth network with dropout and a condition, like a trained one."""

    def __init__(self, N, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(N, 8), nn.Linear(8, N)
        self.dropout = nn.Dropout(0.5)
        self.modes = []
        self.to(dtype)

    def forward(self, x, sigma, labels=None):
        self.modes.append((self.training, self.dropout.training))
        hidden = self.first(x) + sigma.log()[:, None] / 4
        if labels is not None:
            hidden = hidden + labels[:, None]
        return self.dropout(self.second(hidden.tanh()))


def small(**arguments):
    return PoissonFlowPP((3,), **{"D": 16, "sigma_min": 0.1, "sigma_max": 10.0, **arguments})


TIGHT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize(
    ("kind", "N", "options"),
    [
        *((kind, N, TIGHT) for kind, N in (("pfgm", 1), (1, 2), (16, 1), (16, 8), (INFINITY, 2))),
        *((kind, 4, {"dtype": torch.float32, **TIGHT}) for kind in ("pfgm", 16)),
        *(
            pytest.param(kind, 64, {"B": 2}, marks=pytest.mark.slow)
            for kind in ("pfgm", 1, 16, INFINITY)
        ),
    ],
)
def test_exact_mixture(kind, N, options):
    """The documented error is 1e-3 nats per dimension, with the default tolerance."""
    assert worst_error(kind, N, **options) < 3e-4


@pytest.mark.parametrize("solver", GRID_SOLVERS)
def test_order_of_the_fixed_grids(solver):
    order = GRID_SOLVERS[solver].order
    flow, net = small(), Denoiser(3).eval()
    x = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    options = {"estimator": "exact", "solver": solver}
    exact = flow.log_likelihood(net, x, estimator="exact", rtol=1e-9, atol=1e-9).nats
    errors = [
        float((flow.log_likelihood(net, x, steps=n, **options).nats - exact).abs().mean())
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert errors[1] < 0.1**order


def test_each_row_keeps_its_accuracy_in_a_large_batch():
    """One hard row among easy ones must not be outvoted in the error norm: 4e-4 nats off, where the
    root mean square over the batch, torchdiffeq's own norm, leaves 4e-2."""
    references = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    flow = small(D=INFINITY)
    x = torch.zeros(200, 3, dtype=torch.float64)
    x[0] = torch.tensor([0.45, 0.1, 0.0])
    result = flow.log_likelihood(
        flow.empirical(references),
        x,
        estimator="exact",
        prior_log_prob=mixture_at(flow, references, flow.sigma_max),
    )
    exact = mixture_at(flow, references, flow.sigma_min)(x)
    assert (result.nats - exact).abs().max() < 2e-3


def test_no_level_beyond_the_first_is_evaluated():
    flow, net, seen = small(), Denoiser(3).eval(), []

    def record(x, sigma):
        seen.append(float(sigma[0]))
        return net(x, sigma)

    flow.log_likelihood(record, torch.zeros(2, 3, dtype=torch.float64))
    assert min(seen) == pytest.approx(flow.sigma_min)
    assert max(seen) == pytest.approx(flow.sigma_max)


@pytest.mark.parametrize(("kind", "error"), [("pfgm", 0.28), (16, 0.06)])
def test_error_of_the_centred_prior_on_digits(kind, error):
    """The root mean square in nats that the docstring states."""
    data = pfgm.data.digits().train.double()
    flow = make_flow(kind, data)
    level = flow.first_level
    noise = flow.noise(torch.full((500,), level, dtype=torch.float64), seeded())
    latent = data[:500] + noise
    difference = centred_prior(latent, level, flow.D) - mixture_at(flow, data, level)(latent)
    assert float(difference.square().mean().sqrt()) == pytest.approx(error, abs=0.03)


@pytest.mark.parametrize("estimator", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(estimator):
    """Probes of many equal rows against the exact divergence, within four standard errors."""
    flow, net = small(), Denoiser(3).eval()
    x = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    exact = flow.log_likelihood(net, x, estimator="exact").nats
    many = x.expand(2000, 3)
    nats = flow.log_likelihood(net, many, estimator=estimator, generator=seeded(1)).nats
    standard_error = float(nats.std()) / math.sqrt(len(many))
    assert 0 < standard_error < 0.05
    assert abs(float(nats.mean() - exact)) < 4 * standard_error + 1e-4


def test_probes_are_a_function_of_the_generator_and_drawn_once():
    flow, net = small(), Denoiser(3, torch.float32).eval()
    x = torch.randn(4, 3, generator=seeded())
    a, b = (flow.log_likelihood(net, x, generator=seeded(4)) for _ in range(2))
    assert torch.equal(a.nats, b.nats)
    assert not torch.equal(a.nats, flow.log_likelihood(net, x, generator=seeded(5)).nats)
    generator = seeded(4)
    flow.log_likelihood(net, x, generator=generator)
    expected = seeded(4)
    torch.randint(0, 2, x.shape, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_bits_per_dimension():
    flow, net = small(), Denoiser(3).eval()
    x = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    for levels, offset in [(256, 7.0), (17, math.log2(8.5)), (2, 0.0)]:
        result = flow.log_likelihood(net, x, estimator="exact", grey_levels=levels)
        expected = -result.nats / (3 * math.log(2)) + offset
        torch.testing.assert_close(result.bits_per_dim, expected)


@pytest.mark.parametrize(
    ("kind", "solver", "evaluations"),
    [("pfgm", "euler", 6), (16, "heun", 11), ("pfgm", "rk45", None), (16, "rk45", None)],
)
def test_evaluations_and_samples_with_shape(kind, solver, evaluations):
    data = torch.randn(30, 1, 2, 2, generator=seeded())
    flow = make_flow(kind, data)
    exact, calls = flow.empirical(data), []

    def net(x, level):
        calls.append(tuple(x.shape))
        return exact(x, level)

    result = flow.log_likelihood(net, data[:3], solver=solver, steps=6)
    assert result.nfe == len(calls)
    assert evaluations in (result.nfe, None)
    assert set(calls) == {(3, 1, 2, 2)}
    assert [tuple(t.shape) for t in result[:3]] == [(3,), (3,), (3, 1, 2, 2)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_progress_goes_up_to_the_prior(monkeypatch, solver):
    bars = []

    def progress_bar(**options):
        bars.append(tqdm(**options, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr("pfgm.flows.likelihood.progress_bar", progress_bar)
    x = torch.ones(2, 3, dtype=torch.float64)
    small().log_likelihood(Denoiser(3).eval(), x, solver=solver, steps=7, progress=True)
    assert [(bar.total, bar.unit) for bar in bars] == [(100, "%")]
    assert (100 if SOLVERS[solver].adaptive else 80) <= bars[0].n <= 100


def test_no_samples():
    flow = small()
    result = flow.log_likelihood(Denoiser(3), torch.zeros(0, 3))
    assert [tuple(t.shape) for t in result[:3]] == [(0,), (0,), (0, 3)]
    assert result.nfe == 0


def test_the_condition_reaches_the_network():
    flow, net = small(), Denoiser(3).eval()
    x = torch.randn(2, 3, generator=seeded(), dtype=torch.float64).repeat(2, 1)
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    options = {"estimator": "exact", "solver": "heun", "steps": 20}
    both = flow.log_likelihood(net, x, condition={"labels": labels}, **options).nats
    torch.testing.assert_close(both[:2], flow.log_likelihood(net, x[:2], **options).nats)
    assert (both[2:] - both[:2]).abs().min() > 1e-3


def test_evaluation_mode_is_restored_and_no_gradient_kept():
    flow, net = small(), Denoiser(3)
    net.first.eval()
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    result = flow.log_likelihood(net, x, solver="euler", steps=3)
    assert set(net.modes) == {(False, False)}
    assert (net.training, net.first.training, net.dropout.training) == (True, False, True)
    assert not any(t.requires_grad for t in result[:3])
    assert all(p.grad is None for p in (x, *net.parameters()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(mode):
    flow, net = small(), Denoiser(3).eval()
    x = torch.randn(2, 3, generator=seeded(), dtype=torch.float64)
    expected = flow.log_likelihood(net, x, estimator="exact").nats
    with mode():
        result = flow.log_likelihood(net, x.clone(), estimator="exact")
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(result.nats, expected)


@pytest.mark.parametrize(("estimator", "solver"), [("exact", "heun"), ("rademacher", "rk45")])
def test_gradient_of_the_likelihood(estimator, solver):
    flow, net = small(), Denoiser(3).eval()
    x = torch.randn(2, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)

    def nats():
        result = flow.log_likelihood(
            net,
            x,
            estimator=estimator,
            solver=solver,
            steps=10,
            rtol=1e-8,
            atol=1e-8,
            generator=seeded(3),
            differentiable=True,
        )
        return result.nats.sum()

    weight = net.second.weight
    gradients = torch.autograd.grad(nats(), (weight, x))
    for tensor, gradient in zip((weight, x), gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=seeded(5), dtype=torch.float64)
        ends = []
        for h in (1e-4, -1e-4):
            with torch.no_grad():
                tensor.add_(h * direction)
            ends.append(float(nats().detach()))
            with torch.no_grad():
                tensor.sub_(h * direction)
        slope = (ends[0] - ends[1]) / 2e-4
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_exact_networks_have_no_second_derivative():
    flow = small()
    net = flow.empirical(torch.randn(5, 3, generator=seeded()))
    x = torch.zeros(2, 3, requires_grad=True)
    result = flow.log_likelihood(net, x, solver="euler", steps=2, differentiable=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        result.nats.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": torch.zeros(2, 4)}, "x must have shape (B, *S) with S = (3,), got (2, 4)."),
        ({"x": torch.full((2, 3), math.nan)}, "the network returned NaN or infinity…."),
        *(
            ({"x": torch.zeros(2, 3, dtype=dtype)}, f"TypeError: x must be…{problem}….")
            for problem, dtypes in (
                ("whole numbers have no density", (torch.uint8, torch.int64)),
                ("half precision", (torch.float16, torch.bfloat16)),
            )
            for dtype in dtypes
        ),
        ({"condition": {"colour": 1}}, "condition has 'colour'…."),
        ({"condition": {"labels": torch.zeros(3)}}, "condition['labels']…got shape (3,)."),
        ({"prior_log_prob": lambda latent: latent}, "prior_log_prob must…got (2, 3)."),
        ({"prior_log_prob": lambda latent: 0.0}, "prior_log_prob must…got float."),
        ({"prior_log_prob": lambda latent: latent[:, 0] * math.nan}, "prior_log_prob is nan…."),
    ],
)
def test_bad_arguments(refused, arguments, sentence):
    x = arguments.pop("x", torch.zeros(2, 3))
    refused(lambda: small().log_likelihood(Denoiser(3, torch.float32), x, **arguments), sentence)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45"])
def test_bad_networks(solver):
    flow, x = small(), torch.ones(2, 3)
    for net, message in [
        (lambda x, sigma: x / (sigma < 1)[:, None], "the network returned NaN or infinity at"),
        (lambda x, sigma: (x - 1).abs().sqrt(), "the divergence of the network is NaN or infinity"),
        (lambda x, sigma: x.detach(), "has no gradient in x"),
        (lambda x, sigma: torch.zeros_like(x).requires_grad_(), "has no gradient in x"),
        (lambda x, sigma: x[:, :2], r"net must return a.*got shape \(2, 2\)\. Networks"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow.log_likelihood(net, x, solver=solver, steps=4)
    fields = PoissonFlow((3,), data_norm=1.0)
    with pytest.raises(ValueError, match="has no gradient in x"):
        fields.log_likelihood(lambda x, z: (x.detach(), -z), x, solver=solver, steps=4)
