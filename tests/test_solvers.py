import math
from itertools import pairwise
from typing import get_args

import pytest
import torch

import pfgm
from benchmarks.common.problems import seeded
from pfgm.flows.likelihood import centred_prior
from pfgm.networks import field_from_mean
from pfgm.solvers import (
    GRID_SOLVERS,
    SAMPLERS,
    SOLVERS,
    Solver,
    SolverName,
    euler,
    heun,
    log_grid,
    multistep,
    rho_grid,
    rk45,
)

DTYPE = torch.float64


def gaussian_denoiser(scale):
    """Posterior mean of N(0, scale²) data under normal noise z, where the flow is known exactly."""
    return lambda x, z: x * (scale**2 / (scale**2 + z**2))


def gaussian_solution(x, start, end, scale):
    return x * math.sqrt((scale**2 + end**2) / (scale**2 + start**2))


@pytest.mark.parametrize("solver", GRID_SOLVERS.values(), ids=GRID_SOLVERS)
def test_order_of_convergence(solver):
    """For the mixture of N(±1, ½²). In one dimension the flow keeps the quantiles."""

    def denoiser(x, z):
        variance = z**2 + 0.25
        return (x / 4 + z**2 * (x / variance).tanh()) / variance

    def quantiles(x, z):
        spread = math.sqrt(z**2 + 0.25)
        return sum(torch.special.ndtr((x + center) / spread) for center in (-1, 1)) / 2

    x = torch.linspace(-40, 40, 6, dtype=DTYPE)[:, None]
    errors = []
    for steps in (64, 128, 256):
        result, _ = solver(denoiser, x, log_grid(20.0, 0.05, steps))
        errors.append(float((quantiles(result, 0.05) - quantiles(x, 20.0)).abs().max()))
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - solver.order) < 0.1


def test_rk45_meets_its_tolerance():
    x = torch.linspace(-60, 60, 7, dtype=DTYPE)[:, None]
    exact = gaussian_solution(x, 20.0, 0.05, 1.0)
    for tolerance in (1e-3, 1e-6):
        result, _ = rk45(gaussian_denoiser(1.0), x, [20.0, 0.05], rtol=tolerance, atol=tolerance)
        assert float((result - exact).abs().max()) < 20 * tolerance


def test_multistep_follows_the_formula():
    """Against a transcription of the formulas for d_i, with a mean that varies."""
    generator = seeded(0)
    grid = rho_grid(30.0, 0.01, 6)
    means = torch.randn(6, 4, 2, dtype=DTYPE, generator=generator)
    start = x = torch.randn(4, 2, dtype=DTYPE, generator=generator) * 30
    for i in range(6):
        d = means[i]
        if 0 < i < 5:
            q = math.log(grid[i - 1] / grid[i]) / math.log(grid[i] / grid[i + 1])
            d = means[i] * (1 + 1 / (2 * q)) - means[i - 1] / (2 * q)
        x = d + grid[i + 1] / grid[i] * (x - d)
    result, _ = multistep(lambda x, z: means[grid.index(z)], start, grid)
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_sees_each_step_before_it_is_taken_and_may_stop_the_run(name):
    calls, seen = [], []
    denoise = gaussian_denoiser(1.0)

    def counted(x, z):
        calls.append(z)
        return denoise(x, z)

    x = torch.randn(5, 2, dtype=DTYPE, generator=seeded(1)) * 9
    grid = rho_grid(9.0, 0.1, 7)
    plain, nfe = SOLVERS[name](denoise, x, grid)
    watched, watched_nfe = SOLVERS[name](counted, x, grid, seen.append)
    assert torch.equal(plain, watched)  # watching changes nothing
    assert nfe == watched_nfe == len(calls)  # and costs no evaluation
    assert [info["step"] for info in seen] == list(range(len(seen)))
    assert torch.equal(seen[0]["x"], x)
    assert seen[0]["z"] == pytest.approx(9.0)
    if name != "rk45":
        assert [info["z"] for info in seen] == grid[:-1]
    for info in seen:
        torch.testing.assert_close(info["mean"], denoise(info["x"], info["z"]), rtol=1e-9, atol=0)
    stopped, nfe = SOLVERS[name](denoise, x, grid, lambda info: info["step"] == 2)
    assert torch.equal(stopped, seen[2]["x"])
    assert nfe == seen[2]["nfe"]


def test_grid_formulas():
    for grid, scale in ((rho_grid, lambda z: z ** (1 / 7)), (log_grid, math.log)):
        levels = grid(40.0, 1e-3, 11)
        first, last = scale(40.0), scale(1e-3)
        expected = [first + i / 11 * (last - first) for i in range(12)]
        assert list(map(scale, levels)) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert (levels[0], levels[-1]) == (40.0, 1e-3)
        assert grid(40.0, 1e-3, 1) == [40.0, 1e-3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rk45_starts_where_the_slope_is_nearly_zero(dtype):
    """Up from data points, where the first step that it tries has no bounds."""
    points = torch.tensor([[-1.0, 0.5], [0.3, 0.7]], dtype=dtype)
    tiny = 4 * torch.finfo(dtype).eps

    def denoise(x, z):
        return pfgm.posterior_mean(x, points, r=z, backend="reference")

    for offset in (0.0, tiny):
        up, _ = rk45(denoise, points + offset, [1e-3, 50.0], rtol=1e-5, atol=1e-5)
        back, _ = rk45(denoise, up, [50.0, 1e-3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back, points, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_mean_of_another_shape_is_refused(solver):
    for shape in ((1, 3), (2, 1), ()):
        with pytest.raises(ValueError, match=r"prediction must have shape \(2, 3\), got \("):
            solver(lambda x, z, shape=shape: torch.ones(shape), torch.zeros(2, 3), [3.0, 1.0, 0.1])


def test_rk45_needs_a_tolerance():
    with pytest.raises(ValueError, match=r"rtol or atol must be above 0, got 0 for both\."):
        rk45(gaussian_denoiser(1.0), torch.ones(2, 2), [9.0, 1.0], rtol=0.0, atol=0.0)


def test_rk45_raises_if_the_mean_is_not_smooth():
    generator = seeded(0)
    with pytest.raises(ValueError, match="rk45 found no step small enough"):
        rk45(lambda x, z: 1e15 * torch.randn(2, 2, generator=generator), torch.ones(2, 2), [9.0, 1])


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_mean_that_is_not_finite_names_the_step_and_the_level(solver):
    def denoise(x, z):
        return 0.5 * x if z > 5 else x * math.nan

    with pytest.raises(ValueError, match=r"NaN or infinity in step [1-9]\d*, at [0-5]\.?\d*\."):
        solver(denoise, torch.ones(2, 2), [9.0, 6.0, 3.0, 1.0])


class Reusing(torch.nn.Module):
    """A network that returns the same buffers at each call, as one in a CUDA graph does."""

    def __init__(self, net):
        super().__init__()
        self.net, self.kept = net, None

    def forward(self, *inputs, **condition):
        outputs = self.net(*inputs, **condition)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if self.kept is None or self.kept[0].shape != outputs[0].shape:
            self.kept = tuple(torch.empty_like(part) for part in outputs)
        for buffer, part in zip(self.kept, outputs, strict=True):
            buffer.copy_(part)
        return self.kept if len(self.kept) > 1 else self.kept[0]


@pytest.fixture(scope="module")
def labelled():
    """Flows, each with a smooth network for two classes."""
    data = torch.randn(60, 3, generator=seeded(0))
    flow, plus = pfgm.PoissonFlow.from_data(data), pfgm.PoissonFlowPP.from_data(data, D=128)

    def mean(x, level, second=False):
        return x / (1 + level.square())[:, None] + (0.3 if second else 0.0)

    def field(x, level, second=False):
        return field_from_mean(x, level, mean(x, level, second), gamma=flow.gamma)

    return [(flow, field), (plus, mean)]


def ways(flow):
    """Everything that evaluates a network more than once, as functions of the network."""
    prior = flow.prior(20, generator=seeded(1))
    for solver in (*SOLVERS, "consistency"):
        options = {"solver": solver, "x_init": prior, "steps": 6}
        yield lambda net, o=options: flow.sample(net, 20, generator=seeded(2), **o)
    for solver in GRID_SOLVERS:
        options = {"solver": solver, "x_init": prior, "steps": 6, "guidance": 2.0}
        options["condition"] = {"second": True}
        yield lambda net, o=options: flow.sample(net, 20, **o)
        yield lambda net, s=solver: flow.encode(net, torch.ones(4, 3), solver=s, steps=6)
    mask = torch.tensor([True, False, False])
    yield lambda net: flow.inpaint(net, torch.ones(4, 3), mask, resample=1, generator=seeded(3))
    model = lambda net: pfgm.as_k_diffusion(net, flow)  # noqa: E731
    level = torch.full((20,), 0.5)
    yield lambda net: (lambda m: m(prior, 9 * level) - m(prior, level))(model(net))


@pytest.mark.parametrize("which", [0, 1])
def test_a_network_may_return_the_same_memory_at_each_call(which, labelled):
    flow, net = labelled[which]
    for number, way in enumerate(ways(flow)):
        assert torch.equal(way(Reusing(net)), way(net)), number
        with torch.inference_mode():
            assert torch.equal(way(Reusing(net)), way(net)), number


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("solver", [*SOLVERS, "consistency"])
def test_kept_and_returned_tensors_are_not_overwritten(solver, which, labelled):
    flow, net = labelled[which]
    x = flow.prior(5, generator=seeded(1))

    def watched(net):
        seen = []
        options = {"solver": solver, "steps": 4, "x_init": x, "callback": seen.append}
        first = flow.sample(net, 5, generator=seeded(2), **options)
        flow.denoise(net, torch.zeros(5, 3), 0.5)
        return [first, *(info[key] for info in seen for key in ("x", "mean"))]

    for plain, reusing in zip(watched(net), watched(Reusing(net)), strict=True):
        assert torch.equal(plain, reusing)


@pytest.mark.parametrize("returned", [lambda x: x, lambda x: x[:1].expand_as(x), lambda x: x[:]])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_network_may_return_a_view_of_its_points(solver, returned):
    x = torch.randn(6, 3, dtype=DTYPE, generator=seeded(0))
    with torch.no_grad():
        views, copies = (
            solver(lambda x, z, c=c: c(returned(x)), x, [9.0, 5.0, 3.0, 2.0, 1.0])[0]
            for c in (lambda x: x, torch.clone)
        )
    assert torch.equal(views, copies)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_a_network_that_changes_its_input_is_refused(which, inference, labelled):
    flow, net = labelled[which]
    letter = ("z", "sigma")[which]

    def changing(name):
        def changed(x, level, shift=None):
            prediction = net(x, level)
            {"x": x, letter: level, "shift": shift}[name].mul_(0.5)
            return prediction

        return changed

    condition = {"shift": torch.ones(4)}
    with torch.inference_mode(inference):
        shift = torch.ones(4)
        for name in ("x", letter, "shift"):
            sentence = f"net must not change {name} in place; change a copy, such"
            for solver in (*SOLVERS, "consistency"):
                with pytest.raises(ValueError, match=sentence):
                    flow.sample(changing(name), 4, solver=solver, condition={"shift": shift})
            with pytest.raises(ValueError, match=sentence):
                flow.denoise(changing(name), torch.ones(4, 3), 1.0, {"shift": shift})
    with pytest.raises(ValueError, match="net must not change x in place; change a"):
        flow.loss(changing("x"), torch.randn(4, 3), condition=condition)
    with pytest.raises(ValueError, match="denoise must not change x in place; change"):
        euler(lambda x, z: x.mul_(0.5), torch.ones(2, 2), [2.0, 1.0])


def midpoint(denoise, x, grid, callback=None, *, weight=1.0):
    """Second order: a step in log z with the slope at its middle. A function as users write it."""
    nfe = 0
    for z, next_z in pairwise(grid):
        mean = pfgm.functional.steps.implied_mean(x, denoise(x, z), z)
        nfe += 1
        if next_z == 0:
            return mean, nfe
        h = math.log(next_z / z)
        middle = z * math.exp(h / 2)
        half = x + h / 2 * (x - mean)
        mean = pfgm.functional.steps.implied_mean(half, denoise(half, middle), middle)
        nfe += 1
        x = x + weight * h * (half - mean)
    return x, nfe


def flows_of_a_gaussian(scale):
    """PFGM++ with D = ∞ and its network for N(0, scale²), whose lines and densities are known."""
    flow = pfgm.PoissonFlowPP((2,), D=math.inf, sigma_data=scale, sigma_min=0.01, sigma_max=20.0)
    return flow, lambda x, sigma: x * (scale**2 / (scale**2 + sigma.square()))[:, None]


def test_names_are_those_of_the_table():
    assert get_args(SolverName) == tuple(SAMPLERS)


@pytest.mark.parametrize("solver", [heun, midpoint])
def test_a_function_solves_in_all_methods(solver):
    """Against the known solutions and density; the function heun against the name to the bit."""
    flow, net = flows_of_a_gaussian(0.7)
    x = torch.randn(6, 2, dtype=DTYPE, generator=seeded(0))
    levels = log_grid(20.0, 0.01, 600)
    latent = flow.encode(net, x, solver=solver, schedule=levels)
    expected = gaussian_solution(x, 0.01, 20.0, 0.7)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-5)
    back = flow.decode(net, latent, solver=solver, schedule=levels)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    samples, nfe = flow.sample(
        net, 6, solver=solver, schedule=levels, x_init=latent, return_nfe=True
    )
    torch.testing.assert_close(samples, x, rtol=1e-4, atol=1e-5)
    assert nfe == (1200 if solver is midpoint else 1199)
    if solver is heun:
        for method, start in ((flow.encode, x), (flow.decode, latent)):
            assert torch.equal(
                method(net, start, solver=solver, steps=9),
                method(net, start, solver="heun", steps=9),
            )

    def normal(level):
        return lambda x: centred_prior(x, math.hypot(0.7, level), math.inf)

    options = {"steps": 400, "estimator": "exact", "prior_log_prob": normal(20.0)}
    nats = flow.log_likelihood(net, x, solver=solver, **options).nats
    torch.testing.assert_close(nats, normal(0.01)(x), rtol=0, atol=2e-3)


def test_levels_are_fitted_for_a_function_and_not_kept():
    data = torch.randn(80, 2, generator=seeded(0))
    flow = pfgm.PoissonFlow.from_data(data)
    levels = flow.fit_levels(data, 4, solver=heun, points=64)
    assert flow.fitted_levels == {}
    assert levels == pfgm.PoissonFlow.from_data(data).fit_levels(data, 4, solver="heun", points=64)
    assert flow.sample(flow.empirical(data), 3, solver=heun, schedule=levels).shape == (3, 2)


@pytest.mark.parametrize("whole", [False, True])
def test_a_function_that_works_in_place_leaves_the_data_as_they_are(whole):
    """Data and points of a caller, which may be a view or expanded."""

    def in_place(denoise, x, grid, callback=None):
        return midpoint(denoise, x, grid)[0].mul_(0).add_(x.mul_(0.5)), 0

    flow, net = flows_of_a_gaussian(0.7)
    solver = Solver(in_place) if whole else in_place
    for data in (torch.ones(4, 2, dtype=DTYPE), torch.ones(1, 2, dtype=DTYPE).expand(4, 2)):
        for call in (
            lambda x: flow.encode(net, x, solver=solver),
            lambda x: flow.decode(net, x, solver=solver),
            lambda x: flow.sample(net, 4, x_init=x, solver=solver),
            lambda x: flow.solve(net, x, [2.0, 1.0], solver=solver),
        ):
            result = call(data)
            result = result[0] if isinstance(result, tuple) else result
            assert torch.equal(data, torch.ones(4, 2, dtype=DTYPE))
            assert torch.equal(result, torch.full_like(result, 0.5))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: None, r".*, \(a tensor \(4, 2\) of torch.float32 on cpu, int\), got NoneType"),
        (lambda x: x, r".*, got a tensor \(4, 2\) of"),
        (lambda x: (x, None), r".*, got \(a tensor .*, NoneType\)"),
        (lambda x: (None, 1), r".*, got \(NoneType, int\)"),
        (lambda x: (x[:1], 1), r".*, got \(a tensor \(1, 2\)"),
        (lambda x: (x.double(), 1), r".*, got \(a tensor .* torch.float64"),
        (lambda x: (x.to("meta"), 1), ".*, got .* on meta"),
        (lambda x: (x * math.nan, 1), "finite points, got NaN or infinity"),
        (lambda x: (x / 0, 1), "finite points, got NaN or infinity"),
    ],
)
def test_a_result_that_no_run_can_have_is_refused(result, message):
    flow, net = flows_of_a_gaussian(0.7)
    x = torch.ones(4, 2)
    solver = lambda denoise, x, grid, callback=None: result(x)  # noqa: E731
    for call in (
        lambda: flow.sample(net, 4, solver=solver),
        lambda: flow.encode(net, x, solver=solver),
        lambda: flow.solve(net, x, [2.0, 1.0], solver=Solver(solver, evaluations=1)),
    ):
        with pytest.raises(ValueError, match="solver must return " + message):
            call()


def test_a_result_is_checked_once_a_run(monkeypatch):
    """The values are read once, however many steps there are."""
    reads = []
    all_finite = pfgm.solvers.all_finite
    monkeypatch.setattr(pfgm.solvers, "all_finite", lambda x: reads.append(1) or all_finite(x))
    flow, net = flows_of_a_gaussian(0.7)
    for steps in (1, 9):
        flow.sample(net, 3, solver=midpoint, steps=steps)
    assert len(reads) == 2


def test_a_named_solver_takes_part_everywhere(monkeypatch):
    """An entry of the table decides what the flow's methods do with a solver."""
    for table in (SAMPLERS, SOLVERS, GRID_SOLVERS):
        monkeypatch.setitem(
            table, "midpoint", Solver(midpoint, order=2, evaluations=2, least_steps=50)
        )
    flow, net = flows_of_a_gaussian(0.7)
    assert flow.default_steps("midpoint") == flow.default_steps(midpoint) == 50
    assert flow.sample(net, 2, solver="midpoint", return_nfe=True)[1] == 99
    data = torch.randn(80, 2, generator=seeded(0))
    levels = flow.fit_levels(data, 3, solver="midpoint", points=16)
    assert flow.grid(3, solver="midpoint") == flow.fitted_levels["midpoint"][3] == levels
    with pytest.raises(ValueError, match=r"solver must be one of euler,.*got 'midpoint'\."):
        flow.sample(net, 2, solver="midpoint", churn=1.0)


def test_options_of_a_function_are_checked():
    flow, net = flows_of_a_gaussian(0.7)
    assert flow.sample(net, 2, solver=midpoint, steps=3, weight=0.9).shape == (2, 2)
    with pytest.raises(TypeError, match="takes no option 'rtol'; its options are: weight"):
        flow.sample(net, 2, solver=midpoint, steps=3, rtol=1e-3)
    with pytest.raises(TypeError, match="takes no option 'weight'; its options are: none"):
        flow.sample(net, 2, steps=3, weight=0.9)
    with pytest.raises(ValueError, match=r"solver must be one of euler,.*got 'midpoint'\."):
        flow.sample(net, 2, solver="midpoint", steps=3)
    with pytest.raises(ValueError, match="no levels were fitted"):
        flow.sample(net, 2, solver=midpoint, steps=3, schedule="fitted")
