"""Calls of the Triton kernels without the dispatcher: when they are made, and that they agree."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode

import pfgm
from pfgm.backends import triton

FUNCTIONS = ("field_fn", "posterior_mean", "euler_step", "heun_step", "multistep_step")


@pytest.fixture
def inputs(device):
    generator = torch.Generator().manual_seed(0)
    x, predicted, slope, before = (torch.randn(5, 2, 3, generator=generator) for _ in range(4))
    references = torch.randn(9, 2, 3, generator=generator)
    field_z = -torch.rand(5, generator=generator) - 0.1
    return [v.to(device) for v in (x, references, predicted, slope, field_z, before)]


@pytest.fixture
def call(public_call):
    return functools.partial(public_call, backend="triton")


def assert_same(results, expected):
    for value, wanted in zip(results, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert value.equal(wanted)


@pytest.mark.parametrize("form", ["number", "float32", "float64", "one for each"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_ways_give_the_same_bits(call, by_operators, operators, inputs, name, form):
    def level(value):
        if form == "number":
            return value
        dtype = torch.float64 if form == "float64" else torch.float32
        made = torch.linspace(value, 1.1 * value, 5, dtype=dtype, device=inputs[0].device)
        return made.view(5, 1, 1) if form == "one for each" else made

    levels = {"z": level(3.0), "z_next": level(2.0), "z_previous": level(4.0)}
    results = call(name, inputs, **levels)
    assert operators == []
    assert_same(results, by_operators(lambda: call(name, inputs, **levels)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_references_of_every_dtype(call, by_operators, operators, inputs, dtype):
    inputs[1] = (inputs[1].abs() * 60).to(dtype)
    results = call("field_fn", inputs)
    assert operators == []
    assert_same(results, by_operators(lambda: call("field_fn", inputs)))


@pytest.mark.parametrize("options", [{"r": 2, "D": 64}, {"r": None, "sigma": 0.3, "D": 16.0}])
def test_other_levels_and_dimensions(call, by_operators, operators, inputs, options):
    results = call("posterior_mean", inputs, **options)
    assert operators == []
    assert_same(results, by_operators(lambda: call("posterior_mean", inputs, **options)))


def test_outputs_are_written_and_marked(call, by_operators, operators, inputs):
    x = inputs[0]
    expected = by_operators(lambda: call("euler_step", inputs, return_mean=True))
    mean_out = torch.full_like(x, torch.nan)
    before = x._version, mean_out._version
    results = call("euler_step", inputs, out=x, mean_out=mean_out, return_mean=True)
    assert set(operators) == {"ode_step"}  # of the expected values alone
    assert results[0] is x
    assert results[1] is mean_out
    assert_same(results, expected)
    assert (x._version, mean_out._version) == (before[0] + 1, before[1] + 1)


def test_outputs_over_other_rows_of_an_input(call, operators, inputs):
    memory = torch.zeros(6, 2, 3, device=inputs[0].device)
    inputs[0] = memory[1:].copy_(inputs[0])
    expected = call("euler_step", inputs)
    results = call("euler_step", inputs, out=memory[:5])
    assert operators == []
    assert_same(results, expected)


class Modes:
    """Where the operators must be called."""

    class Function(BaseTorchFunctionMode):
        pass

    class Dispatch(BaseTorchDispatchMode):
        pass

    class Profile(torch.profiler.profile):
        def __init__(self):
            super().__init__(activities=[torch.profiler.ProfilerActivity.CPU])

    class Dual(forward_ad.dual_level):
        pass

    class Autocast(torch.autocast):
        def __init__(self):
            super().__init__("cpu", torch.bfloat16)


@pytest.mark.parametrize("mode", ["Function", "Dispatch", "Profile", "Dual", "Autocast"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_modes_are_left_to_the_operators(call, operators, inputs, name, mode):
    with getattr(Modes, mode)():
        call(name, inputs)
    assert operators


def test_layouts_dtypes_and_few_points(by_operators, operators, inputs):
    x, references, *_ = inputs
    changed = {
        "columns first": (x.transpose(1, 2).contiguous().transpose(1, 2), references),
        "every second reference": (x, references[::2]),
        "half precision": (x.half(), references),
        "no points": (x[:0], references),
    }
    for points, over in changed.values():
        compute = functools.partial(pfgm.field_fn, points, 2.0, over, backend="triton")
        results = compute()
        assert operators == []
        assert_same(results, by_operators(compute))
        operators.clear()


def test_values_are_checked_as_by_the_operators(inputs):
    x, references, *_ = inputs
    with pfgm.debug_checks(), pytest.raises(ValueError, match="x holds NaN or infinity"):
        pfgm.field_fn(torch.full_like(x, torch.nan), 2.0, references, backend="triton")
    with pytest.raises(ValueError, match="shape"):
        pfgm.field_fn(x, 2.0, references[:, :1], backend="triton")
    with pytest.raises(ValueError, match="z has shape"):
        pfgm.field_fn(x, torch.ones(4, device=x.device), references, backend="triton")


def test_gradients_and_transforms(by_operators, operators, inputs):
    x, references, *_ = inputs

    def gradient():
        points = x.clone().requires_grad_()
        field_x, field_z = pfgm.field_fn(points, 2.0, references, backend="triton")
        return torch.autograd.grad(field_x.cos().sum() + field_z.sum(), points)

    results = gradient()
    assert "posterior_mean" not in operators
    assert_same(results, by_operators(gradient))
    operators.clear()
    torch.func.vmap(lambda z: pfgm.field_fn(x, z, references, backend="triton")[0])(torch.ones(2))
    assert operators


def test_only_a_request_for_triton_is_answered(call, monkeypatch, inputs):
    computed = []
    compute = triton.posterior_mean
    monkeypatch.setattr(triton, "posterior_mean", lambda *a: computed.append(1) or compute(*a))
    call("field_fn", inputs, backend="reference")
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    call("field_fn", inputs, backend=None)
    assert not computed
    monkeypatch.setenv("PFGM_BACKEND", "triton")
    call("field_fn", inputs, backend=None)
    assert computed
