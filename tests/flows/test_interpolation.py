import math

import pytest
import torch
from torch import nn

import pfgm
from benchmarks.common.problems import seeded


def test_interpolation_keeps_angles_even_and_norms_geometric():
    draw = seeded(0)
    a, b = 1e3 * torch.randn(2, 6, 2, 3, generator=draw, dtype=torch.float64)
    b = b / 50
    weights = torch.linspace(-0.5, 1.5, 9, dtype=torch.float64)
    points = pfgm.interpolate(a, b, weights).flatten(2)
    assert points.shape == (9, 6, 6)
    torch.testing.assert_close(points[2], a.flatten(1))
    torch.testing.assert_close(points[6], b.flatten(1))
    norms = points.norm(dim=2)
    expected = a.flatten(1).norm(dim=1) ** (1 - weights[:, None])
    expected = expected * b.flatten(1).norm(dim=1) ** weights[:, None]
    torch.testing.assert_close(norms, expected)
    cosines = nn.functional.cosine_similarity(points[:-1], points[1:], dim=2)
    whole = nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
    torch.testing.assert_close(cosines.acos(), (whole / 4).expand(8, 6), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolation_where_no_circle_or_no_direction_is_given(dtype):
    a = torch.tensor([[3.0, 0.0, 4.0]], dtype=dtype)
    weights = [0.0, 0.5, 1.0]
    opposite = pfgm.interpolate(a, -4 * a, weights)
    expected = torch.tensor([[3.0, 0.0, 4.0], [0.0, 10.0, 0.0], [-12.0, 0.0, -16.0]], dtype=dtype)
    torch.testing.assert_close(opposite[:, 0], expected, rtol=0, atol=1e-5)
    thirds = torch.tensor([[0.1, 0.7, -0.3]], dtype=dtype)  # its negative differs by rounding
    assert pfgm.interpolate(thirds, -thirds / 3, weights)[1].norm() == pytest.approx(
        float(thirds.norm()) / math.sqrt(3), rel=1e-5
    )
    torch.testing.assert_close(pfgm.interpolate(a, a, weights), a.expand(3, 1, 3))
    torch.testing.assert_close(pfgm.interpolate(0 * a, a, [0.0, 0.25, 1.0])[1], a / 4)
    torch.testing.assert_close(pfgm.interpolate(a, 0 * a, [0.0, 0.25, 1.0])[1], a * 3 / 4)
    assert torch.equal(pfgm.interpolate(0 * a, 0 * a, weights), torch.zeros(3, 1, 3, dtype=dtype))
    single = torch.tensor([[2.0]], dtype=dtype)
    through = pfgm.interpolate(single, -single, weights).flatten()
    torch.testing.assert_close(through, torch.tensor([2.0, 0.0, -2.0], dtype=dtype))
    assert pfgm.interpolate(a[:0], a[:0], weights).shape == (3, 0, 3)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((ONES, torch.ones(3, 3), [0.5]), "a and b must have one shape…cpu and (3, 3) on cpu."),
        ((torch.tensor(1.0), torch.tensor(1.0), [0.5]), "a and b must have one…and () on cpu."),
        ((ONES, ONES.double(), [0.5]), "TypeError: a and b must have the…and torch.float64."),
        ((ONES, ONES, []), "weights must be one or more finite numbers, (W,), got []."),
        ((ONES, ONES, 0.5), "weights must be one or more finite numbers, (W,), got 0.5."),
    ],
)
def test_bad_interpolations(refused, arguments, sentence):
    refused(lambda: pfgm.interpolate(*arguments), sentence)
