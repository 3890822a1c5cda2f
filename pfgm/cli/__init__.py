"""The command line: ``pfgm demo | train | sample | evaluate | info``."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import operator
import platform
import sys
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from .. import backends, data
from ..backends import native
from ..common.checks import allocating, check_seed, out_of_memory, usable_device
from ..common.files import output_folder, reserve_standard_descriptors
from ..common.messages import show, unfailing_streams
from ..evaluation import noise_generator, usual_steps
from ..flows.flow import Flow
from ..training import Diverged, TrainConfig, checkpoint, runs
from ..training.processes import ProcessLost, joined
from ..training.runs import RunConfig, Settings
from . import demo
from .evaluate import Evaluate

_SHOWN_PACKAGES = ("torch", "numpy", "triton", "torchdiffeq", "safetensors", "tqdm", "tyro")


@dataclass
class Demo:
    """Train on scikit-learn's bundled digits, sample, measure, draw: a few minutes on a laptop."""

    out: Path = Path("runs/demo")
    """Folder for samples.npy, samples.png, trajectory.png, metrics.json and model.safetensors."""
    steps: int = demo.TRAINING.steps
    """Training steps."""
    seed: int = 0
    """Of training and sampling: the same seed gives the same result."""
    conditional: bool = False
    """Say which digit to draw: each row of samples.png is one."""

    def run(self) -> None:
        demo.run(self.out, steps=self.steps, seed=self.seed, conditional=self.conditional)


@dataclass
class Train:
    """Train a network on the field of your data. Under torchrun its processes train together."""

    out: Path
    """Folder for checkpoints, logs and pictures, and for config.json, which says what was done."""
    config: Path | None = None
    """A recipe, or the folder of a run: where settings come from that are not given here. Resuming,
    they come from the folder itself."""
    resume: bool = False
    """Continue the run in the output folder."""
    resume_from: int | None = None
    """Continue it from the checkpoint of this step, as where the newest one is damaged."""
    device: str = "auto"
    """auto: cuda where there is a GPU, else cpu."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer is given up; more than an evaluation."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    """What to train on what."""
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """How to train."""

    def run(self) -> None:
        config = RunConfig.of(self.settings, self.training)
        with joined(usable_device(self.device), self.timeout) as device:
            runs.start(
                config, self.out, device=device, resume=self.resume, resume_from=self.resume_from
            )


def _train_defaults(arguments: list[str]) -> RunConfig:
    """The settings that a call of train starts from: a recipe's, or those of the run to resume."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-from", "--resume_from")
    known, _ = parser.parse_known_args(arguments)
    source = known.config or (known.out if known.resume or known.resume_from else None)
    return RunConfig() if source is None else RunConfig.load(source)


@dataclass
class Sample:
    """Draw samples from a checkpoint."""

    checkpoint: Path
    """A .safetensors file, or the folder of a run."""
    out: Path
    """A .npy file (float32, n first), or a .png picture of images."""
    n: int = 64
    """How many."""
    solver: Literal["euler", "heun", "multistep", "rk45", "consistency"] = "multistep"
    """How the field lines are followed; consistency is for few-step models."""
    steps: int | None = None
    """Steps of the solver (rk45 chooses its own): 10 unless given, more for samples of few
    values."""
    schedule: Literal["rho", "log"] = "rho"
    """Spacing of the steps."""
    last: float | None = None
    """Level from which the last step goes to the end at once."""
    label: int | None = None
    """What to draw, of a network that was trained with labels; anything unless given."""
    guidance: float | None = None
    """How much to exaggerate the label; 1 is not at all, and anything else takes twice as long."""
    seed: int = 0
    """Of the prior, and of the noise that some solvers add."""
    batch_size: int = 1000
    """Samples at a time."""
    device: str = "auto"
    """auto: cuda where there is a GPU, else cpu."""

    def run(self) -> None:
        if self.out.suffix not in (".npy", ".png"):
            raise ValueError(f"out is {self.out}; allowed are names that end in .npy or .png.")
        if self.out.is_dir():
            raise ValueError(f"out is {self.out}, a folder; allowed is the name of a file.")
        if not (1 <= self.n < 2**63 and 1 <= self.batch_size < 2**63):
            raise ValueError(
                f"n is {self.n} and batch-size {self.batch_size}; allowed are at least 1, below "
                "2^63."
            )
        if self.label is not None and not -(2**63) <= self.label < 2**63:
            raise ValueError(f"label is {self.label}; allowed are the labels of the network.")
        check_seed(self.seed)
        device = usable_device(self.device)
        if notice := checkpoint.check_solver(self.checkpoint, self.solver):
            print(f"pfgm: {notice}", file=sys.stderr)
        flow, network = checkpoint.load(self.checkpoint, device=device)
        if self.out.suffix == ".png" and (len(flow.shape) != 3 or flow.shape[0] not in (1, 3)):
            raise ValueError(
                f"out is {self.out}, but samples of shape {flow.shape} are no images; use a name "
                "that ends in .npy."
            )
        with output_folder(self.out.parent):
            self._draw(flow, network, device)
        print(self.out)

    def _draw(self, flow: Flow, network: nn.Module, device: torch.device) -> None:
        # The prior is drawn at once on the CPU, so that n alone decides where samples begin.
        with allocating(f"n is {self.n}, and so many samples of shape {flow.shape}"):
            prior = flow.prior(self.n, generator=torch.Generator().manual_seed(self.seed))
        generator = noise_generator(self.seed, device)
        steps = usual_steps(flow, self.solver) if self.steps is None else self.steps
        parts = [
            flow.sample(
                network,
                len(part),
                solver=self.solver,
                steps=steps,
                schedule=self.schedule,
                last=self.last,
                condition=self._condition(len(part)),
                guidance=self.guidance,
                generator=generator,
                x_init=part.to(device),
                progress=True,
            ).cpu()
            for part in prior.split(self.batch_size)
        ]
        samples = torch.cat(parts)
        if self.out.suffix == ".npy":
            data.save_array(self.out, samples)
        else:
            from ..plotting import image_grid

            image_grid(samples, self.out)

    def _condition(self, count: int) -> dict[str, Tensor]:
        return {} if self.label is None else {"labels": torch.full((count,), self.label)}


@dataclass
class Info:
    """Show versions, backends and why the others cannot run, build flags and threads."""

    def run(self) -> None:
        packages = ", ".join(f"{name} {_version(name)}" for name in _SHOWN_PACKAGES)
        lines = [
            f"pfgm {_version('pfgm')}, Python {platform.python_version()}, {platform.machine()}",
            f"packages   {packages}",
            f"threads    {torch.get_num_threads()}",
        ]
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for name, (usable, detail) in backends.available(device).items():
                state = detail if usable else f"cannot run: {detail}"
                lines.append(f"{device:10} {name}: {state}")
        show("\n".join([*lines, *native.build_lines()]))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


_COMMANDS: tuple[type, ...] = (Demo, Train, Sample, Evaluate, Info)


def _parse(arguments: list[str]) -> Any:
    commands: list[Any] = []
    for kind in _COMMANDS:
        name, default = kind.__name__.lower(), tyro.MISSING_NONPROP
        if kind is Train and arguments[:1] == [name]:
            start = _train_defaults(arguments[1:])
            default = Train(out=tyro.MISSING, settings=start.settings, training=start.training)
        # By constructor, which leaves it to main() to say what is wrong with a setting.
        subcommand = tyro.conf.subcommand(name, default=default, constructor=kind)
        commands.append(Annotated[Any, subcommand])
    union: Any = functools.reduce(operator.or_, commands)
    return tyro.cli(
        union, prog="pfgm", description="Poisson flow generative models.", args=arguments
    )


def _check_values(arguments: list[str]) -> None:
    """No option takes the empty text, of which a path would make the current folder."""
    for before, argument in pairwise(["", *arguments]):
        name, _, value = argument.partition("=") if "=" in argument else (before, "", argument)
        if name.startswith("--") and not value:
            raise ValueError(f"{name[2:]} is ''; allowed is a text that is not empty.")


_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    backends.Unavailable,
    Diverged,
    ProcessLost,
)


def _told(error: BaseException) -> str:
    """What is said where memory was not enough: what was asked for, or what the allocator says."""
    lines = str(error).splitlines()
    if isinstance(error, MemoryError) and lines:
        return lines[0]
    return (
        f"the memory is not enough for so much at once: {lines[0] if lines else 'no reason given'}"
    )


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **_: Any) -> None:
    """One line, as the command's other messages; of Python's warnings the category too."""
    kind = "" if issubclass(category, UserWarning) else f"{category.__name__}: "
    print(f"pfgm: {kind}{message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0, or 2 after one sentence on what is wrong with the input.

    Where stdout or stderr are closed, what would be said there is dropped, and no work with it.
    """
    reserve_standard_descriptors()
    with unfailing_streams(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> int:
    try:
        _check_values(arguments)
        if arguments == ["--version"]:
            show(f"pfgm {_version('pfgm')}")
        else:
            _parse(arguments).run()
    except _EXPECTED as error:
        print(f"pfgm: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"pfgm: error: {_told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pfgm: interrupted", file=sys.stderr)
        return 130
    return 0
