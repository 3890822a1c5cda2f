"""Two processes hold the references: results and gradients are those of one process."""

import math
import sys

import pytest
import torch
import torch.distributed as dist

import pfgm
from pfgm.references import part as part_of_set
from pfgm.training.processes import joined

SHAPE = (3, 4, 5)


def queries(dtype=torch.float64, count=7):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, *SHAPE, generator=generator, dtype=dtype) * 2 - 1


def results(x, held, sigma, D):
    x, sigma = x.clone().requires_grad_(), sigma.clone().requires_grad_()
    mean, lse = pfgm.posterior_mean(x, held, sigma=sigma, D=D, return_logsumexp=True)
    gradients = torch.autograd.grad(mean.square().sum() + lse.sum(), (x, sigma))
    return mean, lse, *gradients


def check(path, rank):
    whole = pfgm.data.open(path).samples[:]
    whole = torch.cat([whole, whole.flip(-1)])
    # Three queries here and four there.
    own = slice(0, 3) if rank == 0 else slice(3, 7)
    x, sigma = queries(), torch.linspace(0.2, 3, 7, dtype=torch.float64)
    part = pfgm.ReferenceSet(path, flips=True).shard()
    floats = pfgm.data.to_unit(whole)
    for held, same in ((part, whole), (part.to(), whole), (part.to(dtype=torch.float32), floats)):
        for D in (1.0, 16.0, math.inf):
            expected = results(x, same, sigma, D)
            shared = results(x[own], held, sigma[own], D)
            for a, b in zip(shared, expected, strict=True):
                torch.testing.assert_close(a, b[own], rtol=1e-9, atol=1e-9)
    single = queries(torch.float32)
    mean = pfgm.posterior_mean(single[own], part, sigma=0.3)
    expected = pfgm.posterior_mean(single, pfgm.ReferenceSet(whole), sigma=0.3)[own]
    assert float((mean - expected).abs().max()) < 1e-6
    density = pfgm.log_density(single[own], part, sigma=0.3)
    torch.testing.assert_close(density, pfgm.log_density(single, whole, sigma=0.3)[own])
    assert math.isclose(part.norm, pfgm.ReferenceSet(whole).norm, rel_tol=1e-9)
    assert torch.equal(part[part.rows], whole[part.rows])
    counts = torch.bincount(part.draw(20, generator=torch.Generator().manual_seed(0)))
    assert counts.max() == 1
    assert set(part.draw(20).tolist()) <= set(part.rows.tolist())


def check_steep(path, rank):
    """At small sigma, gradients at float32 points between rows of both processes keep digits."""
    rows = pfgm.data.open(path).samples[:]
    x = (pfgm.data.to_unit(rows[:7]) + pfgm.data.to_unit(rows[-7:])) / 2
    own = slice(0, 3) if rank == 0 else slice(3, 7)
    for flips in (False, True):
        part = pfgm.ReferenceSet(path, flips=flips).shard()
        whole = torch.cat([rows, rows.flip(-1)]) if flips else rows
        for D in (1.0, math.inf):
            for sigma in (1e-4, 1e-3, 1e-2):
                level = torch.full((7,), sigma, dtype=torch.float64)
                expected = results(x.double(), whole, level, D)
                shared = results(x[own], part, level[own], D)
                for a, b in zip(shared, expected, strict=True):
                    error = (a.detach().double() - b.detach()[own]).abs().max()
                    assert float(error) <= 1e-5 * max(float(b.detach().abs().max()), 1.0)


def check_cancelled(path, rank):
    """x − mean keeps digits where it nearly vanishes only over the rows of both processes."""
    generator = torch.Generator().manual_seed(2)
    middle, arms = ((torch.rand(n, 600, generator=generator) * 256).round() / 256 for n in (1, 30))
    rows = torch.cat([middle + 0.25 + arms, middle - 0.25 - arms])  # one half for each process
    x, own = middle + torch.linspace(0, 1e-4, 5)[:, None], slice(0, 2) if rank == 0 else slice(2, 5)
    z = torch.full((5,), 1e-4 * math.sqrt(600), dtype=torch.float64)
    actual = pfgm.field_fn(x[own], z[own], pfgm.ReferenceSet(rows).shard())
    expected = pfgm.field_fn(x.double(), z, rows.double())
    of_x, of_z = (a.double() - b[own] for a, b in zip(actual, expected, strict=True))
    length = torch.hypot(expected[0].norm(dim=1), expected[1])[own]
    assert float((torch.hypot(of_x.norm(dim=1), of_z) / length).max()) <= 1e-5


def check_different_needs(path, rank):
    """One process differentiates in x, the other in sigma."""
    part, whole = (pfgm.ReferenceSet(path) for _ in range(2))
    part = part.shard()
    x, sigma = queries(), torch.linspace(0.2, 3, 7, dtype=torch.float64)
    own = slice(0, 3) if rank == 0 else slice(3, 7)

    def gradient(x, sigma, held):
        of = (x if rank == 0 else sigma).requires_grad_()
        return torch.autograd.grad(pfgm.posterior_mean(x, held, sigma=sigma).square().sum(), of)[0]

    shared = gradient(x[own].clone(), sigma[own].clone(), part)
    expected = gradient(x[own].clone(), sigma[own].clone(), whole)
    torch.testing.assert_close(shared, expected, rtol=1e-9, atol=1e-9)


def check_errors(path, rank):
    part = pfgm.ReferenceSet(path).shard()
    x = queries().requires_grad_()
    x.data[0] = pfgm.data.to_unit(pfgm.ReferenceSet(path)[0:1]).double()[0]
    sigma = torch.full((7,), float(rank), dtype=torch.float64)  # 0 in the first process alone
    lse = pfgm.posterior_mean(x, part, sigma=sigma, D=math.inf, return_logsumexp=True)[1]
    with pytest.raises(ValueError, match="gradient of the log-sum-exp"):
        lse.sum().backward()
    with pytest.raises(ValueError, match="cannot be sharded"):
        part.shard()
    with pytest.raises(ValueError, match="neither a shard nor bfloat16 can be saved"):
        part.save("part.npy")
    flow = pfgm.PoissonFlow.from_data(part)
    data = pfgm.data.to_unit(part[part.rows[:4]])
    with pytest.raises(ValueError, match="must be whole in each process"):
        flow.loss(flow.empirical(data), data, part, condition={"labels": torch.zeros(4).long()})
    for count in (4, 4 * rank):  # one process has no points: both refuse, and none waits
        labels = torch.zeros(count).long()
        with pytest.raises(ValueError, match="must be whole in each process with labels"):
            pfgm.field_fn(data[:count], 1.0, part, labels=labels)
    with pytest.raises(IndexError, match="the rows that this process holds, got"):
        part[0 : len(part)]
    x = queries(torch.float32 if rank == 0 else torch.float64)
    with pytest.raises(ValueError, match="all must have the same"):
        pfgm.posterior_mean(x, part, sigma=1.0)


if __name__ == "__main__":
    part_of_set._CHUNK_BYTES = 8 * math.prod(SHAPE)
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), timeout=60):
        check(sys.argv[1], dist.get_rank())
        check_steep(sys.argv[1], dist.get_rank())
        check_cancelled(sys.argv[1], dist.get_rank())
        check_different_needs(sys.argv[1], dist.get_rank())
        check_errors(sys.argv[1], dist.get_rank())
        print(f"rank {dist.get_rank()} is content")
