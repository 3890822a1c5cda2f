"""Levels fitted to data: against the exact ends of the flow, and where they are used."""

import math
import pickle

import pytest
import torch

import pfgm
from benchmarks.common.problems import seeded
from pfgm import PoissonFlow, PoissonFlowPP
from pfgm.solvers import GRID_SOLVERS


@pytest.fixture(scope="module")
def data():
    angle = torch.arange(60) * (2 * math.pi / 60)
    return torch.stack([angle.cos(), 0.3 * angle.sin()], 1)


@pytest.mark.parametrize("solver", GRID_SOLVERS)
@pytest.mark.parametrize("make", [PoissonFlow.from_data, lambda d: PoissonFlowPP.from_data(d, D=8)])
def test_the_error_against_rk45_from_other_points(data, make, solver):
    flow = make(data)
    net, x = flow.empirical(data), flow.prior(200, generator=seeded(9))
    exact = flow.sample(net, 200, x_init=x, solver="rk45", rtol=1e-7, atol=1e-7)

    def error(schedule):
        result = flow.sample(net, 200, x_init=x, solver=solver, steps=6, schedule=schedule)
        return float((result - exact).norm(dim=1).median())

    flow.fit_levels(data, 6, solver=solver)
    assert error("fitted") < 0.8 * min(error("log"), error("rho"))


def test_levels_run_from_the_first_level_to_the_last(data):
    for flow in (PoissonFlow.from_data(data), PoissonFlow((2,), data_norm=1.0)):
        for steps in (1, 2, 4):
            levels = flow.fit_levels(data, steps, points=32)
            ends = flow.grid(steps, "log")
            assert len(levels) == steps + 1
            assert (levels[0], levels[-1]) == (ends[0], ends[-1])
            assert levels == sorted(levels, reverse=True)


def test_scaled_data_give_scaled_levels(data):
    levels = PoissonFlow.from_data(data).fit_levels(data, 4)
    larger = PoissonFlow.from_data(100 * data + 7).fit_levels(100 * data + 7, 4)
    assert larger == pytest.approx([100 * z for z in levels], rel=0.1)


def test_the_same_arguments_give_the_same_levels(data):
    flow, again = PoissonFlow.from_data(data), PoissonFlow.from_data(data)
    levels = flow.fit_levels(data, 4, points=64)
    torch.rand(3)
    assert again.fit_levels(pfgm.ReferenceSet(data), 4, points=64) == levels
    assert again.fit_levels(data, 4, points=64, seed=1) != levels


def test_bytes_and_many_references():
    rows = (torch.arange(12_000)[:, None] * torch.tensor([3, 5])).to(torch.uint8)
    flow = PoissonFlow.from_data(rows)
    assert len(flow.fit_levels(rows, 2, points=8)) == 3


def test_one_reference_leaves_nothing_to_fit():
    flow = PoissonFlowPP((2,), D=4)
    assert len(flow.fit_levels(torch.zeros(1, 2), 3, points=8)) == 4


def test_sampling_uses_them_for_their_solver_and_steps_alone(data):
    flow = PoissonFlow.from_data(data)
    unfitted = PoissonFlow.from_data(data)
    net, x = flow.empirical(data), flow.prior(20, generator=seeded(0))
    levels = flow.fit_levels(data, 4, points=32)

    def sample(flow, **options):
        return flow.sample(net, 20, x_init=x, **options)

    explicit = sample(flow, schedule=levels)
    assert torch.equal(sample(flow, steps=4), explicit)
    assert torch.equal(sample(flow, steps=4, schedule="fitted"), explicit)
    for options in (
        {"steps": 4, "schedule": "rho"},
        {"steps": 4, "last": 0.2},
        {"steps": 5},
        {"steps": 4, "solver": "heun"},
        {},
    ):
        assert torch.equal(sample(flow, **options), sample(unfitted, **options))
    assert flow.grid(4) == unfitted.grid(4)
    assert flow.grid(4, solver="multistep") == flow.grid(4, "fitted") == levels
    assert flow == unfitted
    assert torch.equal(sample(pickle.loads(pickle.dumps(flow)), steps=4), explicit)


def test_churn_takes_the_default_schedule(data):
    flow = PoissonFlowPP.from_data(data, D=8)
    net = flow.empirical(data)

    def sample():
        return flow.sample(net, 20, steps=4, churn=2.0, generator=seeded(0))

    before = sample()
    flow.fit_levels(data, 4, points=32)
    assert torch.equal(sample(), before)


def test_a_returned_list_is_not_the_kept_one(data):
    flow = PoissonFlow.from_data(data)
    flow.fit_levels(data, 3, points=8)[1] = 0.0
    flow.grid(3, "fitted")[1] = 0.0
    assert flow.grid(3, "fitted")[1] > 0


def test_a_weights_file_keeps_them(tmp_path, data):
    flow = PoissonFlow.from_data(data)
    net = flow.network("mlp", width=8, depth=1)
    flow.fit_levels(data, 3, points=8)
    flow.fit_levels(data, 4, solver="heun", points=8)
    pfgm.save(tmp_path / "net.safetensors", flow, net)
    assert pfgm.load(tmp_path / "net.safetensors").flow.fitted_levels == flow.fitted_levels


@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        *(
            (wrong, f"fitted_levels must hold lists of levels by solver and…, got {wrong}.")
            for wrong in (
                None,
                [],
                {"heun": [1.0]},
                {"heun": {"two": [9.0, 1.0, 0.0]}},
                {"heun": {"2": None}},
            )
        ),
        ({"rk45": {"2": [9.0, 0.0]}}, "the solver of fitted levels must be…got 'rk45'."),
        ({"heun": {"2": [80.0, 1.0, 0.5]}}, "the levels fitted for heun with 2…1.0, 0.5]."),
        ({"heun": {"2": [70.0, 1.0, 0.0]}}, "the levels fitted for heun with 2…1.0, 0.0]."),
        ({"heun": {"2": [80.0, 0.0]}}, "the levels fitted for heun with 2 steps…[80.0, 0.0]."),
        ({"heun": {"2": [80.0, 90.0, 0.0]}}, "schedule is not decreasing: 90.0…follows 80.0."),
        ({"heun": {"2": [80.0, math.nan, 0.0]}}, "schedule must be two or more…nan, 0.0]."),
        ({"heun": {"2": [80.0, "x", 0.0]}}, "schedule must be two or more…nan, 0.0]."),
        ({"heun": {"-2": [80.0, 0.0]}}, "steps must be an integer of at least 1…got -2."),
    ],
)
def test_levels_of_another_flow_are_refused(refused, described, sentence):
    flow = PoissonFlowPP((2,), D=4)
    refused(lambda: flow._restore_fitted(described), sentence)
    assert flow.fitted_levels == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 101}, "steps must be at most 100,…got 101: with more, the schedul…."),
        ({"solver": "rk45"}, "solver must be one of euler, heun, multistep, got 'rk45'."),
        ({"references": torch.zeros(3, 3)}, "references must have shape (M, *S)…got (3, 3)."),
        ({"references": torch.zeros(0, 2)}, "references must have shape (M, *S)…got (0, 2)."),
        ({"references": torch.full((3, 2), math.nan)}, "…NaN or infinity…."),
    ],
)
def test_bad_arguments(refused, data, options, sentence):
    flow = PoissonFlow.from_data(data)
    refused(lambda: flow.fit_levels(**{"references": data, "steps": 2, **options}), sentence)


def test_levels_that_were_not_fitted_are_asked_for(data):
    flow = PoissonFlow.from_data(data)
    net = flow.empirical(data)
    with pytest.raises(ValueError, match=r"no levels were fitted .* 3 steps \(fitted are .*none"):
        flow.sample(net, 2, steps=3, schedule="fitted")
    flow.fit_levels(data, 2, points=8)
    with pytest.raises(ValueError, match=r"'multistep' with 3 steps \(fitted are .*: 2\)"):
        flow.sample(net, 2, steps=3, schedule="fitted")
    with pytest.raises(ValueError, match=r"last is 0\.1, but fitted levels include it"):
        flow.sample(net, 2, steps=2, schedule="fitted", last=0.1)
