"""``pfgm check``, and who says which backend computes."""

import json

from pfgm import backends, cli

TRAIN = ["--steps", "2", "--batch-size", "16", "--reference-batch", "32", "--warmup", "2"]


def test_check_prints_a_table_and_fails_if_a_row_did(monkeypatch, capsys, tmp_path):
    asked = []
    rows = [backends.Row("torch", "field", 1e-7, 2e-5)]

    def check(device, *, report):
        asked.append(device)
        report("torch on cpu")
        return backends.Report("cpu: stand-in", {"torch": None}, list(rows))

    monkeypatch.setattr(backends, "check", check)
    assert cli.main(["check", "--device", "cpu"]) == 0
    assert cli.main(["check"]) == 0
    assert asked == ["cpu", "auto"]
    shown = capsys.readouterr()
    assert "1.0e-07 / 2e-05" in shown.out
    assert shown.err.splitlines()[0] == "pfgm check: torch on cpu"
    failure = "step 0 is off by nan"
    rows.append(backends.Row("torch", "steps", None, 1e-5, failure=failure))
    file = tmp_path / "report.json"
    assert cli.main(["check", "--json", str(file)]) == 1
    assert f"FAILED: torch, steps: {failure}\npassed: none" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert [row["error"] for row in written["rows"]] == [1e-7, None]
    assert written["passed"] == []


def test_commands_check_nothing(monkeypatch, tmp_path):
    """Whatever computes there."""
    monkeypatch.setattr(backends, "check", None)
    arguments = ["sample", "digits", "--n", "2", "--steps", "2"]
    assert cli.main([*arguments, "--out", str(tmp_path / "a.npy")]) == 0


def test_a_run_says_which_backend_computes(monkeypatch, tmp_path, capsys):
    arguments = ["train", "--data", "digits", "--network", "mlp", "--width", "16", *TRAIN]
    monkeypatch.delenv("PFGM_BACKEND", raising=False)
    assert cli.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert "backend    native on cpu, the first that can run" in capsys.readouterr().out
    monkeypatch.setenv("PFGM_BACKEND", "reference")
    assert cli.main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert "backend    reference on cpu, as requested" in capsys.readouterr().out
