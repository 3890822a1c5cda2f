"""The table that ``pfgm evaluate`` prints, with a column for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FEW = 1000  # rows, below which figures are noisy
_TITLE, _WIDTH, _WIDE = 38, 12, 24  # of columns
_FEATURES = "in features: "
_ROWS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
_Column = tuple[str, Mapping[str, Any], str]  # name, figures, and whose: samples or train
_LABEL_COLUMNS = ("frechet_distance", "precision", "recall")


def figures_table(models: Sequence[Mapping[str, Any]]) -> str:
    """The figures of one model, or of several, which have numbers from 1."""
    first = models[0]
    count, against = first["counts"]["against"], first["against"].replace("_", "-")
    samples = min(model["counts"]["samples"] for model in models)
    columns = _columns(models)
    lines = [
        f"{f'against {count} {against} rows':{_TITLE}}" + _cells([name for name, *_ in columns])
    ]
    if few := [
        f"{number} {rows}"
        for number, rows in ((samples, "samples"), (count, f"{against} rows"))
        if number < _FEW
    ]:
        lines.insert(
            0,
            f"{' and '.join(few)} are few: below {_FEW} the figures vary by as much as models "
            "differ. Compare each figure with the one beside it, of as many training rows.",
        )
    for name in _ROWS:
        better = "lower" if name.endswith("distance") else "higher"
        values = [f"{figures[name][of]:.4g}" for _, figures, of in columns]
        row = _cells(values, [name for name, *_ in columns])
        lines.append(f"{name.replace('_', ' ') + f' ({better} is better)':{_TITLE}}" + row)
    for number, model in enumerate(models, 1):
        lines += ["", f"{number}: {model['source']}"] if len(models) > 1 else []
        lines += [*_more_lines(model), *_label_lines(model)]
    return "\n".join(lines)


def _columns(models: Sequence[Mapping[str, Any]]) -> list[_Column]:
    """Those of the samples of each model and of training rows, then in features if there are some.

    Training rows have one column, unless models with and without labels are compared with others.
    """
    spaces = [("", [*models])]
    if "features" in models[0]:
        spaces.append((_FEATURES, [model["features"] for model in models]))
    columns: list[_Column] = []
    for prefix, figures in spaces:
        names = [*map(str, range(1, len(models) + 1))] if models[1:] else ["samples"]
        own = [*zip(names, figures, strict=True)]
        trains = [[each[row]["train"] for row in _ROWS] for each in figures]
        train = [(f"train, {name}", each) for name, each in own]
        if all(values == trains[0] for values in trains):
            train = [("train", figures[0])]
        both = [(*each, "samples") for each in own] + [(*each, "train") for each in train]
        columns += [(prefix + both[0][0], *both[0][1:]), *both[1:]]
    return columns


def _cells(texts: Sequence[str], names: Sequence[str] | None = None) -> str:
    widths = (_WIDE if name.startswith(_FEATURES) else _WIDTH for name in names or texts)
    return "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _more_lines(figures: Mapping[str, Any]) -> list[str]:
    """The lines below the table."""
    nearest, against = figures["median_distance_to_train"], figures["against"]
    lines = [
        f"median distance to the nearest of {figures['counts']['searched']} training rows: samples "
        f"{nearest['samples']:.4g}, {against.replace('_', '-')} rows {nearest[against]:.4g}"
    ]
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
    return lines


def _label_lines(figures: Mapping[str, Any]) -> list[str]:
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
