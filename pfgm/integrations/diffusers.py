"""Schedulers for diffusers: its networks and loops train and sample with the Poisson flows.

    scheduler = PoissonFlowPPScheduler.from_flow(flow)
    scheduler.set_timesteps(18)
    x = scheduler.prior(16)
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x).prev_sample

takes the steps of ``flow.sample(from_module(unet, flow), 16, ...)``, with whatever the loop does
between them. Of a PoissonFlow with a spread the network sees the points as they are, where
``flow.sample`` asks it no farther out than upper_norm.

Networks of this library are made of those of diffusers by :func:`pfgm.networks.from_module`, which
reads their outputs for the schedulers, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..common.checks import check_choice
from ..common.tensors import dequantise, over_samples, wide_dtype
from ..flows.flow import Flow, per_row
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from ..functional import (
    euler_step_from_mean,
    field_fn,
    heun_step_from_mean,
    multistep_step_from_mean,
    posterior_mean,
)
from ..functional.steps import mean_of
from ..networks.wrapped import Foreign, ForeignDenoiser, from_module, telling
from ..references import References

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.outputs import BaseOutput
except ImportError as error:
    raise ImportError(
        "pfgm.integrations.diffusers needs diffusers; in a checkout: pip install '.[diffusers]'"
    ) from error

__all__ = [
    "FlowScheduler",
    "PoissonFlowPPScheduler",
    "PoissonFlowScheduler",
    "PoissonFlowSchedulerOutput",
]

_SOLVERS = ("euler", "heun", "multistep")
Scheduler = TypeVar("Scheduler", bound="FlowScheduler")


@dataclasses.dataclass
class PoissonFlowSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """What a step returns."""

    prev_sample: Tensor
    """(B, *S), the points at the next level, which the network is given next."""
    pred_original_sample: Tensor
    """(B, *S), the posterior mean at the present one."""


class FlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What both schedulers share.

    The solvers are those of :mod:`pfgm.solvers` with a fixed number of steps. heun calls the
    network twice a step, and once in the last; multistep keeps the mean of the step before.
    """

    _flow_type: ClassVar[type[PoissonFlow] | type[PoissonFlowPP]]
    _predictions: ClassVar[tuple[str, ...]]
    _flow: PoissonFlow | PoissonFlowPP
    _reader: Foreign
    _step_index: int | None
    _begin_index: int | None
    _earlier: tuple[Tensor, float] | None

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        flow: Mapping[str, Any],
        solver: str | None = None,
        schedule: str | None = None,
        prediction_type: str | None = None,
        level: str = "timestep",
    ) -> None:
        if not isinstance(flow, Mapping):
            raise TypeError(
                f"flow is a {type(flow).__name__}; allowed is its config, and from_flow takes the "
                "flow itself."
            )
        self._flow = self._flow_type(**flow)
        defaults = self._flow.defaults
        solver = solver or defaults.solver
        prediction_type = prediction_type or self._predictions[0]
        check_choice("solver", solver, _SOLVERS)
        check_choice("prediction_type", prediction_type, self._predictions)
        self.register_to_config(
            solver=solver,
            schedule=schedule or defaults.schedule,
            prediction_type=prediction_type,
        )
        self._telling = telling(level, self._flow)
        # Never called itself: it says what a network is given and what its output means.
        self._reader = from_module(nn.Identity(), self._flow, predicts=prediction_type, level=level)
        self.set_timesteps()

    @classmethod
    def from_flow(cls: type[Scheduler], flow: Flow, **options: Any) -> Scheduler:
        """The scheduler of a flow; options are those of the class, such as solver.

        Raises:
            TypeError: the flow is of the other kind.
            ValueError: an option is not allowed.
        """
        if not isinstance(flow, cls._flow_type):
            raise TypeError(
                f"flow is a {type(flow).__name__}; {cls.__name__} takes a "
                f"{cls._flow_type.__name__}."
            )
        scheduler: Scheduler = cls(flow=flow.config, **options)
        return scheduler

    @property
    def flow(self) -> PoissonFlow | PoissonFlowPP:
        """The flow whose steps are taken."""
        return self._flow

    @property
    def order(self) -> int:
        """Calls of the network a step."""
        return 2 if self.config["solver"] == "heun" else 1

    @property
    def init_noise_sigma(self) -> float:
        """The first level. Times normal noise it is the prior at D = ∞ alone: use :meth:`prior`."""
        return self._flow.first_level

    @property
    def step_index(self) -> int | None:
        """How many calls of the network have been stepped from; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The call to begin with, of :meth:`set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins with another call than that of the first timestep given to :meth:`step`."""
        self._begin_index = begin_index

    # ---- sampling ----

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Sets ``timesteps``, what the network is told at each call, and ``sigmas``, their levels.

        Args:
            num_inference_steps: solver steps; None takes as many as ``flow.sample``.
            device: where the timesteps go.
            sigmas: the levels themselves, decreasing, the last of them that of the samples.

        Raises:
            ValueError: steps or levels are out of range, or both are given.
        """
        if sigmas is None:
            levels = self._flow.grid(num_inference_steps, self.config["schedule"])
        elif num_inference_steps is None:
            levels = self._flow.grid(schedule=[float(sigma) for sigma in sigmas])
        else:
            raise ValueError("num_inference_steps and sigmas are both given; give one of them.")
        self.num_inference_steps = len(levels) - 1
        first, *inner, last = levels
        repeats = self.order
        self._levels = [first, *(level for level in inner for _ in range(repeats)), last]
        self.sigmas = torch.tensor(self._levels)
        self.timesteps = self._telling(self.sigmas[:-1]).to(device=device)
        self._step_index = self._begin_index = self._earlier = None

    def prior(
        self,
        n: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Points (n, *S) to start from, ``flow.prior``."""
        return self._flow.prior(n, generator=generator, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """What the network is given of points (B, *S) at a timestep, one or (B,)."""
        return self._reader.given(sample, self._level(sample, timestep))[0]

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> PoissonFlowSchedulerOutput | tuple[Tensor, Tensor]:
        """The points after a call of the network.

        Args:
            model_output: what it returned.
            timestep: the one of ``timesteps`` that it was told.
            sample: (B, *S), the points, as the step before returned them.
            generator: not used, as nothing is random.
            return_dict: return an object; False returns the tuple (prev_sample,
                pred_original_sample).

        Raises:
            ValueError: the timestep is none of ``timesteps``, all of them have been stepped from,
                or the output has a wrong shape.
        """
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        call = self._step_index
        if call >= len(self.timesteps):
            raise ValueError(
                f"step is called after the last of {len(self.timesteps)} timesteps; set_timesteps "
                "begins anew."
            )
        mean = self._mean(model_output, sample, self._levels[call])
        solvers = {"euler": self._euler, "heun": self._heun, "multistep": self._multistep}
        moved = solvers[self.config["solver"]](call, sample, mean)
        self._step_index += 1
        if not return_dict:
            return moved, mean
        return PoissonFlowSchedulerOutput(prev_sample=moved, pred_original_sample=mean)

    def _mean(self, output: Tensor, sample: Tensor, level: float) -> Tensor:
        """The posterior mean (B, *S) that an output made at these points means."""

        def read(x: Tensor, z: Tensor) -> Any:
            return self._reader.read(x, z, output)

        if not isinstance(self._flow, PoissonFlow):
            return self._flow.denoise(read, sample, level)
        field = self._flow.field(read, sample, per_row(level, sample))
        return mean_of(sample, field, level)

    def index_for_timestep(self, timestep: Tensor | float) -> int:
        """The call at a timestep that begins a step: with heun, one at each level ends one."""
        found = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"timestep is {float(timestep)}; allowed are those of timesteps.")
        return int(found[0] if found[0] == 0 else found[self.order - 1])

    def _euler(self, call: int, x: Tensor, mean: Tensor) -> Tensor:
        return euler_step_from_mean(x, mean, self._levels[call], self._levels[call + 1])

    def _heun(self, call: int, x: Tensor, mean: Tensor) -> Tensor:
        if call % 2 == 0:
            # A loop may give its points in the same memory at each call.
            self._earlier = x.clone(), self._levels[call]
            return self._euler(call, x, mean)
        assert self._earlier is not None
        start, level = self._earlier
        return heun_step_from_mean(start, x, mean, level, self._levels[call])

    def _multistep(self, call: int, x: Tensor, mean: Tensor) -> Tensor:
        earlier, self._earlier = self._earlier, (mean, self._levels[call])
        if earlier is None or call == len(self.timesteps) - 1:
            return self._euler(call, x, mean)
        return multistep_step_from_mean(
            x, mean, self._levels[call], self._levels[call + 1], *earlier
        )

    # ---- training ----

    def perturb(
        self, original_samples: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Points (B, *S) around data at levels of training, and their timesteps (B,).

        As ``flow.perturb``, which ``flow.loss`` trains at.
        """
        x, level = self._flow.perturb(original_samples, generator)
        return x, self._telling(level)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data (B, *S) with noise of timesteps, one or (B,): data + σ noise.

        The noise is of level 1, ``flow.noise(torch.ones(B))``: standard normal at D = ∞ alone.
        """
        level = self._level(original_samples, timesteps)
        return original_samples + over_samples(level, noise) * noise

    def _level(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        told = torch.as_tensor(timestep).to(x.device, wide_dtype(x.device))
        return self._telling.level(told).to(x.dtype).expand(len(x))


class PoissonFlowScheduler(FlowScheduler):
    """PFGM (arXiv 2209.11178) for networks of diffusers that predict the field.

    Such a network has a channel more than the samples: the first are field_x, the mean of the last
    one over the pixels is field_z, as published. It sees the points as they are.

    Args:
        flow: the hyper-parameters of a :class:`pfgm.PoissonFlow`, its ``config``;
            :meth:`from_flow` takes the flow itself.
        solver: "euler", "heun" or "multistep"; None takes the one of ``flow.sample``.
        schedule: spacing of the levels, "log" or "rho"; None likewise.
        prediction_type: "field".
        level: how the network is told the level, "timestep", "log" or "sigma"
            (:func:`pfgm.networks.from_module`).

    Raises:
        ValueError: an argument is not allowed.

    >>> import pfgm
    >>> flow = pfgm.PoissonFlow((1, 4, 4), data_norm=1.0)
    >>> scheduler = PoissonFlowScheduler.from_flow(flow, solver="heun")
    >>> scheduler.set_timesteps(3)
    >>> scheduler.timesteps.round()
    tensor([1000.,  768.,  768.,  460.,  460.])
    >>> output = torch.zeros(2, 2, 4, 4)  # of a network, no field at all
    >>> scheduler.step(output, scheduler.timesteps[0], scheduler.prior(2)).prev_sample.shape
    torch.Size([2, 1, 4, 4])
    """

    _flow_type = PoissonFlow
    _flow: PoissonFlow
    _predictions = ("field",)

    def target(
        self,
        noisy_samples: Tensor,
        timesteps: Tensor,
        original_samples: Tensor,
        references: References | None = None,
    ) -> Tensor:
        """What the network should return, (B, C + 1, *S[1:]): the field of the references.

        The last channel is field_z at every pixel. ``flow.loss`` of
        :func:`pfgm.networks.from_module` counts it once a sample, as published.

        Args:
            noisy_samples: (B, *S), of :meth:`perturb`.
            timesteps: (B,), likewise.
            original_samples: (B, *S), the data that were perturbed.
            references: (M, *S) data with the original ones among them; None means those alone.
        """
        z = self._level(noisy_samples, timesteps)
        charges = original_samples if references is None else references
        field_x, field_z = field_fn(noisy_samples, z, charges, gamma=self._flow.gamma)
        return torch.cat([field_x, over_samples(field_z, field_x).expand_as(field_x[:, :1])], 1)


class PoissonFlowPPScheduler(FlowScheduler):
    """PFGM++ (arXiv 2302.04265) and diffusion for networks of diffusers.

    Args:
        flow: the hyper-parameters of a :class:`pfgm.PoissonFlowPP`, its ``config``;
            :meth:`from_flow` takes the flow itself.
        solver: "euler", "heun" or "multistep"; None takes the one of ``flow.sample``.
        schedule: spacing of the levels, "log" or "rho"; None likewise.
        prediction_type: what the network's output is: "residual", the F of EDM's preconditioning,
            "mean", "noise" or "score" (:func:`pfgm.networks.from_module`).
        level: how the network is told the level, "timestep", "log" or "sigma", likewise.

    Raises:
        ValueError: an argument is not allowed.

    >>> import pfgm
    >>> flow = pfgm.PoissonFlowPP((1, 4, 4), D=128)
    >>> scheduler = PoissonFlowPPScheduler.from_flow(flow, solver="multistep")
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.round()
    tensor([1000.,  801.,  515.,    0.])
    """

    _flow_type = PoissonFlowPP
    _flow: PoissonFlowPP
    _reader: ForeignDenoiser
    _predictions = ("residual", "mean", "noise", "score")

    def target(
        self,
        noisy_samples: Tensor,
        timesteps: Tensor,
        original_samples: Tensor,
        references: References | None = None,
    ) -> Tensor:
        """What the network should return, (B, *S), where the mean should be the original sample.

        With prediction_type "residual" the squared error, summed over a sample and averaged over
        the batch, is ``flow.loss``.

        Args:
            noisy_samples: (B, *S), of :meth:`perturb`.
            timesteps: (B,), likewise.
            original_samples: (B, *S), the data that were perturbed.
            references: (M, *S) data with the original ones among them, whose posterior mean is
                meant in place of the original sample; it varies less (arXiv 2302.00670).
        """
        x, sigma = noisy_samples, self._level(noisy_samples, timesteps)
        if references is None:
            mean = dequantise(original_samples, x.dtype)
        else:
            mean = posterior_mean(x, references, sigma=sigma, D=self._flow.D)
        # The mean is linear in the points and the output.
        zeros = torch.zeros_like(x)
        of_points = self._reader.read(x, sigma, zeros)
        return (mean - of_points) / self._reader.read(zeros, sigma, torch.ones_like(x))
