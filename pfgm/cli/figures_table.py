"""The table that ``pfgm evaluate`` prints, with a column for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FEW = 1000  # rows, below which figures are noisy
_TITLE, _WIDTH = 38, 12  # of columns
_ROWS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
_LABEL_COLUMNS = ("frechet_distance", "precision", "recall")


def figures_table(models: Sequence[Mapping[str, Any]]) -> str:
    """The figures of one model, or of several, which have numbers from 1."""
    counts, against = models[0]["counts"], models[0]["against"].replace("_", "-")
    columns = [column for space in ("", "features") for column in _columns(models, space)]
    widths = [max(_WIDTH, len(name) + 2) for name, _ in columns]
    title = f"against {counts['against']} {against} rows"
    rows = [(title, [name for name, _ in columns])]
    for row in _ROWS:
        better = "lower" if row.endswith("distance") else "higher"
        values = [f"{figures[row]:.4g}" for _, figures in columns]
        rows.append((f"{row.replace('_', ' ')} ({better} is better)", values))
    lines = [
        f"{name:{_TITLE}}" + "".join(f"{v:>{w}}" for v, w in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
    samples = min(model["counts"]["samples"] for model in models)
    numbers = ((samples, "samples"), (counts["against"], f"{against} rows"))
    if few := [f"{number} {rows_of}" for number, rows_of in numbers if number < _FEW]:
        lines.insert(
            0,
            f"{' and '.join(few)} are few: below {_FEW} the figures vary by as much as models "
            "differ. Compare each figure with the one beside it, of as many training rows.",
        )
    for number, model in enumerate(models, 1):
        lines += ["", f"{number}: {model['source']}"] if len(models) > 1 else []
        lines += [*_more_lines(model), *_label_lines(model)]
    return "\n".join(lines)


def _columns(models: Sequence[Mapping[str, Any]], space: str) -> list[tuple[str, dict[str, float]]]:
    """The samples of each model, then training rows, in pixels or in features if there are some.

    Training rows have one column, unless models with labels are beside others.
    """
    if space and space not in models[0]:
        return []
    figures = [model[space] if space else model for model in models]
    own, train = (
        [{row: each[row][of] for row in _ROWS} for each in figures] for of in ("samples", "train")
    )
    names = [str(number) for number, _ in enumerate(models, 1)] if models[1:] else ["samples"]
    columns = [*zip(names, own, strict=True)]
    if all(each == train[0] for each in train):
        columns.append(("train", train[0]))
    else:
        columns += [(f"train, {name}", each) for name, each in zip(names, train, strict=True)]
    first = f"in {space}: " if space else ""
    return [(first + columns[0][0], columns[0][1]), *columns[1:]]


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
