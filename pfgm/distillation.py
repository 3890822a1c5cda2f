"""Few-step models: a student that says at once where a trained flow would end.

Consistency distillation (arXiv 2303.01469, algorithm 2; for Poisson flows of any D the idea of
Poisson flow consistency models, arXiv 2402.08159): a network f(x, σ) learns to say the same all
along a path of the teacher's ODE, down to the end, where f(x, σ) = x. Then f takes the prior to
data in one evaluation, and a second one, after noise has been added again, mends details
(:func:`pfgm.solvers.consistency`).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .flows import Condition, Flow, Network
from .flows.conditions import select_rows
from .functional import steps as ode_steps
from .references import References

__all__ = ["Consistency"]

_HUBER = 0.00054  # times √N: where the loss turns from squares to distances (arXiv 2310.14189)


class Consistency:
    """The loss that makes a student of a flow's network.

    With levels σ_0 > … > σ_n of the flow's grid, a random i, and a point x_i of the prior for
    i = 0, else around data at σ_i,

        x_{i+k} = the teacher's way from x_i at σ_i over k levels ("multistep")
        loss    = √(‖f(x_i, σ_i) − f(x_{i+k}, σ_{i+k})‖² + c²) − c,   c = 0.00054 √N

    where f is the posterior mean that the student implies, without gradient at x_{i+k}, and x
    itself at the last level. k = 1 is consistency distillation as published, one evaluation of the
    teacher a step: the student's own answers carry the end up to the prior, which takes long and
    may drift. By default the teacher goes all the way, n/2 evaluations on average, which is cheap
    for the few levels that a multistep solver needs. Teacher and student are networks of the flow,
    fields or denoisers; a student that starts as a copy of the teacher learns fastest.

    Args:
        flow: of the teacher, any D.
        teacher: the trained network; it is not changed.
        steps: n, levels below the first.
        ahead: k, over how many levels the teacher goes; to the last unless given.
        schedule, last: of the levels, as in :meth:`pfgm.flows.Flow.grid`.

    Raises:
        ValueError: ahead is out of range, or as :meth:`pfgm.flows.Flow.grid`.

    >>> import copy, pfgm, torch
    >>> data = torch.randn(64, 2)
    >>> flow = pfgm.PoissonFlowPP.from_data(data, D=128)
    >>> teacher = pfgm.networks.Denoiser("mlp", {"shape": (2,), "width": 16})
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
        if ahead is not None and (not isinstance(ahead, int) or not 1 <= ahead <= steps):
            raise ValueError(f"ahead is {ahead}; allowed is an integer from 1 to steps, {steps}.")
        self.ahead = steps if ahead is None else ahead

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
        """The batch mean of the loss, a scalar, float32 at least; arguments as the flow's loss.

        Args:
            net: the student.
            x: (B, *S) clean data; uint8 means u/127.5 − 1.
            references, reference_labels: not needed, as the target is what the teacher says.
            generator: of the levels and the noise, on the device of x.
            condition: keyword arguments of both networks.

        Raises:
            ValueError: shapes do not fit, or those of a network's results.
        """
        flow = self.flow
        x = flow._to_floating(x)
        levels = torch.tensor(self.levels, dtype=torch.float64, device=x.device)
        places = (
            torch.randint(len(levels) - 1, (len(x),), generator=generator, device=x.device)
            .sort()
            .values
        )
        above = levels[places]
        noisy = x + flow.noise(above.to(x.dtype), generator)
        first = int((places == 0).sum())
        noisy[:first] = flow.prior(first, generator=generator, device=x.device).to(x.dtype)
        with torch.no_grad():
            target = self._target(net, noisy.clone(), places, levels, condition or {})
        mean = flow.denoise(net, noisy, above, condition)
        wide = torch.promote_types(mean.dtype, torch.float32)
        squared = (mean.to(wide) - target.to(wide)).flatten(1).square().sum(1)
        c = _HUBER * math.sqrt(flow.N)
        return ((squared + c * c).sqrt() - c).mean()

    def _target(
        self, net: Network, x: Tensor, places: Tensor, levels: Tensor, condition: Condition
    ) -> Tensor:
        """What the student says where the teacher has arrived, and at the end that point itself."""
        self._go(x, places, condition)
        there = places + self.ahead
        under_way = there < len(levels) - 1
        if bool(under_way.any()):
            own, reached = select_rows(condition, under_way), levels[there[under_way]]
            x[under_way] = self.flow.denoise(net, x[under_way], reached, own)
        return x

    def _go(self, x: Tensor, places: Tensor, condition: Condition) -> None:
        """Takes points x (B, *S) the teacher's way, in place; their places do not decrease.

        Rows join at their level and leave so many levels later, those between go together.
        """
        count = len(self.levels) - 1
        joined = torch.bincount(places, minlength=count).cumsum(0).tolist()
        means = torch.empty_like(x)
        for place, (z, z_next) in enumerate(zip(self.levels[:-1], self.levels[1:], strict=True)):
            begin = joined[place - self.ahead] if place >= self.ahead else 0
            new, end = joined[place - 1] if place > 0 else 0, joined[place]
            if begin == end:
                continue
            rows = slice(begin, end)
            mean = self.flow.denoise(self.teacher, x[rows], z, select_rows(condition, rows))
            moved, _ = ode_steps.euler(x[rows], mean, z, z_next)
            if begin < new and place < count - 1:
                old, before = slice(begin, new), self.levels[place - 1]
                moved[: new - begin], _ = ode_steps.multistep(
                    x[old], mean[: new - begin], z, z_next, means[old], before
                )
            means[rows], x[rows] = mean, moved
