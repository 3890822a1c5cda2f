"""The options that several commands share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from torch import nn

from ..flows.batched_sampling import Compute
from ..flows.flow import Flow
from ..networks.registry import label_count
from ..solvers import SolverName, as_solver
from ..training.model_files import Loaded, load
from ..training.rehearsal import compute_of

Output = Annotated[Path, tyro.conf.arg(aliases=("-o",))]
"""The option --out, -o."""
Count = Annotated[int, tyro.conf.arg(aliases=("-n",))]
"""The option --n, -n."""
Progress = Annotated[
    bool,
    tyro.conf.arg(help="Show progress: a bar in a terminal, a line a minute in a file or pipe."),
]
T = TypeVar("T")
Model = Annotated[T, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
"""The argument of a model, which :func:`pfgm.load` reads."""


@dataclass
class SamplingOptions:
    """How and where samples are drawn."""

    solver: SolverName = "multistep"
    """The solver of the ODE; consistency is for few-step models."""
    steps: int | None = None
    """Number of solver steps. By default 10, more for samples of few values and for solvers that
    need them, as heun does, and 1 for consistency. rk45 chooses its own."""
    schedule: Literal["fitted", "rho", "log"] | None = None
    """Spacing of the steps. By default fitted, if the checkpoint has levels for this solver and
    number of steps and no last is given, else rho."""
    last: float | None = None
    """Noise level at which the last step begins. That step goes to the end of the flow at once."""
    guidance: float | None = None
    """Weight of classifier-free guidance, which exaggerates the label, so it needs a network with
    labels. 1 is none; any other value takes twice as long."""
    batch_size: int = 1000
    """Samples at a time."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the network; bfloat16 means autocast. auto: bfloat16 where the network of images
    or signals, timed at the start, is at least 1.2 times as fast with it; else float32. Give one of
    them to have samples that are the same to the last digit each time."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""

    def settle_compute(self, model: Loaded, n: int, device: torch.device) -> Compute:
        """The precision for n samples, which is said if it was chosen and is bfloat16."""
        if self.compute != "auto":
            return self.compute
        steps = self.solver_arguments(model.flow)["steps"]
        chosen, reason = compute_of(model.flow, model.network, n * steps, device)
        if chosen == "bfloat16":
            print(f"pfgm: the network computes in {chosen} (--compute): {reason}", file=sys.stderr)
        return chosen

    def solver_arguments(self, flow: Flow) -> dict[str, Any]:
        """The keyword arguments of :meth:`pfgm.Flow.sample` that these options are."""
        steps = flow.default_steps(self.solver) if self.steps is None else self.steps
        return {
            "solver": self.solver,
            "steps": steps,
            "schedule": self.schedule or flow._schedule_for(self.solver, steps, self.last),
            "last": self.last,
            "guidance": self.guidance,
        }


def load_network(model: str, solver: SolverName, device: torch.device) -> Loaded:
    """A model to sample with a solver."""
    loaded = load(model, device=device)
    if as_solver(solver).few_step and loaded.distilled is False:
        raise ValueError(
            f"solver must not be {solver} for the network of {model}, which is not a few-step "
            "model (pfgm train --teacher makes one)."
        )
    if as_solver(solver).few_step and loaded.distilled is None:
        print(
            f"pfgm: {model} does not say whether its network is a few-step model; from other "
            f"networks the solver {solver} gives averages of data.",
            file=sys.stderr,
        )
    return loaded


def check_guidance(guidance: float | None, network: nn.Module) -> None:
    """Raises ValueError if there is guidance and the network has no labels."""
    if guidance not in (None, 1.0) and not label_count(network):
        raise ValueError(
            f"guidance is {guidance}, but the network was trained without labels, which it would "
            "exaggerate; leave it out."
        )
