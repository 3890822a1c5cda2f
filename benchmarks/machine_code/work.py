"""The work of the CUDA kernels: their launches, blocks and loops, and what a block does in them.

:func:`counts` needs no machine code. Predicted times rest on it (launches.py), and
tests/gpu/cuda/test_counts.py holds it against what the host shim counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.machine_code import data as constants
from benchmarks.machine_code.data import (
    LISTED_TOGETHER,
    PART_PANELS,
    SUM_FEATURES,
    SUM_ROWS,
    TILE,
    Shape,
    limit_warps,
    up,
)
from benchmarks.machine_code.devices import Device

Data = Mapping[str, Any]
PIECE = 1024  # references that a block of ``weigh`` takes at a time
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
_LISTING = 256  # threads of ``list_references``, which orders as many queries
_RANKED = 16  # queries of a block of ``order_queries``, 16 threads each
_OVER_WARP = 5  # shuffles that combine the values of a warp


class Amount(NamedTuple):
    """What a block does, its warps together."""

    halves: float = 0
    """Matrix instructions for float16 values (16 × 8 × 16)."""
    tf32: float = 0
    """Matrix instructions for TF32 values (16 × 8 × 8)."""
    copied: float = 0
    """Bytes that asynchronous copies read."""
    barriers: float = 0
    exchanges: float = 0
    """Shuffles, votes and reductions of warps. A shuffle of 64 bits counts once."""

    def times(self, n: float) -> Amount:
        return Amount(*(n * each for each in self))

    def plus(self, other: Amount) -> Amount:
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))


class Loop(NamedTuple):
    """How often blocks run a loop."""

    trips: float
    """Of all blocks together."""
    most: float
    """Trips of the block that makes most."""
    trip: Amount = Amount()
    """What a block does in a trip, the mean over all trips."""


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

    Raises:
        ValueError: there are so many features that blocks have another size than in the kernels.
    """
    _check_features(shape)
    if not shape.few:
        yield _center(shape)
    for queries, blocks in by_size(shape.blocks()):
        if not shape.few:
            yield _split(shape, queries)._replace(times=blocks)
        for m, chunks in by_size(shape.chunk_sizes()):
            for work in _of_chunks(shape, data, queries, m, chunks, card):
                yield work._replace(times=blocks * work.times)


def _check_features(shape: Shape) -> None:
    most = constants.PARTS // 2 // SUM_ROWS
    if most < shape.N:
        raise ValueError(f"N is {shape.N}; allowed is at most {most}.")


def by_size(sizes: list[int]) -> list[tuple[int, int]]:
    """The different sizes, and how many have each."""
    return [(size, sizes.count(size)) for size in sorted(set(sizes), reverse=True)]


def _of_chunks(
    shape: Shape, data: Data, queries: int, m: int, chunks: int, card: Device
) -> Iterator[Work]:
    """The launches for a block of queries and so many chunks of m references."""
    yield _distances(shape, queries, m, card)._replace(times=chunks)
    yield _limits(shape, data, queries, m)._replace(times=chunks)
    yield _refine(shape, data, queries, m, card)._replace(times=chunks)
    yield _weigh(shape, queries, m, card)._replace(times=chunks)
    pieces = up(m, piece_of(shape, card))
    yield from _ordered_lists(shape, queries, m, pieces, chunks)
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
    each = shape.N / 256
    loops = {"norms": _by_all(queries, each), "parts": _by_all(queries, each)}
    rounded = centered and shape.type == "Rounded"
    sums = 2 + centered + rounded  # over the block
    over_block = Amount(barriers=2, exchanges=8 * _OVER_WARP)
    if centered:  # the first block finds the largest value of all
        loops["first"] = Loop(1, 1, over_block)
    once = over_block.times(sums)
    name, moved = f"split_rows<{_text(centered)}>", 8 * queries * shape.N
    return Work("split_rows", name, queries, 256, 64, once, loops, moved)


def _text(value: bool) -> str:
    return str(value).lower()


# ---- distances ---------------------------------------------------------------------------------


def tile_of(m: int, queries: int, card: Device, rounded: bool = False) -> tuple[int, int]:
    """Queries and references of a block of ``distances``."""

    def rounds(rows: int, references: int) -> int:
        return up(up(m, references) * up(queries, rows), card.sms)

    costs = (5, 7, 15, 18) if rounded else (5, 8, 12, 22)
    small, medium = costs[0] * rounds(32, 64), costs[1] * rounds(64, 64)
    large, largest = costs[2] * rounds(64, 128), costs[3] * rounds(128, 128)
    if queries <= 32 or small < min(medium, large, largest):
        return 32, 64
    if medium < min(large, largest):
        return 64, 64
    return (64, 128) if large <= largest else (128, 128)


def _stored(shape: Shape) -> str:
    """The type by which kernels read references that they do not multiply in float16."""
    return "float32" if shape.type == "Rounded" else shape.type


def _distances(shape: Shape, queries: int, m: int, card: Device, project: bool = False) -> Work:
    if shape.few:
        return _differences(shape, queries, m, project)
    rounded = shape.type == "Rounded"
    rows, references = tile_of(m, queries, card, rounded)
    parts_of_x, products = (1, 1) if rounded else (2, 3)
    ahead = rows == 128  # whether the block converts references one panel ahead
    size, panels = _SIZES[shape.type], up(shape.N, _PANEL)
    of_stage = 1 if ahead else 2  # panels
    trips, features = up(panels, of_stage), of_stage * _PANEL
    blocks = up(m, references) * up(queries, rows)
    stages = (3 if rounded else 4, 2) if ahead else (3, 3) if references == 64 else (2, 2)
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
    loops = {"features": _by_all(blocks, panels / of_stage, of_all)}
    columns, groups = rows // 8, references // 16
    slabs = 2 if ahead else 1  # of 16 references, of a warp
    parts = 8 // groups * slabs  # of the columns, among the warps
    minima = 0 if project else slabs * (2 * (columns // parts) * 4 + _OVER_WARP)
    once = Amount(barriers=(2 if project else 3) + ahead, exchanges=8 * (4 + minima))
    name = f"distances<{shape.type}, {rows}, {references}, {_text(project)}>"
    moved = size * m * shape.N + 4 * queries * shape.N + 8 * queries * m
    return Work("distances", name, blocks, 256, memory, once, loops, moved)


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
    loops = {
        "minima": _by_all(queries, groups),
        "turns": Loop(refined["turns"] * share, refined["turns, most"], turn),
    }
    once = Amount(barriers=4, exchanges=warps * (5 + groups))
    name, memory = f"find_limits<{_text(not shape.few)}, {warps}>", 24 + 20 * warps + 16 * tiles
    moved = 8 * queries * tiles
    return Work("find_limits", name, queries, 32 * warps, memory, once, loops, moved)


def _refine(shape: Shape, data: Data, queries: int, m: int, card: Device) -> Work:
    refined, share = data["refine"], _share(shape, queries, m)
    blocks, pairs = min(card.sms, up(queries * m, 16)), refined["pairs"] * share
    # A row of a query is read from the L2 cache again if another turn of find_limits, or another
    # block, comes to it.
    rows = min(pairs, refined["turns"] * share + blocks)
    loops = {
        "pairs": Loop(pairs, up(pairs, blocks), Amount(exchanges=2 * _OVER_WARP)),
        "rows": Loop(rows, up(rows, blocks)),
    }
    name = f"refine<{_stored(shape)}>"
    return Work("refine", name, blocks, 512, 0, Amount(), loops, 12 * pairs)


# ---- weights and sums --------------------------------------------------------------------------


def _weigh(shape: Shape, queries: int, m: int, card: Device) -> Work:
    size, pairs = piece_of(shape, card), queries * m
    blocks, trips = queries * up(m, size), queries * up(m, PIECE)
    votes = Amount(exchanges=8 * PIECE // 256)
    loops = {
        "minima": _by_all(blocks, up(up(m, TILE), 256)),
        "pairs": Loop(trips, size // PIECE, votes),
    }
    once = Amount(barriers=3, exchanges=8 * 2 * _OVER_WARP)
    moved = 12 * pairs if 12 * pairs > KEPT * card.rate("l2_size") else 0
    name = f"weigh<{_text(shape.halves)}, false>"  # D is finite
    return Work("weigh", name, blocks, 256, 128, once, loops, moved)


def piece_of(shape: Shape, card: Device) -> int:
    """References of a block of ``weigh``, ``pull`` and ``find_coefficients``."""
    least = up(shape.chunk, PIECE)
    return PIECE * min(max(1, shape.block * least // (4 * card.sms)), least)


def _ordered_lists(shape: Shape, queries: int, m: int, pieces: int, chunks: int) -> Iterator[Work]:
    """Lists for so many chunks, and the order of queries for the first chunk of all."""
    ordered = queries > SUM_ROWS and m == shape.chunk
    alone = ordered and queries > _LISTING
    if alone:
        yield _order(queries, pieces)
    elif ordered:
        yield _list(queries, m, pieces)
        chunks -= 1
    if chunks > 0:
        yield _list(queries, m)._replace(times=chunks)


def _order(queries: int, pieces: int) -> Work:
    blocks = up(queries, _RANKED)
    loops = {
        "counts": _by_all(blocks, up(queries, 256) * pieces),
        "ranks": _by_all(blocks, up(queries, 16)),
    }
    once = Amount(barriers=1, exchanges=8 * 4)
    moved = 4 * queries * pieces
    return Work("order_queries", "order_queries", blocks, 256, 4 * queries, once, loops, moved)


def _list(queries: int, m: int, pieces: int = 0) -> Work:
    """The lists of a chunk. It also finds the order of queries from their weights in pieces."""
    blocks, words = up(queries, SUM_ROWS), up(m, 32)
    loops = {"words": _listing(blocks, words, _LISTING)}
    if pieces:
        loops |= {"counts": _by_all(blocks, pieces), "ranks": _by_all(blocks, up(queries, 4))}
    name, memory = f"list_references<{_text(pieces > 0)}>", 4 * (8 + SUM_ROWS + _LISTING)
    once, moved = Amount(barriers=4 if pieces else 3), 4 * queries * words
    return Work("list_references", name, blocks, _LISTING, memory, once, loops, moved)


def _listing(blocks: int, words: int, threads: int) -> Loop:
    """Blocks list the bits that are set in words, each of which is found from 32 loads."""
    rounds = up(words, threads)
    each = Amount(barriers=2, exchanges=threads // 32 * _OVER_WARP)
    return _by_all(blocks, 32 * rounds, each.times(rounds))


def _sum(
    shape: Shape, data: Data, queries: int, m: int, card: Device, backward: bool = False
) -> Work:
    halves = shape.halves and not backward
    size, most = _SIZES[shape.type], shape.part_panels(card.sms)
    words, groups, features = up(m, 32), up(queries, SUM_ROWS), up(shape.N, SUM_FEATURES)
    blocks = features * groups * up(words, most)
    found = data["lists"][f"parts of {most}"]
    panels = found["panels"]
    type_ = shape.type if halves else _stored(shape)
    exact = type_ in ("Float16", "uint8") if halves else type_ != "float32"
    products = 4 * SUM_ROWS * (2 if exact or type_ == "Rounded" else 3)  # of 8 terms
    of_rows = _PANEL * size * shape.N / features  # the mean of the blocks
    of_weights = 4 * SUM_ROWS * found["listed"] / panels if panels else 0.0
    trip = Amount(
        halves=products / 2 * halves,
        tf32=products * (not halves),
        copied=of_rows + of_weights,
        barriers=1,
    )
    checks = halves and not exact  # whether float16 holds the values
    alive = Amount(barriers=2 + 2 * checks, exchanges=4 * _OVER_WARP * checks)
    loops = {
        "alive": Loop(features * groups * found["parts"], float(panels > 0), alive),
        "panels": Loop(features * groups * panels, found["panels, most"], trip),
    }
    moved = read_again(shape, m, card) + 4 * found["parts"] * queries * shape.N
    name, memory = f"weighted_sum<{type_}, {_text(halves)}>", _sum_memory(size)
    return Work("weighted_sum", name, blocks, 128, memory, Amount(), loops, moved)


def _sum_memory(size: int) -> int:
    pitch = SUM_FEATURES * size + 32
    return 3 * _PANEL * (pitch + 4 * (SUM_ROWS + 8)) + 4 * (32 * PART_PANELS + 4 + 2 * SUM_ROWS)


def read_again(shape: Shape, m: int, card: Device) -> float:
    """Bytes of a chunk's references that the weighted sum must read from memory again."""
    size = _SIZES[shape.type] * m * shape.N
    return size if size > KEPT * card.rate("l2_size") else 0.0


def _merge(
    shape: Shape, data: Data, queries: int, m: int, card: Device, name: str = "merge"
) -> Work:
    width = 4 if name == "merge" and shape.N % 4 == 0 else 1  # features of a thread
    blocks = queries * up(shape.N, 256 * width)
    found = data["lists"][f"parts of {shape.part_panels(card.sms)}"]
    loops = {"parts": Loop(blocks * found["parts"], found["parts, most"])}
    moved = 4 * (found["parts"] + 1) * queries * shape.N
    kernel = f"merge<{width}>" if name == "merge" else name
    return Work(name, kernel, blocks, 256, 0, Amount(), loops, moved)


# ---- gradients ---------------------------------------------------------------------------------


def gradient_counts(
    shape: Shape, data: Data, card: Device, references: bool = True
) -> Iterator[Work]:
    """The launches of a backward pass with aligned rows.

    Args:
        data: what :func:`benchmarks.machine_code.data.count_gradient` returns for the shape.
        references: whether the gradient of the references is found, beside that of the queries.
    """
    shape = shape._replace(backward=True)
    _check_features(shape)
    if not shape.few:
        yield _center(shape)
    for queries, blocks in by_size(shape.blocks()):
        if not shape.few:
            for centered in (True, False):
                yield _split(shape, queries, centered)._replace(times=blocks)
        for m, chunks in by_size(shape.chunk_sizes()):
            for work in _gradient_of_chunks(shape, data, queries, m, chunks, card):
                if references or work.name != "reference_gradient":
                    yield work._replace(times=work.times * blocks)


def _gradient_of_chunks(
    shape: Shape, data: Data, queries: int, m: int, chunks: int, card: Device
) -> Iterator[Work]:
    """The launches for a block of queries and so many chunks of m references."""
    passes = 1 if shape.chunks == 1 else 2  # over the chunks; both need the distances
    for work in (
        _distances(shape, queries, m, card),
        _distances(shape, queries, m, card, project=True),
        _limits(shape, data, queries, m),
        _refine(shape, data, queries, m, card),
    ):
        yield work._replace(times=passes * chunks)
    pieces = up(m, piece_of(shape, card))
    yield _pull(shape, queries, m, card)._replace(times=chunks)
    yield _coefficients(shape, queries, m, card)._replace(times=chunks)
    if m == shape.chunk_sizes()[-1]:
        yield _finish(queries)
    yield from _ordered_lists(shape, queries, m, pieces, chunks)
    for work in (
        _sum(shape, data, queries, m, card, backward=True),
        _merge(shape, data, queries, m, card, "merge_gradient"),
        _reference_gradient(shape, data, queries, m),
    ):
        yield work._replace(times=chunks)


def _pull(shape: Shape, queries: int, m: int, card: Device) -> Work:
    size = piece_of(shape, card)
    once = Amount(barriers=4, exchanges=2 * 8 * _OVER_WARP)
    loops = {"pairs": Loop(queries * up(m, PIECE), min(size // PIECE, up(m, PIECE)))}
    return Work("pull", "pull", queries * up(m, size), 256, 64, once, loops, 12 * queries * m)


def _coefficients(shape: Shape, queries: int, m: int, card: Device) -> Work:
    size = piece_of(shape, card)
    blocks, padded = queries * up(m, size), 32 * up(shape.chunk, 32)
    trips = [up(min(size, padded - start), PIECE) for start in range(0, m, size)]
    votes = Amount(exchanges=8 * PIECE // 256)
    once = Amount(barriers=6, exchanges=3 * 8 * _OVER_WARP)
    loops = {"pairs": Loop(queries * sum(trips), max(trips), votes)}
    name = "find_coefficients"
    return Work(name, name, blocks, 256, 64, once, loops, 24 * queries * m)


def _finish(queries: int) -> Work:
    name = "finish_moments"
    return Work(name, name, up(queries, 256), 256, 0, Amount(), {}, 64 * queries)


def _reference_gradient(shape: Shape, data: Data, queries: int, m: int) -> Work:
    found, features = data["queries"], up(shape.N, SUM_FEATURES)
    blocks, lists = features * up(m, SUM_ROWS), up(queries, 32 * PART_PANELS)
    trips = 2 * lists * found["panels"]  # over G and over x
    of_rows = _PANEL * 4 * shape.N / features
    of_weights = 4 * SUM_ROWS * found["listed"] / found["panels"] if trips else 0.0
    trip = Amount(tf32=128 * 3, copied=of_rows + of_weights, barriers=1)
    listing = _listing(blocks, min(up(queries, 32), PART_PANELS), 128)
    loops = {
        "lists": listing._replace(trips=lists * listing.trips, most=lists * listing.most),
        "panels": Loop(blocks * trips, 2 * lists * found["panels, most"], trip),
    }
    once = Amount(barriers=3 * lists, exchanges=4 * 8 * 3)
    name, moved = f"reference_gradient<{_stored(shape)}>", 4 * (2 * queries * m + 2 * m * shape.N)
    return Work("reference_gradient", name, blocks, 128, _sum_memory(4), once, loops, moved)
