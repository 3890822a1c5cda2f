"""The tests of the functions run on both ways to the CPU kernels."""

from __future__ import annotations

import pytest
import torch

from pfgm.backends import native, native_direct

NATIVE = native.supports(torch.device("cpu"), torch.float32) is None


@pytest.fixture(params=["native", "native, by operators", "reference"] if NATIVE else ["reference"])
def backend(request, monkeypatch):
    """The name of a backend: the native one by one call, and by the operators of torch."""
    name, _, by_operators = request.param.partition(", ")
    if by_operators:
        monkeypatch.setattr(native_direct, "enabled", False)
    return name
