"""The examples of training in other frameworks, each run as its docstring says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "plain_trainer": "torch",
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "torchcfm_loop": "torchcfm",
    "diffusers_unet": "diffusers",
    "diffusers_dit": "diffusers",
    "diffusers_training": "diffusers",
}
PIPELINE = ["model_index.json", "scheduler", "unet"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_it_trains_and_draws(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, FOLDER / f"{name}.py", "--out", tmp_path / "new", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < 0.9 * losses[0]
    saved = PIPELINE if name == "diffusers_training" else []
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == sorted([f"{name}.png", *saved])
    assert imread(tmp_path / "new" / f"{name}.png").std() > 0.1


@pytest.mark.parametrize("name", NEEDS)
def test_it_is_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60
