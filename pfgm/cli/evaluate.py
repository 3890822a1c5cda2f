"""``pfgm evaluate``: measures samples of a model, a file or a folder, and draws pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import evaluation
from ..common.devices import usable_device
from ..common.files import output_folder, write_csv, write_json
from ..common.images import is_image
from ..common.numbers import check_seed, whole
from ..common.versions import versions
from ..data import Data, Layout, Range, Table, to_unit
from ..data.opening import is_table_file, takes_layout
from ..data.opening import open as open_data
from ..evaluation import Labels, Point
from ..flows.sampling import MOST_STEPS
from ..metrics import CLASSIFIERS, Classifier, inception_metrics, load_classifier
from ..metrics.inception import find_inception_weights
from ..networks.registry import label_count
from ..plotting.figures import require_matplotlib
from ..plotting.images import label_columns
from ..pretrained import PRETRAINED
from ..references import ReferenceSet
from ..training.checks import warn_of_range
from ..training.model_files import Loaded
from ..training.run_config import RunConfig
from .figures_table import figures_table
from .options import (
    Count,
    Model,
    Output,
    Progress,
    SamplingOptions,
    check_guidance,
    load_network,
)

_PICTURE_SAMPLES = 100
_MAX_LIKELIHOOD_BATCH = 64
_FEATURES = 2048  # of Inception v3
_NO_FEATURES = "none"
_SPLITS = 10  # of the Inception score, as published


class _Rows(NamedTuple):
    """Rows as float32, bytes mapped to [−1, 1], and their labels if they have some."""

    rows: Tensor
    labels: Tensor | None

    @classmethod
    def drawn(cls, data: Data, count: int, seed: int) -> _Rows:
        """At most ``count`` rows, drawn with the seed."""
        generator, source = torch.Generator().manual_seed(seed), ReferenceSet(data)
        numbers = source.draw(min(count, len(source)), generator=generator)
        labels = source.labels
        return cls(to_unit(source[numbers]), None if labels is None else labels[numbers])


class _Real(NamedTuple):
    """The data that samples are compared with."""

    held_out: Tensor | None
    train: Tensor
    held_out_labels: Tensor | None
    train_labels: Tensor | None

    @classmethod
    def of(cls, data: Data, count: int, seed: int, device: torch.device) -> _Real:
        """At most ``count`` rows of each part, on the device if it is a GPU, else on the CPU."""
        place = device if device.type == "cuda" else torch.device("cpu")
        train = _Rows.drawn(data, count, seed)
        if data.held_out is None:
            return cls(None, train.rows.to(place), None, train.labels)
        held_out = _Rows.drawn(data.held_out, count, seed)
        return cls(held_out.rows.to(place), train.rows.to(place), held_out.labels, train.labels)

    def labels(
        self, samples: Tensor | None, names: Sequence[str], names_of_data: Sequence[str]
    ) -> Labels | None:
        """The labels of samples and data, numbered as in the data; None unless all have some."""
        half_known = self.held_out is not None and self.held_out_labels is None
        if samples is None or self.train_labels is None or half_known:
            return None
        numbered = _renumbered(samples, names, names_of_data)
        return Labels(numbered, self.held_out_labels, self.train_labels)


@dataclass
class Evaluate:
    """Measure samples, of a model or those in a file or folder, against held-out data."""

    out: Output
    """Folder for metrics.json, samples.png of images and, with --curve, curve.csv and curve.png."""
    model: Model[tuple[str, ...]] = ()
    """A model, as for sample, or several to compare in one table, with the same data, prior and
    number of samples. Give either this or --samples."""
    samples: Path | None = None
    """A .csv, .npy, .npz or .safetensors file of samples, or a folder of images."""
    data: str | None = None
    """Data to compare with: avatars, digits, fashion-mnist, cifar10 or a path, as for train. The
    default is the data of the model's training run, those of the network that comes with the
    package, or else digits."""
    range: Range | None = None
    """The values LOW HIGH of floating-point data that stand for black and white, as for train. The
    default is that of the training run if its data are used."""
    layout: Layout | None = None
    """What arrays in files are, as for train. The default is that of the training run if its data
    are used, else auto."""
    resize: int | None = None
    """Height and width to which images are scaled, also those of --samples in a folder or archive.
    The default is that of the training run if its data are used."""
    drop_missing: bool = False
    """Leave out the rows of a table in which a value is missing, as the training run does if it
    was told to."""
    drop_columns: tuple[str, ...] = ()
    """The names of columns of a table to leave out, as for train."""
    header: bool = True
    """Whether a .csv file begins with a line of names, as for train."""
    features: str | None = None
    """Compare in the features of a classifier as well: avatars, digits, fashion-mnist, a file of
    pfgm features, or none. The default is the classifier of the data, if one comes with the
    package."""
    n: Count = 1000
    """Number of samples to draw, or the most to take from a file or folder."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How and where samples are drawn."""
    against: int = 10_000
    """Maximum number of rows of held-out data, and of training data, to compare with."""
    per_label: bool = False
    """Compare the samples of each label with the data of that label as well."""
    likelihood: int = 0
    """Number of held-out samples whose bits per dimension are computed."""
    grey_levels: int | None = None
    """Grey levels of the data, for --likelihood; 0 means continuous values. The default is 17 for
    digits, 256 for bytes, and 0 for floating numbers."""
    curve: bool = False
    """Measure every solver at several numbers of steps as well."""
    curve_steps: tuple[int, ...] = (3, 5, 8, 10, 20, 40)
    """Numbers of steps for --curve, for solvers with one evaluation a step. heun, with two, takes
    half as many."""
    fid: bool = False
    """Compute FID and Inception score against training data as well, by torch-fidelity."""
    fid_weights: Path | None = None
    """The weights of Inception v3 that torch-fidelity provides. By default they are taken from
    torch's cache; nothing is downloaded."""
    seed: int = 0
    """Seed of all random numbers: the same seed and --compute give the same figures."""
    progress: Progress = True

    def run(self) -> None:
        self._check()
        device = usable_device(self.sampling.device)
        if self.fid:
            find_inception_weights(self.fid_weights)
        options: dict[str, Any] = {
            "value_range": self.range,
            "layout": self.layout,
            "resize": self.resize,
            "drop_missing": self.drop_missing or None,
            "drop_columns": self.drop_columns or None,
            "header": self.header and None,
        }
        reading = {option: value for option, value in options.items() if value is not None}
        name = self.data
        if name is None:
            name, run_reading = self._data_of_sources()
            reading = {**run_reading, **reading}
        reading["label_column"] = ""  # labels are columns to compare, unless the network takes them
        if self.samples is not None and not takes_layout(name):
            reading.pop("layout", None)  # it is for the samples
        loaded = [load_network(model, self.sampling.solver, device) for model in self.model]
        table = loaded[0].table if loaded else None
        if any(model.table != table for model in loaded):
            raise ValueError("models must be of one table, got some with other columns or scales.")
        data = open_data(name, **reading, table=table, progress=self.progress)
        warn_of_range(ReferenceSet(data))
        sources: Sequence[Loaded | Data] = loaded
        if not loaded:
            sources = [samples := self._open_samples(data)]
            warn_of_range(ReferenceSet(samples))
        for source in sources:
            self._check_data(name, data, source)
        classifier = self._classifier(name, data, device)
        if is_image(data.samples.shape[1:]) or self.curve:
            require_matplotlib()
        with output_folder(self.out):
            real = _Real.of(data, self.against, self.seed, device)
            measured = [
                self._measure(place, source, name, data, real, classifier, device)
                for place, source in enumerate(sources)
            ]
            figures = measured[0] if len(measured) == 1 else {"models": measured}
            figures = {"data": name, **figures, "seed": self.seed, "versions": versions()}
            write_json(self.out / "metrics.json", figures, allow_nan=False)
            print(figures_table(measured))
            for place, model in enumerate(loaded if self.curve else ()):
                self._curve(self._picture("curve", place), model, measured[place], real, device)
        print(self.out)

    def _picture(self, name: str, place: int) -> Path:
        """The file of a picture, with a number if there are several models."""
        return self.out / (f"{name}-{place + 1}.png" if len(self.model) > 1 else f"{name}.png")

    def _measure(
        self,
        place: int,
        source: Loaded | Data,
        name: str,
        data: Data,
        real: _Real,
        classifier: Classifier | None,
        device: torch.device,
    ) -> dict[str, Any]:
        """The figures of a model, or of samples that were drawn; draws a picture of images."""
        columns: dict[str, Any] = {}
        if isinstance(source, Loaded):
            classes = label_count(source.network)
            own = torch.arange(self.n, device="cpu") % classes if classes else None
            labels = real.labels(own, source.label_names, data.names)
            samples, described = self._draw(source, device)
            if data.table is not None:
                samples = data.table.nearest(samples)
            samples = evaluation.clamp_images(samples.to(real.train.device), real.train)
            figures = {"source": self.model[place], **described}
            shown = min(self.n, _PICTURE_SAMPLES)
            columns = label_columns(range(classes), source.label_names, shown)
        else:
            samples, own = _Rows.drawn(source, self.n, self.seed)
            labels = real.labels(own, source.names, data.names)
            samples, figures = samples.to(real.train.device), {"source": str(self.samples)}
        compared = (samples, real.held_out, real.train)
        figures |= evaluation.evaluate_samples(*compared, labels=labels, progress=self.progress)
        if classifier is not None:
            held_out = None if real.held_out is None else classifier.rows(real.held_out)
            compared = (classifier.rows(samples), held_out, classifier.rows(real.train))
            values = evaluation.evaluate_samples(*compared, labels=labels, progress=self.progress)
            figures["features"] = {"of": self.features or name, **values}
        if self.per_label and labels is not None:
            # In features where there are some.
            each = evaluation.evaluate_labels(*compared, labels, progress=self.progress)
            names = data.names or [str(label) for label in range(data.classes)]
            figures["labels"] = {name: each.get(label) for label, name in enumerate(names)}
        if self.fid:
            figures["inception"] = self._inception(samples, real.train)
        if isinstance(source, Loaded) and self.likelihood:
            figures["likelihood"] = self._likelihood(source, data, device)
        if is_image(samples.shape[1:]):
            from ..plotting import image_grid

            shown, each = min(len(samples), _PICTURE_SAMPLES), columns.get("columns", 1)
            rows = samples[: shown // each * each]  # whole rows
            image_grid(rows, self._picture("samples", place), **columns)
        return figures

    def _check(self) -> None:
        if bool(self.model) == (self.samples is not None):
            given = "both" if self.model else "neither"
            raise ValueError(f"one of a model and --samples must be given, got {given}.")
        if self.fid_weights is not None and not self.fid:
            raise ValueError("fid-weights needs --fid.")
        if self.samples is not None:
            self._check_options_of_samples()
        if self.grey_levels is not None and not self.likelihood:
            raise ValueError("grey-levels needs --likelihood N.")
        for name, value, least in (
            ("n", self.n, evaluation.MIN_ROWS),
            ("batch-size", self.sampling.batch_size, 1),
            ("against", self.against, 1),
            ("likelihood", self.likelihood, 0),
            ("the number of curve-steps", len(self.curve_steps), 1),
        ):
            whole(name, value, least)
        check_seed(self.seed)
        steps = () if self.sampling.steps is None else (self.sampling.steps,)
        for name, counts in (("steps", steps), ("curve-steps", self.curve_steps)):
            for count in counts:
                whole(name, count, 1, MOST_STEPS)

    def _check_options_of_samples(self) -> None:
        """Raises ValueError for an option that has a meaning only with a model."""
        assert self.samples is not None
        if is_table_file(self.samples) and self.data is None:
            raise ValueError(
                f"data must be a .csv file too for {self.samples}, as --data FILE.csv."
            )
        if self.likelihood or self.curve:
            raise ValueError("samples alone have no likelihood and no curve; give a model.")
        unused = SamplingOptions(device=self.sampling.device)  # metrics use the device too
        for name, value in asdict(self.sampling).items():
            if value != getattr(unused, name):
                raise ValueError(
                    f"{name.replace('_', '-')} is {value}, but {self.samples} holds samples that "
                    "have been drawn; leave it out, or give a model."
                )

    def _open_samples(self, data: Data) -> Data:
        assert self.samples is not None
        options: dict[str, Any] = {"resize": self.resize}
        if is_table_file(self.samples):
            columns = [f"x{place}" for place in range(data.samples[:1].numel())]
            options = {"table": data.table or Table.numbers(columns)}  # as pfgm sample writes them
        elif data.table is not None:
            raise ValueError(
                f"samples must be a .csv file, as the data are a table, got {self.samples}."
            )
        elif takes_layout(self.samples):
            options = {"layout": self.layout or "auto"}
        return open_data(self.samples, **options, progress=self.progress)

    def _data_of_sources(self) -> tuple[str, dict[str, Any]]:
        """The data that the networks were trained on, and how to read them; digits if unknown."""
        known = [_data_of(model) for model in self.model] or [("digits", {})]
        if any(each != known[0] for each in known):
            raise ValueError(
                "models must have been trained on the same data, read in the same way, got "
                f"{', '.join(name for name, _ in known)}; give the data with --data."
            )
        return known[0]

    def _check_data(self, name: str, data: Data, source: Loaded | Data) -> None:
        if isinstance(source, Loaded):
            check_guidance(self.sampling.guidance, source.network)
            shape, classes = source.flow.shape, label_count(source.network)
        else:
            shape, classes = source.samples.row_shape, source.classes
        expected = data.samples.row_shape
        if shape != expected:
            remedy = "." if self.data is not None else "; give the data with --data."
            if shape == expected[1:]:
                remedy = "; for images without channels give --layout images."
            raise ValueError(
                f"samples must have the shape of the data {name}, {expected}, got {shape}" + remedy
            )
        if self.fid and (len(expected) != 3 or expected[0] not in (1, 3)):
            raise ValueError(
                f"samples must be images (C, H, W) with C = 1 or 3 for --fid, got shape {expected}."
            )
        real = data.held_out or data
        if self.per_label and not (classes and data.classes):
            raise ValueError(
                f"per-label needs labels of the samples and of the data {name}, got "
                f"{'none of the data' if classes else 'samples without labels'}."
            )
        if self.likelihood > len(real.samples):
            raise ValueError(
                f"likelihood must be at most {len(real.samples)}, the "
                f"{_part(data).replace('_', '-')} samples of {name}, got {self.likelihood}."
            )

    def _classifier(self, name: str, data: Data, device: torch.device) -> Classifier | None:
        """The classifier in whose features samples are compared too."""
        known = name.partition(":")[0]
        chosen = self.features or (known if known in CLASSIFIERS else _NO_FEATURES)
        if chosen == _NO_FEATURES:
            return None
        place = device if device.type == "cuda" else torch.device("cpu")
        classifier = load_classifier(chosen, device=place)
        if (shape := data.samples.row_shape) != classifier.shape:
            raise ValueError(
                f"features must be a classifier for the shape of the data {name}, {shape}, got "
                f"{chosen}, for {classifier.shape}."
            )
        return classifier

    def _draw(self, model: Loaded, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        solving = self.sampling.solver_arguments(model.flow)
        solving["compute"] = self.sampling.settle_compute(model, self.n, device)
        samples, nfe = evaluation.draw_samples(
            *model,
            self.n,
            seed=self.seed,
            batch_size=self.sampling.batch_size,
            device=device,
            progress=self.progress,
            **solving,
        )
        classes = label_count(model.network)
        labels = f"i mod {classes}" if classes else None
        sampling = {**solving, "labels": labels, "batch_size": self.sampling.batch_size}
        return samples, {"nfe": nfe, "sampling": sampling}

    def _likelihood(self, model: Loaded, data: Data, device: torch.device) -> dict[str, Any]:
        rows = ReferenceSet(data.held_out or data)
        numbers = rows.draw(self.likelihood, generator=torch.Generator().manual_seed(self.seed))
        known = rows.labels is not None and label_count(model.network) > 0
        labels = None
        if known and rows.labels is not None:
            labels = _renumbered(rows.labels[numbers], data.names, model.label_names)
        grey_levels = data.grey_levels if self.grey_levels is None else self.grey_levels
        bits = evaluation.bits_per_dim(
            *model,
            rows[numbers].to(device),
            grey_levels=grey_levels,
            labels=labels,
            seed=self.seed,
            batch_size=min(self.sampling.batch_size, _MAX_LIKELIHOOD_BATCH),
            progress=self.progress,
        )
        return {
            "of": _part(data),
            "count": bits.samples,
            "grey_levels": grey_levels,
            "labels": known,
            "bits_per_dim": bits.mean,
            "standard_error": None if math.isnan(bits.standard_error) else bits.standard_error,
            "nfe": bits.nfe,
        }

    def _inception(self, samples: Tensor, train: Tensor) -> dict[str, Any]:
        """FID and Inception score of the samples. Published figures are against training data."""
        counts = {"samples": len(samples), "train": len(train)}
        if min(counts.values()) < _FEATURES:
            print(
                f"pfgm: FID of {counts['samples']} samples against {counts['train']} rows is far "
                f"above that of many: it has {_FEATURES} features, and published figures take "
                "50 000 of each (--n, --against).",
                file=sys.stderr,
            )
        splits = min(_SPLITS, len(samples))
        result = inception_metrics(samples, train, splits=splits, weights=self.fid_weights)
        return {
            "against": "train",
            "counts": counts,
            "fid": result.fid,
            "score": result.score,
            "score_deviation": result.score_deviation,
            "splits": splits,
        }

    def _curve(
        self, path: Path, model: Loaded, figures: dict[str, Any], real: _Real, device: torch.device
    ) -> None:
        """Measures every solver at several numbers of steps, and draws the curves."""
        from ..plotting import quality_curve

        points = evaluation.curve(
            *model,
            real.train[::2] if real.held_out is None else real.held_out,
            n=self.n,
            steps=self.curve_steps,
            seed=self.seed,
            batch_size=self.sampling.batch_size,
            device=device,
            last=self.sampling.last,
            guidance=self.sampling.guidance,
            compute=figures["sampling"]["compute"],
            progress=self.progress,
        )
        write_csv(path.with_suffix(".csv"), [Point._fields, *points])
        curves = evaluation.as_curves(points)
        nfe, train = [point.nfe for point in points], figures["frechet_distance"]["train"]
        curves["training data"] = ([min(nfe), max(nfe)], [train, train])
        distances = [distance for _, column in curves.values() for distance in column]
        quality_curve(curves, path, ylabel="Fréchet distance", log_y=min(distances) > 0)


def _data_of(model: str) -> tuple[str, dict[str, Any]]:
    """The data that a network was trained on, and how to read them; digits if not known."""
    if model in PRETRAINED:
        return model, RunConfig().reading  # the networks have the names of their data
    place = Path(model)
    with suppress(FileNotFoundError):
        config = RunConfig.load(place if place.is_dir() else place.parent)
        return config.data, {**config.reading, "label_column": ""}
    return "digits", RunConfig().reading


def _renumbered(labels: Tensor, names: Sequence[str], known: Sequence[str]) -> Tensor:
    """Labels with these names, by their numbers among the known ones.

    A label without a name stands for its number, and so does a name such as 7, unless both sides
    have other names.
    """
    sides = names, known
    if any(all(map(str.isdecimal, side)) for side in sides):
        names, known = (
            side if all(map(str.isdecimal, side)) else [*map(str, range(len(side)))]
            for side in sides
        )
    numbers, rows = labels.unique(return_inverse=True)
    wanted = [names[number] if names else str(number) for number in numbers.tolist()]
    if known and (missing := [name for name in wanted if name not in known]):
        raise ValueError(f"labels must be among {', '.join(known)}, got {', '.join(missing)}.")
    found = [known.index(name) if known else int(name) for name in wanted]
    return torch.tensor(found, dtype=torch.int64, device="cpu")[rows.cpu()]


def _part(data: Data) -> str:
    """The name of the part of the data that samples are compared with."""
    return "train" if data.held_out is None else "held_out"
