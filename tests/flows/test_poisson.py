import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import pfgm
from benchmarks.common.problems import seeded
from pfgm import PoissonFlow
from pfgm.flows.batched_sampling import draw_prior
from pfgm.networks.fields import MeanParts
from pfgm.solvers import SOLVERS

DATA = torch.randn(20, 2, generator=seeded(0))
FLOW, PLUS = PoissonFlow.from_data(DATA), pfgm.PoissonFlowPP((2,), D=16)
NET = FLOW.empirical(DATA)


@pytest.fixture
def flow():
    return PoissonFlow((2,), data_norm=2.0)


class Recorder(nn.Module):
    """A network that records its calls."""

    def __init__(self, flow, references):
        super().__init__()
        self.exact = flow.empirical(references)
        self.dropout = nn.Dropout(0.5)
        self.modes, self.gradients, self.levels = [], [], []

    def forward(self, x, z):
        self.modes.append(self.training)
        self.gradients.append(torch.is_grad_enabled())
        self.levels.append(z.clone())
        return self.exact(x, z)


def test_published_hyper_parameters_follow_from_the_data_norm():
    flow = PoissonFlow((3, 32, 32), data_norm=30.0)
    assert flow.M == 287
    assert flow.z_max == pytest.approx(38.57, abs=0.005)
    assert flow.upper_norm == pytest.approx(2679, abs=0.5)


def test_cifar10_values():
    flow = PoissonFlow.cifar10()
    assert (flow.M, flow.z_max, flow.upper_norm) == (291, 40, 3000)
    assert (flow.noise_std, flow.tau, flow.gamma, flow.z_min) == (0.01, 0.03, 5.0, 1e-3)
    assert PoissonFlow.cifar10(z_min=1e-2).z_min == 1e-2


def test_images_take_the_published_rules():
    digits = pfgm.data.digits().train
    assert PoissonFlow.from_data(digits, spread=0.5).spread == 0.5
    norm = float(digits.double().flatten(1).norm(dim=1).mean())
    assert PoissonFlow.from_data(digits) == PoissonFlow((1, 8, 8), data_norm=norm)
    assert PoissonFlow.from_data(digits, M=200).M == 200
    assert PoissonFlow.from_data(digits, data_norm=3.0) == PoissonFlow((1, 8, 8), data_norm=3.0)
    pixels = torch.tensor([[255] * 64, [0] * 64], dtype=torch.uint8)
    assert PoissonFlow.from_data(pixels) == PoissonFlow((64,), data_norm=8.0)
    # The settings in files from before there were other settings.
    assert set(PoissonFlow.from_data(digits).config) == {
        *("shape", "M", "noise_std", "tau", "gamma", "z_max", "z_min", "upper_norm"),
        *("restrict_M", "z_exp", "substitution"),
    }


@pytest.mark.parametrize(
    "of",
    [
        *(torch.Tensor.clone, torch.Tensor.numpy, pfgm.ReferenceSet),
        lambda data: data.requires_grad_(data.is_floating_point()),
    ],
)
def test_from_data_measures_center_and_spread(of):
    data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, -2.0]])
    flow = PoissonFlow.from_data(of(data))
    data = data.detach()
    torch.testing.assert_close(flow.center, data.double().mean(0))
    assert flow.spread == pytest.approx(float((data - data.mean(0)).square().mean().sqrt()))
    pixels = torch.tensor([[255, 255], [0, 0]], dtype=torch.uint8)
    assert PoissonFlow.from_data(of(pixels)).spread == pytest.approx(1.0)
    assert PoissonFlow.from_data(of(torch.full((3, 2), 7.0))).spread == pytest.approx(7.0)
    assert PoissonFlow.from_data(of(torch.zeros(3, 2))).spread == 1.0


def test_mirror_images_move_the_center():
    rows = pfgm.ReferenceSet(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
    assert rows.flipped().measures.mean.tolist() == [2.5, 2.5]
    assert rows.measures.mean.tolist() == [1.5, 3.5]


def test_config_is_the_whole_flow():
    flow = PoissonFlow((2, 3), data_norm=2.0, restrict_M=False, substitution="published")
    assert PoissonFlow(**flow.config) == flow
    assert flow != PoissonFlow((2, 3), data_norm=2.0)
    lines = repr(flow).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("PoissonFlow((2, 3), M=")
    assert "restrict_M=False" in lines[0]
    assert lines[1:] == [
        f"  levels {flow.z_max:.4g} to 0.001, N = 6, D = 1",
        "  samples by multistep in 40 steps on 'rho'",
    ]
    flow = PoissonFlow((2, 3), spread=2.0, center=torch.arange(6.0).view(2, 3), z_min=0.1)
    assert PoissonFlow(**json.loads(json.dumps(flow.config))) == flow
    assert flow != PoissonFlow((2, 3), spread=2.0, z_min=0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "one of M, data_norm and spread must be given,…chooses them from data."),
        ({"data_norm": 1.0, "spread": 1.0}, "only one of data_norm and…may be given, got both."),
        ({"spread": 1.0, "noise_std": 100.0}, "noise_std must be below 1.25…got 100.0."),
        ({"spread": 1.0, "center": [1.0, 2.0, 3.0]}, "center must have shape…or (), got (3,)."),
        ({"M": 200, "center": 1.0}, "center is given without spread;…rules centre data at 0."),
        ({"data_norm": 1e-3}, "data_norm is 0.001, too small for…the data up or noise_std down."),
        ({"M": 200, "z_min": 1e6}, "z_min must be below z_max, 2.947033024032773, got 1000000.0."),
        ({"M": 100_000}, "M must keep noise_std (1 + tau)^M at or…noise_std 0.01 and tau 0.03."),
        ({"M": 200, "restrict_M": "False"}, "restrict_M must be True, False or None, got 'False'."),
    ],
)
def test_bad_hyper_parameters(refused, arguments, sentence):
    refused(lambda: PoissonFlow((2,), **arguments), sentence)


def paper_perturbation(flow, n, generator):
    """Norm of the displacement and z by Algorithm 2 as the paper writes it."""
    m = torch.rand(n, generator=generator, dtype=torch.float64) * flow.M
    noise_z = flow.noise_std * torch.randn(n, generator=generator, dtype=torch.float64)
    noise_x = flow.noise_std * torch.randn(n, flow.N, generator=generator, dtype=torch.float64)
    if flow.restrict_M:
        short = noise_z.abs() < 0.005
        m[short] = (torch.rand(n, generator=generator, dtype=torch.float64) * 0.7 * flow.M)[short]
    growth = (1 + flow.tau) ** m
    return noise_x.norm(dim=1) * growth, noise_z.abs() * growth


@pytest.mark.parametrize("restrict_M", [True, False])
def test_perturbation_is_that_of_the_paper(restrict_M):
    flow = PoissonFlow((5,), data_norm=3.0, restrict_M=restrict_M)
    n = 40_000
    x_perturbed, z = flow.perturb(torch.ones(n, 5, dtype=torch.float64), seeded(0))
    norm, expected_z = paper_perturbation(flow, n, seeded(1))
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for result, expected in [
        ((x_perturbed - 1).norm(dim=1), norm),
        (z, expected_z),
        (z / (x_perturbed - 1).norm(dim=1), expected_z / norm),
    ]:
        difference = result.log().quantile(quantiles) - expected.log().quantile(quantiles)
        assert difference.abs().max() < 0.08  # four standard errors at this n
    assert ((x_perturbed - 1) / (x_perturbed - 1).norm(dim=1, keepdim=True)).mean(0).norm() < 0.02


def test_perturbation_is_reproducible_and_typed():
    flow = PoissonFlow((2, 3), data_norm=3.0)
    x = torch.zeros(4, 2, 3)
    a, b = flow.perturb(x, seeded(3)), flow.perturb(x, seeded(3))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert a[0].dtype == a[1].dtype == torch.float32
    pixels = torch.full((4, 2, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(flow.perturb(pixels, seeded(3))[0], a[0] + 1)
    assert [t.shape for t in flow.perturb(x[:0])] == [(0, 2, 3), (0,)]


def test_loss_is_half_the_squared_error_summed_over_the_field():
    flow = PoissonFlow((2, 3), data_norm=2.0)
    data = torch.randn(50, 2, 3, generator=seeded(0))
    batch = data[:8]

    def constant(x, z):
        return torch.full_like(x, 0.25), torch.full_like(z, -0.5)

    loss = flow.loss(constant, batch, data, seeded(7))
    x_perturbed, z = flow.perturb(batch, seeded(7))
    x, y = x_perturbed.double().flatten(1), data.double().flatten(1)
    s = (x[:, None] - y).square().sum(2) + z.double()[:, None] ** 2
    mean = torch.softmax(-(6 + 1) / 2 * s.log(), 1) @ y
    E = torch.cat([x - mean, z.double()[:, None]], 1)
    v = -math.sqrt(6) * E / (E.norm(dim=1, keepdim=True) + 5)
    prediction = torch.tensor([0.25] * 6 + [-0.5], dtype=torch.float64)
    expected = 0.5 * (prediction - v).square().sum(1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_balanced_loss_weighs_errors_of_the_mean_as_edm_does():
    """An error of the mean costs N/(R + γ)² + 1/σ_d², EDM's 1/s² + 1/σ_d² at s = R/√N for γ = 0."""
    N = 3000  # the noise is orthogonal to the error of the mean, but for 1/√N
    flow = PoissonFlow((N,), spread=0.4, noise_std=0.05, gamma=1.0)
    data = torch.zeros(1, N)  # so the mean is 0
    error = 1e-2 * torch.randn(N, generator=seeded(3))

    class OffByError(pfgm.networks.MLP):
        def _parts(self, x, z, labels):
            x = self._to_unit(x, z)[0]
            return MeanParts(x, 0.0, 1.0, (error.to(x) / self.scale).expand_as(x))

    net = flow.network(OffByError, width=1).double()
    for seed in range(20):
        x_perturbed, z = flow.perturb(data.double(), seeded(seed))
        R = torch.cat([x_perturbed, z[:, None]], 1).norm()
        size = 0.5 * error.double().square().sum()
        published = size * N / (R + 1.0) ** 2
        result = flow.loss(net, data.double(), generator=seeded(seed), weighting="published")
        assert float(result) == pytest.approx(float(published), rel=0.15)
        balanced = flow.loss(net, data.double(), generator=seeded(seed), weighting="balanced")
        assert float(balanced / result) == pytest.approx(
            1 + float(((R + 1.0) / (math.sqrt(N) * 0.4)) ** 2), rel=1e-6
        )
        assert flow.loss(net, data.double(), generator=seeded(seed)) == balanced


def test_loss_reaches_the_parameters_only(flow):
    data = torch.randn(50, 2, generator=seeded(0)).requires_grad_()
    net = pfgm.networks.MLP((2,), width=16)
    flow.loss(net, data[:8].detach(), data, seeded(1)).backward()
    assert data.grad is None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_prior_is_the_projected_hemisphere():
    flow = PoissonFlow((3,), M=300, z_max=7.0, upper_norm=900.0)
    x = flow.prior(40_000, generator=seeded(0), clip=False).double()
    # The angle of a uniform point of the hemisphere in R^4: ‖x‖/z_max = tan θ, density ∝ sin²θ.
    theta = torch.atan(x.norm(dim=1) / 7.0).sort().values
    distribution = (theta - theta.sin() * theta.cos()) / (math.pi / 2)
    uniform = (torch.arange(len(theta), dtype=torch.float64) + 0.5) / len(theta)
    assert (distribution - uniform).abs().max() < 1.63 / math.sqrt(len(theta))  # Kolmogorov, 1 %
    assert (x / x.norm(dim=1, keepdim=True)).mean(0).norm() < 0.02


def test_prior_clips_the_norm_and_keeps_the_direction():
    flow = PoissonFlow.cifar10()
    free = flow.prior(400, generator=seeded(0), clip=False).flatten(1)
    clipped = flow.prior(400, generator=seeded(0)).flatten(1)
    norms = clipped.norm(dim=1)
    assert norms.max() <= 3000.01
    assert norms.min() >= 1
    assert 0.3 < float((norms > 2999.9).float().mean()) < 0.7
    assert nn.functional.cosine_similarity(free, clipped).min() > 0.9999


# With a spread no setting has an absolute scale, and the prior is not cut off.


@pytest.mark.parametrize("N", [1, 2, 3, 4, 6, 8, 64, 3072])
@pytest.mark.parametrize(("scale", "offset"), [(0.01, 0.3), (100.0, -3000.0)])
def test_shifted_and_scaled_data_make_a_shifted_and_scaled_flow(N, scale, offset):
    data = torch.randn(200, N, generator=seeded(0), dtype=torch.float64)
    moved = scale * data + offset
    flow, other = PoissonFlow.from_data(data), PoissonFlow.from_data(moved)
    for name in ("noise_std", "gamma", "z_max", "z_min", "upper_norm", "z_exp", "spread"):
        assert getattr(other, name) == pytest.approx(scale * getattr(flow, name), rel=1e-9), name
    assert (other.M, other.tau) == pytest.approx((flow.M, flow.tau), rel=1e-9)
    start = flow.prior(20, generator=seeded(1)).double()
    torch.testing.assert_close(
        other.prior(20, generator=seeded(1)).double(), scale * start + offset, rtol=1e-4, atol=scale
    )
    x = flow.sample(flow.empirical(data), 20, x_init=start)
    y = other.sample(other.empirical(moved), 20, x_init=scale * start + offset)
    torch.testing.assert_close((y - offset) / scale, x, rtol=0, atol=1e-6)
    clean = data[:10]
    for own, theirs in zip(
        flow.perturb(clean, seeded(2)),
        other.perturb(scale * clean + offset, seeded(2)),
        strict=True,
    ):
        shift = offset if own.ndim == 2 else 0.0
        torch.testing.assert_close((theirs - shift) / scale, own, rtol=1e-6, atol=1e-6)


def test_the_prior_of_one_value_is_the_whole_cauchy_distribution():
    flow = PoissonFlow((1,), spread=2.0, center=30.0)
    x = (flow.prior(40_000, generator=seeded(0)).double() - 30).flatten().sort().values
    expected = 0.5 + torch.atan(x / flow.z_max) / math.pi
    uniform = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    assert (expected - uniform).abs().max() < 1.63 / math.sqrt(len(x))  # Kolmogorov, 1 %
    assert x.abs().max() > 1000 * flow.z_max  # the share beyond is 0.06 %
    small = PoissonFlow((1,), spread=1e-3).prior(100, generator=seeded(0), clip=True)
    assert small.abs().min() < 1e-2  # no bound in units of images
    clipped = flow.prior(100, generator=seeded(0), clip=True)
    assert clipped.sub(30).abs().max() <= flow.upper_norm * 1.0001


def ks_distance(samples, data):
    """Largest difference of the distribution functions of two sets of numbers."""
    at = torch.cat([samples, data]).sort().values
    below = [torch.searchsorted(v.sort().values, at, right=True) / len(v) for v in (samples, data)]
    return float((below[0] - below[1]).abs().max())


@pytest.mark.parametrize(("scale", "offset"), [(0.1, 0.0), (10.0, 5.0)])
def test_samples_of_one_value_are_distributed_as_the_data(scale, offset):
    data = scale * torch.randn(1000, 1, generator=seeded(0)) + offset
    flow = PoissonFlow.from_data(data)
    # The exact quantiles of the prior, so that only the flow's own error is left.
    share = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    start = flow.center + flow.z_max * torch.tan(math.pi * (share - 0.5))
    samples = flow.sample(flow.empirical(data), 1000, x_init=start.float()[:, None])
    assert ks_distance(samples[:, 0], data[:, 0]) < 0.01  # 0.043 is what 2000 against 5000 sees
    assert samples.max() <= data.max() + 1e-3 * scale
    assert samples.max() > data.quantile(0.995)


def test_beyond_trained_points_the_network_is_evaluated_on_the_line_to_the_center():
    N = 2
    data = torch.randn(50, N, generator=seeded(0), dtype=torch.float64) + 5
    flow = PoissonFlow.from_data(data)
    net, norms = flow.empirical(data), []

    def watched(x, z):
        norms.append((x - flow.center).norm(dim=1))
        return net(x, z)

    x = flow.center + torch.randn(20, N, generator=seeded(1), dtype=torch.float64)
    x = flow.center + (x - flow.center) * 10.0 ** torch.arange(-5, 15)[:, None].double()
    for z in (flow.z_max, 1.0, flow.z_min):
        result = flow.denoise(watched, x, z)
        expected = pfgm.posterior_mean(x, data, r=z)
        away = (x - flow.center).norm(dim=1)
        assert norms[-1].max() <= flow.upper_norm * (1 + 1e-9)
        variance = torch.linalg.eigvalsh(data.T.cov().view(N, N)).max()
        bound = (N + 1) * variance / flow.upper_norm
        assert ((result - expected).norm(dim=1) <= 1.5 * bound + 1e-7).all()
        near = away <= flow.upper_norm
        torch.testing.assert_close(result[near], expected[near], rtol=0, atol=1e-7)


def test_a_flow_with_a_spread_ends_at_zero():
    flow = PoissonFlow((2,), spread=1.0)
    grid = flow.grid(4)
    assert (grid[0], grid[-2], grid[-1]) == pytest.approx((flow.z_max, flow.z_min, 0.0))
    assert len(grid) == 5
    assert flow.grid(1) == [flow.z_max, 0.0]
    assert flow.grid(3, last=0.5)[-2:] == pytest.approx([0.5, 0.0])


def test_the_gamma_of_the_same_data_in_another_precision_is_the_same():
    data = torch.randn(40, 2, generator=seeded(0), dtype=torch.float64)
    flow, other = PoissonFlow.from_data(data), PoissonFlow.from_data(data.float())
    assert flow.gamma != other.gamma
    net = other.network("mlp", width=8)
    assert flow.loss(net, data.float()).isfinite()
    net.gamma = flow.gamma * (1 + 2e-6)
    with pytest.raises(ValueError, match="net must have the gamma of the flow"):
        flow.loss(net, data.float())
    unrelated = nn.Linear(1, 1)
    unrelated.gamma, unrelated.forward = 0.1, flow.empirical(data).forward
    assert flow.loss(unrelated, data).isfinite()


@pytest.mark.parametrize(("scale", "offset"), [(1 / 64, 0.5), (64.0, -512.0)])
def test_networks_follow_the_scale_of_the_data(scale, offset):
    data = torch.randn(100, 2, generator=seeded(0), dtype=torch.float64)
    flow, other = PoissonFlow.from_data(data), PoissonFlow.from_data(scale * data + offset)
    net, theirs = (each.network("mlp", width=8).double() for each in (flow, other))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=seeded(1))
    theirs.load_state_dict(net.state_dict())
    for z in (flow.z_min, 1.0, flow.z_max):
        mean = other.denoise(theirs, scale * data + offset, scale * z)
        own = flow.denoise(net, data, z)
        torch.testing.assert_close((mean - offset) / scale, own, rtol=1e-4, atol=1e-4)
    loss = other.loss(theirs, scale * data + offset, generator=seeded(2))
    own = flow.loss(net, data, generator=seeded(2))
    torch.testing.assert_close(loss, own, rtol=1e-3, atol=0)


@pytest.mark.parametrize("z", [1e-3, 0.1, 2.0, 4.99, 5.01, 17.0])
def test_denoise_inverts_the_normalisation(z):
    flow = PoissonFlow((2, 3), data_norm=2.0)
    data = torch.randn(50, 2, 3, generator=seeded(0), dtype=torch.float64)
    spread = torch.randn(20, 2, 3, generator=seeded(1), dtype=torch.float64)
    x = data[:20] + z * spread
    expected = pfgm.posterior_mean(x, data, r=z)
    net = flow.empirical(data)
    for each in (net, lambda x, z: net(x, z)):  # the mean itself, and that behind the field
        torch.testing.assert_close(flow.denoise(each, x, z), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("D", [1.0, 16.0])
def test_denoise_takes_one_level_or_one_a_row(D):
    data = torch.randn(50, 3, generator=seeded(0), dtype=torch.float64)
    flow = PoissonFlow.from_data(data) if D == 1 else pfgm.PoissonFlowPP((3,), D=D)
    net, x = flow.empirical(data), data[:4] + 0.3
    one = flow.denoise(net, x, 0.7)
    assert torch.equal(flow.denoise(net, x, torch.tensor(0.7, dtype=torch.float64)), one)
    levels = torch.tensor([0.7, 0.01, 3.0, 20.0], dtype=torch.float64)
    rows = flow.denoise(net, x, levels)
    for row, level in enumerate(levels.tolist()):
        alone = flow.denoise(net, x[row : row + 1], level)
        torch.testing.assert_close(rows[row : row + 1], alone, rtol=0, atol=1e-12)


def test_published_substitution_is_close_for_small_z_only():
    data = torch.randn(50, 2, generator=seeded(0), dtype=torch.float64)
    flow = PoissonFlow((2,), data_norm=2.0, substitution="published")
    net, errors = flow.empirical(data), []
    for z in (1e-3, 4.0):
        x = data[:20] + z
        exact = pfgm.posterior_mean(x, data, r=z)
        result = flow.denoise(lambda x, z: net(x, z), x, z)
        errors.append(float(((result - exact).norm(dim=1) / (x - exact).norm(dim=1)).max()))
    assert errors[0] < 1e-3
    assert 0.01 < errors[1] < 0.2


def test_the_last_step_goes_to_the_end_at_once(flow):
    grid = flow.grid(5, "log", last=0.1)
    assert grid[:-1] == pytest.approx(pfgm.solvers.log_grid(flow.z_max, 0.1, 4))
    assert grid[-1] == flow.z_min
    assert flow.grid(5, "rho", last=flow.z_min) == flow.grid(5, "rho")
    assert flow.grid(1, last=0.1) == [flow.z_max, flow.z_min]
    net = Recorder(flow, torch.randn(30, 2, generator=seeded(0)))
    flow.sample(net, 5, steps=5, schedule="log", last=0.1)
    assert net.levels == pytest.approx(grid[:-1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_and_their_evaluations(solver, flow):
    net = Recorder(flow, torch.randn(30, 2, generator=seeded(0)))
    x, nfe = flow.sample(net, 5, solver=solver, steps=6, generator=seeded(1), return_nfe=True)
    assert x.shape == (5, 2)
    assert nfe == len(net.levels)
    if each := SOLVERS[solver].evaluations:
        assert 5 * each < nfe <= 6 * each  # the last step may take fewer
    assert not any(net.modes)
    assert not any(net.gradients)
    assert net.training
    assert net.dropout.training
    assert net.levels[0].shape == (5,)
    assert float(net.levels[0][0]) == pytest.approx(flow.z_max)


def test_module_modes_are_restored_one_by_one_even_after_an_error(flow):
    net = Recorder(flow, torch.ones(1, 2))
    net.dropout.eval()

    def fail(info):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        flow.sample(net, 2, callback=fail)
    assert net.training
    assert not net.dropout.training


@pytest.mark.parametrize("solver", ["multistep", "rk45"])
def test_a_callback_stops_a_run_with_a_progress_bar(capsys, terminal, solver):
    seen = []

    def stop(info):
        seen.append(info)
        return info["step"] == 3

    x = FLOW.sample(NET, 5, generator=seeded(1), solver=solver, callback=stop, progress=True)
    assert len(seen) == 4
    assert torch.equal(x, seen[-1]["x"])
    assert "sampling" in capsys.readouterr().err


def test_networks_whose_code_is_not_pythons():
    traced = torch.jit.trace(lambda x, sigma: x / 2, (DATA, torch.ones(20)))
    assert PLUS.sample(traced, 2, steps=2).shape == (2, 2)


def test_device_rule(flow):
    """x_init, else generator, else parameters or buffers, else the CPU."""
    on_meta = nn.Linear(2, 2, device="meta")
    devices = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = on_meta

        def forward(self, x, z):
            devices.append(x.device.type)
            return torch.zeros_like(x), -torch.ones_like(z)

    flow.sample(Net(), 2, steps=1)
    flow.sample(Net(), 2, steps=1, generator=seeded())
    flow.sample(Net(), 2, steps=1, x_init=torch.zeros(2, 2))
    flow.sample(Net(), 2, steps=1, x_init=torch.zeros(2, 2), device="meta")
    flow.sample(lambda x, z: (x, z - 1), 2, steps=1)
    assert devices == ["meta", "cpu", "cpu", "meta"]


def test_rows_far_from_all_others_are_kept():
    """Some data lie beyond the largest norm that the spread alone would give."""
    data = torch.cat([0.01 * torch.randn(997, 1, generator=seeded(0)), torch.full((3, 1), 100.0)])
    flow = PoissonFlow.from_data(data)
    assert flow.upper_norm > 300
    at, z = torch.tensor([[100.0]]), flow.z_min
    exact = pfgm.posterior_mean(at, data, r=z)
    net = flow.empirical(data)
    torch.testing.assert_close(flow.denoise(net, at, z), exact)
    torch.testing.assert_close(flow.denoise(lambda x, z: net(x, z), at, z), exact)
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    start = flow.center + flow.z_max * torch.tan(math.pi * (share - 0.5))
    samples = flow.sample(net, 2000, x_init=start.float()[:, None], steps=100)
    assert float((samples > 99).double().mean()) == pytest.approx(0.003, abs=0.001)


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (100.0, 3000.0)])
def test_every_way_through_a_flow_follows_the_data(scale, offset):
    data = torch.randn(200, 2, generator=seeded(0), dtype=torch.float64)
    moved = scale * data + offset
    flow, other = PoissonFlow.from_data(data), PoissonFlow.from_data(moved)
    net, theirs = flow.empirical(data), other.empirical(moved)
    start = flow.prior(20, generator=seeded(1)).double()

    def back(x):
        return (x - offset) / scale

    def close(result, expected, atol=1e-4):
        torch.testing.assert_close(back(result), expected, rtol=0, atol=atol)

    drawn = flow.sample(net, 20, x_init=start, solver="rk45")
    close(other.sample(theirs, 20, x_init=scale * start + offset, solver="rk45"), drawn, 1e-3)
    way = flow.interpolate(net, data[:3], data[3:6], count=3, solver="heun", steps=40)
    a, b = moved[:3], moved[3:6]
    close(other.interpolate(theirs, a, b, count=3, solver="heun", steps=40), way, 1e-3)
    latent = flow.rescale(start, 0.5)
    close(other.rescale(scale * start + offset, 0.5), latent, 1e-2)
    mask = torch.tensor([True, False])
    filled = flow.inpaint(net, data[:9], mask, resample=2, generator=seeded(2))
    close(other.inpaint(theirs, moved[:9], mask, resample=2, generator=seeded(2)), filled, 1e-3)
    nats = flow.log_likelihood(net, data[:3], estimator="exact").nats
    theirs_nats = other.log_likelihood(theirs, moved[:3], estimator="exact").nats
    torch.testing.assert_close(theirs_nats + 2 * math.log(scale), nats, rtol=0, atol=1e-3)


def test_data_far_from_zero_in_float64():
    data = torch.randn(1000, 2, generator=seeded(0), dtype=torch.float64)
    expected = PoissonFlow.from_data(data).spread
    assert PoissonFlow.from_data(data + 1.7e9).spread == pytest.approx(expected, rel=1e-6)


def test_samples_without_dimensions():
    data = torch.randn(100, generator=seeded(0))
    flow = PoissonFlow.from_data(data)
    assert flow.shape == ()
    assert flow.sample(lambda x, z: flow.empirical(data)(x, z), 7).shape == (7,)
    assert flow.sample(flow.empirical(data), 7).shape == (7,)


def test_a_flow_used_in_a_transform_can_be_stored():
    flow = PoissonFlow.from_data(DATA)
    torch.func.grad(lambda x: flow.denoise(lambda x, z: NET(x, z), x, 1.0).sum())(DATA[:2])
    assert pickle.loads(pickle.dumps(flow)) == flow


def test_the_center_is_on_the_cpu_and_a_flow_prints_shortly():
    with torch.device("meta"):
        assert PoissonFlow((2,), spread=1.0, center=3.0).center.device.type == "cpu"
    assert len(repr(PoissonFlow((3, 32, 32), spread=1.0))) < 1000
    assert FLOW.prior(0).shape == (0, 2)


@pytest.mark.parametrize("flow", [PoissonFlow((2,), spread=1.0), PLUS], ids=["PFGM", "PFGM++"])
def test_levels_start_where_the_points_are(flow):
    net, options = flow.empirical(torch.eye(2)), {"schedule": [1.0, 0.1, 0.01]}
    message = r"schedule must start at .*, the level of the prior, got 1; to start elsewhere"
    for draw in (flow.sample, partial(pfgm.evaluation.draw_samples, flow)):
        with pytest.raises(ValueError, match=message):
            draw(net, 3, **options)
    assert flow.sample(net, 3, x_init=torch.ones(3, 2), **options).shape == (3, 2)
    rounded = torch.tensor([flow.first_level, 0.1, 0.01], dtype=torch.float16)
    assert flow.sample(net, 3, schedule=rounded.tolist()).shape == (3, 2)


@pytest.mark.parametrize("device", ["foo", "", "cpu:-1", 1.5, "cuda:4096"])
def test_a_device_that_is_not_there(device):
    """Each message is one sentence that names the argument and what is allowed."""
    for call in (
        FLOW.prior,
        partial(FLOW.sample, NET),
        lambda n, device: FLOW.sample(NET, 20, x_init=DATA, device=device),
        partial(PLUS.prior, generator=seeded()),
        partial(pfgm.evaluation.draw_samples, FLOW, NET),
        lambda n, device: pfgm.ReferenceSet(DATA).to(device),
        lambda n, device: pfgm.load("none", device=device),
    ):
        with pytest.raises(ValueError, match=r"^device must be .*, got .*: torch ") as e:
            call(2, device=device)
        assert repr(device).strip("'") in str(e.value)
        assert len(str(e.value)) < 150


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_points_are_carried(solver):
    for flow in (FLOW, PLUS):
        net = flow.empirical(DATA)
        assert flow.solve(net, DATA[:0], [3.0, 1.0, 0.5], solver=solver)[0].shape == (0, 2)
        for call in (partial(flow.encode, net, DATA[:0]), partial(flow.sample, net, 0)):
            points, nfe = call(solver=solver, return_nfe=True)
            assert points.shape == (0, 2)
            assert nfe == 0
        assert flow.decode(net, DATA[:0], solver=solver).shape == (0, 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_levels_that_repeat_and_turn(solver):
    flow, net, x = FLOW, NET, DATA[:3]
    torch.testing.assert_close(
        flow.solve(net, x, [3.0, 2.0, 2.0, 1.0], solver=solver)[0],
        flow.solve(net, x, [3.0, 2.0, 1.0], solver=solver)[0],
    )
    turned = flow.solve(net, x, [2.0, 3.0, 1.0], solver=solver)[0]
    assert turned.isfinite().all()
    assert not torch.equal(turned, x)
    if solver != "rk45":
        result, evaluations = flow.solve(net, x, [3.0], solver=solver)
        assert torch.equal(result, x)
        assert evaluations == 0


def test_tensors_and_arrays_of_one_value_are_numbers():
    options = {"x_init": DATA[:3], "condition": {"far": True}}
    either = lambda x, z, far=False: NET(x + far, z)  # noqa: E731
    expected = FLOW.sample(either, 3, guidance=2.0, **options)
    for weight in (torch.tensor(2.0), torch.tensor([2.0]), np.array(2.0), np.float32(2.0)):
        assert torch.equal(FLOW.sample(either, 3, guidance=weight, **options), expected)
        assert PoissonFlow((2,), M=weight) == PoissonFlow((2,), M=2.0)
    assert FLOW.sample(NET, np.int64(2), steps=np.int64(3)).shape == (2, 2)
    without = FLOW.sample(NET, 3, x_init=DATA[:3])
    assert torch.equal(FLOW.sample(NET, 3, x_init=DATA[:3], guidance=1.0), without)


PLAIN, LABELLED = PoissonFlow((2,), data_norm=1.0), pfgm.networks.MLP((2,), width=8, classes=2)
WHOLE = torch.ones(3, 2, dtype=torch.int64)
GRIDS = [], [1.0], [1.0] * 2, [1.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0], [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: FLOW.empirical(torch.ones(3, 3)), "references must have…S = (2,), got (3, 3)."),
        (lambda: FLOW.empirical(torch.ones(0, 2)), "references must have…S = (2,), got (0, 2)."),
        (lambda: FLOW.empirical(WHOLE), "TypeError: references must be…use references.float()."),
        (lambda: PoissonFlow((2,), spread=1e-20), "spread must be from 1e-15…square, got 1e-20."),
        (lambda: PoissonFlow((2,), spread=1e20), "spread must be from 1e-15…square, got 1e+20."),
        (lambda: PoissonFlow.from_data({"x": DATA}), "TypeError: data must be…got dict."),
        (lambda: PoissonFlow.from_data(DATA.tolist()), "TypeError: Item 0 of…lists of numbers."),
        (lambda: PoissonFlow.from_data(1e200 * DATA.double()), "data must have…large for that."),
        (
            lambda: PoissonFlow.from_data(DATA[:0]),
            "data must have shape (n, *S),…number, got (0, 2).",
        ),
        (
            lambda: PoissonFlow.from_data(DATA / 0),
            "data must be finite, got NaN or infinity (first in row 0).",
        ),
        (lambda: PoissonFlow.from_data(WHOLE), "TypeError: data must be one…it, as by .float()."),
        (lambda: FLOW.perturb(DATA[:, :1]), "x must have shape (B, *S)…S = (2,), got (20, 1)."),
        (lambda: FLOW.perturb(WHOLE), "TypeError: x must be uint8 or…use x.float()."),
        (
            lambda: FLOW.prior(2, generator=seeded(), device="meta"),
            "device must be that of generator, cpu, got meta.",
        ),
        (lambda: draw_prior(FLOW, 10**14, seed=0), "MemoryError: n is…memory of this machine."),
        (lambda: FLOW.loss(NET, DATA[:0]), "x must hold at least one sample, got none."),
        (lambda: PLUS.loss(PLUS.empirical(DATA), DATA[:0], DATA), "x must hold at…got none."),
        (lambda: FLOW.loss(lambda x, z: (x, z[:, None]), DATA), "net must return…shape (20, 1)."),
        (lambda: FLOW.sample(lambda x, z: x, 2), "net must return (field_x,…of PoissonFlowPP."),
        (lambda: FLOW.sample(lambda x, z: (x, None), 2), "net must return…(2, 2) and NoneType."),
        (lambda: FLOW.sample(lambda x: x, 2), "TypeError: net must take x…one that takes (x)."),
        (lambda: FLOW.sample(pfgm.networks.MLP, 2), "TypeError: net must be a…the class MLP."),
        (lambda: FLOW.sample(None, 2), "TypeError: net must be a…and the level, got a NoneType."),
        (
            lambda: FLOW.sample(pfgm.networks.MLP((2,), width=8), 2),
            "net must have the gamma of the flow…, got 5.0; flow.network makes…fits.",
        ),
        (lambda: FLOW.sample(NET, 4, x_init=DATA), "x_init must be floating…of shape (20, 2)."),
        (lambda: FLOW.sample(NET, 3, x_init=WHOLE), "x_init must be floating…of shape (3, 2)."),
        (lambda: FLOW.sample(NET, 2, guidance=3.0), "guidance is 3.0, but…labels}."),
        (
            lambda: FLOW.sample(NET, 5, schedule=[3.0, 1.0], last=0.1),
            "last is 0.1, but schedule holds all levels; give one of them.",
        ),
        (lambda: FLOW.denoise(NET, DATA, "a"), "level must be a number of…can hold, got 'a'."),
        (lambda: FLOW.denoise(NET, DATA, 1e39), "level must be a number of…can hold, got 1e+39."),
        (lambda: FLOW.network("mlp")(DATA, math.nan), "z must be a number of…can hold, got nan."),
        (lambda: FLOW.network("mlp")(DATA, -1.0), "z must be a number of at…can hold, got -1.0."),
        (lambda: FLOW.denoise(NET, DATA, 1j * DATA[:, 0]), "TypeError: level…torch.complex64."),
        (
            lambda: PLAIN.loss(LABELLED, DATA, condition={"labels": 1}),
            "TypeError: labels must be a torch.Tensor of integers,…got int.",
        ),
        (
            lambda: PLAIN.loss(LABELLED, DATA, condition=DATA),
            "TypeError: condition must be a dict of keyword arguments of…got Tensor.",
        ),
        *(
            (
                partial(PLAIN.sample, NET, 5, last=last),
                f"last must be at least 0.001 …got {last!r}.",
            )
            for last in (0.0, PLAIN.z_max, "0.1")
        ),
        *(
            (partial(FLOW.solve, NET, DATA, [1.0, z]), f"grid must hold finite…got {z!r}.")
            for z in (math.nan, math.inf, -1.0, "1")
        ),
        *(
            (partial(FLOW.solve, NET, DATA, grid), f"grid must have two different…got {grid}.")
            for grid in GRIDS
        ),
    ],
)
def test_refusals(refused, call, sentence):
    refused(call, sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"generator": 0}, "TypeError: generator must be a…got int."),
        ({"condition": 3}, "TypeError: condition must be a dict of…{'labels': labels}, got int."),
        ({"unconditional": [1]}, "TypeError: unconditional must be a…labels}, got list."),
        ({"condition": {"labels": 1}}, "TypeError: labels must be a…of shape (2,), got int."),
        ({"x_init": DATA.numpy()}, "TypeError: x_init must be a…use torch.as_tensor(x_init)."),
        ({"step": 5}, "TypeError: solver 'multistep' takes no…'step'; its options are: none."),
        ({"seed": 0}, "TypeError: solver 'multistep' takes no…rch.Generator().manual_seed(seed)."),
        ({"labels": 1}, "TypeError: solver 'multistep' takes no…condition={'labels': labels}."),
        ({"solver": "rk45", "tol": 1}, "TypeError: solver 'rk45' takes…options are: rtol, atol."),
        ({"solver": "heun", "churn": 3}, "TypeError: solver 'heun' takes…its options are: none."),
    ],
)
def test_refused_options_of_sample(refused, options, sentence):
    refused(lambda: PLAIN.sample(LABELLED, 2, **options), sentence)
