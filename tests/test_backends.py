"""Which backend computes: what can run, why the others cannot, and who is asked first."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import pfgm
from pfgm import posterior_mean
from pfgm.backends import Availability, available, choose, native, reference, requested

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
native_only = pytest.mark.skipif(os.environ.get("PFGM_NATIVE") == "0", reason="PFGM_NATIVE=0")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("PFGM_BACKEND", raising=False)


@pytest.fixture
def used(monkeypatch):
    """The names of the backends that computed, in order."""
    names = []
    for name, module in (("native", native), ("reference", reference)):

        def spy(*args, name=name, original=module.posterior_mean):
            names.append(name)
            return original(*args)

        monkeypatch.setattr(module, "posterior_mean", spy)
    return names


def compute(**arguments):
    return posterior_mean(torch.zeros(1, 2), torch.ones(3, 2), r=1.0, **arguments)


@native_only
def test_every_backend_says_what_it_does_on_the_cpu():
    found = available()
    assert set(found) == {"native", "reference"}
    assert all(isinstance(answer, Availability) for answer in found.values())
    assert found["native"].usable
    assert "threads" in found["native"].detail
    assert found["reference"] == Availability(True, reference.describe())


@pytest.mark.parametrize(
    ("device", "dtype", "name", "reason"),
    [
        ("cuda", torch.float32, "native", "not on cuda"),
        ("meta", torch.float32, "native", "not on meta"),
        ("cpu", torch.bfloat16, "native", "not torch.bfloat16"),
        ("cpu", torch.bfloat16, "reference", "not torch.bfloat16"),
    ],
)
@native_only
def test_a_backend_that_cannot_run_says_why(device, dtype, name, reason):
    answer = available(device, dtype)[name]
    assert not answer.usable
    assert reason in answer.detail


def test_reference_runs_on_every_device():
    for device in ("cpu", "cuda", "mps", "meta"):
        assert available(device)["reference"].usable


@native_only
def test_order():
    assert choose(None, CPU, torch.float32) is native
    assert choose(None, CPU, torch.float64) is native
    assert choose(None, CUDA, torch.float32) is reference
    with pytest.raises(TypeError, match=r"x has dtype torch\.float16"):
        choose(None, CPU, torch.float16)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    assert choose(None, CPU, torch.float32) is reference
    assert not available()["native"].usable
    assert "PFGM_NATIVE=0" in available()["native"].detail
    with pytest.raises(RuntimeError, match="PFGM_NATIVE=0"):
        native.extension()
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run here: .*PFGM_NATIVE=0"):
        compute(backend="native")


@native_only
def test_an_extension_that_is_missing_is_not_an_error_but_a_broken_one_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert native._load() is None
    monkeypatch.undo()

    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(native.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        native._load()


@native_only
def test_argument_before_context_before_environment(monkeypatch, used):
    compute()
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    compute()
    with pfgm.use_backend("native"):
        compute()
        compute(backend="reference")
        with pfgm.use_backend("reference"):
            compute()
        compute()
    compute()
    monkeypatch.setenv("PFGM_BACKEND", "")
    compute()
    assert used == [
        "native",
        "reference",
        "native",
        "reference",
        "reference",
        "native",
        "reference",
        "native",
    ]


def test_use_backend_ends_with_its_context():
    assert requested() is None
    with pfgm.use_backend("reference"):
        assert requested() == "reference"
    assert requested() is None
    with pytest.raises(ValueError, match="references is empty"), pfgm.use_backend("reference"):
        posterior_mean(torch.zeros(1, 2), torch.zeros(0, 2), r=1.0)
    assert requested() is None


def test_unknown_names_are_refused(monkeypatch):
    allowed = "allowed are native, reference"
    with (
        pytest.raises(ValueError, match=f"use_backend's name is 'numpy'; {allowed}"),
        pfgm.use_backend("numpy"),
    ):
        pass
    with pytest.raises(ValueError, match=f"^backend is 'numpy'; {allowed}"):
        compute(backend="numpy")
    monkeypatch.setenv("PFGM_BACKEND", "numpy")
    with pytest.raises(ValueError, match=f"^PFGM_BACKEND is 'numpy'; {allowed}"):
        compute()


@native_only
def test_a_forced_backend_that_cannot_run_raises_with_the_reason(monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        choose("native", CUDA, torch.float32)
    assert str(caught.value) == (
        "backend='native' cannot run here: its kernels run on the CPU, not on cuda."
    )
    monkeypatch.setenv("PFGM_BACKEND", "native")
    with pytest.raises(RuntimeError, match=r"^PFGM_BACKEND='native' cannot run here: .*on cuda"):
        choose(None, CUDA, torch.float32)
