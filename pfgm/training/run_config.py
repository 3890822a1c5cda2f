"""The configuration of a training run: the model, the data and the training."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

from ..common.checks import check_bool, check_choice
from ..common.files import StrPath, absolute_path, write_json
from ..common.hints import hint
from ..common.numbers import as_number, int_tuple, is_number, whole
from ..common.old_names import with_present_names
from ..common.versions import versions
from ..data.opening import Layout, Range, absolute_source, takes_layout
from ..flows.fitting import check_fitted_steps
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..flows.sampling import MOST_STEPS
from ..pretrained import PRETRAINED
from .config import TrainConfig

CONFIG_FILE = "config.json"
_DEFAULT_D = 128.0
_DIMENSIONS = {"pfgm": 1.0, "edm": math.inf}  # D of each method that has only one
_RECORDS = ("versions", "teacher_checksum")  # entries of config.json that are not settings
MIN_SAMPLES = 4  # and rows of data: precision and recall need 3 neighbours of each
_MAX_SAMPLES = 10_000_000

Method = Literal["auto", "pfgm", "pfgm++", "edm"]
Network = Literal["auto", "unet", "mlp", "ddpmpp", "ncsnpp"]
Place = Literal["source", "memory", "device"]
Weighting = Literal["auto", "balanced", "published"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What to train, on which data, and how. A recipe is a RunConfig as a JSON file."""

    data: str = "digits"
    """avatars, digits, fashion-mnist, cifar10, folder:PATH of images, the path of a .zip archive of
    images, of a .npy, .npz or .safetensors file of samples (n, ...): uint8, or floating point
    (images in [-1, 1], or see range), or of a .csv file, a table of numbers and texts."""
    range: Range | None = None
    """The values LOW HIGH of floating-point data that stand for black and white, such as 0 255 or
    0 1; they become -1 and 1. By default the data are in [-1, 1] already."""
    layout: Layout = "auto"
    """What arrays (n, H, W) and (n, H, W, C) are. images: grey images, and images with their
    channels last. as-is: nothing is changed, as for signals. auto: bytes are images, other numbers
    stay as they are."""
    resize: int | None = None
    """Height and width to which the central square of each image is scaled, for folders and
    archives of images."""
    label_column: str | None = None
    """The column of a table, of texts or integers, that holds the labels. By default with --labels
    the one named labels, label or y. Without --labels all columns are learned."""
    drop_missing: bool = False
    """Leave out the rows of a table in which a value is missing."""
    drop_columns: tuple[str, ...] = ()
    """The names of columns of a table to leave out."""
    header: bool = True
    """Whether a .csv file begins with a line of names; without it the columns are x0, x1, ..."""
    method: Method = "auto"
    """The flow: pfgm has one augmented dimension, pfgm++ has D, edm infinitely many (diffusion).
    auto: pfgm++ for rows of numbers (tables and points) and for 20 000 images and more, pfgm for
    fewer images and for signals. Settings of one flow alone choose that flow: D takes pfgm++, flow
    and weighting take pfgm."""
    D: float = _DEFAULT_D
    """Augmented dimensions of pfgm++."""
    flow: dict[str, float] = dataclasses.field(default_factory=dict)
    """Hyper-parameters of the flow, such as M 291, that replace those from the data."""
    weighting: Weighting = "auto"
    """Weights of the levels in the loss of pfgm. auto: balanced for unet and mlp, published for the
    published networks."""
    network: Network = "auto"
    """auto: unet for images of at least 4 x 4 and signals (C, L) of at least 4 values, else mlp.
    ddpmpp and ncsnpp are the published ones, for square images."""
    width: int | None = None
    """Width of the network; the network's default unless given."""
    multipliers: tuple[int, ...] | None = None
    """Channels at each resolution, finest first, in units of the width; not for mlp."""
    blocks: int | None = None
    """Residual blocks at each resolution; not for mlp."""
    patch: int | None = None
    """Length of the patches of values that the unet works on; a divisor of the axes."""
    labels: bool = False
    """Train with the label of each sample, for data with labels, such as folders of images with a
    subfolder for each class."""
    flips: bool = False
    """Train on mirror images too, for data that are images."""
    hold: Place = "source"
    """Where data are held: at their source (files are read in chunks), in memory, or on the
    device that trains."""
    shared: bool = False
    """Hold a part of the data in each process. The target is the field of all data."""
    fit_levels: tuple[int, ...] = ()
    """Numbers of solver steps for which levels are fitted to the data before training. Sampling
    with multistep and one of these numbers uses them. A fit takes seconds for small images and many
    minutes for large ones, in proportion to the square of the steps."""
    samples: int = 1000
    """Number of samples of an evaluation."""
    init: str | None = None
    """A model, as pfgm.load reads it, whose weights a new run starts with. The network keeps its
    size; the flow must be of the same kind, and follows the new data."""
    teacher: str | None = None
    """A model, as pfgm.load reads it, to distill into a few-step model. Its flow and network are
    used, and other settings of them are ignored. About a third of the teacher's training steps
    suffice; each takes about four times as long."""
    student_levels: int = 10
    """Noise levels at which the few-step model is made consistent."""
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How to train."""

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_flow()
        whole("samples", self.samples, MIN_SAMPLES, _MAX_SAMPLES)
        whole("student_levels", self.student_levels, 2, MOST_STEPS)
        if self.init is not None and self.teacher is not None:
            raise ValueError("only one of init and teacher may be given, got both.")
        for steps in self.fit_levels:
            check_fitted_steps("fit_levels", steps)
        if self.fit_levels and self.teacher is not None:
            raise ValueError(
                "only one of fit_levels and teacher may be given, got both: the solver of few-step "
                "models, consistency, takes no fitted levels."
            )

    def _check_kinds(self) -> None:
        """Raises ValueError unless each setting is of its kind; lists of JSON become tuples."""
        if self.range is not None:
            _check_range(self.range)
            object.__setattr__(self, "range", tuple(self.range))  # JSON has lists
        for name in ("width", "multipliers", "blocks", "patch", "resize"):
            if (value := getattr(self, name)) is not None:
                checked = int_tuple if name == "multipliers" else whole
                object.__setattr__(self, name, checked(name, value))
        if not isinstance(self.fit_levels, (list, tuple)):
            raise ValueError(
                f"fit_levels must be a list of numbers of steps, got {self.fit_levels!r}."
            )
        object.__setattr__(self, "fit_levels", tuple(self.fit_levels))
        for name in ("data", "init", "teacher"):
            value, optional = getattr(self, name), name != "data"
            if not isinstance(value, (str, os.PathLike)) and not (optional and value is None):
                raise ValueError(f"{name} must be a text, a name or a path, got {value!r}.")
            if optional and value is not None and not os.fspath(value):
                raise ValueError(f"{name} must name a file or a folder, got ''; leave it out.")
        names: object = self.drop_columns  # from a recipe, anything
        if not isinstance(names, (list, tuple)) or not all(isinstance(each, str) for each in names):
            raise ValueError(f"drop_columns must be a list of names, got {names!r}.")
        object.__setattr__(self, "drop_columns", tuple(self.drop_columns))
        if not isinstance(self.flow, dict):
            raise ValueError(
                f"flow must be a dict of hyper-parameters and their values, got {self.flow!r}."
            )
        if self.label_column is not None and not isinstance(self.label_column, str):
            raise ValueError(f"label_column must be a text, got {self.label_column!r}.")
        if self.label_column is not None:
            object.__setattr__(self, "labels", True)
        for name in ("labels", "flips", "shared", "drop_missing", "header"):
            check_bool(name, getattr(self, name))
        choices = {"method": Method, "network": Network, "layout": Layout, "hold": Place}
        for name, allowed in {**choices, "weighting": Weighting}.items():
            check_choice(name, getattr(self, name), get_args(allowed))

    def _check_flow(self) -> None:
        """Raises ValueError unless the flow has these settings, which may choose it.

        With a teacher they are ignored.
        """
        if self.method == "auto" and self.teacher is None:
            if as_number(self.D) != _DEFAULT_D:
                object.__setattr__(self, "method", "pfgm++")
            elif self.flow or self.weighting != "auto":
                object.__setattr__(self, "method", "pfgm")
        if self.teacher is None:
            _check_hyper_parameters(self.flow, self.method)
        if self.weighting != "auto" and self.method not in ("auto", "pfgm"):
            raise ValueError(
                f"weighting must be auto with method {self.method!r}, whose loss has one weight, "
                f"got {self.weighting!r}."
            )
        if not as_number(self.D) > 0:
            raise ValueError(f"D must be a positive number, got {self.D!r}.")
        object.__setattr__(self, "D", as_number(self.D))
        own = _DIMENSIONS.get(self.method, self.D)
        if self.D not in (_DEFAULT_D, own) and self.teacher is None:
            raise ValueError(
                f"method must be pfgm++ with D = {self.D:g}, got {self.method!r}; pfgm has one "
                "augmented dimension and edm infinitely many."
            )

    @property
    def reading(self) -> dict[str, Any]:
        """How :func:`pfgm.data.open` reads the data, as keyword arguments."""
        return {
            "value_range": self.range,
            "layout": self.layout,
            "resize": self.resize,
            "label_column": self.label_column if self.labels else "",
            "drop_missing": self.drop_missing,
            "drop_columns": self.drop_columns,
            "header": self.header,
        }

    @property
    def absolute(self) -> RunConfig:
        """The configuration with absolute paths in place of those from the current folder."""
        init, teacher = (
            model if model is None or model in PRETRAINED else str(absolute_path(model))
            for model in (self.init, self.teacher)
        )
        return dataclasses.replace(
            self, data=absolute_source(self.data), init=init, teacher=teacher
        )

    def save(self, path: StrPath, *, teacher_checksum: str | None = None) -> None:
        """Writes the configuration as JSON, with the versions of pfgm and torch.

        If that fails, ``path`` is left as it was. :func:`teacher_checksum` reads the checksum of
        the teacher's weights.
        """
        records: dict[str, Any] = {"versions": versions()}
        if teacher_checksum is not None:
            records["teacher_checksum"] = teacher_checksum
        write_json(path, {**dataclasses.asdict(self), **records})

    @classmethod
    def load(cls, path: StrPath) -> RunConfig:
        """The configuration in a file, or in the folder of a run; also one of version 0.2.

        Raises:
            FileNotFoundError: there is no configuration, or only that of a model of
                :func:`pfgm.save`.
            ValueError: the file is no configuration, or names settings that do not exist.

        Warns:
            UserWarning: a run of an earlier version has a relative path of its data, and nothing
                tells where it starts; the current folder is taken.
        """
        path = Path(path)
        is_run = path.is_dir()
        if is_run:
            path = path / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration at {path}.")
        try:
            content = json.loads(path.read_text())
            if isinstance(content, dict):
                if "library_name" in content:
                    raise FileNotFoundError(f"{path} describes a model and not a run.")
                for record in _RECORDS:
                    content.pop(record, None)
            content = _arguments(content, cls)
            if is_run:
                content.setdefault("method", "pfgm")  # the only one of the first runs
            if content.get("method", "auto") in ("auto", "pfgm"):
                if isinstance(content.get("flow"), dict):
                    content["flow"] = with_present_names("PoissonFlow", content["flow"])
                if is_run:
                    # A run from before there was a choice goes on with the published loss.
                    content.setdefault("weighting", "published")
            if is_run:
                # Runs from before there were layouts read images. Other data ignored the layout.
                chosen = content.get("layout", "images")
                content["layout"] = chosen if takes_layout(str(content.get("data"))) else "auto"
            training = TrainConfig(**_arguments(content.pop("training", {}), TrainConfig))
            config = cls(**content, training=training)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {error}") from error
        if is_run and config.data != (source := absolute_source(config.data)):
            warnings.warn(
                f"{path} of an earlier version names the data {config.data!r} by a relative path; "
                f"{source} is taken, from the current folder.",
                stacklevel=2,
            )
        return config


def _check_range(value: Any) -> None:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
    if not pair or not -math.inf < value[0] < value[1] < math.inf:
        raise ValueError(f"range must be two numbers, the lower first, got {value!r}.")


def _check_hyper_parameters(flow: dict[str, Any], method: str) -> None:
    kind = PoissonFlow if method == "pfgm" else PoissonFlowPP
    known = inspect.signature(kind).parameters.keys() - {"shape", "D"}
    for name in flow:
        if name not in known:
            raise ValueError(
                f"names in flow must be among {', '.join(sorted(known))} with method {method!r}, "
                f"got {name!r}."
            )


def teacher_checksum(folder: Path) -> str | None:
    """The checksum of the teacher's weights of a run; None if earlier versions recorded none."""
    recorded = json.loads((folder / CONFIG_FILE).read_text()).get("teacher_checksum")
    return None if recorded is None else str(recorded)


def _arguments(content: Any, kind: type) -> dict[str, Any]:
    """The settings that a file holds, by their present names."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} where settings should be")
    arguments = with_present_names(kind.__name__, content)
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(arguments.keys() - known):
        raise ValueError(
            f"there is no setting {unknown[0]!r}; known are {', '.join(sorted(known))}"
            f"{hint(unknown[0], known)}"
        )
    return arguments
