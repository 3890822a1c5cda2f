"""Trials of pfgm check by Triton's kernels."""

import pytest

from pfgm.backends.trials import TRIALS

FAST = ["5 × 70 × 37, float32", "5 × 70 × 37, uint8", "ties and limits", "steps, 37"]


@pytest.mark.parametrize("name", FAST)
def test_a_trial_passes(device, name, trial_errors):
    figures = trial_errors(name, "triton")
    trial = TRIALS[name]
    assert trial.applies("triton", device)
    assert {
        each: error for each, error in figures.items() if not error <= trial.allowed(each)
    } == {}
