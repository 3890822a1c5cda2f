"""Calls of the Triton kernels without the dispatcher: when they are made, and that they agree."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pfgm
from pfgm.backends import triton
from pfgm.ops import eager

FUNCTIONS = ("field_fn", "posterior_mean", "euler_step", "heun_step", "multistep_step")


@pytest.fixture
def given(device):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(5, 2, 3, generator=generator) for _ in range(4)]
    made += [torch.randn(9, 2, 3, generator=generator), -torch.rand(5, generator=generator) - 0.1]
    return [value.to(device) for value in made]


def call(name, given, z=2.0, z_next=1.0, z_previous=4.0, **options):
    """A function of the package on these inputs, as a tuple of tensors."""
    x, predicted, slope, before, references, field_z = given
    field = pfgm.Field(slope, field_z)
    arguments = {
        "field_fn": (x, z, references),
        "posterior_mean": (x, references),
        "euler_step": (x, field, z, z_next),
        "heun_step": (x, predicted, field, z, z_next),
        "multistep_step": (x, field, z, z_next, before, z_previous),
    }[name]
    if name == "posterior_mean":
        options = {"r": z, "return_logsumexp": True} | options
    found = getattr(pfgm, name)(*arguments, **{"backend": "triton"} | options)
    return found if isinstance(found, tuple) else (found,)


def by_operators(monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(eager, "enabled", False)
        return call(*arguments, **options)


def assert_same(found, expected):
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert value.equal(wanted)


@pytest.mark.parametrize("form", ["number", "float32", "float64", "one for each"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_ways_give_the_same_bits(monkeypatch, operators, given, name, form):
    def level(value):
        if form == "number":
            return value
        dtype = torch.float64 if form == "float64" else torch.float32
        made = torch.linspace(value, 1.1 * value, 5, dtype=dtype, device=given[0].device)
        return made.view(5, 1, 1) if form == "one for each" else made

    levels = {"z": level(3.0), "z_next": level(2.0), "z_previous": level(4.0)}
    found = call(name, given, **levels)
    assert operators == []
    assert_same(found, by_operators(monkeypatch, name, given, **levels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_references_of_every_dtype(monkeypatch, operators, given, dtype):
    given[4] = (given[4].abs() * 60).to(dtype)
    found = call("field_fn", given)
    assert operators == []
    assert_same(found, by_operators(monkeypatch, "field_fn", given))


@pytest.mark.parametrize("options", [{"r": 2, "D": 64}, {"r": None, "sigma": 0.3, "D": 16.0}])
def test_other_levels_and_dimensions(monkeypatch, operators, given, options):
    found = call("posterior_mean", given, **options)
    assert operators == []
    assert_same(found, by_operators(monkeypatch, "posterior_mean", given, **options))


def test_outputs_are_written_and_marked(monkeypatch, operators, given):
    x = given[0]
    expected = by_operators(monkeypatch, "euler_step", given, return_mean=True)
    mean_out = torch.full_like(x, torch.nan)
    before = x._version, mean_out._version
    found = call("euler_step", given, out=x, mean_out=mean_out, return_mean=True)
    assert set(operators) == {"ode_step"}  # of the expected values alone
    assert found[0] is x
    assert found[1] is mean_out
    assert_same(found, expected)
    assert (x._version, mean_out._version) == (before[0] + 1, before[1] + 1)


def test_outputs_over_other_rows_of_an_input(operators, given):
    memory = torch.zeros(6, 2, 3, device=given[0].device)
    given[0] = memory[1:].copy_(given[0])
    expected = call("euler_step", given)
    found = call("euler_step", given, out=memory[:5])
    assert operators == []
    assert_same(found, expected)


class Modes:
    """Where the operators must be called."""

    class Function(BaseTorchFunctionMode):
        pass

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            return function(*arguments, **(options or {}))

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
def test_modes_are_left_to_the_operators(operators, given, name, mode):
    with getattr(Modes, mode)():
        call(name, given)
    assert operators


def test_layouts_dtypes_and_few_points(monkeypatch, operators, given):
    x, _, _, _, references, _ = given
    changed = {
        "columns first": (x.transpose(1, 2).contiguous().transpose(1, 2), references),
        "every second reference": (x, references[::2]),
        "half precision": (x.half(), references),
        "no points": (x[:0], references),
    }
    for points, over in changed.values():
        found = pfgm.field_fn(points, 2.0, over, backend="triton")
        assert operators == []
        with monkeypatch.context() as patch:
            patch.setattr(eager, "enabled", False)
            assert_same(found, pfgm.field_fn(points, 2.0, over, backend="triton"))
        operators.clear()


def test_values_are_checked_as_by_the_operators(given):
    x, _, _, _, references, _ = given
    with pfgm.debug_checks(), pytest.raises(ValueError, match="x holds NaN or infinity"):
        pfgm.field_fn(torch.full_like(x, torch.nan), 2.0, references, backend="triton")
    with pytest.raises(ValueError, match="shape"):
        pfgm.field_fn(x, 2.0, references[:, :1], backend="triton")
    with pytest.raises(ValueError, match="precision"):
        pfgm.field_fn(x, 2.0, references, backend="triton", precision="low")
    with pytest.raises(ValueError, match="z has shape"):
        pfgm.field_fn(x, torch.ones(4, device=x.device), references, backend="triton")


def test_gradients_and_transforms(monkeypatch, operators, given):
    x, _, _, _, references, _ = given

    def gradient():
        points = x.clone().requires_grad_()
        field_x, field_z = pfgm.field_fn(points, 2.0, references, backend="triton")
        return torch.autograd.grad(field_x.cos().sum() + field_z.sum(), points)

    found = gradient()
    assert "posterior_mean" not in operators
    with monkeypatch.context() as patch:
        patch.setattr(eager, "enabled", False)
        assert_same(found, gradient())
    operators.clear()
    torch.func.vmap(lambda z: pfgm.field_fn(x, z, references, backend="triton")[0])(torch.ones(2))
    assert operators


def test_only_a_request_for_triton_is_answered(monkeypatch, given):
    computed = []
    compute = triton.posterior_mean
    monkeypatch.setattr(triton, "posterior_mean", lambda *a: computed.append(1) or compute(*a))
    call("field_fn", given, backend="reference")
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    call("field_fn", given, backend=None)
    assert not computed
    monkeypatch.setenv("PFGM_BACKEND", "triton")
    call("field_fn", given, backend=None)
    assert computed
