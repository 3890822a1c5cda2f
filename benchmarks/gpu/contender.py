"""The posterior mean by torch's own matrix products of float16 with sums in float32.

What the kernels of the library have to beat: three products in place of one keep the digits of
float32 (high·high + high·low + low·high), and the vendor's kernels compute them. Distances that may
be the smallest are computed again, from differences. All else is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.posterior_paths import Result
from benchmarks.common.subjects import Case

AGAIN = 16  # references of a query whose distances are computed again
_LARGEST = 2.0**8  # of the values that are split: their sums stay far below infinity


class Halves(NamedTuple):
    """Values ≈ (high + low) / scale in float16; the scale is a power of two."""

    high: Tensor
    low: Tensor
    scale: Tensor


def halves(values: Tensor, most: Tensor) -> Halves:
    """Splits values, of which none is larger than ``most``, to 22 bits."""
    scale = torch.exp2(torch.floor(torch.log2(_LARGEST / most.clamp(min=1e-30))))
    scaled = values * scale
    # Rounded to 11 bits as an integer: torch.compile takes scaled.half().float() for scaled.
    high = ((scaled.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return Halves(high.half(), (scaled - high).half(), scale)


def product(a: Halves, b: Halves) -> Tensor:
    """a · b, in the units of both scales."""
    return mm(a.high, b.high) + (mm(a.high, b.low) + mm(a.low, b.high))


def mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of two float16 matrices with sums in float32, which torch lacks on the CPU."""
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


class Split(NamedTuple):
    """Centred queries and references, what of them is multiplied, and their squared norms."""

    x: Halves
    y: Halves
    x_squared: Tensor
    y_squared: Tensor
    center: Tensor


def split(case: Case) -> Split:
    """Prepares the products. A query has its own scale, the references have one together."""
    center = case.references.mean(0)
    x, y = case.x - center, case.references - center
    x_halves = halves(x, x.abs().amax(1, keepdim=True))
    y_halves = halves(y, y.abs().amax())
    return Split(x_halves, y_halves, x.square().sum(1, keepdim=True), y.square().sum(1), center)


def distances(case: Case, parts: Split, products: Tensor) -> Tensor:
    """Squared distances (B, M), the smallest of them from differences."""
    inner = products / (parts.x.scale * parts.y.scale)
    squared = parts.x_squared + parts.y_squared - 2 * inner
    least = squared.topk(min(AGAIN, squared.shape[1]), 1, largest=False).indices
    exact = (case.x[:, None] - case.references[least]).square().sum(2)
    return squared.scatter(1, least, exact)


def weights(case: Case, parts: Split, products: Tensor) -> tuple[Halves, Tensor, Tensor]:
    """Weights relative to the nearest reference, their sum (B, 1), and the log-sum-exp (B,)."""
    squared = distances(case, parts, products)
    nearest = squared.amin(1, keepdim=True)
    power = (case.x.shape[1] + 1) / 2
    base = nearest + case.z[:, None].square()
    # Those beyond the first AGAIN may come out below the nearest by their rounding.
    weight = torch.exp(-power * torch.log1p((squared - nearest).clamp(min=0) / base))
    total = weight.sum(1, keepdim=True)
    logsumexp = total.double().log() - power * base.double().log()
    return halves(weight, weight.new_ones(())), total, logsumexp.squeeze(1)


def mean(parts: Split, weight_halves: Halves, total: Tensor, sums: Tensor) -> Tensor:
    """The mean from Σ w (y − center)."""
    return parts.center + sums / (total * weight_halves.scale * parts.y.scale)


def path(
    compiled: Callable[[Callable[[Any], Any]], Callable[[Any], Any]],
) -> Callable[[Case], Callable[[], Result]]:
    """The contender as a path of the benchmarks, whose parts ``compiled`` compiles."""
    splitting = compiled(split)
    weighing = compiled(lambda inputs: weights(*inputs))
    merging = compiled(lambda inputs: mean(*inputs))

    def prepare(case: Case) -> Callable[[], Result]:
        def run() -> Result:
            parts = splitting(case)
            y = parts.y
            products = product(parts.x, Halves(y.high.T, y.low.T, y.scale))
            weight_halves, total, logsumexp = weighing((case, parts, products))
            sums = product(weight_halves, y)
            return merging((parts, weight_halves, total, sums)), logsumexp

        return run

    return prepare
