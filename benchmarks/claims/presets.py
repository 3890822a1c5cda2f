"""The size of the comparison: the configuration object that all claims read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from pfgm.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """Data, network, training, and the measurements of each claim. Defaults: ``quick``."""

    data: str = "digits"
    """A name for :func:`pfgm.data.open`. The classifier needs labels."""
    width: int = 16
    """Channels of the U-Net's finest level."""
    multipliers: tuple[int, ...] = (1, 2)
    steps: int = 800
    """Gradient steps of every network."""
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.99
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the networks in training. They are sampled in float32."""
    references: int = 1398
    """Number of references of PFGM's field."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of networks, training and sampling. Each method has one network per seed."""
    samples: int = 500
    """Number of samples for each figure, and the largest number of held-out data to compare them
    with."""
    sampling_batch: int = 80
    methods: tuple[str, ...] = (
        "PFGM",
        "PFGM++ 16",
        "PFGM++ 128",
        "PFGM++ 2048",
        "EDM",
        "VE",
        "VP",
    )
    """Quality and step size: the methods, of which "VE" and "VP" are needed."""
    classifier_epochs: int = 5
    """Few, so that the classifier does not memorise its training data."""

    evaluations: tuple[int, ...] = (3, 5, 6, 8, 10, 20, 40)
    """Quality: evaluations of the deterministic solvers. heun takes half the steps, rounded up."""
    tolerances: tuple[float, ...] = (1e-3, 1e-4)
    """Quality: rtol and atol of rk45."""
    solvers: tuple[str, ...] = ()
    """Quality: the deterministic solvers by their names in the tables; all unless given."""
    sde_steps: tuple[int, ...] = (10, 20, 40, 50, 100, 125, 200, 250)
    """Quality: steps of the SDE samplers. predictor–corrector takes two evaluations per step.

    Divisors of 1000, the levels of diffusers' chain, so that its steps are evenly spaced.
    """
    max_evaluations: int = 1000
    """Quality: an SDE sampler that would take more is left out."""
    chain_steps: tuple[int, ...] = (5, 8, 10, 20, 40, 100)
    """Quality: steps of diffusers' deterministic samplers, also divisors of 1000."""

    euler_steps: tuple[int, ...] = (10, 20, 50, 100, 1000)
    """Step size: numbers of Euler steps. All are compared with the last."""
    euler_grids: tuple[str, ...] = ("uniform", "log", "rho")
    euler_samples: int = 160
    """Step size: number of samples."""

    weak_methods: tuple[str, ...] = ("PFGM", "PFGM++ 128", "EDM", "VE", "VP")
    weak_networks: tuple[str, ...] = ("full", "half width", "quarter width", "stopped early")
    weak_evaluations: int = 20
    """Weak networks: evaluations of the multistep solver."""
    weak_sde_steps: int = 100

    dimensions: tuple[float, ...] = (1, 4, 16, 64, 128, 2048, math.inf)
    noises: tuple[float, ...] = (0.2, 0.5, 1.0)
    """Dimensions: standard deviations α of noise on the network's output, whose own is about 1."""
    bits: tuple[int, ...] = (8, 4, 3)
    """Dimensions: bits of the quantised weights."""

    reference_counts: tuple[int, ...] = (128, 512, 1398)
    """References: numbers of references. If the last is all data, its target is exact."""
    probe_rows: int = 256
    """References: points at each level at which the variance of targets is measured."""
    timing_turns: int = 15

    dequantised_copies: int = 8
    """Likelihood: copies of the training data, each with its own noise."""
    likelihood_rows: int = 399
    likelihood_tolerance: float = 1e-4

    @property
    def early(self) -> int:
        """The step whose weights are those of a network stopped early."""
        return max(self.steps // 4, 1)

    def training(self, references: int, seed: int) -> TrainConfig:
        """The training configuration of every network."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            reference_batch=references,
            learning_rate=self.learning_rate,
            beta2=0.99,
            warmup=min(self.warmup, self.steps // 10),
            decay="cosine",
            ema=self.ema,
            precision=self.precision,
            checkpoint_every=self.early,
            evaluate_every=self.early,
            log_every=max(self.steps // 100, 1),
            seed=seed,
        )

    def described(self) -> dict[str, Any]:
        """All settings, for JSON."""
        return {
            name: [str(v) if v == math.inf else v for v in value]
            if isinstance(value, tuple)
            else value
            for name, value in dataclasses.asdict(self).items()
        }


_CPU = Preset(
    data="fashion-mnist",
    multipliers=(1, 2, 2),
    steps=3000,
    learning_rate=2e-3,
    warmup=150,
    ema=0.997,
    precision="bfloat16",
    references=4096,
    seeds=(0, 1),
    sampling_batch=50,
    classifier_epochs=5,
    methods=("PFGM", "PFGM balanced", "PFGM++ 128", "EDM", "VE", "VP"),
    evaluations=(5, 6, 8, 10, 20, 40),
    tolerances=(),
    solvers=("multistep, log",),
    sde_steps=(10, 20, 50, 100, 250, 500, 1000),
    chain_steps=(5, 10, 20, 50, 100),
    euler_steps=(10, 20, 50, 200),
    euler_grids=("uniform", "log"),
    weak_methods=("PFGM", "PFGM balanced", "PFGM++ 128", "EDM", "VE", "VP"),
    weak_networks=("full", "stopped early"),
    bits=(8, 6, 4, 3),
    reference_counts=(128, 512, 4096, 60_000),
    dequantised_copies=1,
    likelihood_rows=500,
)

PRESETS = {"quick": Preset(), "cpu": _CPU}
"""``quick`` takes at most 45 minutes on two cores. ``cpu`` takes hours: its claims of quality, step
size and weaker networks have been run."""
