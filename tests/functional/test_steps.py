"""The steps of the ODE: values against the formulas, guards, memory, gradients, errors."""

import itertools
import math

import numpy as np
import pytest
import torch

import pfgm
from benchmarks.common import problems
from benchmarks.common.problems import seeded
from pfgm import Field, backends
from pfgm.backends import native
from pfgm.core.problems import OdeStep
from pfgm.functional.levels import step_levels

NATIVE = native.supports(torch.device("cpu"), torch.float32) is None
# torch sums 70 001 squares to 1e-15, and 1 − n², down to 0.01 here, magnifies that a hundredfold.
TOLERANCE = {torch.float32: 3e-7, torch.float64: 3e-13}


def wide(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().double().numpy()
    return np.asarray(values, dtype=np.longdouble)


def column(values):
    """A level, or a level per row, that broadcasts with (B, N)."""
    values = wide(values)
    return values[:, None] if values.ndim else values


def implied_mean(x, field, z):
    """mean = x − z v_x/v_z (spec, section 7), with v_z computed from v_x below z_exp."""
    field_x, field_z, gamma, z_exp, substitution = field
    x, v, v_z = wide(x), wide(field_x), np.minimum(wide(field_z), -1e-5)
    z = np.broadcast_to(wide(z), len(x))
    root = np.sqrt(np.longdouble(x.shape[1]))
    n = np.minimum(np.sqrt((v**2).sum(1)) / root, np.longdouble(1 - 1e-6))
    if substitution == "exact":
        e = n * (gamma + np.sqrt(n**2 * gamma**2 + (1 - n**2) * z**2)) / (1 - n**2)
    else:
        e = gamma * n / (1 - n)
    v_z = np.where(z < z_exp, -root * z / (np.sqrt(e**2 + z**2) + gamma), v_z)
    return x - (z / v_z)[:, None] * v


def euler_oracle(x, mean, z, z_next):
    x, mean = wide(x), wide(mean)
    return x + (column(z_next) - column(z)) * (x - mean) / column(z)


def heun_oracle(x, mean, predicted, mean_next, z, z_next):
    x, mean, predicted, mean_next = (wide(v) for v in (x, mean, predicted, mean_next))
    z, z_next = column(z), column(z_next)
    return x + (z_next - z) / 2 * ((x - mean) / z + (predicted - mean_next) / z_next)


def multistep_oracle(x, mean, z, z_next, previous_mean, z_previous):
    x, mean, previous_mean = wide(x), wide(mean), wide(previous_mean)
    z, z_next, z_previous = column(z), column(z_next), column(z_previous)
    q = np.log(z_previous / z) / np.log(z / z_next)
    d = mean * (1 + 1 / (2 * q)) - previous_mean / (2 * q)
    return d + z_next / z * (x - d)


def close(actual, expected, *inputs, tolerance=None):
    """Equal within a tolerance of the largest value of all: the rounding of inputs stays."""
    expected = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    assert torch.isfinite(actual).all()
    scale = max(float(values.abs().max()) for values in (expected, *inputs))
    error = float((actual.double() - expected).abs().max())
    assert error <= (tolerance or TOLERANCE[actual.dtype]) * scale


def problem(B=5, shape=(37,), z=2.0, dtype=torch.float32, seed=0):
    """Points around 8 data at level z (a number or (B,)), and the exact field there."""
    x, data, level = problems.problem(B, 8, shape, sigma=z, dtype=torch.float64, seed=seed)
    field_x, field_z = pfgm.field_fn(x, level, data, backend="reference")
    return x.to(dtype), Field(field_x.to(dtype), field_z.to(dtype))


def other(x, seed=1):
    return torch.randn(x.shape, generator=seeded(seed), dtype=torch.float64)


SHAPES = [(0, 5), (1, 1), (1, 16), (3, 37), (7, 3072), (70, 513), (2, 70_001)]


@pytest.mark.parametrize(
    ("shape", "z", "substitution"),
    [
        *itertools.product(SHAPES, (0.3, 17.0), ["exact"]),
        *itertools.product([(4, 37)], (1e-3, 0.3, 4.0, 5.0, 17.0), ["exact", "published"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_step(every_backend, shape, dtype, z, substitution):
    B, N = shape
    x, field = problem(B, (N,), z, dtype)
    field = field._replace(substitution=substitution)
    mean = implied_mean(x, field, z)
    for z_next in (0.6 * z, 0.0, 1.5 * z):
        result = pfgm.euler_step(x, field, z, z_next, backend=every_backend)
        assert result.dtype == dtype
        close(result, euler_oracle(x, mean, z, z_next), x)
        again, with_it = pfgm.euler_step(
            x, field, z, z_next, return_mean=True, backend=every_backend
        )
        assert torch.equal(again, result)  # asking for the mean changes nothing
        close(with_it, mean, x)


@pytest.mark.parametrize("z", [0.3, 17.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "N"), SHAPES)
def test_heun_and_multistep(every_backend, B, N, dtype, z):
    x, field = problem(B, (N,), z, dtype)
    z_next, z_previous = 0.6 * z, 1.7 * z
    mean = implied_mean(x, field, z)
    previous = other(x).to(dtype)
    result, result_mean = pfgm.multistep_step(
        x, field, z, z_next, previous, z_previous, backend=every_backend
    )
    close(result, multistep_oracle(x, mean, z, z_next, previous, z_previous), x)
    close(result_mean, mean, x)

    predicted = pfgm.euler_step(x, field, z, z_next, backend=every_backend)
    _, end = problem(B, (N,), z_next, dtype, seed=3)
    mean_next = implied_mean(predicted, end, z_next)
    result = pfgm.heun_step(x, predicted, end, z, z_next, backend=every_backend)
    # The mean at the start, recovered from the rounded predicted point.
    start = wide(x) + z / (z - z_next) * (wide(predicted) - wide(x))
    close(result, heun_oracle(x, start, predicted, mean_next, z, z_next), x)
    close(result, heun_oracle(x, mean, predicted, mean_next, z, z_next), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "N"), SHAPES)
def test_steps_from_the_mean(every_backend, B, N, dtype):
    x, mean, previous = (other(torch.empty(B, N), seed).to(dtype) for seed in range(3))
    x = 40 * x
    arguments = {"backend": every_backend}
    result = pfgm.euler_step(x, mean, 8.0, 3.0, **arguments)
    close(result, euler_oracle(x, mean, 8.0, 3.0), x)
    assert torch.equal(pfgm.euler_step(x, mean, 8.0, 0.0, **arguments), mean)
    moved, same_mean = pfgm.multistep_step(x, mean, 8.0, 3.0, previous, 11.0, **arguments)
    close(moved, multistep_oracle(x, mean, 8.0, 3.0, previous, 11.0), x)
    assert same_mean is mean
    assert pfgm.euler_step(x, mean, 8.0, 3.0, return_mean=True, **arguments)[1] is mean
    mean_next = previous
    close(
        pfgm.heun_step(x, result, mean_next, 8.0, 3.0, **arguments),
        heun_oracle(x, mean, result, mean_next, 8.0, 3.0),
        x,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_of_each_row(backend, dtype):
    """Rows below and above z_exp in one call."""
    z = torch.tensor([1e-3, 0.3, 4.999, 5.0, 17.0], dtype=torch.float64)
    z_next, z_previous = 0.5 * z, 2.5 * z
    x, field = problem(5, (37,), z, dtype)
    mean = implied_mean(x, field, z)
    result = pfgm.euler_step(x, field, z, z_next, backend=backend)
    close(result, euler_oracle(x, mean, z, z_next), x)
    previous = other(x).to(dtype)
    result, _ = pfgm.multistep_step(x, field, z, z_next, previous, z_previous, backend=backend)
    close(result, multistep_oracle(x, mean, z, z_next, previous, z_previous), x)
    result = pfgm.heun_step(previous, x, field, 2 * z, z, backend=backend)
    start = wide(previous) + 2 * (wide(x) - wide(previous))
    close(result, heun_oracle(previous, start, x, mean, 2 * z, z), x)


@pytest.mark.parametrize("substitution", ["exact", "published"])
@pytest.mark.parametrize("z", [1e-3, 4.0, 10.0])
@pytest.mark.parametrize("scale", [1.0, 1.5, 1e6, 1e20])
def test_an_unphysical_field_stays_finite_and_is_not_reversed(backend, scale, z, substitution):
    """‖v_x‖/√N ≥ 1 and a positive v_z."""
    x = torch.ones(3, 37)
    field_x = torch.full_like(x, scale)
    arguments = {"backend": backend, "return_mean": True}
    for field_z in (torch.full((3,), 0.1), torch.zeros(3)):
        field = Field(field_x, field_z, substitution=substitution)
        result, mean = pfgm.euler_step(x, field, z, 0.5 * z, **arguments)
        expected = implied_mean(x, field, z)
        assert ((torch.from_numpy(expected.astype(np.float64)) / mean.double()) - 1).abs().max() < (
            1e-2 if z < 5 else 1e-5  # 1 − n² is 2e-6 there: a float32 n would be off by a tenth
        )
        assert torch.isfinite(result).all()
        assert (result >= x).all()


def test_gamma_and_z_exp(backend):
    x, field = problem(5, (37,), 3.0, torch.float64)
    for gamma, z_exp in [(0.0, 5.0), (2.0, 5.0), (5.0, 0.0), (5.0, 3.0), (5.0, 3.1)]:
        changed = field._replace(gamma=gamma, z_exp=z_exp)
        _, mean = pfgm.euler_step(x, changed, 3.0, 1.0, return_mean=True, backend=backend)
        close(mean, implied_mean(x, changed, 3.0), x)


def test_non_finite_fields_are_passed_on(backend, step_checks):
    x, field = problem(3, (37,), 2.0)
    step_checks.nan_stays_in_its_row(x, *field[:2], backend)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4)])
def test_sample_shapes_and_mixed_dtypes(backend, shape):
    x, field = problem(4, shape, 2.0, torch.float64)
    flat, flat_x = x.reshape(4, -1), field.field_x.reshape(4, -1)
    expected = euler_oracle(flat, implied_mean(flat, field._replace(field_x=flat_x), 2.0), 2.0, 1.0)
    result = pfgm.euler_step(x, field, 2.0, 1.0, backend=backend)
    assert result.shape == x.shape
    close(result.reshape(4, -1), expected)
    narrow = pfgm.euler_step(x.float(), field, 2.0, 1.0, backend=backend)
    assert narrow.dtype == torch.float32
    close(narrow.reshape(4, -1), expected)
    single = Field(*(v.float() for v in field[:2]))
    for half in (torch.bfloat16, torch.float16):
        out = torch.full(x.shape, math.nan, dtype=half)
        result = pfgm.euler_step(x.to(half), single, 2.0, 1.0, out=out, backend=backend)
        again = pfgm.euler_step(x.to(half).float(), single, 2.0, 1.0, backend=backend)
        assert result is out
        assert torch.equal(out, again.to(half))


@pytest.mark.skipif(not NATIVE, reason="no native extension")
@pytest.mark.parametrize(("B", "N", "tolerance"), [(1, 300_001, 1e-12), (40, 3072, 0)])
def test_threads_change_nothing_but_the_last_digit_of_a_shared_norm(threads, B, N, tolerance):
    x, field = problem(B, (N,), 2.0, torch.float64)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(pfgm.euler_step(x, field, 2.0, 1.0, backend="native"))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["rows apart", "columns", "every other", "unaligned"])
def test_strided_tensors(backend, strided, kind):
    x, field = problem(5, (37,), 2.0)
    previous = other(x).float()
    expected = pfgm.multistep_step(x, field, 2.0, 1.0, previous, 3.0, backend=backend)
    field_z = torch.stack([field.field_z, field.field_z], 1)[:, 0]
    apart = Field(strided(field.field_x, kind), field_z)
    out, mean_out = (strided(torch.full_like(x, math.nan), kind) for _ in range(2))
    points, history = strided(x, kind), strided(previous, kind)
    results = pfgm.multistep_step(
        points, apart, 2.0, 1.0, history, 3.0, out=out, mean_out=mean_out, backend=backend
    )
    assert results[0] is out
    assert results[1] is mean_out
    for result, correct in zip(results, expected, strict=True):
        torch.testing.assert_close(result, correct, rtol=1e-6, atol=1e-6)
    expanded = previous[:1].expand_as(previous)
    results = pfgm.multistep_step(x, field, 2.0, 1.0, expanded, 3.0, backend=backend)
    expected = pfgm.multistep_step(x, field, 2.0, 1.0, expanded.clone(), 3.0, backend=backend)
    assert torch.equal(results[0], expected[0])


@pytest.mark.parametrize("shape", [(37,), (2, 3, 4)])
def test_out_may_be_any_input(backend, shape):
    x, field = problem(5, shape, 2.0)
    previous = other(x).float()
    expected = pfgm.multistep_step(x, field, 2.0, 1.0, previous, 3.0, backend=backend)
    pairs = [(0, 1), (0, 2), (1, 2), (2, 0), (2, 1), (1, 0)]
    for place, mean_place in pairs:
        points, slope, history = inputs = [x.clone(), field.field_x.clone(), previous.clone()]
        out, mean_out = inputs[place], inputs[mean_place]
        moved = field._replace(field_x=slope)
        pfgm.multistep_step(
            points, moved, 2.0, 1.0, history, 3.0, out=out, mean_out=mean_out, backend=backend
        )
        assert torch.equal(out, expected[0])
        assert torch.equal(mean_out, expected[1])


def test_an_out_in_a_predicted_mean_that_is_returned_is_refused(backend):
    memory = torch.randn(6, 37)
    x, mean, previous = torch.randn(5, 37), memory[:5], torch.randn(5, 37)
    kept = mean.clone()
    for out in (mean, memory[1:], mean[:]):
        for call in (
            lambda out: pfgm.multistep_step(x, mean, 2.0, 1.0, previous, 3.0, out=out),
            lambda out: pfgm.euler_step(x, mean, 2.0, 1.0, out=out, return_mean=True),
        ):
            with pytest.raises(ValueError, match=r"out must not overlap a predicted mean that is"):
                call(out)
    assert torch.equal(mean, kept)
    expected = pfgm.euler_step(x, mean, 2.0, 1.0, backend=backend)
    assert torch.equal(pfgm.euler_step(x, mean, 2.0, 1.0, out=mean, backend=backend), expected)
    assert torch.equal(mean, expected)


@pytest.mark.parametrize("overlapped", ["x", "field_x", "field_z"])
def test_an_overlapping_out_is_right(backend, overlapped):
    memory = torch.zeros(6 * 37 + 5)
    x, field = problem(5, (37,), 6.0)  # above z_exp, where field_z counts
    expected = pfgm.euler_step(x, field, 6.0, 3.0, backend=backend)
    inside, shifted = memory[: 5 * 37].view(5, 37), memory[5 : 5 * 37 + 5].view(5, 37)
    if overlapped == "x":
        x = inside.copy_(x)
    elif overlapped == "field_x":
        field = field._replace(field_x=inside.copy_(field.field_x))
    else:  # of other rows
        field = field._replace(field_z=shifted.view(-1)[:5].copy_(field.field_z))
    pfgm.euler_step(x, field, 6.0, 3.0, out=shifted, backend=backend)
    assert torch.equal(shifted, expected)


@pytest.mark.parametrize("form", ["field", "mean"])
def test_only_the_outputs_are_written(every_backend, form, step_checks):
    x, field = problem(5, (37,), 2.0)
    step_checks.only_outputs_are_written(x, *field[:2], form, every_backend)


def unpacked(rows=False, mean_form=False):
    x, field = problem(5, (37,), 2.0)
    by_row = torch.rand(3, 5, dtype=torch.float64) + 0.1 if rows else None
    return OdeStep(
        x, field.field_x, None if mean_form else field.field_z, other(x).float(),
        2.0, 0.5, 0.1, by_row, 5.0, 5.0, True,
    )  # fmt: skip


BEST = "native" if NATIVE else "torch"


def test_an_out_in_the_memory_of_the_levels_is_right():
    memory = torch.rand(3, 3, dtype=torch.float64) + 0.1
    x, slope = torch.randn(2, 3, 3, dtype=torch.float64, generator=seeded(0))
    arguments = x, slope, None, None, 2.0, 0.5, 0.1, memory, 5.0, 5.0, True
    expected, _ = torch.ops.pfgm.ode_step(*arguments, False, BEST)
    torch.ops.pfgm.ode_step_out(*arguments, BEST, memory, None)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize(
    ("name", "rows", "mean_form"), [(BEST, False, False), ("reference", True, True)]
)
def test_opcheck(name, rows, mean_form):
    arguments = unpacked(rows=rows, mean_form=mean_form)
    torch.library.opcheck(torch.ops.pfgm.ode_step.default, (*arguments, not mean_form, name))
    out = torch.full((5, 37), math.nan)
    mean_out = None if mean_form else torch.full((5, 37), math.nan)
    torch.library.opcheck(torch.ops.pfgm.ode_step_out.default, (*arguments, name, out, mean_out))


@pytest.mark.parametrize(
    ("backend", "z", "substitution"),
    [
        ("reference", 2.0, "exact"),
        ("reference", 2.0, "published"),
        ("reference", 7.0, "exact"),
        (BEST, 2.0, "exact"),
    ],
)
def test_gradients(backend, z, substitution):
    """Torch differentiates one formula, whatever backend computes the values."""
    x, field = problem(2, (3,), z, torch.float64)
    previous = other(x)
    law = {"backend": backend}
    inputs = [v.clone().requires_grad_() for v in (x, *field[:2], previous)]
    levels = [torch.full((2,), s * z, dtype=torch.float64).requires_grad_() for s in (1, 0.5, 2)]

    def three(x, field_x, field_z, previous, z, z_next, z_previous):
        field = Field(field_x, field_z, substitution=substitution)
        first = pfgm.euler_step(x, field, z, z_next, **law)
        second = pfgm.heun_step(previous, x, field, z_previous, z, **law)
        third = pfgm.multistep_step(x, field, z, z_next, previous, z_previous, **law)
        fourth = pfgm.euler_step(x, previous, z, z_next, backend=backend)
        return first, second, *third, fourth

    assert torch.autograd.gradcheck(three, (*inputs, *levels))
    assert torch.autograd.gradgradcheck(
        lambda *v: three(*v, *levels)[2].square().sum(), inputs, atol=1e-4
    )


def test_out_refuses_gradients(backend):
    x, field = problem(3, (4,), 2.0)
    for index in range(4):
        inputs = [v.clone() for v in (x, *field[:2], torch.empty_like(x))]
        inputs[index].requires_grad_()
        start, *slopes, out = inputs
        wanted = Field(*slopes)
        with pytest.raises(RuntimeError, match="out is given, but an input or out requires grad"):
            pfgm.euler_step(start, wanted, 2.0, 1.0, out=out, backend=backend)
        with torch.no_grad():
            pfgm.euler_step(start, wanted, 2.0, 1.0, out=out, backend=backend)


def test_the_op_itself_has_no_gradient():
    arguments = list(unpacked())
    arguments[0] = arguments[0].clone().requires_grad_()
    result, _ = torch.ops.pfgm.ode_step(*arguments, False, "reference")
    with pytest.raises(RuntimeError, match="has no gradient"):
        result.sum().backward()


X, V, OUT, VZ = *torch.zeros(3, 3, 4), -torch.ones(3)


F = Field(V, VZ)
LAW = {"gamma", "z_exp", "substitution", "field_x", "field_z"}  # of the prediction
ABOVE_0, AT_LEAST_0 = (
    "must be a finite number above 0, got",
    "must be a finite number of at least 0, got",
)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"x": [1.0]}, "TypeError: x must be a torch.Tensor, got list; use torch.as_tensor(x)."),
        ({"x": torch.zeros(())}, "x must have shape (B, *S) with at least one value in S, got ()."),
        ({"x": X[:, :0], "field_x": X[:, :0]}, "x must have shape (B, *S)…in S, got (3, 0)."),
        ({"x": X.int()}, "TypeError: x must be one of…torch.float16, got torch.int32."),
        ({"x": X.to_sparse()}, "TypeError: x must be a dense tensor,…use x.to_dense()."),
        ({"field_x": V[:2]}, "field_x must have shape (3, 4), got (2, 4)."),
        ({"field_x": V.int()}, "TypeError: field_x must be floating point, got torch.int32."),
        ({"field_x": V.to("meta")}, "field_x and x must be on one device, got meta and cpu."),
        ({"field_x": None}, "TypeError: field_x must be a torch.Tensor, got NoneType."),
        ({"field_z": VZ[:, None]}, "field_z must have shape (3,), got (3, 1)."),
        ({"prediction": (V, VZ)}, "TypeError: prediction must be a…holds the mean, got tuple."),
        ({"prediction": V[:2]}, "prediction must have shape (3, 4), got (2, 4)."),
        ({"z": 0.0}, f"z {ABOVE_0} 0.0."),
        ({"z": math.nan}, f"z {ABOVE_0} nan."),
        ({"z": torch.tensor([1.0, -1.0, 2.0])}, f"z {ABOVE_0} -1.0."),
        ({"z": True}, "TypeError: z must be a number or a tensor of shape (B,), got bool."),
        ({"z": "1"}, "TypeError: z must be a number or a tensor of shape (B,), got str."),
        ({"z": torch.ones(2)}, "z must be a number or a tensor of…of a sample, got shape (2,)."),
        ({"z_next": -0.1}, f"z_next {AT_LEAST_0} -0.1."),
        ({"z_next": math.inf}, f"z_next {AT_LEAST_0} inf."),
        ({"z_next": torch.tensor([1.0, math.nan, 2.0])}, f"z_next {AT_LEAST_0} nan."),
        ({"prediction": V, "z_next": -1.0}, f"z_next {AT_LEAST_0} -1.0."),
        *(
            ({name: bad}, f"{name} {AT_LEAST_0} {bad}.")
            for name in ("gamma", "z_exp")
            for bad in (-1.0, math.nan, math.inf, 10**400, True, False)
        ),
        ({"gamma": torch.tensor(5.0, requires_grad=True)}, "TypeError: gamma…requires grad."),
        ({"substitution": "none"}, "substitution must be one of exact, published, got 'none'."),
        ({"out": torch.zeros(4, 3)}, "out must have the shape and dtype…3) and torch.float32."),
        ({"out": X.double()}, "out must have the shape and dtype of…(3, 4) and torch.float64."),
        ({"out": X.half()}, "out must have the shape and dtype of x,…(3, 4) and torch.float16."),
        ({"x": X.half(), "out": X}, "out must have the shape and dtype…4) and torch.float32."),
        ({"out": X.to("meta")}, "out and x must be on one device, got meta and cpu."),
        ({"mean_out": X.clone()}, "mean_out needs return_mean=True."),
        ({"mean_out": X[:2], "return_mean": True}, "mean_out must have the…and torch.float32."),
        ({"x": X.half(), "mean_out": X, "return_mean": True}, "mean_out must have…torch.float32."),
        ({"prediction": V, "mean_out": X, "return_mean": True}, "mean_out must not…as an input."),
        (
            {"out": OUT, "mean_out": OUT, "return_mean": True},
            "mean_out and out must not overlap in memory.",
        ),
        ({"backend": "cuda"}, "backend must be one of native,…torch, triton, got 'cuda'."),
    ],
)
def test_refusals(refused, changed, sentence):
    law = {name: changed.pop(name) for name in LAW & {*changed}}
    arguments = {"x": X, "prediction": F._replace(**law), "z": 2.0, "z_next": 1.0} | changed
    refused(lambda: pfgm.euler_step(**arguments), sentence)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pfgm.heun_step(X, X, F, 2.0, 0.0), f"z_next {ABOVE_0} 0.0."),
        (lambda: pfgm.heun_step(X, X, F, 2.0, torch.zeros(3)), f"z_next {ABOVE_0} 0.0."),
        (lambda: pfgm.multistep_step(X, F, 2.0, 0.0, X, 3.0), f"z_next {ABOVE_0} 0.0."),
        (lambda: pfgm.multistep_step(X, F, 2.0, torch.zeros(3), X, 3.0), f"z_next {ABOVE_0} 0.0."),
        (lambda: pfgm.multistep_step(X, F, 2.0, 1.0, X, 2.0), "z_previous must differ from z."),
        (
            lambda: pfgm.multistep_step(X, F, 2.0, 1.0, X, torch.tensor([3.0, 2.0, 4.0])),
            "z_previous must differ from z.",
        ),
        (
            lambda: pfgm.multistep_step(X, F, 2.0, 1.0, X[:2], 3.0),
            "previous_mean must have shape (3, 4), got (2, 4).",
        ),
        (lambda: pfgm.heun_step(X[:2], X, F, 2.0, 1.0), "x must have shape (3, 4), got (2, 4)."),
        (
            lambda: pfgm.multistep_step(X, V, 2.0, 1.0, None, 3.0),
            "TypeError: previous_mean must be a torch.Tensor, got NoneType.",
        ),
    ],
)
def test_refusals_of_steps_with_another_point(refused, call, sentence):
    refused(call, sentence)


def test_levels_on_a_device_are_not_read():
    """The host would wait for a GPU, and a CUDA graph could not be captured."""
    x = torch.zeros(3, 4, device="meta")  # whose values cannot be read
    z = torch.ones(3, device="meta")
    levels = step_levels(x, 2 * z, z, 3 * z)
    assert [level.device.type for level in levels] == ["meta"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2)])
def test_outputs_with_common_memory_are_refused(shape, dtype):
    x = torch.arange(12.0).view(shape).to(dtype)
    field = Field((-x / 20).flip(0), VZ.to(dtype))
    expected = pfgm.euler_step(x, field, 2.0, 1.0, return_mean=True)

    def write(out, mean_out):
        options = {"return_mean": True, "out": out, "mean_out": mean_out}
        return pfgm.euler_step(x, field, 2.0, 1.0, **options)

    memory = torch.zeros(4, *shape[1:], dtype=dtype)
    reversed_axes = torch.zeros(*shape[:0:-1], 3, dtype=dtype).permute(*range(len(shape))[::-1])
    for out, mean_out in ((memory[:3], memory[1:]), (reversed_axes, reversed_axes)):
        with pytest.raises(ValueError, match=r"mean_out and out must not overlap in memory\."):
            write(out, mean_out)
    interleaved = torch.zeros(3, 2, *shape[1:], dtype=dtype)
    for result, wanted in zip(write(*interleaved.unbind(1)), expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("name", pfgm.solvers.GRID_SOLVERS)
@pytest.mark.parametrize("kind", ["field", "mean", "x itself"])
def test_solvers_overwrite_only_their_own_tensors(name, kind):
    """In place, with gradients off, and out of place, with a callback, give the same."""
    data = torch.rand(8, 6, generator=seeded(0)) * 2 - 1
    start = 9 * other(torch.empty(5, 6)).float()
    kept = start.clone()

    def predict(x, z):
        if kind == "x itself":
            return x
        if kind == "mean":
            return pfgm.posterior_mean(x, data, r=z)
        return Field(*pfgm.field_fn(x, z, data))

    grid = pfgm.solvers.rho_grid(9.0, 0.1, 7)
    solver = pfgm.solvers.SOLVERS[name].function
    expected, _ = solver(predict, start, grid, lambda info: None)
    with torch.no_grad():
        result, _ = solver(predict, start, grid)
    assert torch.equal(result, expected)
    assert torch.equal(start, kept)


@pytest.mark.parametrize(("name", "most"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_a_run_takes_no_new_memory_for_each_step(name, most, monkeypatch):
    """Only x, and the predicted point or the mean, are allocated. Later results reuse their
    memory."""
    seen = set()
    exact = backends.BACKENDS["reference"].ode_step

    def watch(step, with_mean, out=None, mean_out=None):
        result = exact(step, with_mean, out, mean_out)
        kept.extend(result)
        seen.update(t.data_ptr() for t in result if t is not None)
        return result

    kept = []  # so that no address is used twice by chance
    monkeypatch.setattr(backends.reference, "ode_step", watch)
    data = torch.rand(8, 6, generator=seeded(0)) * 2 - 1
    flow = pfgm.PoissonFlow((6,), data_norm=1.0)
    with pfgm.use_backend("reference"):
        flow.sample(flow.empirical(data), 5, solver=name, steps=9)
    assert len(kept) >= 18
    assert len(seen) <= most + 1
