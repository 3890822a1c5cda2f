"""``pfgm check``, the check before the first run on a GPU, and who says which backend computes."""

import threading
import time

import pytest
import torch

from pfgm import backends, cli
from pfgm.backends import verdicts
from pfgm.backends.verdicts import Verdict
from pfgm.cli.check import proven_device

TRAIN = ["--steps", "12", "--batch-size", "16", "--references", "32", "--warmup", "2"]


def test_check_prints_a_table_and_fails_if_a_row_did(monkeypatch, capsys):
    asked = []
    rows = [backends.Row("torch", "field", 1e-7, 2e-5)]

    def check(device, *, quick, report):
        asked.append((device, quick))
        report("torch on cpu: results")
        return backends.Report("cpu: stand-in", {"torch": None}, list(rows), quick)

    monkeypatch.setattr(backends, "check", check)
    assert cli.main(["check", "--quick", "--device", "cpu"]) == 0
    assert cli.main(["check"]) == 0
    assert asked == [("cpu", True), ("auto", False)]
    shown = capsys.readouterr()
    assert "field" in shown.out
    assert shown.err.splitlines()[0] == "pfgm check: torch on cpu: results"
    rows.append(backends.Row("torch", "steps", 1.0, 1e-5, failure="step 0 is off by 1.0e+00"))
    assert cli.main(["check"]) == 1
    assert "FAILED: torch, steps: step 0 is off by 1.0e+00\npassed: none" in capsys.readouterr().out


@pytest.fixture
def unproven(monkeypatch, tmp_path):
    """A stand-in for a GPU without a verdict. Its checks are counted."""
    checks, verdict = [], Verdict(("torch",), {}, {}, True)

    def check(device, *, quick, report):
        checks.append((str(device), quick))
        time.sleep(0.3)
        kept = verdicts.keep(device, verdict)
        return backends.Report("a GPU", {"torch": None}, [], quick, kept)

    monkeypatch.delenv("PFGM_BACKEND", raising=False)
    monkeypatch.setattr(backends, "check", check)
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setattr(verdicts, "_orders", {})
    monkeypatch.setattr(verdicts, "_kind", lambda device: "Stand-in")
    monkeypatch.setattr(verdicts.platformdirs, "user_cache_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(verdicts, "needed", lambda device: verdicts.find(device) is None)
    return checks


def test_the_first_run_on_a_gpu_checks_it(unproven, capsys, tmp_path):
    for out in ("a.npy", "b.npy"):
        arguments = ["sample", "--pretrained", "digits", "--n", "2", "--steps", "2"]
        assert cli.main([*arguments, "--out", str(tmp_path / out)]) == 0
    assert unproven == [("cpu", True)]
    assert "so they are checked first" in capsys.readouterr().err


def test_runs_that_start_together_check_once(unproven):
    threads = [threading.Thread(target=proven_device, args=("cpu",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unproven == [("cpu", True)]


def test_a_run_where_nothing_can_be_kept_checks_itself(unproven, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(verdicts.platformdirs, "user_cache_dir", lambda _: tmp_path / "file" / "x")
    proven_device("cpu")
    proven_device("cpu")
    assert unproven == [("cpu", True)]
    assert "The verdict is not kept" in capsys.readouterr().err


def test_a_run_with_a_backend_of_its_own_checks_nothing(unproven, monkeypatch):
    monkeypatch.setenv("PFGM_BACKEND", "triton")
    proven_device("cpu")
    assert unproven == []


def test_info_shows_the_verdict(monkeypatch, capsys):
    verdict = Verdict(("torch",), {"triton": "field: off"}, {"digits": {"torch": 0.9}}, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {min(int(gpu), 1)}")
    monkeypatch.setattr(verdicts, "find", lambda device: verdict if device.index == 0 else None)
    first, second = sorted(verdicts.lines())
    assert first == (
        "verdict    GPU 0: a whole check; passed torch; triton failed (field: off); fastest torch "
        "for digits, torch for CIFAR-10, torch for Fashion-MNIST"
    )
    assert second == "verdict    GPU 1: none; pfgm check --device cuda:1 finds one"


def test_a_run_says_which_backend_computes(monkeypatch, tmp_path, capsys):
    arguments = ["train", "--data", "digits", "--width", "16", *TRAIN]
    monkeypatch.delenv("PFGM_BACKEND", raising=False)
    assert cli.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert "backend    native on cpu, the first that can run" in capsys.readouterr().out
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    assert cli.main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert "backend    reference on cpu, as requested" in capsys.readouterr().out
