import math

import pytest
import torch
from torch import nn

import pfgm
from pfgm import PoissonFlow, PoissonFlowPP
from pfgm.data import digits
from pfgm.solvers import SOLVERS

DTYPES = [torch.float32, torch.float64]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def flows(shape, **options):
    return [
        PoissonFlow(shape, data_norm=options.get("data_norm", 1.5)),
        PoissonFlowPP(shape, D=16),
        PoissonFlowPP(shape, D=math.inf),
    ]


def relative(found, expected):
    return float(
        ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max()
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


# ---- up and down -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flow", flows((1, 8, 8), data_norm=6.0), ids=repr)
def test_digits_return_within_a_thousandth(flow, dtype):
    """The figure promised for rk45, under the exact network: data, and points typical of them."""
    references = digits().train[:400].to(dtype)
    net, x = flow.empirical(references), references[:24]
    level = torch.full((len(x),), flow.last_level, dtype=dtype)
    for start in (x, x + flow.noise(level, seeded(0))):
        latent, up = flow.encode(net, start, return_nfe=True)
        back, down = flow.decode(net, latent, return_nfe=True)
        assert relative(back, start) < 1e-3
        assert 0 < up < 1000
        assert 0 < down < 1000


def test_the_tolerance_is_what_bounds_the_round_trip():
    flow, net = PoissonFlowPP((4,), D=math.inf), Gaussian()
    x = 0.5 * torch.randn(20, 4, generator=seeded(0), dtype=torch.float64)
    errors = []
    for tolerance in (1e-3, 1e-6, 1e-9):
        latent = flow.encode(net, x, rtol=tolerance, atol=tolerance)
        errors.append(relative(flow.decode(net, latent, rtol=tolerance, atol=tolerance), x))
    assert errors[0] > 100 * errors[1] > 1e4 * errors[2]


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
    for solver in SOLVERS:
        latent, nfe = flow.encode(net, torch.empty(0, 2), solver=solver, return_nfe=True)
        assert latent.shape == (0, 2)
        assert nfe == 0


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


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(4, 3), {}, ValueError, "x has shape"),
        (torch.zeros(4, 2).long(), {}, TypeError, "x has dtype"),
        (torch.zeros(4, 2), {"solver": "rk4"}, ValueError, "solver is 'rk4'"),
        (torch.zeros(0, 2), {"solver": "rk4"}, ValueError, "solver is 'rk4'"),
        (torch.zeros(4, 2), {"steps": 0}, ValueError, "steps is 0"),
        (torch.zeros(4, 2), {"steps": 1}, ValueError, "steps or schedule leaves"),
        (torch.zeros(4, 2), {"schedule": [1.0, 0.0]}, ValueError, "steps or schedule leaves"),
        (torch.zeros(4, 2), {"condition": {"a": 1}}, ValueError, "condition has 'a'"),
        (torch.full((4, 2), math.nan), {}, ValueError, "NaN"),
    ],
)
def test_bad_data(method, x, options, error, message):
    flow = PoissonFlowPP((2,), D=16)
    with pytest.raises(error, match=message):
        getattr(flow, method)(flow.empirical(torch.eye(2)), x, **options)


# ---- between latents -------------------------------------------------------------------------


def test_interpolation_keeps_angles_even_and_norms_geometric():
    a, b = 1e3 * torch.randn(2, 6, 2, 3, generator=seeded(0), dtype=torch.float64)
    b = b / 50
    weights = torch.linspace(-0.5, 1.5, 9, dtype=torch.float64)
    points = pfgm.interpolate(a, b, weights).flatten(2)
    assert points.shape == (9, 6, 6)
    torch.testing.assert_close(points[2], a.flatten(1))
    torch.testing.assert_close(points[6], b.flatten(1))
    norms = points.norm(dim=2)
    expected = a.flatten(1).norm(dim=1) ** (1 - weights[:, None])
    expected = expected * b.flatten(1).norm(dim=1) ** weights[:, None]
    torch.testing.assert_close(norms, expected)
    cosines = nn.functional.cosine_similarity(points[:-1], points[1:], dim=2)
    whole = nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
    torch.testing.assert_close(cosines.acos(), (whole / 4).expand(8, 6), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_where_no_circle_or_no_direction_is_given(dtype):
    a = torch.tensor([[3.0, 0.0, 4.0]], dtype=dtype)
    weights = [0.0, 0.5, 1.0]
    opposite = pfgm.interpolate(a, -4 * a, weights)
    expected = torch.tensor([[3.0, 0.0, 4.0], [0.0, 10.0, 0.0], [-12.0, 0.0, -16.0]], dtype=dtype)
    torch.testing.assert_close(opposite[:, 0], expected, rtol=0, atol=1e-5)
    thirds = torch.tensor([[0.1, 0.7, -0.3]], dtype=dtype)  # whose negative is off by rounding
    assert pfgm.interpolate(thirds, -thirds / 3, weights)[1].norm() == pytest.approx(
        float(thirds.norm()) / math.sqrt(3), rel=1e-5
    )
    torch.testing.assert_close(pfgm.interpolate(a, a, weights), a.expand(3, 1, 3))
    torch.testing.assert_close(pfgm.interpolate(0 * a, a, [0.0, 0.25, 1.0])[1], a / 4)
    torch.testing.assert_close(pfgm.interpolate(a, 0 * a, [0.0, 0.25, 1.0])[1], a * 3 / 4)
    assert torch.equal(pfgm.interpolate(0 * a, 0 * a, weights), torch.zeros(3, 1, 3, dtype=dtype))
    single = torch.tensor([[2.0]], dtype=dtype)
    through = pfgm.interpolate(single, -single, weights).flatten()
    torch.testing.assert_close(through, torch.tensor([2.0, 0.0, -2.0], dtype=dtype))
    assert pfgm.interpolate(a[:0], a[:0], weights).shape == (3, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3, 3), [0.5]), ValueError, "a has shape"),
        ((torch.tensor(1.0), torch.tensor(1.0), [0.5]), ValueError, "a has shape"),
        ((torch.ones(2, 3), torch.ones(2, 3).double(), [0.5]), TypeError, "both must have the"),
        ((torch.ones(2, 3).long(), torch.ones(2, 3), [0.5]), TypeError, "a has dtype torch.int64"),
        (([1.0], torch.ones(2, 3), [0.5]), TypeError, "a has dtype list"),
        ((torch.ones(2, 3), torch.ones(2, 3), []), ValueError, "weights is"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.5), ValueError, "weights is"),
        ((torch.ones(2, 3), torch.ones(2, 3), [math.nan]), ValueError, "weights is"),
    ],
)
def test_bad_interpolations(arguments, error, message):
    with pytest.raises(error, match=message):
        pfgm.interpolate(*arguments)


@pytest.mark.parametrize("flow", flows((2,)), ids=repr)
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
    for count in (1, 2.0, True):
        with pytest.raises(ValueError, match="count is"):
            flow.interpolate(net, a, b, count=count)
    with pytest.raises(ValueError, match="a has shape"):
        flow.interpolate(net, a, b[:2])


# ---- temperature -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan, "hot", True])
def test_bad_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        PoissonFlow((2,), M=200).rescale(torch.ones(3, 2), temperature)


def test_bad_latents():
    flow = PoissonFlow((2,), M=200)
    with pytest.raises(ValueError, match="x has shape"):
        flow.rescale(torch.ones(3, 4), 2.0)
    with pytest.raises(TypeError, match="latent has dtype"):
        flow.rescale(torch.ones(3, 2, dtype=torch.uint8), 2.0)


# ---- inpainting ------------------------------------------------------------------------------

SHARED = torch.tensor([[1.0, -0.5]]).expand(4, 2)
REST = torch.tensor([[0.8, 0.1], [-0.7, 0.2], [0.3, -0.9], [-0.1, -0.6]])
REFERENCES = torch.cat([SHARED, REST], 1)  # they differ in their last two numbers alone
MASK = torch.tensor([True, True, False, False])


@pytest.mark.parametrize("D", [1.0, 16.0, math.inf])
def test_the_known_part_on_its_line_conditions_exactly(D):
    """The mean of the rest is that of a flow of D + N_known dimensions over the rest alone."""
    flow = PoissonFlowPP((4,), D=D)
    references = REFERENCES.double()
    noise = torch.randn(50, 4, generator=seeded(0), dtype=torch.float64)
    for sigma in (0.01, 0.5, 20.0):
        x = references[0] + sigma * noise
        mean = flow.denoise(flow.empirical(references), x, sigma)
        level = {"sigma": sigma, "D": D}
        if math.isfinite(D):
            level = {"r": sigma * (D + noise[:, :2].square().sum(1)).sqrt(), "D": D + 2}
        rest = pfgm.posterior_mean(x[:, 2:], references[:, 2:], **level)
        torch.testing.assert_close(mean[:, 2:], rest, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["heun", "multistep", "rk45"])
@pytest.mark.parametrize("flow", flows((4,)), ids=repr)
@pytest.mark.parametrize("resample", [0, 1])
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
def test_rounds_bring_digits_in_line_with_what_is_known(flow):
    """Of digits whose upper half is known, an empirical network finds more again by rounds."""
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
def test_nothing_of_the_unknown_part_is_read_and_nothing_given_is_written(solver):
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
    free = flow.inpaint(net, REFERENCES, torch.tensor(False), generator=seeded(3))
    torch.testing.assert_close(free, flow.sample(net, 4, generator=seeded(3)))
    _, nfe = flow.inpaint(
        net,
        REFERENCES,
        MASK,
        schedule=[9, 1, 0.5, 0.1],
        solver="euler",
        resample=2,
        return_nfe=True,
    )
    assert nfe == 3 + 2 * 2  # from 0.6 by way of 0.5 to 0.1
    assert flow.inpaint(net, REFERENCES[:0], MASK).shape == (0, 4)
    pixels = torch.full((2, 4), 255, dtype=torch.uint8)
    assert torch.equal(flow.inpaint(net, pixels, MASK)[:, :2], torch.ones(2, 2))


def test_a_callback_sees_the_known_part_on_its_line():
    flow = PoissonFlow((4,), data_norm=1.5)
    seen = []
    flow.inpaint(
        flow.empirical(REFERENCES), REFERENCES[:2], MASK, callback=seen.append, generator=seeded(4)
    )
    noise = [(info["x"][:, :2] - REFERENCES[:2, :2]) / info["z"] for info in seen[:-1]]
    for each in noise[1:-2]:
        torch.testing.assert_close(each, noise[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_projection_onto_a_line_is_that_of_the_points_themselves(solver):
    """In any direction, not only along axes: x₁ + x₂ is held, as a rotation of a mask."""
    flow, references = PoissonFlowPP((2,), D=math.inf), torch.randn(5, 2, generator=seeded(0))
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
    start = flow.prior(6, generator=seeded(1))

    def straight(x, level):
        return torch.stack([torch.full_like(x[:, 0], 0.3), x[:, 1]], 1)

    def turned(x, level):
        return straight(x @ turn.T, level) @ turn

    options = {"solver": solver, "steps": 12}
    a = flow.sample(flow.empirical(references), 6, x_init=start @ turn, project=turned, **options)
    b = flow.sample(
        flow.empirical(references @ turn.T), 6, x_init=start, project=straight, **options
    )
    torch.testing.assert_close((a @ turn.T)[:, 1], b[:, 1], rtol=0, atol=1e-3)


def test_bad_projections():
    flow = PoissonFlow((2,), data_norm=1.5)
    for project in (lambda x, z: x[:1], lambda x, z: x.double()):
        with pytest.raises(ValueError, match="project returned shape"):
            flow.sample(flow.empirical(torch.eye(2)), 3, project=project)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"known": torch.zeros(3, 5)}, ValueError, "x has shape"),
        ({"known": torch.zeros(3, 4).long()}, TypeError, "x has dtype"),
        ({"mask": torch.ones(4)}, TypeError, "mask has dtype torch.float32"),
        ({"mask": [True] * 4}, TypeError, "mask has dtype list"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape"),
        ({"mask": torch.ones(2, 3, 4, dtype=torch.bool)}, ValueError, "mask has shape"),
        ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
        ({"resample": -1}, ValueError, "resample is -1"),
        ({"resample": True}, ValueError, "resample is True"),
        ({"resample": 1, "resample_from": 1e9}, ValueError, "resample_from is 1000000000.0"),
        ({"resample": 1, "resample_from": 0}, ValueError, "resample_from is 0"),
        ({"solver": "rk4"}, ValueError, "solver is 'rk4'"),
        ({"schedule": "cosine"}, ValueError, "schedule is 'cosine'"),
    ],
)
def test_bad_inpainting(arguments, error, message):
    flow = PoissonFlow((4,), data_norm=1.5)
    with pytest.raises(error, match=message):
        flow.inpaint(
            flow.empirical(REFERENCES), **{"known": REFERENCES[:3], "mask": MASK, **arguments}
        )
