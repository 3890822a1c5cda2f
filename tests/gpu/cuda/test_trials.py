"""Trials of pfgm check by the CUDA kernels."""

import pytest

from pfgm.backends.trials import EXACT, Place, allowed

FAST = [
    "5 × 70 × 37, float32",
    "5 × 70 × 37, uint8",
    "ties and limits",
    "shells of float32, 520, D = inf",
    "shells of float32, 40, D = 1",
    "field",
    "steps, 37",
    "normalised field, 37",
    "in small chunks",
]


@pytest.fixture(autouse=True)
def _on_a_gpu(session_executor, monkeypatch):
    """The memory of the CPU is that of a GPU, but for the exact results."""
    if session_executor is not None:
        gpu = property(lambda place: None if place is EXACT else place.device)
        monkeypatch.setattr(Place, "gpu", gpu)


@pytest.mark.parametrize("name", FAST)
def test_a_trial_passes(device, name, trial_errors):
    errors = trial_errors(name, "native")
    assert {each: error for each, error in errors.items() if not error <= allowed(each)} == {}
