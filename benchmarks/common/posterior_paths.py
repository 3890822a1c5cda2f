"""Ways to compute a posterior mean and its log-sum-exp: the library and what it competes with.

A path takes a case, prepares what a trainer would prepare once, and returns the call to time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import pfgm
from benchmarks.common.subjects import Case
from pfgm.backends.reference import normalised_field

GAMMA = 5.0  # of PFGM's field
Result = tuple[Tensor, Tensor]
"""Posterior mean (B, N), or its gradient in x, and log-sum-exp (B,)."""
Forward = Callable[[], Result]
Path = Callable[[Case], Forward]


def library(case: Case, backend: str) -> Forward:
    """The library on one of its backends."""

    def run() -> Result:
        mean, logsumexp = pfgm.posterior_mean(
            case.x,
            case.references,
            r=case.z,
            return_logsumexp=True,
            backend=backend,
        )
        return mean, logsumexp

    return run


def native(case: Case) -> Forward:
    """The library on the CPU."""
    return library(case, "native")


def on_one_thread(call: Forward) -> Forward:
    """The call with one thread."""

    def run() -> Result:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return run


def native_set(case: Case) -> Forward:
    """The library on the CPU over a set in memory that has made its sketch."""
    held = pfgm.ReferenceSet(case.references)

    def run() -> Result:
        return pfgm.posterior_mean(case.x, held, r=case.z, return_logsumexp=True, backend="native")

    for _ in range(2):
        run()
    return run


def native_bytes(case: Case) -> Forward:
    """The library on the CPU with references as uint8, a quarter of the memory."""
    return native(case._replace(references=to_bytes(case.references)))


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images as float64 in [-1, 1], with exactly the values that the library reads."""
    return images.double() / 127.5 - 1


def torch_path(case: Case) -> Forward:
    """GEMM, softmax, GEMM: the fastest way in plain torch, and the baseline."""
    return lambda: _gemm_softmax_gemm(*case)


def compiled(case: Case) -> Forward:
    """The torch path under torch.compile."""
    function = torch.compile(_gemm_softmax_gemm, dynamic=False)
    return lambda: function(*case)


def _gemm_softmax_gemm(x: Tensor, z: Tensor, y: Tensor) -> Result:
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    scores = -(x.shape[1] + 1) / 2 * torch.log(squared + z[:, None] ** 2)
    return scores.softmax(1) @ y, scores.logsumexp(1)


def published(case: Case) -> Forward:
    """The formula as published, with all differences (B, M, N + 1) in memory at once."""

    def run() -> Result:
        x, z, y = case
        points = torch.cat([x, z[:, None]], 1)
        charges = torch.cat([y, y.new_zeros(len(y), 1)], 1)
        differences = charges - points[:, None]
        distances = differences.norm(dim=2)
        nearest = distances.amin(1, keepdim=True)
        ratios = (nearest / distances) ** points.shape[1]
        total = ratios.sum(1, keepdim=True)
        direction = ((ratios / total)[..., None] * differences).sum(1)
        logsumexp = (total.log() - points.shape[1] * nearest.log()).squeeze(1)
        return x + direction[:, :-1], logsumexp

    return run


def random_direction(case: Case) -> Tensor:
    """A fixed random G (B, N)."""
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))


def with_backward(path: Path, direction: Callable[[Case], Tensor] = random_direction) -> Path:
    """The path, followed by the gradient of mean · G in x, where G is the direction."""

    def prepare(case: Case) -> Forward:
        leaf = case._replace(x=case.x.clone().requires_grad_())
        forward, G = path(leaf), direction(case)

        def run() -> Result:
            mean, logsumexp = forward()
            (gradient,) = torch.autograd.grad(mean, leaf.x, G)
            return gradient, logsumexp.detach()

        return run

    return prepare


ONE_THREAD = ", 1 thread"
"""Ends the name of a path that runs on one thread."""
PATHS: dict[str, Path] = {
    "native": native,
    "native, uint8": native_bytes,
    "native, in a set": native_set,
    "torch path": torch_path,
    "torch path, compiled": compiled,
    "published formula": published,
}


# ---- errors -----------------------------------------------------------------------------------


def exact_result(case: Case) -> Result:
    """The result in float64, from exact differences."""
    return library(Case(*(t.double() for t in case)), "reference")()


def exact_gradient(case: Case, direction: Callable[[Case], Tensor] = random_direction) -> Tensor:
    """The gradient that :func:`with_backward` computes, in float64."""
    exact = Case(*(t.double() for t in case))
    G = direction(case).double()
    return with_backward(lambda leaf: library(leaf, "reference"), lambda _: G)(exact)()[0]


def errors(case: Case, result: Result, exact: Result) -> dict[str, float]:
    """Errors of the worst row, as the accuracy contract counts them.

    The error of the mean is relative to the largest norm of a reference, that of PFGM's field to
    √N, that of the log-sum-exp to its size.
    """
    x, z, y = (t.double() for t in case)
    mean, logsumexp = (t.detach().double() for t in result)
    exact_mean, exact_logsumexp = exact
    field, exact_field = (_field(x, z, m) for m in (mean, exact_mean))
    size = exact_logsumexp.abs().clamp(min=1)
    return {
        "mean": float((mean - exact_mean).norm(dim=1).max() / y.norm(dim=1).max()),
        "field": float((field - exact_field).norm(dim=1).max() / math.sqrt(x.shape[1])),
        "logsumexp": float(((logsumexp - exact_logsumexp).abs() / size).max()),
    }


def _field(x: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    field_x, field_z = normalised_field(x - mean, z, GAMMA)
    return torch.cat([field_x, field_z[:, None]], 1)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact tensor."""
    return float((result - exact).norm() / exact.norm())
