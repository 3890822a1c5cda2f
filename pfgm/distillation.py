"""Few-step models: a student network that predicts the end of a trained flow's paths.

This is consistency distillation (arXiv 2303.01469, algorithm 2; for Poisson flows of any D as in
Poisson flow consistency models, arXiv 2402.08159). The student f(x, σ) learns to give the same
result at all points of a path of the teacher's ODE. At the end of the path f(x, σ) = x, so this
result is the end of the path. f then takes the prior to data in one evaluation. A second
evaluation, after noise has been added, improves details (:func:`pfgm.solvers.consistency`).
"""

from __future__ import annotations

import copy
import math
import operator
from itertools import pairwise

import torch
from torch import Tensor, nn

from .common import draws
from .common.numbers import whole
from .common.tensors import flat_rows
from .flows import Condition, Flow, Network
from .flows.conditions import map_tensors
from .functional import euler_step, multistep_step
from .references import References

__all__ = ["Consistency"]

_HUBER_SCALE = 0.00054  # times √N: from here on the loss is linear (arXiv 2310.14189)


class Consistency:
    """The loss that trains a student of a flow's network.

    The levels σ_0 > … > σ_n are those of the flow's grid. i is random, and x_i is a point of the
    prior for i = 0, else a point around data at σ_i.

        x_{i+k} = the teacher's path from x_i at σ_i over k levels (solver "multistep")
        loss    = √(‖f(x_i, σ_i) − f(x_{i+k}, σ_{i+k})‖² + c²) − c,   c = 0.00054 √N

    f is the posterior mean that the student implies, and x itself at the last level. It has no
    gradient at x_{i+k}.

    By default the teacher goes to the last level, with n/2 evaluations on average. k = 1 is
    consistency distillation as published: one evaluation of the teacher per training step, but the
    student learns from its own results, level by level, which takes long and may drift.

    Teacher and student are networks of the flow, fields or denoisers. A student that starts as a
    copy of the teacher learns fastest.

    Args:
        flow: the teacher's flow, any D.
        teacher: the trained network; it is not changed.
        steps: n, the number of levels below the first.
        ahead: k, the number of levels over which the teacher goes. None goes to the last level.
        schedule, last: as in :meth:`pfgm.Flow.grid`.

    Raises:
        ValueError: ahead is out of range, or as :meth:`pfgm.Flow.grid`.

    >>> import copy, pfgm, torch
    >>> data = torch.randn(64, 2)
    >>> flow = pfgm.PoissonFlowPP.from_data(data, D=128)
    >>> teacher = flow.network("mlp", width=16)
    >>> student = copy.deepcopy(teacher)
    >>> loss = Consistency(flow, teacher).loss(student, data)
    >>> loss.backward()
    >>> flow.sample(student, 3, solver="consistency", steps=2, last=0.5).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        flow: Flow,
        teacher: Network,
        *,
        steps: int = 10,
        ahead: int | None = None,
        schedule: str | None = None,
        last: float | None = None,
    ) -> None:
        self.flow, self.teacher = flow, teacher
        if isinstance(teacher, nn.Module):
            self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.levels = flow.grid(steps, schedule or "rho", last)
        self.ahead = steps if ahead is None else whole("ahead", ahead, 1, steps)

    def loss(
        self,
        net: Network,
        x: Tensor,
        references: References | None = None,
        generator: torch.Generator | None = None,
        *,
        condition: Condition | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """The batch mean of the loss, a scalar of float32 or wider.

        Args:
            net: the student.
            x: (B, *S) clean data; uint8 means u/127.5 − 1.
            references, reference_labels: not used, because the teacher gives the target. They are
                there so that the signature is that of the flow's loss.
            generator: of the levels and the noise, on the device of x.
            condition: keyword arguments of both networks.

        Raises:
            ValueError: x is empty, shapes do not fit, or a network's results have wrong shapes.
        """
        flow = self.flow
        x, condition = flow._checked_batch(x, condition)
        levels = torch.tensor(self.levels, dtype=torch.float64, device=x.device)
        starts = draws.integers(len(levels) - 1, x.shape[:1], generator, device=x.device)
        starts = starts.sort().values
        sigma = levels[starts]
        noisy = x + flow.noise(sigma.to(x.dtype), generator)
        first = int((starts == 0).sum())
        noisy[:first] = flow.prior(first, generator=generator, device=x.device).to(x.dtype)
        with torch.no_grad():
            target = self._target(net, noisy.clone(), starts, levels, condition)
        mean = flow.denoise(net, noisy, sigma, condition)
        wide = torch.promote_types(mean.dtype, torch.float32)
        squared = flat_rows(mean.to(wide) - target.to(wide)).square().sum(1)
        c = _HUBER_SCALE * math.sqrt(flow.N)
        return ((squared + c * c).sqrt() - c).mean()

    def _target(
        self, net: Network, x: Tensor, starts: Tensor, levels: Tensor, condition: Condition
    ) -> Tensor:
        """The student's result where the teacher's path ends; at the last level, that point."""
        self._follow_teacher(x, starts, condition)
        ends = starts + self.ahead
        above_last = ends < len(levels) - 1
        if bool(above_last.any()):
            own = map_tensors(condition, lambda value: value[above_last])
            reached = levels[ends[above_last]]
            x[above_last] = self.flow.denoise(net, x[above_last], reached, own).to(x.dtype)
        return x

    def _follow_teacher(self, x: Tensor, starts: Tensor, condition: Condition) -> None:
        """Moves points x (B, *S) in place along the teacher's path over ``ahead`` levels.

        ``starts`` are the indices of the levels of x, in rising order. So the rows that move from a
        level are contiguous, and one evaluation moves them all.
        """
        count = len(self.levels) - 1
        started = torch.bincount(starts, minlength=count).cumsum(0).tolist()
        means = torch.empty_like(x)
        for i, (z, z_next) in enumerate(pairwise(self.levels)):
            begin = started[i - self.ahead] if i >= self.ahead else 0
            new, end = started[i - 1] if i > 0 else 0, started[i]
            if begin == end:
                continue
            rows = slice(begin, end)
            own = map_tensors(condition, operator.itemgetter(rows))
            mean = self.flow.denoise(self.teacher, x[rows], z, own)
            moved = euler_step(x[rows], mean, z, z_next)
            if begin < new and i < count - 1:
                old, before = slice(begin, new), self.levels[i - 1]
                moved[: new - begin], _ = multistep_step(
                    x[old], mean[: new - begin], z, z_next, means[old], before
                )
            means[rows], x[rows] = mean, moved
