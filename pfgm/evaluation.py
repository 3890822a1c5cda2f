"""Evaluation of a flow: metrics of its samples, its likelihood, and quality against cost.

The same arguments with the same seed give the same results. Each figure of the samples comes with
the same figure of training data, the value of a perfect model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import metrics
from .common.devices import known_device
from .common.messages import progress_bar
from .common.numbers import check_seed, whole
from .common.tensors import network_device
from .data import to_unit
from .flows import Flow, Network
from .flows.batched_sampling import draw_prior, sample_in_batches
from .networks.registry import label_count
from .solvers import GRID_SOLVERS, SCHEDULES
from .training.batches import seed_of

__all__ = [
    "RUNS",
    "BitsPerDim",
    "Labels",
    "Point",
    "as_curves",
    "bits_per_dim",
    "curve",
    "draw_samples",
    "evaluate_labels",
    "evaluate_samples",
]

_NEIGHBOURS = 5  # k of density and coverage; the other metrics need fewer neighbours
MIN_ROWS = _NEIGHBOURS + 1  # a row and its nearest other rows
_MOST_OFF_LEVEL = 0.3  # of a grey level, by which narrow floating dtypes may round

RUNS: dict[str, dict[str, str]] = {
    f"{name}, {schedule}": {"solver": name, "schedule": schedule}
    for name, solver in GRID_SOLVERS.items()
    # With several evaluations a step, the steps are fewer and those of "log" too long.
    for schedule in (SCHEDULES if solver.evaluations == 1 else ["rho"])
}
"""The solvers and schedules that :func:`curve` compares, besides rk45."""


class Labels(NamedTuple):
    """The labels of the rows that :func:`evaluate_samples` compares, each (n,) integers."""

    samples: Tensor
    held_out: Tensor | None
    """None if there are no held-out data."""
    train: Tensor


class BitsPerDim(NamedTuple):
    """The result of :func:`bits_per_dim`; a lower mean is better."""

    mean: float
    standard_error: float
    """Standard deviation over the samples, divided by √samples; NaN for one sample."""
    samples: int
    """The number of samples."""
    nfe: int
    """The most network evaluations of any batch. Each includes a Jacobian product."""


class Point(NamedTuple):
    """A point of :func:`curve`."""

    run: str
    """Solver and schedule."""
    setting: float
    """The number of steps; for rk45 the value of both tolerances."""
    nfe: int
    """The most network evaluations of any batch."""
    frechet_distance: float
    """Fréchet distance to the held-out data; lower is better."""


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
    """Draws samples (n, *S). Returns them and the most network evaluations of any batch.

    The prior is drawn on the CPU, so it is the same for every device. Noise that a sampler adds is
    drawn on the device, batch by batch. If the network takes labels, each label is drawn equally
    often: sample i has the label i mod classes.

    Args:
        flow, network, n: as for :meth:`pfgm.Flow.sample`.
        seed: seed of the prior, and of the noise that some samplers add.
        batch_size: samples at a time.
        device: where samples are computed; None means the device of the network's parameters.
        progress: show a progress bar for each batch.
        **options: of :meth:`pfgm.Flow.sample`, such as solver, steps, schedule and guidance; and
            compute, "float32" or "bfloat16": the precision of the network (autocast), while the
            solver's points stay in float32.

    Raises:
        ValueError: an argument is out of range.

    >>> import pfgm
    >>> flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    >>> samples, nfe = draw_samples(flow, flow.empirical(torch.eye(2)), 5, batch_size=2)
    >>> samples.shape, nfe
    (torch.Size([5, 2]), 40)
    """
    whole("n", n)
    whole("batch_size", batch_size)
    check_seed(seed)
    schedule = options.get("schedule")
    if schedule is not None and not isinstance(schedule, str):
        flow._check_from_prior(flow.grid(schedule=schedule))
    prior = draw_prior(flow, n, seed)
    device = network_device(network) if device is None else known_device(device)
    classes = label_count(network)
    return sample_in_batches(
        flow,
        network,
        prior.to(device),
        batch_size=batch_size,
        labels=torch.arange(n, device="cpu") % classes if classes else None,
        generator=noise_generator(seed, device),
        progress=progress,
        **options,
    )


def noise_generator(seed: int, device: torch.device) -> torch.Generator:
    """The generator of the noise that samplers add. Its noise is independent of the prior's."""
    return torch.Generator(device).manual_seed(seed_of(seed, 1))


def clamp_images(samples: Tensor, real: Tensor) -> Tensor:
    """The samples, clamped to [−1, 1] if the real samples are images in this range."""
    bounded = samples.ndim == 4 and float(to_unit(real).abs().max()) <= 1
    return samples.clamp(-1, 1) if bounded else samples


def evaluate_samples(
    samples: Tensor,
    held_out: Tensor | None,
    train: Tensor,
    *,
    labels: Labels | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compares samples with held-out data, and training data with held-out data in the same way.

    Images are compared pixel by pixel; a byte u means u/127.5 − 1. As many samples as training
    rows are compared, because the Fréchet distance falls as the number of rows grows: evenly spaced
    training rows, and if there are fewer of them than samples, samples at random. With labels these
    are equally many for each label, since rows whose labels are drawn evenly are closer to the data
    than rows at random. Without held-out data, every other training row takes their place, and the
    training data are drawn from the other half.

    Args:
        samples: (n, *S), floating or uint8, n ≥ 6.
        held_out: (m, *S), likewise, m ≥ 6; None if there are none.
        train: (k, *S), likewise, k ≥ 6, or k ≥ 12 without held-out data.
        labels: of the rows, such as those that the samples were drawn with.
        progress: show a progress bar.

    Returns:
        A dict that JSON can hold:

        - against: the data that samples are compared with, "held_out" or "train".
        - counts: the number of samples that are compared (samples), of the data that they are
          compared with (against), of the training data that are compared in the same way (train),
          and of the training data in which nearest rows are searched (searched).
        - frechet_distance, kernel_distance (over all rows, divided by the root mean square of the
          data that they are compared with), precision and recall (k = 3), density and coverage
          (k = 5): the metrics of :mod:`pfgm.metrics`, for samples and for train.
        - median_distance_to_train: the median :func:`pfgm.metrics.nearest_distance` to the training
          data, for samples and for the data that they are compared with. It is much smaller for
          samples that are copies. Without held-out data, it is that of a training row to all
          others.

    Raises:
        TypeError: a dtype is neither floating nor uint8.
        ValueError: sample shapes or devices differ, there are too few rows, or values are NaN or
            infinity.

    >>> import pfgm
    >>> digits = pfgm.data.digits()
    >>> figures = evaluate_samples(digits.train[:300], digits.held_out, digits.train)
    >>> figures["against"], figures["counts"]["searched"]
    ('held_out', 1398)
    >>> figures["median_distance_to_train"]["samples"]
    0.0
    """
    samples, train = to_unit(samples), to_unit(train)
    if held_out is None:
        against, real, others = "train", train[::2], train[1::2]
        counted = {"half of train": others}
    else:
        against, real, others = "held_out", to_unit(held_out), train
        counted = {"held_out": real, "train": others}
    for name, rows in {"samples": samples, **counted}.items():
        if len(rows) < MIN_ROWS:
            raise ValueError(f"{name} must have at least {MIN_ROWS} rows, got {len(rows)}.")
    others_labels = None
    if labels is not None:
        others_labels = labels.train if held_out is not None else labels.train[1::2]
    of_samples, of_others = _equally_many(samples, others, labels, others_labels)
    compared, chosen = samples[of_samples], others[of_others]
    with progress_bar(total=4, desc="metrics", disable=not progress) as bar:
        neighbours = metrics.neighbour_distances(real, _NEIGHBOURS, progress=progress)
        bar.update()
        figures = {}
        for name, rows in (("samples", compared), ("train", chosen)):
            figures[name] = _figures(rows, real, neighbours)
            bar.update()
        real_distances = metrics.nearest_distance(evenly_spaced(real, len(samples)), others)
        if held_out is None:  # the nearest other row may be in the same half
            real_distances = real_distances.minimum(evenly_spaced(neighbours[:, 0], len(samples)))
        nearest = {"samples": metrics.nearest_distance(samples, train), against: real_distances}
        bar.update()
    return {
        "against": against,
        "counts": {
            "samples": len(compared),
            "against": len(real),
            "train": len(chosen),
            "searched": len(train),
        },
        **{name: {of: figures[of][name] for of in figures} for name in figures["samples"]},
        "median_distance_to_train": {of: float(each.median()) for of, each in nearest.items()},
    }


def evaluate_labels(
    samples: Tensor,
    held_out: Tensor | None,
    train: Tensor,
    labels: Labels,
    *,
    progress: bool = False,
) -> dict[int, dict[str, Any]]:
    """Compares the samples of each label with the data of that label.

    Args:
        samples, held_out, train, progress: as for :func:`evaluate_samples`.
        labels: of their rows.

    Returns:
        The result of :func:`evaluate_samples` for each label, in their order. Labels are left out
        that have fewer samples, held-out or training rows than it takes.

    Raises:
        TypeError, ValueError: as for :func:`evaluate_samples`.

    >>> import pfgm
    >>> digits = pfgm.data.digits()
    >>> each = Labels(digits.train_labels, digits.held_out_labels, digits.train_labels)
    >>> evaluate_labels(digits.train, digits.held_out, digits.train, each)[7]["counts"]["samples"]
    149
    """
    figures = {}
    numbers = [int(label) for label in labels.samples.unique()]
    for label in progress_bar(numbers, "labels", unit="label", disable=not progress):
        parts = [
            None if rows is None or own is None else rows[(own == label).to(rows.device)]
            for rows, own in zip((samples, held_out, train), labels, strict=True)
        ]
        least = (MIN_ROWS, MIN_ROWS, MIN_ROWS * (2 if held_out is None else 1))
        if all(part is None or len(part) >= n for part, n in zip(parts, least, strict=True)):
            figures[label] = evaluate_samples(*parts)  # type: ignore[arg-type]
    return figures


def _equally_many(
    samples: Tensor, others: Tensor, labels: Labels | None, others_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Numbers of samples and of other rows: equally many, with labels also of each label."""
    draw = torch.Generator().manual_seed(0)
    if labels is None or others_labels is None:
        both = (len(samples), len(others))
        pairs = [tuple(torch.arange(count, device="cpu") for count in both)]
    else:
        own, beside = labels.samples.cpu(), others_labels.cpu()
        pairs = [((own == k).nonzero()[:, 0], (beside == k).nonzero()[:, 0]) for k in own.unique()]
    chosen: list[tuple[Tensor, Tensor]] = []
    for rows, rows_beside in pairs:
        count = min(len(rows), len(rows_beside))
        if count < len(rows):
            order = torch.randperm(len(rows), generator=draw, device="cpu")
            rows = rows[order[:count].sort().values]
        chosen.append((rows, evenly_spaced(rows_beside, count)))
    return torch.cat([a for a, _ in chosen]), torch.cat([b for _, b in chosen])


def _figures(rows: Tensor, real: Tensor, neighbours: Tensor) -> dict[str, float]:
    precision_recall = metrics.precision_recall(rows, real, k=3, neighbours=neighbours)
    density_coverage = metrics.density_coverage(rows, real, k=_NEIGHBOURS, neighbours=neighbours)
    scale = float(real.double().square().mean().sqrt()) or 1.0
    return {
        "frechet_distance": metrics.frechet_distance(rows, real),
        "kernel_distance": metrics.kernel_distance(rows / scale, real / scale, subsets=None).mean,
        **precision_recall._asdict(),
        **density_coverage._asdict(),
    }


def evenly_spaced(rows: Tensor, count: int) -> Tensor:
    """Evenly spaced rows, ``count`` of them, or all if there are fewer."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def bits_per_dim(
    flow: Flow,
    network: Network,
    x: Tensor,
    *,
    grey_levels: int,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    **options: Any,
) -> BitsPerDim:
    """The bits per dimension of data under a flow, as mean and standard error.

    They are −log₂ p/N + log₂(grey_levels/2), with :meth:`pfgm.Flow.log_likelihood` of the data with
    uniform noise of one grey level. Their mean is an upper bound of the bits that a code for the
    grey levels needs (Theis et al., arXiv 1511.01844, section 3.1).

    Args:
        flow: the flow of the network.
        network: must treat rows separately.
        x: (B, *S) on the device of the network: uint8, or floating values at evenly spaced grey
            levels from −1 to 1.
        grey_levels: the number of grey levels. 0 means continuous data: no noise is added, and the
            result is −log₂ p/N.
        labels: (B,), for a network that takes labels.
        seed: seed of the noise, and of the probes that estimate the divergence.
        batch_size: samples at a time.
        progress: show a progress bar for each batch.
        **options: of :meth:`pfgm.Flow.log_likelihood`, such as solver, rtol and estimator.

    Raises:
        ValueError: there are no rows, levels or an option is out of range, or values lie outside
            [−1, 1] or between the grey levels.

    >>> import pfgm
    >>> flow = pfgm.PoissonFlowPP((2,), D=float("inf"), sigma_min=1.0)
    >>> net = flow.empirical(torch.zeros(1, 2))
    >>> result = bits_per_dim(flow, net, torch.zeros(4, 2), grey_levels=0, estimator="exact")
    >>> round(result.mean, 3)  # ½ log₂ 2π
    1.326
    """
    if len(x) == 0 or batch_size < 1:
        raise ValueError(
            f"x must have at least one row and batch_size be at least 1, got {len(x)} rows and "
            f"batch_size {batch_size}."
        )
    check_seed(seed)
    if grey_levels:
        x = dequantised(x, grey_levels, torch.Generator().manual_seed(seed))
    probes = torch.Generator(device=x.device).manual_seed(seed)
    bits, evaluations = [], 0
    for rows in torch.arange(len(x), device="cpu").split(batch_size):
        result = flow.log_likelihood(
            network,
            to_unit(x[rows]),
            grey_levels=grey_levels or 2,
            condition=None if labels is None else {"labels": labels[rows]},
            generator=probes,
            progress=progress,
            **options,
        )
        bits.append(result.bits_per_dim.cpu())
        evaluations = max(evaluations, result.nfe)
    values = torch.cat(bits)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return BitsPerDim(float(values.mean()), error, len(values), evaluations)


def dequantised(x: Tensor, grey_levels: int, generator: torch.Generator) -> Tensor:
    """Adds uniform noise u in [0, 1) to data at grey levels k: 2 (k + u)/grey_levels − 1, float32.

    Raises:
        ValueError: grey_levels is below 2, or x holds values outside [−1, 1] or between the levels.

    >>> dequantised(torch.tensor([-1.0, 1.0]), 2, torch.Generator().manual_seed(0)).floor()
    tensor([-1.,  0.])
    """
    if grey_levels < 2:
        raise ValueError(
            f"grey_levels must be at least 2, or 0 for continuous data, got {grey_levels}."
        )
    unit = to_unit(x)
    if float(unit.abs().max()) > 1:
        raise ValueError(
            f"x must have {grey_levels} levels in [-1, 1], got {float(unit.abs().max()):.4g}; for "
            "continuous data use grey_levels = 0."
        )
    position = (unit + 1) / 2 * (grey_levels - 1)
    level = position.round()
    if float((position - level).abs().max()) > _MOST_OFF_LEVEL:
        raise ValueError(
            f"x must have {grey_levels} levels in [-1, 1], got values between them; for continuous "
            "data use grey_levels = 0."
        )
    noise = torch.rand(x.shape, generator=generator, device=generator.device)
    return 2 * (level + noise.to(x.device)) / grey_levels - 1


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

    All runs start from the same points of the prior. A solver that evaluates the network k times in
    a step, such as heun with k = 2, gets 1/k of the steps, rounded up. Images are clamped to
    [−1, 1] if the held-out images are in this range.

    Args:
        flow, network: as for :meth:`pfgm.Flow.sample`.
        held_out: (m, *S), floating or uint8, m ≥ 2, on the device of the samples.
        n: samples for each point, at least 2.
        steps: numbers of steps of euler, heun and multistep; an empty list leaves them out.
        tolerances: values of rtol and atol of rk45; an empty list leaves it out.
        seed: seed of the prior.
        progress: show a progress bar.
        **options: of :func:`draw_samples`, such as batch_size, device and guidance.

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
            number = -(-count // (GRID_SOLVERS[chosen["solver"]].evaluations or 1))
            runs.append((name, number, {"steps": number, **chosen}))
    for tolerance in tolerances:
        chosen = {"solver": "rk45"}
        runs.append(("rk45", tolerance, {"rtol": tolerance, "atol": tolerance, **chosen}))
    points = []
    for name, setting, chosen in progress_bar(runs, "curve", unit="run", disable=not progress):
        samples, nfe = draw_samples(flow, network, n, seed=seed, **chosen, **options)
        distance = metrics.frechet_distance(clamp_images(samples, held_out), held_out)
        points.append(Point(name, setting, nfe, distance))
    return points


def as_curves(points: Sequence[Point]) -> dict[str, tuple[list[float], list[float]]]:
    """The evaluations and distances of each run, for :func:`pfgm.plotting.quality_curve`.

    >>> as_curves([Point("heun", 3, 5, 2.0), Point("heun", 5, 9, 1.0)])
    {'heun': ([5, 9], [2.0, 1.0])}
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for point in points:
        nfe, distances = curves.setdefault(point.run, ([], []))
        nfe.append(point.nfe)
        distances.append(point.frechet_distance)
    return curves
