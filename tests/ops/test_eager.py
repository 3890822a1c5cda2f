"""Operations without the dispatcher: when they pass it, and that results are the same."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode

import pfgm
from pfgm.backends import native
from pfgm.ops import eager
from tests.ops.public_calls import FUNCTIONS, STEPS, assert_same, call, values_for

pytestmark = pytest.mark.skipif(not native.has_extension(), reason="no native extension")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5, 5), (700,)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_ways_give_the_same_bits(by_operators, one_calls, name, shape, dtype):
    values = values_for(shape=shape, dtype=dtype)
    results = call(name, values)
    assert one_calls == [True]
    expected = by_operators(lambda: call(name, values))
    assert_same(results, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_references_of_every_dtype(by_operators, one_calls, dtype):
    values = values_for()
    values[1] = (100 * values[1].abs()).to(dtype)
    results = call("field_fn", values)
    assert one_calls == [True]
    expected = by_operators(lambda: call("field_fn", values))
    assert_same(results, expected)


@pytest.mark.parametrize(
    ("level", "D"),
    [("r", 1), ("r", 4.5), ("sigma", 1.0), ("sigma", 128), ("sigma", math.inf), ("sigma", 10**400)],
)
def test_the_log_sum_exp(by_operators, one_calls, level, D):
    x, references = values_for()[:2]

    def both():
        options = {level: 0.7, "D": D, "return_logsumexp": True}
        return pfgm.posterior_mean(x, references, **options)

    results, expected = both(), by_operators(both)
    assert one_calls == [True, False]
    assert results[0].equal(expected[0])
    assert results[1].equal(expected[1])
    assert results[1].dtype == torch.float64


class Doubled(torch.Tensor):
    """A subclass of the tensor."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_takes_the_operators(one_calls, name):
    values = values_for()
    values[0].requires_grad_()
    results = call(name, values)
    assert results[0].requires_grad
    assert one_calls == [False]
    with torch.no_grad():
        call(name, values)
    assert one_calls == [False, True]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modes_and_transforms_take_the_operators(one_calls, seeing_mode, name):
    values = values_for()
    with seeing_mode:
        call(name, values)
    assert seeing_mode.seen
    with BaseTorchFunctionMode():
        call(name, values)
    with forward_ad.dual_level():
        call(name, values)
    with torch.autocast("cpu"):
        call(name, values)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(name, values)
    assert any(event.key.startswith("pfgm::") for event in profile.key_averages())
    torch.func.vmap(lambda x: call(name, (x[None], *values[1:2], *(v[:1] for v in values[2:]))))(
        values[0]
    )
    subclassed = values[0].as_subclass(Doubled)
    call(name, (subclassed, *values[1:]))
    assert one_calls == [False] * 7


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_backends_are_not_preempted(monkeypatch, one_calls, name):
    values = values_for()
    call(name, values, backend="reference")
    with pfgm.use_backend("reference"):
        call(name, values)
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    call(name, values)
    monkeypatch.setenv("PFGM_BACKEND", "native")
    call(name, values)
    assert one_calls == [False, False, False, True]
    with pytest.raises(ValueError, match=r"backend must be one of native,.*got 'fast'\."):
        call(name, values, backend="fast")


def spread(values):
    """The same values, of which every second column of memory is unused."""
    return torch.stack([values, values], -1)[..., 0]


def turned(values):
    return values.transpose(0, -1).contiguous().transpose(0, -1)


CONVERTED = {
    "strided": lambda values: (spread(values[0]), *values[1:]),
    "turned": lambda values: [turned(v) if v.ndim > 1 else v for v in values],
    "every second reference": lambda values: (values[0], values[1][::2], *values[2:]),
    "one feature": lambda values: [v[..., :1, :1] if v.ndim > 1 else v for v in values],
    "one row of features": lambda values: [v[..., :1, 0] if v.ndim > 1 else v for v in values],
    "strided references": lambda values: (values[0], spread(values[1]), *values[2:]),
    "expanded": lambda values: (values[0][:1].expand(5, 2, 3), *values[1:]),
    "strided predictions": lambda values: (*values[:2], *map(spread, values[2:])),
    "half": lambda values: [v.half() for v in values],
    "half points": lambda values: (values[0].half(), *values[1:]),
    "bfloat16": lambda values: [turned(v.bfloat16()) if v.ndim > 1 else v for v in values],
    "bfloat16 predictions": lambda values: (*values[:2], *(v.bfloat16() for v in values[2:])),
    "float64 predictions": lambda values: (*values[:2], *(v.double() for v in values[2:])),
}


LEVELS = {
    "integer": 2,
    "number in a tensor": torch.tensor(2.0),
    "strided": torch.linspace(2, 2.2, 10)[::2],
    **{
        str(dtype): torch.linspace(2, 2.25, 5).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    },
}


@pytest.mark.parametrize(
    ("kind", "level"),
    [*((kind, 2.0) for kind in CONVERTED), *(("as they are", level) for level in LEVELS)],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_converted_has_the_bits_of_the_operators(
    by_operators, one_calls, name, kind, level
):
    values = CONVERTED.get(kind, tuple)(values_for(shape=(2, 3)))
    level = LEVELS.get(level, level)

    def both():
        return call(name, values, z=level, z_next=level / 2, z_previous=2 * level)

    results, expected = both(), by_operators(both)
    assert one_calls == [True, False]
    for value, wanted in zip(results, expected, strict=True):
        # The logarithm of a tensor may differ from that of a number in the last bit.
        close = 3e-7 if name == "multistep_step" and kind == "as they are" else 0
        torch.testing.assert_close(value, wanted, rtol=close, atol=close)
        assert value.is_contiguous()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_views_without_memory_of_their_own_take_the_operators(one_calls, name):
    values = values_for()
    expected = call(name, values)
    assert_same(call(name, (torch._neg_view(-values[0]), *values[1:])), expected)
    zeros = call(name, (torch._efficientzerotensor(5, 3), *values[1:]))
    wanted = call(name, (torch.zeros(5, 3), *values[1:]))
    assert_same(zeros, wanted)
    assert one_calls == [True, False, False, True]


@pytest.mark.parametrize("convert", [torch.Tensor.float, spread, torch.Tensor.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_outputs_are_written_and_marked(backend, name, convert):
    x, references, predicted, *others = values_for()
    x, others = convert(x), (references, convert(predicted), *others)
    expected = call(name, (x, *others), backend=backend)
    for out in (torch.empty_like(x), x):
        version = out._version
        results = call(name, (x, *others), out=out, backend=backend)
        assert results[0] is out
        assert out.equal(expected[0])
        assert out._version > version


def test_in_inference_mode(one_calls):
    with torch.inference_mode():
        values = values_for()
        out = torch.empty_like(values[0])
        call("euler_step", values, out=out)
    assert one_calls == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 100, 70_000])
def test_values_that_are_not_finite_are_found(dtype, count):
    largest = torch.finfo(dtype).max
    values = torch.full((count,), largest, dtype=dtype)
    assert eager.all_finite(values)
    for place in {0, count // 2, count - 1} if count else ():
        for bad in (math.nan, math.inf, -math.inf):
            wrong = values.clone()
            wrong[place] = bad
            assert not eager.all_finite(wrong)
            assert not eager.all_finite(wrong.requires_grad_())


@pytest.mark.parametrize("shape", [(3,), (2, 5, 5), (700,)])
@pytest.mark.parametrize("name", ["field_fn", "posterior_mean"])
def test_a_set_in_memory(by_operators, one_calls, name, shape):
    values = values_for(shape=shape)
    rows = values[1]
    expected = by_operators(lambda: call(name, values))
    values[1] = pfgm.ReferenceSet(rows)
    for _ in range(3):  # the second call makes a sketch
        assert all(map(torch.equal, call(name, values), expected))
    assert one_calls == [False, True, True, True]
    sketched = any(kept is not None for _, kept in values[1].part._sketches.values())
    assert sketched == (math.prod(shape) >= 512)
    rows.neg_()
    changed = by_operators(lambda: call(name, [values[0], rows.clone(), *values[2:]]))
    assert all(map(torch.equal, call(name, values), changed))


@pytest.mark.parametrize("kind", ["flips", "file"])
def test_a_set_that_needs_the_operators(one_calls, tmp_path, kind):
    values = values_for()
    rows = values[1]
    if kind == "flips":
        values[1] = pfgm.ReferenceSet(rows, flips=True)
    else:
        np.save(tmp_path / "rows.npy", rows.numpy())
        values[1] = pfgm.ReferenceSet(tmp_path / "rows.npy")
    for name in ("field_fn", "posterior_mean"):
        call(name, values)
    assert one_calls == [False, False]


def test_values_of_a_gpu_pass_on_it_alone():
    """A device without memory stands for the GPU."""
    gpu = torch.device("meta")
    there, here = torch.empty(3, device=gpu), torch.empty(3)
    assert eager.passes(gpu, there, 2.0, None)
    assert not eager.passes(None, there)
    assert eager.passes(None, here)
    assert not eager.passes(gpu, here)
    assert not eager.passes(gpu, there, here)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert eager.passes(None, here)
        assert not eager.passes(gpu, there)
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("name", ["field_fn", "posterior_mean"])
def test_gradients_need_no_operator_of_the_mean(by_operators, operators, name):
    x, references, *rest = values_for(shape=(2, 3))

    def gradients():
        inputs = [x.clone().requires_grad_(), references.clone().requires_grad_()]
        results = call(name, (*inputs, *rest))
        return torch.autograd.grad(sum(value.cos().sum() for value in results), inputs)

    results = gradients()
    assert "posterior_mean" not in operators
    expected = by_operators(gradients)
    assert "posterior_mean" in operators
    assert all(map(torch.equal, results, expected))
