"""Fixtures that the tests of the integrations share."""

import pytest


@pytest.fixture(scope="session")
def same():
    """same(actual, correct, tolerance): equal within a tolerance of the largest value."""

    def check(actual, correct, tolerance):
        worst = float((actual - correct).abs().max() / correct.abs().max().clamp(min=1))
        assert worst <= tolerance, worst

    return check
