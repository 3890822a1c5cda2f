"""Memory that is written before it is read."""

import pytest
import torch

from pfgm.common.tensors import unfilled

LARGE = 1 << 26  # bytes; the system gives them anew, as zeros


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_algorithms_do_not_fill_it():
    assert torch.empty(9, dtype=torch.uint8).eq(255).all()
    memory = unfilled(LARGE, torch.device("cpu"))
    assert (memory.shape, memory.dtype) == ((LARGE,), torch.uint8)
    assert memory[::4096].ne(255).any()
    assert len(unfilled(0, torch.device("cpu"))) == 0
    assert unfilled(5, torch.device("meta")).is_meta


def test_it_is_plain_memory_otherwise():
    memory = unfilled(7, torch.device("cpu")).fill_(3)
    assert memory.tolist() == [3] * 7
