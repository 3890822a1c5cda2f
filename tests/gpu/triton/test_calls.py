"""Public calls that name the Triton backend."""

import functools

import pytest
import torch

import pfgm
from pfgm.backends import triton


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


def test_outputs_are_written_and_marked(call, inputs):
    x = inputs[0]
    expected = call("euler_step", inputs, return_mean=True)
    mean_out = torch.full_like(x, torch.nan)
    before = x._version, mean_out._version
    results = call("euler_step", inputs, out=x, mean_out=mean_out, return_mean=True)
    assert results[0] is x
    assert results[1] is mean_out
    assert_same(results, expected)
    assert (x._version, mean_out._version) == (before[0] + 1, before[1] + 1)


def test_outputs_over_other_rows_of_an_input(call, inputs):
    memory = torch.zeros(6, 2, 3, device=inputs[0].device)
    inputs[0] = memory[1:].copy_(inputs[0])
    expected = call("euler_step", inputs)
    results = call("euler_step", inputs, out=memory[:5])
    assert_same(results, expected)


def test_values_are_checked(inputs):
    x, references, *_ = inputs
    with pfgm.debug_checks(), pytest.raises(ValueError, match="x must be finite, got NaN"):
        pfgm.field_fn(torch.full_like(x, torch.nan), 2.0, references, backend="triton")
    with pytest.raises(ValueError, match="shape"):
        pfgm.field_fn(x, 2.0, references[:, :1], backend="triton")
    with pytest.raises(ValueError, match="z must"):
        pfgm.field_fn(x, torch.ones(4, device=x.device), references, backend="triton")


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
