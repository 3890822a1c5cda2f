"""Claim 1: PFGM needs 10 to 20 times fewer evaluations than SDE samplers at equal quality.

(PFGM, arXiv 2209.11178, abstract and section 4.) Measures every deterministic solver of the library
on its flows. On the score models it measures the multistep solver and the samplers of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import methods, peers
from benchmarks.claims.claim import Claim
from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.measures import FIGURES, data_of, figures_of
from benchmarks.claims.methods import SCORE_METHODS, Spec
from benchmarks.claims.pictures import curves
from benchmarks.claims.presets import Preset
from benchmarks.common.rows import Row, grouped, over_seeds, select
from pfgm.evaluation import RUNS
from pfgm.flows.flow import Flow
from pfgm.plotting.curves import COLOURS
from pfgm.solvers import GRID_SOLVERS

_MULTISTEP = "multistep, log"
_SOLVERS: dict[str, dict[str, Any]] = {
    **RUNS,
    # Ends at noise smaller than the step between two of the digits' 17 grey levels.
    "multistep, log to 0.1": {"solver": "multistep", "schedule": "log", "last": 0.1},
}
_LATE = "multistep, log from z_max"
"""PFGM++ started at PFGM's first level instead of EDM's, which shows the effect of a nearer
start."""
_WITHIN = 1.1  # times the best distance: close enough
_BY = ("series", "method", "sampler", "setting", "first_level", "last_level")


def jobs(preset: Preset) -> list[Job]:
    def job(run: Any, seed: int, method: str, sampler: str, setting: float, cost: float) -> Job:
        series = ", ".join(filter(None, (method, sampler)))
        row = {"series": series, "method": method, "sampler": sampler, "setting": setting}
        spec = None if run is training_data else methods.spec_of(preset, method, seed)
        return Job("quality-seeds", run, {**row, "seed": seed}, spec, cost)

    listed = []
    for seed in preset.seeds:
        listed.append(job(training_data, seed, "training data", "", 0.0, 1))
        for method in preset.methods:
            for sampler in _samplers(method, preset):
                solver = _SOLVERS[_MULTISTEP if sampler == _LATE else sampler]["solver"]
                for nfe in preset.evaluations:
                    steps = -(-nfe // (GRID_SOLVERS[solver].evaluations or 1))
                    listed.append(job(by_ode, seed, method, sampler, steps, nfe))
            if method not in SCORE_METHODS:
                listed += [job(by_ode, seed, method, "rk45", t, 50) for t in preset.tolerances]
        for name, (method, _) in peers.PEERS.items():
            for steps in preset.sde_steps if name in peers.SDE else preset.chain_steps:
                nfe = peers.evaluations_of(name, steps)
                if nfe <= preset.max_evaluations:
                    short = name.removeprefix(f"{method}, ")
                    listed.append(job(by_peer, seed, method, short, steps, nfe))
    return listed


def _samplers(method: str, preset: Preset) -> list[str]:
    if method in SCORE_METHODS:
        return [_MULTISTEP]
    late = [] if method.startswith("PFGM") and "++" not in method else [_LATE]
    return [*(preset.solvers or _SOLVERS), *late]


# ---- measuring --------------------------------------------------------------------------------


def training_data(preset: Preset, folder: Path, spec: None, seed: int, **_: Any) -> Row:
    """Figures of training data in place of samples.

    In pixels this is about the best that a model can reach. In features it may look too good,
    because the classifier was trained on these data.
    """
    train = data_of(preset).train
    generator = torch.Generator().manual_seed(seed)
    rows = train[torch.randperm(len(train), generator=generator)[: preset.samples]]
    return _row(None, 0, figures_of(rows, preset, folder))


def by_ode(
    preset: Preset, folder: Path, spec: Spec, sampler: str, setting: float, seed: int, **_: Any
) -> Row:
    flow, network = methods.load(spec, preset, folder)
    how: dict[str, Any] = {"solver": "rk45", "rtol": setting, "atol": setting}
    if sampler != "rk45":
        how = {**_SOLVERS[_MULTISTEP if sampler == _LATE else sampler], "steps": setting}
    if sampler == _LATE:
        flow = methods.from_pfgm_level(flow, preset)
    samples, nfe = methods.draw(flow, network, preset, seed, **how)
    return _row(flow, nfe, figures_of(samples, preset, folder))


def by_peer(
    preset: Preset, folder: Path, spec: Spec, series: str, setting: int, seed: int, **_: Any
) -> Row:
    loaded = methods.load(spec, preset, folder)
    sampler, batch = peers.PEERS[series][1], preset.sampling_batch
    samples, nfe = peers.draw(sampler, loaded, preset.samples, setting, seed=seed, batch=batch)
    return _row(loaded.flow, nfe, figures_of(samples, preset, folder))


def _row(flow: Flow | None, nfe: int, figures: dict[str, float]) -> Row:
    levels = {
        "first_level": flow.first_level if flow else 0.0,
        "last_level": flow.last_level if flow else 0.0,
    }
    return {**levels, "evaluations": nfe, **figures}


# ---- tables that follow -----------------------------------------------------------------------


def derive(tables: Tables, preset: Preset) -> Tables:
    """Means over the seeds, and the evaluations that each sampler needs."""
    rows = tables["quality-seeds"]
    means = over_seeds(rows, _BY, ["evaluations", *FIGURES])
    return {"quality-means": means, "quality-needed": needed(rows, means)}


def needed(rows: Sequence[Row], means: Sequence[Row]) -> list[Row]:
    """Evaluations that bring a sampler within 10 % of its own best distance, and of the best SDE
    sampler's.

    Computed from the means over the seeds. The least and the most of ``times_fewer`` are over the
    seeds, each with the best SDE sampler of that seed. Only measured numbers of evaluations count:
    fewer may be enough.
    """
    results = []
    for space in ("pixels", "features"):
        figure = f"frechet_{space}"
        by_seed = [_compared(part, figure) for part in grouped(rows, ["seed"]).values()]
        for series, row in _compared(means, figure).items():
            times = [part[series]["times_fewer"] for part in by_seed]
            known = [value for value in times if value is not None]
            spread = {
                "least_times_fewer": min(known) if len(known) == len(times) else None,
                "most_times_fewer": max(known, default=None),
            }
            results.append({"space": space, "series": series, **row, **spread})
    return results


def _compared(rows: Sequence[Row], figure: str) -> dict[str, Row]:
    """Each series beside the best SDE sampler among these rows. None stands for never."""
    sde = min(
        (row for row in rows if row["series"] in peers.SDE and math.isfinite(row[figure])),
        key=lambda row: row[figure],
    )
    rival = _fewest(select(rows, series=sde["series"]), figure, sde[figure])
    assert rival is not None
    curves = {}
    for (series,), part in grouped([r for r in rows if r["sampler"]], ["series"]).items():
        best = min((row[figure] for row in part if math.isfinite(row[figure])), default=math.nan)
        enough = _fewest(part, figure, sde[figure])
        curves[series] = {
            "best": best,
            "evaluations_to_own_best": _fewest(part, figure, best),
            "best_sde": sde["series"],
            "value_of_best_sde": sde[figure],
            "evaluations_of_best_sde": rival,
            "evaluations_to_best_sde": enough,
            "fewest_measured": min(row["evaluations"] for row in part),
            "times_fewer": None if enough is None else rival / enough,
        }
    return curves


def _fewest(rows: Sequence[Row], figure: str, best: float) -> float | None:
    """The fewest evaluations whose distance is at most 10 % above the best."""
    enough = [row["evaluations"] for row in rows if row[figure] <= _WITHIN * best]
    return min(enough, default=None)


_FAR = 8  # times the least distance; farther points are not drawn


def _shown(methods: Sequence[str]) -> dict[str, list[str]]:
    """The series of each picture. As many are drawn as there are colours."""
    flows = [method for method in methods if method not in SCORE_METHODS]
    return {
        "quality": [
            *(f"{method}, {_MULTISTEP}" for method in flows if "++" not in method),
            f"EDM, {_LATE}",
            *peers.PEERS,
        ],
        "quality-multistep": [f"{method}, {_MULTISTEP}" for method in methods],
        **{
            f"quality-{method.lower().replace('++ ', 'pp-').replace(' ', '-')}": [
                f"{method}, {sampler}" for sampler in (*_SOLVERS, "rk45")
            ]
            for method in flows
        },
    }


def draw(tables: Tables, folder: Path) -> None:
    means = [row for row in tables["quality-means"] if row["sampler"]]
    limit = _FAR * min(row["frechet_pixels"] for row in means)
    for name, every in _shown(list(dict.fromkeys(row["method"] for row in means))).items():
        series = every[: len(COLOURS)]
        rows = [r for r in means if r["series"] in series and r["frechet_pixels"] < limit]
        rows.sort(key=lambda row: (series.index(row["series"]), row["evaluations"]))
        curves(
            rows,
            "series",
            "evaluations",
            "frechet_pixels",
            folder / f"{name}.png",
            xlabel="evaluations of the network",
            ylabel="Fréchet distance, pixels",
            title="Quality against evaluations",
        )


CLAIM = Claim("quality against evaluations", jobs, derive, draw)
