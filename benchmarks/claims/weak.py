"""Claim 3: PFGM is robust to weaker networks.

(PFGM, arXiv 2209.11178, section 4.2: the ODE of PFGM with the network of NCSNv2.) Samples from
networks of half and quarter width, and from the full network after a quarter of its steps. Every
method uses the same deterministic solver; the score models also use their own SDE samplers.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.claims import methods, peers
from benchmarks.claims.claim import Claim
from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.measures import FIGURES, figures_of
from benchmarks.claims.methods import Spec
from benchmarks.claims.pictures import bars
from benchmarks.claims.presets import Preset
from benchmarks.common.rows import Row, grouped, over_seeds, relative

_SHARE = {"half width": 2, "quarter width": 4}
_ODE = "multistep, log"
_BY = ("method", "sampler", "network")


def _spec(preset: Preset, method: str, seed: int, network: str) -> Spec:
    width = preset.width // _SHARE.get(network, 1)
    return methods.spec_of(preset, method, seed, width=width)


def specs(preset: Preset) -> list[Spec]:
    return [
        _spec(preset, method, seed, network)
        for seed in preset.seeds
        for method in preset.weak_methods
        for network in preset.weak_networks
    ]


def jobs(preset: Preset) -> list[Job]:
    listed = []
    for seed in preset.seeds:
        for network in preset.weak_networks:
            listed += [
                Job("weak-seeds", by_ode, (method, seed, network), preset.weak_evaluations)
                for method in preset.weak_methods
            ]
            listed += [
                Job("weak-seeds", by_sde, (name, seed, network), 2 * preset.weak_sde_steps)
                for name in peers.SDE
                if peers.PEERS[name][0] in preset.weak_methods
            ]
    return listed


def by_ode(preset: Preset, folder: Path, method: str, seed: int, network: str) -> list[Row]:
    early = network == "stopped early"
    loaded = methods.load(_spec(preset, method, seed, network), preset, folder, early=early)
    samples, _ = methods.draw(
        *loaded, preset, seed, solver="multistep", schedule="log", steps=preset.weak_evaluations
    )
    row = {"method": method, "sampler": _ODE, "network": network, "seed": seed}
    return [{**row, **figures_of(samples, preset, folder)}]


def by_sde(preset: Preset, folder: Path, name: str, seed: int, network: str) -> list[Row]:
    method, sampler = peers.PEERS[name]
    early = network == "stopped early"
    loaded = methods.load(_spec(preset, method, seed, network), preset, folder, early=early)
    samples, _ = peers.draw(
        sampler,
        loaded,
        preset.samples,
        preset.weak_sde_steps,
        seed=seed,
        batch=preset.sampling_batch,
    )
    short = name.removeprefix(f"{method}, ")
    row = {"method": method, "sampler": short, "network": network, "seed": seed}
    return [{**row, **figures_of(samples, preset, folder)}]


def derive(tables: Tables, preset: Preset) -> Tables:
    """Means, and figures relative to the full network of the same seed."""
    figures = ["frechet_pixels", "frechet_features"]
    same = ["method", "sampler", "seed"]
    ratios = relative(tables["weak-seeds"], figures, same, lambda row: row["network"] == "full")
    return {
        "weak-means": over_seeds(tables["weak-seeds"], _BY, FIGURES),
        "weak-relative": over_seeds(ratios, _BY, figures),
    }


def draw(tables: Tables, folder: Path) -> None:
    pictures = {
        "weak": ("weak-means", "Fréchet distance, pixels", "Weaker networks"),
        "weak-loss": ("weak-relative", "/ the full network's", "Loss by weaker networks"),
    }
    for name, (table, ylabel, title) in pictures.items():
        groups = grouped(tables[table], ["method", "sampler"])
        values = {
            method if sampler == _ODE else f"{method}, {sampler}": {
                row["network"]: (row["frechet_pixels"], row["frechet_pixels_spread"])
                for row in rows
            }
            for (method, sampler), rows in groups.items()
        }
        bars(values, folder / f"{name}.png", ylabel=ylabel, title=title)


CLAIM = Claim("weak networks", specs, jobs, derive, draw)
