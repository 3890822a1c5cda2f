"""The tests of the functions run on both ways to the CPU kernels."""

from __future__ import annotations

import pytest
import torch

from pfgm.backends import native
from pfgm.ops import eager

NATIVE = native.supports(torch.device("cpu"), torch.float32) is None
BACKENDS = [*(["native", "native, by operators"] if NATIVE else []), "torch", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of a backend: the native one by one call, and by the operators of torch."""
    name, _, by_operators = request.param.partition(", ")
    if by_operators:
        monkeypatch.setattr(eager, "enabled", False)
    return name
