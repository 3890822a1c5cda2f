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
from ..data.opening import open as open_data
from ..data.opening import takes_layout
from ..data.table_files import is_table_file
from ..evaluation import Labels, Point
from ..flows.sampling import check_steps
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
_WIDTH = {"samples": 12, "train": 12, "in features: samples": 24}  # of columns of the table
_SPLITS = 10  # of the Inception score, as published
_FEW = 1000  # rows, below which figures are noisy
_LABEL_COLUMNS = ("frechet_distance", "precision", "recall")
_TABLE_ROWS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")


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
    model: Model[str | None] = None
    """A model, as for sample. Give either this or --samples."""
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
    """Seed of all random numbers: the same seed gives the same figures."""
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
            name, run_reading = self._data_of_source()
            reading = {**run_reading, **reading}
        reading["label_column"] = ""  # labels are columns to compare, unless the network takes them
        if self.samples is not None and not takes_layout(name):
            reading.pop("layout", None)  # it is for the samples
        loaded = None
        if self.model is not None:
            loaded = load_network(self.model, self.sampling.solver, device)
        table = None if loaded is None else loaded.table
        data = open_data(name, **reading, table=table, progress=self.progress)
        source = loaded or self._open_samples(data)
        for opened in (data, source):
            if isinstance(opened, Data):
                warn_of_range(ReferenceSet(opened))
        self._check_data(name, data, source)
        classifier = self._classifier(name, data, device)
        if is_image(data.samples.shape[1:]) or self.curve:
            require_matplotlib()
        with output_folder(self.out):
            self._measure(name, data, source, classifier, device)
        print(self.out)

    def _measure(
        self,
        name: str,
        data: Data,
        source: Loaded | Data,
        classifier: Classifier | None,
        device: torch.device,
    ) -> None:
        real = _Real.of(data, self.against, self.seed, device)
        figures: dict[str, Any] = {"data": name}
        if isinstance(source, Loaded):
            classes = label_count(source.network)
            own = torch.arange(self.n, device="cpu") % classes if classes else None
            labels = real.labels(own, source.label_names, data.names)
            samples, described = self._draw(source, device)
            if data.table is not None:
                samples = data.table.nearest(samples)
            samples = evaluation.clamp_images(samples.to(real.train.device), real.train)
        else:
            samples, own = _Rows.drawn(source, self.n, self.seed)
            labels = real.labels(own, source.names, data.names)
            samples, described = samples.to(real.train.device), {"source": str(self.samples)}
        figures |= described
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
        figures |= {"seed": self.seed, "versions": versions()}
        write_json(self.out / "metrics.json", figures, allow_nan=False)
        print(_table(figures))
        points = []
        if isinstance(source, Loaded) and self.curve:
            points = self._curve(source, real, device)
            write_csv(self.out / "curve.csv", [Point._fields, *points])
        columns: dict[str, Any] = {}
        if isinstance(source, Loaded):
            classes, count = label_count(source.network), min(self.n, _PICTURE_SAMPLES)
            columns = label_columns(range(classes), source.label_names, count)
        train = figures["frechet_distance"]["train"]
        _draw_pictures(self.out, samples, columns, points, train)

    def _check(self) -> None:
        if (self.model is None) == (self.samples is None):
            given = "neither" if self.model is None else "both"
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
                check_steps(name, count)

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

    def _data_of_source(self) -> tuple[str, dict[str, Any]]:
        """The data that the network was trained on, and how to read them; digits if not known."""
        if self.model in PRETRAINED:
            return self.model, {}  # the networks have the names of their data
        if self.model is not None:
            place = Path(self.model)
            with suppress(FileNotFoundError):
                config = RunConfig.load(place if place.is_dir() else place.parent)
                return config.data, config.reading
        return "digits", {}

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
        return samples, {"source": self.model, "nfe": nfe, "sampling": sampling}

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
        weights = find_inception_weights(self.fid_weights)
        splits = min(_SPLITS, len(samples))
        result = inception_metrics(samples, train, splits=splits, weights=weights)
        return {
            "against": "train",
            "counts": counts,
            "fid": result.fid,
            "score": result.score,
            "score_deviation": result.score_deviation,
            "splits": splits,
        }

    def _curve(self, model: Loaded, real: _Real, device: torch.device) -> list[Point]:
        return evaluation.curve(
            *model,
            real.train[::2] if real.held_out is None else real.held_out,
            n=self.n,
            steps=self.curve_steps,
            seed=self.seed,
            batch_size=self.sampling.batch_size,
            device=device,
            last=self.sampling.last,
            guidance=self.sampling.guidance,
            progress=self.progress,
        )


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


def _draw_pictures(
    folder: Path, samples: Tensor, columns: dict[str, Any], points: list[Point], train: float
) -> None:
    from ..plotting import image_grid, quality_curve

    if is_image(samples.shape[1:]):
        shown = min(len(samples), _PICTURE_SAMPLES)
        each = columns.get("columns", 1)  # whole rows
        image_grid(samples[: shown // each * each], folder / "samples.png", **columns)
    if points:
        curves = evaluation.as_curves(points)
        nfe = [point.nfe for point in points]
        curves["training data"] = ([min(nfe), max(nfe)], [train, train])
        distances = [distance for _, column in curves.values() for distance in column]
        quality_curve(
            curves, folder / "curve.png", ylabel="Fréchet distance", log_y=min(distances) > 0
        )


def _table(figures: dict[str, Any]) -> str:
    counts, against = figures["counts"], figures["against"].replace("_", "-")
    spaces = [figures, *([figures["features"]] if "features" in figures else [])]
    title = f"against {counts['against']} {against} rows"
    columns = ["samples", "train", "in features: samples", "train"][: 2 * len(spaces)]
    lines = [f"{title:38}" + "".join(f"{column:>{_WIDTH[column]}}" for column in columns)]
    if few := [
        f"{count} {rows}"
        for count, rows in ((counts["samples"], "samples"), (counts["against"], f"{against} rows"))
        if count < _FEW
    ]:
        lines.insert(
            0,
            f"{' and '.join(few)} are few: below {_FEW} the figures vary by as much as models "
            "differ. Compare each figure with the one beside it, of as many training rows.",
        )
    for name in _TABLE_ROWS:
        values = [space[name][of] for space in spaces for of in ("samples", "train")]
        cells = (f"{v:>{_WIDTH[c]}.4g}" for v, c in zip(values, columns, strict=True))
        better = "lower" if name.endswith("distance") else "higher"
        lines.append(f"{name.replace('_', ' ') + f' ({better} is better)':38}" + "".join(cells))
    nearest = figures["median_distance_to_train"]
    lines.append(
        f"median distance to the nearest of {counts['searched']} training rows: samples "
        f"{nearest['samples']:.4g}, {against} rows {nearest[figures['against']]:.4g}"
    )
    if result := figures.get("inception"):
        lines.append(
            f"against {result['counts']['train']} training rows: FID {result['fid']:.4g}, "
            f"Inception score {result['score']:.4g} ± {result['score_deviation']:.2g}"
        )
    if result := figures.get("likelihood"):
        error = result["standard_error"]
        lines.append(
            f"bits per dimension of {result['count']} {result['of'].replace('_', '-')} rows, "
            f"{result['grey_levels'] or 'no'} grey levels: {result['bits_per_dim']:.4f}"
            + ("" if error is None else f" ± {error:.4f}")
        )
    if "nfe" in figures:
        lines.append(f"{figures['nfe']} evaluations of the network a sample")
    return "\n".join([*lines, *_label_lines(figures)])


def _label_lines(figures: dict[str, Any]) -> list[str]:
    """A line for each label: samples beside training data, in the features if there are some."""
    if "labels" not in figures:
        return []
    title = "of each label, in features" if "features" in figures else "of each label"
    columns = [f"{name.replace('_', ' ')}{'train':>10}" for name in _LABEL_COLUMNS]
    lines = ["", f"{title:30}" + "".join(f"{column:>28}" for column in columns)]
    for label, values in figures["labels"].items():
        if values is None:
            lines.append(f"{label:30}too few samples or rows of the data to compare")
            continue
        cells = [
            f"{values[name]['samples']:>18.4g}{values[name]['train']:>10.4g}"
            for name in _LABEL_COLUMNS
        ]
        name = f"{label} ({values['counts']['samples']} samples)"
        lines.append(f"{name:30}" + "".join(cells))
    return lines
