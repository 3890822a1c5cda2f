"""Claim 6: PFGM's ODE gives likelihoods on a level with those of diffusion.

(PFGM, arXiv 2209.11178, section 4.4.) Measures bits per dimension of held-out data by the ODEs of
PFGM and EDM, beside a Gaussian fitted to the training data. The networks are trained on data with
uniform noise within a grey level, as likelihoods of discrete data need.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.claims import methods
from benchmarks.claims.claim import Claim
from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.measures import data_of
from benchmarks.claims.methods import Spec
from benchmarks.claims.pictures import bars
from benchmarks.claims.presets import Preset
from benchmarks.common.rows import Row, over_seeds
from pfgm.evaluation import bits_per_dim, dequantised, evenly_spaced

METHODS = ("PFGM", "EDM")


def _spec(preset: Preset, method: str, seed: int) -> Spec:
    return methods.spec_of(preset, method, seed, dequantised=True)


def specs(preset: Preset) -> list[Spec]:
    return [_spec(preset, method, seed) for seed in preset.seeds for method in METHODS]


def jobs(preset: Preset) -> list[Job]:
    return [
        *(
            Job("likelihood-seeds", by_flow, (method, seed, part), 1000)
            for seed in preset.seeds
            for method in METHODS
            for part in ("held out", "train")
        ),
        *(
            Job("likelihood-seeds", by_gaussian, (seed, part))
            for seed in preset.seeds
            for part in ("held out", "train")
        ),
    ]


def _rows(preset: Preset, part: str) -> Tensor:
    """The images that are measured: evenly spaced ones of a part of the data."""
    data = data_of(preset)
    return evenly_spaced(
        data.held_out if part == "held out" else data.train, preset.likelihood_rows
    )


def by_flow(preset: Preset, folder: Path, method: str, seed: int, part: str) -> list[Row]:
    flow, network = methods.load(_spec(preset, method, seed), preset, folder)
    result = bits_per_dim(
        flow,
        network,
        _rows(preset, part).to(preset.device),
        grey_levels=data_of(preset).grey_levels,
        seed=seed,
        batch_size=preset.sampling_batch,
        rtol=preset.likelihood_tolerance,
        atol=preset.likelihood_tolerance,
    )
    row = {"model": method, "data": part, "seed": seed, "bits_per_dim": result.mean}
    return [{**row, "standard_error": result.standard_error, "evaluations": result.nfe}]


def by_gaussian(preset: Preset, folder: Path, seed: int, part: str) -> list[Row]:
    """A normal distribution with the mean and covariance of the training data."""
    grey_levels, generator = data_of(preset).grey_levels, torch.Generator().manual_seed(seed)
    train = methods.dequantised(preset).flatten(1).double()
    x = dequantised(_rows(preset, part), grey_levels, generator).flatten(1).double()
    normal = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    bits = -normal.log_prob(x) / (x.shape[1] * math.log(2)) + math.log2(grey_levels / 2)
    error = float(bits.std()) / math.sqrt(len(bits))
    row = {"model": "Gaussian", "data": part, "seed": seed, "bits_per_dim": float(bits.mean())}
    return [{**row, "standard_error": error, "evaluations": 0}]


def derive(tables: Tables, preset: Preset) -> Tables:
    figures = ["bits_per_dim", "standard_error", "evaluations"]
    return {"likelihood-means": over_seeds(tables["likelihood-seeds"], ["model", "data"], figures)}


def draw(tables: Tables, folder: Path) -> None:
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for row in tables["likelihood-means"]:
        value = row["bits_per_dim"], row["bits_per_dim_spread"]
        values.setdefault(row["model"], {})[row["data"]] = value
    bars(
        values,
        folder / "likelihood.png",
        ylabel="bits per dimension",
        title="Likelihood, lower is better",
    )


CLAIM = Claim("likelihood", specs, jobs, derive, draw)
