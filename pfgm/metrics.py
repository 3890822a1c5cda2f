"""How near samples come to real data, in pixel space.

Everything is computed in float64 on the device of the arguments, and distances from exact
differences, since those from dot products are worst where it matters: near zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 2**22  # distances held at once: 32 MiB


class PrecisionRecall(NamedTuple):
    """Both in [0, 1], higher is better; see :func:`precision_recall`."""

    precision: float
    recall: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of samples, in pixel space.

    ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) with unbiased covariances, in squared units of the
    samples (Dowson and Landau 1982; on Inception features it is the FID of Heusel et al. 2017,
    arXiv 1706.08500). It falls with the number of samples: compare equal numbers. Digits in
    [-1, 1], train against held out: 0.39.

    Args:
        a: (n, *S), floating, n ≥ 2; fewer samples than numbers in S will do.
        b: (m, *S), likewise.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, too few samples, NaN or infinity, or values
            so large that the distance overflows.

    >>> a = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> frechet_distance(a, a + torch.tensor([0.0, 3.0]))
    9.0
    """
    rows_a, rows_b = _pair("a", a, "b", b, at_least=2)
    shift = rows_a.mean(0) - rows_b.mean(0)
    root_a, root_b = _covariance_root(rows_a), _covariance_root(rows_b)
    # Σ = RᵀR, so the eigenvalues of (Σ_a Σ_b)^½ are the singular values of R_a R_bᵀ. No square root
    # of a rounding error is ever taken, which is what spoils the usual way at singular covariances.
    cross = root_a @ root_b.T
    squares = sum(float(part.square().sum()) for part in (shift, root_a, root_b))
    if not (math.isfinite(squares) and bool(torch.isfinite(cross).all())):
        raise ValueError("a and b hold values so large that their Fréchet distance overflows.")
    return max(0.0, squares - 2 * float(torch.linalg.svdvals(cross).sum()))


def precision_recall(samples: Tensor, real: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), in pixel space.

    A set's manifold is the union of balls around its members, each reaching to the k-th nearest
    other member. Precision is the fraction of the samples inside the manifold of the real data,
    recall the fraction of the real data inside the manifold of the samples.

    Args:
        samples: (n, *S), floating, n > k.
        real: (m, *S), likewise.
        k: the neighbour that sets the radius, k ≥ 1.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, k < 1, at most k samples, NaN or infinity.

    >>> real = torch.arange(5.0).view(5, 1)
    >>> precision_recall(torch.tensor([[0.1], [0.2], [0.3], [-9.0]]), real, k=1)
    PrecisionRecall(precision=0.75, recall=0.2)
    """
    if k < 1:
        raise ValueError(f"k is {k}; allowed are whole numbers from 1.")
    rows, real_rows = _pair("samples", samples, "real", real, at_least=k + 1)
    radii, real_radii = _radii(rows, k), _radii(real_rows, k)
    inside = 0
    covered = torch.zeros_like(real_radii, dtype=torch.bool)
    for part, distances in _distances(rows, real_rows):
        inside += int((distances <= real_radii).any(1).sum())
        covered |= (distances <= radii[part, None]).any(0)
    return PrecisionRecall(inside / len(rows), int(covered.sum()) / len(real_rows))


def nearest_distance(a: Tensor, b: Tensor) -> Tensor:
    """The Euclidean distance of each sample to the nearest of another set.

    Near zero for samples that a model has memorised from its training data b.

    Args:
        a: (n, *S), floating.
        b: (m, *S), floating, m ≥ 1.

    Returns:
        (n,), float64, in units of the samples.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: different sample shapes or devices, no samples, NaN or infinity.

    >>> nearest_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [9.0, 9.0]]))
    tensor([5.], dtype=torch.float64)
    """
    rows_a, rows_b = _pair("a", a, "b", b, at_least=1)
    return torch.cat([distances.amin(1) for _, distances in _distances(rows_a, rows_b)])


def _pair(name_a: str, a: Tensor, name_b: str, b: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    """Both sets as float64 rows (n, N), checked."""
    for name, x in ((name_a, a), (name_b, b)):
        _check_form(name, x, at_least)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"{name_a} has samples of shape {tuple(a.shape[1:])} and {name_b} of "
            f"{tuple(b.shape[1:])}; they must be the same."
        )
    if a.device != b.device:
        raise ValueError(f"{name_a} is on {a.device} and {name_b} on {b.device}; allowed is one.")
    for name, x in ((name_a, a), (name_b, b)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds NaN or infinity; only finite values are allowed.")
    return a.detach().flatten(1).double(), b.detach().flatten(1).double()


def _check_form(name: str, x: Tensor, at_least: int) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"{name} has dtype {x.dtype}; allowed are floating dtypes (pfgm.data.to_unit makes "
            "bytes into one)."
        )
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


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The distances (rows, m) from a to b, some rows of a at a time, and which."""
    step = max(1, _CHUNK // len(b))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        yield part, torch.cdist(a[part], b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(rows: Tensor, k: int) -> Tensor:
    """The distance (n,) of each row to its k-th nearest other row."""
    # The nearest of all is the row itself, at exactly 0.
    nearest = (part.topk(k + 1, largest=False).values for _, part in _distances(rows, rows))
    return torch.cat([distances[:, k] for distances in nearest])
