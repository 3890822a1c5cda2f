"""The public functions that one call of the native kernels may compute, and values for them."""

import functools

import torch

import pfgm

STEPS = ("euler_step", "heun_step", "multistep_step")
FUNCTIONS = ("field_fn", "posterior_mean", *STEPS)


def values_for(B=5, shape=(3,), dtype=torch.float32, references=9, device="cpu"):
    """Points, references, predicted points, field_x, field_z and a mean."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x, predicted, slope, before = (normal(B, *shape) for _ in range(4))
    y = normal(references, *shape)
    field_z = -torch.rand(B, generator=generator, dtype=torch.float64) - 0.1
    values = (x, y, predicted, 0.3 * slope, field_z, before)
    return [value.to(device, dtype) for value in values]


def call(name, values, z=2.0, z_next=1.0, z_previous=4.0, **options):
    """The results of a public function as a tuple."""
    x, references, predicted, field_x, field_z, before = values
    field = pfgm.Field(field_x, field_z)
    arguments = {
        "field_fn": (x, z, references),
        "posterior_mean": (x, references),
        "euler_step": (x, field, z, z_next),
        "heun_step": (x, predicted, field, z, z_next),
        "multistep_step": (x, field, z, z_next, before, z_previous),
    }[name]
    if name == "posterior_mean":
        options = {"r": z, "return_logsumexp": True} | options
    results = getattr(pfgm, name)(*arguments, **options)
    return results if isinstance(results, tuple) else (results,)


def assert_same(results, expected):
    """The same bits, where NaN is NaN."""
    for value, wanted in zip(results, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert value.device == wanted.device
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)
