"""The functions posterior_mean, field_fn and log_density, which check and flatten arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from ..common.checks import check_dense, check_tensor, layout_hint
from ..common.dtypes import HALF, POINTS
from ..common.numbers import LARGEST, as_float, check_at_least_0, is_number, is_symbolic
from ..common.tensors import flat_rows, over_samples
from ..common.transforms import in_torch_func
from ..common.values import checks_values
from ..core.problems import PosteriorMean
from ..core.weights import unit_radius
from ..ops import eager, normalised_field
from ..ops import posterior_mean as mean_operator
from ..references import References, ReferenceSet
from ..references import posterior_mean as over_set
from ..references.labels import targets_by_label
from .levels import per_query

R = TypeVar("R")


def _check_tensors(x: Tensor, references: References) -> None:
    check_tensor("x", x)
    if not isinstance(references, (Tensor, ReferenceSet)):
        raise TypeError(
            "references must be a torch.Tensor or a pfgm.ReferenceSet, got "
            f"{type(references).__name__}."
        )
    check_dense("x", x)
    if isinstance(references, Tensor):
        check_dense("references", references)
    if x.ndim == 0 or references.ndim == 0 or x.shape[1:] != references.shape[1:]:
        raise ValueError(
            "x and references must have shapes (B, *S) and (M, *S) with the same sample shape S, "
            f"got {tuple(x.shape)} and {tuple(references.shape)}."
            + layout_hint(x.shape[1:], references.shape[1:])
            + layout_hint(references.shape[1:], x.shape[1:]).replace("x.", "references.")
        )
    if x.dtype not in POINTS:
        raise TypeError(f"x must be one of {', '.join(map(str, POINTS))}, got {x.dtype}.")
    # A set in the memory of the CPU is copied to the device of x chunk by chunk.
    streams = isinstance(references, ReferenceSet) and references.device.type == "cpu"
    if x.device != references.device and not streams:
        raise ValueError(
            f"x and references must be on one device, got {x.device} and {references.device}."
        )


def _as_tensor(references: Any) -> tuple[Any, Callable[..., Tensor | None] | None]:
    """The references as one tensor, None if a set needs chunks, and the function of its sketch."""
    if type(references) is not ReferenceSet:
        return references, None
    return references.part.as_tensor(), references.part.sketch


def checked_dimensions(D: float, with_r: bool = False) -> float:
    if not is_number(D):
        raise TypeError(f"D must be a number, got {type(D).__name__}.")
    if not D > 0:
        raise ValueError(f"D must be a positive number or infinity, got {D}.")
    if D > LARGEST and with_r:
        raise ValueError(
            "sigma must be given in place of r when D is infinite, as r = sigma * sqrt(D) is "
            "infinite."
        )
    return as_float(D)


def _radius(x: Tensor, r: Tensor | float | None, sigma: Tensor | float | None, D: float) -> Tensor:
    """Augmented radius r = sigma · √D of each point; sigma itself at D = ∞."""
    if (r is None) == (sigma is None):
        count = "neither" if r is None else "both"
        raise ValueError(f"exactly one of r and sigma must be given, got {count}.")
    if r is not None:
        return per_query("r", r, x)
    assert sigma is not None
    return per_query("sigma", sigma, x) * unit_radius(D)


def _flat_mean(
    x: Tensor,
    references: References,
    radius: Tensor,
    D: float,
    backend: str | None,
    difference: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Points (B, N) in float32 or float64, their mean (B, N), log-sum-exp, nearest and total (B,).

    With ``difference``, x − mean is in place of the mean. Nearest and total have no gradient
    (:class:`~pfgm.core.problems.State`).
    """
    points = x.float() if x.dtype in HALF else x
    flat = flat_rows(points)
    if isinstance(references, ReferenceSet):
        part = references.part
        return flat, *over_set.compute(flat, radius, part, D, backend, difference)
    problem = PosteriorMean(flat, flat_rows(references), radius, D, difference=difference)
    if (results := eager.differentiated(problem, backend)) is None:
        if torch.compiler.is_compiling() and not in_torch_func():
            # as they are: see pfgm.ops.posterior_mean
            problem = PosteriorMean(points, references, radius, D, difference=difference)
        results = mean_operator.compute(problem, backend)
    return flat, *results


def _by_label(
    function: Callable[..., R],
    x: Tensor,
    references: References,
    labels: tuple[Tensor | None, Tensor | None],
    levels: dict[str, Tensor | float | None],
    options: dict[str, Any],
) -> R:
    """The results of a function of this module, where points see the references of their label.

    The labels are those of the points and of the references.
    """
    _check_tensors(x, references)
    given = {n: per_query(n, level, x) for n, level in levels.items() if level is not None}

    def target(x: Tensor, *rest: Any) -> R:
        *rows, seen = rest
        of_rows = {**levels, **dict(zip(given, rows, strict=True))}
        return function(x=x, references=seen, **of_rows, **options)

    return targets_by_label(target, (x, *given.values()), references, *labels)


@overload
def posterior_mean(
    x: Tensor,
    references: References,
    *,
    r: Tensor | float | None = ...,
    sigma: Tensor | float | None = ...,
    D: float = ...,
    return_logsumexp: Literal[False] = ...,
    labels: Tensor | None = ...,
    reference_labels: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def posterior_mean(
    x: Tensor,
    references: References,
    *,
    r: Tensor | float | None = ...,
    sigma: Tensor | float | None = ...,
    D: float = ...,
    return_logsumexp: Literal[True],
    labels: Tensor | None = ...,
    reference_labels: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def posterior_mean(
    x: Tensor,
    references: References,
    *,
    r: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    D: float = 1.0,
    return_logsumexp: bool = False,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The average of the references, weighted by the posterior probability of each given x.

    With N the number of values in a sample and s_j = ‖x − x_j‖² + r²,

        ℓ_j = −(N + D)/2 · log s_j                 D finite
        ℓ_j = −‖x − x_j‖² / (2 sigma²)             D = ∞
        lse = log Σ_j exp ℓ_j,   mean = Σ_j exp(ℓ_j − lse) x_j

    (PFGM++, arXiv 2302.04265, section 3; Stable Target Field, arXiv 2302.00670, equation 7).

    Memory is bounded: no (B, M, N) tensor is built. On the CPU the workspace is at most 64 MiB, or
    170 MiB if N is above 5000, or a few rows of x if N is in the millions; up to 48 MiB of it are
    kept for the next call. On a GPU it is at most 270 MiB, in the backward pass 480 MiB, or a few
    rows of x from about 100000 features on. Where a gradient is wanted, up to 40 MiB on the CPU and
    32 MiB on a GPU are kept for the backward pass. The CPU kernels leave out references whose total
    weight is below the rounding of the result.

    Labels are computed one after the other, each with a copy of its references, which are kept for
    the backward pass. A function with labels cannot be compiled with ``fullgraph=True``, and on a
    GPU waits for the labels.

    The function is differentiable once in x, r or sigma, and references, in backward and forward
    mode and under the transforms of torch.func. On a reference at r = 0, and at sigma = 0 with
    D = ∞, the result is the limit: the average of the nearest references.

    Args:
        x: (B, *S) points, float32 or float64. Points in half precision are computed in float32, and
            so is the result.
        references: (M, *S), M ≥ 1, in float32, float64, bfloat16, float16, or uint8, where a byte u
            means u/127.5 − 1. Or a :class:`pfgm.ReferenceSet`, which has no gradient and may be in
            a file, in CPU memory with points on a GPU, or in several processes.
        r: length of the augmented vector (z where D = 1), at least 0, in the units of x: a number,
            (B,), or (B, 1, …, 1).
        sigma: noise level, given instead of r: r = sigma · √D.
        D: number of augmented dimensions, any positive number; 1 is PFGM, infinity diffusion.
        return_logsumexp: return lse too.
        labels: (B,) integers. With labels, the mean at each point is over the references of its
            label, or over all where its label is below 0. Without them it is over all, also if
            references is a set that has labels.
        reference_labels: (M,) integers, needed with labels unless references is a set that has
            labels.
        backend: "native", "triton", "torch" or "reference"; None lets :mod:`pfgm.backends` choose.

    Returns:
        mean (B, *S), and with ``return_logsumexp`` also lse (B,) in float64.

    Raises:
        ValueError: shapes or devices differ; references is empty; both or neither of r and sigma
            are given; D ≤ 0; D = ∞ with r; one kind of labels is missing; no reference has the
            label of a point; references are divided among processes and labels are given. On the
            CPU also a value that is not finite; a negative r; r above 1e130 √max(D, 1), or above
            1e150; squared distances that overflow float64; points at distances and an r below about
            1e-146, of which the squares underflow float64; or, with x in float32, references that
            count for a point and hold values beyond float32.
        TypeError: a dtype is not allowed, or labels are no tensor.
        RuntimeError: the requested backend cannot run; a derivative is differentiated again; the
            rows of a ReferenceSet were changed in place between the forward and backward passes.

    >>> import torch
    >>> references = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> x = torch.tensor([[0.5, 2.0]])
    >>> posterior_mean(x, references, r=1.0)
    tensor([[0.5000, 0.0000]])
    >>> both = {"labels": torch.tensor([1]), "reference_labels": torch.tensor([0, 1])}
    >>> posterior_mean(x, references, r=1.0, **both)
    tensor([[1., 0.]])
    """
    if labels is not None or reference_labels is not None:
        both = labels, reference_labels
        others = {"D": D, "return_logsumexp": return_logsumexp, "backend": backend}
        return _by_label(posterior_mean, x, references, both, {"r": r, "sigma": sigma}, others)
    # First in one call, which answers None wherever it does not apply or an argument is wrong.
    if (
        (r is None) != (sigma is None)
        and type(D) in (float, int)
        and 0 < D <= (LARGEST if sigma is None else math.inf)
    ):
        level, factor = (r, 1.0) if sigma is None else (sigma, unit_radius(D))
        rows, sketch_of = _as_tensor(references)
        results = eager.one_call(
            eager.posterior_mean,
            backend,
            x,
            rows,
            level,
            factor=factor,
            D=as_float(D),
            with_logsumexp=return_logsumexp,
            sketch_of=sketch_of,
        )
        if results is not None:
            mean, logsumexp = results
            return mean if logsumexp is None else (mean, logsumexp)
    _check_tensors(x, references)
    D = checked_dimensions(D, r is not None)
    radius = _radius(x, r, sigma, D)
    _, mean, logsumexp, _, _ = _flat_mean(x, references, radius, D, backend)
    mean = mean.reshape(x.shape)
    return (mean, logsumexp) if return_logsumexp else mean


def field_fn(
    x: Tensor,
    z: Tensor | float,
    references: References,
    *,
    gamma: float = 5.0,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The normalised Poisson field of the references: PFGM's training target.

        E = (x − mean, z),   v = −√N · E / (‖E‖ + gamma)

    where mean is :func:`posterior_mean` at r = z, D = 1 (PFGM, arXiv 2209.11178, equations 5 and 6
    and Algorithm 1). v points toward the data, so field_z ≤ 0. v = 0 where E = 0. The function is
    differentiable once in x, z and references.

    x − mean is formed before it is rounded. The error is below 2e-5 of ‖v‖ wherever sums of
    differences x − x_j in float32 have no larger one, near references and far from the origin.

    Args:
        x: (B, *S) perturbed points, float32 or float64; half precision is computed in float32.
        z: augmented coordinate, at least 0, in the units of x: a number, (B,), or (B, 1, …, 1).
        references: (M, *S), M ≥ 1, as for :func:`posterior_mean`. In training, a large batch of
            data that contains the clean versions of x.
        gamma: softening of the normalisation, at least 0. The target of a flow has its gamma,
            ``flow.gamma``.
        labels, reference_labels: as for :func:`posterior_mean`. With the labels of the points, the
            target is the field of the references of each label, which a network with labels learns.
            Without them it is the field of all references, which does not depend on the label.
        backend: as for :func:`posterior_mean`.

    Returns:
        field_x (B, *S) and field_z (B,), in the dtype of x, or float32 if x has half precision.

    Raises:
        ValueError, TypeError: as for :func:`posterior_mean`; or gamma is negative or not finite. On
            the CPU also a difference x − mean beyond the range of the dtype of x.

    >>> import torch
    >>> field_x, field_z = field_fn(torch.tensor([[3.0, 3.0]]), 4.0, torch.zeros(1, 2))
    >>> field_x, field_z
    (tensor([[-0.3917, -0.3917]]), tensor([-0.5223]))
    >>> references, seen = torch.tensor([[0.0, 0.0], [6.0, 6.0]]), torch.tensor([0, 1])
    >>> x, labels = torch.tensor([[3.0, 3.0], [3.0, 3.0]]), torch.tensor([0, 1])
    >>> field_fn(x, 4.0, references, labels=labels, reference_labels=seen)[0]
    tensor([[-0.3917, -0.3917],
            [ 0.3917,  0.3917]])
    """
    if labels is not None or reference_labels is not None:
        both, others = (labels, reference_labels), {"gamma": gamma, "backend": backend}
        return _by_label(field_fn, x, references, both, {"z": z}, others)
    # First in one call, as in posterior_mean.
    if type(gamma) in (float, int) and 0 <= gamma <= LARGEST:
        rows, sketch_of = _as_tensor(references)
        field = eager.one_call(eager.field, backend, x, rows, z, gamma=gamma, sketch_of=sketch_of)
        if field is not None:
            return field
    _check_tensors(x, references)
    check_at_least_0("gamma", gamma)
    radius = per_query("z", z, x)
    _, difference, *_ = _flat_mean(x, references, radius, 1.0, backend, True)
    field_x, field_z = normalised_field.compute(difference, radius, gamma, backend)
    return field_x.reshape(x.shape), field_z


def mean_from(
    origin: Tensor,
    away: Tensor,
    x: Tensor,
    references: References,
    *,
    sigma: Tensor,
    D: float,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> Tensor:
    """mean − origin (B, *S), with the posterior mean at x = origin + away, all (B, *S).

    Where the origin is nearer to x than to 0 this is away − (x − mean), whose numbers are smaller
    and so are rounded less. Labels are as for :func:`posterior_mean`.
    """
    _check_tensors(x, references)

    target = partial(_mean_from, D)
    points = x, origin, away, _radius(x, None, sigma, D)
    return targets_by_label(target, points, references, labels, reference_labels)


def _mean_from(
    D: float, x: Tensor, origin: Tensor, away: Tensor, radius: Tensor, references: References
) -> Tensor:
    near = is_nearer(away, origin)

    def form(difference: bool, rows: Tensor | slice) -> Tensor:
        arguments = (references, radius[rows], D, None, difference)
        mean = _flat_mean(x[rows], *arguments)[1].view(origin[rows].shape)
        return away[rows] - mean if difference else mean - origin[rows]

    # Where rows cannot be told apart, or not without waiting for a GPU or for other processes.
    shared = isinstance(references, ReferenceSet) and references.sharded
    if shared or in_torch_func() or not checks_values(x.device):
        every = slice(None)
        return torch.where(over_samples(near, x), form(True, every), form(False, every))
    if bool(near.all()) or not bool(near.any()):
        return form(bool(near.all()), slice(None))
    result = torch.empty_like(origin)
    result[near], result[~near] = form(True, near), form(False, ~near)
    return result


def is_nearer(away: Tensor, origin: Tensor) -> Tensor:
    """Whether x = origin + away is nearer to its origin than that is to 0, (B,)."""
    norms = (torch.linalg.vector_norm(flat_rows(each), dim=1) for each in (away, origin))
    return torch.le(*norms)


def log_density(
    x: Tensor,
    references: References,
    *,
    r: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    D: float = 1.0,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-density of the references with noise of level r, the exact marginal of the flow.

        log p_r(x) = lse − log M + D log r + lgamma((N+D)/2) − (N/2) log π − lgamma(D/2)
        log p_σ(x) = lse − log M − (N/2) log(2π sigma²)                              D = ∞

    It is a mixture of M multivariate Student-t densities with D degrees of freedom, normal at D = ∞
    (PFGM++, arXiv 2302.04265, equation 4). Its gradient in x is the exact score. That in r or sigma
    has an error of about 1e-16 D/r or 1e-16 D/sigma, which matters from D = 1e12 on. At r = 0 it is
    +inf on a reference and −inf elsewhere.

    Args:
        x, references, r, sigma, D, backend: as :func:`posterior_mean`.
        labels, reference_labels: as for :func:`posterior_mean`. With them the density at a point is
            that of its label, and M the number of references of that label.

    Returns:
        (B,) in nats, float64.

    Raises:
        ValueError, TypeError: as :func:`posterior_mean`.

    >>> import torch
    >>> log_density(torch.zeros(1, 1), torch.zeros(1, 1), r=1.0)  # Cauchy: log(1/π)
    tensor([-1.1447], dtype=torch.float64)
    """
    if labels is not None or reference_labels is not None:
        both, others = (labels, reference_labels), {"D": D, "backend": backend}
        return _by_label(log_density, x, references, both, {"r": r, "sigma": sigma}, others)
    _check_tensors(x, references)
    D = checked_dimensions(D, r is not None)
    radius = _radius(x, r, sigma, D)
    flat, _, logsumexp, nearest, total = _flat_mean(x, references, radius, D, backend)
    N, M = flat.shape[1], references.shape[0]
    # At radius 0 the sum below would be inf − inf, and its gradient NaN.
    at_zero = radius == 0
    log_radius = torch.where(at_zero, 1.0, radius).log()
    if D > LARGEST:
        on_reference = ~logsumexp.isneginf()
        density = logsumexp - N * (log_radius + 0.5 * math.log(2 * math.pi))
    else:
        on_reference = logsumexp.isposinf()
        density = _student_density(logsumexp, nearest, total, log_radius, D, N)
    limit = torch.where(on_reference, math.inf, -math.inf).to(logsumexp.dtype)
    return torch.where(at_zero, limit, density - _log_count(M, logsumexp))


def _student_density(
    logsumexp: Tensor, nearest: Tensor, total: Tensor, log_radius: Tensor, D: float, N: int
) -> Tensor:
    """lse + D log r + lgamma((N+D)/2) − (N/2) log π − lgamma(D/2), for a finite D.

    The value is computed from nearest and total: at a large D, lse and D log r would cancel. They
    have the same gradient.
    """
    wide = nearest.log() - 2 * log_radius
    # log(1 + nearest/r²), where the quotient may overflow
    score = -(N + D) / 2 * torch.logaddexp(torch.zeros_like(wide), wide)
    value = total.log() + score - N * log_radius
    cancelling = logsumexp + D * log_radius
    with_gradient = value.detach() + (cancelling - cancelling.detach())
    return with_gradient + _log_gamma_ratio(N, D, logsumexp) - N / 2 * math.log(math.pi)


def _log_count(M: int, like: Tensor) -> float | Tensor:
    if is_symbolic(M):
        return (torch.ones((), dtype=like.dtype, device=like.device) * M).log()
    return math.log(M)


def _log_gamma_ratio(N: int, D: float, like: Tensor) -> float | Tensor:
    """lgamma((N + D)/2) − lgamma(D/2), accurate also for a large D, where the two would cancel."""
    a, half = D / 2, N / 2
    if is_symbolic(D):
        wide = torch.ones((), dtype=like.dtype, device=like.device) * a
        return torch.where(
            wide < 5e5, torch.lgamma(wide + half) - torch.lgamma(wide), _stirling_ratio(wide, half)
        )
    if D < 1e6:
        return math.lgamma(a + half) - math.lgamma(a)
    return _stirling_ratio(torch.tensor(a, dtype=torch.float64, device="cpu"), half).item()


def _stirling_ratio(a: Tensor, half: float) -> Tensor:
    """lgamma(a + half) − lgamma(a) for a large a."""
    # Stirling's series with its first correction; the next term is below 1/(360 a³).
    shifted = a + half
    correction = (1 / shifted - 1 / a) / 12
    return half * shifted.log() + (a - 0.5) * torch.log1p(half / a) - half + correction
