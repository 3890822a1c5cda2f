"""Commands that measure name the backend that computes."""

import os
from types import SimpleNamespace

import pytest

from benchmarks.claims import __main__ as claims
from benchmarks.claims.presets import PRESETS


def stop(*arguments, **options):
    raise SystemExit


@pytest.mark.parametrize(
    ("preset", "chosen", "expected"),
    [("quick", "", "native"), ("gpu", "", "torch"), ("gpu", "triton", "triton")],
)
def test_claims_name_their_backend(monkeypatch, tmp_path, preset, chosen, expected):
    monkeypatch.setenv("PFGM_BACKEND", chosen)
    monkeypatch.setattr(claims.torch, "use_deterministic_algorithms", lambda *a, **o: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(claims, "prepare", stop)
    with pytest.raises(SystemExit):
        claims.run(SimpleNamespace(workers=1), PRESETS[preset], tmp_path)
    assert os.environ["PFGM_BACKEND"] == expected
