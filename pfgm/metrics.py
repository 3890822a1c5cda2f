"""How near samples come to real data, in the space of the samples or of any features of them.

Everything is computed in float64 on the device of the arguments, and distances from exact
differences, since those from dot products are worst where it matters: near zero.

``features`` of a metric maps (n, *S) to (n, F); None compares the samples themselves. It is given
at most 64 samples at a time, without gradients; a module (or one whose method it is) is in
evaluation mode meanwhile. With features, samples may have any dtype that these take.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .common.files import StrPath
from .common.tensors import evaluating

Features = Callable[[Tensor], Tensor]

_CHUNK = 2**22  # distances held at once: 32 MiB
_TERMS = 2**28  # of the sums found in one call, which nothing interrupts
_BATCH = 64  # samples that features are given at once


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


class InceptionMetrics(NamedTuple):
    """Lower fid and higher score are better; see :func:`inception_metrics`."""

    fid: float
    score: float
    score_deviation: float


def frechet_distance(a: Tensor, b: Tensor, *, features: Features | None = None) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of samples.

    ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) with unbiased covariances, in squared units of the
    samples (Dowson and Landau 1982; on Inception features it is the FID of Heusel et al. 2017,
    arXiv 1706.08500). It falls with the number of samples: compare equal numbers. Digits in
    [-1, 1], train against held out: 0.39.

    Args:
        a: (n, *S), floating, n ≥ 2; fewer samples than numbers in S will do.
        b: (m, *S), likewise.
        features: compared in place of the samples, (n, *S) to (n, F).

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, too few samples, NaN or infinity, features
            of another shape, or values so large that the distance overflows.

    >>> a = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> frechet_distance(a, a + torch.tensor([0.0, 3.0]))
    9.0
    >>> frechet_distance(a, a + torch.tensor([0.0, 3.0]), features=lambda x: x[:, :1])
    0.0
    """
    rows_a, rows_b = _pair("a", a, "b", b, features, at_least=(2, 2))
    shift = rows_a.mean(0) - rows_b.mean(0)
    root_a, root_b = _covariance_root(rows_a), _covariance_root(rows_b)
    # Σ = RᵀR, so the eigenvalues of (Σ_a Σ_b)^½ are the singular values of R_a R_bᵀ. No square root
    # of a rounding error is ever taken, which is what spoils the usual way at singular covariances.
    cross = root_a @ root_b.T
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
    their KID). Its expectation is 0 for two sets of one distribution, whatever their sizes, so it
    may come out negative. It compares moments up to the degree.

    Args:
        a: (n, *S), floating, n ≥ 2.
        b: (m, *S), likewise.
        features: compared in place of the samples, (n, *S) to (n, F).
        degree: of the kernel, at least 1.
        subsets: how many pairs of random subsets, each drawn without replacement, are compared;
            None compares all of a with all of b, once.
        subset_size: samples in a subset, at least 2; None is 1000, or half of the smaller set
            where that is less.
        generator: draws the subsets.

    Returns:
        Mean and standard deviation (with n − 1) over the subsets. The deviation of a single
        estimate is NaN.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, too few samples, NaN or infinity, features
            of another shape, degree or subsets below 1, subsets larger than the sets, or values so
            large that the distance overflows.

    >>> a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    >>> kernel_distance(a, b, degree=1, subsets=None).mean  # (1 − 2)² less the spread within
    -1.0
    >>> draw = torch.Generator().manual_seed(0)
    >>> kernel_distance(torch.zeros(9, 2), torch.ones(9, 2), subsets=3, generator=draw)
    KernelDistance(mean=7.0, deviation=0.0)
    """
    _whole("degree", degree)
    rows_a, rows_b = _pair("a", a, "b", b, features, at_least=(2, 2))
    smaller = min(len(rows_a), len(rows_b))
    if subsets is None:
        return KernelDistance(_discrepancy(rows_a, rows_b, degree), math.nan)
    _whole("subsets", subsets)
    size = max(2, min(1000, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise ValueError(
            f"subset_size is {subset_size}; allowed are whole numbers from 2 to {smaller}, the "
            "size of the smaller set."
        )
    found = torch.tensor(
        [
            _discrepancy(_subset(rows_a, size, generator), _subset(rows_b, size, generator), degree)
            for _ in range(subsets)
        ],
        dtype=torch.float64,
    )
    return KernelDistance(float(found.mean()), float(found.std()) if subsets > 1 else math.nan)


def precision_recall(
    samples: Tensor,
    real: Tensor,
    k: int = 3,
    *,
    features: Features | None = None,
    neighbours: Tensor | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A set's manifold is the union of balls around its members, each reaching to the k-th nearest
    other member. Precision is the fraction of the samples inside the manifold of the real data,
    recall the fraction of the real data inside the manifold of the samples.

    Args:
        samples: (n, *S), floating, n > k.
        real: (m, *S), likewise.
        k: the neighbour that sets the radius, k ≥ 1.
        features: compared in place of the samples, (n, *S) to (n, F).
        neighbours: (m, k or more), :func:`neighbour_distances` of the real data (or of their
            features), where several sets are compared with them.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, k < 1, at most k samples, NaN or infinity,
            features or neighbours of another shape.

    >>> real = torch.arange(5.0).view(5, 1)
    >>> precision_recall(torch.tensor([[0.1], [0.2], [0.3], [-9.0]]), real, k=1)
    PrecisionRecall(precision=0.75, recall=0.2)
    """
    _whole("k", k)
    rows, real_rows = _pair("samples", samples, "real", real, features, at_least=(k + 1, k + 1))
    radii, real_radii = _radii(rows, k), _radii(real_rows, k, neighbours)
    inside = 0
    covered = torch.zeros_like(real_radii, dtype=torch.bool)
    for part, distances in _distances(rows, real_rows):
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

    with R_i the distance of the real r_i to the k-th nearest other real one. Unlike
    :func:`precision_recall`, only the real data make balls, and overlapping balls count as often
    as they are: an outlier's wide ball adds one to what it holds. Density may exceed 1. The balls
    are closed, as in :func:`precision_recall`.

    Args:
        samples: (n, *S), floating, n ≥ 1.
        real: (m, *S), likewise, m > k.
        k: the neighbour that sets the radius, k ≥ 1.
        features: compared in place of the samples, (n, *S) to (n, F).
        neighbours: (m, k or more), as in :func:`precision_recall`.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, k < 1, at most k real samples, NaN or
            infinity, features or neighbours of another shape.

    >>> real = torch.arange(5.0).view(5, 1)
    >>> density_coverage(torch.tensor([[0.1], [0.2], [0.3], [-9.0]]), real, k=1)
    DensityCoverage(density=1.5, coverage=0.4)
    """
    _whole("k", k)
    rows, real_rows = _pair("samples", samples, "real", real, features, at_least=(1, k + 1))
    radii = _radii(real_rows, k, neighbours)
    inside = 0
    covered = torch.zeros_like(radii, dtype=torch.bool)
    for _, distances in _distances(rows, real_rows):
        within = distances <= radii
        inside += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(inside / (k * len(rows)), int(covered.sum()) / len(real_rows))


def neighbour_distances(x: Tensor, k: int = 5, *, features: Features | None = None) -> Tensor:
    """The Euclidean distances of each sample to its k nearest others of the same set.

    Args:
        x: (n, *S), floating, n > k.
        k: how many, k ≥ 1.
        features: compared in place of the samples, (n, *S) to (n, F).

    Returns:
        (n, k), float64, ascending.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: k < 1, at most k samples, NaN or infinity, features of another shape.

    >>> neighbour_distances(torch.tensor([[0.0], [1.0], [3.0]]), k=2)
    tensor([[1., 3.],
            [1., 2.],
            [2., 3.]], dtype=torch.float64)
    """
    _whole("k", k)
    rows, _ = _pair("x", x, "x", x[: k + 1], features, at_least=(k + 1, k + 1))
    return _neighbours(rows, k)


def nearest_distance(a: Tensor, b: Tensor, *, features: Features | None = None) -> Tensor:
    """The Euclidean distance of each sample to the nearest of another set.

    Near zero for samples that a model has memorised from its training data b.

    Args:
        a: (n, *S), floating.
        b: (m, *S), floating, m ≥ 1.
        features: compared in place of the samples, (n, *S) to (n, F).

    Returns:
        (n,), float64, in units of the samples or features.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, no samples, NaN or infinity, features of
            another shape.

    >>> nearest_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [9.0, 9.0]]))
    tensor([5.], dtype=torch.float64)
    """
    rows_a, rows_b = _pair("a", a, "b", b, features, at_least=(1, 1))
    return torch.cat([distances.amin(1) for _, distances in _distances(rows_a, rows_b)])


def inception_metrics(
    samples: Tensor,
    real: Tensor,
    *,
    splits: int = 10,
    batch_size: int = 64,
    weights: StrPath | None = None,
) -> InceptionMetrics:
    """FID and Inception score of images, through torch-fidelity.

    FID is :func:`frechet_distance` on 2048 features of Inception v3 (Heusel et al. 2017, arXiv
    1706.08500), the score exp E KL(p(y|x) ‖ p(y)) of its classes (Salimans et al. 2016, arXiv
    1606.03498), as mean and standard deviation over splits of the shuffled samples. Published
    numbers take 50 000 samples; fewer than 2048 leave the covariance singular. The images become
    bytes and torch-fidelity resizes them.

    The network's weights (91 MB) are downloaded at the first call and kept in torch's cache.

    Args:
        samples: (n, C, H, W) with C = 1 (grey) or 3 (RGB), or (n, H, W) grey; floating values in
            [-1, 1], clipped, or uint8; n ≥ 2.
        real: (m, C, H, W) or (m, H, W), likewise. Images of both sets may differ in size.
        splits: of the Inception score, from 1 to n.
        batch_size: images that the network is given at once.
        weights: torch-fidelity's file of weights, where there is no download. It is unpickled, so
            that it can run any code: take it from nobody but torch-fidelity.

    Raises:
        ImportError: torch-fidelity is not installed.
        OSError: the weights can be neither found nor downloaded.
        TypeError: a dtype that is neither floating nor uint8.
        ValueError: another shape, too few images, different devices, NaN or infinity, splits or
            batch_size out of range.

    >>> draw = torch.Generator().manual_seed(0)
    >>> images = torch.rand(20, 3, 32, 32, generator=draw) * 2 - 1
    >>> inception_metrics(images, images, splits=1).fid < 1e-3  # doctest: +SKIP
    True
    """
    _whole("splits", splits)
    _whole("batch_size", batch_size)
    _check_images("samples", samples)
    _check_images("real", real)
    if splits > len(samples):
        raise ValueError(f"splits is {splits}; allowed are at most {len(samples)}, the samples.")
    if samples.device != real.device:
        raise ValueError(
            f"samples is on {samples.device} and real on {real.device}; allowed is one."
        )
    sets = [_images("samples", samples), _images("real", real)]
    try:
        fidelity: Any = importlib.import_module("torch_fidelity")
    except ModuleNotFoundError as error:
        raise ImportError(
            "inception_metrics() needs torch-fidelity; in a checkout: pip install '.[fid]'"
        ) from error
    try:
        # torch-fidelity takes the current device; -1 leaves it as it is.
        with torch.cuda.device(samples.device if samples.is_cuda else -1):
            found = fidelity.calculate_metrics(
                input1=sets[0],
                input2=sets[1],
                isc=True,
                isc_splits=splits,
                fid=True,
                cuda=samples.is_cuda,
                batch_size=batch_size,
                feature_extractor_weights_path=None if weights is None else str(weights),
                save_cpu_ram=True,  # no worker processes: the images are in memory already
                cache=False,
                verbose=False,
            )
    except OSError as error:  # what urllib raises too
        raise OSError(
            f"the weights of Inception v3 cannot be had ({error}). torch-fidelity downloads them "
            "from github.com/toshas/torch-fidelity/releases; without a network, bring that file "
            "(weights-inception-2015-12-05-6726825d.pth) and give its name as weights."
        ) from error
    return InceptionMetrics(
        float(found[fidelity.KEY_METRIC_FID]),
        float(found[fidelity.KEY_METRIC_ISC_MEAN]),
        float(found[fidelity.KEY_METRIC_ISC_STD]),
    )


class _Bytes(Dataset[Tensor]):
    """Images (n, 3, H, W), uint8, as torch-fidelity wants them: one at a time, no tuples."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)


def _check_images(name: str, x: Tensor) -> None:
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are floating dtypes and uint8.")
    channels = x.shape[1] if x.ndim == 4 else 1
    if x.ndim not in (3, 4) or channels not in (1, 3) or x.numel() == 0 or len(x) < 2:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; allowed is (n, C, H, W) or (n, H, W), with C = 1 "
            "or 3 and n at least 2."
        )


def _images(name: str, x: Tensor) -> _Bytes:
    _check_finite(name, x)
    images = x.detach().unsqueeze(1) if x.ndim == 3 else x.detach()
    if x.dtype != torch.uint8:
        images = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return _Bytes(images.cpu())


def _whole(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; allowed are whole numbers from 1.")


def _pair(
    name_a: str,
    a: Tensor,
    name_b: str,
    b: Tensor,
    features: Features | None,
    at_least: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Both sets, or their features, as float64 rows (n, N), checked."""
    for name, x, count in ((name_a, a, at_least[0]), (name_b, b, at_least[1])):
        if features is None:
            _check_floating(name, x)
        _check_form(name, x, count)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"{name_a} has samples of shape {tuple(a.shape[1:])} and {name_b} of "
            f"{tuple(b.shape[1:])}; they must be the same."
        )
    if a.device != b.device:
        raise ValueError(f"{name_a} is on {a.device} and {name_b} on {b.device}; allowed is one.")
    for name, x in ((name_a, a), (name_b, b)):
        _check_finite(name, x)
    if features is None:
        return a.detach().flatten(1).double(), b.detach().flatten(1).double()
    with evaluating(getattr(features, "__self__", features)):
        return _features(name_a, a, features), _features(name_b, b, features)


def _features(name: str, x: Tensor, features: Features) -> Tensor:
    """The features of x as float64 rows (n, F), checked."""
    rows = []
    for part in x.detach().split(_BATCH):
        found = features(part)
        _check_floating(f"features of {name}", found)
        if found.ndim < 2 or len(found) != len(part) or found.numel() == 0:
            raise ValueError(
                f"features of {name} has shape {tuple(found.shape)} for {len(part)} samples; "
                f"allowed is ({len(part)}, F) with F at least 1."
            )
        rows.append(found.flatten(1).double())
    joined = torch.cat(rows)
    _check_finite(f"features of {name}", joined)
    return joined


def _check_finite(name: str, x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} holds NaN or infinity; only finite values are allowed.")


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"{name} has dtype {x.dtype}; allowed are floating dtypes (pfgm.data.to_unit makes "
            "bytes into one)."
        )


def _check_form(name: str, x: Tensor, at_least: int) -> None:
    if x.ndim < 2 or len(x) < at_least or x.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; allowed is (n, *S), n samples of shape S with n "
            f"at least {at_least}."
        )


def _covariance_root(rows: Tensor) -> Tensor:
    """R (min(n, N), N) with RᵀR the unbiased covariance of the rows."""
    centred = rows - rows.mean(0)
    root: Tensor = torch.linalg.qr(centred / math.sqrt(len(rows) - 1), mode="r").R
    return root


def _subset(rows: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(len(rows), generator=generator, device=device)
    return rows[order[:size].to(rows.device)]


def _discrepancy(a: Tensor, b: Tensor, degree: int) -> float:
    """The unbiased MMD² of rows (n, F) and (m, F) with the kernel (x·y/F + 1)^degree."""
    n, m = len(a), len(b)
    within = _kernel_sum(a, a, degree) - float(_kernel(a.square().sum(1), a, degree).sum())
    within_b = _kernel_sum(b, b, degree) - float(_kernel(b.square().sum(1), b, degree).sum())
    across = _kernel_sum(a, b, degree) / (n * m)
    found = within / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * across
    if not math.isfinite(found):
        raise ValueError("a and b hold values so large that their kernel distance overflows.")
    return found


def _kernel_sum(a: Tensor, b: Tensor, degree: int) -> float:
    step = max(1, _CHUNK // len(b))
    return sum(float(_kernel(part @ b.T, a, degree).sum()) for part in a.split(step))


def _kernel(products: Tensor, a: Tensor, degree: int) -> Tensor:
    return (products / a.shape[1] + 1) ** degree


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The distances (rows, m) from a to b, some rows of a at a time, and which."""
    step = max(1, min(_CHUNK, _TERMS // max(b.shape[1], 1)) // len(b))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        yield part, torch.cdist(a[part], b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(rows: Tensor, k: int, neighbours: Tensor | None = None) -> Tensor:
    """The distance (n,) of each row to its k-th nearest other row."""
    if neighbours is None:
        return _neighbours(rows, k)[:, -1]
    if neighbours.ndim != 2 or len(neighbours) != len(rows) or neighbours.shape[1] < k:
        raise ValueError(
            f"neighbours has shape {tuple(neighbours.shape)}; allowed is ({len(rows)}, {k} or "
            "more), the distances of the real data to their nearest."
        )
    return neighbours[:, k - 1].to(rows)


def _neighbours(rows: Tensor, k: int) -> Tensor:
    """The distances (n, k) of each row to its nearest other rows, ascending."""
    # The nearest of all is the row itself, at exactly 0.
    nearest = (part.topk(k + 1, largest=False).values for _, part in _distances(rows, rows))
    return torch.cat([distances[:, 1:] for distances in nearest])
