"""How good a flow is: its samples beside held-out data, its likelihood, its quality for its cost.

Everything is a function of the arguments, a seed among them. Figures of samples stand beside those
of training data, which a perfect model would reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import metrics
from .common.checks import allocating, check_seed
from .common.messages import progress_bar
from .common.tensors import network_device
from .data import to_unit
from .flows import Flow, Network
from .flows.poisson import PoissonFlow
from .networks import NoiseEmbedding, SongUNet
from .training.batches import seed_of

__all__ = [
    "RUNS",
    "BitsPerDim",
    "Point",
    "as_curves",
    "bits_per_dim",
    "curve",
    "draw_samples",
    "evaluate_samples",
]

_AT_LEAST = 6  # rows: for density and coverage one more than the neighbours that they take
_NEIGHBOURS = 5

RUNS: dict[str, dict[str, str]] = {
    "euler, log": {"solver": "euler", "schedule": "log"},
    "euler, rho": {"solver": "euler", "schedule": "rho"},
    "heun, rho": {"solver": "heun", "schedule": "rho"},
    "multistep, log": {"solver": "multistep", "schedule": "log"},
    "multistep, rho": {"solver": "multistep", "schedule": "rho"},
}
"""Solvers and schedules that :func:`curve` compares, beside rk45."""


class BitsPerDim(NamedTuple):
    """What :func:`bits_per_dim` returns; a lower mean is better."""

    mean: float
    standard_error: float
    """Standard deviation over the samples / √samples; NaN for a single one."""
    samples: int
    nfe: int
    """Evaluations of the network, each with a product with its Jacobian, in the longest batch."""


class Point(NamedTuple):
    """A point of :func:`curve`."""

    run: str
    """Solver and schedule."""
    setting: float
    """Steps, or both tolerances of rk45."""
    nfe: int
    """Evaluations of the network, in the longest batch."""
    frechet_distance: float
    """To the held-out data; lower is better."""


# ---- samples ----------------------------------------------------------------------------------


def draw_samples(
    flow: Flow,
    network: Network,
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 1000,
    device: torch.device | str | None = None,
    progress: bool = False,
    **options: Any,
) -> tuple[Tensor, int]:
    """Samples (n, *S) and the number of evaluations of the network, the most of any batch.

    The prior is drawn on the CPU, so that it does not depend on the device; noise that a sampler
    adds is drawn batch by batch on the device. A network with labels
    draws each as often as the others: sample i is of the label i mod classes.

    Args:
        flow: what the network is of.
        network: as for :meth:`pfgm.flows.Flow.sample`.
        n: how many.
        seed: of the prior, and of the noise that some samplers add.
        batch_size: samples at a time.
        device: where; that of the network's parameters unless given.
        progress: show a progress bar for each batch.
        **options: of :meth:`pfgm.flows.Flow.sample`, such as solver, steps, schedule and guidance.

    Raises:
        ValueError: an argument is out of range, as there.

    >>> import pfgm
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> samples, nfe = draw_samples(flow, flow.empirical(torch.eye(2)), 5, batch_size=2)
    >>> samples.shape, nfe
    (torch.Size([5, 2]), 10)
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        if not 1 <= value < 2**63:
            raise ValueError(f"{name} is {value}; allowed are whole numbers from 1 to below 2^63.")
    check_seed(seed)
    with allocating(f"n is {n}, and so many samples of shape {flow.shape}"):
        prior = flow.prior(n, generator=torch.Generator().manual_seed(seed))
    device = torch.device(network_device(network) if device is None else device)
    prior, generator = prior.to(device), noise_generator(seed, device)
    labels = torch.arange(n) % max(label_count(network), 1)
    parts, evaluations = [], 0
    for rows in torch.arange(n).split(batch_size):
        part, nfe = flow.sample(
            network,
            len(rows),
            x_init=prior[rows],
            condition={"labels": labels[rows]} if label_count(network) else None,
            generator=generator,
            progress=progress,
            return_nfe=True,
            **options,
        )
        parts.append(part)
        evaluations = max(evaluations, nfe)
    return torch.cat(parts), evaluations


def usual_steps(flow: Flow, solver: str) -> int:
    """Steps of the commands: 10, or as many as the flow takes where few values need more."""
    of_field = isinstance(flow, PoissonFlow) and solver != "consistency"
    return max(10, flow.defaults.steps) if of_field else 10


def noise_generator(seed: int, device: torch.device) -> torch.Generator:
    """Of what samplers add on a device, unrelated to a prior of the same seed."""
    return torch.Generator(device).manual_seed(seed_of(seed, 1))


def label_count(network: Network) -> int:
    """How many labels a network of this package knows; 0 for one that knows none."""
    parts = network.modules() if isinstance(network, nn.Module) else ()
    known = (part.classes for part in parts if isinstance(part, (NoiseEmbedding, SongUNet)))
    return max(known, default=0)


def clamped(samples: Tensor, real: Tensor) -> Tensor:
    """Samples clamped to [−1, 1] where real ones are images within it."""
    bounded = samples.ndim == 4 and float(to_unit(real).abs().max()) <= 1
    return samples.clamp(-1, 1) if bounded else samples


def evaluate_samples(
    samples: Tensor, held_out: Tensor | None, train: Tensor, *, progress: bool = False
) -> dict[str, Any]:
    """Figures of samples against held-out data, each beside that of training data.

    Samples are compared as they are, images pixel by pixel, bytes u as u/127.5 − 1. Beside them
    stand as many training rows, evenly spaced ones, because the Fréchet distance falls with the
    number. Without held-out data, every other training row takes their place and the rest stands
    beside the samples.

    Args:
        samples: (n, *S), floating or uint8, n ≥ 6.
        held_out: (m, *S), likewise, m ≥ 6; None where there are none.
        train: (k, *S), likewise, k ≥ 6, or k ≥ 12 without held-out data.
        progress: show a progress bar.

    Returns:
        A dict that JSON can hold:

        - against: what the samples are compared with, "held_out" or "train".
        - counts: of samples; of the rows that they are compared with, against; of the training rows
          beside them, train; of those among which the nearest is looked for, searched.
        - frechet_distance, kernel_distance (of all with all), precision and recall (k = 3), density
          and coverage (k = 5): the metrics of :mod:`pfgm.metrics`, each of samples and of train.
        - median_distance_to_train: :func:`pfgm.metrics.nearest_distance` of samples, and of what
          they are compared with. Where samples are copies, theirs is much the smaller.

    Raises:
        TypeError: a dtype that is neither floating nor uint8.
        ValueError: different sample shapes or devices, fewer rows than needed, NaN or infinity.

    >>> import pfgm
    >>> digits = pfgm.data.digits()
    >>> found = evaluate_samples(digits.train[:300], digits.held_out, digits.train)
    >>> found["against"], found["counts"]["searched"], found["median_distance_to_train"]["samples"]
    ('held_out', 1398, 0.0)
    """
    samples, train = to_unit(samples), to_unit(train)
    if held_out is None:
        against, real, beside = "train", train[::2], train[1::2]
    else:
        against, real, beside = "held_out", to_unit(held_out), train
    _check_counts({"samples": samples, against: real, "train": beside}, halved=held_out is None)
    others = beside  # that none of the real rows is among
    beside = spread(beside, len(samples))
    with progress_bar(total=4, desc="metrics", disable=not progress) as bar:

        def done(value: Any) -> Any:
            bar.update()
            return value

        neighbours = done(metrics.neighbour_distances(real, _NEIGHBOURS))
        figures = {
            "samples": done(_figures(samples, real, neighbours)),
            "train": done(_figures(beside, real, neighbours)),
        }
        nearest = {
            "samples": metrics.nearest_distance(samples, train),
            against: done(metrics.nearest_distance(spread(real, len(samples)), others)),
        }
    return {
        "against": against,
        "counts": {
            "samples": len(samples),
            "against": len(real),
            "train": len(beside),
            "searched": len(train),
        },
        **{name: {of: figures[of][name] for of in figures} for name in figures["samples"]},
        "median_distance_to_train": {of: float(found.median()) for of, found in nearest.items()},
    }


def _check_counts(sets: dict[str, Tensor], halved: bool) -> None:
    for name, rows in sets.items():
        if len(rows) < _AT_LEAST:
            half = "half of " if halved and name == "train" else ""
            raise ValueError(
                f"{half}{name} has {len(rows)} rows; the metrics need at least {_AT_LEAST}."
            )


def _figures(rows: Tensor, real: Tensor, neighbours: Tensor) -> dict[str, float]:
    inside = metrics.precision_recall(rows, real, k=3, neighbours=neighbours)
    balls = metrics.density_coverage(rows, real, k=5, neighbours=neighbours)
    return {
        "frechet_distance": metrics.frechet_distance(rows, real),
        "kernel_distance": metrics.kernel_distance(rows, real, subsets=None).mean,
        **inside._asdict(),
        **balls._asdict(),
    }


def spread(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


# ---- likelihood -------------------------------------------------------------------------------


def bits_per_dim(
    flow: Flow,
    network: Network,
    x: Tensor,
    *,
    levels: int,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of data under a flow, mean and standard error.

    −log₂ p/N + log₂(levels/2) of :meth:`pfgm.flows.Flow.log_likelihood` for data made continuous by
    uniform noise within a grey level: an upper bound, in the mean, of the bits that a code for the
    levels themselves needs (Theis et al., arXiv 1511.01844, section 3.1).

    Args:
        flow: what the network is of.
        network: in evaluation mode while it runs; must treat rows separately.
        x: (B, *S), uint8, or floating in [−1, 1] at the grey levels −1, …, 1, evenly spaced; on the
            device of the network.
        levels: how many there are; 0 for continuous data, which get no noise: then −log₂ p/N.
        labels: (B,), for a network that takes labels.
        seed: of the noise and of the probes that estimate the divergence.
        batch_size: samples at a time.
        progress: show a progress bar for each batch.
        **options: of :meth:`pfgm.flows.Flow.log_likelihood`, such as solver, rtol and estimator.

    Raises:
        ValueError: no rows, levels or an option out of range, values outside [−1, 1].

    >>> import pfgm
    >>> flow = pfgm.PoissonFlowPP((2,), D=float("inf"), sigma_min=1.0)
    >>> net = flow.empirical(torch.zeros(1, 2))
    >>> found = bits_per_dim(flow, net, torch.zeros(4, 2), levels=0, estimator="exact")
    >>> round(found.mean, 3)  # ½ log₂ 2π
    1.326
    """
    if len(x) == 0 or batch_size < 1:
        raise ValueError(f"x has {len(x)} rows and batch_size is {batch_size}; allowed are from 1.")
    check_seed(seed)
    if levels:
        x = dequantised(x, levels, torch.Generator().manual_seed(seed))
    probes = torch.Generator(device=x.device).manual_seed(seed)
    bits, evaluations = [], 0
    for rows in torch.arange(len(x)).split(batch_size):
        found = flow.log_likelihood(
            network,
            to_unit(x[rows]),
            levels=levels or 2,
            condition=None if labels is None else {"labels": labels[rows]},
            generator=probes,
            progress=progress,
            **options,
        )
        bits.append(found.bits_per_dim.cpu())
        evaluations = max(evaluations, found.nfe)
    values = torch.cat(bits)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return BitsPerDim(float(values.mean()), error, len(values), evaluations)


def dequantised(x: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """2 (k + u)/levels − 1 for data at the grey levels k, u uniform in [0, 1); float32.

    >>> dequantised(torch.tensor([-1.0, 1.0]), 2, torch.Generator().manual_seed(0)).floor()
    tensor([-1.,  0.])
    """
    if levels < 2:
        raise ValueError(f"levels is {levels}; allowed is at least 2, or 0 for continuous data.")
    unit = to_unit(x)
    if float(unit.abs().max()) > 1:
        raise ValueError(
            f"x holds {float(unit.abs().max()):.4g}; allowed are {levels} levels in [-1, 1], or "
            "levels = 0 for continuous data."
        )
    level = ((unit + 1) / 2 * (levels - 1)).round()
    noise = torch.rand(x.shape, generator=generator, device=generator.device)
    return 2 * (level + noise.to(x.device)) / levels - 1


# ---- quality against cost ---------------------------------------------------------------------


def curve(
    flow: Flow,
    network: Network,
    held_out: Tensor,
    *,
    n: int = 1000,
    steps: Sequence[int] = (3, 5, 8, 10, 20, 40),
    tolerances: Sequence[float] = (1e-1, 1e-2, 1e-3),
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> list[Point]:
    """The Fréchet distance of samples for every solver and several numbers of steps.

    All start from the same points of the prior. Heun takes two evaluations a step, so it gets half
    as many steps, rounded up. Images are clamped to [−1, 1] where the held-out ones are within it.

    Args:
        flow: what the network is of.
        network: as for :meth:`pfgm.flows.Flow.sample`.
        held_out: (m, *S), floating or uint8, m ≥ 2, on the device of the samples.
        n: samples for each point, at least 2.
        steps: of euler, heun and multistep; empty leaves them out.
        tolerances: rtol and atol of rk45; empty leaves it out.
        seed: of the prior.
        progress: show a progress bar.
        **options: of :func:`draw_samples`, such as batch_size, device and guidance.

    Returns:
        The points in the order of solvers and steps.

    Raises:
        ValueError: an argument is out of range.

    >>> import pfgm
    >>> data = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    >>> flow = pfgm.PoissonFlow.from_data(data)
    >>> points = curve(flow, flow.empirical(data), data, n=50, steps=[3, 20], tolerances=[])
    >>> [(point.run, point.nfe) for point in points[:5]]
    [('euler, log', 3), ('euler, log', 20), ('euler, rho', 3), ('euler, rho', 20), ('heun, rho', 3)]
    """
    held_out = to_unit(held_out)
    runs: list[tuple[str, float, dict[str, Any]]] = []
    for name, chosen in RUNS.items():
        for count in steps:
            count = (count + 1) // 2 if chosen["solver"] == "heun" else count
            runs.append((name, count, {"steps": count, **chosen}))
    for tolerance in tolerances:
        chosen = {"solver": "rk45"}
        runs.append(("rk45", tolerance, {"rtol": tolerance, "atol": tolerance, **chosen}))
    points = []
    for name, setting, chosen in progress_bar(runs, "curve", unit="run", disable=not progress):
        samples, nfe = draw_samples(flow, network, n, seed=seed, **chosen, **options)
        distance = metrics.frechet_distance(clamped(samples, held_out), held_out)
        points.append(Point(name, setting, nfe, distance))
    return points


def as_curves(points: Sequence[Point]) -> dict[str, tuple[list[float], list[float]]]:
    """Each run's evaluations and distances, as :func:`pfgm.plotting.quality_curve` draws them.

    >>> as_curves([Point("heun", 3, 5, 2.0), Point("heun", 5, 9, 1.0)])
    {'heun': ([5, 9], [2.0, 1.0])}
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for point in points:
        nfe, distances = found.setdefault(point.run, ([], []))
        nfe.append(point.nfe)
        distances.append(point.frechet_distance)
    return found
