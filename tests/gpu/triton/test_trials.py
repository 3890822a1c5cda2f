"""Trials of pfgm check by Triton's kernels."""

import pytest

from pfgm.backends.trials import TRIALS, allowed

FAST = ["5 × 70 × 37, float32", "5 × 70 × 37, uint8", "ties and limits", "steps, 37"]


@pytest.mark.parametrize("name", FAST)
def test_a_trial_passes(device, name, trial_errors):
    assert TRIALS[name].applies("triton", device)
    errors = trial_errors(name, "triton")
    assert {each: error for each, error in errors.items() if not error <= allowed(each)} == {}
