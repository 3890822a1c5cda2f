"""The work of the CUDA kernels: their launches, blocks and loops, and what a block does in them.

:func:`counts` needs no machine code. Predicted times rest on it (launches.py), and
tests/gpu/cuda/test_counts.py holds it against what the host shim counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from benchmarks.machine_code import data as constants
from benchmarks.machine_code.data import (
    GATHERED_PANELS,
    LISTED_TOGETHER,
    PART_PANELS,
    PIECE,
    SHARE_PANELS,
    SUM_FEATURES,
    SUM_ROWS,
    TILE,
    TRANSFER,
    WEIGHED_TOGETHER,
    Shape,
    has_uneven_shares,
    limit_warps,
    list_blocks,
    list_threads,
    up,
)
from benchmarks.machine_code.devices import Device

Data = Mapping[str, Any]
FINISH_WARPS, FINISH_QUERIES = 4, 4  # of a block of ``finish_distances``; of a warp
KEPT = 0.7  # share of the L2 cache that keeps a chunk's references until the weighted sum

_SIZES = {
    "float32": 4,
    "Rounded": 4,
    "BFloat16": 2,
    "Float16": 2,
    "uint8": 1,
}  # bytes of a reference's value
_PANEL = 32  # features, or references, that are added up together
_STAGED = 64  # features that a trip of ``distances`` takes
_CENTER = 256  # features of a block of ``find_center``
HELD = 8  # pairs of features in the registers of a thread of ``split_rows``
_RANKED = 16  # queries of a block of ``order_queries``, 16 threads each
_OVER_WARP = 5  # shuffles that combine the values of a warp
_OF_PLACES = _OVER_WARP + 2  # with which a warp finds the places of what its threads list
_OF_WEIGHTS = 32 * 4 + 4  # bytes of 32 weights, and of a bit for each


class Amount(NamedTuple):
    """What a block does, its warps together."""

    halves: float = 0
    """Matrix instructions for float16 values (16 × 8 × 16)."""
    tf32: float = 0
    """Matrix instructions for TF32 values (16 × 8 × 8)."""
    of_warpgroups: float = 0
    """Matrix instructions of warpgroups for float16 values (64 × 64 × 16), one for each warp."""
    in_tensor_memory: float = 0
    """Matrix instructions of tensor memory for float16 values (128 × 128 × 16 or 128 × 64 × 16)."""
    copied: float = 0
    """Bytes that asynchronous copies read."""
    barriers: float = 0
    exchanges: float = 0
    """Shuffles, votes and reductions of warps. A shuffle of 64 bits counts once."""

    def times(self, n: float) -> Amount:
        return Amount(*(n * each for each in self))

    def plus(self, other: Amount) -> Amount:
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))


# ``pull`` and ``find_coefficients``: two sums in two floats over a block.
_TWO_SUMS = Amount(barriers=2, exchanges=8 * 2 * 2 * _OVER_WARP)


class Loop(NamedTuple):
    """How often blocks run a loop."""

    trips: float
    """Of all blocks together."""
    most: float
    """Trips of the block that makes most."""
    trip: Amount = Amount()
    """What a block does in a trip, the mean over all trips."""
    stored: float | None = None
    """Bytes that stores to global memory, copies not included, write in a trip. None: those of the
    code, if all lanes run it."""
    spread: float = 1
    """Bytes that its loads from global memory transfer, over those that all lanes ask for if they
    run it."""


class Work(NamedTuple):
    """The work of one launch, or of several equal ones."""

    name: str
    kernel: str
    """With its template arguments."""
    blocks: int
    threads: int
    shared: int
    """Bytes of dynamic shared memory."""
    once: Amount
    """What each block does outside of loops."""
    loops: dict[str, Loop]
    moved: float
    """Bytes that it must read from memory and write to it."""
    times: int = 1
    stored: float | None = None
    """As in :class:`Loop`, of a block outside of loops, the mean over the blocks."""

    @property
    def total(self) -> Amount:
        """What all blocks do in one launch."""
        found = self.once.times(self.blocks)
        for loop in self.loops.values():
            found = found.plus(loop.trip.times(loop.trips))
        return found

    @property
    def longest(self) -> Amount:
        """What the block does that makes most trips."""
        found = self.once
        for loop in self.loops.values():
            found = found.plus(loop.trip.times(loop.most))
        return found


def counts(shape: Shape, data: Data, card: Device) -> Iterator[Work]:
    """The launches of a forward pass with aligned rows.

    Args:
        data: what :func:`benchmarks.machine_code.data.count` returns for the shape.
    """
    shape = on_card(shape, card)
    if not shape.few:
        yield _center(shape)
    for queries, blocks in by_size(shape.blocks()):
        if not shape.few:
            yield _split(shape, queries)._replace(times=blocks)
        for m, chunks in by_size(shape.chunk_sizes()):
            for work in _of_chunks(shape, data, queries, m, chunks, card):
                yield work._replace(times=blocks * work.times)


def on_card(shape: Shape, card: Device) -> Shape:
    """The shape with the chunks and the errors that a card has."""
    asynchronous = shape.is_asynchronous(card)
    added = asynchronous and shape.type == "float32" and not shape.few
    return shape._replace(references=_chunk(shape, card), added=added)


def of_chunks(data: Data, shape: Shape, card: Device) -> Data:
    """Those of these counts that are for the chunks of a card."""
    found: Data = data[on_card(shape, card).key]
    return found


def by_size(sizes: list[int]) -> list[tuple[int, int]]:
    """The different sizes, and how many have each."""
    return [(size, sizes.count(size)) for size in sorted(set(sizes), reverse=True)]


def _of_chunks(
    shape: Shape, data: Data, queries: int, m: int, chunks: int, card: Device
) -> Iterator[Work]:
    """The launches for a block of queries and so many chunks of m references."""
    for work in _distances(shape, queries, m, card):
        yield work._replace(times=chunks)
    yield _limits(shape, data, queries, m)._replace(times=chunks)
    yield _refine(shape, data, queries, m, card)._replace(times=chunks)
    yield _weigh(shape, data, queries, m, card)._replace(times=chunks)
    pieces = up(m, shape.piece(card))
    yield from _ordered_lists(shape, data, queries, m, pieces, chunks, card)
    yield _sum(shape, data, queries, m, card)._replace(times=chunks)
    yield _merge(shape, data, queries, m, card)._replace(times=chunks)


def _by_all(blocks: int, trips: float, block: Amount | None = None) -> Loop:
    """A loop that all blocks run equally often. ``block`` is what each does in all its trips."""
    each = (block or Amount()).times(1 / trips) if trips else Amount()
    return Loop(blocks * trips, trips, each)


# ---- centring ----------------------------------------------------------------------------------


def _center(shape: Shape) -> Work:
    blocks = up(_STAGED * up(shape.N, _STAGED), _CENTER)
    once = Amount(barriers=4, exchanges=2 * 8 * _OVER_WARP)
    moved = _SIZES[shape.type] * 16 * shape.N
    name = f"find_center<{_stored(shape)}>"
    return Work("find_center", name, blocks, 256, 32, once, {}, moved)


def _split(shape: Shape, queries: int, centered: bool = True) -> Work:
    width, threads = _STAGED * up(shape.N, _STAGED), 256
    held = 2 * min(shape.N // 2, HELD * threads)  # features
    each = _by_all(queries, (width - held) / threads)
    loops = {"norms": each, "parts": each, "rest": Loop(0, 0)}
    once = Amount(barriers=1, exchanges=8 * 2)
    if centered:  # the largest value of all, and a sum in two floats
        once = once.plus(Amount(barriers=1, exchanges=8 * (1 + 2 * _OVER_WARP)))
        shares = up(width, threads)
        loops["scaled"] = Loop(shares, up(shares, queries))
    name, moved = f"split_rows<{_text(centered)}>", 8 * queries * shape.N
    stored = 4 * held + 8 * (1 + centered)
    return Work("split_rows", name, queries, threads, 96, once, loops, moved, stored=stored)


def _text(value: bool) -> str:
    return str(value).lower()


# ---- distances ---------------------------------------------------------------------------------


class TileCost(NamedTuple):
    """A tile of ``distances``, by whose cost the kernels choose."""

    queries: int
    references: int
    clocks: int
    """Of a panel of features."""


class TilingCosts(NamedTuple):
    """The costs of all tiles, and of ``finish_distances``."""

    tiles: tuple[TileCost, ...]
    finish: int
    """Clocks without the sums over slices."""


def _costs(
    of_32: int, of_64: int, of_64_128: int, of_128: int, finish: int, *larger: TileCost
) -> TilingCosts:
    tiles = (
        TileCost(32, 64, of_32),
        TileCost(64, 64, of_64),
        TileCost(64, 128, of_64_128),
        TileCost(128, 128, of_128),
    )
    return TilingCosts(tiles + larger, finish)


COSTS = _costs(500, 800, 1200, 2200, 4500)
WARPGROUP_COSTS = _costs(500, 800, 1200, 1300, 4500, TileCost(128, 192, 1680))
TENSOR_MEMORY_COSTS = _costs(500, 800, 1200, 1250, 4500)
GEFORCE_COSTS = _costs(830, 1450, 2480, 4650, 25000)
ROUNDED_COSTS = _costs(430, 600, 1300, 1550, 4500)
ROUNDED_GEFORCE_COSTS = _costs(430, 600, 1300, 1550, 25000)
ROUNDED_WARPGROUP_COSTS = _costs(430, 600, 1300, 980, 4500, TileCost(256, 128, 1300))
ROUNDED_TENSOR_MEMORY_COSTS = _costs(430, 600, 1300, 950, 4500)
_ONCE_PANELS, _MOST_SLICES, _SLICE_PANELS = 6, 8, 8
_ADDED_PANELS = 14  # whose products one float adds up, of warpgroups and in tensor memory
_CHUNK_CLOCKS = 40000  # of what a chunk takes beside its work
_BYTES_PER_CLOCK = 25


class Tiling(NamedTuple):
    """How ``distances`` splits a block of queries and a chunk of references."""

    queries: int
    references: int
    slices: int
    """Of the features; 1 if each block takes all."""
    clocks: int
    """Predicted."""


def _slice_size(queries: int, m: int, rounded: bool) -> int:
    """Numbers that the sums over a slice take in float32."""
    return ((1 if rounded else 2) * queries + 2) * _PANEL * up(m, _PANEL)


def tiling_of(shape: Shape, queries: int, m: int, card: Device) -> Tiling:
    """The tiles of ``distances`` and the slices of the features that cost least."""
    block, chunk, panels = shape.block, shape.chunk, up(shape.N, _PANEL)
    costs, rounded = _costs_on(shape, card), shape.type == "Rounded"
    whole = _cheapest(block, chunk, panels, card, costs, constants.PARTS, rounded)
    of_sums = up(up(chunk, _PANEL), shape.sums_of_warps(card).panels) * block * shape.N
    of_slices = whole.slices * _slice_size(block, chunk, rounded) if whole.slices > 1 else 0
    return _cheapest(queries, m, panels, card, costs, max(of_sums, of_slices), rounded)


def _costs_on(shape: Shape, card: Device) -> TilingCosts:
    rounded = shape.type == "Rounded"
    if _warpgroups(shape, card):
        return ROUNDED_WARPGROUP_COSTS if rounded else WARPGROUP_COSTS
    if _tensor_memory(shape, card):
        return ROUNDED_TENSOR_MEMORY_COSTS if rounded else TENSOR_MEMORY_COSTS
    if card.geforce:
        return ROUNDED_GEFORCE_COSTS if rounded else GEFORCE_COSTS
    return ROUNDED_COSTS if rounded else COSTS


def _cheapest(
    queries: int, m: int, panels: int, card: Device, costs: TilingCosts, room: int, rounded: bool
) -> Tiling:
    size = _slice_size(queries, m, rounded)
    most = max(1, min(_MOST_SLICES, panels // _SLICE_PANELS, room // size))

    def tiling(cost: TileCost, slices: int) -> Tiling:
        tiles = up(queries, cost.queries) * up(m, cost.references)
        clocks = up(tiles * slices, card.sms) * (up(panels, slices) + _ONCE_PANELS) * cost.clocks
        if slices > 1:
            clocks += costs.finish + 8 * slices * size // (_BYTES_PER_CLOCK * card.sms)
        return Tiling(cost.queries, cost.references, slices, clocks)

    every = (tiling(cost, slices) for cost in costs.tiles for slices in range(1, most + 1))
    return min(every, key=lambda one: one.clocks)


def _pairs_of_chunk(card: Device, backward: bool) -> int:
    """Pairs of a chunk. In the forward pass on GeForce cards, as many as the L2 cache holds, if
    these are enough."""
    most, held = constants.CUDA_PAIRS, int(card.l2_size.value) * 7 // 10 // 12
    by_cache = card.geforce and not backward and held >= most // 4
    return min(held, most) if by_cache else most


def _chunk(shape: Shape, card: Device) -> int:
    """References of a chunk, such that each of them takes the fewest predicted clocks."""
    most = shape.most_references(_pairs_of_chunk(card, shape.backward))
    costs = _costs_on(shape, card)
    if most >= shape.M or shape.few:
        return min(shape.M, most)
    panels, rounded = up(shape.N, _PANEL), shape.type == "Rounded"

    def clocks_of_a_reference(m: int) -> Fraction:
        tiling = _cheapest(shape.block, m, panels, card, costs, 0, rounded)
        return Fraction(tiling.clocks + _CHUNK_CLOCKS, m)

    sizes = [most]
    for cost in costs.tiles:
        beside = up(shape.block, cost.queries)  # tiles with the same references
        rounds = most * beside // (2 * cost.references * card.sms) + 1
        while (chunk := rounds * card.sms // beside * cost.references) <= most:
            sizes += [chunk] * (chunk > 0)
            rounds += 1
    return min(sizes, key=clocks_of_a_reference)


def _stored(shape: Shape) -> str:
    """The type by which kernels read references that they do not multiply in float16."""
    return "float32" if shape.type == "Rounded" else shape.type


def _distances(
    shape: Shape, queries: int, m: int, card: Device, project: bool = False
) -> Iterator[Work]:
    if shape.few:
        yield _differences(shape, queries, m, project)
        return
    tiling = tiling_of(shape, queries, m, card)
    if tiling.slices == 1:
        yield _products(shape, queries, m, tiling, card, project)
        return
    work = _products(shape, queries, m, tiling, card, False)
    yield work
    slices = work.blocks // _tiles(queries, m, tiling)
    yield _finished(shape, queries, m, slices, card, project)


def _tiles(queries: int, m: int, tiling: Tiling) -> int:
    return up(m, tiling.references) * up(queries, tiling.queries)


def _products(
    shape: Shape, queries: int, m: int, tiling: Tiling, card: Device, project: bool
) -> Work:
    rows, references, slices, _ = tiling
    if rows >= 128 and _warpgroups(shape, card):
        return _warpgroup_products(shape, queries, m, tiling, project)
    if rows >= 128 and _tensor_memory(shape, card):
        return _tensor_memory_products(shape, queries, m, tiling, project)
    sliced, rounded = slices > 1, shape.type == "Rounded"
    parts_of_x, products = (1, 1) if rounded else (2, 3)
    ahead = rows == 128  # whether the block converts references one panel ahead
    size, panels = _SIZES[shape.type], up(shape.N, _PANEL)
    of_stage = 1 if ahead else 2  # panels
    trips, features = up(panels, of_stage), of_stage * _PANEL
    each = up(trips, slices)  # trips of a slice
    tiles, slices = _tiles(queries, m, tiling), up(trips, each)
    stages = (4, 2) if ahead else (3, 3) if references == 64 else (2, 2)
    of_references = features * ((4 if ahead else size) * references + 4)
    memory = stages[0] * of_references + stages[1] * features * 2 * parts_of_x * rows + 16 * rows
    # Rows after the last are copied too. Queries and the centre are padded to whole stages.
    copied = references * shape.N * size + trips * features * (2 * parts_of_x * rows + 4)
    # A tile whose warps take both panels of a trip multiplies zeros after the last one.
    both = (rows, references, shape.type) == (64, 128, "float32")
    multiplied = 2 * trips if both else panels
    of_all = Amount(
        halves=2 * products * multiplied * (references // 16) * (rows // 8),
        copied=copied,
        barriers=trips,
    )
    # Half of the last trip is left out if its second panel is empty.
    loops = {"features": _by_all(tiles, panels / of_stage, of_all)}
    if sliced:
        loops["features"] = loops["features"]._replace(most=each)
    slabs = 2 if ahead else 1  # of 16 references, of a warp
    last = 0 if sliced else _last(project, slabs)
    once = Amount(barriers=(2 if project or sliced else 3) + ahead, exchanges=8 * (4 + last))
    how = ", ".join(map(_text, (card.geforce, project, sliced)))
    name = f"distances<{shape.type}, {rows}, {references}, {how}>"
    moved = size * m * shape.N + 4 * queries * shape.N
    moved += _stored_of_pair(shape, slices) * queries * m
    return Work("distances", name, tiles * slices, 256, memory, once, loops, moved)


def _stored_of_pair(shape: Shape, slices: int) -> int:
    """Bytes of the distance of a pair, or of its sums over slices."""
    return slices * (4 if shape.type == "Rounded" and slices > 1 else 8)


def _finished(shape: Shape, queries: int, m: int, slices: int, card: Device, project: bool) -> Work:
    """Distances from the sums over slices."""
    rows, tiles = FINISH_WARPS * FINISH_QUERIES, up(m, TILE)
    sums = _stored_of_pair(shape, slices) * queries * m
    blocks = tiles * up(queries, rows)
    loops = {"slices": _by_all(blocks, slices)}
    if project:
        votes = Amount(exchanges=1)
        loops["votes"] = Loop(tiles * up(queries, FINISH_QUERIES), FINISH_WARPS, votes)
    else:
        loops["minima"] = Loop(tiles * queries, min(queries, rows), Amount(exchanges=3))
        loops["reach"] = Loop(tiles, 1, Amount(exchanges=_OVER_WARP))
    name = f"finish_distances<{shape.type}, {_text(card.geforce)}, {_text(project)}>"
    moved = (4 if project else 8) * queries * m
    if sums > KEPT * card.rate("l2_size"):
        moved += sums
    return Work("finish_distances", name, blocks, 32 * FINISH_WARPS, 0, Amount(), loops, moved)


def _last(project: bool, slabs: int) -> int:
    """Exchanges of a warp after its sums: for the farthest of its references, and a vote on whether
    all distances, or all of G·y, are finite."""
    return 1 if project else slabs * _OVER_WARP + 1


def _warpgroups(shape: Shape, card: Device) -> bool:
    """Whether the largest tiles are those of warpgroups."""
    return card.architecture == 90 and shape.is_asynchronous(card)


def _tensor_memory(shape: Shape, card: Device) -> bool:
    """Whether the largest tiles are those of tensor memory."""
    return card.architecture == 100 and shape.is_asynchronous(card)


def _warpgroup_products(shape: Shape, queries: int, m: int, tiling: Tiling, project: bool) -> Work:
    rows, references, sliced, panels = *tiling[:2], tiling.slices > 1, up(shape.N, _PANEL)
    rounded = shape.type == "Rounded"
    parts_of_x, products = (1, 1) if rounded else (2, 3)
    tiles, each = _tiles(queries, m, tiling), up(panels, tiling.slices)  # panels of a slice
    slices = up(panels, each)
    copied = 4 * references * shape.N + panels * _PANEL * (2 * parts_of_x * rows + 4)
    # Each warpgroup multiplies 64 queries and half of a panel at a time.
    warps = references // 16
    multiplied = products * 2 * warps * (rows // 64) * panels
    of_all = Amount(of_warpgroups=multiplied, copied=copied, barriers=panels)
    loops = {"features": _by_all(tiles, panels, of_all)._replace(most=each)}
    if not rounded:
        loops["totals"] = _totals(tiles, panels, tiling.slices)
    exchanges = 4 + (0 if sliced else _last(project, 1))
    if not sliced and (rows > 128 or references > 128):
        loops["turns"] = _by_all(tiles, 2)  # over the queries, after their sums
    once = Amount(barriers=3 if project or sliced else 4, exchanges=warps * exchanges)
    stage = _PANEL * (2 * parts_of_x * rows + 4 * references + 4)
    stages = (3 if references > 128 else 4) * stage
    stages += 32 * references * (1 if rounded else rows // 8)  # totals
    least = 8 * references // 2 * (rows + 8) + 16  # smallest distances, in the place of stages
    memory = max(stages, least + 8 * (references + references // 16)) + 16 * rows
    moved = 4 * m * shape.N + 4 * queries * shape.N
    moved += _stored_of_pair(shape, slices) * queries * m
    kernel = f"warpgroup_distances<{shape.type}, {rows}, {references}, "
    kernel += f"{_text(project)}, {_text(sliced)}>"
    return Work("distances", kernel, tiles * slices, 2 * references, memory, once, loops, moved)


def _totals(tiles: int, panels: int, slices: int) -> Loop:
    """How often sums of some panels go to totals. Those of the last ones of whole tiles do not."""
    each, left_out = up(panels, slices), int(slices == 1)
    last = panels - (up(panels, each) - 1) * each
    trips = (up(panels, each) - 1) * up(each, _ADDED_PANELS) + up(last, _ADDED_PANELS) - left_out
    return _by_all(tiles, trips)._replace(most=up(each, _ADDED_PANELS) - left_out)


def _tensor_memory_products(
    shape: Shape, queries: int, m: int, tiling: Tiling, project: bool
) -> Work:
    rows, references, sliced, panels = *tiling[:2], tiling.slices > 1, up(shape.N, _PANEL)
    rounded = shape.type == "Rounded"
    parts, products = (1, 1) if rounded else (2, 3)
    tiles, each = _tiles(queries, m, tiling), up(panels, tiling.slices)  # panels of a slice
    slices = up(panels, each)
    copied = 4 * references * shape.N + panels * _PANEL * (2 * parts * rows + 4)
    of_all = Amount(in_tensor_memory=2 * products * panels, copied=copied, barriers=panels)
    loops = {"features": _by_all(tiles, panels, of_all)._replace(most=each)}
    if not rounded:
        loops["totals"] = _totals(tiles, panels, tiling.slices)
    if not sliced:
        loops["turns"] = _by_all(tiles, 2)  # over the queries, after their sums
    exchanges = 0 if sliced else _last(project, 2)
    once = Amount(barriers=4 if project or sliced else 5, exchanges=8 * exchanges)
    stages = 2 * _PANEL * (2 * parts * rows + 4 * references + 4)
    operands = _PANEL * 2 * parts * references  # of a panel
    totals = 4 * 2 * 4 * 256 * (1 if rounded else rows // 16)
    least = 8 * 32 * (rows + 8) + 16  # smallest distances
    sums = totals + 8 * (2 * references + references // 16) + least
    memory = 16 * up(max(stages + operands, sums) + 16 * rows + 12, 16)
    moved = 4 * m * shape.N + 4 * queries * shape.N
    moved += _stored_of_pair(shape, slices) * queries * m
    kernel = f"tensor_memory_distances<{shape.type}, {_text(project)}, {_text(sliced)}>"
    return Work("distances", kernel, tiles * slices, 256, memory, once, loops, moved)


def _differences(shape: Shape, queries: int, m: int, project: bool) -> Work:
    rows, references, size = 8, 64, _SIZES[shape.type]
    row_groups, tiles = up(queries, rows), up(m, references)
    blocks, panels = tiles * row_groups, up(shape.N, _PANEL)
    pitch = _PANEL * size + 16
    memory = 4 * (4 * rows * (_PANEL + 4) + references * pitch) + 8 * 8 * rows
    copied = shape.N * (4 * queries * tiles + size * m * row_groups) / blocks
    loops = {"features": _by_all(blocks, panels, Amount(copied=copied, barriers=panels))}
    exchanges = 2 * rows + (0 if project else 3 * rows + 2)
    once = Amount(barriers=1 if project else 2, exchanges=8 * exchanges)
    moved = size * m * shape.N + 4 * queries * shape.N + 8 * queries * m
    name = f"differences<{_stored(shape)}, {_text(project)}>"
    return Work("differences", name, blocks, 256, memory, once, loops, moved)


# ---- refinement --------------------------------------------------------------------------------


def _share(shape: Shape, queries: int, m: int) -> float:
    """The share of one launch in the pairs of all."""
    return queries / shape.B * m / shape.M


def _limits(shape: Shape, data: Data, queries: int, m: int) -> Work:
    refined, share, tiles = data["refine"], _share(shape, queries, m), up(m, TILE)
    warps = limit_warps(tiles)
    groups = up(tiles, 32 * warps)
    # A turn is one of a single warp. It combines 32 values of each of its tiles twice.
    turn = Amount(exchanges=4 * LISTED_TOGETHER + 1)
    # Of places in the list, of minima, and of the length of the list.
    stored = (4 * refined["pairs"] + 8 * refined["tiles"]) / max(1.0, refined["turns"]) + 4
    loops = {
        "minima": _by_all(queries, groups),
        "turns": Loop(refined["turns"] * share, refined["turns, most"], turn, stored),
        "stores": Loop(refined["stores"] * share, 0),  # of places in the list
    }
    once = Amount(barriers=4, exchanges=warps * (5 + groups))
    name, memory = f"find_limits<{_text(not shape.few)}, {warps}>", 24 + 20 * warps + 16 * tiles
    moved = 8 * queries * tiles
    return Work("find_limits", name, queries, 32 * warps, memory, once, loops, moved)


_REFINE_BLOCKS = 2  # of a multiprocessor


def _refine(shape: Shape, data: Data, queries: int, m: int, card: Device) -> Work:
    refined, share = data["refine"], _share(shape, queries, m)
    blocks, pairs = min(_REFINE_BLOCKS * card.sms, up(queries * m, 16)), refined["pairs"] * share
    # A row of a query is read from the L2 cache again if another turn of find_limits, or another
    # block, comes to it.
    rows = min(pairs, refined["turns"] * share + blocks)
    loops = {
        "pairs": Loop(pairs, up(pairs, blocks), Amount(exchanges=2 * _OVER_WARP), stored=2 * 8),
        "rows": Loop(rows, up(rows, blocks)),
    }
    name = f"refine<{_stored(shape)}>"
    return Work("refine", name, blocks, 512, 0, Amount(), loops, 12 * pairs)


# ---- weights and sums --------------------------------------------------------------------------


def _weigh(shape: Shape, data: Data, queries: int, m: int, card: Device) -> Work:
    found, share, size = data["weigh"], _share(shape, queries, m), shape.piece(card)
    sizes = [min(size, m - start) for start in range(0, m, size)]  # of the pieces
    blocks, rounds = queries * len(sizes), [up(each, 256 * 32) for each in sizes]
    words, turns = (found[name] * share for name in ("words", f"turns in pieces of {size}"))
    pairs, left_out = queries * m, queries * up(m, 32) - words
    of_rounds, of_zeros = queries * sum(rounds), queries * up(m, PIECE)
    # A turn is one of a single warp, which may have fewer words left.
    together = words / turns if turns else 0.0
    loops = {
        "minima": _by_all(blocks, up(up(m, TILE), 256)),
        "rounds": Loop(of_rounds, max(rounds), Amount(exchanges=8), 4 * left_out / of_rounds),
        "zeros": Loop(of_zeros, up(sizes[0], PIECE), stored=128 * left_out / of_zeros),
        "turns": Loop(
            turns,
            found[f"turns in pieces of {size}, most"],
            Amount(exchanges=WEIGHED_TOGETHER),
            together * _OF_WEIGHTS,
            together / WEIGHED_TOGETHER,
        ),
    }
    once = Amount(barriers=3, exchanges=8 * (2 + _OVER_WARP))
    moved = 4 * pairs + 8 * 32 * words + 8 * queries * up(m, TILE)
    if 12 * pairs <= KEPT * card.rate("l2_size"):
        moved = 0
    name = f"weigh<{_text(shape.halves)}, false>"  # D is finite
    stored = 2 * 4 + 2 * 8 * queries / blocks
    return Work("weigh", name, blocks, 256, 152, once, loops, moved, stored=stored)


def _ordered_lists(
    shape: Shape,
    data: Data,
    queries: int,
    m: int,
    pieces: int,
    chunks: int,
    card: Device,
    backward: bool = False,
) -> Iterator[Work]:
    """Lists for so many chunks, and the order of queries for the first chunk of all."""
    halves, rows = shape.halves and not backward, shape.sums(card).rows
    several = queries > rows
    uneven = has_uneven_shares(queries, rows)
    ordered = several and m == shape.chunk
    if ordered and not uneven:
        yield _order(queries, pieces)
    listing = _list(shape, data, queries, m, card, halves, pieces if uneven else 0)
    if ordered and uneven:
        yield _list(shape, data, queries, m, card, halves, pieces, order=True)
        chunks -= 1
    if chunks > 0:
        yield listing._replace(times=chunks)


def _order(queries: int, pieces: int) -> Work:
    blocks = up(queries, _RANKED)
    loops = {
        "counts": _by_all(blocks, up(queries, 256) * pieces),
        "ranks": _by_all(blocks, up(queries, 16)),
    }
    once = Amount(barriers=1, exchanges=8 * 4)
    moved = 4 * queries * pieces
    name, stored = "order_queries", 4 * queries / blocks
    return Work(name, name, blocks, 256, 4 * queries, once, loops, moved, stored=stored)


def _list(
    shape: Shape,
    data: Data,
    queries: int,
    m: int,
    card: Device,
    halves: bool,
    pieces: int,
    order: bool = False,
) -> Work:
    """The lists of a chunk, and the weights of what they list.

    Args:
        pieces: of the chunk, if groups have uneven shares of the blocks; 0 otherwise.
        order: whether it finds the order of queries.
    """
    sums = shape.sums(card)
    groups, words, threads = up(queries, sums.rows), up(m, 32), list_threads(sums.rows)
    turns = 8 * sums.rows // threads  # a thread gathers weights of as many queries
    warps, half = threads // 32, sums.rows // 2
    blocks = list_blocks(queries, m, sums.rows, card.sms)
    found = data["lists"][sums.name]
    spread = TRANSFER * found["transfers"] / found["listed"] if found["listed"] else 1.0
    each = up(words, threads)
    loops = {
        "words": _by_all(blocks, half * up(2 * up(words, 32), warps))._replace(stored=0),
        "bits": _by_all(blocks, each),  # of words are counted
        "sums": _by_all(blocks, each),  # of them are added up
        "places": _by_all(blocks, each),
        "panels": Loop(
            turns * groups * found["panels"],
            turns * found[f"gathered on {card.sms}, most"],
            spread=spread,
        ),
        "rest": Loop(0, 0),  # takes single panels, which are counted as parts of four in "panels"
    }
    if pieces:
        loops["counts"] = _by_all(blocks, pieces)
    if order:
        sharers = 2 if 2 * queries <= threads else 1  # lanes that find the rank of a query
        loops["ranks"] = _by_all(
            blocks, up(queries, 4 * sharers), Amount(exchanges=warps * (sharers - 1))
        )
    how = ", ".join(map(_text, (pieces > 0, order, halves)))
    name = f"list_references<{sums.rows}, {how}, {_text(sums.shares > 0)}>"
    memory = 4 * (2 * threads + 2 * warps + sums.rows) + 2 * _PANEL * GATHERED_PANELS + 12 * words
    once = Amount(barriers=6, exchanges=warps * _OF_PLACES)
    if pieces:
        once = once.plus(Amount(barriers=2 + order, exchanges=warps * 8))
    moved = 4 * queries * words
    return Work("list_references", name, blocks, threads, memory, once, loops, moved)


def _listing(blocks: int, words: int, threads: int, loads: int) -> Loop:
    """Blocks list the bits that are set in words, each of which is found from so many loads."""
    rounds = up(words, threads)
    each = Amount(barriers=2, exchanges=threads // 32 * _OF_PLACES)
    return _by_all(blocks, loads * rounds, each.times(rounds))


def _sum(
    shape: Shape, data: Data, queries: int, m: int, card: Device, backward: bool = False
) -> Work:
    halves = shape.halves and not backward
    size, sums = _SIZES[shape.type], shape.sums(card)
    words, groups, features = up(m, 32), up(queries, sums.rows), up(shape.N, sums.features)
    found, in_memory = data["lists"][sums.name], sums.shares > 0 and card.architecture == 100
    warps = sums.features // (16 if in_memory else 32)
    panels = found["panels"]
    type_ = shape.type if halves else _stored(shape)
    exact = type_ in ("Float16", "uint8") if halves else type_ != "float32"
    parts = 2 if exact or type_ == "Rounded" else 3
    products = warps * sums.rows * parts  # of 32 features of a warp, 8 queries and 8 terms
    of_rows = _PANEL * size * shape.N / features  # the mean of the blocks
    of_weights = 4 * sums.rows * _PANEL
    trip = Amount(
        halves=products / 2 * (halves and not sums.shares),
        tf32=products * (not halves),
        of_warpgroups=products / 16 * (sums.shares > 0 and not in_memory),
        in_tensor_memory=4 * parts * in_memory,  # half of the features, and of a panel
        copied=of_rows + of_weights,
        barriers=1,
    )
    checks = halves and not exact  # whether float16 holds the values
    each = Amount(barriers=2 + 2 * checks, exchanges=warps * _OVER_WARP * checks)
    moved = read_again(shape, m, card) + 4 * found["parts"] * queries * shape.N
    staged = _PANEL * (_sum_pitch(size, sums.features) + 4 * sums.rows)
    loops = {"panels": Loop(features * groups * panels, found["panels, most"], trip)}
    if not sums.shares:
        loops["alive"] = Loop(features * groups * found["parts"], float(panels > 0), each)
        memory = 2 * staged + 2 * _PANEL * PART_PANELS + 4 * (warps + sums.rows)
        name = f"weighted_sum<{type_}, {sums.rows}, {_text(halves)}>"
        blocks = features * groups * up(words, sums.panels)
        return Work("weighted_sum", name, blocks, 128, memory, Amount(), loops, moved)
    of_segment = each.plus(Amount(barriers=2, exchanges=warps * 3))
    segments = found["segments"]
    stored = 4 * found["parts"] * queries * shape.N / segments if segments else 0.0
    loops["segments"] = Loop(segments, found["segments, most"], of_segment, stored)
    left_out = found["segments left out"] / sums.shares
    once = Amount(barriers=2 * in_memory, exchanges=warps * (_OVER_WARP + 1 + 3 * left_out))
    memory = 4 * staged + 2 * _PANEL * SHARE_PANELS + 4 * (warps + sums.rows)
    memory += 24 * in_memory  # signals, and the address of tensor memory
    name = f"{'tensor_memory' if in_memory else 'warpgroup'}_sum<{type_}, {sums.rows}>"
    return Work("weighted_sum", name, sums.shares, 32 * warps, memory, once, loops, moved)


def _sum_pitch(size: int, features: int = SUM_FEATURES) -> int:
    return features * size + 32


def read_again(shape: Shape, m: int, card: Device) -> float:
    """Bytes of a chunk's references that the weighted sum must read from memory again."""
    size = _SIZES[shape.type] * m * shape.N
    return size if size > KEPT * card.rate("l2_size") else 0.0


def _merge(
    shape: Shape, data: Data, queries: int, m: int, card: Device, name: str = "merge"
) -> Work:
    width = 4 if name == "merge" and shape.N % 4 == 0 else 1  # features of a thread
    blocks = queries * up(shape.N, 256 * width)
    found = data["lists"][shape.sums(card).name]
    loops = {"parts": Loop(blocks * found["parts"], found["parts, most"])}
    if name == "merge":
        loops["pieces"] = _by_all(blocks, up(m, shape.piece(card)))
    moved = 4 * (found["parts"] + 1) * queries * shape.N
    kernel = f"merge<{width}>" if name == "merge" else name
    of_state = 3 * 8 if name == "merge" else 0
    stored = queries * (4 * shape.N + of_state) / blocks
    return Work(name, kernel, blocks, 256, 0, Amount(), loops, moved, stored=stored)


# ---- gradients ---------------------------------------------------------------------------------


def gradient_counts(
    shape: Shape, data: Data, card: Device, references: bool = True, kept: bool = False
) -> Iterator[Work]:
    """The launches of a backward pass with aligned rows.

    Args:
        data: what :func:`benchmarks.machine_code.data.count_gradient` returns for the shape.
        references: whether the gradient of the references is found, beside that of the queries.
        kept: whether it takes the distances that the forward pass kept.
    """
    shape = on_card(shape._replace(backward=True), card)
    if not shape.few and not kept:
        yield _center(shape)
    for queries, blocks in by_size(shape.blocks()):
        if not shape.few:
            for centered in (False,) if kept else (True, False):
                yield _split(shape, queries, centered)._replace(times=blocks)
        for m, chunks in by_size(shape.chunk_sizes()):
            for work in _gradient_of_chunks(
                shape, data, queries, m, chunks, card, references, kept
            ):
                if references or work.name != "reference_gradient":
                    yield work._replace(times=work.times * blocks)


def _gradient_of_chunks(
    shape: Shape,
    data: Data,
    queries: int,
    m: int,
    chunks: int,
    card: Device,
    references: bool,
    kept: bool,
) -> Iterator[Work]:
    """The launches for a block of queries and so many chunks of m references."""
    passes = 1 if shape.chunks == 1 else 2  # over the chunks; both need the distances
    measured = (
        *_distances(shape, queries, m, card),
        _limits(shape, data, queries, m),
        _refine(shape, data, queries, m, card),
    )
    projected = _distances(shape, queries, m, card, project=True)
    for work in projected if kept else (*measured, *projected):
        yield work._replace(times=passes * chunks)
    pieces = up(m, shape.piece(card))
    yield _pull(shape, queries, m, card)._replace(times=chunks)
    yield _coefficients(shape, queries, m, card, references)._replace(times=chunks)
    if m == shape.chunk_sizes()[-1]:
        yield _finish(queries)
    yield from _ordered_lists(shape, data, queries, m, pieces, chunks, card, backward=True)
    for work in (
        _sum(shape, data, queries, m, card, backward=True),
        _merge(shape, data, queries, m, card, "merge_gradient"),
        _reference_gradient(shape, data, queries, m),
    ):
        yield work._replace(times=chunks)


def _pull(shape: Shape, queries: int, m: int, card: Device) -> Work:
    size = shape.piece(card)
    blocks = queries * up(m, size)
    loops = {"pairs": Loop(queries * up(m, PIECE), min(size // PIECE, up(m, PIECE)))}
    name, moved, stored = "pull<false>", 12 * queries * m, 2 * 8  # D is finite
    return Work("pull", name, blocks, 256, 152, _TWO_SUMS, loops, moved, stored=stored)


def _coefficients(shape: Shape, queries: int, m: int, card: Device, references: bool) -> Work:
    size = shape.piece(card)
    blocks, padded = queries * up(m, size), 32 * up(shape.chunk, 32)
    trips = [up(min(size, padded - start), PIECE) for start in range(0, m, size)]
    votes = Amount(exchanges=8 * PIECE // 256)
    loops = {"pairs": Loop(queries * sum(trips), max(trips), votes, PIECE // 32 * _OF_WEIGHTS)}
    name, moved = "find_coefficients", (24 if references else 16) * queries * m
    kernel, stored = f"{name}<false, {_text(references)}>", 4 + 2 * 8  # D is finite
    return Work(name, kernel, blocks, 256, 204, _TWO_SUMS, loops, moved, stored=stored)


def _finish(queries: int) -> Work:
    name = "finish_moments"
    return Work(name, name, up(queries, 32), 32, 0, Amount(), {}, 64 * queries)


def _reference_gradient(shape: Shape, data: Data, queries: int, m: int) -> Work:
    found, features = data["queries"], up(shape.N, SUM_FEATURES)
    blocks, lists = features * up(m, SUM_ROWS), up(queries, 32 * PART_PANELS)
    trips = 2 * lists * found["panels"]  # over G and over x
    of_rows = _PANEL * 4 * shape.N / features
    of_weights = 4 * SUM_ROWS * found["listed"] / found["panels"] if trips else 0.0
    trip = Amount(tf32=128 * 3, copied=of_rows + of_weights, barriers=1)
    listing = _listing(blocks, min(up(queries, 32), PART_PANELS), 128, 32)
    loops = {
        "lists": listing._replace(trips=lists * listing.trips, most=lists * listing.most),
        "panels": Loop(blocks * trips, 2 * lists * found["panels, most"], trip),
    }
    once = Amount(barriers=3 * lists, exchanges=4 * 8 * 3)
    name, moved = f"reference_gradient<{_stored(shape)}>", 4 * (2 * queries * m + 2 * m * shape.N)
    memory = 3 * _PANEL * (_sum_pitch(4) + 4 * (SUM_ROWS + 8)) + 4 * (_PANEL * PART_PANELS + 4)
    return Work("reference_gradient", name, blocks, 128, memory, once, loops, moved)
