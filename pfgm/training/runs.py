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
from ..common.checks import usable_device
from ..common.files import StrPath, named_folder, write_atomic
from ..common.messages import say
from ..data import to_unit
from ..datasets import Data, open_data
from ..distillation import Consistency
from ..flows.flow import Flow, check_steps
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..references import ReferenceSet
from .checkpoint import load
from .locks import locked_for_all
from .processes import Processes, reports_process_lost
from .trainer import TrainConfig, Trainer

__all__ = ["RunConfig", "Settings", "start"]

_NAME = "config.json"
_MAY_DIFFER = ("hold", "samples", "shared")
# What the settings are called by each network.
_PUBLISHED = {"width": "nf", "multipliers": "ch_mult", "blocks": "num_res_blocks"}
_OPTIONS: dict[str, dict[str, str]] = {
    "unet": {"width": "width", "multipliers": "multipliers", "blocks": "blocks"},
    "mlp": {"width": "width"},
    "ddpmpp": _PUBLISHED,
    "ncsnpp": _PUBLISHED,
}
_OF_IMAGES = ("ddpmpp", "ncsnpp")
_COMPARED = 10_000  # rows that samples are compared with, at most
_FEWEST = 4  # samples or rows: one more than the neighbours that precision and recall take
_MOST = 10_000_000  # samples
_TOGETHER = 1000  # samples that go through the network at once
_SHOWN, _ROW = 100, 10  # samples in a picture, and in a row of it


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train on what."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, folder:PATH of images, or the path of a .npy, .npz or
    .safetensors file of samples (n, ...): uint8, or floating point (images in [-1, 1])."""
    method: Literal["pfgm", "pfgm++", "edm"] = "pfgm"
    """The flow: one augmented dimension, D of them, or infinitely many (diffusion)."""
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
    """Tell the network what each sample is, where the data know."""
    flips: bool = False
    """Train on mirror images too."""
    hold: Literal["source", "memory", "device"] = "source"
    """Where data are held: as they come (files are read piece by piece), in memory, or on the
    device that trains."""
    shared: bool = False
    """Hold a part of the data in each process; the target is the field of all of them."""
    samples: int = 1000
    """Samples of an evaluation."""
    teacher: str | None = None
    """A .safetensors file or the folder of a run, of which to make a few-step model, with its flow
    and network whatever else is said of them. A third of its steps may do; each takes about four
    times as long."""
    levels: int = 10
    """Levels at which the few-step model is to agree with itself."""

    def __post_init__(self) -> None:
        if self.multipliers is not None:
            object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON has lists
        for name, allowed in (
            ("method", ("pfgm", "pfgm++", "edm")),
            ("network", ("auto", *_OPTIONS)),
            ("hold", ("source", "memory", "device")),
        ):
            if (chosen := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {chosen!r}; allowed are {', '.join(allowed)}.")
        if not _FEWEST <= self.samples <= _MOST:
            raise ValueError(f"samples is {self.samples}; allowed are {_FEWEST} to {_MOST}.")
        if not self.D > 0:
            raise ValueError(f"D is {self.D}; allowed is any positive number.")
        check_steps("levels", self.levels)
        if self.levels < 2:
            raise ValueError(f"levels is {self.levels}; allowed is at least 2.")


@dataclasses.dataclass(frozen=True)
class RunConfig(Settings):
    """What to train on what, and how. JSON-able: a recipe is one of these in a file."""

    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How to train."""

    @classmethod
    def of(cls, settings: Settings, training: TrainConfig) -> RunConfig:
        """Both together."""
        named = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)}
        return cls(**named, training=training)

    @property
    def settings(self) -> Settings:
        """All but how to train."""
        return Settings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)})

    def save(self, path: StrPath) -> None:
        """Writes the configuration as JSON, whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_atomic(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: StrPath) -> RunConfig:
        """The configuration in a file, or in the folder of a run.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not one, or names settings that do not exist.
        """
        path = Path(path)
        if path.is_dir():
            path = path / _NAME
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
    report: Callable[[str], None] = say,
) -> nn.Module:
    """Trains as configured, with everything that comes of it in a folder.

    config.json; checkpoints; log.csv, evaluations.csv and logs for TensorBoard; and each
    ``evaluate_every`` steps a picture samples-*.png, where samples are images.

    Args:
        config: what to do. Resuming, it may differ from that in the folder in what
            :meth:`pfgm.training.Trainer.resume` allows.
        folder: created where missing, and locked: no other run may be at work there. A start that
            fails leaves no empty new folder.
        device: to train on.
        resume: continue the run that is in the folder.
        resume_from: continue it from the checkpoint of this step, not from the newest one.
        progress: show progress bars.
        report: takes lines of text on what is done.

    Returns:
        The network with averaged weights.

    Raises:
        ValueError: the folder holds a run and resume is False, or resuming, a run with other
            settings; the data or settings do not do.
        FolderInUse: another run is at work in the folder; nothing in it has been touched.
        OSError: the folder cannot be written, the data cannot be read.
        Diverged, ProcessLost, KeyboardInterrupt, Terminated: as
            :meth:`pfgm.training.Trainer.train`.
    """
    device = usable_device(str(device))
    folder = named_folder(folder)
    processes = Processes()
    resume = resume or resume_from is not None
    if config.shared and processes.size == 1:
        raise ValueError("shared is True, but there is one process; start several with torchrun.")
    if config.shared and config.labels:
        raise ValueError(
            "shared and labels are both True, but the references of one label cannot be shared; "
            "choose one of them."
        )
    with reports_process_lost(processes), locked_for_all(folder, processes):
        if resume:
            _check_settings(config, folder)
        elif (folder / "latest.json").exists():
            raise ValueError(
                f"out is {folder}, which holds a run already; add --resume to continue it, or "
                "choose another folder."
            )
        return _run(config, folder, device, resume, resume_from, processes, progress, report)


def _check_settings(config: RunConfig, folder: Path) -> None:
    """Resuming, only what does not change the training may differ from what the folder says."""
    saved = RunConfig.load(folder)
    for field in dataclasses.fields(Settings):
        value, before = getattr(config, field.name), getattr(saved, field.name)
        if field.name not in _MAY_DIFFER and value != before:
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
        config.save(folder / _NAME)
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
    settings = _options(config, name, flow)
    if config.labels:
        settings["classes"] = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        if isinstance(flow, PoissonFlowPP):
            inner = {"network": name, "config": settings, "sigma_data": flow.sigma_data}
            return networks.build("denoiser", inner)
        if name not in _OF_IMAGES:
            settings["data_std"] = max(rows.rms, 1e-6)
            if isinstance(flow, PoissonFlow):
                settings |= flow.scaling
        return networks.build(name, settings)


def _options(config: RunConfig, name: str, flow: Flow) -> dict[str, Any]:
    """The network's keyword arguments that say how large it is."""
    settings: dict[str, Any] = {"shape": flow.shape}
    if name in _OF_IMAGES:
        if len(flow.shape) != 3 or flow.shape[1] != flow.shape[2] or config.labels:
            raise ValueError(
                f"network is {name!r}; allowed for it are square images without labels, not "
                f"{flow.shape}{' with labels' if config.labels else ''}."
            )
        settings = {"channels": flow.shape[0], "resolution": flow.shape[1]}
    for option in ("width", "multipliers", "blocks"):
        if (value := getattr(config, option)) is None:
            continue
        if option not in _OPTIONS[name]:
            raise ValueError(f"{option} is {value}, but the network is an {name}, which has none.")
        settings[_OPTIONS[name][option]] = value
    return settings


class _Evaluation:
    """Draws samples, measures them against held-out data and shows some."""

    def __init__(
        self, config: RunConfig, flow: Flow, data: Data, folder: Path, device: torch.device
    ) -> None:
        self._flow, self._folder, self._device = flow, folder, device
        self._count, self._seed = config.samples, config.training.seed
        self._classes = data.classes if config.labels else 0
        self._sampler: dict[str, Any] = {}
        if config.teacher is not None:
            self._sampler = {"solver": "consistency", "steps": 1}
        against = data.held_out or data.train
        rows = torch.arange(len(against))
        if len(rows) < _FEWEST:
            raise ValueError(
                f"{config.data} has {len(rows)} rows to compare samples with; at least {_FEWEST} "
                "are needed."
            )
        if len(rows) > _COMPARED:
            generator = torch.Generator().manual_seed(0)
            rows = against.draw(_COMPARED, generator=generator)
        self._rows, self._against = rows, against

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        samples = self._samples(network)
        if len(self._flow.shape) == 3 and self._flow.shape[0] in (1, 3):
            from ..plotting import image_grid

            image_grid(samples[:_SHOWN], self._folder / f"samples-{step:08d}.png")
            samples = samples.clamp(-1, 1)
        against = to_unit(self._against[self._rows].cpu())
        found = metrics.precision_recall(samples, against)
        return {
            "frechet_distance": metrics.frechet_distance(samples, against),
            "precision": found.precision,
            "recall": found.recall,
        }

    def _samples(self, network: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        prior = self._flow.prior(self._count, generator=generator)
        labels = torch.arange(self._count) // _ROW % max(self._classes, 1)
        parts = []
        for x, own in zip(prior.split(_TOGETHER), labels.split(_TOGETHER), strict=True):
            condition = {"labels": own.to(self._device)} if self._classes else None
            x = x.to(self._device)
            options = {"x_init": x, "condition": condition, **self._sampler}
            parts.append(self._flow.sample(network, len(x), **options).cpu())
        return torch.cat(parts)
