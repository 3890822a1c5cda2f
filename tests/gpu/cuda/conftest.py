import pytest


@pytest.fixture
def backend():
    return "native"
