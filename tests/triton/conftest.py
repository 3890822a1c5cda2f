"""These tests need Triton's interpreter or a GPU: tests/test_triton.py runs them in a process with
``TRITON_INTERPRET=1`` where there is no GPU, which must be set before Triton is imported."""

from __future__ import annotations

import pytest
import torch

from pfgm.backends import triton

RUNNABLE = torch.cuda.is_available() or triton.interpreted()
collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if triton.interpreted() else "cuda")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed out uninitialised is NaN: a result that is not written shows."""
    owners = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    for owner, name in [*owners, (torch.Tensor, "new_empty")]:
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(77)

        monkeypatch.setattr(owner, name, filled)
