"""posterior_mean, field_fn and log_density: values, limits, forms of argument, errors."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal, StudentT

import pfgm
from benchmarks.common import problems
from pfgm import debug_checks, field_fn, log_density, posterior_mean

DIMENSIONS = [0.5, 1.0, 4.5, 128.0, 1e6, math.inf]


def close(actual, expected, tolerance=1e-12):
    """Equal to a tolerance relative to the largest expected value."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=float(tolerance * scale)
    )


def problem(dtype=torch.float64, **sizes):
    """Points a few tenths away from some of their references."""
    return problems.problem(spread=0.3, dtype=dtype, **sizes)[:2]


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_mean_and_logsumexp_are_those_of_the_formula(backend, oracle, shape, D):
    x, references = problem(shape=shape)
    sigma = torch.tensor([0.05, 0.3, 1.0, 20.0], dtype=torch.float64)
    radius = sigma if math.isinf(D) else sigma * math.sqrt(D)
    expected_mean, expected_lse = oracle(x, references, radius, D)
    mean, lse = posterior_mean(
        x, references, D=D, return_logsumexp=True, backend=backend, **problems.level(radius, D)
    )
    assert mean.shape == x.shape
    assert lse.dtype == torch.float64
    close(mean.flatten(1) if shape else mean[:, None], expected_mean, 1e-11)
    close(lse, expected_lse, 1e-13)


FORMS_OF_2 = {
    "integer": 2,
    "float64 of NumPy": np.float64(2),
    "float32 of NumPy": np.float32(2),
    "int64 of NumPy": np.int64(2),
    "number in a tensor": torch.tensor(2.0),
    "float64": torch.full((4,), 2.0, dtype=torch.float64),
    "float16": torch.full((4,), 2.0, dtype=torch.float16),
    "int64": torch.full((4,), 2, dtype=torch.int64),
    "expanded": torch.tensor([2.0]).expand(4),
    "as samples": torch.full((4, 1, 1), 2.0),
}


@pytest.mark.parametrize("form", FORMS_OF_2)
def test_forms_of_a_level_agree(backend, form):
    x, references = problem(shape=(2, 3))

    def results(level):
        steps = x.cos(), level, 1 / level
        yield posterior_mean(x, references, r=level, backend=backend)
        yield posterior_mean(x, references, sigma=level, D=math.inf, backend=backend)
        yield log_density(x, references, r=level, D=4, backend=backend)
        yield from field_fn(x, level, references, backend=backend)
        yield pfgm.euler_step(x, *steps, backend=backend)

    for actual, expected in zip(results(FORMS_OF_2[form]), results(2.0), strict=True):
        assert torch.equal(actual, expected)


def test_numbers_of_numpy_are_dimensions():
    x, references = problem()
    densities = (log_density(x, references, r=1.0, D=D) for D in (np.int64(2), np.float32(2), 2.0))
    first, *others = densities
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    x, references = problem(dtype=dtype)
    expected = posterior_mean(x.float(), references, r=0.5, backend=backend)
    assert expected.dtype == torch.float32
    assert torch.equal(posterior_mean(x, references, r=0.5, backend=backend), expected)
    field = field_fn(x, 0.5, references, backend=backend)
    wide = field_fn(x.float(), 0.5, references, backend=backend)
    for part, whole in zip(field, wide, strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, whole)
    x.requires_grad_()
    posterior_mean(x, references, r=0.5, backend=backend).sum().backward()
    assert x.grad.dtype == dtype


def test_autocast_computes_in_float32(backend):
    x, references = problem(dtype=torch.float32)

    def results():
        mean, lse = posterior_mean(x, references, r=0.5, return_logsumexp=True, backend=backend)
        density = log_density(x, references, sigma=0.5, D=math.inf, backend=backend)
        return mean, lse, density, *field_fn(x, 0.5, references, backend=backend)

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        for actual, wanted in zip(results(), expected, strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(), (6,), (3, 2, 2)])
def test_field_is_that_of_the_formula(backend, oracle, shape, gamma):
    x, references = problem(shape=shape)
    z = torch.tensor([0.0, 1e-3, 0.7, 30.0], dtype=torch.float64)
    mean, _ = oracle(x, references, z, 1.0)
    E = torch.cat([x.reshape(4, -1) - mean, z[:, None]], 1)
    v = -math.sqrt(E.shape[1] - 1) * E / (E.norm(dim=1, keepdim=True) + gamma)
    options = {} if gamma == 5.0 else {"gamma": gamma}  # 5 is the default
    field_x, field_z = field_fn(x, z, references, backend=backend, **options)
    assert field_x.shape == x.shape
    close(field_x.reshape(4, -1), v[:, :-1])
    close(field_z, v[:, -1])


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_field_where_it_vanishes(backend, gamma):
    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    field_x, field_z = field_fn(x, 0.0, x.detach(), gamma=gamma, backend=backend)
    assert field_x.abs().max() == 0
    assert field_z.abs() == 0
    (gradient,) = torch.autograd.grad(field_x[0, 0], x)
    # The mean is the reference itself: v = −√4 (x − x_1) / (‖x − x_1‖ + 5).
    slope = -2 / gamma if gamma else 0.0
    assert gradient.tolist() == [[slope, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_no_points(backend, D):
    x, references = problem()
    x = x[:0].requires_grad_()
    references.requires_grad_()
    mean, lse = posterior_mean(
        x, references, D=D, return_logsumexp=True, backend=backend, **problems.level(0.5, D)
    )
    assert mean.shape == (0, 5)
    assert lse.shape == (0,)
    (mean.sum() + lse.sum()).backward()
    assert x.grad.shape == (0, 5)
    assert torch.equal(references.grad, torch.zeros_like(references))
    assert log_density(x, references, D=D, backend=backend, **problems.level(0.5, D)).shape == (0,)
    field_x, field_z = field_fn(x, torch.empty(0), references, backend=backend)
    assert (field_x.shape, field_z.shape) == ((0, 5), (0,))


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1.0, 1e15])
def test_one_reference_is_the_mean_whatever_the_distance(backend, D, distance):
    reference = torch.tensor([[0.25, -0.5, 1.0]])
    x = reference + distance
    for radius in (1e-6, 1.0, 1e6):
        mean = posterior_mean(x, reference, D=D, backend=backend, **problems.level(radius, D))
        assert torch.equal(mean, reference)


def test_only_needed_gradients_are_requested(backend):
    x, references = problem()
    assert not posterior_mean(x, references, r=0.5, backend=backend).requires_grad
    r = torch.tensor(0.5, requires_grad=True)
    result = posterior_mean(x, references, r=r, backend=backend)
    (gradient,) = torch.autograd.grad(result.square().sum(), r)
    assert gradient.shape == ()
    assert gradient != 0
    with torch.no_grad():
        assert not posterior_mean(x, references, r=r, backend=backend).requires_grad


@pytest.mark.parametrize("sigma", [0.0, 1e-23, 1e-170])
def test_sigma_near_0_takes_the_nearest(backend, sigma):
    references = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [0.9, 0.0], [0.75, 0.75]])
    mean, lse = posterior_mean(
        x, references, sigma=sigma, D=math.inf, return_logsumexp=True, backend=backend
    )
    assert mean.tolist() == [[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]]
    assert lse[0] == math.log(2)
    if sigma == 1e-23:
        close(lse[1:] * sigma**2, torch.tensor([-0.005, -0.3125]), 1e-7)
    else:
        assert lse[1:].isneginf().all()


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_tiny_r_away_from_references(backend, oracle, D):
    x, references = problem(dtype=torch.float32)
    expected_mean, expected_lse = oracle(x, references, 1e-20, D)
    mean, lse = posterior_mean(
        x, references, D=D, return_logsumexp=True, backend=backend, **problems.level(1e-20, D)
    )
    close(mean, expected_mean, 1e-6)
    close(lse / expected_lse, torch.ones(4), 1e-12 if backend == "reference" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("radius", [1e9, 1e18])
def test_far_field_is_the_average(backend, D, radius, dtype):
    x, references = problem(dtype=dtype)
    x.requires_grad_()
    mean, lse = posterior_mean(
        x, references, D=D, return_logsumexp=True, backend=backend, **problems.level(radius, D)
    )
    close(mean, references.mean(0).expand(4, 5), 1e-7 if dtype == torch.float32 else 1e-11)
    assert lse.isfinite().all()
    (gradient,) = torch.autograd.grad(mean.sum() + lse.sum(), x)
    assert gradient.isfinite().all()
    if D == 1.0:
        field_x, field_z = field_fn(x * radius, radius, references, backend=backend)
        assert field_x.isfinite().all()
        assert (field_z < 0).all()


def test_the_direction_of_the_field_far_away(backend):
    references = torch.zeros(3, 16)
    direction = torch.nn.functional.normalize(torch.arange(1.0, 17)[None], dim=1)
    field_x, field_z = field_fn(3e17 * direction, 4e17, references, backend=backend)
    close(field_x, -4 * 0.6 * direction, 1e-6)
    close(field_z, torch.tensor([-4 * 0.8]), 1e-6)


def mixture_density(x, references, sigma, D):
    """The same in one dimension by torch.distributions."""
    kernel = Normal(references, sigma) if math.isinf(D) else StudentT(D, references, sigma)
    weights = Categorical(torch.ones(len(references), dtype=torch.float64))
    return MixtureSameFamily(weights, kernel).log_prob(x)


@pytest.mark.parametrize("D", DIMENSIONS)
def test_density_in_one_dimension(backend, D):
    x, references = problem(B=20, M=6, shape=())
    for sigma in (0.05, 1.0, 40.0):
        expected = mixture_density(x, references, sigma, D)
        density = log_density(x, references, sigma=sigma, D=D, backend=backend)
        # torch's own log-gamma at 5e5 leaves 1e-9.
        close(density, expected, 1e-8 if D == 1e6 else 1e-12)
    assert density.dtype == torch.float64


@pytest.mark.parametrize("D", [0.5, 3.0, 999_999.0, 1e6, 1e9])
def test_normalising_constant_in_many_dimensions(D):
    # N even: Γ((N + D)/2) / Γ(D/2) = Π_k (D/2 + k), k < N/2. At r = 1 on a reference s = 1.
    N = 3072
    expected = math.fsum(math.log(D / 2 + k) for k in range(N // 2)) - N / 2 * math.log(math.pi)
    x = torch.zeros(1, N, dtype=torch.float64)
    assert log_density(x, x, r=1.0, D=D).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("D", [1e12, 1e16, 1e100])
def test_density_at_a_very_large_D_is_that_of_diffusion(backend, D):
    # lse and D log r are above 1e13, where float64 has steps of 2e-3 or more.
    x, references = problem()
    expected = log_density(x, references, sigma=0.7, D=math.inf, backend=backend)
    for form in (references, pfgm.ReferenceSet(references)):
        close(log_density(x, form, sigma=0.7, D=D, backend=backend), expected, 1e-9)


@pytest.mark.parametrize("D", [1.0, math.inf])
def test_density_at_r_0(backend, D):
    _, references = problem()
    x = torch.stack([references[0], references[0] + 0.1])
    density = log_density(x, references, D=D, backend=backend, **problems.level(0.0, D))
    assert density.tolist() == [math.inf, -math.inf]


X, Y = problem()
HUGE = 10**400  # beyond the range of float64


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"references": torch.zeros(9, 6)}, "x and references must have shapes (B, *S)…."),
        ({"references": torch.zeros(9)}, "x and references must have shapes (B, *S)…."),
        ({"x": torch.tensor(1.0)}, "x and references must have shapes (B, *S)…."),
        ({"x": X[:, :0], "references": Y[:, :0]}, "x must have shape…."),
        ({"references": Y[:0]}, "references must hold at least one reference, got none."),
        ({"references": Y.to("meta")}, "x and references must…."),
        ({"references": None}, "TypeError: references must be a torch.Tensor or a…."),
        ({"references": Y.int()}, "TypeError: …got torch.int32…."),
        ({"references": Y.to_sparse()}, "TypeError: references must be…."),
        ({"x": [[1.0] * 5]}, "TypeError: x must be a torch.Tensor, got list; use…(x)."),
        ({"x": X.long()}, "TypeError: x must be one of…got torch.int64."),
        ({"x": X.byte()}, "TypeError: x must be one of…got torch.uint8."),
        ({"x": X.to(torch.complex64)}, "TypeError: x must be one of…got torch.complex64."),
        ({"x": X.to_sparse()}, "TypeError: x must be a dense…."),
        ({"r": torch.ones(4, device="meta")}, "r and x must be on one…."),
        ({"r": None}, "exactly one of r and sigma must be given, got neither."),
        ({"sigma": 1.0}, "exactly one of r and sigma must be given, got both."),
        ({"r": torch.ones(4, 2)}, "r must be a number or a tensor of…."),
        ({"r": torch.ones(4, 1, 1)}, "r must be a number or a tensor of…."),
        ({"r": None, "sigma": torch.ones(3)}, "sigma must be a number or a…."),
        ({"r": "1"}, "TypeError: r must be a number or a tensor of shape (4,), got str."),
        ({"r": True}, "TypeError: r must be a number or a tensor of shape (4,), got bool."),
        ({"r": torch.ones(4) > 0}, "TypeError: r must be real, got torch.bool."),
        ({"r": -1.0}, "r, sigma or z must be finite and at least 0, got -1.0 in row 0."),
        ({"r": torch.tensor([1.0, 0.0, -2.0, -3.0])}, "r, sigma or z must…got -2.0 in row 2."),
        ({"r": None, "sigma": math.nan, "D": math.inf}, "r, sigma or z must…nan in row 0."),
        ({"r": math.inf}, "r, sigma or z must be finite and at least 0, got inf in row 0."),
        ({"r": HUGE}, "r, sigma or z must be finite and at least 0, got inf in row 0."),
        ({"r": None, "sigma": -HUGE}, "r, sigma or z must be finite…got -inf in row 0."),
        *(
            ({"D": D}, f"D must be a positive number or infinity, got {D}.")
            for D in (0, -1.5, math.nan, -HUGE)
        ),
        *(({"D": D}, "sigma must be given in place of r when D is….") for D in (math.inf, HUGE)),
        *(
            ({"D": D}, f"TypeError: D must be a number, got {type(D).__name__}.")
            for D in ("1", True)
        ),
    ],
)
def test_refusals(refused, changed, sentence):
    arguments = {"x": X, "references": Y, "r": 0.5} | changed
    for function in (posterior_mean, log_density):
        refused(lambda function=function: function(**arguments), sentence)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"z": torch.ones(3)}, "z must be a number or a…."),
        ({"z": -1.0}, "r, sigma or z must be finite and…."),
        ({"z": HUGE}, "r, sigma or z must be finite and at least 0, got inf in row 0."),
        ({"z": None}, "TypeError: z must be a number or a tensor of…."),
        ({"references": Y[:0]}, "references must…."),
        ({"x": X.byte()}, "TypeError: x must be one of…."),
    ],
)
def test_refusals_of_the_field(refused, changed, sentence):
    refused(lambda: field_fn(**{"x": X, "z": 0.5, "references": Y} | changed), sentence)


def test_a_huge_integer_is_infinity():
    assert torch.equal(*(posterior_mean(X, Y, sigma=1.0, D=D) for D in (HUGE, math.inf)))
    assert math.isinf(pfgm.PoissonFlowPP((3,), D=HUGE).D)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize("name", ["x", "references"])
def test_values_that_are_not_finite_raise(backend, name, D, bad):
    tensors = dict(zip(("x", "references"), problem(), strict=True))
    tensors[name][3, 4] = bad
    message = rf"{name} must be finite, got NaN or infinity \(first in row 3\)\."
    with pytest.raises(ValueError, match=message):
        posterior_mean(**tensors, D=D, backend=backend, **problems.level(0.5, D))
    with pytest.raises(ValueError, match=message):
        field_fn(tensors["x"], 0.5, tensors["references"], backend=backend)


def test_values_are_checked_only_on_the_cpu_by_default():
    x, references = (t.to("meta") for t in problem())
    mean, lse = posterior_mean(x, references, r=-1.0, return_logsumexp=True)
    assert (mean.device.type, mean.shape, lse.shape) == ("meta", (4, 5), (4,))
    from pfgm.common.values import checks_values

    assert not checks_values(torch.device("meta"))
    with debug_checks():
        assert checks_values(torch.device("meta"))
        with debug_checks(False):
            assert checks_values(torch.device("cpu"))
            assert not checks_values(torch.device("meta"))
    assert not checks_values(torch.device("meta"))
