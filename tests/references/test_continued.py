"""Chunks that continue each other's sums: the bits of one call over all references."""

import math
import os

import numpy as np
import pytest
import torch

import pfgm
from benchmarks.common.problems import seeded
from pfgm.backends import native_parts
from pfgm.references import ReferenceSet
from pfgm.references import part as module

pytestmark = pytest.mark.skipif(os.environ.get("PFGM_NATIVE") == "0", reason="PFGM_NATIVE=0")


def rows_of(kind, count, N, seed=0):
    """References (count, 2, N / 2) in [-1, 1] of a dtype; "ties" are all the same."""
    rows = torch.randint(0, 256, (count, 2, N // 2), dtype=torch.uint8, generator=seeded(seed))
    if kind == "ties":
        rows = rows[:1].expand(count, -1, -1).contiguous()
    if kind == torch.uint8:
        return rows
    return pfgm.data.to_unit(rows).to(torch.float32 if kind == "ties" else kind)


def points_near(rows, count, spread, seed=1, dtype=torch.float32):
    """Points near rows that are spread over all chunks."""
    chosen = rows[torch.linspace(0, len(rows) - 1, count).long()]
    chosen = pfgm.data.to_unit(chosen) if rows.dtype == torch.uint8 else chosen
    noise = torch.randn(chosen.shape, generator=seeded(seed), dtype=torch.float64)
    return (chosen.double() + spread * noise).to(dtype)


def results(x, references, sigma, D):
    """Mean, log-sum-exp, and their gradients in x and sigma."""
    x = x.clone().requires_grad_()
    level = torch.full((len(x),), sigma, dtype=torch.float64, requires_grad=True)
    mean, lse = pfgm.posterior_mean(x, references, sigma=level, D=D, return_logsumexp=True)
    G = torch.randn(mean.shape, generator=seeded(2)).to(mean)
    gradients = torch.autograd.grad((mean * G).sum() + lse.sum(), (x, level))
    return mean, lse, *gradients


def same_bits(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.fixture
def chunks_of(monkeypatch):
    """Sets the chunks of a reference set to a number of rows like these."""

    def limit(rows, count):
        monkeypatch.setattr(module, "_CHUNK_BYTES", count * rows[0].nbytes)

    return limit


def in_file(rows, folder, **options):
    np.save(folder / "rows.npy", rows.numpy())
    data = pfgm.data.open(folder / "rows.npy", layout="as-is")
    return ReferenceSet(data, **options)


@pytest.mark.parametrize(
    ("kind", "N", "sigma", "B", "D"),
    [
        (torch.float32, 6, 0.02, 70, 1.0),
        (torch.float32, 6, 0.3, 5, 64.0),
        (torch.float32, 600, 0.02, 70, math.inf),
        (torch.float32, 600, 3.0, 50, 1.0),
        (torch.uint8, 600, 0.02, 70, 1.0),
        (torch.float16, 600, 0.3, 5, 64.0),
        ("ties", 6, 0.02, 70, math.inf),
        ("ties", 6, 3.0, 50, 1.0),
        ("ties", 600, 0.3, 5, 64.0),
    ],
)
def test_a_set_gives_the_bits_of_a_tensor(chunks_of, tmp_path, kind, N, sigma, B, D):
    """Whether it is in memory, in memory with a sketch, or read from a file chunk by chunk."""
    rows = rows_of(kind, 5001, N)
    step = native_parts.kernel_chunk_rows(N, rows.dtype)
    assert 1 < step < len(rows) / 2
    chunks_of(rows, step + 5)
    held, file = ReferenceSet(rows), in_file(rows, tmp_path)
    assert [len(chunk) for chunk in file.chunks()] == [step, step, len(rows) - 2 * step]
    x = points_near(rows, B, sigma)
    expected = results(x, rows, sigma, D)
    for references in (held, held, held, file):
        assert same_bits(results(x, references, sigma, D), expected)
        mean = pfgm.posterior_mean(x, references, sigma=sigma, D=D)
        assert torch.equal(mean, pfgm.posterior_mean(x, rows, sigma=sigma, D=D))


@pytest.mark.parametrize(("N", "sigma"), [(64, 0.02), (510, 3.0)])
def test_chunks_of_the_kernels_for_few_features(chunks_of, tmp_path, N, sigma):
    """They are not those of the kernels for many features, so a set's chunks hold several."""
    step = native_parts.kernel_chunk_rows(N, torch.float32)
    rows = rows_of(torch.float32, 2 * step + 77, N)
    chunks_of(rows, step)
    x = points_near(rows, 9, sigma)
    expected = results(x, rows, sigma, 1.0)
    for references in (ReferenceSet(rows), in_file(rows, tmp_path)):
        assert same_bits(results(x, references, sigma, 1.0), expected)


@pytest.mark.parametrize(
    ("N", "B", "D", "dtype"),
    [
        (6, 3, 1.0, torch.float32),
        (6, 3, math.inf, torch.float64),
        (6, 20, 1.0, torch.float64),
        (6, 20, math.inf, torch.float32),
        (600, 3, 1.0, torch.float64),
        (600, 3, math.inf, torch.float32),
    ],
)
def test_equally_near_references_in_several_chunks(chunks_of, tmp_path, N, B, D, dtype):
    """Steep rows, whose gradients need the average over all chunks first."""
    rows = rows_of(torch.float32, 4100, N) * 10
    rows[::1000] = rows[0] + 1e-3 * rows_of(torch.float32, 5, N, seed=3)
    chunks_of(rows, 2048)
    x = rows[::1000].mean(0, keepdim=True).to(dtype).repeat(B, 1, 1)
    file = in_file(rows, tmp_path)
    for sigma in (1e-4, 1e-3):
        expected = results(x, rows, sigma, D)
        assert same_bits(results(x, ReferenceSet(rows), sigma, D), expected)
        assert same_bits(results(x, file, sigma, D), expected)


@pytest.mark.parametrize("limits", [{"r": 0.0}, {"sigma": 0.0, "D": math.inf}])
def test_limits(chunks_of, tmp_path, limits):
    rows = rows_of(torch.float32, 5000, 6)
    rows[4500] = rows[3]
    chunks_of(rows, 2048)
    x = torch.cat([rows[3:4], rows[4:5] + 0.1]).requires_grad_()
    expected = pfgm.posterior_mean(x, rows, return_logsumexp=True, **limits)
    for references in (ReferenceSet(rows), in_file(rows, tmp_path)):
        mean, lse = pfgm.posterior_mean(x, references, return_logsumexp=True, **limits)
        assert same_bits((mean, lse), expected)
        assert not torch.autograd.grad(mean[0].sum(), x, retain_graph=True)[0].any()
        with pytest.raises(ValueError, match="return_logsumexp: in row 0 of x the"):
            lse.sum().backward()


@pytest.mark.parametrize("chunk", [7, 2048])
@pytest.mark.parametrize("N", [6, 600])
def test_mirror_images(chunks_of, tmp_path, N, chunk):
    rows = rows_of(torch.float32, 40 if chunk == 7 else 4097, N)
    both = torch.cat([rows, rows.flip(-1)])
    chunks_of(rows, chunk)
    held, file = ReferenceSet(rows, flips=True), in_file(rows, tmp_path, flips=True)
    x = points_near(both, 49, 0.2, dtype=torch.float64)
    for D in (4.0, math.inf):
        expected = results(x, both, 0.2, D)
        torch.testing.assert_close(results(x, held, 0.2, D), expected, rtol=1e-9, atol=1e-9)
        single = [results(x.float(), references, 0.2, D) for references in (held, held, file)]
        assert all(same_bits(other, single[0]) for other in single[1:])


def test_rows_between_others_in_memory(chunks_of):
    """Rows that are not contiguous come in chunks."""
    rows = rows_of(torch.float32, 5000, 6)
    chunks_of(rows, 2048)
    strided = torch.stack([rows, rows], 3)[..., 0]
    assert not strided.is_contiguous()
    x = points_near(rows, 9, 0.2)
    assert same_bits(results(x, ReferenceSet(strided), 0.2, 1.0), results(x, rows, 0.2, 1.0))


def test_the_number_of_threads_changes_no_bit(chunks_of, threads, tmp_path):
    rows = rows_of(torch.float32, 5000, 600)
    chunks_of(rows, 2048)
    file, x = in_file(rows, tmp_path, flips=True), points_near(rows, 70, 0.2)
    each = []
    for count in (1, 2, 3):
        threads(count)
        each.append(results(x, file, 0.2, 1.0))
    assert all(same_bits(other, each[0]) for other in each[1:])


def test_no_points(chunks_of):
    rows = rows_of(torch.float32, 50, 6)
    chunks_of(rows, 7)
    for flips in (False, True):
        empty = results(torch.zeros(0, 2, 3), ReferenceSet(rows, flips=flips), 0.2, 1.0)
        assert [len(each) for each in empty] == [0, 0, 0, 0]


@pytest.mark.parametrize("N", [6, 600])
def test_the_field_midway_between_opposite_references(chunks_of, tmp_path, N):
    """The two halves of each pair are in different chunks."""
    arms = torch.randint(64, 320, (4096, 2, N // 2), generator=seeded(0)) / 256
    rows = torch.cat([0.5 + arms, 0.5 - arms])
    chunks_of(rows, 2048)
    x = torch.full((9, 2, N // 2), 0.5)
    x[8] += 1
    field_x, field_z = pfgm.field_fn(x, 1.3e-4, in_file(rows, tmp_path))
    wanted = pfgm.field_fn(x.double(), 1.3e-4, rows.double(), backend="reference")
    assert (field_x[:8].flatten(1).norm(dim=1) <= 1e-8 * field_z[:8].abs()).all()
    torch.testing.assert_close(field_x[8].double(), wanted[0][8], rtol=1e-5, atol=1e-6)
