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


def jobs(preset: Preset) -> list[Job]:
    return [
        Job(
            "likelihood-seeds",
            by_flow if spec else by_gaussian,
            {"model": spec.method if spec else "Gaussian", "data": part, "seed": seed},
            spec,
            1000 if spec else 1,
        )
        for seed in preset.seeds
        for spec in (
            *(methods.spec_of(preset, method, seed, dequantised=True) for method in METHODS),
            None,
        )
        for part in ("held out", "train")
    ]


def _rows(preset: Preset, part: str) -> Tensor:
    """The images that are measured: evenly spaced ones of a part of the data."""
    data = data_of(preset)
    return evenly_spaced(
        data.held_out if part == "held out" else data.train, preset.likelihood_rows
    )


def by_flow(preset: Preset, folder: Path, spec: Spec, model: str, data: str, seed: int) -> Row:
    flow, network = methods.load(spec, preset, folder)
    result = bits_per_dim(
        flow,
        network,
        _rows(preset, data),
        grey_levels=data_of(preset).grey_levels,
        seed=seed,
        batch_size=preset.sampling_batch,
        rtol=preset.likelihood_tolerance,
        atol=preset.likelihood_tolerance,
    )
    return {
        "bits_per_dim": result.mean,
        "standard_error": result.standard_error,
        "evaluations": result.nfe,
    }


def by_gaussian(preset: Preset, folder: Path, spec: None, model: str, data: str, seed: int) -> Row:
    """A normal distribution with the mean and covariance of the training data."""
    grey_levels, generator = data_of(preset).grey_levels, torch.Generator().manual_seed(seed)
    train = methods.dequantised(preset).flatten(1).double()
    x = dequantised(_rows(preset, data), grey_levels, generator).flatten(1).double()
    normal = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    bits = -normal.log_prob(x) / (x.shape[1] * math.log(2)) + math.log2(grey_levels / 2)
    error = float(bits.std()) / math.sqrt(len(bits))
    return {"bits_per_dim": float(bits.mean()), "standard_error": error, "evaluations": 0}


def derive(tables: Tables, preset: Preset) -> Tables:
    figures = ["bits_per_dim", "standard_error", "evaluations"]
    return {"likelihood-means": over_seeds(tables["likelihood-seeds"], ["model", "data"], figures)}


def draw(tables: Tables, folder: Path) -> None:
    path = folder / "likelihood.png"
    rows, title = tables["likelihood-means"], "Likelihood, lower is better"
    bars(rows, "model", "data", "bits_per_dim", path, "bits per dimension", title)


CLAIM = Claim("likelihood", jobs, derive, draw)
