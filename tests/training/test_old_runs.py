"""Runs of version 0.2, whose settings had other names: they resume, sample and evaluate.

pfgm 0.2.0 wrote them; they are never written again (CONTRIBUTING, on formats).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import pfgm
from pfgm import cli
from pfgm.common.old_names import with_present_names
from pfgm.training.runs import RunConfig

RUNS = Path(__file__).parent / "fixtures" / "version-0.2"
LABELS = {"labels": torch.tensor([0, 7, -1])}
# How to sample each run, and the last values of three samples of 0.2.0.
SAMPLES = {
    "labels": (
        {"solver": "heun", "condition": LABELS},
        [-0.5367, 0.1813, -0.3132, 0.0379, -0.0241, 0.1505, -0.5439, -0.6303, -0.5509],
    ),
    "plusplus": (
        {"steps": 3},
        [-1.1759, 1.3872, -0.5651, 0.7978, 0.5991, 1.0197, -0.9223, -1.0738, -1.0417],
    ),
    "student": (
        {"solver": "consistency", "condition": LABELS},
        [-0.1585, -0.1466, -0.1225, -0.14, -0.139, -0.0946, -0.1544, -0.1834, -0.1464],
    ),
    "table": (
        {"steps": 4},
        [5.7595, 2.4552, -3.0938, 5.2802, 2.241, -2.6399, 5.4981, 3.2979, -2.8683],
    ),
}


@pytest.fixture
def runs(tmp_path):
    """A copy of the runs, with the paths of their data and teacher."""
    folder = tmp_path / "runs"
    shutil.copytree(RUNS, folder)
    for name, setting, path in (
        ("student", "teacher", folder / "labels"),
        ("table", "data", folder / "table" / "table.csv"),
    ):
        file = folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), setting: str(path)}))
    return folder


@pytest.mark.parametrize("name", SAMPLES)
def test_an_old_run_samples_as_it_did(name):
    options, expected = SAMPLES[name]
    flow, network = pfgm.load(RUNS / name)
    start = flow.prior(3, generator=torch.Generator().manual_seed(0))
    samples = flow.sample(network, 3, x_init=start, **options).flatten(1)[:, -3:]
    torch.testing.assert_close(samples.flatten(), torch.tensor(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLES)
def test_an_old_run_resumes_and_the_command_line_samples_and_evaluates_it(name, runs, tmp_path):
    run = runs / name
    before = json.loads((run / "latest.json").read_text())["step"]
    assert cli.main(["train", "--out", str(run), "--resume", "--steps", str(before + 2)]) == 0
    assert json.loads((run / "latest.json").read_text())["step"] == before + 2
    solver = ["--solver", "consistency"] if name == "student" else []
    source = [str(run), "--n", "16", *solver]
    samples = tmp_path / ("samples.csv" if name == "table" else "samples.npy")
    assert cli.main(["sample", *source, "--out", str(samples)]) == 0
    assert samples.stat().st_size > 0
    if name == "table":
        assert pfgm.load(run).table.plain  # numbers as they are, under the names that it recorded
        assert samples.read_text().splitlines()[0] == "length,width,weight"
    figures = tmp_path / "figures"
    assert cli.main(["evaluate", *source, "--against", "32", "--out", str(figures)]) == 0
    assert json.loads((figures / "metrics.json").read_text())["nfe"] >= 1


def test_a_resumed_old_run_keeps_the_settings_that_have_new_names(runs, capsys):
    arguments = ["train", "--out", str(runs / "labels"), "--resume", "--steps", "22"]
    assert cli.main([*arguments, "--reference-batch", "128"]) == 2
    assert "reference_batch is 128; the run in" in capsys.readouterr().err


def test_a_recipe_of_version_0_2_is_read(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"levels": 4, "flow": {"sigma": 0.1}, "training": {"references": 256}}')
    config = RunConfig.load(path)
    assert (config.student_levels, config.training.reference_batch) == (4, 256)
    assert config.flow == {"noise_std": 0.1}
    path.write_text('{"method": "edm", "flow": {"sigma": 0.1}}')
    with pytest.raises(ValueError, match=r"names in flow must be among.*got 'sigma'\."):
        RunConfig.load(path)


def test_an_argument_under_both_its_names_is_refused():
    with pytest.raises(ValueError, match=r"sigma is the name that noise_std had in version 0\.2"):
        with_present_names("PoissonFlow", {"sigma": 0.01, "noise_std": 0.02})
