"""Samples drawn in batches."""

import numpy as np
import pytest
import torch

import pfgm
from pfgm.flows.batched_sampling import draw_prior


def test_more_samples_than_the_memory_holds():
    with pytest.raises(
        MemoryError, match="n is 100000000000000, and 100000000000000 samples of shape"
    ):
        draw_prior(pfgm.PoissonFlow((2,), data_norm=1.0), 10**14, seed=0)


def test_counts_of_numpy_are_counts():
    flow = pfgm.PoissonFlow((3,), data_norm=1.0)
    drawn = flow.sample(flow.empirical(torch.ones(4, 3)), np.int64(2), steps=np.int64(3))
    assert drawn.shape == (2, 3)
    with pytest.raises(ValueError, match=r"n must be an integer of at least 0, got 2\.0\."):
        flow.sample(flow.empirical(torch.ones(4, 3)), np.float64(2))
