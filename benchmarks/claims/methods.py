"""The methods: one backbone with the preconditioning, levels and loss of each method.

"PFGM", "PFGM++ D" for a number D, and "EDM" are the library's flows. "PFGM" has the published loss,
"PFGM balanced" the library's default. "VE" and "VP" are the score models of Song et al. (arXiv
2011.13456) as EDM writes them (arXiv 2206.00364, table 1): denoisers at D = ∞ with their own
preconditioning, levels and weights. PFGM learns the field of references. The others learn the
single-sample target, as published.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import pfgm
from benchmarks.claims.measures import data_of
from benchmarks.claims.presets import Preset
from pfgm.common.tensors import over_samples
from pfgm.evaluation import draw_samples
from pfgm.flows.flow import Flow
from pfgm.networks import Denoiser, Preconditioned, UNet
from pfgm.training import Trainer
from pfgm.training.model_files import Loaded

SCORE_METHODS = ("VE", "VP")
"""The methods that are not flows of the library."""

_POISSON: dict[str, Literal["published", "balanced"]] = {
    "PFGM": "published",
    "PFGM balanced": "balanced",
}
"""Method → weighting of its loss."""

_VE_LAST = 0.02  # σ_min, for data in [-1, 1]
_BETA_MIN, _BETA_RANGE = 0.1, 19.9  # β(t) of VP, t in [0, 1]
_VP_TRAINED, _VP_SAMPLED = 1e-5, 1e-3  # the smallest t


class Spec(NamedTuple):
    """A network to train."""

    method: str
    seed: int
    width: int
    references: int
    """Number of references of the target; 0 is the single-sample target."""
    dequantised: bool = False
    """Whether the data get uniform noise within a grey level, as likelihoods need."""

    @property
    def key(self) -> str:
        """The name of its folder."""
        stem = self.method.lower().replace("++ ", "pp-").replace(" ", "-")
        noise = "-dequantised" if self.dequantised else ""
        return f"{stem}-width{self.width}-references{self.references}{noise}-seed{self.seed}"


def plusplus(D: float) -> str:
    """The method with D augmented dimensions: EDM if D is infinite."""
    return "EDM" if math.isinf(D) else f"PFGM++ {D:g}"


def spec_of(preset: Preset, method: str, seed: int, **changes: Any) -> Spec:
    """A method's network of full width, with the target as published."""
    references = min(preset.references, len(data_of(preset).train)) if method in _POISSON else 0
    return Spec(method, seed, preset.width, references)._replace(**changes)


# ---- the flows --------------------------------------------------------------------------------


@lru_cache
def flow_of(method: str, preset: Preset) -> Flow:
    """The flow that a method's network is sampled with."""
    train = data_of(preset).train
    if method in _POISSON:
        return pfgm.PoissonFlow.from_data(train)
    if method in SCORE_METHODS:
        first, last = (_largest_distance(train), _VE_LAST) if method == "VE" else _vp_ends()
        return pfgm.PoissonFlowPP.from_data(train, D=math.inf, sigma_min=last, sigma_max=first)
    return pfgm.PoissonFlowPP.from_data(
        train, D=math.inf if method == "EDM" else float(method.removeprefix("PFGM++ "))
    )


def from_pfgm_level(flow: Flow, preset: Preset) -> Flow:
    """A flow of PFGM++ that starts at σ = z_max like PFGM, not at the much higher level of EDM."""
    start = flow_of("PFGM", preset).first_level
    return pfgm.PoissonFlowPP(**{**flow.config, "sigma_max": start})


def _largest_distance(train: Tensor) -> float:
    """The largest distance between data, VE's σ_max (arXiv 2006.09011, technique 1)."""
    rows = train[:: max(len(train) // 2000, 1)].flatten(1)
    return float(torch.cdist(rows, rows).max())


def vp_sigma(t: Tensor) -> Tensor:
    """σ(t) of VP: e^(½ β_d t² + β_min t) = 1 + σ² (EDM, table 1)."""
    return torch.expm1(_BETA_RANGE / 2 * t.square() + _BETA_MIN * t).sqrt()


def _vp_ends() -> tuple[float, float]:
    first, last = vp_sigma(torch.tensor([1.0, _VP_SAMPLED], dtype=torch.float64)).tolist()
    return first, last


# ---- the networks -----------------------------------------------------------------------------


class Score(Preconditioned):
    """A denoiser whose backbone predicts the noise, up to the sign (EDM, table 1).

    VE: mean = x + σ F(x, c_noise).   VP: mean = x − σ F(x/√(σ² + 1), c_noise).
    c_noise, the backbone's input for the level, is ln σ as for every method.
    """

    def __init__(self, method: str, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.method = method

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.method == "VE":
            return x
        return x * (1 + over_samples(sigma, x).to(x.dtype).square()).rsqrt()

    def mean(self, x: Tensor, sigma: Tensor, predicted: Tensor) -> Tensor:
        sign = 1 if self.method == "VE" else -1
        return x + sign * over_samples(sigma, x).to(x.dtype) * predicted


def network_of(spec: Spec, preset: Preset, flow: Flow) -> nn.Module:
    """The method's network, initialised with its seed. All have the same backbone."""
    data = data_of(preset)
    config: dict[str, Any] = {
        "shape": flow.shape,
        "width": spec.width,
        "multipliers": preset.multipliers,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        if spec.method in _POISSON:
            return UNet(**config, data_std=data.rms)
        denoiser = Denoiser("unet", config, data.rms)
        if spec.method in SCORE_METHODS:
            return Score(spec.method, denoiser.backbone)
        return denoiser


def loss_of(method: str, flow: Flow) -> Callable[..., Tensor]:
    """The published loss of a method; of a score model it is E ‖mean − x‖²/σ² at its levels."""
    if isinstance(flow, pfgm.PoissonFlow):
        return functools.partial(flow.loss, weighting=_POISSON[method])
    if method not in SCORE_METHODS:
        return flow.loss

    def loss(
        net: nn.Module, x: Tensor, references: Any, generator: torch.Generator, **_: Any
    ) -> Tensor:
        u = torch.rand(len(x), generator=generator, device=x.device)
        sigma = trained_level(method, flow, u)
        mean: Tensor = net(x + flow.noise(sigma, generator), sigma)
        error = (mean - x).flatten(1) / sigma[:, None]
        return error.square().sum(1).mean()

    return loss


def trained_level(method: str, flow: Flow, u: Tensor) -> Tensor:
    """The training level σ of a score model, for u uniform in [0, 1).

    VE: log-uniform. VP: the level of a uniform t (EDM, table 1).
    """
    if method == "VP":
        return vp_sigma(_VP_TRAINED + (1 - _VP_TRAINED) * u)
    return flow.last_level * (flow.first_level / flow.last_level) ** u


# ---- training ---------------------------------------------------------------------------------


def run_of(folder: Path, spec: Spec) -> Path:
    """The folder of a network's training run."""
    return folder / "networks" / spec.key


def is_trained(spec: Spec, preset: Preset, folder: Path) -> bool:
    """Whether all of its steps are done."""
    path = run_of(folder, spec) / "latest.json"
    return path.exists() and json.loads(path.read_text())["step"] >= preset.steps


def train(spec: Spec, preset: Preset, folder: Path) -> None:
    """Trains a network, or continues a training that was stopped.

    Also keeps the averaged weights after a quarter of the steps.
    """
    if is_trained(spec, preset, folder):
        return
    data, run = data_of(preset), run_of(folder, spec)
    flow = flow_of(spec.method, preset)
    network = network_of(spec, preset, flow)

    def keep(step: int, averaged: nn.Module) -> dict[str, float]:
        if step == preset.early:
            pfgm.save(run / "early.safetensors", flow, averaged, step=step)
        return {}

    rows = dequantised(preset) if spec.dequantised else data.train
    trainer = Trainer(
        flow,
        network,
        rows,
        preset.training(spec.references, spec.seed),
        folder=run,
        progress=False,
        evaluate=keep,
        loss=loss_of(spec.method, flow),
    )
    if (run / "latest.json").exists():
        keep(trainer.resume(), trainer.averaged)
    trainer.train()


@lru_cache
def dequantised(preset: Preset) -> Tensor:
    """Copies of the training data, each with its own noise within a grey level."""
    data, generator = data_of(preset), torch.Generator().manual_seed(0)
    copies = data.train.repeat(preset.dequantised_copies, 1, 1, 1)
    return pfgm.evaluation.dequantised(copies, data.grey_levels, generator)


def load(spec: Spec, preset: Preset, folder: Path, *, early: bool = False) -> Loaded:
    """A trained network with its flow."""
    run = run_of(folder, spec)
    network = network_of(spec, preset, flow_of(spec.method, preset))
    path = run / "early.safetensors" if early else run
    return pfgm.load(path, network)


def draw(
    flow: Flow,
    network: nn.Module,
    preset: Preset,
    seed: int,
    *,
    samples: int | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Samples (n, *S), by default the preset's number, and the evaluations of the network."""
    return draw_samples(
        flow,
        network,
        preset.samples if samples is None else samples,
        seed=seed,
        batch_size=preset.sampling_batch,
        **options,
    )
