"""The work of the kernels on real data: pairs to refine, tiles and references with weight.

The kernels' own rules are applied to the benchmarks' data, perturbed as in training with seed 0.
Distances are computed in float64; those of the kernels differ by less than the rules allow. If
there are many queries, only evenly spaced ones are counted, and represent the others.

Terms: a pair is *refined* if its distance is recomputed in float64. A weight is *live* if it is not
    set to zero. A tile or a reference is live if it has a live weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import subjects
from benchmarks.common.subjects import Case
from benchmarks.machine_code.devices import DEVICES, Device

# Constants of the kernels.
PARTS, ROWS, REFERENCES = 3 << 22, 4096, 1 << 16  # the largest chunk and block
TRITON_PAIRS, CUDA_PAIRS = 1 << 22, 1 << 24  # of a chunk, at most
TILE, NEAR, CUTOFF = 64, 20.0, 16.0
OTHERS = 2.0  # smaller by log M and so many nats, all weights together need no more digits
GRADIENT_CUTOFF = 8.0  # the weights of gradients are cut off so much later
SUM_TILE = 32
SORTED = 256
BOUND = 2.0**-18
NOISE, TOLERANCE = 2.0**-22, 1.5e-4  # of a panel of centred products
ADDED_NOISE = 3 * 2.0**-27  # if one float adds up several panels
# The same where products are those of values rounded to float16.
ROUNDED_NEAR, ROUNDED_TOLERANCE = 10.0, 2e-2
SAMPLES = 16  # references whose mean is the centre
PIECE = 1024  # a block of ``weigh`` has so many references, or a multiple of it
WEIGHED_TOGETHER = 4  # words of 32 references of a turn of a warp of the CUDA ``weigh``
SEGMENT = 2  # the fewest tiles that a program of ``refine`` searches
LISTED_TOGETHER = 4  # tiles of a turn of a warp of the CUDA ``find_limits``
SUM_ROWS, SUM_FEATURES = 32, 128  # of a block of the CUDA ``weighted_sum``
LARGE_ROWS, LARGE_FROM = 64, 256  # of one with a large group; queries from which on it is
# Where lists are shared out: features of a block; queries of a group, and of all of them at least.
SLICE, SHARED_ROWS = 256, ((128, 512), (64, LARGE_FROM))
MOST_GROUPS, SHARE_PANELS = 32, 256  # of a block of queries; of a share, at most
OF_LIST = 6  # panels that take as long as what a list takes once, in the work that is shared out
# Panels of 32 references that it sums.
FEWEST_PANELS, MANY_PANELS, MOST_PANELS, PART_PANELS = 4, 16, 24, 64
FEW_PARTS = 8  # that fit into memory, so that they have as many panels as they can
GATHERED_PANELS = 192  # whose weights a block of the CUDA ``list_references`` gathers, at most
LISTING, LISTING_THREADS = 8, 512  # threads of it for a query of a group; at most
TRANSFER = 8  # numbers of 4 bytes in a transfer from the L2 cache


def up(n: float, by: float) -> int:
    """n/by, rounded up."""
    return int(-(-n // by))


class Sums(NamedTuple):
    """How the CUDA ``weighted_sum`` splits a chunk."""

    rows: int
    """Queries of a group."""
    panels: int
    """Panels of 32 listed references of a part, or of a share at least."""
    shares: int = 0
    """Blocks that share out all lists, with asynchronous products; 0 if warps find the sums."""

    @property
    def features(self) -> int:
        """Features of a block."""
        return SLICE if self.shares else SUM_FEATURES

    @property
    def name(self) -> str:
        """The key of what is counted for it."""
        if self.shares:
            return f"groups of {self.rows}, {self.shares} shares of at least {self.panels}"
        return f"groups of {self.rows}, parts of {self.panels}"


class Shape(NamedTuple):
    """A problem with B queries, M references and N features, and how the kernels split it."""

    name: str
    B: int
    M: int
    N: int
    type: str = "float32"
    """Type of the references, as in the names of CUDA kernels. ``Rounded`` is float32 in precision
    "medium"."""
    backward: bool = False
    """Whether it is that of the backward pass."""
    references: int = 0
    """Of a chunk, as a card has them (work.py). 0: as the Triton kernels do."""
    added: bool = False
    """Whether one float adds up several panels on the card, as in tiles of warpgroups and of tensor
    memory."""

    @property
    def key(self) -> str:
        """The key of the counts for all cards with the same chunks and errors."""
        return f"{self.chunk}, added" if self.added else str(self.chunk)

    @property
    def block(self) -> int:
        """The number of queries in the largest block."""
        fitting = min(ROWS, max(SUM_ROWS, PARTS // 3 // self.N))
        part = up(self.B, up(self.B, fitting))
        return min(part if fitting < 128 else 32 * up(part, 32), self.B, fitting)

    @property
    def chunk(self) -> int:
        """The number of references in a chunk."""
        return self.references or min(self.M, self.most_references(TRITON_PAIRS))

    def most_references(self, pairs: int) -> int:
        """The most references of a chunk, if it has at most so many pairs."""
        fitting = 128 * max(pairs // self.block // 128, 1)
        return min(fitting, REFERENCES, 32 * PART_PANELS * self.most_parts)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.M // self.chunk)

    @property
    def keeps(self) -> bool:
        """Whether the CUDA forward pass can keep its distances for the backward pass."""
        return self.block == self.B and self.most_references(CUDA_PAIRS // 4) >= self.M

    @property
    def halves(self) -> bool:
        """Whether the sums of the CUDA forward pass multiply float16 parts."""
        return not self.few and self.M <= 1 << 20

    @property
    def few(self) -> bool:
        """Whether the CUDA kernels find distances from differences."""
        return self.block < 16 or self.N < 32

    def blocks(self) -> list[int]:
        """Queries of each block."""
        return _parts(self.B, self.block)

    def chunk_sizes(self) -> list[int]:
        """References of each chunk."""
        return _parts(self.M, self.chunk)

    def sums(self, card: Device) -> Sums:
        """How the CUDA ``weighted_sum`` splits a chunk on a card."""
        forward = self.halves and not self.backward
        return (self._shares(card) if forward else None) or self.sums_of_warps(card)

    def sums_of_warps(self, card: Device) -> Sums:
        """The same where warps find the sums."""
        rounded = self.type == "Rounded"
        of_warpgroups = card.architecture == 90 and self.is_asynchronous(card)
        faster = (rounded and not card.geforce) or of_warpgroups
        may = faster and self.halves and not self.backward and self.block >= LARGE_FROM
        enough = self._even_panels(card.sms, LARGE_ROWS) >= FEWEST_PANELS
        rows = LARGE_ROWS if may and enough else SUM_ROWS
        return Sums(rows, self.part_panels(card.sms, rows))

    def is_asynchronous(self, card: Device) -> bool:
        """Whether products of large tiles, and of sums of many queries, are asynchronous."""
        return card.architecture in (90, 100) and self.type in ("float32", "Rounded")

    def _shares(self, card: Device) -> Sums | None:
        """How blocks share out the lists, if products are asynchronous."""
        panels, slices = up(self.chunk, 32), up(self.N, SLICE)
        if not self.is_asynchronous(card) or self.N < SLICE:
            return None
        for rows, fewest in SHARED_ROWS:
            if self.block < fewest:
                continue
            groups = up(self.block, rows)
            lists = groups * slices
            blocks = card.sms * up(lists * (OF_LIST + panels), SHARE_PANELS * card.sms)
            parts = min(blocks // slices + 2, self.most_parts)
            enough = lists * panels >= FEWEST_PANELS**2 * card.sms
            if not enough or groups > MOST_GROUPS or parts < 2:
                continue
            least = max(FEWEST_PANELS, up(panels - 1, parts - 1))
            if least <= SHARE_PANELS:
                return Sums(rows, least, blocks)
        return None

    def piece(self, card: Device) -> int:
        """References of a block of the CUDA ``weigh``, ``pull`` and ``find_coefficients``."""
        least = up(self.chunk, PIECE)
        return PIECE * min(max(1, self.block * least // (4 * card.sms)), least)

    def part_panels(self, multiprocessors: int, rows: int = SUM_ROWS) -> int:
        """Panels of 32 references that a block of the CUDA ``weighted_sum`` sums, with groups of
        so many queries."""
        even = min(max(self._even_panels(multiprocessors, rows), FEWEST_PANELS), MANY_PANELS)
        even = max(even, min(self._even_panels(multiprocessors, rows, 6), MOST_PANELS))
        panels = up(self.chunk, 32)
        if MANY_PANELS < even < MOST_PANELS:  # no limit decides: the parts are equal
            even = up(panels, max(1, panels // even))
        if self.most_parts <= FEW_PARTS:
            return up(panels, up(panels, PART_PANELS))
        return max(even, up(panels, self.most_parts))

    def _even_panels(self, multiprocessors: int, rows: int, blocks: int = 4) -> int:
        """Panels of a part that give each multiprocessor so many blocks."""
        tiles = up(self.N, SUM_FEATURES) * up(self.block, rows)
        return up(up(self.chunk, 32) * tiles, blocks * multiprocessors)

    @property
    def most_parts(self) -> int:
        """Parts of the weighted sums of a chunk that fit into memory."""
        return max(1, PARTS // (self.block * self.N))


def _parts(n: int, size: int) -> list[int]:
    whole, rest = divmod(n, size)
    return [size] * whole + [rest] * (rest > 0)


C = Shape("C: photographs", 128, 4096, 3072)
F = Shape("F: Fashion-MNIST", 256, 60000, 784)
G = Shape("G: digits", 128, 1437, 64)
BIG = Shape("big: photographs", 4096, 50000, 3072)
SHAPES = (C, F, G, BIG)
VARIANTS = (
    C._replace(name="C, references in bytes", type="uint8"),
    C._replace(name="C, 1 query", B=1),
    C._replace(name="C, 16 queries", B=16),
)
SEED = 0  # of common/subjects.py, for the choice of crops and for the perturbation
COUNTED_QUERIES = 1024
"""The most queries of a shape that are counted."""


def case_of(shape: Shape) -> Case:
    """The data of a shape, with at most COUNTED_QUERIES queries."""
    if shape.name == F.name:
        return subjects.fashion_shape(shape.B, shape.M)
    if shape.name == G.name:
        return subjects.digits_shape(shape.B, shape.M)
    return subjects.cifar_shape(min(shape.B, COUNTED_QUERIES), shape.M)


def rounded(case: Case) -> Case:
    """Queries and references relative to the centre, with the 11 bits that float16 holds."""
    y = case.references
    center = y[torch.arange(SAMPLES) * len(y) // SAMPLES].mean(0)

    def round_(values: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(values - center)
        return torch.ldexp((2048 * mantissa).round() / 2048, exponent)

    return case._replace(x=round_(case.x), references=round_(y))


def squared_distances(case: Case) -> Tensor:
    """Squared distances (B, M) in float64."""
    x, y = case.x.double(), case.references
    found = torch.empty(len(x), len(y), dtype=torch.float64)
    of_x = x.square().sum(1)[:, None]
    for start in range(0, len(y), 4096):
        part = y[start : start + 4096].double()
        found[:, start : start + 4096] = of_x + part.square().sum(1) - 2 * x @ part.T
    return found.clamp_(min=0)


# ---- the kernels' rules -----------------------------------------------------------------------


class Rule(NamedTuple):
    """The rules for PFGM, D = 1. Here ``base`` is the least squared distance of each query (B,)."""

    N: int
    M: int
    few: bool = False
    """Whether distances are found from differences, in CUDA."""
    type: str = "float32"
    gradient: bool = False
    """Whether a gradient is found with the distances."""
    added: bool = False
    """Whether one float adds up several panels."""

    @classmethod
    def of(cls, shape: Shape) -> Rule:
        return cls(shape.N, shape.M, shape.few, shape.type, shape.backward, shape.added)

    @property
    def rounded(self) -> bool:
        """Whether distances are those of values rounded to float16."""
        return self.type == "Rounded" and not self.few

    @property
    def tolerance(self) -> float:
        """Relative error of a weight that needs no refinement."""
        return ROUNDED_TOLERANCE if self.rounded else TOLERANCE

    @property
    def exponent(self) -> float:
        """Exponent of the weights, on squared distances."""
        return (self.N + 1) / 2

    @property
    def near(self) -> float:
        """How many nats below the largest weight pairs are refined, at most."""
        return ROUNDED_NEAR if self.rounded else NEAR

    def spread(self, base: Tensor, r: Tensor, nats: Tensor | float) -> Tensor:
        """How much larger than the least a squared distance is whose weight is so many nats
        smaller (B,)."""
        return torch.expm1(torch.as_tensor(nats) / self.exponent) * (base + r * r)

    def largest_refined(
        self, base: Tensor, norm: Tensor, r: Tensor, nats: Tensor | float
    ) -> Tensor:
        """The largest squared distance that is refined, if those of so many nats are (B,)."""
        if self.rounded:
            bound = 8 * self.noise(base, norm, r, 2 * (base + norm))
        else:
            bound = 2 * (BOUND / 8 if self.few else BOUND) * (3 * norm + 2 * base)
        return base + bound + self.spread(base, r, nats)

    def nats(self, times: Tensor, random: Tensor) -> Tensor:
        """How many nats below the largest weight pairs are refined, if errors are so many times
        what is allowed: those that may have a bias, and those that average out (B,)."""
        if self.gradient:
            return torch.full_like(times, self.near)
        nats = torch.maximum(times.log() + math.log(self.M) + OTHERS, 2 * (random.log() + OTHERS))
        return nats.clamp(0, self.near)

    def of_added(self, norm: Tensor, farthest: Tensor) -> Tensor:
        """The part of the error that averages out: of adding up panels in one float (B,)."""
        if not self.added or self.few:
            return torch.zeros_like(norm)
        return ADDED_NOISE * (2 * (norm * farthest).sqrt() + farthest)

    def noise(self, base: Tensor, norm: Tensor, r: Tensor, farthest: Tensor) -> Tensor:
        """The rest of the typical error of a distance (B,).

        Args:
            farthest: the largest squared norm of a reference that may be refined.
        """
        if self.few:
            of_bytes = NOISE if self.type == "uint8" else 0.0
            return of_bytes * (norm + base) + 2.0**-26 * base
        root = math.sqrt(max(1.0, self.N / 32))  # of the number of panels
        noise = 2.0**-23 + 2.0**-25 * root if self.rounded else NOISE / root
        of_sums = noise * (2 * (norm * farthest).sqrt() + farthest)
        if not self.rounded:
            return of_sums
        edge = (base + self.spread(base, r, self.near)).sqrt()
        of_rounding = 2.0**-11 / math.sqrt(self.N) * edge * (norm.sqrt() + farthest.sqrt())
        return of_sums + of_rounding + 2.0**-24 * (norm + farthest)

    def weights(self, d: Tensor, nearest: Tensor, r: Tensor) -> Tensor:
        """Weights relative to that of the nearest reference (B, M)."""
        excess = (d - nearest[:, None]).clamp(min=0)
        s = (nearest + r * r)[:, None]
        return torch.exp(-self.exponent * torch.log1p(excess / s))

    @property
    def floor(self) -> float:
        """Relative weight below which weights become zero."""
        return math.exp(-CUTOFF) / self.M


class Refined(NamedTuple):
    """Work of ``refine`` on one chunk of references, for all queries."""

    pairs: Tensor
    """Which pairs are refined (B, m)."""
    visited: Tensor
    """Which tiles are searched for them (B, tiles)."""


class Chunk(NamedTuple):
    """Work on one chunk of references, for all queries."""

    refined: Refined
    live: Tensor
    """Which weights are not zero (B, m)."""


class Centered(NamedTuple):
    """Squared norms of queries (B,) and references (M,) from the centre of the kernels."""

    queries: Tensor
    references: Tensor


def centered(case: Case, few: bool = False) -> Centered:
    """Relative to the mean of evenly spaced references; ``few``: not centred."""
    y = case.references
    if few:
        return Centered(case.x.double().square().sum(1), y.double().square().sum(1))
    center = y[torch.arange(SAMPLES) * len(y) // SAMPLES].double().mean(0)
    norms = [(part.double() - center).square().sum(1) for part in y.split(4096)]
    return Centered((case.x.double() - center).square().sum(1), torch.cat(norms))


def refined_of_chunk(
    rule: Rule, part: Tensor, base: Tensor, norm: Tensor, r: Tensor, of_y: Tensor
) -> Refined:
    """What is refined: pairs whose error changes the result."""
    lowest = _tiles(part, TILE, math.inf).amin(2)
    reach = _tiles(of_y[None], TILE, 0.0).amax(2)
    near = rule.largest_refined(base, norm, r, rule.near)
    within = (base + r * r) / rule.exponent
    close = (lowest <= (base + within)[:, None]).sum(1)
    farthest = torch.where(lowest <= near[:, None], reach, 0.0).amax(1)
    biased, random = rule.noise(base, norm, r, farthest), rule.of_added(norm, farthest)
    error = biased + random
    score = rule.exponent * (base + r * r).log().abs()
    averaged, of_score = (close / math.e).clamp(min=1).sqrt(), score.clamp(min=1) / 16
    one = rule.tolerance * within
    allowed = of_score.clamp(max=1) * one
    most = torch.minimum(averaged, of_score) * one
    nats = rule.nats(torch.where(biased > most, biased / allowed, 0.0), random / allowed)
    near = rule.largest_refined(base, norm, r, nats)
    near[error <= most] = -1
    return Refined(part <= near[:, None], lowest <= near[:, None])


def chunks_of(case: Case, shape: Shape, d: Tensor) -> Iterator[Chunk]:
    """The work on each chunk, given the squared distances (B, M)."""
    rule = Rule.of(shape)
    r = case.z.double()
    center = centered(case, shape.few)
    nearest = torch.full_like(r, math.inf)
    total = torch.zeros_like(r)
    for start in range(0, shape.M, shape.chunk):
        part = d[:, start : start + shape.chunk]
        of_y = center.references[start : start + shape.chunk]
        base = torch.minimum(nearest, part.amin(1))
        refined = refined_of_chunk(rule, part, base, center.queries, r, of_y)
        total = total * rule.weights(nearest[:, None], base, r)[:, 0].nan_to_num(0)
        w = rule.weights(part, base, r)
        live = w >= rule.floor * total.clamp(min=1)[:, None]
        total, nearest = total + w.sum(1), base
        yield Chunk(refined, live)


def _tiles(values: Tensor, size: int, fill: float) -> Tensor:
    """Columns in tiles (B, tiles, size), the last one padded."""
    missing = -values.shape[1] % size
    padded = torch.nn.functional.pad(values, (0, missing), value=fill)
    return padded.view(len(values), -1, size)


# ---- counts -----------------------------------------------------------------------------------


def live_tiles(live: Tensor, rows: int, ordered: bool) -> tuple[float, float]:
    """Share of live tiles of ``rows`` queries × SUM_TILE references: mean and largest over queries.

    Args:
        ordered: whether queries are sorted by their number of live references.
    """
    by_query = _tiles(live.float(), SUM_TILE, 0.0).amax(2)
    shares = _by_rows(by_query, live, rows, ordered).mean(1)
    return float(shares.mean()), float(shares.max())


def listed(live: Tensor, rows: int, ordered: bool) -> tuple[float, float]:
    """Share of references live for any of ``rows`` queries: mean and largest over queries."""
    shares = _by_rows(live.float(), live, rows, ordered).mean(1)
    return float(shares.mean()), float(shares.max())


def _by_rows(values: Tensor, live: Tensor, rows: int, ordered: bool) -> Tensor:
    if ordered:
        values = values[live.sum(1).argsort(stable=True)]
    missing = -len(values) % rows
    padded = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return padded.view(-1, rows, values.shape[1]).amax(1)


def listed_references(live: Tensor, order: Tensor | None, rows: int = SUM_ROWS) -> Tensor:
    """How many references the CUDA ``weighted_sum`` lists for each group of ``rows`` queries.

    Args:
        live: those of a block of queries.
        order: of the queries; None leaves them as they are.
    """
    return _listed(live, order, rows).sum(1)


def transfers(live: Tensor, order: Tensor | None, rows: int = SUM_ROWS) -> Tensor:
    """Transfers that hold the weights of these references for one query."""
    return _tiles(_listed(live, order, rows), TRANSFER, 0.0).amax(2).sum(1)


def _listed(live: Tensor, order: Tensor | None, rows: int) -> Tensor:
    """Whether references are listed, 1 or 0 (groups, m)."""
    queries = live if order is None else live[order]
    return _by_rows(queries.float(), queries, rows, ordered=False)


class Mean:
    """The weighted mean of figures by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weight = 0.0

    def add(self, weight: float, figures: dict[str, float]) -> None:
        self.weight += weight
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value

    def result(self) -> dict[str, float]:
        return {name: total / self.weight for name, total in self.sums.items()}


def list_threads(rows: int) -> int:
    """Threads of a block of the CUDA ``list_references``, for groups of so many queries."""
    return min(LISTING * rows, LISTING_THREADS)


def has_uneven_shares(queries: int, rows: int) -> bool:
    """Whether groups have shares of its blocks in proportion to their lists."""
    return rows < queries <= list_threads(rows)


def list_blocks(queries: int, m: int, rows: int, multiprocessors: int) -> int:
    """Blocks of the CUDA ``list_references``."""
    groups, panels = up(queries, rows), up(m, 32)
    uneven = has_uneven_shares(queries, rows)
    each = 1 if uneven else math.isqrt(up(24 * groups, multiprocessors) - 1) + 1
    least = groups * (1 + up(panels, GATHERED_PANELS))
    found = max(min(each * multiprocessors, groups * panels), least)
    return found if uneven else found - found % groups


def list_shares(live: Tensor, order: Tensor | None, rows: int, blocks: int) -> Tensor:
    """Blocks of the CUDA ``list_references`` that each group has, given the weights of a chunk that
    are not zero."""
    queries = live if order is None else live[order]
    groups = up(len(live), rows)
    if not has_uneven_shares(len(live), rows):
        return torch.full((groups,), blocks // groups)
    most = torch.stack([each.sum() for each in queries.split(rows)]).clamp(max=live.shape[1])
    panels = ((most + 31) // 32).clamp(min=1).cumsum(0)
    ends = torch.arange(1, groups + 1) + (blocks - groups) * panels // panels[-1]
    return ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))


class Lists:
    """What the blocks of queries list, in parts of the sizes that these cards have."""

    def __init__(self, shape: Shape, cards: Sequence[Device]) -> None:
        self.block, self.slices = shape.block, up(shape.N, SLICE)
        self.multiprocessors = {card.sms for card in cards}
        self.parts = {shape.sums(card): Mean() for card in cards}
        self.orders: list[Tensor | None] = []
        """Of the queries of each block, from the first chunk."""

    def add(self, live: Tensor) -> None:
        """Adds a chunk, given which weights of it are not zero (B, m)."""
        blocks = live.split(self.block)
        self.orders = self.orders or [order_of(each) for each in blocks]
        for each, order in zip(blocks, self.orders, strict=True):
            for rows in {sums.rows for sums in self.parts}:
                listed = listed_references(each, order, rows)
                of_weights = {"transfers": float(transfers(each, order, rows).double().mean())}
                for sms in self.multiprocessors:
                    blocks = list_blocks(len(each), each.shape[1], rows, sms)
                    gathered = (listed / 32).ceil() / list_shares(each, order, rows, blocks)
                    of_weights[f"gathered on {sms}, most"] = float(gathered.ceil().max())
                for sums, mean in self.parts.items():
                    if sums.rows == rows:
                        number, found = (
                            shares_of(listed, sums, self.slices)
                            if sums.shares
                            else parts_of(listed, sums.panels)
                        )
                        mean.add(number, found | of_weights)

    def result(self) -> dict[str, dict[str, float]]:
        return {sums.name: mean.result() for sums, mean in sorted(self.parts.items())}


def order_of(live: Tensor) -> Tensor | None:
    """The order of a block's queries in the weighted sums: by their number of live references."""
    return live.sum(1).argsort(stable=True) if len(live) > SUM_ROWS else None


def sums_of(live: Tensor) -> dict[str, float]:
    """Figures that decide how long a weighted sum takes."""
    found: dict[str, float] = {"live": float(live.float().mean())}
    for ordered in (False, True):
        how = "sorted" if ordered else "unsorted"
        for rows in (16, 32, 64):
            mean, most = live_tiles(live, rows, ordered)
            found[f"tiles of {rows}, {how}"] = mean
            found[f"tiles of {rows}, {how}, most"] = most
        mean, most = listed(live, 32, ordered)
        found[f"listed of 32, {how}"] = mean
        found[f"listed of 32, {how}, most"] = most
    return found


def parts_of(listed: Tensor, panels: int) -> tuple[int, dict[str, float]]:
    """The number of lists, and figures of their parts of at most ``panels`` panels."""
    number, found = panels_of(listed)
    parts = (listed / (32 * panels)).ceil()
    found["panels, most"] = min(panels, found["panels, most"])
    return number, found | {
        "parts": float(parts.double().mean()),
        "parts, most": float(parts.max()),
    }


def shares_of(listed: Tensor, sums: Sums, slices: int) -> tuple[int, dict[str, float]]:
    """The number of lists, and figures of the shares of their work and of their parts.

    The lists of all slices of the features follow each other.
    """
    number, found = panels_of(listed)
    panels = (listed / 32).ceil().long().repeat_interleave(slices)
    work = torch.where(panels > 0, OF_LIST + panels, 0)
    total = int(work.sum())
    each = max(up(total, sums.shares), sums.panels)
    ends = work.cumsum(0)
    own = torch.zeros(sums.shares)  # panels of the blocks
    segments, parts, left_out = torch.zeros_like(own), torch.zeros_like(panels), 0
    for i, (count, end) in enumerate(zip(panels.tolist(), ends.tolist(), strict=True)):
        if count == 0:
            continue
        first = (end - count) // each
        left_out += first - (end - count - OF_LIST) // each  # shares that end before the panels
        for block in range(first, up(end, each)):
            segments[block] += 1
            parts[i] += 1
            own[block] += min(end, (block + 1) * each) - max(end - count, block * each)
    longest = int((own + OF_LIST * segments).argmax())
    return number, found | {
        "panels, most": float(own[longest]),
        "parts": float(parts.double().mean()),
        "parts, most": float(parts.max()),
        "segments": float(segments.sum()),
        "segments, most": float(segments[longest]),
        "segments left out": float(left_out),
    }


def panels_of(listed: Tensor) -> tuple[int, dict[str, float]]:
    """The number of lists, and figures of their panels of 32."""
    panels = (listed / 32).ceil()
    return listed.numel(), {
        "listed": float(listed.double().mean()),
        "panels": float(panels.double().mean()),
        "panels, most": float(panels.max()),
    }


def segment_of(tiles: int) -> int:
    """Tiles that one program of ``refine`` searches."""
    return max(SEGMENT, -(-tiles // 256))


def limit_warps(tiles: int) -> int:
    """Warps of a block of the CUDA ``find_limits``."""
    return 8 if tiles > 32 else 4


def listing_turns(visited: Tensor) -> Tensor:
    """Turns in which the warps of the CUDA ``find_limits`` list the pairs of each query (B,)."""
    warps = limit_warps(visited.shape[1])
    groups = _tiles(visited.float(), 32 * warps, 0.0)  # tiles in which each warp has 32
    by_warp = groups.view(len(visited), -1, 32, warps).sum(2)
    return (by_warp / LISTED_TOGETHER).ceil().sum((1, 2))


def listing_stores(refined: Tensor) -> Tensor:
    """How often the CUDA ``find_limits`` stores pairs of each query (B,).

    A lane has two references of a tile that follow each other. A warp stores the first ones of all
    its lanes at once, and then the second ones, if there are any.
    """
    tiles = _tiles(refined.float(), TILE, 0.0)
    return tiles.view(len(tiles), -1, TILE // 2, 2).amax(2).sum((1, 2))


def work_of(refined: Refined) -> dict[str, float]:
    """Pairs and tiles of ``refine``, for all queries. "most" is the work of the busiest program."""
    segment = segment_of(refined.visited.shape[1])
    pairs = _tiles(refined.pairs.float(), TILE, 0.0)
    by_program = {
        "pairs": _tiles(pairs.sum(2), segment, 0.0).sum(2),
        "tiles": _tiles(refined.visited.float(), segment, 0.0).sum(2),
    }
    found = {name: float(values.sum()) for name, values in by_program.items()}
    found |= {f"{name}, most": float(v.max()) for name, v in by_program.items()}
    found["stores"] = float(listing_stores(refined.pairs).sum())
    turns = listing_turns(refined.visited)
    found["turns"] = float(turns.sum())
    found["turns, most"] = float(turns.max())
    return found


def work_of_weights(live: Tensor, pieces: Collection[int]) -> dict[str, float]:
    """Words of 32 references that the CUDA ``weigh`` does not leave out, and the turns in which its
    warps take them, for all queries, in pieces of these sizes.

    It leaves out tiles without a live weight. The words of a piece belong to 8 warps in turn.
    """
    tiles = _tiles(live.float(), TILE, 0.0).amax(2)
    words = tiles.repeat_interleave(TILE // 32, 1)[:, : up(live.shape[1], 32)]
    found = {"words": float(words.sum())}
    for piece in pieces:
        of_blocks = _tiles(words, piece // 32, 0.0).flatten(0, 1)
        of_warps = _tiles(of_blocks, 8 * 32, 0.0).unflatten(2, (32, 8)).sum(2)
        turns = (of_warps / WEIGHED_TOGETHER).ceil().sum((1, 2))
        found[f"turns in pieces of {piece}"] = float(turns.sum())
        found[f"turns in pieces of {piece}, most"] = float(turns.max())
    return found


def per_query(refined: Tensor) -> dict[str, float]:
    """Statistics over the queries, given the refined pairs of each."""
    counts = refined.double()
    return {
        "mean": float(counts.mean()),
        "median": float(counts.median()),
        "most": float(counts.max()),
        "share of queries with none": float((counts == 0).double().mean()),
    }


class Totals:
    """The work of a kernel on all chunks. "most" is the mean over chunks."""

    def __init__(self, chunks: int, times: float) -> None:
        self.chunks, self.times = chunks, times
        self.sums: dict[str, float] = {}

    def add(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            share = 1 / self.chunks if "most" in name else self.times
            self.sums[name] = self.sums.get(name, 0.0) + share * value


@functools.lru_cache(1)
def _measured(shape: Shape, prepare: Callable[[Shape], Case]) -> tuple[Case, Tensor]:
    """The data of a shape and their squared distances (B, M), the same for all chunks."""
    case = prepare(shape)
    return case, squared_distances(rounded(case) if Rule.of(shape).rounded else case)


def count(
    shape: Shape,
    prepare: Callable[[Shape], Case] = case_of,
    cards: Sequence[Device] = DEVICES,
) -> dict[str, Any]:
    """All counts of one shape, in totals over its queries.

    "most" is the work of the busiest program of a launch. Each chunk is a launch; the mean over
    them is taken.

    Args:
        cards: those whose parts of weighted sums are counted.
    """
    case, d = _measured(shape._replace(references=0), prepare)
    counted = len(case.x)
    times = shape.B / counted
    sums, lists = Mean(), Lists(shape, cards)
    totals, weights = Totals(shape.chunks, times), Totals(shape.chunks, times)
    pieces = {shape.piece(card) for card in cards}
    refined = torch.zeros(counted)
    for chunk in chunks_of(case, shape, d):
        sums.add(chunk.live.shape[1], sums_of(chunk.live))
        lists.add(chunk.live)
        refined += chunk.refined.pairs.sum(1)
        totals.add(work_of(chunk.refined))
        weights.add(work_of_weights(chunk.live, pieces))
    return {
        "B, M, N": (shape.B, shape.M, shape.N),
        "seed": SEED,
        "queries looked at": counted,
        "blocks": shape.blocks(),
        "chunks": shape.chunks,
        "refined a query": per_query(refined),
        "refine": totals.sums,
        "weigh": weights.sums,
        "sums": sums.result(),
        "lists": lists.result(),
    }


# ---- gradients ---------------------------------------------------------------------------------


def gradient_chunks(case: Case, shape: Shape, d: Tensor) -> Iterator[Chunk]:
    """The work of a backward pass in CUDA on each chunk, given the squared distances (B, M)."""
    rule, r, center = Rule.of(shape), case.z.double(), centered(case, shape.few)
    base = d.amin(1)
    w = rule.weights(d, base, r)
    floor = rule.floor * math.exp(-GRADIENT_CUTOFF) * w.sum(1, keepdim=True)
    for start in range(0, shape.M, shape.chunk):
        part = slice(start, start + shape.chunk)
        of_y = center.references[part]
        refined = refined_of_chunk(rule, d[:, part], base, center.queries, r, of_y)
        yield Chunk(refined, w[:, part] >= floor)


def count_gradient(
    shape: Shape,
    prepare: Callable[[Shape], Case] = case_of,
    cards: Sequence[Device] = DEVICES,
) -> dict[str, Any]:
    """What :func:`count` counts for the forward pass, as far as the CUDA kernels need it."""
    case, d = _measured(shape._replace(references=0, backward=False), prepare)
    shape = shape._replace(backward=True)
    totals, queries = Totals(shape.chunks, shape.B / len(case.x)), Mean()
    lists = Lists(shape, cards)
    for chunk in gradient_chunks(case, shape, d):
        totals.add(work_of(chunk.refined))
        lists.add(chunk.live)
        for live in chunk.live.split(shape.block):
            queries.add(*panels_of(listed_queries(live)))
    return {
        "refine": totals.sums,
        "lists": lists.result(),
        "queries": queries.result(),
    }


def listed_queries(live: Tensor) -> Tensor:
    """Queries that each block of ``reference_gradient`` lists (groups of references, lists)."""
    by_group = _tiles(live.float(), SUM_ROWS, 0.0).amax(2).T
    return _tiles(by_group, 32 * PART_PANELS, 0.0).sum(2)
