"""Ways to compute a posterior mean and its log-sum-exp: the library and what it competes with.

Each takes a case and prepares what a trainer would prepare once, and returns the call to be timed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

import pfgm
from benchmarks.common.subjects import Case
from pfgm.backends.reference import normalised_field

Result = tuple[Tensor, Tensor]
Forward = Callable[[], Result]


def native(case: Case) -> Forward:
    return lambda: _native(case, case.references)


def native_one_thread(case: Case) -> Forward:
    def run() -> Result:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _native(case, case.references)
        finally:
            torch.set_num_threads(threads)

    return run


def native_bytes(case: Case) -> Forward:
    """The same images as uint8, a quarter of the memory."""
    references = to_bytes(case.references)
    return lambda: _native(case, references)


def to_bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)


def _native(case: Case, references: Tensor) -> Result:
    mean, logsumexp = pfgm.posterior_mean(
        case.x, references, r=case.z, return_logsumexp=True, backend="native"
    )
    return mean, logsumexp


def torch_path(case: Case) -> Forward:
    """GEMM, softmax, GEMM: the fastest way in plain torch."""
    return lambda: _gemm_softmax_gemm(*case)


def compiled(case: Case) -> Forward:
    function = torch.compile(_gemm_softmax_gemm, dynamic=False)
    return lambda: function(*case)


def _gemm_softmax_gemm(x: Tensor, z: Tensor, y: Tensor) -> Result:
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    scores = -(x.shape[1] + 1) / 2 * torch.log(squared + z[:, None] ** 2)
    return scores.softmax(1) @ y, scores.logsumexp(1)


def published(case: Case) -> Forward:
    """PFGM's formula as written: every difference in N + 1 dimensions at once, (B, M, N + 1)."""

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


def keops(case: Case) -> Forward:
    """KeOps: the formula compiled into one loop over pairs."""
    from pykeops.torch import LazyTensor

    x, z, y = (t.contiguous() for t in case)

    def run() -> Result:
        points, charges = LazyTensor(x[:, None]), LazyTensor(y[None])
        squared = ((points - charges) ** 2).sum(-1) + LazyTensor((z**2)[:, None, None])
        scores = squared.log() * (-(x.shape[1] + 1) / 2)
        mean = scores.sumsoftmaxweight(charges, dim=1)
        return mean, scores.logsumexp(dim=1).squeeze(1)

    return run


def with_backward(path: Callable[[Case], Forward]) -> Callable[[Case], Forward]:
    """The path followed by the gradient of mean · G in x."""

    def prepare(case: Case) -> Forward:
        leaf = case._replace(x=case.x.clone().requires_grad_())
        forward = path(leaf)
        G = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))

        def run() -> Result:
            mean, logsumexp = forward()
            (gradient,) = torch.autograd.grad(mean, leaf.x, G)
            return gradient, logsumexp.detach()

        return run

    return prepare


PATHS: dict[str, Callable[[Case], Forward]] = {
    "native": native,
    "native, 1 thread": native_one_thread,
    "native, uint8": native_bytes,
    "torch path": torch_path,
    "torch path, compiled": compiled,
    "published formula": published,
}
if importlib.util.find_spec("pykeops") is not None:
    PATHS["KeOps"] = keops


def errors(case: Case, result: Result, truth: Result) -> dict[str, float]:
    """Worst row against float64, as the accuracy contract counts: the mean relative to the largest
    norm of a reference, PFGM's field to √N, the log-sum-exp to its size."""
    x, z, y = (t.double() for t in case)
    mean, logsumexp = (t.detach().double() for t in result)
    fields = [_field(x, z, m) for m in (mean, truth[0])]
    return {
        "mean": float((mean - truth[0]).norm(dim=1).max() / y.norm(dim=1).max()),
        "field": float((fields[0] - fields[1]).norm(dim=1).max() / math.sqrt(x.shape[1])),
        "logsumexp": float(((logsumexp - truth[1]).abs() / truth[1].abs().clamp(min=1)).max()),
    }


def _field(x: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    field_x, field_z = normalised_field(x, z, mean, 5.0)
    return torch.cat([field_x, field_z[:, None]], 1)


def truth(case: Case) -> Result:
    """In float64, from exact differences."""
    mean, logsumexp = pfgm.posterior_mean(
        case.x.double(),
        case.references.double(),
        r=case.z.double(),
        return_logsumexp=True,
        backend="reference",
    )
    return mean, logsumexp


def true_gradient(case: Case) -> Tensor:
    """Of mean · G in x, with the G of with_backward."""
    x = case.x.double().requires_grad_()
    G = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))
    mean = pfgm.posterior_mean(x, case.references.double(), r=case.z.double(), backend="reference")
    assert isinstance(mean, Tensor)
    (gradient,) = torch.autograd.grad(mean, x, G.double())
    return gradient
