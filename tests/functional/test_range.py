"""What a dtype cannot hold: references beyond float32, and squared distances that underflow."""

import math

import pytest
import torch

import pfgm
from benchmarks.common.problems import level, seeded
from pfgm import field_fn, log_density, posterior_mean
from pfgm.references import part

BEYOND = r"^references must be at most 3\.4e\+38 for .* row 0 of x needs\. Use x in torch\.float64"
UNDERFLOW = "^x is so close to references in row 0 of x that .* underflows float64"
# Of B, M, N: few rows, rows of few features, features with bounds of distances.
SIZES = [(1, 50, 2), (9, 50, 2), (3, 50, 600), (50, 70, 520)]


def rows(count, N, seed=0):
    return torch.randn(count, N, generator=seeded(seed), dtype=torch.float64)


@pytest.fixture
def forms(monkeypatch):
    """Gives references as they are, and as a set of one chunk and of several."""

    def each(references):
        yield references
        yield pfgm.ReferenceSet(references)
        with monkeypatch.context() as context:
            context.setattr(part, "_CHUNK_BYTES", 16 * references[0].nbytes)
            yield pfgm.ReferenceSet(references)

    return each


@pytest.mark.parametrize(("B", "M", "N"), SIZES)
def test_float32_points_with_references_beyond_float32(backend, forms, B, M, N):
    x, far = torch.zeros(B, N), rows(M, N) * 1e60
    for references in forms(far):
        for points in (x, x.clone().requires_grad_()):
            with pytest.raises(ValueError, match=BEYOND):
                posterior_mean(points, references, r=1.0, backend=backend)
            with pytest.raises(ValueError, match=BEYOND):
                field_fn(points, 1.0, references, backend=backend)
            with pytest.raises(ValueError, match=BEYOND):
                log_density(points, references, r=1.0, backend=backend)
        mean = posterior_mean(x.double(), references, r=1e60, backend=backend)
        wanted = posterior_mean(x.double(), far / 1e60, r=1.0, backend=backend)
        torch.testing.assert_close(mean / 1e60, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("B", "M", "N"), SIZES)
@pytest.mark.parametrize("D", [1.0, math.inf])
def test_a_reference_beyond_float32_that_does_not_count(backend, B, M, N, D):
    near = rows(M, N)
    x = rows(B, N, seed=1).float().requires_grad_()
    far = torch.cat([near[:7], torch.full((1, N), 1e60, dtype=torch.float64), near[7:]])
    results = []
    for references in (near, far):
        mean = posterior_mean(x, references, D=D, backend=backend, **level(1.0, D))
        (gradient,) = torch.autograd.grad(mean.square().sum(), x)
        results.append((mean, gradient))
    for actual, wanted in zip(results[1], results[0], strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()
        assert wanted.norm() > 0


@pytest.mark.parametrize("B", [1, 9])
def test_gradients_with_a_reference_beyond_float32_that_counts_little(backend, B):
    # Its weight, e^-20 of the largest, is below the rounding of the mean but not of the gradient.
    references = torch.tensor([[0.0], [1e39]], dtype=torch.float64)
    x, sigma = torch.zeros(B, 1, requires_grad=True), 1e39 / math.sqrt(40)
    mean = posterior_mean(x, references, sigma=sigma, D=math.inf, backend=backend)
    assert mean.isfinite().all()
    (gradient,) = torch.autograd.grad(mean.sum(), x)
    wanted = torch.full((B, 1), 40 * math.exp(-20))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=0)


def test_an_upstream_gradient_that_is_not_finite_is_none_of_the_references(backend):
    x = torch.zeros(1, 2, requires_grad=True)
    mean = posterior_mean(x, rows(5, 2), r=1.0, backend=backend)
    (gradient,) = torch.autograd.grad(mean, x, torch.full((1, 2), math.nan))
    assert gradient.isnan().all()


@pytest.mark.parametrize(("D", "scale"), [(1.0, 1e-170), (math.inf, 1e-310)])
@pytest.mark.parametrize(("B", "M", "N"), SIZES)
def test_squares_that_underflow(backend, forms, B, M, N, D, scale):
    y, x = rows(M, N) * scale, rows(B, N, seed=1) * scale
    for references in forms(y):
        for points in (x, x.clone().requires_grad_()):
            for radius in (0.0, scale):
                with pytest.raises(ValueError, match=UNDERFLOW):
                    posterior_mean(points, references, D=D, backend=backend, **level(radius, D))
    with pytest.raises(ValueError, match=UNDERFLOW):
        field_fn(x, scale, y, backend=backend)
    # At a larger radius they are all at the same place.
    mean = posterior_mean(x, y, D=D, backend=backend, **level(1e-100, D))
    torch.testing.assert_close(mean / scale, y.mean(0).expand(B, N) / scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize("D", [1.0, math.inf])
@pytest.mark.parametrize(("B", "M", "N"), SIZES)
def test_the_smallest_scale_is_right(backend, B, M, N, D):
    y, x = rows(M, N), rows(B, N, seed=1)
    wanted = posterior_mean(x, y, D=D, backend=backend, **level(1.0, D))
    scale = 2.0**-470  # 3e-142
    mean = posterior_mean(x * scale, y * scale, D=D, backend=backend, **level(scale, D))
    torch.testing.assert_close(mean / scale, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("D", "scale"), [(1.0, 1.0), (1.0, 1e-170), (math.inf, 1e-150), (math.inf, 1e-310)]
)
@pytest.mark.parametrize(("B", "M", "N"), SIZES)
def test_points_on_tiny_references_at_r_0(backend, forms, B, M, N, D, scale):
    y = rows(M, N) * scale
    y[3] = y[M - 1]
    x = y[M - B :].clone().requires_grad_()
    for references in forms(y):
        options = {"D": D, "return_logsumexp": True, "backend": backend}
        is_set = isinstance(references, pfgm.ReferenceSet)
        in_chunks = is_set and references.part.as_tensor() is None
        if backend in ("torch", "reference") and scale < 1 and in_chunks:
            # Each chunk has a result of its own, also one without the reference at the point.
            with pytest.raises(ValueError, match=UNDERFLOW):
                posterior_mean(x, references, **options, **level(0.0, D))
            continue
        mean, lse = posterior_mean(x, references, **options, **level(0.0, D))
        torch.testing.assert_close(mean, x, rtol=0, atol=5e-322)
        if math.isinf(D):
            assert lse.tolist() == [0.0] * (B - 1) + [math.log(2)]
        else:
            assert lse.isposinf().all()
        if references is y or scale >= 1e-150:
            (gradient,) = torch.autograd.grad(mean.sum(), x)
            assert gradient.abs().max() == 0


def test_on_one_reference_at_a_radius_that_underflows(backend):
    y = torch.eye(3, dtype=torch.float64)
    mean = posterior_mean(y, y, r=1e-170, backend=backend)
    assert torch.equal(mean, y)
    y[1] = y[0]
    y[1, 2] = 1e-170
    with pytest.raises(ValueError, match=UNDERFLOW):
        posterior_mean(y, y, r=1e-170, backend=backend)


@pytest.mark.parametrize("B", [1, 9])
def test_float32_points_with_references_whose_squares_underflow(backend, B):
    x, y = torch.zeros(B, 2), rows(50, 2) * 1e-170
    with pytest.raises(ValueError, match=UNDERFLOW):
        posterior_mean(x, y, r=0.0, return_logsumexp=True, backend=backend)
    mean = posterior_mean(x, y, r=1.0, backend=backend)
    assert mean.abs().max() == 0


TOO_LARGE = r"r must be at most 1e\+130, .* got 1e.1[5-9].* for r, sigma or z in row 0\."


@pytest.mark.parametrize("D", [1.0, 64.0, math.inf])
@pytest.mark.parametrize(("B", "M", "N"), SIZES[1:3])
def test_a_level_that_is_too_large(backend, forms, B, M, N, D):
    y, x = rows(M, N), rows(B, N, seed=1)
    for references in forms(y):
        for points in (x, x.clone().requires_grad_(), x.float()):
            for radius in (1e154, 1e155, torch.full((B,), 1e190, dtype=torch.float64)):
                with pytest.raises(ValueError, match=TOO_LARGE):
                    posterior_mean(points, references, D=D, backend=backend, **level(radius, D))
        with pytest.raises(ValueError, match=TOO_LARGE):
            field_fn(x, 1e155, references, backend=backend)
        with pytest.raises(ValueError, match=TOO_LARGE):
            log_density(x, references, D=D, backend=backend, **level(1e155, D))


@pytest.mark.parametrize("D", [1e-3, 1.0, math.inf])
@pytest.mark.parametrize(("B", "M", "N"), [(1, 3, 1), *SIZES[1:3]])
def test_the_largest_level_is_right(backend, forms, B, M, N, D):
    y, x = rows(M, N), rows(B, N, seed=1)
    for references in forms(y):
        mean = posterior_mean(
            x, references, D=D, backend=backend, **level(1e150 if math.isinf(D) else 1e130, D)
        )
        torch.testing.assert_close(mean, y.mean(0).expand(B, N), rtol=0, atol=1e-12)
        field_x, field_z = field_fn(x, 1e130, references, backend=backend)
        torch.testing.assert_close(field_z, torch.full_like(field_z, -math.sqrt(N)))
        wanted = math.sqrt(N) * (y.mean(0) - x)
        torch.testing.assert_close(field_x * 1e130, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("radius", [1e-145, 1e-160, 1e-170])
@pytest.mark.parametrize(("B", "M", "N"), SIZES[1:3])
def test_a_level_on_a_reference_of_which_the_square_underflows(backend, forms, B, M, N, radius):
    y = rows(M, N)
    x, wanted = y[M - B :].clone(), y.new_full((B,), -(N + 1) * math.log(radius))
    for references in forms(y):
        options = {"r": radius, "return_logsumexp": True, "backend": backend}
        mean, lse = posterior_mean(x, references, **options)
        assert torch.equal(mean, x)
        torch.testing.assert_close(lse, wanted)
        _, field_z = field_fn(x, radius, references, gamma=0.0, backend=backend)
        torch.testing.assert_close(field_z, torch.full_like(field_z, -math.sqrt(N)))
        points = x.clone().requires_grad_()
        mean, lse = posterior_mean(points, references, **options)
        assert torch.autograd.grad(mean.sum(), points, retain_graph=True)[0].abs().max() < 1e-100
        if radius < 1e-154:
            with pytest.raises(ValueError, match="return_logsumexp: in row 0 of x the"):
                lse.sum().backward()


@pytest.mark.parametrize(("D", "radius"), [(1.0, 3e-161), (1.0, 1e-154), (math.inf, 1e-155)])
@pytest.mark.parametrize(("B", "N"), [(1, 2), (9, 2), (9, 300)])
def test_gradients_on_equal_references_at_a_radius_that_underflows(backend, forms, B, N, D, radius):
    """Three references at every point: their average is rounded, and (N + D)/r² is infinite."""
    y = torch.cat([torch.full((3, N), 0.1), torch.full((2, N), 0.7)]).double()
    points = y[:1].repeat(B, 1).requires_grad_()
    r = points.new_full((B,), radius, requires_grad=True)
    for references in forms(y):
        options = {"D": D, "return_logsumexp": True, "backend": backend}
        mean, lse = posterior_mean(points, references, **options, **level(r, D))
        for gradient in torch.autograd.grad(mean.sum(), (points, r), retain_graph=True):
            assert gradient.abs().max() == 0
        with pytest.raises(ValueError, match="return_logsumexp: in row 0 of x the"):
            lse.sum().backward()
    y.requires_grad_()
    mean = posterior_mean(points, y, D=D, backend=backend, **level(r, D))
    (gradient,) = torch.autograd.grad(mean.sum(), y)
    torch.testing.assert_close(gradient[:3], torch.full_like(y[:3], B / 3))
    assert gradient[3:].abs().max() == 0


@pytest.mark.parametrize("z", [1e-140, 1e-157, 1e-170])
def test_the_gradient_of_the_field_at_a_tiny_level(backend, z):
    """At the mean v_x = −√N (x − mean)/z and v_z = −√N, so far as they change linearly."""
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    level = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    references = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for points in (x.detach(), x):
        field_x, field_z = field_fn(points, level, references, gamma=0.0, backend=backend)
        assert torch.equal(field_x, torch.zeros_like(field_x))
        torch.testing.assert_close(field_z, torch.full_like(field_z, -math.sqrt(2)))
    slope_x, slope_z = torch.autograd.grad(field_x.sum(), (x, level), retain_graph=True)
    # The mean moves with x along the line between the references only.
    torch.testing.assert_close(slope_x[0, 1] * z, -slope_x.new_tensor(2.0).sqrt())
    assert slope_z.item() == 0
    slope_x, slope_z = torch.autograd.grad(field_z.sum(), (x, level))
    assert slope_x.abs().max() == 0
    assert abs(slope_z.item()) * z < 1e-12


@pytest.mark.parametrize("D", [1e262, 1e300])
def test_a_huge_D_is_as_good_as_infinite(backend, D):
    y, x = rows(30, 5), rows(4, 5, seed=1)
    mean = posterior_mean(x, y, D=D, sigma=1.0, backend=backend)
    wanted = posterior_mean(x, y, D=math.inf, sigma=1.0, backend=backend)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-13)


def test_a_level_of_a_step_beyond_float32(backend):
    x, v, v_z = torch.zeros(2, 3), torch.zeros(2, 3), -torch.ones(2)
    for z in (1e39, torch.full((2,), 1e39, dtype=torch.float64)):
        with pytest.raises(
            ValueError, match=r"z must be a finite number above 0 and at most.*got 1e\+39\."
        ):
            pfgm.euler_step(x, pfgm.Field(v, v_z), z, 1.0, backend=backend)
        result = pfgm.euler_step(
            x.double(), pfgm.Field(v.double(), v_z.double()), z, 1.0, backend=backend
        )
        assert torch.equal(result, x.double())
