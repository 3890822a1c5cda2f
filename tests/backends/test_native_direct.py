"""Calls of the CPU kernels without the operators: when they are made, and that they agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pfgm
from pfgm import functional
from pfgm.backends import native, native_direct

pytestmark = pytest.mark.skipif(not native.has_extension(), reason="no native extension")

FUNCTIONS = ("field_fn", "posterior_mean", "euler_step", "heun_step", "multistep_step")


def inputs(B=5, shape=(3,), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, predicted, slope, before = (
        torch.randn(B, *shape, generator=generator, dtype=dtype) for _ in range(4)
    )
    references = torch.randn(9, *shape, generator=generator, dtype=dtype)
    field_z = -torch.rand(B, generator=generator, dtype=dtype) - 0.1
    return x, references, predicted, 0.3 * slope, field_z, before


def call(name, given, z=2.0, z_next=1.0, z_previous=4.0, **options):
    """A function of the package on these inputs, as a tuple of tensors."""
    x, references, predicted, slope, field_z, before = given
    field = pfgm.Field(slope, field_z)
    arguments = {
        "field_fn": (x, z, references),
        "posterior_mean": (x, references),
        "euler_step": (x, field, z, z_next),
        "heun_step": (x, predicted, field, z, z_next),
        "multistep_step": (x, field, z, z_next, before, z_previous),
    }[name]
    options |= {"r": z} if name == "posterior_mean" else {}
    found = getattr(pfgm, name)(*arguments, **options)
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture
def direct_calls(answers_of):
    """The answers of the direct way: True for each call that it answered."""
    return answers_of(native_direct)


def by_operators(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(native_direct, "enabled", False)
        return function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5, 5), (700,)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_ways_give_the_same_bits(monkeypatch, direct_calls, name, shape, dtype):
    given = inputs(shape=shape, dtype=dtype)
    found = call(name, given)
    assert direct_calls == [True]
    expected = by_operators(monkeypatch, lambda: call(name, given))
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert value.equal(wanted)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, "scalar", "strided", "int"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_levels_of_every_form(monkeypatch, direct_calls, name, kind):
    given = inputs()

    def level(value):
        if kind == "int":
            return int(value)
        if kind == "scalar":
            return torch.tensor(float(value))
        if kind == "strided":
            return torch.linspace(value, 1.1 * value, 10)[::2]
        return torch.linspace(value, 1.1 * value, 5, dtype=kind)

    levels = {"z": level(3), "z_next": level(2), "z_previous": level(4)}
    found = call(name, given, **levels)
    assert direct_calls == [True]
    expected = by_operators(monkeypatch, lambda: call(name, given, **levels))
    for value, wanted in zip(found, expected, strict=True):
        # The logarithm of a tensor may differ from that of a number in the last bit.
        torch.testing.assert_close(value, wanted, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_references_of_every_dtype(monkeypatch, direct_calls, dtype):
    given = list(inputs())
    given[1] = (100 * given[1].abs()).to(dtype)
    found = call("field_fn", given)
    assert direct_calls == [True]
    expected = by_operators(monkeypatch, lambda: call("field_fn", given))
    assert all(value.equal(wanted) for value, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize(("level", "D"), [("r", 1), ("r", 4.5), ("sigma", 1.0), ("sigma", 128)])
def test_the_log_sum_exp(monkeypatch, direct_calls, level, D):
    x, references = inputs()[:2]

    def both():
        options = {level: 0.7, "D": D, "return_logsumexp": True}
        return pfgm.posterior_mean(x, references, **options)

    found, expected = both(), by_operators(monkeypatch, both)
    assert direct_calls == [True, False]
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])
    assert found[1].dtype == torch.float64


# ---- where the operators are needed ----------------------------------------------------------


class Doubled(torch.Tensor):
    """A subclass of the tensor."""


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.seen = True
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_takes_the_operators(direct_calls, name):
    given = inputs()
    given[0].requires_grad_()
    found = call(name, given)
    assert found[0].requires_grad
    assert direct_calls == [False]
    with torch.no_grad():
        call(name, given)
    assert direct_calls == [False, True]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modes_and_transforms_take_the_operators(direct_calls, name):
    given = inputs()
    mode = Seeing()
    with mode:
        call(name, given)
    assert mode.seen
    with BaseTorchFunctionMode():
        call(name, given)
    with forward_ad.dual_level():
        call(name, given)
    with torch.autocast("cpu"):
        call(name, given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(name, given)
    assert any(event.key.startswith("pfgm::") for event in profile.key_averages())
    torch.func.vmap(lambda x: call(name, (x[None], *given[1:2], *(v[:1] for v in given[2:]))))(
        given[0]
    )
    subclassed = given[0].as_subclass(Doubled)
    call(name, (subclassed, *given[1:]))
    assert direct_calls == [False] * 7


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_backends_are_not_preempted(monkeypatch, direct_calls, name):
    given = inputs()
    call(name, given, backend="reference")
    with pfgm.use_backend("reference"):
        call(name, given)
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    call(name, given)
    monkeypatch.setenv("PFGM_BACKEND", "native")
    call(name, given)
    assert direct_calls == [False, False, False, True]
    with pytest.raises(ValueError, match="backend is 'fast'"):
        call(name, given, backend="fast")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unusual_tensors_take_the_operators(monkeypatch, direct_calls, name):
    given = inputs()
    expected = call(name, given)
    negative = torch._neg_view(-given[0])
    strided = torch.stack([given[0], given[0]], -1)[..., 0]
    for x in (negative, strided):
        found = call(name, (x, *given[1:]))
        assert all(value.equal(wanted) for value, wanted in zip(found, expected, strict=True))
    zeros = call(name, (torch._efficientzerotensor(5, 3), *given[1:]))
    wanted = call(name, (torch.zeros(5, 3), *given[1:]))
    assert all(value.equal(other) for value, other in zip(zeros, wanted, strict=True))
    assert direct_calls == [True, False, False, False, True]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"z": -1.0}, "is -1.0"),
        ({"z": math.nan}, "is nan"),
        ({"z": torch.full((5,), -1.0)}, "is -1.0"),
        ({"z": torch.full((4,), 1.0)}, "has shape"),
        ({"z": None}, "r and sigma|z is a NoneType"),
    ],
)
def test_a_level_that_is_not_allowed_is_named(name, changed, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(name, inputs(), **changed)


@pytest.mark.parametrize("name", ["field_fn", "posterior_mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(name, value):
    given = inputs()
    given[0][3, 1] = value
    with pytest.raises(ValueError, match=r"x holds NaN or infinity .first in row 3"):
        call(name, given)


# ---- steps into given memory -----------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS[2:])
def test_out_is_written_and_marked(direct_calls, name):
    given = inputs()
    expected = call(name, given)
    out = torch.empty_like(given[0])
    version = out._version
    found = call(name, given, out=out)
    assert found[0] is out
    assert out.equal(expected[0])
    assert out._version > version
    in_place = call(name, given, out=given[0])
    assert in_place[0] is given[0]
    assert given[0].equal(expected[0])
    assert direct_calls == [True] * 3


def test_a_change_that_autograd_must_see_is_seen():
    x, _, _, slope, field_z, _ = inputs()
    weight = torch.ones(3, requires_grad=True)
    product = (weight * x).sum()
    functional.euler_step(x, pfgm.Field(slope, field_z), 2.0, 1.0, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_an_output_that_overlaps_an_input_in_part(direct_calls):
    x, _, _, slope, field_z, _ = inputs()
    expected = pfgm.euler_step(x, pfgm.Field(slope, field_z), 2.0, 1.0)
    memory = torch.empty(6, 3)
    memory[:5] = slope
    found = pfgm.euler_step(x, pfgm.Field(memory[:5], field_z), 2.0, 1.0, out=memory[1:])
    assert found.equal(expected)
    assert direct_calls == [True, False]


def test_a_mean_that_overlaps_out_is_refused():
    given = inputs()
    memory = torch.empty(6, 3)
    with pytest.raises(ValueError, match="mean_out overlaps out"):
        call("euler_step", given, return_mean=True, out=memory[:5], mean_out=memory[1:])


def test_in_inference_mode(direct_calls):
    with torch.inference_mode():
        given = inputs()
        out = torch.empty_like(given[0])
        call("euler_step", given, out=out)
    assert direct_calls == [True]


def test_threads_do_not_change_bits():
    given = inputs(B=70, shape=(3, 32, 32))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([call(name, given) for name in FUNCTIONS])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


# ---- finite values ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 100, 70_000])
def test_values_that_are_not_finite_are_found(dtype, count):
    largest = torch.finfo(dtype).max
    values = torch.full((count,), largest, dtype=dtype)
    assert native_direct.all_finite(values)
    for place in {0, count // 2, count - 1} if count else ():
        for bad in (math.nan, math.inf, -math.inf):
            wrong = values.clone()
            wrong[place] = bad
            assert not native_direct.all_finite(wrong)
            assert not native_direct.all_finite(wrong.requires_grad_())


@pytest.mark.parametrize("shape", [(3,), (2, 5, 5), (700,)])
@pytest.mark.parametrize("name", ["field_fn", "posterior_mean"])
def test_a_set_in_memory(monkeypatch, direct_calls, name, shape):
    given = list(inputs(shape=shape))
    rows = given[1]
    expected = by_operators(monkeypatch, lambda: call(name, given))
    given[1] = pfgm.ReferenceSet(rows)
    for _ in range(3):  # the second call makes a sketch
        assert all(map(torch.equal, call(name, given), expected))
    assert direct_calls == [False, True, True, True]
    sketched = any(kept is not None for _, kept in given[1].part._sketches.values())
    assert sketched == (math.prod(shape) >= 512)
    rows.neg_()
    changed = by_operators(monkeypatch, lambda: call(name, [given[0], rows.clone(), *given[2:]]))
    assert all(map(torch.equal, call(name, given), changed))


@pytest.mark.parametrize("kind", ["flips", "file", "half precision"])
def test_a_set_that_needs_the_operators(direct_calls, tmp_path, kind):
    given = list(inputs())
    rows = given[1]
    if kind == "flips":
        given[1] = pfgm.ReferenceSet(rows, flips=True)
    elif kind == "file":
        np.save(tmp_path / "rows.npy", rows.numpy())
        given[1] = pfgm.ReferenceSet(tmp_path / "rows.npy")
    else:
        given[0], given[1] = given[0].half(), pfgm.ReferenceSet(rows)
    for name in ("field_fn", "posterior_mean"):
        call(name, given)
    assert direct_calls == [False, False]
