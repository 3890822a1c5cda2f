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
from benchmarks.common.rows import Row, over_seeds, relative

_SHARE = {"half width": 2, "quarter width": 4}
_ODE, _EARLY = "multistep, log", "stopped early"
_BY = ("method", "sampler", "network")


def jobs(preset: Preset) -> list[Job]:
    listed = []
    for seed in preset.seeds:
        for network in preset.weak_networks:
            runs = [(each, _ODE, by_ode, preset.weak_evaluations) for each in preset.weak_methods]
            for name in peers.SDE:
                method = peers.PEERS[name][0]
                if method in preset.weak_methods:
                    short = name.removeprefix(f"{method}, ")
                    runs.append((method, short, by_sde, 2 * preset.weak_sde_steps))
            for method, sampler, run, cost in runs:
                width = preset.width // _SHARE.get(network, 1)
                spec = methods.spec_of(preset, method, seed, width=width)
                row = {"method": method, "sampler": sampler, "network": network, "seed": seed}
                listed.append(Job("weak-seeds", run, row, spec, cost))
    return listed


def by_ode(
    preset: Preset, folder: Path, spec: Spec, method: str, sampler: str, network: str, seed: int
) -> Row:
    loaded = methods.load(spec, preset, folder, early=network == _EARLY)
    samples, _ = methods.draw(
        *loaded, preset, seed, solver="multistep", schedule="log", steps=preset.weak_evaluations
    )
    return figures_of(samples, preset, folder)


def by_sde(
    preset: Preset, folder: Path, spec: Spec, method: str, sampler: str, network: str, seed: int
) -> Row:
    loaded = methods.load(spec, preset, folder, early=network == _EARLY)
    samples, _ = peers.draw(
        peers.PEERS[f"{method}, {sampler}"][1],
        loaded,
        preset.samples,
        preset.weak_sde_steps,
        seed=seed,
        batch=preset.sampling_batch,
    )
    return figures_of(samples, preset, folder)


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
        rows = [
            {**row, "group": f"{row['method']}, {row['sampler']}".removesuffix(f", {_ODE}")}
            for row in tables[table]
        ]
        bars(rows, "group", "network", "frechet_pixels", folder / f"{name}.png", ylabel, title)


CLAIM = Claim("weak networks", jobs, derive, draw)
