"""The command line: ``pfgm demo | train | sample | info``."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from . import backends, checkpoint, data, demo, networks
from .backends import native
from .files import check_folder
from .flow import PoissonFlow
from .training import Diverged, TrainConfig, Trainer

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
    """Train a network on the field of your data."""

    data: str
    """"digits", or a .npy, .npz or .safetensors file of samples (n, ...): uint8, or floating point
    (images in [-1, 1])."""
    out: Path
    """Folder for checkpoints and TensorBoard logs."""
    network: Literal["auto", "unet", "mlp"] = "auto"
    """auto: unet for images of at least 4 x 4, else mlp."""
    width: int | None = None
    """Width of the network; its own default unless given."""
    resume: bool = False
    """Continue the run in the output folder."""
    device: str = "auto"
    """auto: cuda where there is a GPU, else cpu."""
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """How to train."""

    def run(self) -> None:
        samples = _load_samples(self.data)
        check_folder(self.out)
        if not self.resume and (self.out / "latest.json").exists():
            raise ValueError(
                f"out is {self.out}, which holds a run already; add --resume to continue it, or "
                "choose another folder."
            )
        flow = PoissonFlow.from_data(samples)
        network = self._network(samples).to(_device(self.device))
        trainer = Trainer(flow, network, samples, self.training, folder=self.out)
        if self.resume:
            print(f"resuming at step {trainer.resume()}")
        trainer.train()
        print(f"checkpoint: {self.out}")

    def _network(self, samples: Tensor) -> networks.FieldNetwork:
        shape = tuple(samples.shape[1:])
        name = self.network
        if name == "auto":
            name = "unet" if len(shape) == 3 and min(shape[1:]) >= 4 else "mlp"
        some = data.to_unit(samples[:10_000])
        config = {"shape": shape, "data_std": max(float(some.square().mean().sqrt()), 1e-6)}
        if self.width is not None:
            config["width"] = self.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return networks.build(name, config)


@dataclass
class Sample:
    """Draw samples from a checkpoint."""

    checkpoint: Path
    """A .safetensors file, or the folder of a run."""
    out: Path
    """A .npy file (float32, n first), or a .png picture of images."""
    n: int = 64
    """How many."""
    solver: Literal["euler", "heun", "multistep", "rk45"] = "multistep"
    """How the field lines are followed."""
    steps: int = 10
    """Steps of the solver (rk45 chooses its own)."""
    schedule: Literal["rho", "log"] = "rho"
    """Spacing of the steps."""
    last: float | None = None
    """Level from which the last step goes to the end at once."""
    label: int | None = None
    """What to draw, of a network that was trained with labels; anything unless given."""
    guidance: float | None = None
    """How much to exaggerate the label; 1 is not at all, and anything else takes twice as long."""
    seed: int = 0
    """Of the prior."""
    batch_size: int = 1000
    """Samples at a time."""
    device: str = "auto"
    """auto: cuda where there is a GPU, else cpu."""

    def run(self) -> None:
        if self.out.suffix not in (".npy", ".png"):
            raise ValueError(f"out is {self.out}; allowed are names that end in .npy or .png.")
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(
                f"n is {self.n} and batch-size {self.batch_size}; allowed are at least 1."
            )
        device = _device(self.device)
        flow, network = checkpoint.load(self.checkpoint, device=device)
        if self.out.suffix == ".png" and (len(flow.shape) != 3 or flow.shape[0] not in (1, 3)):
            raise ValueError(
                f"out is {self.out}, but samples of shape {flow.shape} are no images; use a name "
                "that ends in .npy."
            )
        check_folder(self.out.parent)
        # The prior is drawn at once on the CPU, so that n alone decides what is sampled.
        prior = flow.prior(self.n, generator=torch.Generator().manual_seed(self.seed))
        parts = [
            flow.sample(
                network,
                len(part),
                solver=self.solver,
                steps=self.steps,
                schedule=self.schedule,
                last=self.last,
                condition=self._condition(len(part)),
                guidance=self.guidance,
                x_init=part.to(device),
                progress=True,
            ).cpu()
            for part in prior.split(self.batch_size)
        ]
        samples = torch.cat(parts)
        if self.out.suffix == ".npy":
            data.save_array(self.out, samples)
        else:
            from .plotting import image_grid

            image_grid(samples, self.out)
        print(self.out)

    def _condition(self, count: int) -> dict[str, Tensor]:
        return {} if self.label is None else {"labels": torch.full((count,), self.label)}


@dataclass
class Info:
    """Show versions, backends and why the others cannot run, build flags and threads."""

    def run(self) -> None:
        print(f"pfgm {_version('pfgm')}, Python {platform.python_version()}, {platform.machine()}")
        print("packages  ", ", ".join(f"{name} {_version(name)}" for name in _SHOWN_PACKAGES))
        print(f"threads    {torch.get_num_threads()}")
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for name, (usable, detail) in backends.available(device).items():
                print(f"{device:10} {name}: {detail if usable else f'cannot run: {detail}'}")
        for line in native.build_lines():
            print(line)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here: {reason}") from error
    return device


def _load_samples(source: str) -> Tensor:
    if source == "digits":
        return data.digits().train
    samples = data.load_array(source)
    if samples.ndim == 3:  # grey images
        return samples[:, None]
    if samples.ndim == 4 and samples.shape[3] in (1, 3) and samples.shape[1] not in (1, 3):
        return samples.permute(0, 3, 1, 2).contiguous()
    return samples


_COMMANDS: tuple[type, ...] = (Demo, Train, Sample, Info)


def _parse(arguments: list[str] | None) -> Demo | Train | Sample | Info:
    commands: dict[str, Callable[..., Any]] = {c.__name__.lower(): c for c in _COMMANDS}
    command: Demo | Train | Sample | Info = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="pfgm",
        description="Poisson flow generative models.",
        args=arguments,
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0, or 2 after one sentence on what is wrong with the input."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"pfgm {_version('pfgm')}")
        return 0
    try:
        _parse(arguments).run()
    except (ValueError, TypeError, OSError, ImportError, backends.Unavailable, Diverged) as error:
        print(f"pfgm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pfgm: interrupted", file=sys.stderr)
        return 130
    return 0
