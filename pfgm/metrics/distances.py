"""Distances between two sets of samples, or of their features, and nearest neighbours.

:mod:`pfgm.metrics` describes the argument ``features`` and the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_tensor
from ..common.messages import progress_bar
from ..common.numbers import whole
from ..common.tensors import evaluating
from ..common.values import check_finite
from ..core.arithmetic import blocks

Features = Callable[[Tensor], Tensor]
Near = Callable[[slice, Tensor, Tensor], Tensor]
"""Rows, squared distances (rows, m) and their errors → those that must be exact, as booleans."""

_MAX_DISTANCES = 2**22  # distances, or values of a copy, in memory at once: 32 MiB
_MAX_TERMS = 2**28  # terms summed in one call of torch, which cannot be interrupted
_MAX_PRODUCTS = 2**34  # the same in a product of matrices: about as long
_NEAR_VALUES = 2**16  # values of near pairs at a time: they stay in the caches of a processor
_ORIGIN_ROWS = 64
_UNDERFLOW = 1e-290  # far above what sums of squares lose by underflow
_SAFE = 1e-100, 1e100  # squares of such values neither overflow nor underflow
_FEATURES_BATCH = 64  # samples in one call of features


class PrecisionRecall(NamedTuple):
    """Both in [0, 1], higher is better; see :func:`precision_recall`."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Higher is better, 1 for two sets of one distribution; see :func:`density_coverage`."""

    density: float
    coverage: float


class KernelDistance(NamedTuple):
    """Lower is better; see :func:`kernel_distance`."""

    mean: float
    deviation: float


def frechet_distance(a: Tensor, b: Tensor, *, features: Features | None = None) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of samples.

    ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) with unbiased covariances, in squared units of the
    samples (Dowson and Landau 1982; on Inception features it is the FID of Heusel et al. 2017,
    arXiv 1706.08500). It falls as the number of samples grows, so compare equal numbers.

    Args:
        a: (n, *S), floating, n ≥ 2; n may be less than the number of values in a sample.
        b: (m, *S), likewise.

    >>> a = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> frechet_distance(a, a + torch.tensor([0.0, 3.0]))
    9.0
    >>> frechet_distance(a, a + torch.tensor([0.0, 3.0]), features=lambda x: x[:, :1])
    0.0
    """
    rows_a, rows_b = _checked_rows("a", a, "b", b, features, at_least=(2, 2))
    shift = rows_a.mean(0) - rows_b.mean(0)
    root_a = _covariance_root(rows_a, len(rows_b))
    root_b = _covariance_root(rows_b, len(rows_a))
    # Σ = RᵀR, so the eigenvalues of (Σ_a Σ_b)^½ are the singular values of R_a R_bᵀ. The usual
    # matrix square root takes roots of rounding errors if a covariance is singular.
    cross = root_a @ root_b.T if len(root_a) > len(root_b) else root_b @ root_a.T  # tall: faster
    squares = sum(float(part.square().sum()) for part in (shift, root_a, root_b))
    if not (math.isfinite(squares) and bool(torch.isfinite(cross).all())):
        raise ValueError("a and b hold values so large that their Fréchet distance overflows.")
    return max(0.0, squares - 2 * float(torch.linalg.svdvals(cross).sum()))


def kernel_distance(
    a: Tensor,
    b: Tensor,
    *,
    features: Features | None = None,
    degree: int = 3,
    subsets: int | None = 100,
    subset_size: int | None = None,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """The unbiased squared maximum mean discrepancy of two sets with a polynomial kernel.

        MMD² = Σ_{i≠j} k(a_i, a_j)/(n(n − 1)) + Σ_{i≠j} k(b_i, b_j)/(m(m − 1))
               − 2 Σ_{i,j} k(a_i, b_j)/(nm),    k(x, y) = (x·y/F + 1)^degree

    with F values in a row (Bińkowski et al. 2018, arXiv 1801.01401; on Inception features it is
    their KID). It compares moments up to the degree. Its expectation is 0 for two sets of one
    distribution, whatever their sizes, so an estimate may be negative.

    Args:
        a: (n, *S), floating, n ≥ 2.
        b: (m, *S), likewise.
        degree: degree of the kernel, at least 1.
        subsets: the number of pairs of random subsets to compare, each drawn without replacement;
            None compares all of a with all of b.
        subset_size: samples in a subset, at least 2; None means 1000, but at most half of the
            smaller set.
        generator: generator that draws the subsets.

    Returns:
        Mean and standard deviation (with n − 1) over the subsets. The standard deviation of one
        estimate is NaN.

    >>> a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    >>> kernel_distance(a, b, degree=1, subsets=None).mean  # (1 − 2)² − 2/2 − 2/2
    -1.0
    >>> draw = torch.Generator().manual_seed(0)
    >>> kernel_distance(torch.zeros(9, 2), torch.ones(9, 2), subsets=3, generator=draw)
    KernelDistance(mean=7.0, deviation=0.0)
    """
    whole("degree", degree)
    rows_a, rows_b = _checked_rows("a", a, "b", b, features, at_least=(2, 2))
    smaller = min(len(rows_a), len(rows_b))
    if subsets is None:
        return KernelDistance(_squared_mmd(rows_a, rows_b, degree), math.nan)
    whole("subsets", subsets)
    size = max(2, min(1000, smaller // 2)) if subset_size is None else subset_size
    whole("subset_size", size, 2, smaller)
    distances = torch.tensor(
        [
            _squared_mmd(
                _draw_subset(rows_a, size, generator), _draw_subset(rows_b, size, generator), degree
            )
            for _ in range(subsets)
        ],
        dtype=torch.float64,
        device="cpu",
    )
    deviation = float(distances.std()) if subsets > 1 else math.nan
    if math.isinf(deviation):
        raise ValueError("a and b hold values so large that the deviation overflows.")
    return KernelDistance(float(distances.mean()), deviation)


def precision_recall(
    samples: Tensor,
    real: Tensor,
    k: int = 3,
    *,
    features: Features | None = None,
    neighbours: Tensor | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    The manifold of a set is the union of balls around its members. The radius of a ball is the
    distance to the k-th nearest other member. Precision is the fraction of the samples inside the
    manifold of the real data, recall the fraction of the real data inside the manifold of the
    samples.

    Args:
        samples: (n, *S), floating, n > k.
        real: (m, *S), likewise.
        k: the neighbour that sets the radius, k ≥ 1.
        neighbours: (m, at least k), the :func:`neighbour_distances` of the real data or of their
            features, which save time if several sets are compared with the same data.

    >>> real = torch.arange(5.0).view(5, 1)
    >>> precision_recall(torch.tensor([[0.1], [0.2], [0.3], [-9.0]]), real, k=1)
    PrecisionRecall(precision=0.75, recall=0.2)
    """
    whole("k", k)
    rows, real_rows = _checked_rows(
        "samples", samples, "real", real, features, at_least=(k + 1, k + 1)
    )
    radii, real_radii = _ball_radii(rows, k), _ball_radii(real_rows, k, neighbours)
    inside = 0
    covered = torch.zeros_like(real_radii, dtype=torch.bool)
    near = _beside((radii, True), (real_radii, False))
    for part, distances in _distances(rows, real_rows, near):
        inside += int((distances <= real_radii).any(1).sum())
        covered |= (distances <= radii[part, None]).any(0)
    return PrecisionRecall(inside / len(rows), int(covered.sum()) / len(real_rows))


def density_coverage(
    samples: Tensor,
    real: Tensor,
    k: int = 5,
    *,
    features: Features | None = None,
    neighbours: Tensor | None = None,
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797).

        density  = 1/(k n) Σ_j #{i: ‖s_j − r_i‖ ≤ R_i}
        coverage = 1/m #{i: min_j ‖s_j − r_i‖ ≤ R_i}

    with R_i the distance of the real sample r_i to the k-th nearest other real sample. Unlike in
    :func:`precision_recall`, there are balls around the real data only. A sample counts once for
    every ball that holds it, so the wide ball of an outlier adds little. Density may exceed 1. The
    balls are closed, as in :func:`precision_recall`.

    Args:
        samples: (n, *S), floating, n ≥ 1.
        real: (m, *S), likewise, m > k.
        k: the neighbour that sets the radius, k ≥ 1.
        neighbours: (m, at least k), as in :func:`precision_recall`.

    >>> real = torch.arange(5.0).view(5, 1)
    >>> density_coverage(torch.tensor([[0.1], [0.2], [0.3], [-9.0]]), real, k=1)
    DensityCoverage(density=1.5, coverage=0.4)
    """
    whole("k", k)
    rows, real_rows = _checked_rows("samples", samples, "real", real, features, at_least=(1, k + 1))
    radii = _ball_radii(real_rows, k, neighbours)
    inside = 0
    covered = torch.zeros_like(radii, dtype=torch.bool)
    for _, distances in _distances(rows, real_rows, _beside((radii, False))):
        within = distances <= radii
        inside += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(inside / (k * len(rows)), int(covered.sum()) / len(real_rows))


def neighbour_distances(
    x: Tensor, k: int = 5, *, features: Features | None = None, progress: bool = False
) -> Tensor:
    """The Euclidean distances of each sample to the k nearest other samples of the same set.

    Args:
        x: (n, *S), floating, n > k.
        k: the number of neighbours, k ≥ 1.
        progress: show a progress bar.

    Returns:
        (n, k), float64, ascending.

    >>> neighbour_distances(torch.tensor([[0.0], [1.0], [3.0]]), k=2)
    tensor([[1., 3.],
            [1., 2.],
            [2., 3.]], dtype=torch.float64)
    """
    whole("k", k)
    rows, _ = _checked_rows("x", x, "x", x[: k + 1], features, at_least=(k + 1, k + 1))
    return _nearest_others(rows, k, progress=progress)


def nearest_distance(a: Tensor, b: Tensor, *, features: Features | None = None) -> Tensor:
    """The Euclidean distance of each sample in a to the nearest sample in b.

    If b is the training data, distances near zero mean that the model has memorised them.

    Args:
        a: (n, *S), floating.
        b: (m, *S), floating, m ≥ 1.

    Returns:
        (n,), float64, in units of the samples or features.

    >>> nearest_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [9.0, 9.0]]))
    tensor([5.], dtype=torch.float64)
    """
    rows_a, rows_b = _checked_rows("a", a, "b", b, features, at_least=(1, 1))
    return _nearest(rows_a, rows_b, 1)[:, 0]


def _checked_rows(
    name_a: str,
    a: Tensor,
    name_b: str,
    b: Tensor,
    features: Features | None,
    at_least: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Both checked sets, or their features, as float64 rows (n, N)."""
    for name, x, count in ((name_a, a, at_least[0]), (name_b, b, at_least[1])):
        if features is None:
            _check_floating(name, x)
        _check_shape(name, x, count)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"{name_a} and {name_b} must have samples of the same shape, got {tuple(a.shape[1:])} "
            f"and {tuple(b.shape[1:])}."
        )
    if a.device != b.device:
        raise ValueError(
            f"{name_a} and {name_b} must be on one device, got {a.device} and {b.device}."
        )
    for name, x in ((name_a, a), (name_b, b)):
        check_finite(name, x)
    if features is None:
        return a.detach().flatten(1).double(), b.detach().flatten(1).double()
    with evaluating(features):
        return _features(name_a, a, features), _features(name_b, b, features)


def _features(name: str, x: Tensor, features: Features) -> Tensor:
    """The checked features of x, as float64 rows (n, F)."""
    rows = []
    for part in x.detach().split(_FEATURES_BATCH):
        values = features(part)
        _check_floating(f"features of {name}", values)
        if values.ndim < 2 or len(values) != len(part) or values.numel() == 0:
            raise ValueError(
                f"features of {name} must have shape ({len(part)}, F) with F at least 1 for "
                f"{len(part)} samples, got {tuple(values.shape)}."
            )
        rows.append(values.flatten(1).double())
    joined = torch.cat(rows)
    check_finite(f"features of {name}", joined)
    return joined


def _check_floating(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {x.dtype}; pfgm.data.to_unit converts bytes."
        )


def _check_shape(name: str, x: Tensor, at_least: int) -> None:
    if x.ndim < 2 or len(x) < at_least or x.numel() == 0:
        raise ValueError(
            f"{name} must have shape (n, *S), n samples of shape S with n at least {at_least}, got "
            f"{tuple(x.shape)}."
        )


def _covariance_root(rows: Tensor, others: int) -> Tensor:
    """R (·, N) with RᵀR the unbiased covariance of the rows, to be multiplied with another root."""
    count, N = rows.shape
    root = (rows - rows.mean(0)) / math.sqrt(count - 1)
    # R is shortened to N rows unless that costs more than longer products with few other rows.
    if count <= N or others * (others + N) < N * N:
        return root
    short: Tensor = torch.linalg.qr(root, mode="r").R
    return short


def _draw_subset(rows: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(len(rows), generator=generator, device=device)
    return rows[order[:size].to(rows.device)]


def _squared_mmd(a: Tensor, b: Tensor, degree: int) -> float:
    """The unbiased MMD² of rows (n, F) and (m, F) with the kernel (x·y/F + 1)^degree."""
    n, m = len(a), len(b)
    parts = blocks(n, _MAX_DISTANCES // m)
    across = sum(float(_kernel(a[part], b, degree).sum()) for part in parts)
    within = _kernel_within(a, degree) / (n * (n - 1)) + _kernel_within(b, degree) / (m * (m - 1))
    distance = within - 2 * across / (n * m)
    if not math.isfinite(distance):
        raise ValueError("a and b hold values so large that their kernel distance overflows.")
    return distance


def _kernel_within(a: Tensor, degree: int) -> float:
    """The kernel of all pairs of different rows, summed."""
    total = 0.0
    for part in blocks(len(a), _MAX_DISTANCES // len(a)):
        kernel = _kernel(a[part], a[part.start :], degree)
        own = kernel[:, : len(kernel)]  # has pairs in both orders, and rows with themselves
        total += float(2 * kernel.sum() - own.sum() - own.diagonal().sum())
    return total


def _kernel(a: Tensor, b: Tensor, degree: int) -> Tensor:
    """(n, m)."""
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(degree)


def _distances(
    a: Tensor, b: Tensor, near: Near, *, progress: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the rows of a, and the distances (rows, m) of these rows to b.

    Those of near pairs are exact: they come from differences, which keep their digits. The others
    come from products of matrices, and lie on the right side of what they are compared with.
    """
    if (scale := _safe_scale(a, b)) != 1:
        yield from _scaled_distances(a, b, scale)
        return
    origin = b[:: -(-len(b) // _ORIGIN_ROWS)].median(0).values  # few rows far away do not move it
    squares_b = torch.cat([(b[part] - origin).square_().sum(1) for part in _blocks(b)])
    rounding = (2 * a.shape[1] + 32) * torch.finfo(torch.float64).eps
    step = min(_MAX_DISTANCES, _MAX_PRODUCTS // a.shape[1]) // len(b)
    parts = list(blocks(len(a), step))
    for part in progress_bar(parts, "distances", disable=not progress, leave=False):
        placed = a[part] - origin
        sums = placed.square().sum(1, keepdim=True) + squares_b
        squared = torch.empty_like(sums)
        for other in _blocks(b):
            products = (b[other] - origin).T
            squared[:, other] = torch.addmm(sums[:, other], placed, products, alpha=-2)
        # A dot product of N terms is off by at most N u Σ|x_i y_i| in any order of summation, with
        # u = eps/2 (Higham 2002, section 3.1), which makes N eps (‖x‖² + ‖y‖²) for the three here.
        # Exact differences are off by as much, and the origin and single operations add 15 eps.
        error = sums.mul_(rounding).add_(_UNDERFLOW)
        i, j = near(part, squared, error).nonzero().unbind(1)
        distances = squared.clamp_(min=0).sqrt_()
        pairs = max(1, _NEAR_VALUES // a.shape[1])
        for rows, others in zip(i.split(pairs), j.split(pairs), strict=True):
            distances[rows, others] = _between(a[part][rows, None], b[others, None]).view(-1)
        yield part, distances


def _beside(*radii: tuple[Tensor, bool]) -> Near:
    """Near are pairs whose distances cannot be told from a radius.

    Each is (n,), of the rows of a, or (m,), of b, and whether it is of a.
    """

    def near(part: slice, squared: Tensor, error: Tensor) -> Tensor:
        result = torch.zeros_like(squared, dtype=torch.bool)
        for each, of_a in radii:
            squares = (each[part, None] if of_a else each).square()
            result |= (squared - squares).abs_() <= error
        return result

    return near


def _among_least(k: int) -> Near:
    """Near are pairs whose distances may be among the k least of a row."""

    def near(part: slice, squared: Tensor, error: Tensor) -> Tensor:
        least = squared.topk(k, largest=False)
        most = (least.values + error.gather(1, least.indices)).amax(1, keepdim=True)
        return squared - error <= most

    return near


def _scaled_distances(a: Tensor, b: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Yields exact distances, as :func:`_distances` does, of rows with huge or tiny values."""
    scaled_b = b * scale
    for part in blocks(len(a), min(_MAX_DISTANCES, _MAX_TERMS // b.shape[1]) // len(b)):
        distances = _between(a[part] * scale, scaled_b).div_(scale)
        if scale < 1:
            # Few rows may be that large; the distances of the others would underflow.
            unscaled = _between(a[part], b)
            distances = torch.where(unscaled < _SAFE[1], unscaled, distances)
        if not bool(distances.isfinite().all()):
            raise ValueError("samples lie so far apart that their distances overflow float64.")
        yield part, distances


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of few rows, of which a copy takes little memory."""
    return blocks(len(rows), _MAX_DISTANCES // rows.shape[1])


def _between(a: Tensor, b: Tensor) -> Tensor:
    """Distances (*, n, m) of rows (*, n, N) and (*, m, N), from differences.

    That of a pair does not depend on the rows beside it, so equal distances stay equal.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _safe_scale(a: Tensor, b: Tensor) -> float:
    """A power of two by which rows are multiplied, so that squares of the largest differences
    neither overflow nor underflow."""
    largest = max(float(a.abs().max()), float(b.abs().max()))
    if largest == 0 or _SAFE[0] < largest < _SAFE[1]:
        return 1.0
    return 2.0 ** max(-1000, min(1000, -math.frexp(largest)[1]))


def _ball_radii(rows: Tensor, k: int, neighbours: Tensor | None = None) -> Tensor:
    """The distance (n,) of each row to its k-th nearest other row."""
    if neighbours is None:
        return _nearest_others(rows, k)[:, -1]
    if neighbours.ndim != 2 or len(neighbours) != len(rows) or neighbours.shape[1] < k:
        raise ValueError(
            f"neighbours must have shape ({len(rows)}, {k} or more), the distances of the real "
            f"data to their nearest neighbours, got {tuple(neighbours.shape)}."
        )
    return neighbours[:, k - 1].to(rows)


def _nearest_others(rows: Tensor, k: int, *, progress: bool = False) -> Tensor:
    """The distances (n, k) of each row to its nearest other rows, ascending."""
    # The first is the row itself, at a distance of exactly 0.
    return _nearest(rows, rows, k + 1, progress=progress)[:, 1:]


def _nearest(a: Tensor, b: Tensor, k: int, *, progress: bool = False) -> Tensor:
    """The k least distances (n, k) of each row of a to rows of b, ascending."""
    parts = _distances(a, b, _among_least(k), progress=progress)
    return torch.cat([distances.topk(k, largest=False).values for _, distances in parts])
