"""The digits of the field, the score and their gradients, where x is near its posterior mean.

The published formula in float32 sums differences x − x_j. It is the yardstick: wherever its
relative error is within the tolerance, so is that of the library.
"""

import math

import numpy as np
import pytest
import torch

import pfgm
from benchmarks.common.problems import seeded
from pfgm import field_fn, log_density
from pfgm.references import part

TOLERANCE = 2e-5
OFFSETS = [0.0, 100.0, 1e4]


def problem(B, M, N, z, offset=0.0, seed=0):
    """Points at distances of the size of z from references of unit size, far from the origin."""
    generator = seeded(seed)
    references = offset + torch.randn(M, N, generator=generator)
    noise = torch.randn(B, N, generator=generator, dtype=torch.float64)
    x = references[:B].double() + z * noise
    return x.float(), torch.full((B,), z, dtype=torch.float64), references


def weights(x, z, references):
    """Differences (B, M, N), s (B, M) and normalised weights at D = 1, in the dtype of x."""
    difference = x[:, None] - references.to(x.dtype)
    s = difference.square().sum(2) + z.to(x.dtype)[:, None].square()
    least = s.amin(1, keepdim=True)
    weight = (least / s) ** ((x.shape[1] + 1) / 2)
    return difference, s, weight / weight.sum(1, keepdim=True)


def formula_of_the_field(x, z, references, gamma=5.0):
    """v = (v_x, v_z) as published."""
    difference, _, weight = weights(x, z, references)
    E = torch.cat([(weight[:, :, None] * difference).sum(1), z.to(x.dtype)[:, None]], 1)
    return -math.sqrt(x.shape[1]) * E / (E.norm(dim=1, keepdim=True) + gamma)


def formula_of_the_score(x, z, references):
    difference, s, weight = weights(x, z, references)
    return -(x.shape[1] + 1) * ((weight / s)[:, :, None] * difference).sum(1)


def relative_error(result, exact):
    return float(((result.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())


def check(formula, x, z, references, result):
    exact = formula(x.double(), z, references)
    assert relative_error(formula(x, z, references), exact) < TOLERANCE  # the yardstick
    assert relative_error(result, exact) < TOLERANCE


def field(x, z, references, **options):
    field_x, field_z = field_fn(x, z, references, **options)
    return torch.cat([field_x, field_z[:, None]], 1)


def score(x, z, references, **options):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(x, references, r=z, **options).sum(), x)[0]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(
    ("B", "M", "N", "z"),
    [
        (3, 700, 1, 1e-2), (16, 700, 2, 1e-3), (3, 3000, 2, 1e-3), (9, 5000, 2, 0.1),
        (16, 500, 8, 0.1), (4, 500, 8, 0.1), (16, 300, 64, 1e-3), (9, 300, 65, 0.03),
        (9, 200, 512, 1e-3), (2, 200, 3072, 1e-2), (9, 40, 3072, 1e-3),
    ],
)  # fmt: skip
def test_the_field_near_its_references(backend, B, M, N, z, offset):
    x, z, references = problem(B, M, N, z, offset)
    check(formula_of_the_field, x, z, references, field(x, z, references, backend=backend))
    # On a reference the score is that of the others, which is as good as none.
    apart = (x[:, None] != references).any(2).all(1)
    x, z = x[apart], z[apart]
    check(formula_of_the_score, x, z, references, score(x, z, references, backend=backend))


@pytest.mark.parametrize("N", [1, 2])
def test_v_x_on_a_reference_is_that_of_the_others(backend, N):
    """Far references have tiny weights, but nothing else pulls."""
    x, z, references = problem(12, 700, N, 0.0)
    z = z + 0.02
    exact = formula_of_the_field(x.double(), z, references)[:, :-1]
    result = field_fn(x, z, references, backend=backend)[0]
    assert relative_error(formula_of_the_field(x, z, references)[:, :-1], exact) < TOLERANCE
    assert relative_error(result, exact) < TOLERANCE


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("B", "N"), [(3, 64), (12, 64), (3, 520), (12, 520)])
def test_the_field_between_two_references_that_are_close(backend, B, N, offset):
    """Both count, and E is small beside the references."""
    x, z, references = problem(B, 40, N, 1e-2, offset)
    step = 1e-2 * torch.randn(B, N, generator=seeded(1))
    references = torch.cat([references, references[:B] + step])
    x = ((x + references[-B:]) / 2).float()
    check(formula_of_the_field, x, z, references, field(x, z, references, backend=backend))


@pytest.mark.parametrize("kind", ["memory", "flips", "file"])
@pytest.mark.parametrize(
    ("N", "z", "offset"), [(2, 1e-3, 0.0), (8, 0.1, 1e4), (600, 1e-2, 0.0), (600, 1e-2, 100.0)]
)
def test_the_field_over_sets(backend, tmp_path, monkeypatch, kind, N, z, offset):
    """Whole in memory, and in chunks of 128 rows that are continued or merged."""
    monkeypatch.setattr(part, "_CHUNK_BYTES", 128 * N * 4)
    x, z, references = problem(10, 500, N, z, offset)
    source = references.view(-1, 1, 1, N)
    if kind == "file":
        np.save(tmp_path / "rows.npy", source.numpy())
        source = tmp_path / "rows.npy"
    held = pfgm.ReferenceSet(source, flips=kind == "flips")
    if kind == "flips":
        references = torch.cat([references, references.flip(1)])
    field_x, field_z = field_fn(x.view(-1, 1, 1, N), z, held, backend=backend)
    result = torch.cat([field_x.flatten(1), field_z[:, None]], 1)
    check(formula_of_the_field, x, z, references, result)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("B", "N", "z"), [(12, 2, 1e-2), (3, 8, 0.1), (12, 8, 0.1), (4, 600, 1.0)])
def test_gradients_of_the_field(backend, B, N, z, offset):
    x, z, references = problem(B, 60, N, z, offset)
    upstream = torch.randn(B, N + 1, generator=seeded(2))

    def gradients(function, x, z):
        x, z = x.clone().requires_grad_(), z.clone().requires_grad_()
        return torch.autograd.grad((function(x, z, references) * upstream).sum(), (x, z))

    exact_x, exact_z = gradients(formula_of_the_field, x.double(), z)
    gradient_x, gradient_z = gradients(lambda *a: field(*a, backend=backend), x, z)
    assert relative_error(gradient_x, exact_x) < TOLERANCE
    torch.testing.assert_close(
        gradient_z, exact_z, rtol=TOLERANCE, atol=TOLERANCE * exact_z.abs().max()
    )


@pytest.mark.parametrize("kind", ["tensor", "set"])
@pytest.mark.parametrize("B", [3, 12])
@pytest.mark.parametrize("N", [2, 64, 600])
def test_gradients_beside_bytes(backend, B, N, kind):
    """A byte u/127.5 − 1 has no float32, so its distance of 1e-6 is that from the exact value."""
    generator = seeded(0)
    references = torch.randint(0, 256, (300, N), generator=generator, dtype=torch.uint8)
    exact = references.double() / 127.5 - 1
    x = (exact[:B] + 1e-6 * torch.randn(B, N, generator=generator).double()).float()
    z = torch.full((B,), 1e-6, dtype=torch.float64)
    rows = pfgm.ReferenceSet(references) if kind == "set" else references
    result = score(x, z, rows, backend=backend)
    assert relative_error(result, formula_of_the_score(x.double(), z, exact)) < TOLERANCE


def test_a_difference_beyond_float32_is_refused(backend):
    x, references = torch.full((9, 3), 3e38), torch.full((5, 3), -3e38)
    with pytest.raises(ValueError, match="x is so far from references that x minus"):
        field_fn(x, 1.0, references, backend=backend)
