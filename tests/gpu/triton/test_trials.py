"""Trials of pfgm check by Triton's kernels."""

import pytest

from pfgm.backends.trials import TRIALS, errors

FAST = ["few points, 5 × 70 × 37", "bytes, 5 × 70 × 37", "ties and limits", "steps, 37"]


@pytest.mark.parametrize("name", FAST)
def test_a_trial_passes(device, name):
    figures = errors(name, "triton", device)
    trial = TRIALS[name]
    assert trial.applies("triton", device)
    assert {
        each: error for each, error in figures.items() if not error <= trial.allowed(each)
    } == {}
