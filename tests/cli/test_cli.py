import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import pfgm
import pfgm_command
from pfgm import cli
from pfgm.common import tensor_files
from pfgm.training import TrainConfig
from pfgm.training.runs import RunConfig

TRAIN = ["--steps", "12", "--batch-size", "16", "--reference-batch", "32", "--warmup", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short training run on digits."""
    folder = tmp_path_factory.mktemp("run")
    typed("train", "--data", "digits", "--out", folder, "--width", 16, *TRAIN)
    return folder


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", "import sys, pfgm.cli; sys.exit(pfgm.cli.main())", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def typed(*arguments):
    """Runs the command, which must succeed."""
    assert cli.main([str(each) for each in arguments]) == 0


def test_samples_as_an_array_and_as_a_picture(run, tmp_path, capsys):
    weights = run / "step-00000012.safetensors"
    for out in ("a.npy", "b.npy", "c.png", "d.jpg", "e.JPG"):
        typed("sample", weights, "--n", 5, "--steps", 3, "--out", tmp_path / "new" / out)
        assert capsys.readouterr().out.strip() == str(tmp_path / "new" / out)
    a, b = (np.load(tmp_path / "new" / name) for name in ("a.npy", "b.npy"))
    assert a.shape == (5, 1, 8, 8)
    assert a.dtype == np.float32
    assert np.array_equal(a, b)
    assert (tmp_path / "new" / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("d.jpg", "e.JPG"):
        assert (tmp_path / "new" / name).read_bytes()[:3] == b"\xff\xd8\xff"


def test_the_error_for_an_option_of_a_model_shows_the_line_to_type(tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    for line, instead in (
        ("sample --checkpoint runs/a --n 4 -o x.npy", "sample runs/a --n 4 -o x.npy"),
        ("sample -o 'my x.npy' --checkpoint=runs/a", "sample runs/a -o 'my x.npy'"),
        ("sample -o x.npy --pretrained digits", "sample digits -o x.npy"),
        ("sample -o x.npy --checkpoint digits", "sample ./digits -o x.npy"),
        ("evaluate --label 1 2 --pretrained", "evaluate MODEL --label 1 2"),
        ("evaluate --checkpoint '' -o e", "evaluate MODEL -o e"),
    ):
        old = "--checkpoint" if "--checkpoint" in line else "--pretrained"
        message = f"there is no option {old}; type: pfgm {instead}"
        assert refusal(*shlex.split(line)) == f"pfgm: error: {message}"
    assert not list(tmp_path.iterdir())


def test_one_model_is_asked_for(run, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    Path("digits").symlink_to(run)
    for arguments in (["sample", "digits"], ["train", "--init", "digits"], ["evaluate", "digits"]):
        assert "write ./digits for the path, or rename it." in refusal(*arguments, "-o", "x.npy")
    typed("sample", "./digits", "-n", "3", "--steps", "2", "-o", "x.npy")
    assert np.load("x.npy").shape == (3, *pfgm.load(run).flow.shape)
    for given, extra in (("neither", []), ("both", ["./digits", "--samples", "x.npy"])):
        message = f"one of a model and --samples must be given, got {given}."
        assert message in refusal("evaluate", "-o", "e", *extra)


@pytest.mark.parametrize(
    ("name", "option", "labels"),
    [
        ("digits", [], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
        ("digits", ["--label", "7", "3"], [7, 3, 7, 3, 7, 3, 7, 3, 7, 3, 7, 3]),
        ("digits", ["--label", "none"], None),
        ("fashion-mnist", ["--label", "7"], [7] * 12),
        ("fashion-mnist", ["--label", "ankle-boot", "t_SHIRT"], [9, 0] * 6),
        ("digits", ["--label", "None"], None),
    ],
)
def test_the_labels_of_samples(tmp_path, name, option, labels):
    out = tmp_path / "x.npy"
    typed("sample", name, "--n", 12, "--steps", 2, *option, "--out", out)
    flow, net = pfgm.load(name)
    start = flow.prior(12, generator=torch.Generator().manual_seed(0))
    condition = None if labels is None else {"labels": torch.tensor(labels)}
    samples = flow.sample(net, 12, steps=2, x_init=start, condition=condition)
    np.testing.assert_allclose(np.load(out), samples.numpy(), atol=1e-5)


def test_a_picture_has_columns_for_each_label(tmp_path, monkeypatch):
    """Several for few labels, so that it is about square."""
    drawn = []
    monkeypatch.setattr(pfgm.plotting, "image_grid", lambda *_, **options: drawn.append(options))
    for options in ([], ["--label", "bag", "1"], ["--label", "7"], ["--label", "none"]):
        sample = ["sample", "fashion-mnist", "--n", 12, "--steps", 1]
        typed(*sample, *options, "--out", tmp_path / "x.png")
    classes = list(pfgm.pretrained.PRETRAINED["fashion-mnist"].classes)
    two = {"columns": 4, "header": ["bag", "trouser", "bag", "trouser"]}
    assert drawn == [{"columns": 10, "header": classes}, two, {}, {}]


def test_an_animation_of_samples(tmp_path, monkeypatch, refusal):
    drawn = []
    monkeypatch.setattr(pfgm.plotting, "animation", lambda *values, **_: drawn.append(values))
    gif, out = tmp_path / "a" / "x.gif", tmp_path / "x.npy"
    sample = ["sample", "digits", "--steps", "3", "--out", out, "--animate"]
    typed(*sample, gif, "--n", "4")
    ((frames, titles, path),) = drawn
    flow = pfgm.load("digits").flow
    start = flow.prior(4, generator=torch.Generator().manual_seed(0))
    assert path == gif
    assert torch.equal(frames[0], start)
    np.testing.assert_array_equal(frames[-1], np.load(out))
    assert titles == [*(f"z = {z:.2g}" for z in flow.grid(3, "rho")[:-1]), "samples"]
    for name, count in (("x.png", "4"), ("x.gif", "2000")):
        message = refusal(*sample, tmp_path / name, "--n", count)
        assert re.search(f"animate must end in .gif, .*{name} with {count} samples", message)


def test_the_command_samples_as_python_does(tmp_path):
    """Solver, schedule and steps that are not given are the same."""
    draw = torch.Generator().manual_seed(0)
    for N in (1, 20, 64):
        data = torch.randn(30, N, generator=draw)
        for flow in (
            pfgm.PoissonFlow.from_data(data),
            pfgm.PoissonFlowPP.from_data(data, D=128),
            pfgm.PoissonFlowPP.from_data(data, D=float("inf")),
        ):
            chosen = cli.options.SamplingOptions().solver_arguments(flow)
            assert (chosen["solver"], chosen["steps"], chosen["schedule"]) == flow.defaults
            for solver in ("euler", "heun", "consistency"):
                chosen = cli.options.SamplingOptions(solver=solver).solver_arguments(flow)
                grid = flow.grid(chosen["steps"], chosen["schedule"], solver=solver)
                assert grid == flow.grid(solver=solver)
    flow.fit_levels(data, 3, points=8)
    for options, schedule in (({}, "fitted"), ({"solver": "euler"}, "rho"), ({"last": 0.5}, "rho")):
        chosen = cli.options.SamplingOptions(steps=3, **options).solver_arguments(flow)
        assert chosen["schedule"] == schedule


def test_the_batch_size_and_the_seed_of_sampling(run, tmp_path):
    def sample(name, *options):
        out = tmp_path / name
        typed("sample", run, "--n", 6, "--steps", 2, "--out", out, *options)
        return np.load(out)

    whole = sample("whole.npy")
    np.testing.assert_allclose(sample("parts.npy", "--batch-size", "4"), whole, atol=1e-4)
    assert not np.allclose(sample("other.npy", "--seed", "1"), whole, atol=1e-2)
    options = ["--solver", "rk45", "--schedule", "log"]
    assert np.isfinite(sample("adaptive.npy", *options)).all()
    flow, net = pfgm.load(run)
    chosen = {"solver": "euler", "schedule": "log", "last": 0.5}
    options = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    start = flow.prior(6, generator=torch.Generator().manual_seed(0))
    expected = flow.sample(net, 6, steps=2, x_init=start, **chosen)
    np.testing.assert_allclose(sample("chosen.npy", *options), expected, atol=1e-5)


def test_signals_from_a_file_to_samples(tmp_path):
    signals = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "signals.npy", signals.numpy())
    out = str(tmp_path / "run")
    arguments = ["train", "--data", tmp_path / "signals.npy", "--method", "pfgm++"]
    typed(*arguments, "--width", "16", "--out", out, *TRAIN)
    _, network = pfgm.load(out)
    assert any(isinstance(part, torch.nn.Conv1d) for part in network.modules())
    path = tmp_path / "samples.npy"
    typed("sample", out, "--n", "5", "--out", path)
    samples = np.load(path)
    assert samples.shape == (5, 2, 16)
    assert np.isfinite(samples).all()
    typed("evaluate", out, "--n", 20, "--out", tmp_path / "e")


def test_a_table_comes_back_with_its_columns(tmp_path, refusal, capsys):
    """By one command each, with and without labels; resumed, evaluated and continued."""
    pandas = pytest.importorskip("pandas")
    generator = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "size": generator.normal(70, 20, 60).round(1),
            "label": generator.choice(["old", "new"], 60),
            "rooms": generator.integers(1, 5, 60),
        }
    )
    table, rows, out = tmp_path / "t.csv", tmp_path / "rows.csv", str(tmp_path / "run")
    frame.to_csv(table, index=False)
    train = ["train", "--data", table, "--width", "16", *TRAIN, "--evaluate-every", "12"]
    sample = ["sample", "--n", "30", "--out", rows]
    for name, options, label in (
        ("run", [], []),
        ("labels", ["--labels"], ["--label", "old"]),
        ("named", ["--label-column", "rooms"], ["--label", "3"]),
    ):
        run = str(tmp_path / name)
        typed(*train, *options, "--samples", "20", "--out", run)
        assert " after standardising the columns, " in "".join(capsys.readouterr())
        typed(*sample, run, *label)
        drawn = pandas.read_csv(rows)
        assert list(drawn) == list(frame)
        assert set(drawn["label"]) <= {"old", "new"}
        assert set(drawn["rooms"]) <= {1, 2, 3, 4}
        assert drawn["size"].between(frame["size"].min(), frame["size"].max()).all()
        if label:
            assert set(map(str, drawn["label" if name == "labels" else "rooms"])) == {label[1]}
        evaluate = ["evaluate", "--n", "40", "--out", tmp_path / "e"]
        typed(*evaluate, run)
    typed(*evaluate, "--samples", rows, "--data", table)
    typed("train", "--out", out, "--resume", "--steps", "14")
    # The columns of the checkpoint, not those of other data, decide what is inside.
    frame[["rooms", "size", "label"]].iloc[:40].to_csv(tmp_path / "u.csv", index=False)
    other = [*train[:2], tmp_path / "u.csv", "--width", "16", *TRAIN, "--init", out]
    typed(*other, "--out", tmp_path / "more")
    tables = [pfgm.load(each).table for each in (out, tmp_path / "more")]
    assert tables[0] == tables[1]
    for label in ("older", "2", "-1", "1.5"):
        message = refusal(*sample, tmp_path / "labels", f"--label={label}")
        assert "labels holds 2" in message or " or new, old, got " in message
    # The names 1 to 4 are meant, not the numbers 0 to 3 of these labels.
    message = refusal(*sample, tmp_path / "named", "--label=0")
    assert "label must be one of the network's labels, 1, 2, 3, 4, got 0." in message
    assert "out must end in .csv" in refusal(*sample[:3], out, "--out", "x.npy")
    np.save(tmp_path / "x.npy", np.zeros((40, 3), np.float32))
    samples = ["--samples", tmp_path / "x.npy", "--data", table]
    assert "samples must be a .csv file" in refusal(*evaluate, *samples)
    assert "data must be a .csv file too" in refusal(*evaluate, "--samples", rows)
    assert "range is for arrays" in refusal(*train, "--out", "x", "--range", 0, 1)
    for option in (["--drop-missing"], ["--drop-columns", "a"], ["--no-header"]):
        assert "is for tables" in refusal("train", "--out", "x", *option)


def test_a_checkpoint_is_read_once(tmp_path, monkeypatch):
    """The file is opened and its checksum computed once by each command, with all it names."""
    pytest.importorskip("pandas")
    table, run = tmp_path / "t.csv", str(tmp_path / "run")
    table.write_text("a,label\n" + "".join(f"{i % 7}.5,{'xy'[i % 2]}\n" for i in range(40)))
    train = ["train", "--data", table, "--labels", "--width", "16", *TRAIN]
    typed(*train, "--out", run)
    opened, verified = [], []
    safe_open, verify = safetensors.safe_open, tensor_files.verify_checksum
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *each, **of: opened.append(1) or safe_open(*each, **of)
    )
    monkeypatch.setattr(
        tensor_files, "verify_checksum", lambda *each: verified.append(1) or verify(*each)
    )
    sample = ["sample", "--n", "6", run, "--out"]
    for command in (
        [*sample, str(tmp_path / "rows.csv")],
        [*sample, tmp_path / "rows.csv", "--label", "y", "--solver", "heun"],
        ["sample", "--n", "6", "digits", "--out", tmp_path / "x.npy"],
        ["evaluate", "--n", "20", run, "--out", tmp_path / "e"],
        [*train, "--init", run, "--out", tmp_path / "more"],
    ):
        opened.clear()
        verified.clear()
        typed(*command)
        assert (len(opened), len(verified)) == (1, 1), command
    loaded = pfgm.load(run)
    assert loaded.label_names == ("x", "y")
    assert [column.name for column in loaded.table.columns] == ["a"]
    flow, network = loaded
    assert (loaded.flow, loaded.network) == (flow, network) == loaded


def test_photographs_of_many_sizes(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for number, size in enumerate([(9, 12), (20, 8), (16, 16)] * 4):
        Image.new("L", size, 20 * number).save(tmp_path / f"{number}.png")
    out = str(tmp_path / "run")
    arguments = ["train", "--data", f"folder:{tmp_path}", "--resize", "6", "--width", "16"]
    train = ["--steps", "2", "--batch-size", "4", "--reference-batch", "8"]
    typed(*arguments, "--out", out, *train)
    assert pfgm.load(out)[0].shape == (1, 6, 6)
    typed("evaluate", out, "--n", 12, "--out", tmp_path / "e")


@pytest.mark.parametrize(("count", "threads"), [(1, "1 thread"), (2, "2 threads")])
def test_info(capsys, monkeypatch, count, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    typed("info")
    shown = capsys.readouterr().out
    for part in ("pfgm 0.", f"torch {torch.__version__}", "native: C++ on the CPU"):
        assert part in shown
    assert re.search(rf", {threads}[;\n]", shown)
    assert "reference: exact differences" in shown
    assert "default: native, the first that can run" in shown
    for name, network in pfgm.pretrained.PRETRAINED.items():
        assert f"network    {name}: trained on {network.data}" in shown
    gpu = "cuda       torch finds no GPU that it can use; the CPU computes" in shown
    assert gpu != torch.cuda.is_available()
    typed("--version")


def test_one_sentence_for_bad_input(run, tmp_path, refusal, monkeypatch):
    weights, out = run / "step-00000012.safetensors", tmp_path / "x.npy"
    blocked, folder, vectors = (tmp_path / name for name in ("file", "x.png", "net.safetensors"))
    blocked.write_text("a file, not a folder")
    folder.mkdir()
    pfgm.save(vectors, pfgm.PoissonFlow((3,), data_norm=2.0), pfgm.networks.MLP((3,), width=16))
    sample, digits = ["sample", weights, "--out", out], ["sample", "digits", "--out"]
    train, evaluate = ["train", "--data", "digits", *TRAIN], ["evaluate", weights, "--out", out]
    new, huge = ["--out", tmp_path / "new" / "er"], 10**30
    monkeypatch.setenv("PFGM_BACKEND", "abacus")
    backend = "PFGM_BACKEND must be one of native, reference, torch, triton, got 'abacus'"
    assert backend in refusal(*train, "--out", tmp_path / "run")
    monkeypatch.undo()
    for arguments, message in (
        ([*digits, tmp_path / "x.bmp"], "end in .csv, .npy, .png or .jpg"),
        ([*digits, blocked / "x.npy"], "output folder"),
        ([*digits, folder], "x.png, a folder."),
        ([*sample, "--n", 999_999_999_999], "999999999999"),
        ([*sample, "--n", huge], f"n must be an integer of at least 1 and at most {2**63 - 1}"),
        ([*sample, "--label", 7], "label is 7, but the network was trained without"),
        ([*sample, "--label", huge], "label"),
        ([*sample, "--guidance", 2], "guidance is 2.0, but the network was trained"),
        ([*sample, "--batch-size", huge], f"of at least 1 and at most {2**63 - 1}, got {huge}."),
        ([*sample, "--seed", -huge], "seed must be an integer from -2^63 to below 2^64, got -1000"),
        (["sample", "--out", out, ""], "model must be a path or a name, got an empty text"),
        ([*digits, out, "--label", "none", "--guidance", 2], "2.0, but label is none"),
        ([*digits, tmp_path / "x.csv"], "out must be a folder or end in .npy, .png or .jpg for"),
        (["sample", vectors, "--out", tmp_path / "y.png"], "end in .csv or .npy, without --anim"),
        ([*evaluate, "--guidance", 2], "guidance is 2.0"),
        ([*evaluate, "--curve", "--curve-steps", huge], "curve-steps"),
        # Settings that only the data or the flow refuse leave no folder.
        (["sample", "--out", tmp_path / "new" / "x.npy", run, "--steps", 0], "got 0."),
        (["evaluate", *new, run, "--steps", 10**12], "steps must be an integer of at least 1 and"),
        (["demo", *new, "--steps", 0], "steps must be an integer of at least 1"),
        (["demo", *new, "--seed", huge], "got 1000"),
        ([*train, *new, "--network", "mlp", "--blocks", 2], "blocks is 2"),
        (
            [*train, *new, "--batch-size", 5000, "--reference-batch", 5000],
            "data must have at least batch_size rows, 5000",
        ),
        ([*train, *new, "--flow", "zmax", 3], "'zmax'"),
        ([*train, *new, "--shared"], "shared is True"),
        ([*train, *new, "--teacher", tmp_path / "no"], "there is no file or folder"),
        (["sample", blocked, "--out", out], "not a complete safetensors file"),
        (["train", "--out", tmp_path / "run", "--data", tmp_path / "no.npy"], "no.npy"),
        ([*train, "--out", blocked / "run"], "output folder"),
        (["demo", "--out", blocked / "demo"], "output folder"),
        *(([command, "--out="], "out must not be empty") for command in ("train", "demo")),
        *(([command, "--out", ""], "out must not be empty") for command in ("evaluate", "sample")),
        (["train", "--out", "run", "--timeout", "nan"], "timeout must be from 0.001 to 1e8 sec"),
    ):
        assert message in refusal(*arguments), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "net.safetensors", "x.png"]


def test_pictures_without_matplotlib_are_refused_before_the_work(
    run, tmp_path, refusal, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "pfgm.plotting.shown_figure", raising=False)
    monkeypatch.setattr(pfgm.networks.UNet, "forward", None)  # a call of it is a TypeError
    out = ["--out", tmp_path / "new"]
    for arguments in (
        ["sample", "digits", "--out", tmp_path / "x.png"],
        ["evaluate", *out, run],
        ["demo", *out],
        ["train", *out, *TRAIN, "--evaluate-every", 3],
    ):
        assert "plotting needs matplotlib" in refusal(*arguments)
        assert not list(tmp_path.iterdir())


def test_a_missing_gpu_is_one_calm_sentence(run, tmp_path, refusal):
    sample = ["sample", run, "--out", tmp_path / "x.npy"]
    train = ["train", "--data", "digits", "--out", tmp_path / "run", *TRAIN]
    for device, usable, message in (
        ("mps", torch.backends.mps.is_available(), "torch finds no GPU of Apple"),
        ("cuda", torch.cuda.is_available(), "torch finds no GPU that it can use"),
        *((device, False, "") for device in ("meta", "cpu:-1", "hpu", "mkldnn")),
    ):
        for arguments in () if usable else (sample, train):
            shown = refusal(*arguments, "--device", device)
            assert "device must be one of cpu, " in shown
            assert f"auto, got {device!r}: {message}" in shown
            assert len(shown) < 250


def test_the_help_names_values_as_a_user_types_them(capsys):
    assert "--version" in shown_help(capsys)
    start = cli._parse(["train", "--out", "x", "--multipliers", "1", "2", "--range", "0", "255"])
    assert (start.settings.multipliers, start.settings.range) == ((1, 2), (0.0, 255.0))


@pytest.mark.parametrize("wrong", ["mnist", "None"])
def test_none_is_no_choice(capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sample", "digits", "--out", "x.npy", "--schedule", wrong])
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"invalid choice '{wrong}' for argument '--schedule'. Expected one of" in shown
    assert "'None'" not in shown.replace(f"choice '{wrong}'", "")


def shown_help(capsys, *arguments):
    """The help of a command as one line, without the frame."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main([*map(str, arguments), "--help"])
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("command", pfgm_command.COMMANDS)
def test_the_help_shows_no_default_where_there_is_none(command, capsys):
    shown = shown_help(capsys, command)
    assert "None" not in shown
    assert "(default: )" not in shown


def test_a_text_of_the_help_is_one_paragraph(monkeypatch, capsys):
    """In a wide terminal a text of two lines of source stands in one line."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    line = "By default a resumed run takes them from its own folder."
    assert line in capsys.readouterr().out


def test_the_help_shows_the_other_defaults(tmp_path, capsys):
    shown = shown_help(capsys, "sample")
    for part in ("Number of samples. (default: 64)", "(default: multistep)", "(default: auto)"):
        assert part in shown
    assert "By default all labels of the network. --animate" in shown
    for part in ("(required)", "MODEL The folder of a run, for its newest checkpoint"):
        assert part in shown
    assert "(default: 0.9)" not in shown_help(capsys, "train")
    RunConfig(training=TrainConfig(ema=0.9)).save(tmp_path / "recipe.json")
    assert "(default: 0.9)" in shown_help(capsys, "train", "--config", tmp_path / "recipe.json")


def test_usage_errors_have_exit_code_2(capsys):
    for arguments in (["paint"], ["sample"], ["train", "--data", "digits", "--steps", "many"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_of_the_shell(tmp_path, shell, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--tyro-write-completion", shell, str(tmp_path / "pfgm")])
    assert ended.value.code in (None, 0)
    script = (tmp_path / "pfgm").read_text()
    assert "evaluate" in script
    assert "--learning-rate" in script


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flow", "M", "100000"], "M must keep .*, got 100000"),
        (["--width", "100000000"], "width must be .*, got 100000000"),
        (["--network", "mlp", "--width", "1000000"], "width 1000000"),
        (["--method", "edm", "--width", "1000000"], "'width': 1000000"),
        (["--network", "ddpmpp", "--width", "1000000"], "nf 1000000"),
        (["--network", "ncsnpp", "--blocks", "100000000"], "num_res_blocks must be .*, got 1000"),
        (["--multipliers", "100000000"], r"multipliers\[0\] must be .*, got 100000000"),
        (["--steps", str(10**400)], "steps must be .*, got 1000"),
    ],
)
def test_one_sentence_for_settings_that_are_too_large(tmp_path, refusal, options, message):
    arguments = ["train", "--data", "digits", "--out", tmp_path / "run", *TRAIN, *options]
    started = time.process_time()
    assert re.search(message, refusal(*arguments))
    assert time.process_time() - started < 10


def test_exhausted_memory_is_one_sentence(run, tmp_path, refusal, monkeypatch):
    """An allocator's error is one sentence even if no single argument is the cause."""
    raised = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]

    def exhausted(*arguments, **options):
        raise raised.pop()

    monkeypatch.setattr(pfgm.PoissonFlow, "sample", exhausted)
    sample = ["sample", run, "--out", tmp_path / "x.npy"]
    while raised:
        assert "there is not enough memory" in refusal(*sample)
    raised.append(RuntimeError("another one"))
    with pytest.raises(RuntimeError, match="another one"):
        cli.main([str(argument) for argument in sample])


def test_a_damaged_checkpoint_is_one_sentence_that_offers_an_older_one(tmp_path, capsys, refusal):
    train = ["train", "--data", "digits", "--out", tmp_path / "run", "--width", "16", *TRAIN]
    typed(*train, "--checkpoint-every", "8")
    state, weights = (tmp_path / "run" / f"step-00000012.{s}" for s in ("state.pt", "safetensors"))
    for path in (state, weights):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
        assert "continue from it with --resume-from 8" in refusal(*train, "--resume")
    sample = ["sample", tmp_path / "run", "--out", tmp_path / "x.npy"]
    older = weights.with_name("step-00000008.safetensors")
    assert f"The checkpoint {older} is intact" in refusal(*sample, "--steps", 2)
    consistency = [*sample, "--solver", "consistency"]
    assert f"The checkpoint {older} is intact" in refusal(*consistency)
    log = (tmp_path / "run" / "log.csv").read_bytes()
    train[train.index("--steps") + 1] = "8"
    assert "steps must be above 8" in refusal(*train, "--resume-from", "8")
    assert (tmp_path / "run" / "log.csv").read_bytes() == log
    assert RunConfig.load(tmp_path / "run").training.steps == 12
    sample[1] = older
    typed(*sample, "--steps", 2)
    train[train.index("--steps") + 1] = "16"
    typed(*train, "--resume-from", "8")
    assert "resuming at step 8" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "run").glob("*.state.pt")) == [
        "step-00000008.state.pt",
        "step-00000016.state.pt",
    ]


def test_short_options_and_no_progress(run, tmp_path, capsys, terminal, refusal):
    sample = ["sample", run, "-n", "3", "-o", tmp_path / "x.npy"]
    for options, bars in (([], True), (["--no-progress"], False)):
        typed(*sample, *options)
        assert len(np.load(tmp_path / "x.npy")) == 3
        assert ("sampling:" in capsys.readouterr().err) == bars
    figures = ["evaluate", run, "-n", "8", "--against", "8"]
    figures += ["-o", tmp_path / "figures", "--curve", "--curve-steps", "1", "--no-progress"]
    typed(*figures)
    shutil.copytree(run, tmp_path / "run")
    typed("train", "-o", tmp_path / "run", "--resume", "--steps", 13, "--no-progress")
    assert "%|" not in capsys.readouterr().err
    assert "out must not be empty" in refusal(*sample[:-1], "")


@pytest.mark.parametrize("exists", [False, True])
def test_samples_as_single_images(run, tmp_path, capsys, terminal, refusal, exists):
    """They are the array, in bytes; evaluate reads them."""
    arguments = ["sample", run, "--n", "5", "--steps", "2"]
    typed(*arguments, "--out", tmp_path / "x.npy")
    folder = tmp_path / ("images" if exists else "new/images")
    if exists:
        folder.mkdir()
    capsys.readouterr()
    typed(*arguments, "--out", f"{folder}/", "--batch-size", "2")
    printed = capsys.readouterr()
    assert printed.out.strip() == str(folder)
    assert "images: 100%" in printed.err
    assert [path.name for path in sorted(folder.iterdir())] == [f"00000{i}.png" for i in range(5)]
    images = pfgm.data.open(folder).samples[:]
    assert images.shape == (5, 1, 8, 8)
    correct = (np.load(tmp_path / "x.npy").clip(-1, 1) + 1) * 127.5
    assert abs(images.numpy() - correct).max() <= 0.51
    assert not list(tmp_path.rglob(".pfgm-*"))
    error = refusal(*arguments, "--out", folder)
    assert f"the output folder must be new or empty, got {folder}, a folder that is not" in error


def test_samples_are_compared_with_the_held_out_images_of_a_folder(tmp_path, capsys):
    """As with those of named data; before, all images were the training data."""
    images = pfgm.data.digits().train
    for place, rows in (("data/train/all", images[:20]), ("data/test/all", images[20:30])):
        (tmp_path / place).mkdir(parents=True)
        for number, image in enumerate(rows):
            cli.sample.save_image(tmp_path / place / f"{number}.png", image)
    samples = ["--samples", tmp_path / "data" / "train", "--data", f"folder:{tmp_path}/data"]
    typed("evaluate", *samples, "--out", tmp_path / "e")
    figures = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert (figures["against"], figures["counts"]["against"]) == ("held_out", 10)
    assert figures["median_distance_to_train"]["samples"] == 0
    assert "against 10 held-out rows" in capsys.readouterr().out


def test_a_folder_of_images_appears_whole_or_not_at_all(run, tmp_path, refusal, monkeypatch):
    arguments = ["sample", run, "--n", "6", "--steps", "2", "--batch-size", "2"]
    saved, save, errors = [], cli.sample.save_image, []

    def interrupted(path, image):
        saved.append(path.name)
        if len(saved) == 4:
            raise errors[-1]
        save(path, image)

    monkeypatch.setattr(cli.sample, "save_image", interrupted)
    (tmp_path / "empty").mkdir()
    for error, code in ((KeyboardInterrupt(), 130), (OSError("disk is full"), 2)):
        errors.append(error)
        for folder in ("new/images", "empty"):
            saved.clear()
            out = ["--out", tmp_path / folder]
            assert cli.main([str(each) for each in [*arguments, *out]]) == code
            assert sorted(tmp_path.rglob("*")) == [tmp_path / "empty"]
    (tmp_path / "file").write_text("a file")
    assert "/file, a file." in refusal(*arguments, "--out", tmp_path / "file")


def test_an_interrupt_while_torch_is_imported_is_one_sentence():
    code = (
        "import sys, signal, builtins\n"
        "import pfgm_command\n"
        "load = builtins.__import__\n"
        "def interrupted(name, *rest, **named):\n"
        "    if name == 'torch':\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return load(name, *rest, **named)\n"
        "builtins.__import__ = interrupted\n"
        "sys.argv = ['pfgm', 'info']\n"
        "sys.exit(pfgm_command.main())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (130, "pfgm: interrupted\n")


def wait_for_checkpoint(process, folder):
    deadline = time.monotonic() + 120
    while not (folder / "latest.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def points_in(folder):
    """A file of few points of three values, on which a process trains sooner than on digits."""
    np.save(folder / "points.npy", np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
    return str(folder / "points.npy")


def without_streams():
    """As `0<&- >&- 2>&-` under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for descriptor in range(3):
        os.close(descriptor)


@pytest.mark.slow
def test_training_continues_when_its_output_is_gone(tmp_path):
    """Its output is a pipe that is closed after a line, or no stream at all."""
    code = "import os, sys, pfgm.cli; code = pfgm.cli.main(); os.write(2, b'text'); sys.exit(code)"
    started, last = {}, {}
    for kind, options in (
        ("pipe", {"stdout": subprocess.DEVNULL}),
        ("closed", {"preexec_fn": without_streams}),
    ):
        arguments = ["train", "--data", points_in(tmp_path), "--width", "16", *TRAIN]
        # The closed one must still train when its signal comes, after its first checkpoint.
        last[kind] = 60 if kind == "closed" else 8
        arguments += ["--out", tmp_path / kind, "--steps", str(last[kind])]
        call = [sys.executable, "-c", code, *arguments, "--checkpoint-every", "2"]
        if kind == "pipe":
            call = ["bash", "-c", 'set -o pipefail; "$@" 2>&1 | head -c 1', "-", *call]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started[kind] = subprocess.Popen(call, env=environment, **options)
    process = started["closed"]
    wait_for_checkpoint(process, tmp_path / "closed")
    process.send_signal(signal.SIGHUP)
    for kind, process in started.items():
        # Without descriptor 2 the last write of the script itself fails.
        assert process.wait(timeout=120) == (0 if kind == "closed" else 1), kind
        assert json.loads((tmp_path / kind / "latest.json").read_text())["step"] == last[kind]
        pfgm.load(tmp_path / kind)


def test_samples_are_written_whatever_becomes_of_stdout(run, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for name, descriptor in (("pipe", writer), ("full", full), ("none", None)):
        stream = None if descriptor is None else os.fdopen(descriptor, "w", buffering=1)
        for replaced in ("stdout", "stderr", "__stdout__", "__stderr__"):
            monkeypatch.setattr(sys, replaced, stream)
        out = tmp_path / f"{name}.npy"
        typed("sample", run, "--n", 2, "--steps", 2, "--out", out)
        assert np.load(out).shape == (2, 1, 8, 8)
        assert name != "pipe" or cli.main(["info"]) == 0  # its reader has seen enough
        if stream is not None:
            stream.close()  # flushes what is left, as the interpreter does at its end
    monkeypatch.undo()


def test_a_signal_leaves_a_loadable_checkpoint(tmp_path, refusal):
    arguments = ["train", "--data", points_in(tmp_path), "--out", tmp_path / "run"]
    options = ["--batch-size", "16", "--reference-batch", "32", "--checkpoint-every", "2"]
    process = command(*arguments, "--width", "16", *options)
    wait_for_checkpoint(process, tmp_path / "run")
    the_folder_is_in_use(process, tmp_path / "run", refusal)
    process.send_signal(signal.SIGTERM)
    lines, shown = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in shown
    step = json.loads((tmp_path / "run" / "latest.json").read_text())["step"]
    resume = f"pfgm train --out {tmp_path / 'run'} --resume"
    assert f"stopped; {resume} continues from the checkpoint of step {step}\n" in lines
    flow, network = pfgm.load(tmp_path / "run")
    assert flow.sample(network, 2, steps=2).shape == (2, 3)
    assert not list((tmp_path / "run").glob("*.tmp"))


def the_folder_is_in_use(process, run, refusal):
    config = (run / "config.json").read_bytes()
    others = ["train", "--out", run, "--seed", 5], ["train", "--out", run, "--resume", "--seed", 5]
    for arguments in others:
        message = refusal(*arguments)
        assert f"which process {process.pid} on {socket.gethostname()} (since " in message
    assert (run / "config.json").read_bytes() == config
    out = run.parent / "x.npy"
    typed("sample", run, "--n", "2", "--out", out)


@pytest.fixture
def few_samples(monkeypatch):
    """The demo draws and measures 100 samples, not 1100."""
    assert (cli.demo.SHOWN, cli.demo.MEASURED) == (100, 1000)
    monkeypatch.setattr(cli.demo, "SHOWN", 20)
    monkeypatch.setattr(cli.demo, "MEASURED", 80)


@pytest.mark.usefixtures("few_samples")
def test_demo(tmp_path, capsys):
    """It is train, sample and evaluate in a row, and each is printed as it is typed."""
    out = tmp_path / "demo"
    typed("demo", "--out", out, "--steps", "6", "--seed", "3")
    figures = json.loads((out / "evaluation" / "metrics.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    lines = [shlex.split(line)[2:] for line in printed if line.startswith("$ pfgm ")]
    assert [line[0] for line in lines] == ["train", "sample", "evaluate"]
    assert RunConfig.load(out).labels
    assert pfgm.load(out).flow.shape == (1, 8, 8)
    assert (out / "samples.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "samples.gif").read_bytes()[:4] == b"GIF8"
    for name in ("frechet_distance", "precision", "recall"):
        assert set(figures[name]) == {"samples", "train"}
    picture = (out / "samples.png").read_bytes()
    assert cli.main(lines[1]) == 0  # as it is printed
    assert (out / "samples.png").read_bytes() == picture


@pytest.mark.usefixtures("few_samples")
def test_an_interrupted_demo_goes_on(tmp_path, monkeypatch, capsys):
    losses = []

    def interrupted(*arguments, **options):
        losses.append(loss(*arguments, **options))
        if len(losses) == 3:
            signal.raise_signal(signal.SIGINT)
        return losses[-1]

    loss = pfgm.PoissonFlow.loss
    command = ["demo", "--out", str(tmp_path), "--steps", "5"]
    with monkeypatch.context() as patch:
        patch.setattr(pfgm.PoissonFlow, "loss", interrupted)
        assert cli.main(command) == 130
    assert json.loads((tmp_path / "latest.json").read_text())["step"] < 5
    assert not (tmp_path / "samples.png").exists()
    typed(*command)
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 5
    assert (tmp_path / "samples.png").exists()


def test_consistency_needs_a_few_step_model(run, tmp_path, capsys, refusal):
    options = ["--solver", "consistency", "--steps", "1", "--out", tmp_path / "x.npy"]
    sample = ["sample", "--n", "4", *options]
    for path in (run, run / "step-00000012.safetensors"):
        assert "is not a few-step model" in refusal(*sample, path)
    evaluate = ["evaluate", "--n", 8, "--solver", "consistency", "--out", tmp_path / "figures"]
    assert "is not a few-step model" in refusal(*evaluate, run)
    student = tmp_path / "student"
    typed("train", "--data", "digits", "--teacher", run, "--out", student, *TRAIN)
    capsys.readouterr()
    typed(*sample, student)
    assert "few-step" not in capsys.readouterr().err
    pfgm.save(tmp_path / "old.safetensors", *pfgm.load(run))  # as files without the note
    typed(*sample, tmp_path / "old.safetensors")
    assert "does not say whether its network is a few-step model" in capsys.readouterr().err
