"""What the tests of the networks share: a short training run."""

import pytest
import torch


@pytest.fixture(scope="session")
def losses_in_training():
    """losses_in_training(net, loss, steps, learning_rate, seeds) → the loss of every step.

    ``loss`` takes a generator, which has one of so many seeds, in turn.
    """

    def train(net, loss, *, steps, learning_rate, seeds):
        optimiser = torch.optim.Adam(net.parameters(), lr=learning_rate)
        losses = []
        for step in range(steps):
            value = loss(torch.Generator().manual_seed(step % seeds))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses.append(float(value.detach()))
        return losses

    return train
