"""``pfgm train``: starts or resumes a training run."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ..common.devices import usable_device
from ..training import runs
from ..training.processes import joined
from ..training.run_config import RunConfig
from .options import Output, Progress


@dataclass
class Train:
    """Train a network on the field of your data. Under torchrun its processes train together."""

    out: Output
    """Folder for checkpoints, logs, pictures and config.json, the settings of the run."""
    config: Path | None = None
    """A recipe, or the folder of a run, for the settings that are not given here. By default a
    resumed run takes them from its own folder."""
    resume: bool = False
    """Continue the run in the output folder."""
    resume_from: int | None = None
    """Continue the run from the checkpoint of this step, for example if the newest is damaged."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer counts as lost. An evaluation must take
    less."""
    settings: RunConfig = field(default_factory=RunConfig)
    """What to train, on which data, and how."""
    progress: Progress = True

    def run(self) -> None:
        with joined(usable_device(self.device), self.timeout) as device:
            runs.start(
                self.settings,
                self.out,
                device=device,
                resume=self.resume,
                resume_from=self.resume_from,
                progress=self.progress,
            )


def starting_config(arguments: list[str]) -> RunConfig:
    """The configuration that the options of ``pfgm train`` start from.

    It comes from the recipe, else from the run to resume, else it is the default. Its steps or
    minutes make way for those that are given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", "-o", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-from", "--resume_from")
    parser.add_argument("--steps", "--training.steps")
    parser.add_argument("--minutes", "--training.minutes")
    known, _ = parser.parse_known_args(arguments)
    source = known.config or (known.out if known.resume or known.resume_from else None)
    config = RunConfig() if source is None else RunConfig.load(source)
    if known.steps is None and known.minutes is None:
        return config
    training = dataclasses.replace(config.training, steps=None, minutes=None)
    return dataclasses.replace(config, training=training)
