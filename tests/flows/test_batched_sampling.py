"""Samples drawn in batches."""

import numpy as np
import pytest
import torch

import pfgm
from pfgm.flows.batched_sampling import draw_prior, sample_in_batches


def network(classes):
    torch.manual_seed(0)
    return pfgm.networks.MLP((2,), width=8, depth=1, classes=classes)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_hold_the_samples_of_one_call(batch_size):
    flow, net = pfgm.PoissonFlow((2,), data_norm=1.0), network(3)
    prior, labels = draw_prior(flow, 7, seed=5), torch.arange(7) % 3
    assert torch.equal(prior, flow.prior(7, generator=torch.Generator().manual_seed(5)))
    whole, nfe = flow.sample(
        net, 7, x_init=prior, condition={"labels": labels}, steps=4, return_nfe=True
    )
    found = sample_in_batches(
        flow, net, prior, batch_size=batch_size, labels=labels, device=torch.device("cpu"), steps=4
    )
    torch.testing.assert_close(found[0], whole)
    assert found[1] == nfe


def test_more_samples_than_the_memory_holds():
    with pytest.raises(
        MemoryError, match="n is 100000000000000, and 100000000000000 samples of shape"
    ):
        draw_prior(pfgm.PoissonFlow((2,), data_norm=1.0), 10**14, seed=0)


def test_counts_of_numpy_are_counts():
    flow = pfgm.PoissonFlow((3,), data_norm=1.0)
    drawn = flow.sample(flow.empirical(torch.ones(4, 3)), np.int64(2), steps=np.int64(3))
    assert drawn.shape == (2, 3)
    with pytest.raises(ValueError, match="only an integer of at least 0"):
        flow.sample(flow.empirical(torch.ones(4, 3)), np.float64(2))
