"""The transforms of torch.func and forward mode, against the formulas in float64 autograd."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import pfgm
from benchmarks.common import problems
from benchmarks.common.problems import seeded
from pfgm.backends.reference import normalised_field
from pfgm.references import part as references_module

ONCE = "can be differentiated once"


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 3 rows of 4 values in float64."""
    monkeypatch.setattr(references_module, "_CHUNK_BYTES", 3 * 4 * 8)


def problem(B=3, M=7, N=4):
    return problems.problem(B, M, N, sigma=(0.4, 1.5), spread=0.5, dtype=torch.float64)


def tangents(values):
    generator = seeded(1)
    return tuple(torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)


def naive(x, references, sigma, D):
    """Mean and log-density by the plain formulas."""
    squared = (x[:, None] - references).square().sum(2)
    N, M = references.shape[1], references.shape[0]
    if math.isinf(D):
        scores = -squared / (2 * sigma[:, None].square())
        scale = -N / 2 * (2 * math.pi * sigma.square()).log()
    else:
        r = sigma * math.sqrt(D)
        scores = -(N + D) / 2 * (squared + r[:, None].square()).log()
        scale = D * r.log() + math.lgamma((N + D) / 2) - math.lgamma(D / 2)
        scale = scale - N / 2 * math.log(math.pi)
    return scores.softmax(1) @ references, scores.logsumexp(1) - math.log(M) + scale


def naive_field(x, references, z):
    return normalised_field(x - naive(x, references, z, 1.0)[0], z, 5.0)


def ours(x, references, sigma, D, backend=None):
    weigh = {"sigma": sigma, "D": D, "backend": backend}
    return (pfgm.posterior_mean(x, references, **weigh), pfgm.log_density(x, references, **weigh))


def close(actual, expected, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("D", [1.0, 4.5, 128.0, math.inf])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2)])
def test_tangents_are_those_of_the_formula(backend, D, moving):
    tensors = problem()
    moved = tuple(tensors[k] for k in moving)
    directions = tangents(moved)

    def of(function, *options):
        def call(*values):
            arguments = list(tensors)
            for k, value in zip(moving, values, strict=True):
                arguments[k] = value
            return function(*arguments, *options)

        return call

    expected = jvp(of(naive, D), moved, directions)
    function = of(ours, D, backend)
    close(jvp(function, moved, directions), expected)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(*pair) for pair in zip(moved, directions, strict=True))
        results = [forward_ad.unpack_dual(result) for result in function(*duals)]
    close(tuple(result.tangent for result in results), expected[1])
    if D == 1.0:
        field = of(lambda x, y, z: pfgm.field_fn(x, z, y, backend=backend))
        close(jvp(field, moved, directions), jvp(of(naive_field), moved, directions))


def test_one_noise_level_has_a_tangent():
    x, references, _ = problem()
    sigma, one = torch.tensor(0.7).double(), torch.tensor(1.0).double()
    for D in (4.5, math.inf):
        actual = jvp(lambda s, D=D: ours(x, references, s, D), (sigma,), (one,))[1]
        close(actual, jvp(lambda s, D=D: naive(x, references, s.expand(3), D), (sigma,), (one,))[1])


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 1.0])
def test_tangents_in_float32_and_many_dimensions(D, sigma):
    """Where the terms of the tangent are of the size of N + D and cancel."""
    x, references, _ = problem(4, 9, 3072)
    x = x.float()
    (direction,) = tangents((x,))
    level = torch.full((4,), sigma, dtype=torch.float64)
    actual = jvp(lambda x: ours(x, references.float(), level, D), (x,), (direction,))[1]
    wide = references.float().double()
    expected = jvp(lambda x: naive(x, wide, level, D), (x.double(),), (direction.double(),))[1]
    assert actual[0].dtype == torch.float32
    scale = direction.norm(dim=1).max()
    assert (actual[0] - expected[0]).norm(dim=1).max() <= 1e-6 * max(scale, expected[0].norm())
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("D", [4.5, math.inf])
@pytest.mark.parametrize("held", [False, True])
def test_tangents_at_the_limits(backend, small_chunks, D, held):
    x, references, _ = problem()
    x = torch.cat([references[:1], x[1:]])
    (direction,) = tangents((x,))
    r = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    level = {"sigma": r} if math.isinf(D) else {"r": r}
    rows = pfgm.ReferenceSet(references) if held else references

    def call(x):
        return pfgm.posterior_mean(x, rows, D=D, backend=backend, return_logsumexp=True, **level)

    mean_tangent, lse_tangent = jvp(call, (x,), (direction,))[1]
    expected = vjp(lambda x: call(x)[0], x)
    assert not mean_tangent[0].any()
    assert lse_tangent[0].isnan()
    assert lse_tangent[2].isfinite()
    rows_of_jacobian = jacrev(lambda x: call(x)[0])(x)
    close(mean_tangent, torch.einsum("bnck,ck->bn", rows_of_jacobian, direction), rtol=1e-7)
    assert expected[0].shape == mean_tangent.shape


@pytest.mark.parametrize(
    "transform", [hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))]
)
@pytest.mark.parametrize("held", [False, True])
def test_second_derivatives_are_refused(transform, held):
    x, references, sigma = problem()
    rows = pfgm.ReferenceSet(references) if held else references
    with pytest.raises(RuntimeError, match=ONCE):
        transform(lambda x: ours(x, rows, sigma, 4.5)[1].sum())(x)


def test_a_tangent_that_is_differentiated_is_refused():
    x, references, _ = problem()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(pfgm.posterior_mean(dual, references, r=1.0)).tangent
        with pytest.raises(RuntimeError, match=ONCE):
            torch.autograd.grad(tangent.sum(), x)


def test_the_ops_themselves_drop_no_tangent():
    x, references, r = problem()
    op = torch.ops.pfgm.posterior_mean
    actual = jvp(lambda x: op(x, references, r, 1.0)[0], (x,), (x,))[1]
    close(actual, jvp(lambda x: naive(x, references, r, 1.0)[0], (x,), (x,))[1])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="the functions of pfgm have"):
        op(forward_ad.make_dual(x, x), references, r, 1.0)


@pytest.mark.parametrize("D", [1.0, 4.5, math.inf])
@pytest.mark.parametrize("held", [False, True])
def test_transforms_of_reverse_mode(small_chunks, backend, D, held):
    x, references, sigma = problem()
    rows = pfgm.ReferenceSet(references) if held else references

    def actual(x, sigma):
        return ours(x, rows, sigma, D, backend)

    def expected(x, sigma):
        return naive(x, references, sigma, D)

    def total(function):
        return lambda *values: sum(v.sin().sum() for v in function(*values))

    def one(function):
        return lambda x, s: total(function)(x[None], s[None])

    for of in (
        lambda f: grad(total(f), (0, 1))(x, sigma),
        lambda f: vjp(f, x, sigma)[1](tangents(f(x, sigma))),
        lambda f: jacrev(f, (0, 1))(x, sigma),
        lambda f: jacfwd(f, (0, 1))(x, sigma),
        lambda f: vmap(grad(one(f), (0, 1)))(x, sigma),
        lambda f: grad(lambda x: vmap(one(f))(x, sigma).sum())(x),
        lambda f: vmap(f, in_dims=(1, None))(torch.stack([x, 2 * x, -x], 1), sigma),
        lambda f: vmap(f, in_dims=(None, 0))(x, torch.stack([sigma, 2 * sigma])),
        lambda f: vmap(lambda v: jvp(f, (x, sigma), (v, sigma))[1])(torch.stack([x, -x])),
        lambda f: vmap(lambda x: jvp(f, (x, sigma), (x, sigma))[1])(torch.stack([x, -x])),
    ):
        close(of(actual), of(expected), rtol=1e-8, atol=1e-9)
    assert vmap(actual, in_dims=(0, None))(x.new_zeros(2, 0, 4), sigma[:0])[0].shape == (2, 0, 4)


def test_references_that_differ_between_samples(backend):
    x, references, sigma = problem()
    many = torch.stack([references, references.flip(0) * 2])

    def of(function, *options):
        def total(references):
            return sum(v.sin().sum() for v in function(x, references, sigma, 4.5, *options))

        return vmap(total)(many), vmap(grad(total))(many), jacrev(total)(references)

    close(of(ours, backend), of(naive))


@pytest.mark.parametrize("z", [2.0, 7.0])
def test_transforms_of_the_steps(backend, z):
    generator = seeded(2)
    x, field_x, history = (
        torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    tensors = x, field_x, torch.tensor([-1.0, -2.0, 0.1]).double(), history
    directions = tangents(tensors)

    def steps(x, field_x, field_z, history, backend=backend):
        field = pfgm.Field(field_x, field_z)
        one = pfgm.euler_step(x, field, z, z / 2, backend=backend)
        two = pfgm.heun_step(x, one, field, z, z / 2, backend=backend)
        law = {"backend": backend}
        return (*pfgm.multistep_step(two, field, z, z / 2, history, 2 * z, **law), one)

    def difference(size=1e-6):
        ends = (
            steps(*(v + sign * size * d for v, d in zip(tensors, directions, strict=True)))
            for sign in (1, -1)
        )
        return tuple((a - b) / (2 * size) for a, b in zip(*ends, strict=True))

    close(jvp(steps, tensors, directions)[1], difference(), rtol=1e-6, atol=1e-6)
    close(vmap(steps)(*(v[:, None] for v in tensors))[0][:, 0], steps(*tensors)[0])
    close(jacfwd(steps)(*tensors), jacrev(steps)(*tensors))
    second = hessian(lambda x: steps(*tensors[:1], x, *tensors[2:])[0].square().sum())(field_x)
    assert torch.allclose(second, second.permute(2, 3, 0, 1))
    levels = torch.tensor([z, 2 * z]).double()
    field = pfgm.Field(*tensors[1:3])
    by_level = vmap(lambda z: pfgm.euler_step(x, field, z, z / 2, backend=backend))(levels)
    for step, level in zip(by_level, levels, strict=True):
        close(step, pfgm.euler_step(x, field, level, level / 2, backend=backend))


def test_an_output_is_refused_under_transforms():
    x = torch.ones(2, 3)

    def in_place(x):
        return pfgm.euler_step(x, 2 * x, 2.0, 1.0, out=torch.empty_like(x))

    for call in (lambda: jvp(in_place, (x,), (x,)), lambda: vmap(in_place)(x[None])):
        with pytest.raises(RuntimeError, match="call the step without out"):
            call()


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_a_tangent_goes_through_a_solver(solver):
    solve = getattr(pfgm.solvers, solver)
    x = torch.linspace(-9, 9, 5, dtype=torch.float64)[:, None]

    def run(scale):
        return solve(lambda x, z: x * scale**2 / (scale**2 + z**2), x, [9.0, 4.0, 1.0, 0.3])[0]

    scale = torch.tensor(1.0, dtype=torch.float64)
    with torch.no_grad():
        actual = jvp(run, (scale,), (scale,))[1]
        expected = (run(scale + 1e-6) - run(scale - 1e-6)) / 2e-6
    close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 11),
    reason="older versions of torch cannot compile transforms of these operators",
)
def test_transforms_within_a_graph():
    x, references, sigma = problem()

    def of(function):
        def both(x):
            tangent = jvp(lambda x: function(x, references, sigma, 4.5), (x,), (x,))[1]
            return *tangent, grad(lambda x: function(x, references, sigma, 4.5)[1].sum())(x)

        return both

    torch._dynamo.reset()
    close(torch.compile(of(ours), fullgraph=True, backend="aot_eager")(x), of(naive)(x))
    with forward_ad.dual_level(), pytest.raises(Exception, match="drops the dual numbers"):
        torch.compile(
            lambda x: ours(x, references, sigma, 4.5)[0], fullgraph=True, backend="aot_eager"
        )(forward_ad.make_dual(x, x))
    torch._dynamo.reset()
