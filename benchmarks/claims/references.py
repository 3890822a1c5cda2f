"""Claim 5: targets from many references vary less, and need not cost more.

(PFGM, arXiv 2209.11178, section 3.2; Stable Target Field, arXiv 2302.00670.) Networks of PFGM and
PFGM++ (D = 128) learn the field, or the posterior mean, of 128 references, of more, and of all
data. PFGM++ also learns the single-sample target. Measures variance of the target, loss, quality
and time of a step.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import pfgm
from benchmarks.claims import methods
from benchmarks.claims.claim import Claim
from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.measures import FIGURES, data_of, figures_of
from benchmarks.claims.methods import Spec
from benchmarks.claims.pictures import bars, curves
from benchmarks.claims.presets import Preset
from benchmarks.common.posterior_paths import published
from benchmarks.common.rows import Row, over_seeds, select
from benchmarks.common.subjects import Case
from benchmarks.common.turns import ratio, time_calls
from pfgm.backends.reference import normalised_field
from pfgm.evaluation import evenly_spaced
from pfgm.flows.flow import Flow
from pfgm.training.batches import Batch, Batches, seed_of

PFGM, PLUSPLUS = "PFGM", "PFGM++ 128"
_STEPS = 20  # of the multistep solver
_LEVELS = 9  # number of levels at which the variance is measured
_LOWEST, _HIGHEST = 0.05, 20.0  # in units of the root mean square of the data
_ROWS = 2048  # the most points at which a network's error is measured
_LEAST_DRAWN = 1e-6  # the least variance that is drawn; with all data the variance is 0
_MOST_BYTES = 2**31  # the most bytes of the published formula's (B, M, N + 1) tensor


def _counts(preset: Preset, method: str) -> list[int]:
    """Numbers of references. 0 is the single-sample target, which PFGM does not have."""
    size = len(data_of(preset).train)
    counts = sorted({min(count, size) for count in preset.reference_counts})
    return counts if method == PFGM else [0, *counts]


def _name(count: int) -> str:
    return "single sample" if count == 0 else f"{count} references"


def jobs(preset: Preset) -> list[Job]:
    listed = []
    for method in (PFGM, PLUSPLUS):
        for count in _counts(preset, method):
            for seed in preset.seeds:
                row = {"method": method, "target": _name(count), "references": count, "seed": seed}
                spec = methods.spec_of(preset, method, seed, references=count)
                listed += [
                    Job("references-seeds", trained, row, spec, 2 * _STEPS),
                    Job("references-variance-seeds", target_variance, row, None, 10),
                ]
    return [*listed, Job("references-steps", step_times, {}, None, 100, alone=True)]


# ---- networks ---------------------------------------------------------------------------------


def trained(
    preset: Preset,
    folder: Path,
    spec: Spec,
    method: str,
    target: str,
    references: int,
    seed: int,
) -> Row:
    """Loss, error and quality of a network trained with so many references."""
    flow, network = methods.load(spec, preset, folder)
    samples, _ = methods.draw(
        flow, network, preset, seed, solver="multistep", schedule="log", steps=_STEPS
    )
    train = data_of(preset).train
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        loss = methods.loss_of(method, flow)
        error = float(loss(network, evenly_spaced(train, _ROWS), train, generator))
    # The loss against the target of all data is at the same points for every network.
    row = {"training_loss": _last_loss(methods.run_of(folder, spec)), "error": error}
    return row | figures_of(samples, preset, folder)


def _last_loss(run: Path) -> float:
    """The mean training loss of the last fifth of the steps.

    Each row of the log is weighted by its number of steps, because a run that was stopped has
    reported more often.
    """
    with (run / "log.csv").open() as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    begin = 0.8 * rows[-1][0]
    weighted = [
        (step - before, loss)
        for (before, _), (step, loss) in pairwise([(0, 0.0), *rows])
        if before >= begin or step == rows[-1][0]
    ]
    return sum(n * loss for n, loss in weighted) / sum(n for n, _ in weighted)


# ---- targets ----------------------------------------------------------------------------------


def _target(flow: Flow, x: Tensor, level: Tensor, references: Tensor) -> Tensor:
    """The target of a network (B, ·): PFGM's field, or the posterior mean."""
    if isinstance(flow, pfgm.PoissonFlow):
        field_x, field_z = pfgm.field_fn(x, level, references, gamma=flow.gamma)
        return torch.cat([field_x.flatten(1), field_z[:, None]], 1)
    return pfgm.posterior_mean(x, references, sigma=level, D=flow.D).flatten(1)


def target_variance(
    preset: Preset,
    folder: Path,
    spec: None,
    method: str,
    target: str,
    references: int,
    seed: int,
) -> list[Row]:
    """Mean square deviation of a target from that of all data, per value, at each level of noise.

    Points and references are chosen as in training: a batch, and references that include it. The
    unit is the mean square of the data for PFGM++, and of the field of all data for PFGM, whose γ
    makes the field small near the data.
    """
    data = data_of(preset)
    train = data.train
    flow = methods.flow_of(method, preset)
    rows = []
    for place in range(_LEVELS):
        share = place / (_LEVELS - 1)
        level = data.rms * _LOWEST * (_HIGHEST / _LOWEST) ** share
        squared, exact = [], []
        for part in range(math.ceil(preset.probe_rows / preset.batch_size)):
            generator = torch.Generator().manual_seed(seed_of(seed, place, part))
            order = torch.randperm(len(train), generator=generator)
            x = train[order[: preset.batch_size]]
            levels = torch.full((len(x),), level)
            draws = torch.Generator().manual_seed(seed_of(seed, place, part, 1))
            noisy = x + flow.noise(levels, draws)
            around = train if references >= len(train) else train[order[:references]]
            learnt = _target(flow, noisy, levels, around) if references else x.flatten(1)
            exact.append(_target(flow, noisy, levels, train))
            squared.append((learnt - exact[-1]).square().sum(1) / flow.N)
        field = float(torch.cat(exact).square().sum(1).mean()) / flow.N
        unit = field if method == PFGM else data.rms**2
        variance = float(torch.cat(squared).mean()) / unit
        rows.append({"level": level, "variance": variance})
    return rows


# ---- time -------------------------------------------------------------------------------------


def step_times(preset: Preset, folder: Path, spec: None) -> list[Row]:
    """Times of a whole training step in turns: medians, and ratios within a turn."""
    paths: dict[tuple[str, int, str], Callable[[], None]] = {}
    size, N = len(data_of(preset).train), data_of(preset).train[0].numel()
    for method in (PFGM, PLUSPLUS):
        for count in _counts(preset, method):
            paths[method, count, "pfgm"] = _step(preset, method, count)
            fits = preset.batch_size * min(count, size) * (N + 1) * 4 <= _MOST_BYTES
            if method == PFGM and fits:
                step = _step(preset, method, count, by_formula=True)
                paths[method, count, "published formula"] = step
    single = str((PLUSPLUS, 0, "pfgm"))
    seconds = time_calls({str(key): run for key, run in paths.items()}, preset.timing_turns)
    return [
        {
            "method": method,
            "target": _name(count),
            "references": count,
            "path": path,
            "milliseconds": 1e3 * statistics.median(seconds[key]),
            "times_single_sample": ratio(seconds, key, single),
        }
        for (method, count, path) in paths
        if (key := str((method, count, path)))
    ]


def _step(
    preset: Preset, method: str, count: int, *, by_formula: bool = False
) -> Callable[[], None]:
    """A training step: batch, perturbation, target, network, gradients and Adam."""
    flow = methods.flow_of(method, preset)
    train, cpu = data_of(preset).train, torch.device("cpu")
    batches = Batches(train, None, size=preset.batch_size, references=count, seed=0, device=cpu)
    network = methods.network_of(methods.spec_of(preset, method, 0), preset, flow)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    loss_of_batch = methods.loss_of(method, flow)
    steps = itertools.count()

    def run() -> None:
        batch = batches.at(next(steps))
        if by_formula:
            loss = _published_loss(flow, network, batch, generator)
        else:
            loss = loss_of_batch(network, batch.x, batch.references, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


def _published_loss(
    flow: Flow, network: nn.Module, batch: Batch, generator: torch.Generator
) -> Tensor:
    """PFGM's loss with the target by the published formula."""
    assert isinstance(flow, pfgm.PoissonFlow)
    assert isinstance(batch.references, Tensor)
    noisy, z = flow.perturb(batch.x, generator)
    flat = noisy.flatten(1)
    mean, _ = published(Case(flat, z, batch.references.flatten(1)))()
    target_x, target_z = normalised_field(flat - mean, z, flow.gamma)
    field_x, field_z = network(noisy, z)
    error = (field_x.flatten(1) - target_x).square().sum(1) + (field_z - target_z).square()
    loss: Tensor = 0.5 * error.mean()
    return loss


# ---- tables and pictures ----------------------------------------------------------------------


def derive(tables: Tables, preset: Preset) -> Tables:
    by = ["method", "target", "references"]
    return {
        "references-means": over_seeds(
            tables["references-seeds"], by, ["training_loss", "error", *FIGURES]
        ),
        "references-variance-means": over_seeds(
            tables["references-variance-seeds"], [*by, "level"], ["variance"]
        ),
    }


def draw(tables: Tables, folder: Path) -> None:
    for method, stem, quantity in (
        (PFGM, "pfgm", "of the field"),
        (PLUSPLUS, "pfgmpp", "of the posterior mean"),
    ):
        rows = [
            {**row, "level": float(f"{row['level']:.2g}")}
            for row in select(tables["references-variance-means"], method=method)
            if row["variance"] > _LEAST_DRAWN
        ]
        curves(
            rows,
            "target",
            "level",
            "variance",
            folder / f"references-variance-{stem}.png",
            xlabel="level σ (z of PFGM)",
            ylabel="variance a value",
            title=f"{method}: variance {quantity} that is learnt",
        )
    means = tables["references-means"]
    of = "method", "target"
    path, title = folder / "references.png", "Quality by references"
    bars(means, *of, "frechet_pixels", path, "Fréchet distance, pixels", title)
    most = {row["method"]: row["error"] for row in means}  # the last has the most references
    errors = [
        {**row, **{n: row[n] / most[row["method"]] for n in ("error", "error_spread")}}
        for row in means
    ]
    path, title = folder / "references-error.png", "What is not learnt"
    bars(errors, *of, "error", path, "loss / with all data", title)
    times = [
        {**row, "method": row["method"] + ("" if row["path"] == "pfgm" else f", {row['path']}")}
        for row in tables["references-steps"]
    ]
    path, title = folder / "references-time.png", "Time of a training step"
    bars(times, *of, "milliseconds", path, "milliseconds", title)


CLAIM = Claim("reference batch", jobs, derive, draw)
