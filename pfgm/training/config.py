"""The settings of :class:`pfgm.training.Trainer`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from ..common.checks import check_bool, check_choice
from ..common.hints import with_hints
from ..common.numbers import as_number, check_seed, positive, whole
from .logs import LogTo

_PUBLISHED_STEPS = 100_000  # from this number of steps on, the published settings are the defaults
_BATCH_SIZE = 128
_MOST_MINUTES = 1e6  # two years

Decay = Literal["none", "cosine"]
Precision = Literal["auto", "float32", "bfloat16"]


class Schedule(NamedTuple):
    """The settings whose defaults follow from the number of steps."""

    learning_rate: float
    beta2: float
    warmup: int
    decay: Decay
    ema: float
    checkpoint_every: int

    @classmethod
    def of(cls, steps: int) -> Schedule:
        """The default schedule for this number of steps.

        From 100 000 steps on it is the one published for CIFAR-10 (PFGM, appendix B.1). A shorter
        run has the same proportions: 5 % of it is warm-up, the weights are averaged over a tenth,
        and Adam's squared gradients over at least 100 steps. Its learning rate is higher, in
        proportion to 1/steps^(3/4) and at most thirtyfold, and falls to 0. The exponent leads from
        the published rate to 6e-3 for 1000 steps, which was measured (docs/studies.md).

        >>> Schedule.of(1000)  # doctest: +NORMALIZE_WHITESPACE
        Schedule(learning_rate=0.006, beta2=0.99, warmup=50, decay='cosine', ema=0.99,
                 checkpoint_every=100)
        """
        fraction = min(steps / _PUBLISHED_STEPS, 1.0)
        return cls(
            learning_rate=2e-4 * min(fraction**-0.75, 30.0),
            beta2=max(1 - 1e-3 / fraction, 0.99),
            warmup=int(5000 * fraction),
            decay="none" if fraction == 1 else "cosine",
            ema=max(1 - 1e-4 / fraction, 0.0),
            checkpoint_every=max(int(5000 * fraction), 100),
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    The defaults are those published for CIFAR-10 (PFGM, appendix B.1), and a shorter run gets
    defaults that suit its length. Settings that are None follow from ``steps``: see
    :meth:`resolved`. With ``minutes`` they follow from the steps that fit into the time.
    """

    steps: int | None = None
    """Optimiser steps; by default 100 000, or as many as fit into ``minutes``."""
    minutes: float | None = None
    """Time of the run, in place of steps. The learning rate follows the share of the time that is
    used, so it falls to 0 also if the machine slows down. A resumed run has what is left."""
    batch_size: int | None = None
    """Samples in a step, of all processes together; by default 128, or all data if there are fewer;
    ``pfgm train --minutes`` chooses."""
    reference_batch: int = 4096
    """Samples whose field is the target; they contain the batch. All data are taken if there are
    fewer, or if the data are sharded over processes. 0, for PFGM++ only, means the single-sample
    target."""
    learning_rate: float | None = None
    """Adam's learning rate after the warm-up. By default it follows from the steps: 2e-4 from
    100 000 on, 6e-3 up to 1000, in between in proportion to 1/steps^(3/4)."""
    beta2: float | None = None
    """Adam's decay of the squared gradient; by default 0.999 from 100 000 steps on, 0.99 up to
    10 000."""
    warmup: int | None = None
    """Steps in which the learning rate rises linearly; by default 5 % of the steps, at most
    5000."""
    decay: Decay | None = None
    """How the learning rate falls from the end of the warm-up to the last step; by default none
    from 100 000 steps on, else cosine, as always with ``minutes``."""
    clip: float = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down."""
    ema: float | None = None
    """Decay of the averaged weights; it is min(ema, (1 + t)/(10 + t)) at step t. By default
    1 - 10/steps, at most 0.9999."""
    accumulate: int = 1
    """Number of parts into which a batch is split to save memory."""
    precision: Precision = "auto"
    """Precision of the network. bfloat16 means autocast, with weights, targets, losses and averages
    in float32. auto: bfloat16 where a step, timed at the start, is at least 1.2 times as fast with
    it, for images and signals; else float32."""
    compile: bool = False
    """Whether to compile the network (torch.compile)."""
    label_dropout: float = 0.1
    """Fraction of the labels that are dropped. The network then also learns the field without
    labels, which guidance needs."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default 5 % of the steps, at least 100 and at most 5000."""
    evaluate_every: int | None = None
    """Steps between evaluations, of which the last comes at the end; 0 means none. By default there
    are none with ``steps``; with ``minutes`` one after a quarter of the time and one at the end."""
    log_every: int = 50
    """Steps between reports of the loss."""
    log: LogTo = "csv"
    """Where reports and evaluations go: csv (log.csv and evaluations.csv, which are always
    written), tensorboard or wandb as well. wandb takes its settings from its environment
    variables, such as WANDB_MODE=offline and WANDB_PROJECT."""
    seed: int = 0
    """Seed of batches, perturbation and dropout."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"only one of steps and minutes may be given, got {self.steps!r} and "
                f"{self.minutes!r}."
            )
        if self.steps is not None:
            object.__setattr__(self, "steps", whole("steps", self.steps))
        if self.minutes is not None and not 0 < as_number(self.minutes) <= _MOST_MINUTES:
            raise ValueError(
                f"minutes must be a number above 0 and at most {_MOST_MINUTES:g}, got "
                f"{self.minutes!r}."
            )
        batch_size = _BATCH_SIZE if self.batch_size is None else self.batch_size
        values = vars(self) | self.schedule._asdict() | {"batch_size": batch_size}
        smallest = {"batch_size": 1, "reference_batch": 0, "warmup": 0, "accumulate": 1}
        smallest |= {"checkpoint_every": 1, "log_every": 1}
        smallest |= {} if self.evaluate_every is None else {"evaluate_every": 0}
        for name, least in smallest.items():
            number = whole(name, values[name], least)
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number)
        check_seed(self.seed)
        check_bool("compile", self.compile)
        positive("learning_rate", values["learning_rate"])
        if not as_number(values["clip"]) > 0:
            raise ValueError(f"clip must be a number above 0, got {values['clip']!r}.")
        for name in ("ema", "beta2", "label_dropout"):
            if not 0 <= as_number(values[name]) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {values[name]!r}.")
        check_choice("decay", values["decay"], get_args(Decay))
        check_choice("log", self.log, get_args(LogTo))
        check_choice("precision", self.precision, get_args(Precision))
        if batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size, {batch_size}, got {self.accumulate}."
            )
        if 0 < self.reference_batch < batch_size:
            raise ValueError(
                f"reference_batch must be at least batch_size, {batch_size}, as the "
                "references contain the batch (or 0, for PFGM++ only), got "
                f"{self.reference_batch}; or give a smaller batch_size."
            )

    @property
    def _steps(self) -> int:
        return _PUBLISHED_STEPS if self.steps is None else self.steps

    @property
    def schedule(self) -> Schedule:
        """The settings that follow from the number of steps, except those that were given.

        >>> TrainConfig(steps=2000, ema=0.5).schedule.ema, TrainConfig(steps=2000).schedule.ema
        (0.5, 0.995)
        """
        return self._schedule_of(self._steps)

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluations."""
        return bool(self.minutes if self.evaluate_every is None else self.evaluate_every)

    def _schedule_of(self, steps: int) -> Schedule:
        settings = {name: getattr(self, name) for name in Schedule._fields}
        if self.minutes is not None:
            settings["decay"] = self.decay or "cosine"
        settings = {name: value for name, value in settings.items() if value is not None}
        return Schedule.of(steps)._replace(**settings)

    def resolved(self, expected_steps: int | None = None) -> TrainConfig:
        """The same configuration with all settings given; with other steps it stays as it is.

        Args:
            expected_steps: the number of steps that are expected in ``minutes``; None leaves the
                settings that follow from it open.

        >>> TrainConfig(steps=2000).resolved().warmup
        100
        >>> TrainConfig(minutes=5).resolved(expected_steps=900).warmup
        45
        """
        settled: dict[str, Any] = {"batch_size": self.batch_size or _BATCH_SIZE}
        if self.minutes is None:
            settled |= {"steps": self._steps, **self.schedule._asdict()}
        elif expected_steps is not None:
            settled |= self._schedule_of(expected_steps)._asdict()
        return dataclasses.replace(self, **settled)

    def batch_for(self, rows: int, processes: int = 1, size: int = _BATCH_SIZE) -> int:
        """The batch size, or, if it is open, the allowed one nearest to ``size``.

        Processes and parts divide it, and it is at most the number of rows and of references.

        >>> TrainConfig().batch_for(1000), TrainConfig().batch_for(33, processes=2)
        (128, 32)
        """
        if self.batch_size is not None:
            return self.batch_size
        unit = processes * self.accumulate
        most = min(rows, self.reference_batch or rows)
        return max(min(round(size / unit), most // unit), 1) * unit

    def learning_rate_at(self, step: int, share: float = 0.0) -> float:
        """The learning rate at a step: a linear warm-up, then constant or half a cosine to 0.

        With ``minutes`` the cosine is over the share of the time that is used, from 0 to 1.

        >>> TrainConfig(steps=100, warmup=10, learning_rate=1.0, decay="cosine").learning_rate_at(4)
        0.5
        >>> TrainConfig(minutes=5, warmup=10, learning_rate=1.0).learning_rate_at(400, share=0.5)
        0.5
        """
        rate, _, warmup, decay, *_ = self.schedule
        # With minutes, the steps of the warm-up are no share of the run, so both factors multiply.
        rising = min((step + 1) / max(warmup, 1), 1.0)
        if decay == "none" or (step < warmup and self.minutes is None):
            return rate * rising
        if self.minutes is None:
            share, rising = (step - warmup) / max(self._steps - warmup, 1), 1.0
        return rate * rising * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


TrainConfig.__init__ = with_hints(TrainConfig.__init__)  # type: ignore[method-assign]
