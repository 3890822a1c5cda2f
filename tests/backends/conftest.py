"""A stand-in for a GPU and its verdict."""

import pytest

from pfgm.backends import verdicts
from pfgm.backends.verdicts import SIZES, Verdict

ALL = ("native", "triton", "torch", "reference")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu(verdict) → a device "cuda" of which this process knows the verdict, or none.

    The cache folder is a temporary one.
    """
    monkeypatch.setattr(
        verdicts, "_kind", lambda device: "Stand-in" if device.type == "cuda" else None
    )
    monkeypatch.setattr(verdicts.platformdirs, "user_cache_dir", lambda name: tmp_path / name)

    def learn(verdict=None):
        verdicts._warn_of_unproven.cache_clear()
        monkeypatch.setattr(verdicts, "_verdicts", {} if verdict is None else {"Stand-in": verdict})
        monkeypatch.setattr(verdicts, "_orders", {})

    learn()
    return learn


@pytest.fixture
def verdict():
    """verdict(passed=…, **speeds): the speeds at a size are those of the backends in ALL."""

    def build(passed=ALL, failures=None, quick=False, **speeds):
        named = {
            name.replace("_", "-"): dict(zip(ALL, of, strict=False)) for name, of in speeds.items()
        }
        return Verdict(passed, failures or {}, {size: named.get(size, {}) for size in SIZES}, quick)

    return build


@pytest.fixture
def proven(gpu, verdict):
    """Every backend has passed on the GPU, and native is the fastest, then Triton."""
    speeds = (3.0, 2.0, 0.7, 0.1)
    gpu(verdict(digits=speeds, CIFAR_10=speeds, Fashion_MNIST=speeds))
