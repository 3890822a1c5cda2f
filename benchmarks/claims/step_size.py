"""Claim 2: PFGM is robust to the step size of Euler's method.

(PFGM, arXiv 2209.11178, section 4.3.) Runs Euler's method on the ODE of every method, with levels
uniform in σ, in log σ and in σ^(1/7), and compares it with its own result on the finest grid.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.claims import methods
from benchmarks.claims.claim import Claim
from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.measures import FIGURES, figures_of
from benchmarks.claims.methods import Spec
from benchmarks.claims.pictures import curves
from benchmarks.claims.presets import Preset
from benchmarks.common.rows import Row, over_seeds, relative, select
from pfgm.flows.flow import Flow

LATE = "EDM from z_max"
"""EDM's network started at PFGM's first level, which shows the effect of a nearer start."""
_LEFT_OUT = "PFGM++ 2048"  # like EDM, and there are seven colours


def jobs(preset: Preset) -> list[Job]:
    return [
        Job(
            "step-size-seeds",
            by_euler,
            {"method": method, "grid": grid, "steps": steps, "seed": seed},
            methods.spec_of(preset, method.removesuffix(" from z_max"), seed),
            steps,
        )
        for seed in preset.seeds
        for method in (*preset.methods, LATE)
        for grid in preset.euler_grids
        for steps in preset.euler_steps
    ]


def levels(flow: Flow, grid: str, steps: int) -> list[float]:
    """The levels of a grid. "uniform" has the same ends as the others."""
    chosen = flow.grid(steps, "log" if grid == "uniform" else grid)
    if grid != "uniform":
        return chosen
    # The last step of PFGM++ goes from its last level to 0.
    end = [0.0] if chosen[-1] == 0 else []
    first, *others = chosen[: len(chosen) - len(end)]
    count = len(others)
    inner = [first + (others[-1] - first) * i / count for i in range(1, count)]
    return [first, *inner, *others[-1:], *end]


def by_euler(
    preset: Preset, folder: Path, spec: Spec, method: str, grid: str, steps: int, seed: int
) -> Row:
    flow, network = methods.load(spec, preset, folder)
    if method == LATE:
        flow = methods.from_pfgm_level(flow, preset)
    samples, nfe = methods.draw(
        flow,
        network,
        preset,
        seed,
        samples=preset.euler_samples,
        solver="euler",
        schedule=levels(flow, grid, steps),
    )
    row = {"evaluations": nfe, "first_level": flow.first_level, "last_level": flow.last_level}
    return row | figures_of(samples, preset, folder)


def derive(tables: Tables, preset: Preset) -> Tables:
    """Means, and figures relative to the finest log grid of the same network."""
    finest = preset.euler_steps[-1]
    figures = ["frechet_pixels", "frechet_features"]
    ratios = relative(
        tables["step-size-seeds"],
        figures,
        ["method", "seed"],
        lambda row: row["grid"] == "log" and row["steps"] == finest,
    )
    by = ["method", "grid", "steps", "first_level", "last_level"]
    return {
        "step-size-means": over_seeds(tables["step-size-seeds"], by, FIGURES),
        "step-size-relative": over_seeds(ratios, by, figures),
    }


def draw(tables: Tables, folder: Path) -> None:
    for grid in dict.fromkeys(row["grid"] for row in tables["step-size-relative"]):
        curves(
            [
                row
                for row in select(tables["step-size-relative"], grid=grid)
                if row["method"] != _LEFT_OUT
            ],
            "method",
            "steps",
            "frechet_pixels",
            folder / f"step-size-{grid}.png",
            xlabel=f"steps of Euler's method, {grid} grid",
            ylabel="Fréchet distance / the finest's",
            title=f"Step size, {grid} grid",
        )


CLAIM = Claim("step size", jobs, derive, draw)
