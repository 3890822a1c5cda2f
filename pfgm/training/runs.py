"""Training runs from one configuration, which is saved beside their checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import metrics, networks
from ..common.checks import check_choice, usable_device
from ..common.files import StrPath, folder_path, write_atomic
from ..common.messages import print_notice
from ..data import to_unit
from ..datasets import Data, open_data
from ..distillation import Consistency
from ..flows.batches import draw_prior, sample_in_batches
from ..flows.flow import Flow, check_steps
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..references import ReferenceSet
from .checkpoint import load
from .locks import claimed
from .processes import Processes, lost
from .trainer import TrainConfig, Trainer

__all__ = ["RunConfig", "Settings", "start"]

_CONFIG_FILE = "config.json"
_CHANGEABLE = ("hold", "samples", "shared")  # settings that a resumed run may change
_MIN_SAMPLES = 4  # and rows of data: each needs 3 neighbours for precision and recall
_MAX_SAMPLES = 10_000_000
_MAX_COMPARED_ROWS = 10_000  # of the data, for an evaluation
_SAMPLE_BATCH = 1000
_PICTURE_SAMPLES, _PICTURE_ROW = 100, 10  # in all, and in a row
# The names of width, multipliers and blocks among the arguments of each network.
_PUBLISHED = {"width": "nf", "multipliers": "ch_mult", "blocks": "num_res_blocks"}
_SIZE_NAMES: dict[str, dict[str, str]] = {
    "unet": {"width": "width", "multipliers": "multipliers", "blocks": "blocks"},
    "mlp": {"width": "width"},
    "ddpmpp": _PUBLISHED,
    "ncsnpp": _PUBLISHED,
}
_IMAGE_NETWORKS = ("ddpmpp", "ncsnpp")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train on what."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, folder:PATH of images, or the path of a .npy, .npz or
    .safetensors file of samples (n, ...): uint8, or floating point (images in [-1, 1])."""
    method: Literal["pfgm", "pfgm++", "edm"] = "pfgm"
    """The flow: with one augmented dimension, with D, or with infinitely many (diffusion)."""
    D: float = 128.0
    """Augmented dimensions of pfgm++."""
    flow: dict[str, float] = dataclasses.field(default_factory=dict)
    """Hyper-parameters of the flow in place of those that follow from the data, such as M 291."""
    network: Literal["auto", "unet", "mlp", "ddpmpp", "ncsnpp"] = "auto"
    """auto: unet for images of at least 4 x 4, else mlp. ddpmpp and ncsnpp are the published ones,
    for square images."""
    width: int | None = None
    """Width of the network; its own default unless given."""
    multipliers: tuple[int, ...] | None = None
    """Channels of each level, finest first, in units of the width; not of the mlp."""
    blocks: int | None = None
    """Residual blocks of a level; not of the mlp."""
    labels: bool = False
    """Tell the network the label of each sample, for data with labels."""
    flips: bool = False
    """Train on mirror images too."""
    hold: Literal["source", "memory", "device"] = "source"
    """Where data are held: at their source (files are read piece by piece), in memory, or on the
    device that trains."""
    shared: bool = False
    """Hold a part of the data in each process; the target is the field of all of them."""
    samples: int = 1000
    """Samples of an evaluation."""
    teacher: str | None = None
    """A .safetensors file or the folder of a run to distill into a few-step model. Its flow and
    network are used, and other settings of them are ignored. A third of its training steps may do;
    each takes about four times as long."""
    levels: int = 10
    """Noise levels at which the few-step model is made consistent."""

    def __post_init__(self) -> None:
        if self.multipliers is not None:
            object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON has lists
        check_choice("method", self.method, ("pfgm", "pfgm++", "edm"))
        check_choice("network", self.network, ("auto", *_SIZE_NAMES))
        check_choice("hold", self.hold, ("source", "memory", "device"))
        if not _MIN_SAMPLES <= self.samples <= _MAX_SAMPLES:
            raise ValueError(
                f"samples is {self.samples}; allowed are {_MIN_SAMPLES} to {_MAX_SAMPLES}."
            )
        if not self.D > 0:
            raise ValueError(f"D is {self.D}; allowed is any positive number.")
        check_steps("levels", self.levels)
        if self.levels < 2:
            raise ValueError(f"levels is {self.levels}; allowed is at least 2.")


@dataclasses.dataclass(frozen=True)
class RunConfig(Settings):
    """What to train on what, and how. A recipe is a JSON file of one."""

    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How to train."""

    @classmethod
    def of(cls, settings: Settings, training: TrainConfig) -> RunConfig:
        """The configuration of these settings."""
        named = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)}
        return cls(**named, training=training)

    @property
    def settings(self) -> Settings:
        """The settings without the training."""
        return Settings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)})

    def save(self, path: StrPath) -> None:
        """Writes the configuration as JSON. If that fails, ``path`` is left as it was."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_atomic(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: StrPath) -> RunConfig:
        """The configuration in a file, or in the folder of a run.

        Raises:
            FileNotFoundError: there is no configuration.
            ValueError: the file is no configuration, or names settings that do not exist.
        """
        path = Path(path)
        if path.is_dir():
            path = path / _CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration at {path}.")
        try:
            content = json.loads(path.read_text())
            _check_names(content, cls)
            training = content.pop("training", {})
            _check_names(training, TrainConfig)
            return cls(**content, training=TrainConfig(**training))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def _check_names(content: Any, kind: type) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} where settings should be")
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(content.keys() - known):
        raise ValueError(
            f"there is no setting {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )


def start(
    config: RunConfig,
    folder: StrPath,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    resume_from: int | None = None,
    progress: bool = True,
    report: Callable[[str], None] = print_notice,
) -> nn.Module:
    """Trains as configured and writes the results into a folder.

    These are config.json, checkpoints, log.csv, evaluations.csv and logs for TensorBoard. For
    images there is also a picture samples-*.png for every ``evaluate_every`` steps.

    Args:
        config: what to train. A resumed run may change only what
            :meth:`pfgm.training.Trainer.resume` allows.
        folder: the folder, which is created if it is missing, and locked for this run. If the
            start fails, an empty new folder is removed.
        device: the device to train on.
        resume: continue the run in the folder.
        resume_from: continue the run from the checkpoint of this step, not from the newest one.
        progress: show progress bars.
        report: called with each line of text about the progress.

    Returns:
        The network with averaged weights.

    Raises:
        ValueError: the folder holds a run and resume is False; the run to resume has other
            settings; or the data or settings are not usable.
        FolderInUse: another run uses the folder. Nothing in it has been changed.
        OSError: the folder cannot be written, or the data cannot be read.
        Diverged, ProcessLost, KeyboardInterrupt, Terminated: as for
            :meth:`pfgm.training.Trainer.train`.
    """
    device = usable_device(str(device))
    folder = folder_path(folder)
    processes = Processes()
    resume = resume or resume_from is not None
    if config.shared and processes.size == 1:
        raise ValueError("shared is True, but there is one process; start several with torchrun.")
    if config.shared and config.labels:
        raise ValueError(
            "shared and labels are both True, but the references of one label cannot be shared; "
            "choose one of them."
        )
    with lost(processes), claimed(folder, processes):
        if resume:
            _check_settings(config, folder)
        elif (folder / "latest.json").exists():
            raise ValueError(
                f"out is {folder}, which holds a run already; add --resume to continue it, or "
                "choose another folder."
            )
        return _run(config, folder, device, resume, resume_from, processes, progress, report)


def _check_settings(config: RunConfig, folder: Path) -> None:
    """Raises ValueError if a setting that changes the training differs from the run's."""
    saved = RunConfig.load(folder)
    for field in dataclasses.fields(Settings):
        value, before = getattr(config, field.name), getattr(saved, field.name)
        if field.name not in _CHANGEABLE and value != before:
            raise ValueError(f"{field.name} is {value!r}; the run in {folder} has {before!r}.")


def _run(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    resume: bool,
    resume_from: int | None,
    processes: Processes,
    progress: bool,
    report: Callable[[str], None],
) -> nn.Module:
    data = open_data(config.data, progress=progress and processes.leads)
    if config.labels and data.classes == 0:
        raise ValueError(f"labels is True, but {config.data} has no labels.")
    rows = _held(data.train, config, device)
    training, loss = config.training, None
    if config.teacher is None:
        flow = _flow(config, rows)
        network = _network(config, flow, rows, data.classes).to(device)
    else:
        flow, network = load(config.teacher, device=device)
        loss = Consistency(flow, network, steps=config.levels).loss
        training = dataclasses.replace(training, references=0)
    trainer = Trainer(
        flow,
        network,
        rows,
        training,
        folder=folder,
        progress=progress,
        labels=rows.labels if config.labels else None,
        evaluate=_Evaluation(config, flow, data, folder, device) if processes.leads else None,
        loss=loss,
        distilled=config.teacher is not None,
    )
    if resume:
        step = trainer.resume(resume_from)
        if resume_from is not None and step >= training.steps:
            raise ValueError(
                f"steps is {training.steps}, but the checkpoint to continue from is of step "
                f"{step}; allowed are more steps than that."
            )
        if processes.leads:
            report(f"resuming at step {step}")
    if processes.leads:
        config.save(folder / _CONFIG_FILE)
    averaged = trainer.train()
    if processes.leads:
        report(f"checkpoint: {folder}")
    return averaged


def _held(rows: ReferenceSet, config: RunConfig, device: torch.device) -> ReferenceSet:
    if config.flips:
        rows = rows.flipped()
    if config.shared:
        rows = rows.shard()
    if config.hold == "source":
        return rows
    return rows.to(device if config.hold == "device" else None)


def _flow(config: RunConfig, rows: ReferenceSet) -> Flow:
    if config.method == "pfgm":
        return PoissonFlow.from_data(rows, **config.flow)
    D = math.inf if config.method == "edm" else config.D
    return PoissonFlowPP.from_data(rows, D=D, **config.flow)


def _network(config: RunConfig, flow: Flow, rows: ReferenceSet, classes: int) -> nn.Module:
    name = config.network
    if name == "auto":
        name = "unet" if len(flow.shape) == 3 and min(flow.shape[1:]) >= 4 else "mlp"
    settings = _size_settings(config, name, flow)
    if config.labels:
        settings["classes"] = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        if isinstance(flow, PoissonFlowPP):
            inner = {"network": name, "config": settings, "sigma_data": flow.sigma_data}
            return networks.build("denoiser", inner)
        if name not in _IMAGE_NETWORKS:
            settings["data_std"] = max(rows.rms, 1e-6)
            if isinstance(flow, PoissonFlow):
                settings |= flow.scaling
        return networks.build(name, settings)


def _size_settings(config: RunConfig, name: str, flow: Flow) -> dict[str, Any]:
    """The keyword arguments for the size of the network."""
    settings: dict[str, Any] = {"shape": flow.shape}
    if name in _IMAGE_NETWORKS:
        if len(flow.shape) != 3 or flow.shape[1] != flow.shape[2] or config.labels:
            raise ValueError(
                f"network is {name!r}; allowed for it are square images without labels, not "
                f"{flow.shape}{' with labels' if config.labels else ''}."
            )
        settings = {"channels": flow.shape[0], "resolution": flow.shape[1]}
    for option in ("width", "multipliers", "blocks"):
        if (value := getattr(config, option)) is None:
            continue
        if option not in _SIZE_NAMES[name]:
            raise ValueError(f"{option} is {value}, but the network is an {name}, which has none.")
        settings[_SIZE_NAMES[name][option]] = value
    return settings


class _Evaluation:
    """Draws samples, compares them with held-out data and draws a picture of some."""

    def __init__(
        self, config: RunConfig, flow: Flow, data: Data, folder: Path, device: torch.device
    ) -> None:
        self._flow, self._folder, self._device = flow, folder, device
        self._count, self._seed = config.samples, config.training.seed
        self._classes = data.classes if config.labels else 0
        self._solving: dict[str, Any] = {}
        if config.teacher is not None:
            self._solving = {"solver": "consistency", "steps": 1}
        against = data.held_out or data.train
        rows = torch.arange(len(against))
        if len(rows) < _MIN_SAMPLES:
            raise ValueError(
                f"{config.data} has {len(rows)} rows to compare samples with; at least "
                f"{_MIN_SAMPLES} are needed."
            )
        if len(rows) > _MAX_COMPARED_ROWS:
            generator = torch.Generator().manual_seed(0)
            rows = against.draw(_MAX_COMPARED_ROWS, generator=generator)
        self._rows, self._against = rows, against

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        samples = self._samples(network)
        if len(self._flow.shape) == 3 and self._flow.shape[0] in (1, 3):
            from ..plotting import image_grid

            image_grid(samples[:_PICTURE_SAMPLES], self._folder / f"samples-{step:08d}.png")
            samples = samples.clamp(-1, 1)
        against = to_unit(self._against[self._rows].cpu())
        precision, recall = metrics.precision_recall(samples, against)
        return {
            "frechet_distance": metrics.frechet_distance(samples, against),
            "precision": precision,
            "recall": recall,
        }

    def _samples(self, network: nn.Module) -> Tensor:
        numbers = torch.arange(self._count)
        samples, _ = sample_in_batches(
            self._flow,
            network,
            draw_prior(self._flow, self._count, self._seed),
            batch_size=_SAMPLE_BATCH,
            device=self._device,
            labels=numbers // _PICTURE_ROW % self._classes if self._classes else None,
            **self._solving,
        )
        return samples
