"""The flow and the network of a training run: new, resumed, from a model, or of a teacher."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.checksums import checksum_of_weights
from ..common.images import is_image
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..networks.registry import NETWORKS, label_count
from ..networks.unet import takes_shape
from ..references import ReferenceSet
from .budget import REFERENCE_BATCH, choose
from .config import Precision, TrainConfig
from .model_files import Loaded
from .processes import Processes
from .run_config import Method, RunConfig, teacher_checksum
from .trainer import Trainer

SIZES = ("width", "multipliers", "blocks", "patch")
# The names of these settings among the arguments of each network.
_PUBLISHED_NAMES = {"width": "nf", "multipliers": "ch_mult", "blocks": "num_res_blocks"}
_SIZE_NAMES: dict[str, dict[str, str]] = {
    "unet": {name: name for name in SIZES},
    "mlp": {"width": "width"},
    "ddpmpp": _PUBLISHED_NAMES,
    "ncsnpp": _PUBLISHED_NAMES,
}
MANY_IMAGES = 20_000
"""From this number on, PFGM++ is the default for images. Measured were 4000 and 60 000."""
_IMAGE_NETWORKS = ("ddpmpp", "ncsnpp")
# Hyper-parameters of a flow that its network has been built for.
_NETWORK_SETTINGS: dict[type[Flow], str] = {PoissonFlow: "gamma", PoissonFlowPP: "sigma_data"}
_TEACHER_SETTINGS = ("method", "D", "flow", "weighting", "network", *SIZES, "fit_levels")
_MOST_VALUES = 1 << 15  # pixels in a batch that is timed: 32 images of 32 × 32, one of 256 × 256


class Model(NamedTuple):
    """What a run trains."""

    config: RunConfig
    """The configuration, with what was chosen in place of what was open."""
    flow: Flow
    network: nn.Module
    notes: tuple[str, ...] = ()
    """Lines of text about them."""
    budget: str = ""
    """Why the network has its size, if minutes chose it."""
    teacher_checksum: str | None = None
    """The checksum of the weights of the teacher, if there is one."""


def new_model(
    config: RunConfig, rows: ReferenceSet, classes: int, device: torch.device, seconds: float | None
) -> Model:
    """The model that the configuration asks for, sized for some seconds unless they are None."""
    model = built_model(config, rows, classes)
    fits = config.network in ("auto", "unet") and takes_shape(model.flow.shape)
    if seconds is None or not fits:
        # No trainings of other networks have been measured; published ones have their own sizes.
        return model
    return _fitting(model, rows, classes, device, seconds)


def built_model(config: RunConfig, rows: ReferenceSet, classes: int) -> Model:
    """The model that the configuration asks for; a resumed run loads its weights into it."""
    config = _with_method(config, rows)
    flow = build_flow(config, rows)
    return Model(config, flow, build_network(config, flow, rows, classes))


def model_from(checkpoint: Loaded, config: RunConfig, rows: ReferenceSet, classes: int) -> Model:
    """The flow of the configuration and data, and the network of the checkpoint ``config.init``.

    The network keeps its size and its scaling, and the flow keeps the hyper-parameters that belong
    to the network. The notes tell how the flow differs from the earlier one.
    """
    earlier, network = checkpoint
    if config.method == "auto":
        method = _method_of(earlier)
        D = earlier.D if method == "pfgm++" else config.D
        config = dataclasses.replace(config, method=method, D=D)
    kept = _NETWORK_SETTINGS[type(earlier)]
    asked, present = _kind(config.method, config.D), _kind(_method_of(earlier), earlier.D)
    of_flow = config
    if asked == present:
        of_flow = dataclasses.replace(config, flow={kept: earlier.config[kept], **config.flow})
    flow = build_flow(of_flow, rows)
    for name, wanted, has in (
        ("the flow", asked, present),
        ("samples of shape", flow.shape, earlier.shape),
        (kept, flow.config.get(kept), earlier.config[kept]),
        *_sizes(config, network, classes),
    ):
        if wanted != has:
            raise ValueError(
                f"init is {config.init}, which has {name} {has}; the settings and the data ask for "
                f"{wanted}."
            )
    notes = (f"starting from the weights in {config.init}", *_changes(flow, earlier))
    return Model(config, flow, network, notes)


def student_of(teacher: Loaded, config: RunConfig, resumed: Path | None) -> Model:
    """The flow and network of the teacher, which a few-step model starts from.

    Args:
        resumed: the folder of a resumed run; ValueError unless it has learnt from these weights.
    """
    checksum = checksum_of_weights(teacher.network.state_dict())
    needed = None if resumed is None else teacher_checksum(resumed)
    if needed not in (None, checksum):
        raise ValueError(
            f"teacher must hold the weights that the run in {resumed} learns from, with the "
            f"checksum {needed}, got {config.teacher}, with {checksum}; or start a new run."
        )
    default = RunConfig()
    ignored = [n for n in _TEACHER_SETTINGS if getattr(config, n) != getattr(default, n)]
    notes = (f"ignored, since the teacher decides: {', '.join(ignored)}",) if ignored else ()
    return Model(config, *teacher, notes, teacher_checksum=checksum)


def build_flow(config: RunConfig, rows: ReferenceSet) -> Flow:
    """The flow that the configuration asks for, with scales from the data."""
    if config.method == "pfgm":
        return PoissonFlow.from_data(rows, **config.flow)
    D = math.inf if config.method == "edm" else config.D
    return PoissonFlowPP.from_data(rows, D=D, **config.flow)


def build_network(config: RunConfig, flow: Flow, rows: ReferenceSet, classes: int) -> nn.Module:
    """The network that the configuration asks for, initialised from its seed."""
    name = config.network
    if name == "auto":
        name = "unet" if takes_shape(flow.shape) else "mlp"
    settings = _size_settings(config, name)
    if config.labels:
        if name in _IMAGE_NETWORKS:
            raise ValueError(f"network must be unet or mlp with labels, got {name!r}.")
        settings["classes"] = classes
    if isinstance(flow, PoissonFlow) and flow.spread is None and name not in _IMAGE_NETWORKS:
        settings["data_std"] = max(rows.rms, 1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return flow.network(name, **settings)


def _with_method(config: RunConfig, rows: ReferenceSet) -> RunConfig:
    """The configuration with a flow in place of auto (docs/which-flow.md).

    PFGM++ for rows of numbers, whose far samples PFGM draws too often, and for many images; PFGM
    for fewer images and for signals.
    """
    if config.method != "auto":
        return config
    many = is_image(rows.shape[1:]) and len(rows) >= MANY_IMAGES
    return dataclasses.replace(config, method="pfgm++" if rows.ndim == 2 or many else "pfgm")


def _method_of(flow: Flow) -> Method:
    """The method that makes a flow of its kind."""
    if not isinstance(flow, PoissonFlowPP):
        return "pfgm"
    return "edm" if math.isinf(flow.D) else "pfgm++"


def _kind(method: str, D: float) -> str:
    return f"pfgm++ with D = {D:g}" if method == "pfgm++" else method


def _size_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The keyword arguments for the size of the network."""
    settings: dict[str, Any] = {}
    for option in SIZES:
        if (value := getattr(config, option)) is None:
            continue
        if option not in _SIZE_NAMES[name]:
            raise ValueError(f"{option} is {value}, but the network is {name!r}, which has none.")
        settings[_SIZE_NAMES[name][option]] = value
    return settings


def _sizes(config: RunConfig, network: nn.Module, classes: int) -> list[tuple[str, Any, Any]]:
    """Name, what is asked for and what the network has, for each setting that is given."""
    name = next(name for name, kind in NETWORKS.items() if type(network) is kind)
    settings: dict[str, Any] = dict(network.config)  # type: ignore[arg-type]
    if name == "denoiser":
        name, settings = settings["network"], settings["config"]
    choices: list[tuple[str, Any, Any]] = [
        ("labels", classes if config.labels else 0, label_count(network))
    ]
    if config.network != "auto":
        choices.append(("network", config.network, name))
    for option in SIZES:
        if (asked := getattr(config, option)) is not None:
            has = settings.get(_SIZE_NAMES.get(name, {}).get(option, ""))
            choices.append((option, asked, tuple(has) if isinstance(has, list) else has))
    return choices


def _changes(flow: Flow, earlier: Flow) -> list[str]:
    changed = []
    for name, value in flow.config.items():
        before = earlier.config.get(name)
        if value != before and isinstance(value, (int, float)) and isinstance(before, (int, float)):
            changed.append(f"{name} {before:.6g} → {value:.6g}")
    return [f"hyper-parameters of the flow that differ: {', '.join(changed)}"] if changed else []


def _fitting(
    model: Model, rows: ReferenceSet, classes: int, device: torch.device, seconds: float
) -> Model:
    """The model with the network and batch that :func:`pfgm.training.budget.choose` finds.

    Settings that are given stay.
    """
    config, flow = model.config, model.flow
    step, precision, why = _reference_step(config, flow, rows, classes, device)
    time = max(seconds, 0.0) / max(step, 1e-9)
    choice = choose(flow.shape, time, patch=config.patch)
    open_sizes = [name for name in SIZES if getattr(config, name) is None]
    sizes: dict[str, Any] = {name: getattr(choice, name, None) for name in open_sizes}
    training = config.training
    batch = training.batch_for(len(rows), Processes().size, choice.batch_size)
    training = dataclasses.replace(training, batch_size=batch, precision=precision)
    config = dataclasses.replace(config, training=training, **sizes)
    network = build_network(config, flow, rows, classes)
    fits = f"{time:.3g} steps of the default network ({step:.2g} s)"
    sized = ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name in SIZES
        if (value := getattr(config, name)) is not None
    )
    reason = (
        f"{training.minutes:g} minutes, the time of {fits}: {sized}, batch {batch}, by a fit to "
        f"{choice.rows} measured trainings" + (f"; {why}" if why else "")
    )
    return model._replace(config=config, network=network, budget=reason)


def _reference_step(
    config: RunConfig, flow: Flow, rows: ReferenceSet, classes: int, device: torch.device
) -> tuple[float, Precision, str]:
    """Seconds of a step of the default network with batches of 32, its precision, and why.

    Of large images fewer are timed, as 32 would take long and much memory.
    """
    default_sizes: dict[str, Any] = dict.fromkeys(SIZES)
    default = dataclasses.replace(config, **default_sizes)
    network = build_network(default, flow, rows, classes).to(device)
    given = config.training
    size = max(min(REFERENCE_BATCH, _MOST_VALUES // math.prod(flow.shape[1:])), 1)
    batch = dataclasses.replace(given, batch_size=None).batch_for(len(rows), Processes().size, size)
    training = TrainConfig(
        steps=1,
        batch_size=batch,
        reference_batch=given.reference_batch,
        accumulate=given.accumulate,
        precision=given.precision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training itself warns
        labels = rows.labels if config.labels else None
        trainer = Trainer(flow, network, rows, training, progress=False, labels=labels)
    seconds = trainer._settle_precision() or trainer._seconds_of_step()
    precision = trainer.config.precision
    return seconds * REFERENCE_BATCH / batch, precision, trainer._chosen_precision
