"""Trials of pfgm check by Triton's kernels."""

import pytest
from pfgm.kernels import distances, posterior_mean

from pfgm.backends.trials import TRIALS, allowed

FAST = ["13 × 70 × 37, float32", "13 × 70 × 37, uint8", "ties and limits", "steps, 37"]


@pytest.mark.parametrize("name", FAST)
def test_a_trial_passes(device, name, trial_errors):
    assert TRIALS[name].applies("triton", device)
    errors = trial_errors(name, "triton")
    assert {each: error for each, error in errors.items() if not error <= allowed(each)} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "limit", "nats", "trial"),
    [
        (distances, "NEAR", 4.0, "shells of float32, 40, D = 1"),
        (distances, "OTHERS", -6.0, "shells of float32, 520, D = 1"),
        (posterior_mean, "WEIGHT_CUTOFF", 8.0, "shells of float32, 2, D = 0.5"),
    ],
)
def test_a_wrong_limit_is_noticed(monkeypatch, trial_errors, module, limit, nats, trial):
    monkeypatch.setattr(module, limit, nats)
    errors = trial_errors(trial, "triton")
    assert any(error > allowed(each) for each, error in errors.items())
