"""The steps of the ODE on a GPU, against the reference backend in float64."""

import math

import pytest
import torch
from torch.utils._pytree import tree_map_only

import pfgm
from pfgm.core.problems import OdeStep
from tests.gpu.shapes import SHAPES
from tests.ops.public_calls import STEPS, assert_same, call, values_for

pytestmark = pytest.mark.usefixtures("way")

# Rounding of a factor, of a product and of a sum in float32: 6e-8 of the largest term each.
TOLERANCE = 4e-7


def problem(B, N, device, seed=0):
    """Points, a field with ‖v_x‖/√N from 0.05 to 0.995 and v_z below 0, and two more points."""
    generator = torch.Generator().manual_seed(seed)
    x, field_x, *others = (torch.randn(B, N, generator=generator) for _ in range(4))
    size = torch.linspace(0.05, 0.995, max(B, 1))[torch.randperm(B, generator=generator)]
    field_x *= (size * math.sqrt(N) / field_x.norm(dim=1))[:, None]
    field_z = -0.05 - torch.rand(B, generator=generator)
    return [values.to(device) for values in (10 * x, field_x, field_z, *others)]


def exact(function, *arguments, **law):
    """The result of the reference backend for the same values in float64."""
    wide = tree_map_only(torch.Tensor, lambda a: a.double().cpu(), arguments)
    return function(*wide, backend="reference", **law)


def close(actual, expected, *inputs):
    """Each row within the rounding of float32 relative to the largest of its terms."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    terms = torch.stack([values.double().cpu() for values in (expected, *inputs)])
    error = (actual.double().cpu() - expected).abs().amax(1) / terms.abs().amax((0, 2))
    assert error.max() <= TOLERANCE  # false for NaN


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("z", [1e-3, 4.0, 5.0, 17.0])
@pytest.mark.parametrize(("B", "N"), SHAPES)
def test_field_steps(device, backend, B, N, z):
    x, field_x, field_z, predicted, previous = problem(B, N, device)
    field, end = (x, pfgm.Field(field_x, field_z), z), 0.6 * z
    result, mean = pfgm.euler_step(*field, end, return_mean=True, backend=backend)
    expected, expected_mean = exact(pfgm.euler_step, *field, end, return_mean=True)
    close(mean, expected_mean, x)
    close(result, expected, x, expected_mean)
    assert torch.equal(pfgm.euler_step(*field, end, backend=backend), result)

    arguments = (*field, end, previous, 1.7 * z)
    results = pfgm.multistep_step(*arguments, backend=backend)
    expected = exact(pfgm.multistep_step, *arguments)
    close(results[0], expected[0], x, expected_mean, previous)
    close(results[1], expected_mean, x)

    arguments = (x, predicted, field[1], 1.5 * z, z)
    result = pfgm.heun_step(*arguments, backend=backend)
    _, mean = exact(pfgm.euler_step, predicted, *field[1:], end, return_mean=True)
    close(result, exact(pfgm.heun_step, *arguments), x, predicted, mean)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("B", "N"), SHAPES)
def test_steps_from_the_mean(device, backend, B, N):
    x, mean, _, predicted, previous = problem(B, N, device)
    for sigma, sigma_next, sigma_previous in [(8.0, 3.0, 11.0), levels_by_row(B, device)]:
        for function, inputs, levels in [
            (pfgm.euler_step, (x, mean), ()),
            (pfgm.heun_step, (x, predicted, mean), ()),
            (pfgm.multistep_step, (x, mean), (previous, sigma_previous)),
        ]:
            arguments = (*inputs, sigma, sigma_next, *levels)
            result, expected = function(*arguments, backend=backend), exact(function, *arguments)
            if function is pfgm.multistep_step:
                result, expected = result[0], expected[0]
            close(result, expected, x, mean, predicted, previous)
    assert torch.equal(pfgm.euler_step(x, mean, 8.0, 0.0, backend=backend), mean)


def levels_by_row(B, device):
    """z from 0.01 to 40, z_next and z_previous of each row."""
    z = torch.logspace(-2, math.log10(40.0), B, dtype=torch.float64, device=device)
    return z, 0.4 * z, 1.5 * z


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("substitution", ["exact", "published"])
@pytest.mark.parametrize(("B", "N"), [(0, 5), (1, 1), (33, 3), (5, 3072), (3, 8193)])
def test_levels_of_each_row(device, backend, B, N, substitution):
    x, field_x, field_z, predicted, previous = problem(B, N, device)
    z, z_next, z_previous = levels_by_row(B, device)
    field = pfgm.Field(field_x, field_z, substitution=substitution)
    arguments = (x, field, z, z_next, previous, z_previous)
    result, mean = pfgm.multistep_step(*arguments, backend=backend)
    expected, expected_mean = exact(pfgm.multistep_step, *arguments)
    close(mean, expected_mean, x)
    close(result, expected, x, expected_mean, previous)
    arguments = (x, predicted, field, z_previous, z)
    result = pfgm.heun_step(*arguments, backend=backend)
    _, mean = exact(pfgm.euler_step, predicted, field, z, z_next, return_mean=True)
    close(result, exact(pfgm.heun_step, *arguments), x, predicted, mean)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("N", [37, 9000])
def test_laws(device, backend, N):
    x, field_x, field_z, _, _ = problem(5, N, device)
    for law in [
        (0.0, 5.0, "exact"), (2.0, 3.1, "exact"), (5.0, 3.1, "published"), (5.0, 0.0, "exact"),
    ]:  # fmt: skip
        arguments = (x, pfgm.Field(field_x, field_z, *law), 3.0, 1.0)
        result, mean = pfgm.euler_step(*arguments, return_mean=True, backend=backend)
        expected, expected_mean = exact(pfgm.euler_step, *arguments, return_mean=True)
        close(mean, expected_mean, x)
        close(result, expected, x, expected_mean)


def test_levels_are_compared_with_z_exp_in_float64(device, backend):
    """Also where float32 would call them equal."""
    x, field_x, field_z, _, _ = problem(2, 37, device)
    law, field = {"return_mean": True}, pfgm.Field(field_x, field_z)
    levels = [5.0 * (1 - 1e-12), 5.0]
    rows = torch.tensor(levels, dtype=torch.float64, device=device)
    below = exact(pfgm.euler_step, x, field, levels[0], 1.0, **law)[1]
    above = exact(pfgm.euler_step, x, field, levels[1], 1.0, **law)[1]
    assert ((below - above).abs().amax(1) > 0.1).all()
    for z, expected in [
        (levels[0], below),
        (levels[1], above),
        (rows, torch.stack([below[0], above[1]])),
    ]:
        _, mean = pfgm.euler_step(x, field, z, 1.0, backend=backend, **law)
        close(mean, expected, x)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("N", "substitution"), [(1, "exact"), (37, "exact"), (37, "published"), (9000, "published")]
)
def test_an_unphysical_field_stays_finite_and_is_not_reversed(device, backend, N, substitution):
    """‖v_x‖/√N ≥ 1, where it is clamped, and v_z ≥ 0."""
    x = torch.ones(4, N, device=device)
    field_z = torch.tensor([0.1, 0.0, -1e-7, 1e30], device=device)
    for scale in (1.0, 1.5, 1e6, 1e20):
        field_x = torch.full_like(x, scale)
        for z in (1e-3, 4.0, 10.0, torch.tensor([1e-3, 4.0, 10.0, 40.0], device=device)):
            arguments = (x, pfgm.Field(field_x, field_z, substitution=substitution), z, z / 2)
            result, mean = pfgm.euler_step(*arguments, return_mean=True, backend=backend)
            expected, expected_mean = exact(pfgm.euler_step, *arguments, return_mean=True)
            close(mean, expected_mean, x)
            close(result, expected, x, expected_mean)
            assert (result >= x).all()


def test_non_finite_fields_stay_in_their_row(device, backend, step_checks):
    step_checks.nan_stays_in_its_row(*problem(3, 37, device)[:3], backend)


def multistep(x, field_x, field_z, previous, backend, z=2.0, **outputs):
    field = pfgm.Field(field_x, field_z)
    return pfgm.multistep_step(x, field, z, 1.0, previous, z + 2, backend=backend, **outputs)


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows apart", "columns", "every other", "unaligned"])
@pytest.mark.parametrize("N", [1, 37, 3072, 8193])
def test_strided_tensors(device, backend, strided, N, kind):
    x, field_x, field_z, _, previous = problem(3, N, device)
    expected = multistep(x, field_x, field_z, previous, backend)
    out, mean_out = (strided(torch.full_like(x, math.nan), kind) for _ in range(2))
    inputs = [strided(values, kind) for values in (x, field_x, previous)]
    every_other = torch.stack([field_z, field_z], 1)[:, 0]
    inputs.insert(2, every_other)
    results = multistep(*inputs, backend, out=out, mean_out=mean_out)
    assert results[0] is out
    assert results[1] is mean_out
    for result, correct in zip(results, expected, strict=True):
        torch.testing.assert_close(result, correct, rtol=0, atol=3e-7 * float(correct.abs().max()))


@pytest.mark.parametrize("N", [37, 3072, 8193])
def test_each_tensor_has_its_own_stride(device, backend, strided, N):
    x, field_x, field_z, _, previous = problem(3, N, device)
    expected = multistep(x, field_x, field_z, previous, backend)
    outputs = (torch.full_like(x, math.nan), torch.full_like(x, math.nan))
    for k in range(5):
        tensors = [x, field_x, previous, *(values.clone() for values in outputs)]
        tensors[k] = strided(tensors[k], "rows apart")
        x_k, field_k, previous_k, out, mean_out = tensors
        multistep(x_k, field_k, field_z, previous_k, backend, out=out, mean_out=mean_out)
        assert torch.equal(out, expected[0])
        assert torch.equal(mean_out, expected[1])


@pytest.mark.parametrize("N", [37, 3072, 8193])
def test_expanded_tensors(device, backend, N):
    x, field_x, field_z, _, previous = problem(3, N, device)
    inputs = [values[:1].expand_as(values) for values in (x, field_x, field_z, previous)]
    results = multistep(*inputs, backend)
    expected = multistep(*(values.contiguous() for values in inputs), backend)
    for result, correct in zip(results, expected, strict=True):
        assert torch.equal(result, correct)
        assert torch.equal(result[0], result[2])


@pytest.mark.parametrize("N", [1, 37, 3072, 8193])
@pytest.mark.parametrize("z", [2.0, 7.0])
def test_outputs_may_be_inputs(device, backend, N, z):
    x, field_x, field_z, predicted, previous = problem(5 if N < 8193 else 2, N, device)
    expected = multistep(x, field_x, field_z, previous, backend, z)
    for out_place, mean_place in [(0, 1), (0, 2), (1, 2), (2, 0), (2, 1), (1, 0)]:
        inputs = [x.clone(), field_x.clone(), previous.clone()]
        out, mean_out = inputs[out_place], inputs[mean_place]
        x_in, field_in, previous_in = inputs
        multistep(x_in, field_in, field_z, previous_in, backend, z, out=out, mean_out=mean_out)
        assert torch.equal(out, expected[0])
        assert torch.equal(mean_out, expected[1])
    expected = pfgm.heun_step(x, predicted, field_x, z, 1.0, backend=backend)
    for out_place in range(3):
        inputs = [x.clone(), predicted.clone(), field_x.clone()]
        pfgm.heun_step(*inputs, z, 1.0, out=inputs[out_place], backend=backend)
        assert torch.equal(inputs[out_place], expected)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_outputs_are_marked(device, backend, name, rows):
    values = values_for(device=device)
    z = torch.linspace(2, 3, 5, device=device) if rows else 2.0
    mean_out = torch.full_like(values[0], math.nan)
    options = {"backend": backend} | ({"return_mean": True} if name == "euler_step" else {})
    expected = call(name, values, z, z / 2, 2 * z, **options)
    if name != "heun_step":
        options["mean_out"] = mean_out
    for out in (torch.empty_like(values[0]), values[0]):
        versions = out._version, mean_out._version
        results = call(name, values, z, z / 2, 2 * z, out=out, **options)
        assert results[0] is out
        assert_same(results, expected)
        assert out._version > versions[0]
        assert (mean_out._version > versions[1]) == ("mean_out" in options)


def test_an_output_that_overlaps_an_input_in_part(device, backend):
    """Each row is so long that it is written before the next one is read."""
    N = 3072
    x, _, _, field_x, field_z, _ = values_for(shape=(N,), device=device)
    expected = pfgm.euler_step(x, pfgm.Field(field_x, field_z), 2.0, 1.0, backend=backend)
    for place in range(3):
        inputs = [x, field_x, field_z]
        memory = torch.zeros(6 * N, device=device)
        memory[: inputs[place].numel()] = inputs[place].flatten()
        inputs[place] = memory[: inputs[place].numel()].view(inputs[place].shape)
        out = memory[-5 * N :] if place < 2 else memory[: 5 * N]  # a row further, or over all
        out, field = out.view(5, N), pfgm.Field(*inputs[1:])
        pfgm.euler_step(inputs[0], field, 2.0, 1.0, out=out, backend=backend)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("form", ["field", "mean"])
@pytest.mark.parametrize("N", [3, 37, 3072, 8193])
def test_only_the_outputs_are_written(device, backend, N, form, step_checks):
    x, field_x, field_z, _, _ = problem(5 if N < 8193 else 2, N, device)
    step_checks.only_outputs_are_written(x, field_x, field_z, form, backend)


@pytest.mark.usefixtures("poisoned")
def test_half_precision_and_sample_shapes(device, backend):
    x, field_x, field_z, _, previous = problem(4, 24, device)
    x, field_x, previous = (v.half().view(4, 2, 3, 4) for v in (x, field_x, previous))
    arguments = (x, pfgm.Field(field_x, field_z), 2.0, 1.0, previous, 3.0)
    result, mean = pfgm.multistep_step(*arguments, backend=backend)
    expected = exact(pfgm.multistep_step, *arguments)
    for actual, correct in zip((result, mean), expected, strict=True):
        assert actual.dtype == torch.float16
        scale = float(correct.abs().max())
        torch.testing.assert_close(actual.double().cpu(), correct, rtol=0, atol=6e-4 * scale)


# ---- torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "mean_form"), [(False, False), (True, True)])
def test_opcheck(device, backend, rows, mean_form):
    x, field_x, field_z, _, previous = problem(5, 37, device)
    by_row = torch.stack(levels_by_row(5, device)) if rows else None
    step = OdeStep(
        x, field_x, None if mean_form else field_z, previous, 2.0, 0.5, 0.1, by_row, 5.0, 5.0, True
    )
    out, mean_out = torch.empty_like(x), None if mean_form else torch.empty_like(x)
    torch.library.opcheck(torch.ops.pfgm.ode_step.default, (*step, not mean_form, backend))
    torch.library.opcheck(torch.ops.pfgm.ode_step_out.default, (*step, backend, out, mean_out))


@pytest.mark.slow
def test_compile(device, backend):
    x, field_x, field_z, _, previous = problem(5, 6, device)

    def steps(x, field_x, field_z, z):
        law = {"backend": backend}
        x = pfgm.euler_step(x, pfgm.Field(field_x, field_z), z, z / 2, **law)
        x, mean = pfgm.multistep_step(
            x, pfgm.Field(field_x, field_z), z, z / 2, previous, 2 * z, **law
        )
        field = torch.ops.pfgm.normalised_field(x - mean, field_z.double(), 5.0, backend)
        return pfgm.heun_step(x, mean, pfgm.Field(*field), z, z / 2, **law)

    def in_place(x, field_x, field_z, z):
        x, mean = x.clone(), torch.empty_like(x)
        law = {"out": x, "backend": backend}
        pfgm.euler_step(
            x, pfgm.Field(field_x, field_z), z, z / 2, return_mean=True, mean_out=mean, **law
        )
        pfgm.multistep_step(
            x, pfgm.Field(field_x, field_z), z, z / 2, mean, 2 * z, mean_out=mean, **law
        )
        return x + mean

    for function in (steps, in_place):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for z in (2.0, 7.0, torch.full((5,), 3.0, dtype=torch.float64, device=device)):
            expected = function(x, field_x, field_z, z)
            torch.testing.assert_close(
                compiled(x, field_x, field_z, z), expected, rtol=1e-6, atol=1e-6
            )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_sampling(device, backend, solver):
    """A run's points and evaluations are those of the reference backend."""
    generator = torch.Generator().manual_seed(3)
    flow = pfgm.PoissonFlow.from_data(torch.randn(16, 2, 3, generator=generator))
    net = flow.network("mlp", width=16, depth=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    net.to(device)
    start = flow.prior(5, generator=generator).to(device)
    samples = {}
    for name in ("reference", backend):
        with pfgm.use_backend(name):
            samples[name] = flow.sample(net, 5, solver=solver, steps=6, x_init=start.clone())
    assert (samples[backend] - start).abs().min() > 1e-3
    torch.testing.assert_close(
        samples[backend], samples["reference"], rtol=0, atol=1e-5 * float(start.abs().max())
    )


def test_graph_capture(device, backend):
    """A step does not wait for the GPU and does not read values."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    x, field_x, field_z, _, previous = problem(5, 3072, device)
    z, z_next, z_previous = levels_by_row(5, device)
    arguments = x, pfgm.Field(field_x, field_z), z, z_next, previous, z_previous
    expected, _ = pfgm.multistep_step(*arguments, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, _ = pfgm.multistep_step(*arguments, backend=backend)
    graph.replay()
    assert torch.equal(result, expected)
