"""Results over the references of each point's own label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..common.tensors import as_labels
from .reference_set import References, ReferenceSet

R = TypeVar("R")


def targets_by_label(
    target: Callable[..., R],
    arguments: tuple[Tensor, ...],
    references: References,
    labels: Tensor | None,
    reference_labels: Tensor | None,
) -> R:
    """``target(*arguments, references)``, where each point sees the references of its own label.

    The target is called once for each label, with its points and a copy of its references. A point
    whose label is below 0 has no label and sees all references, as do all points where both kinds
    of labels are None.

    Args:
        target: called with rows of the arguments and references. It returns a tensor with a row for
            each point, or a tuple of these.
        arguments: the points (B, *S) and what else each of them has, such as levels (B,).
        references: (M, *S).
        labels: (B,) integers.
        reference_labels: (M,) integers; None takes those of a set.

    Raises:
        TypeError, ValueError: labels are not integers of these shapes, one kind is missing, no
            reference has the label of a point, or references are divided among processes.
    """
    if labels is None:
        if reference_labels is not None:
            raise ValueError(
                "labels must be given with reference_labels, one for each row of x and negative "
                "for no label, got None."
            )
        return target(*arguments, references)
    if torch.compiler.is_compiling():
        # A graph cannot look at labels, and would be compiled again for each number of points.
        eager: Any = torch.compiler.disable(targets_by_label)
        result: R = eager(target, arguments, references, labels, reference_labels)
        return result
    x = arguments[0]
    labels = as_labels("labels", labels, len(x)).to(x.device).clamp(min=-1)
    if isinstance(references, ReferenceSet):
        if references.sharded:
            raise ValueError(
                f"references must be whole in each process with labels, got {references!r}, whose "
                "rows are divided among processes."
            )
        reference_labels = references.labels if reference_labels is None else reference_labels
    if reference_labels is None:
        raise ValueError(
            f"reference_labels must have shape ({len(references)},) with labels, so that each "
            "point sees the references of its label, got None."
        )
    reference_labels = as_labels("reference_labels", reference_labels, len(references))
    if len(x) == 0:
        return target(*arguments, references)
    # In the order of their labels, the points of each label are one slice.
    order = labels.argsort(stable=True)
    values, counts = labels.unique(return_counts=True)
    results = []
    for label, rows in zip(values.tolist(), order.split(counts.tolist()), strict=True):
        seen = references
        if label >= 0:
            same = (reference_labels == label).to(references.device)
            seen = references[same].to(x.device)
        if len(seen) == 0:
            raise ValueError(
                f"labels must be in reference_labels, or negative for no label, got {label}."
            )
        try:
            results.append(target(*(each[rows] for each in arguments), seen))
        except ValueError as error:
            numbered = f" Rows are numbered within label {label}." if " row " in str(error) else ""
            raise ValueError(f"{error}{numbered}") from error
    places = order.argsort()

    def joined(parts: Any) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)[places]
        return tuple(map(joined, zip(*parts, strict=True)))

    whole: R = joined(results)
    return whole
