"""``pfgm demo``: train, sample and evaluate in a row, on handwritten digits."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..common.messages import print_notice
from ..plotting.figures import require_matplotlib
from .options import Output, Progress

STEPS = 1500
"""Training steps."""
SHOWN = 100
"""Samples in the picture."""
MEASURED = 1000
"""Samples whose figures are measured."""
_BATCH = 64


@dataclass
class Demo:
    """Train on scikit-learn's digits, draw samples and measure them: a minute on two cores."""

    out: Output = Path("runs/demo")
    """Folder of the run. samples.png, samples.gif and the folder evaluation are added to it."""
    steps: int = STEPS
    """Training steps."""
    seed: int = 0
    """Seed of training and sampling. It gives the same result on the same number of threads."""
    progress: Progress = True

    def run(self) -> None:
        from . import run_command

        require_matplotlib()
        for line in self.lines():
            print_notice(f"$ pfgm {shlex.join(line)}")
            run_command(line if self.progress else [*line, "--no-progress"])

    def lines(self) -> list[list[str]]:
        """The arguments of the commands. A demo that was stopped is continued."""
        out, seed = str(self.out), ["--seed", str(self.seed)]
        training = {"batch-size": _BATCH, "steps": self.steps, "precision": "float32"}
        train = ["train", "--data", "digits", "--labels", *seed, "--out", out]
        for name, value in training.items():
            train += [f"--{name}", str(value)]
        if (self.out / "latest.json").exists():
            train.append("--resume")
        picture, film = str(self.out / "samples.png"), str(self.out / "samples.gif")
        figures, same = str(self.out / "evaluation"), [*seed, "--compute", "float32"]
        return [
            train,
            ["sample", out, "--n", str(SHOWN), *same, "--out", picture, "--animate", film],
            ["evaluate", out, "--n", str(MEASURED), *same, "--out", figures],
        ]
