import math

import pytest
import torch

from benchmarks.common.problems import seeded
from pfgm import PoissonFlow, PoissonFlowPP
from pfgm.data import digits
from pfgm.solvers import SOLVERS


def flows(shape, data_norm=1.5):
    diffusions = [PoissonFlowPP(shape, D=D) for D in (16, math.inf)]
    return [PoissonFlow(shape, data_norm=data_norm), *diffusions]


SHARED = torch.tensor([[1.0, -0.5]]).expand(4, 2)
REST = torch.tensor([[0.8, 0.1], [-0.7, 0.2], [0.3, -0.9], [-0.1, -0.6]])
REFERENCES = torch.cat([SHARED, REST], 1)  # they differ only in their last two numbers
MASK = torch.tensor([True, True, False, False])


@pytest.mark.parametrize(
    ("flow", "solver", "resample"),
    [
        (flow, solver, (row + column) % 2)
        for row, flow in enumerate(flows((4,)))
        for column, solver in enumerate(["heun", "multistep", "rk45"])
    ],
)
def test_completions_are_drawn_from_the_posterior(flow, solver, resample):
    """All four references agree with what is known: each a quarter of the completions."""
    n = 2000
    x = flow.inpaint(
        flow.empirical(REFERENCES),
        REFERENCES[:1].expand(n, 4),
        MASK,
        solver=solver,
        steps=30,
        resample=resample,
        generator=seeded(1),
    )
    assert torch.equal(x[:, :2], SHARED[:1].expand(n, 2))
    distance, nearest = torch.cdist(x, REFERENCES).min(1)
    assert (distance < 0.05).double().mean() > 0.99
    counts = nearest.bincount(minlength=4).double()
    assert float(((counts - n / 4) ** 2 / (n / 4)).sum()) < 16.3  # chi-squared of 3, one in 1000


@pytest.mark.parametrize("flow", flows((1, 8, 8), data_norm=6.0), ids=repr)
def test_resampling_improves_agreement_with_the_known_part(flow):
    """With resampling, an empirical network recovers more of the digits whose upper half is
    known."""
    images = digits().train
    known, mask = images[:100], torch.arange(8)[:, None] < 4
    gaps = []
    for resample in (0, 8):
        x = flow.inpaint(
            flow.empirical(images), known, mask, resample=resample, generator=seeded(0)
        )
        assert torch.equal(x[:, :, :4], known[:, :, :4])
        gaps.append(float((x - known).flatten(1).norm(dim=1).mean()))
    assert gaps[1] < 0.85 * gaps[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_unknown_part_is_not_read_and_arguments_are_not_written(solver):
    flow = PoissonFlow((4,), data_norm=1.5)
    net, known = flow.empirical(REFERENCES), REFERENCES[:2].clone()
    known[:, 2:] = math.nan
    kept = known.clone()
    options = {"solver": solver, "steps": 8, "resample": 1}
    x = flow.inpaint(net, known, MASK, generator=seeded(2), **options)
    assert torch.equal(x[:, :2], known[:, :2])
    assert x.isfinite().all()
    torch.testing.assert_close(known, kept, equal_nan=True, rtol=0, atol=0)
    other = flow.inpaint(net, torch.where(MASK, known, 7.0), MASK, generator=seeded(2), **options)
    assert torch.equal(x, other)
    watched = flow.inpaint(
        net, known, MASK, generator=seeded(2), callback=lambda info: None, **options
    )
    assert torch.equal(x, watched)  # memory that is reused changes nothing


def test_all_known_none_known_and_the_evaluations():
    flow = PoissonFlowPP((4,), D=16)
    net = flow.empirical(REFERENCES)
    whole = flow.inpaint(net, REFERENCES, torch.tensor(True), steps=4)
    assert torch.equal(whole, REFERENCES)
    free = flow.inpaint(net, REFERENCES, torch.tensor(False), resample=0, generator=seeded(3))
    torch.testing.assert_close(free, flow.sample(net, 4, generator=seeded(3)))
    for levels, evaluations in (
        ([9, 1, 0.5, 0.1], 3 + 2 * 2),  # two rounds from 0.6 over 0.5 to 0.1
        ([0.5, 0.2, 0.1], 2 + 2 * 2),  # the default level of the rounds is within the grid
        ([9, 3, 1], 2 + 2 * 1),
    ):
        options = {"schedule": levels, "solver": "euler", "return_nfe": True}
        assert flow.inpaint(net, REFERENCES, MASK, **options)[1] == evaluations
    assert flow.inpaint(net, REFERENCES[:0], MASK).shape == (0, 4)
    pixels = torch.full((2, 4), 255, dtype=torch.uint8)
    assert torch.equal(flow.inpaint(net, pixels, MASK)[:, :2], torch.ones(2, 2))


def test_a_callback_and_the_network_see_the_known_part_on_its_line():
    flow = PoissonFlow((4,), data_norm=1.5)
    exact, seen, evaluated = flow.empirical(REFERENCES), [], []
    known = REFERENCES[:2] + 0.5  # so that the flow itself leads elsewhere

    def net(x, z):
        evaluated.append({"x": x.clone(), "z": z[0]})
        return exact(x, z)

    flow.inpaint(
        net,
        known,
        MASK,
        resample=0,
        callback=seen.append,
        generator=seeded(4),
    )
    assert len(evaluated) == len(seen)
    line = (seen[0]["x"] - known)[:, :2] / seen[0]["z"]
    for each in (*seen[:-3], *evaluated[:-3]):
        noise = (each["x"] - known)[:, :2] / each["z"]
        torch.testing.assert_close(noise, line, rtol=1e-3, atol=1e-3)


def test_bad_projections():
    flow = PoissonFlow((2,), data_norm=1.5)
    for project in (lambda x, z: x[:1], lambda x, z: x.double()):
        with pytest.raises(ValueError, match=r"project must return the shape and.*got \("):
            flow.sample(flow.empirical(torch.eye(2)), 3, project=project)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"known": torch.zeros(3, 5)}, "known must have shape (B, *S) with S = (4,), got (3, 5)."),
        (
            {"known": torch.zeros(3, 4).long()},
            "TypeError: known must be uint8 or floating point, got torch.int64; use known.float().",
        ),
        ({"mask": torch.ones(4)}, "TypeError: mask must be bool, True…known, got torch.float32."),
        ({"mask": [True] * 4}, "TypeError: mask must be bool, True where known, got list."),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must broadcast to…(3, 4), got (3,)."),
        ({"mask": torch.ones(2, 3, 4, dtype=torch.bool)}, "mask must broadcast…got (2, 3, 4)."),
        (
            {"mask": torch.ones(4, dtype=torch.bool, device="meta")},
            "mask and known must be on one device, got meta and cpu.",
        ),
        ({"resample": 1, "resample_from": 1e9}, "resample_from must be a…got 1000000000.0."),
        ({"resample": 1, "resample_from": 0}, "resample_from must be a…5.322669453647371, got 0."),
    ],
)
def test_bad_inpainting(refused, arguments, sentence):
    flow = PoissonFlow((4,), data_norm=1.5)
    arguments = {"known": REFERENCES[:3], "mask": MASK, **arguments}
    refused(lambda: flow.inpaint(flow.empirical(REFERENCES), **arguments), sentence)
