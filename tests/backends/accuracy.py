"""What results and gradients of every backend must be, beside exact ones."""

import torch

from pfgm.common.tensors import dequantise


def assert_accurate(result, expected, references, tolerance):
    """The accuracy contract: per row, relative to the largest reference and to lse."""
    (mean, lse), (wanted_mean, wanted_lse) = (part[:2] for part in (result, expected))
    largest = dequantise(references.cpu(), torch.float64).norm(dim=1).max()
    assert (mean.double().cpu() - wanted_mean).norm(dim=1).max() <= tolerance * largest
    lse = lse.double().cpu()
    error = torch.where(lse == wanted_lse, 0.0, (lse - wanted_lse).abs())
    assert (error <= tolerance * wanted_lse.abs().clamp(min=1)).all()


def assert_gradient(actual, expected, tolerance, least=0.0):
    """Each row relative to itself, or to the typical row if large terms cancel in it."""
    actual, expected = (t.double().reshape(len(t), -1) for t in (actual.cpu(), expected))
    rows = expected.norm(dim=1)
    floor = (expected.norm() / len(rows) ** 0.5).clamp(min=least)
    assert ((actual - expected).norm(dim=1) <= tolerance * rows.clamp(min=floor)).all()
