import pytest


@pytest.fixture
def backend():
    return "triton"
