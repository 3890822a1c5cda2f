"""The backend ``torch``: the operations by matrix products of torch, on any device.

References and points are taken relative to an origin among the references, so that little cancels
in ‖x‖² + ‖y‖² − 2 x·y. The products have float64, or exact parts of float32 where the device is
slow at float64 or has none. References that may be nearest get exact differences, so that ties and
limits are those of :mod:`pfgm.backends.reference`. On the CPU these are all within the rounding of
the nearest. Elsewhere nothing waits for the device: a fixed number are computed again, and others
within the rounding count as equally near.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.tensors import dequantise, wide_dtype
from ..core.arithmetic import Arithmetic, Chunk, Near
from ..core.problems import Needs, PosteriorMean, State, Upstream
from . import chunked
from .reference import (
    normalised_field,
    normalised_field_backward,
    ode_step,
    sketch,
    supports,
)

__all__ = [
    "describe",
    "normalised_field",
    "normalised_field_backward",
    "ode_step",
    "posterior_mean",
    "posterior_mean_backward",
    "sketch",
    "supports",
]

_SAMPLES = 9  # references whose median is the origin: four of them may be anywhere
_PANEL = 1024  # features for which products of whole numbers up to 2^7 add up to 2^24 at most
_HIGH = 2.0**7
_ROWS = 512  # references in a sum of float32
_SMALLEST = torch.finfo(torch.float32).tiny  # a scale that can be divided by
# Rounding of products by high and low parts, over squared norms: 2^-32, times 8.
_HIGH_LOW_ROUND = 2.0**-29
# GPUs that compute float64 at half the rate of float32 or better.
_NVIDIA = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
_AMD = ("gfx906", "gfx908", "gfx90a", "gfx94", "gfx95")


def describe() -> str:
    return f"matrix products in torch {torch.__version__}, chunked"


@functools.cache
def _has_fast_float64(device: torch.device) -> bool:
    if device.type != "cuda":
        return device.type == "cpu"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(_AMD)
    return torch.cuda.get_device_capability(device) in _NVIDIA


def _rounds_float32(device: torch.device) -> bool:
    """Whether torch may round float32 to fewer bits in a product, as its user has allowed."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # an older torch
        return torch.get_float32_matmul_precision() != "highest"
    return precision not in ("none", "ieee")


class _Products(Arithmetic):
    """Products in float64; averages of float32 points on the CPU in float32."""

    # Pairs and values in a chunk: what stays in the caches of a processor, what keeps a GPU busy.
    most, most_on_device = (1 << 18, 1 << 21), (1 << 21, 1 << 24)

    def __init__(self, problem: PosteriorMean) -> None:
        super().__init__(problem)
        x = problem.x
        self.max_pairs, self.max_values = self.most if self.waits else self.most_on_device
        self.narrow = self.waits and x.dtype == torch.float32 and not _rounds_float32(x.device)
        self._room = self.x.new_empty(0, x.shape[1])

    def _origin(self, references: Tensor) -> Tensor:
        some = references[:: max(len(references) // _SAMPLES, 1)][:_SAMPLES]
        return dequantise(some, self.x.dtype).T.sort(1).values[:, len(some) // 2]

    def chunk(self, references: Tensor) -> Chunk:
        # In memory that is used for each chunk again: new memory takes longer.
        if len(self._room) < len(references):
            self._room = self.x.new_empty(references.shape)
        placed = self._room[: len(references)].copy_(references)
        if references.dtype == torch.uint8:
            placed.div_(127.5).sub_(1)
        return Chunk(references, placed.sub_(self.origin))

    def squared(self, chunk: Chunk) -> Tensor:
        norms = torch.linalg.vector_norm(chunk.placed, dim=1).square()
        return torch.addmm(norms, self.placed, chunk.placed.T, alpha=-2).add_(self.norms)

    def distances(self, chunk: Chunk, known: Tensor) -> tuple[Tensor, Tensor, Near]:
        if self.waits:
            return super().distances(chunk, known)
        squared = self.squared(chunk)
        return self._some_exact(squared - squared.amin(1, keepdim=True), chunk)

    def _some_exact(self, excess: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Near]:
        """As :meth:`distances`, from rounded excesses (B, m) over the least squared distance."""
        near = self.nearest_of_all(excess)
        first, exact = [], []
        for _, _, difference in self.differences(chunk, near, self.x):
            squares = difference.square_()
            first.append(squares[:, 0].sum(1, keepdim=True))
            # Sums of differences: without float64 those of squares would lose digits.
            exact.append((squares - squares[:, :1]).sum(2))
        relative = torch.cat(exact)
        least = relative.amin(1, keepdim=True)
        nearest = torch.cat(first) + least
        tied = excess <= 8 * self.rounding * (self.norms + nearest)
        excess = torch.where(tied, 0.0, excess).scatter(1, near.j, relative - least)
        return nearest, excess, near

    def average(self, weights: Tensor, chunk: Chunk) -> Tensor:
        if self.narrow:
            y = chunk.references
            if y.dtype != torch.float32:
                y = dequantise(y, weights.dtype).float()
            sums = _sum_by_panels(weights, y)
            if bool(sums.isfinite().all()):  # else beyond float32
                return sums
        return super().average(weights, chunk)


def _sum_by_panels(weights: Tensor, y: Tensor) -> Tensor:
    """weights (B, m) times y (m, N) in the dtype of the weights, from sums over panels in float32.

    The rounding error of a sum in float32 grows with the number of its terms.
    """
    whole, narrow = len(y) // _ROWS * _ROWS, weights.float()
    panels = narrow[:, :whole].unflatten(1, (-1, _ROWS)).transpose(0, 1)
    sums = torch.bmm(panels, y[:whole].unflatten(0, (-1, _ROWS)))
    return sums.sum(0, dtype=weights.dtype).add_(narrow[:, whole:] @ y[whole:])


class _HighLow(_Products):
    """Products of float32 by high and low parts, with errors 2^8 times smaller than in float32."""

    def __init__(self, problem: PosteriorMean) -> None:
        super().__init__(problem)
        self.rounding = _HIGH_LOW_ROUND

    def distances(self, chunk: Chunk, known: Tensor) -> tuple[Tensor, Tensor, Near]:
        y = chunk.placed
        terms, scale = _terms(self.placed, y)
        if y.dtype == torch.float64:
            squared = y.square().sum(1) - 2 * scale * terms.sum(0, dtype=y.dtype)
            return self._some_exact(squared - squared.amin(1, keepdim=True), chunk)
        # float32 has too few digits for a sum, but enough for its difference from another one.
        terms = terms * (-2 * scale)
        terms[:-1] += _panels(y).square().sum(2)[:, None]
        base = terms.sum(0).argmin(1)[None, :, None].expand(len(terms), -1, 1)
        return self._some_exact((terms - terms.gather(2, base)).sum(0), chunk)

    def average(self, weights: Tensor, chunk: Chunk) -> Tensor:
        y = dequantise(chunk.references, weights.dtype)
        scale = _power_of_two(y.abs().amax())
        return _sum_by_panels(weights, (y / scale).float()) * scale

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        terms, scale = _terms(a, b.T)
        return terms.sum(0, dtype=a.dtype) * scale


def _terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Terms (P, R, C) in float32 and their scale (R, C): a (R, K) times b (C, K) transposed.

    All but the last are sums over panels of K that have no rounding.
    """
    (a_high, a_low, a_scale), (b_high, b_low, b_scale) = _high_low(a), _high_low(b)
    exact = torch.bmm(_panels(a_high), _panels(b_high).mT)
    rest = torch.cat([a_high, a_low], 1) @ torch.cat([b_low, b_high + b_low], 1).T
    return torch.cat([exact, rest[None]]), a_scale * b_scale.T


def _high_low(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R, K) as whole numbers of 8 bits and the rest, both in float32, and a scale (R, 1)."""
    scale = _power_of_two(rows.abs().amax(1, keepdim=True)) / _HIGH
    values = rows / scale
    high = values.round()
    return high.float(), (values - high).float(), scale


def _power_of_two(values: Tensor) -> Tensor:
    """Powers of two that are not smaller. A division by them does not round."""
    return values.clamp(min=_SMALLEST).log2().ceil().exp2()


def _panels(rows: Tensor) -> Tensor:
    """Rows (R, K) as panels (P, R, k), with zeros at the end."""
    R, K = rows.shape
    count = -(-K // _PANEL)
    k = -(-K // count)
    return F.pad(rows, (0, count * k - K)).view(R, count, k).transpose(0, 1)


def _arithmetic(problem: PosteriorMean) -> Arithmetic:
    x = problem.x
    in_float64 = wide_dtype(x.device) == torch.float64 and (
        x.dtype == torch.float64 or _has_fast_float64(x.device) or _rounds_float32(x.device)
    )
    return _Products(problem) if in_float64 else _HighLow(problem)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keeps autocast from rounding float32 in products."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def posterior_mean(problem: PosteriorMean) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _without_autocast(problem.x.device):
        return chunked.posterior_mean(problem, _arithmetic(problem))


def posterior_mean_backward(
    problem: PosteriorMean, state: State, upstream: Upstream, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with _without_autocast(problem.x.device):
        by = _arithmetic(problem)
        return chunked.posterior_mean_backward(problem, state, upstream, needs, by)
