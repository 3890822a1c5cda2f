"""Results over chunks that continue each other's sums, by the CPU kernels.

The kernels skip references that do not count beside the nearest of all chunks so far, and in the
backward pass beside the nearest of all. Where rows in memory need no chunks, one call takes all.

Mirror images come in a second pass over the rows, when the nearest row is known. The points are
mirrored in their place: the distance of x to a mirror image is that of the mirrored x to the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..backends import native_parts
from ..common.tensors import flat_rows
from ..core.problems import PosteriorMean, RunningGradient, RunningMean, State
from ..ops import eager, posterior_mean_parts
from ..ops.posterior_mean import call, call_backward
from .given import ChunkTotals, Given, Saved
from .ranks import Ranks

R = TypeVar("R", RunningMean, RunningGradient)


class _Chunk(NamedTuple):
    rows: Tensor
    """(m, N)."""
    sketch: Tensor | None
    mirrored: bool
    """Whether the mirror images of the rows count, not the rows."""


def _chunks(given: Given, x: Tensor) -> Iterator[_Chunk]:
    """The chunks for points x (B, N), and with flips all a second time for their mirror images."""
    sketches: dict[int, Tensor | None] = {}
    for mirrored in (False, True) if given.part.flips else (False,):
        for start, rows in given.part.large_chunks():
            if not mirrored:
                sketches[start] = given.part.sketch(start, rows, x, "native")
            yield _Chunk(flat_rows(rows), sketches[start], mirrored)


def _mirror(values: Tensor, given: Given) -> Tensor:
    """The mirror images of values (B, N) that have the shape of rows."""
    mirrored: Tensor = values.unflatten(1, given.part.shape).flip(-1)
    return mirrored.flatten(1)


def _count(given: Given) -> int:
    """The number of references of this process."""
    return len(given.part) * (2 if given.part.flips else 1)


# ---- forward ---------------------------------------------------------------------------------


def results(x: Tensor, radius: Tensor, given: Given) -> tuple[Tensor, ...]:
    """Mean or difference, log-sum-exp, nearest and total, and the last two as those of a chunk."""
    rows = given.part.in_one()
    if rows is not None:
        rows = flat_rows(rows)
        sketch = given.part.sketch(0, rows, x, "native")
        problem = given.problem(x, rows, radius, sketch)
        result, logsumexp, nearest, total = call(problem, "native")
    else:
        running = _sum_of_chunks(x, radius, given)
        nearest, total = running.nearest, running.total
        result, logsumexp = posterior_mean_parts.end(x, radius, given.D, running, given.difference)
    return result, logsumexp, nearest, total, *_as_one_chunk(nearest, total)


def by_tensor(
    x: Tensor, radius: Tensor, given: Given
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The results of :func:`pfgm.ops.eager.differentiated`; None where that is not open."""
    rows = given.part.in_one() if given.continues and given.ranks is None else None
    if rows is None or torch.compiler.is_compiling():
        return None
    sketch = given.part.sketch(0, rows, x, "native")
    problem = given.problem(x, flat_rows(rows.detach()), radius, sketch)
    return eager.differentiated(problem, "native", given.check_version)


def state(x: Tensor, radius: Tensor, given: Given) -> tuple[State, ChunkTotals]:
    """The state over the references of this process, in float64, as one chunk."""
    sums, nearest, total, _ = _sum_of_chunks(x, radius, given)
    average = sums / total[:, None]
    result = -average if given.difference else average
    return State(result, nearest, total), _as_one_chunk(nearest, total)


def _as_one_chunk(nearest: Tensor, total: Tensor) -> ChunkTotals:
    return ChunkTotals(nearest[:, None].clone(), total[:, None].clone())


def _sum_of_chunks(x: Tensor, radius: Tensor, given: Given) -> RunningMean:
    running = native_parts.begin(x, _count(given))
    mirrored_x = _mirror(x, given) if given.part.flips else x
    for rows, sketch, mirrored in _chunks(given, x):
        problem = given.problem(mirrored_x if mirrored else x, rows, radius, sketch)
        running = _turned(running, mirrored, given)
        posterior_mean_parts.add(problem, running)
        running = _turned(running, mirrored, given)
    return running


def _turned(running: R, mirrored: bool, given: Given) -> R:
    """The same sums for mirrored points, if they are."""
    if not mirrored or running.sums is None:
        return running
    return running._replace(sums=_mirror(running.sums, given))


# ---- gradients -------------------------------------------------------------------------------


def gradients(saved: Saved, given: Given, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius over the references of all processes.

    A gradient that is not needed is an empty tensor.
    """
    rows = given.part.in_one()
    if rows is not None:
        rows = flat_rows(rows)
        sketch = given.part.sketch(0, rows, saved.x, "native")
        problem = given.problem(saved.x, rows, saved.radius, sketch)
        needed = [needs[0], False, needs[1]]
        found = call_backward(problem, saved.state, saved.upstream, needed, "native")
        return found[0], found[2]
    none = saved.x.new_empty(0, *saved.x.shape[1:], dtype=given.part.source.dtype)
    problem = given.problem(saved.x, none, saved.radius)
    running = native_parts.begin_gradients(saved.x, _count(given), needs[0])
    if native_parts.any_steep(problem, saved.state, saved.upstream):
        for _, part, points in _problems(saved, given):
            native_parts.add_pulls(part, points.state, points.upstream, running)
        if given.ranks is not None:
            running = running._replace(pulls=given.ranks.sum(running.pulls))
    for mirrored, part, points in _problems(saved, given):
        running = _turned(running, mirrored, given)
        native_parts.add_gradients(part, points.state, points.upstream, running)
        running = _turned(running, mirrored, given)
    if given.ranks is not None:
        running = _over_ranks(running, given.ranks)
    of_x, of_radius = native_parts.end_gradients(problem, saved.state, saved.upstream, running)
    return torch.empty(0, device=saved.x.device) if of_x is None else of_x, of_radius


def _over_ranks(running: RunningGradient, ranks: Ranks) -> RunningGradient:
    """The sums over the references of all processes."""
    sums = None if running.sums is None else ranks.sum(running.sums)
    return running._replace(sums=sums, moments=ranks.sum(running.moments))


def _problems(saved: Saved, given: Given) -> Iterator[tuple[bool, PosteriorMean, Saved]]:
    """For each chunk whether its mirror images count, the problem, and the points for it."""
    mirrored_points = saved
    if given.part.flips:
        x, mean, grad_mean = (_mirror(v, given) for v in (saved.x, saved.mean, saved.grad_mean))
        mirrored_points = saved._replace(x=x, mean=mean, grad_mean=grad_mean)
    for rows, sketch, mirrored in _chunks(given, saved.x):
        points = mirrored_points if mirrored else saved
        yield mirrored, given.problem(points.x, rows, points.radius, sketch), points
