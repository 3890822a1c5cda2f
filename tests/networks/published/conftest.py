"""Shapes and weights of the fixtures, for the tests of the published networks."""

from pathlib import Path

import numpy as np
import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"


def shapes_of(name):
    """Names and shapes of the tensors of a published network, in their order."""
    lines = (FIXTURES / f"{name}_params.txt").read_text().splitlines()
    return {name: tuple(map(int, shape)) for name, *shape in (line.split() for line in lines)}


def weights_of(name):
    """The weights that the fixtures were made with: the seed of each tensor is its position."""
    weights = {}
    for position, (key, shape) in enumerate(shapes_of(name).items()):
        values = np.random.RandomState(position).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            fan_in = shape[0] if key.endswith(".W") else np.prod(shape[1:])
            values /= np.sqrt(fan_in).astype(np.float32)
        else:
            values = 0.1 * values + (1 if key.endswith("weight") else 0)
        weights[key] = torch.from_numpy(values.astype(np.float32))
    return weights


@pytest.fixture(scope="session")
def published_shapes():
    return shapes_of


@pytest.fixture(scope="session")
def fixture_weights():
    return weights_of
