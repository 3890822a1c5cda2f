"""The normalised field on a GPU, against the reference backend in float64."""

import math

import pytest
import torch

from tests.gpu.shapes import SHAPES


def problem(B, N, device, seed=0):
    """Differences x − mean (B, N) of the size of z (B,), which is float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.logspace(-3, 2, B, dtype=torch.float64)
    difference = z.float()[:, None] * torch.randn(B, N, generator=generator)
    return difference.to(device), z.to(device)


def check(backend, difference, z, gamma=5.0):
    """Each value rounded once, to float32; returns them."""
    results = torch.ops.pfgm.normalised_field(difference, z, gamma, backend)
    wide = [values.double().cpu() for values in (difference, z)]
    expected = torch.ops.pfgm.normalised_field(*wide, gamma, "reference")
    for values, correct in zip(results, expected, strict=True):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double().cpu(), correct, rtol=6e-8, atol=1e-44)
    return results


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gamma", [0.0, 1e-9, 5.0])
@pytest.mark.parametrize(("B", "N"), SHAPES)
def test_values(device, backend, B, N, gamma):
    field_x, field_z = check(backend, *problem(B, N, device), gamma)
    if gamma == 0:  # all of the field's norm is √N
        norm = (field_x.double().square().sum(1) + field_z.double().square()).sqrt()
        torch.testing.assert_close(norm, torch.full_like(norm, math.sqrt(N)), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("N", [1, 37, 3072, 8193])
def test_the_field_is_zero_where_e_is_zero(device, backend, N):
    """E = 0 in one row of three: v = 0 at every gamma, also at 0."""
    difference, z = problem(3, N, device)
    difference[1], z[1] = 0.0, 0.0
    for gamma in (0.0, 5.0):
        field_x, field_z = check(backend, difference, z, gamma)
        assert not field_x[1].any()
        assert not field_z[1].any()
        assert field_x[[0, 2]].any(1).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("N", [1, 37, 9000])
def test_norms_whose_squares_float32_cannot_hold(device, backend, N):
    sizes = torch.tensor([1e30, 3e38, 1e-30, 1e-38], device=device)
    difference = problem(4, N, device)[0].sign() * sizes[:, None]
    for gamma in (0.0, 5.0):
        for z in (torch.zeros(4, dtype=torch.float64, device=device), sizes.double()):
            field_x, _ = check(backend, difference, z, gamma)
            assert field_x.isfinite().all()
            assert field_x.all()  # not one underflowed


def test_non_finite_values_stay_in_their_row(device, backend):
    difference, z = problem(3, 37, device)
    difference[1, 4] = math.nan
    field_x, field_z = torch.ops.pfgm.normalised_field(difference, z, 5.0, backend)
    assert field_x[[0, 2]].isfinite().all()
    assert field_z[[0, 2]].isfinite().all()
    assert field_x[1].isnan().all()
    assert field_z[1].isnan()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("N", [1, 37, 3072, 8193])
def test_strided_and_expanded_tensors(device, backend, N):
    difference, z = problem(3, N, device)
    doubled = torch.stack([difference, difference], 1).flatten(1)
    unaligned = torch.cat([difference.new_zeros(3), difference.flatten()])[3:].view(3, N)
    check(backend, doubled[:, :N], torch.stack([z, z], 1)[:, 0])
    check(backend, unaligned, z)
    check(backend, doubled.view(3, 2, N).transpose(1, 2).flatten(1)[:, ::2], z)
    check(backend, difference.t().contiguous().t(), z.flip(0))
    field_x, _ = check(backend, difference[:1].expand(3, N), z[1:2].expand(3))
    assert torch.equal(field_x[0], field_x[2])


def test_opcheck(device, backend):
    arguments = (*problem(5, 37, device), 5.0, backend)
    torch.library.opcheck(torch.ops.pfgm.normalised_field.default, arguments)
