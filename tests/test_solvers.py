import math
from itertools import pairwise

import pytest
import torch

import pfgm
from pfgm.solvers import SOLVERS, euler, heun, log_grid, multistep, rho_grid, rk45

DTYPE = torch.float64


def gaussian_denoiser(scale):
    """Posterior mean of N(0, scale²) data under normal noise z, where the flow is known exactly."""
    return lambda x, z: x * (scale**2 / (scale**2 + z**2))


def gaussian_solution(x, start, end, scale):
    return x * math.sqrt((scale**2 + end**2) / (scale**2 + start**2))


def cauchy_quantile_error(x_start, start, x_end, end, points):
    """In one dimension the flow keeps the quantile of the mixture of Cauchy densities."""

    def distribution(x, z):
        return (0.5 + torch.atan((x - points) / z) / math.pi).mean(1)

    return (distribution(x_end, end) - distribution(x_start, start)).abs().max()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("grid", [log_grid(50.0, 1e-3, 12), rho_grid(50.0, 1e-3, 12)])
def test_one_point_is_solved_exactly(name, grid):
    point = torch.tensor([[0.3, -2.0, 1.0]], dtype=DTYPE)
    x = torch.tensor([[40.0, 3.0, -7.0], [0.0, 900.0, 2.0]], dtype=DTYPE)
    result, _ = SOLVERS[name](lambda x, z: point.expand_as(x), x, grid)
    expected = point + (1e-3 / 50.0) * (x - point)
    # rk45 integrates an exponential to its own tolerance; the others are exact for a constant mean.
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-2 if name == "rk45" else 1e-12)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (multistep, 2)])
def test_order_of_convergence(solver, order):
    x = torch.linspace(-60, 60, 7, dtype=DTYPE)[:, None]
    exact = gaussian_solution(x, 20.0, 0.05, 1.0)
    errors = []
    for steps in (64, 128, 256):
        result, _ = solver(gaussian_denoiser(1.0), x, log_grid(20.0, 0.05, steps))
        errors.append(float((result - exact).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_rk45_meets_its_tolerance():
    x = torch.linspace(-60, 60, 7, dtype=DTYPE)[:, None]
    exact = gaussian_solution(x, 20.0, 0.05, 1.0)
    for tolerance in (1e-3, 1e-6):
        result, _ = rk45(gaussian_denoiser(1.0), x, [20.0, 0.05], rtol=tolerance, atol=tolerance)
        assert float((result - exact).abs().max()) < 20 * tolerance


@pytest.mark.parametrize("name", SOLVERS)
def test_two_points_keep_their_quantiles(name):
    points = torch.tensor([-1.0, 0.5], dtype=DTYPE)
    x = torch.linspace(-30, 30, 41, dtype=DTYPE)[:, None]

    def denoise(x, z):
        return pfgm.posterior_mean(x, points[:, None], r=z, backend="reference")

    result, _ = SOLVERS[name](denoise, x, log_grid(10.0, 1e-2, 400))
    bound = {"euler": 5e-3, "heun": 3e-5, "multistep": 3e-4, "rk45": 3e-3}[name]
    assert cauchy_quantile_error(x, 10.0, result, 1e-2, points) < bound


def test_multistep_follows_the_formula():
    """Against a transcription of the formulas for d_i, with a mean that varies."""
    generator = torch.Generator().manual_seed(0)
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


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 7), ("heun", 13), ("multistep", 7)])
def test_evaluations_are_counted(name, evaluations):
    calls = []

    def denoise(x, z):
        calls.append(z)
        return torch.zeros_like(x)

    _, nfe = SOLVERS[name](denoise, torch.ones(2, 3), log_grid(9.0, 0.1, 7))
    assert nfe == len(calls) == evaluations


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_sees_each_step_before_it_is_taken(name):
    calls, seen = [], []
    denoise = gaussian_denoiser(1.0)

    def counted(x, z):
        calls.append(z)
        return denoise(x, z)

    x = torch.randn(5, 2, dtype=DTYPE, generator=torch.Generator().manual_seed(1)) * 9
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


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_stops_the_run(name):
    seen = []

    def stop_at_two(info):
        seen.append(info)
        return info["step"] == 2

    x = torch.ones(3, 2, dtype=DTYPE) * 9
    result, nfe = SOLVERS[name](gaussian_denoiser(1.0), x, rho_grid(9.0, 0.1, 7), stop_at_two)
    assert len(seen) == 3
    assert torch.equal(result, seen[-1]["x"])
    assert nfe == seen[-1]["nfe"]


@pytest.mark.parametrize("grid", [log_grid, rho_grid])
def test_grids(grid):
    levels = grid(40.0, 1e-3, 11)
    assert len(levels) == 12
    assert levels[0] == 40.0
    assert levels[-1] == 1e-3
    assert all(a > b for a, b in pairwise(levels))
    assert grid(40.0, 1e-3, 1) == [40.0, 1e-3]


def test_grid_formulas():
    for i, z in enumerate(rho_grid(40.0, 1e-3, 11)):
        expected = (40.0 ** (1 / 7) + i / 11 * (1e-3 ** (1 / 7) - 40.0 ** (1 / 7))) ** 7
        assert z == pytest.approx(expected, rel=1e-12)
    for i, z in enumerate(log_grid(40.0, 1e-3, 11)):
        assert math.log(z) == pytest.approx(
            math.log(40.0) + i / 11 * math.log(1e-3 / 40.0), abs=1e-12
        )


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


def test_rk45_says_so_where_the_mean_is_not_smooth():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="rk45 found no step small enough"):
        rk45(lambda x, z: 1e15 * torch.randn(2, 2, generator=generator), torch.ones(2, 2), [9.0, 1])


@pytest.mark.parametrize("solver", [euler, heun, multistep, rk45])
def test_a_mean_that_is_not_finite_names_the_step_and_the_level(solver):
    def denoise(x, z):
        return 0.5 * x if z > 5 else x * math.nan

    with pytest.raises(ValueError, match=r"NaN or infinity in step [1-9]\d*, at [0-5]\.?\d*\."):
        solver(denoise, torch.ones(2, 2), [9.0, 6.0, 3.0, 1.0])
