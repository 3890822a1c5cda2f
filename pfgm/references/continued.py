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
from ..ops.posterior_mean import BACKWARD, FORWARD
from .settings import ChunkTotals, Saved, Settings

R = TypeVar("R", RunningMean, RunningGradient)


class _Chunk(NamedTuple):
    rows: Tensor
    """(m, N)."""
    sketch: Tensor | None
    mirrored: bool
    """Whether the mirror images of the rows count, not the rows."""


def _chunks(settings: Settings, x: Tensor) -> Iterator[_Chunk]:
    """The chunks for points x (B, N), and with flips all a second time for their mirror images."""
    sketches: dict[int, Tensor | None] = {}
    for mirrored in (False, True) if settings.part.flips else (False,):
        for start, rows in settings.part.large_chunks():
            if not mirrored:
                sketches[start] = settings.part.sketch(start, rows, x, "native")
            yield _Chunk(flat_rows(rows), sketches[start], mirrored)


def _mirror(values: Tensor, settings: Settings) -> Tensor:
    """The mirror images of values (B, N) that have the shape of rows."""
    mirrored: Tensor = values.unflatten(1, settings.part.shape).flip(-1)
    return mirrored.flatten(1)


def _count(settings: Settings) -> int:
    """The number of references of this process."""
    return len(settings.part) * (2 if settings.part.flips else 1)


def _problem_of_all(rows: Tensor, x: Tensor, radius: Tensor, settings: Settings) -> PosteriorMean:
    """The problem over all rows at once."""
    rows = flat_rows(rows)
    sketch = settings.part.sketch(0, rows, x, "native")
    return settings.problem(x, rows, radius, sketch)


def results(x: Tensor, radius: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """Mean or difference, log-sum-exp, nearest and total, and the last two as those of a chunk."""
    rows = settings.part.as_tensor()
    if rows is not None:
        problem = _problem_of_all(rows, x, radius, settings)
        result, logsumexp, nearest, total = FORWARD(problem, "native")
    else:
        running = _sum_of_chunks(x, radius, settings)
        nearest, total = running.nearest, running.total
        result, logsumexp = posterior_mean_parts.end(
            x, radius, settings.D, running, settings.difference
        )
    return result, logsumexp, nearest, total, *_as_one_chunk(nearest, total)


def by_tensor(
    x: Tensor, radius: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The results of :func:`pfgm.ops.eager.differentiated`; None where that is not possible."""
    rows = settings.part.as_tensor() if settings.continues and settings.ranks is None else None
    if rows is None or torch.compiler.is_compiling():
        return None
    problem = _problem_of_all(rows.detach(), x, radius, settings)
    return eager.differentiated(problem, "native", settings.check_version)


def state(x: Tensor, radius: Tensor, settings: Settings) -> tuple[State, ChunkTotals]:
    """The state over the references of this process, in float64, as one chunk."""
    sums, nearest, total, _ = _sum_of_chunks(x, radius, settings)
    average = sums / total[:, None]
    result = -average if settings.difference else average
    return State(result, nearest, total), _as_one_chunk(nearest, total)


def _as_one_chunk(nearest: Tensor, total: Tensor) -> ChunkTotals:
    return ChunkTotals(nearest[:, None].clone(), total[:, None].clone())


def _sum_of_chunks(x: Tensor, radius: Tensor, settings: Settings) -> RunningMean:
    running = native_parts.begin(x, _count(settings))
    mirrored_x = _mirror(x, settings) if settings.part.flips else x
    for rows, sketch, mirrored in _chunks(settings, x):
        problem = settings.problem(mirrored_x if mirrored else x, rows, radius, sketch)
        running = _mirror_sums(running, mirrored, settings)
        posterior_mean_parts.add(problem, running)
        running = _mirror_sums(running, mirrored, settings)
    if settings.difference and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        again = is_cancelled(running.sums / running.total[:, None], radius, running.nearest)
        if again.any():
            exact = _sum_of_chunks(x[again].double(), radius[again], settings)
            for values, exact_values in zip(running[:3], exact[:3], strict=True):
                values[again] = exact_values
    return running


def is_cancelled(difference: Tensor, radius: Tensor, nearest: Tensor) -> Tensor:
    """In which rows (B,) x − mean is small beside its terms (csrc/cpu/cancelled_rows.h)."""
    length = torch.hypot(difference.norm(dim=1).to(radius.dtype), radius)
    return length < 0.2 * nearest.sqrt()


def _mirror_sums(running: R, mirrored: bool, settings: Settings) -> R:
    """The sums with their rows mirrored, if the points are. A second call undoes it."""
    if not mirrored or running.sums is None:
        return running
    return running._replace(sums=_mirror(running.sums, settings))


def gradients(saved: Saved, settings: Settings, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """The gradients in x and radius over the references of all processes.

    A gradient that is not needed is an empty tensor.
    """
    rows = settings.part.as_tensor()
    if rows is not None:
        problem = _problem_of_all(rows, saved.x, saved.radius, settings)
        needed = [needs[0], False, needs[1]]
        grad_x, _, grad_radius = BACKWARD(saved.upstream, saved.state, needed, problem, "native")
        return grad_x, grad_radius
    none = saved.x.new_empty(0, *saved.x.shape[1:], dtype=settings.part.source.dtype)
    problem = settings.problem(saved.x, none, saved.radius)
    running = native_parts.begin_gradients(saved.x, _count(settings), needs[0])
    if native_parts.any_ill_conditioned(problem, saved.state, saved.upstream):
        for _, part, points in _problems(saved, settings):
            native_parts.add_pulls(part, points.state, points.upstream, running)
        if settings.ranks is not None:
            running = running._replace(pulls=settings.ranks.sum(running.pulls))
    for mirrored, part, points in _problems(saved, settings):
        running = _mirror_sums(running, mirrored, settings)
        native_parts.add_gradients(part, points.state, points.upstream, running)
        running = _mirror_sums(running, mirrored, settings)
    if settings.ranks is not None:
        sums = None if running.sums is None else settings.ranks.sum(running.sums)
        running = running._replace(sums=sums, moments=settings.ranks.sum(running.moments))
    grad_x, grad_radius = native_parts.end_gradients(problem, saved.state, saved.upstream, running)
    return torch.empty(0, device=saved.x.device) if grad_x is None else grad_x, grad_radius


def _problems(saved: Saved, settings: Settings) -> Iterator[tuple[bool, PosteriorMean, Saved]]:
    """For each chunk whether its mirror images count, the problem, and the points for it."""
    mirrored_points = saved
    if settings.part.flips:
        x, mean, grad_mean = (_mirror(v, settings) for v in (saved.x, saved.mean, saved.grad_mean))
        mirrored_points = saved._replace(x=x, mean=mean, grad_mean=grad_mean)
    for rows, sketch, mirrored in _chunks(settings, saved.x):
        points = mirrored_points if mirrored else saved
        yield mirrored, settings.problem(points.x, rows, points.radius, sketch), points
