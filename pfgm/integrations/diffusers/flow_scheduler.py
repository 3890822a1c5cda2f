"""The base of the schedulers: levels, steps and perturbed data in the form of diffusers."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn

from ...common.checks import check_choice
from ...common.numbers import whole
from ...common.old_names import with_present_names
from ...common.tensors import over_samples, per_row, wide_dtype
from ...flows.flow import Flow
from ...flows.plusplus import PoissonFlowPP
from ...flows.poisson import PoissonFlow
from ...functional.steps import implied_mean
from ...networks.level_encodings import (
    IdentityEncoding,
    LogEncoding,
    TimestepEncoding,
    level_encoding,
)
from ...networks.wrapped import Wrapped
from ...references import References
from .normal_noise import check_start, looks_normal
from .solver_run import SOLVERS, SolverRun

_NAMES_OF_DIFFUSERS = {"epsilon": "noise", "sample": "mean"}
_FIXED = frozenset({"flow", "level", "num_train_timesteps", "variance_preserving"})
Scheduler = TypeVar("Scheduler", bound="FlowScheduler")


@dataclasses.dataclass
class PoissonFlowSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """The result of a step."""

    prev_sample: Tensor
    """The points (B, *S) at the next level, the next input of the network."""
    pred_original_sample: Tensor
    """The posterior mean (B, *S) at the present level."""


def _check_solver(solver: Any) -> None:
    """Raises an error unless solver is the name of one with a fixed number of evaluations."""
    if callable(solver):
        raise TypeError(
            f"solver must be one of {', '.join(SOLVERS)}, got a function; flow.sample takes "
            "functions, with the network that flow.network makes."
        )
    check_choice("solver", solver, SOLVERS)


class FlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Base of both schedulers.

    Args:
        flow: the ``config`` of a flow of the class; :meth:`from_flow` takes the flow itself.
        solver: "euler", "heun", which calls the network twice in each step except the last, or
            "multistep"; None takes that of ``flow.sample``.
        schedule: spacing of the levels, "log" or "rho"; None takes that of ``flow.sample``.
        prediction_type: the meaning of the network's output, as the class says.
        level: how the level is encoded, "timestep", "log" or "sigma"
            (:meth:`pfgm.Flow.network`).
        num_train_timesteps: the timestep of the first level, with level "timestep".
        variance_preserving: for :class:`PoissonFlowPPScheduler`.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """

    _flow_type: ClassVar[type[PoissonFlow] | type[PoissonFlowPP]]
    _predictions: ClassVar[tuple[str, ...]]
    _flow: PoissonFlow | PoissonFlowPP
    _wrapped: Wrapped
    _step_index: int | None
    _begin_index: int | None
    _run: SolverRun
    _encoding: TimestepEncoding | LogEncoding | IdentityEncoding

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        flow: Mapping[str, Any],
        solver: str | None = None,
        schedule: str | None = None,
        prediction_type: str | None = None,
        level: str = "timestep",
        num_train_timesteps: int = 1000,
        variance_preserving: bool = False,
    ) -> None:
        if not isinstance(flow, Mapping):
            raise TypeError(
                f"flow must be a flow's config, flow.config, got {type(flow).__name__}; from_flow "
                "takes the flow itself."
            )
        self._flow = self._flow_type(**with_present_names(self._flow_type.__name__, flow))
        defaults = self._flow.defaults
        if prediction_type is None:
            prediction_type = "noise" if variance_preserving else self._predictions[0]
        whole("num_train_timesteps", num_train_timesteps)
        self._variance_preserving = variance_preserving
        ends = self._flow.first_level, self._flow.last_level
        if level == "timestep":
            self._encoding = TimestepEncoding(*ends, num_train_timesteps)
        else:
            self._encoding = level_encoding(level, *ends)
        self.register_to_config(
            solver=solver or defaults.solver,
            schedule=schedule or defaults.schedule,
            prediction_type=prediction_type,
        )
        self.set_timesteps()

    def register_to_config(self, **settings: Any) -> None:
        """Changes settings, as training scripts of diffusers do with prediction_type.

        A solver and a schedule hold from the next :meth:`set_timesteps` on.

        Raises:
            TypeError: the solver is a function.
            ValueError: the solver or the prediction_type is not allowed, or another setting would
                change, which needs a new scheduler.
        """
        if "_wrapped" in vars(self):  # from_config would take their defaults again
            defaults = self.config.get("_use_default_values", [])
            settings["_use_default_values"] = [each for each in defaults if each not in settings]
        if "_encoding" in vars(self):  # diffusers registers the arguments of __init__ before it
            for name in sorted(_FIXED & settings.keys()):
                if settings[name] != self.config[name]:
                    raise ValueError(
                        f"{name} must stay {self.config[name]!r}, got {settings[name]!r}; make a "
                        f"new scheduler with from_config(scheduler.config, {name}=…)."
                    )
            if "solver" in settings:
                _check_solver(settings["solver"])
            if "prediction_type" in settings:
                self._interpret_as(settings["prediction_type"])
        super().register_to_config(**settings)

    def _interpret_as(self, prediction_type: str) -> None:
        check_choice("prediction_type", prediction_type, self._predictions)
        predicts = _NAMES_OF_DIFFUSERS.get(prediction_type, prediction_type)
        if self._variance_preserving and (
            math.isfinite(self._flow.D) or predicts not in ("noise", "mean")
        ):
            raise ValueError(
                "variance_preserving must be False unless D is infinite and prediction_type is "
                f"'noise' ('epsilon') or 'mean' ('sample'), got D = {self._flow.D:g} and "
                f"prediction_type {prediction_type!r}."
            )
        # This module is never called. It scales the input of a network and interprets its output.
        made = self._flow.network(
            nn.Identity(),
            predicts=predicts,
            level=self._encoding,
            variance_preserving=self._variance_preserving,
        )
        assert isinstance(made, Wrapped)
        self._wrapped = made

    @classmethod
    def from_flow(cls: type[Scheduler], flow: Flow, **options: Any) -> Scheduler:
        """The scheduler of a flow; options are arguments of the class, such as solver.

        Raises:
            TypeError: the flow has the wrong type.
            ValueError: an option is not allowed.
        """
        if not isinstance(flow, cls._flow_type):
            raise TypeError(
                f"flow must be a {cls._flow_type.__name__} for a {cls.__name__}, got "
                f"{type(flow).__name__}."
            )
        scheduler: Scheduler = cls(flow=flow.config, **options)
        return scheduler

    @property
    def flow(self) -> PoissonFlow | PoissonFlowPP:
        """The flow of the scheduler."""
        return self._flow

    @property
    def order(self) -> int:
        """How often the network is called in a step, but the last."""
        return self._run.evaluations

    @property
    def init_noise_sigma(self) -> float:
        """The factor that makes the prior of standard normal noise, at D = ∞.

        It is the first level; with variance_preserving it is 1.

        Raises:
            AttributeError: D is finite. The prior is not normal then; start from :meth:`prior`.
        """
        if math.isfinite(self._flow.D):
            raise AttributeError(
                f"init_noise_sigma exists at D = ∞ only; at D = {self._flow.D:g} the prior is not "
                "normal: start from scheduler.prior(n), as PoissonFlowPipeline does."
            )
        return 1.0 if self._variance_preserving else self._flow.first_level

    def __getattr__(self, name: str) -> Any:
        # Called where a property raises AttributeError too, whose message diffusers would replace.
        attribute = inspect.getattr_static(type(self), name, None)
        if isinstance(attribute, property):
            return attribute.__get__(self)
        return super().__getattr__(name)

    def __repr__(self) -> str:
        settings = {name: value for name, value in self.config.items() if name[0] != "_"}
        return f"{type(self).__name__} {settings}"

    def __len__(self) -> int:
        """The number of timesteps of training, ``config.num_train_timesteps``."""
        return int(self.config["num_train_timesteps"])

    @property
    def step_index(self) -> int | None:
        """The index of the next call of the network; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first call, as set by :meth:`set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index of the first call; by default it follows from the first timestep."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Sets ``timesteps``, one for each call of the network, and ``sigmas``, their levels.

        Args:
            num_inference_steps: number of solver steps; None takes that of ``flow.sample``.
            device: device of the timesteps.
            sigmas: the levels, decreasing; the last is the level of the samples.

        Raises:
            ValueError: steps or levels are out of range, or both are given.
        """
        if sigmas is None:
            levels = self._flow.grid(
                num_inference_steps, self.config["schedule"], solver=self.config["solver"]
            )
        elif num_inference_steps is None:
            levels = self._flow.grid(schedule=[float(sigma) for sigma in sigmas])
        else:
            raise ValueError("num_inference_steps and sigmas must not both be given.")
        self.num_inference_steps = len(levels) - 1
        self._run = SolverRun(self.config["solver"], levels)
        self._levels = [*self._run.levels, levels[-1]]
        self.sigmas = torch.tensor(self._levels, device="cpu")
        self.timesteps = self._encoding(self.sigmas[:-1]).to(device=device)
        self._step_index = self._begin_index = None

    def prior(
        self,
        n: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Points (n, *S) to start from, ``flow.prior``."""
        points = self._flow.prior(n, generator=generator, device=device)
        return self._to_sample(points, self._flow.first_level)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """The input of the network for points (B, *S) at a timestep, a number or (B,)."""
        level = self._level(sample, timestep)
        return self._wrapped.inputs(self._to_points(sample, level), level)[0]

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
            model_output: the output of the network.
            timestep: the timestep of the call, one of ``timesteps``.
            sample: the points (B, *S) from the step before.
            generator: not used; the steps are deterministic.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises:
            TypeError: model_output is no tensor, as the results of networks of diffusers.
            ValueError: the timestep is not in ``timesteps``, none of them is left, the output has a
                wrong shape, the run starts at the second evaluation of a step of heun, or it starts
                from standard normal noise, which is not the prior.
        """
        if not isinstance(model_output, Tensor):
            raise TypeError(
                f"model_output must be a torch.Tensor, got a {type(model_output).__name__}; a "
                "network of diffusers returns it as .sample."
            )
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        call = self._step_index
        if call >= len(self.timesteps):
            raise ValueError(
                f"step is called after the last of {len(self.timesteps)} timesteps; set_timesteps "
                "starts a new run."
            )
        points = self._to_points(sample, self._levels[call])
        if call == 0 and self._levels[0] == self._flow.first_level:
            check_start(self._flow, points, sample)
        mean = self._mean(model_output, points, self._levels[call])
        moved = self._to_sample(self._run.step(points, mean, call), self._levels[call + 1])
        self._step_index += 1
        if not return_dict:
            return moved, mean
        return PoissonFlowSchedulerOutput(prev_sample=moved, pred_original_sample=mean)

    def _mean(self, output: Tensor, sample: Tensor, level: float) -> Tensor:
        """The posterior mean (B, *S) that the output at these points implies."""
        network = partial(self._wrapped.interpret, output=output)
        if not isinstance(self._flow, PoissonFlow):
            return self._flow.denoise(network, sample, level)
        # flow.denoise would move points beyond upper_norm, but the network has seen them unmoved.
        field = self._flow.field(network, sample, per_row(level, sample))
        return implied_mean(sample, field, level)

    def index_for_timestep(self, timestep: Tensor | float) -> int:
        """The index of the call that starts a step at a timestep.

        With heun a timestep between the ends has two calls: the first ends a step, the second
        starts one.
        """
        places = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not places:
            raise ValueError(f"timestep must be one of timesteps, got {float(timestep)}.")
        return int(places[min(len(places), self.order) - 1])

    def perturb(
        self, original_samples: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Perturbed data (B, *S) at random training levels, and their timesteps (B,).

        Both are drawn as in ``flow.perturb`` and ``flow.loss``.
        """
        x, level = self._flow.perturb(original_samples, generator)
        return self._to_sample(x, level), self._encoding(level)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data (B, *S) with noise added at timesteps, a number or (B,): data + σ noise.

        With variance_preserving the result is (data + σ noise)/√(1 + σ²). The noise is
        ``flow.noise(torch.ones(B))``, of level 1, which is standard normal at D = ∞.

        Raises:
            ValueError: D is finite and the noise is standard normal. The norms in a batch tell:
                at D = 1 those of a few dozen samples, at a large D, where the two hardly differ,
                those of many.
        """
        if math.isfinite(self._flow.D) and looks_normal(noise, self._flow.D, 1.0):
            raise ValueError(
                f"noise must be flow.noise(torch.ones(B)) at D = {self._flow.D:g}, got standard "
                "normal noise; scheduler.perturb(x) draws it together with the timesteps."
            )
        level = self._level(original_samples, timesteps)
        return self._to_sample(original_samples + over_samples(level, noise) * noise, level)

    def target(
        self,
        noisy_samples: Tensor,
        timesteps: Tensor,
        original_samples: Tensor,
        references: References | None = None,
        *,
        labels: Tensor | None = None,
        reference_labels: Tensor | None = None,
    ) -> Tensor:
        """The target of the network's output: a field, or the output that implies a mean.

        :class:`PoissonFlowScheduler`: the field of the references, (B, C + 1, *S[1:]), with field_z
        in the last channel at every pixel. ``flow.loss`` of a network from
        :meth:`pfgm.Flow.network` counts field_z once for each sample, as published.

        :class:`PoissonFlowPPScheduler`: the output (B, *S) that implies the original samples, or
        the posterior mean of the references. With prediction_type "residual" the squared error,
        summed over a sample and averaged over the batch, is ``flow.loss``.

        Args:
            noisy_samples: perturbed data (B, *S), from :meth:`perturb`.
            timesteps: their timesteps (B,), from :meth:`perturb`.
            original_samples: the data (B, *S) that were perturbed.
            references: data (M, *S) that contain the original samples; with more of them the target
                varies less (arXiv 2302.00670). None means the original samples.
            labels: labels (B,) of the points, for a network with labels. The target of each point
                is that of the references of its label, or of all where its label is below 0.
            reference_labels: labels (M,) of the references, needed with labels unless references is
                None or a :class:`pfgm.ReferenceSet` that has labels.

        Raises:
            TypeError, ValueError: as :func:`pfgm.posterior_mean`.
        """
        level = self._level(noisy_samples, timesteps)
        points = self._to_points(noisy_samples, level)
        seen = {"labels": labels, "reference_labels": reference_labels}
        return self._target(points, level, original_samples, references, **seen)

    @abstractmethod
    def _target(
        self,
        x: Tensor,
        level: Tensor,
        original: Tensor,
        references: References | None,
        /,
        **labels: Any,
    ) -> Tensor:
        """The target at points x (B, *S) and levels (B,)."""

    def _to_points(self, sample: Tensor, level: Tensor | float) -> Tensor:
        """The points x (B, *S) of samples in the form that the loop of diffusers holds."""
        return sample * self._size(sample, level) if self._variance_preserving else sample

    def _to_sample(self, points: Tensor, level: Tensor | float) -> Tensor:
        """x/√(1 + σ²) with variance_preserving, else x."""
        return points / self._size(points, level) if self._variance_preserving else points

    def _size(self, x: Tensor, level: Tensor | float) -> Tensor:
        wide = torch.as_tensor(level, dtype=wide_dtype(x.device), device=x.device)
        return over_samples(per_row((wide.square() + 1).sqrt(), x), x)

    def _level(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        name = self.config["level"]
        if isinstance(timestep, Tensor) and not timestep.is_floating_point() and name != "timestep":
            raise ValueError(
                f"timesteps must be floating point with level {name!r}, such as those of perturb, "
                f"got {timestep.dtype}."
            )
        encoded = torch.as_tensor(timestep, dtype=wide_dtype(x.device), device=x.device)
        return self._encoding.decode(encoded).to(x.dtype).expand(len(x))
