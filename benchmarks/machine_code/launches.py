"""The launches for a shape, by Triton and by CUDA, and how often each loop runs in them.

If a kernel has several configurations, the first is taken, as in deterministic mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.machine_code import kernels
from benchmarks.machine_code.data import SORTED, SUM_TILE, TILE, Shape, segment_of
from benchmarks.machine_code.devices import Device
from benchmarks.machine_code.kernels import Compiled
from benchmarks.machine_code.model import ONCE, Launch, Phase, phase
from benchmarks.machine_code.sass import Instruction, Loop

Data = Mapping[str, Any]
PANEL = 32  # features that a trip of ``distances`` takes
PIECE = 1024  # references of a program of ``weigh``
KEPT = 0.7  # share of the L2 cache that keeps a chunk's references until the weighted sum


def _up(n: float, by: float) -> int:
    return int(-(-n // by))


def _once(kernel: Compiled, blocks: int) -> Phase:
    return phase(ONCE, kernel, kernel.straight(), blocks, 1)


def _loop(name: str, kernel: Compiled, loop: Loop, blocks: int, trips: float) -> Phase:
    """The phase of a loop that every block runs equally often."""
    return phase(name, kernel, kernel.body(loop), blocks * trips, trips)


def _references(shape: Shape) -> float:
    return shape.M / shape.chunks


def _again(shape: Shape, card: Device) -> float:
    """Bytes of a chunk's references that the weighted sum must read from memory again."""
    size = 4 * _references(shape) * shape.N
    return size if size > KEPT * card.rate("l2_size") else 0.0


def _by_block(shape: Shape) -> list[tuple[int, int]]:
    """Numbers of queries in a block, and how many blocks have each."""
    blocks = shape.blocks()
    return [(count, blocks.count(count)) for count in sorted(set(blocks), reverse=True)]


def _part(refined: Data, shape: Shape, queries: int, name: str) -> float:
    """The share of one launch in the work of ``refine``."""
    return float(refined[name]) * queries / shape.B / shape.chunks


# ---- Triton -----------------------------------------------------------------------------------


def triton(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The launches of the Triton kernels."""
    for queries, count in _by_block(shape):
        times = count * shape.chunks
        for launch in _centered(shape, queries, card):
            yield launch._replace(times=count)
        made = [
            _triton_distances(shape, queries, card),
            _triton_limits(shape, queries, card),
            _triton_refine(shape, data, queries, card),
            _triton_weigh(shape, queries, card),
        ]
        parts = _stretches(shape, queries, card)
        made.append(_triton_sum(shape, data, queries, parts, card))
        made.append(_triton_merge(shape, queries, parts, card))
        for launch in made:
            yield launch._replace(times=times)


def _centered(shape: Shape, queries: int, card: Device) -> Iterator[Launch]:
    """The launches that centre and split a block of queries."""
    if _few(shape, queries):
        return
    width, portion = 16 * _up(shape.N, 16), 64 * _up(_up(shape.N, 64), 64)
    kernel = kernels.triton_variant(card, "find_center", "fp32")
    programs = _up(width, portion)
    loop = kernels.loop_with_most(kernel, "global")
    phases = (_once(kernel, programs), _loop("features", kernel, loop, programs, portion / 64))
    yield Launch("find_center", kernel, programs, phases, 4 * 16 * shape.N)

    kernel = kernels.triton_variant(card, "split_rows", "CENTERED True")
    turns = _up(width, 1024)
    loops = [_loop("features", kernel, loop, queries, turns) for loop in kernel.loops]
    moved = 8 * queries * shape.N
    yield Launch("split_rows", kernel, queries, (_once(kernel, queries), *loops), moved)


def _few(shape: Shape, queries: int) -> bool:
    """Whether distances are computed from differences."""
    return queries < 16 or shape.N < 32


def _tiles(shape: Shape, queries: int) -> int:
    """Tiles of a chunk's references."""
    return _up(_references(shape), 16 if _few(shape, queries) else TILE)


def _triton_distances(shape: Shape, queries: int, card: Device) -> Launch:
    m = _references(shape)
    words = ("fp32", "PROJECT False")
    if _few(shape, queries):
        kernel, rows, tile = kernels.triton_variant(card, "differences", *words), 4, 16
        panel = 64 if shape.N >= 64 else 16
        main = kernels.loop_with_most(kernel, "fp32")
    else:
        rows, tile, panel = 32, TILE, PANEL
        kernel = kernels.triton_variant(card, "distances", *words, "HIGH True")
        main = kernels.loop_with_most(kernel, "tensor")
    blocks = _up(queries, rows) * _up(m, tile)
    moved = 4 * m * shape.N + 4 * queries * shape.N + 8 * queries * m
    phases = (
        _once(kernel, blocks),
        _loop("features", kernel, main, blocks, _up(shape.N, panel)),
    )
    return Launch("distances", kernel, blocks, phases, moved)


def _triton_limits(shape: Shape, queries: int, card: Device) -> Launch:
    words = (f"FIRST {shape.chunks == 1}", f"PRODUCTS {not _few(shape, queries)}", "GAUSSIAN False")
    kernel = kernels.triton_variant(card, "find_limits", *words)
    tiles = _tiles(shape, queries)
    trips = _up(tiles, 256)
    loops = [_loop("minima", kernel, loop, queries, trips) for loop in kernel.loops]
    phases = (_once(kernel, queries), *loops)
    return Launch("find_limits", kernel, queries, phases, 8 * queries * tiles)


def _triton_refine(shape: Shape, data: Data, queries: int, card: Device) -> Launch:
    m, refined = _references(shape), data["refine"]
    panel = min(4096, max(32, 1 << (shape.N - 1).bit_length()))
    tile = 16 if _few(shape, queries) else TILE
    words = ("PROJECT False", f"TILE {tile}", f"PANEL {panel}")
    kernel = kernels.triton_variant(card, "refine", "fp32", *words)
    tiles = _up(m, TILE)
    segment = segment_of(tiles)
    blocks = queries * _up(tiles, segment)
    inner = _inner_loop_of_refine(kernel)
    pairs, around = kernels.loops_around(kernel, inner)
    turns = _up(shape.N, panel)
    mean, most = _part(refined, shape, queries, "pairs"), float(refined["pairs, most"])
    looked, looked_most = _part(refined, shape, queries, "tiles"), float(refined["tiles, most"])
    body = kernel.body(around)
    skipped = _until_branch(body)
    phases = (
        _once(kernel, blocks),
        phase("tiles", kernel, body, looked, looked_most),
        phase("dead tiles", kernel, skipped, blocks * segment - looked, segment - looked_most),
        phase("pairs", kernel, kernel.body(pairs), mean, most),
        phase("features", kernel, kernel.body(inner), turns * mean, turns * most),
    )
    return Launch("refine", kernel, blocks, phases, 8 * queries * tiles)


def _until_branch(body: Sequence[Instruction]) -> Sequence[Instruction]:
    """What a trip runs that leaves the rest of its body out."""
    jump = next((i for i, one in enumerate(body) if one.base == "BRA"), len(body) - 1)
    return body[: jump + 1]


def _inner_loop_of_refine(kernel: Compiled) -> Loop:
    """The loop over features: the innermost of three."""
    deepest = [loop for loop in kernel.loops if len(kernels.loops_around(kernel, loop)) == 2]
    if len(deepest) != 1:
        raise ValueError(f"{kernel.name} has {len(deepest)} loops in two others; allowed is one.")
    return deepest[0]


def _triton_weigh(shape: Shape, queries: int, card: Device) -> Launch:
    m = _references(shape)
    minima = next(size for size in (256, 1024, 4096) if size >= _tiles(shape, queries))
    words = (f"FIRST {shape.chunks == 1}", "GAUSSIAN False", f"MINIMA {minima}", f"BLOCK {PIECE}")
    kernel = kernels.triton_variant(card, "weigh", *words)
    pairs, blocks = queries * m, queries * _up(m, PIECE)
    moved = 12 * pairs if 12 * pairs > KEPT * card.rate("l2_size") else 0
    return Launch("weigh", kernel, blocks, (_once(kernel, blocks),), moved)


def _stretches(shape: Shape, queries: int, card: Device) -> int:
    """Parts that a chunk's sum is split into."""
    tiles = _up(queries, 64) * _up(shape.N, 128)
    fitting = (1 << 22) // (queries * shape.N)
    return max(1, min(_up(2 * card.sms, tiles), fitting, _up(_references(shape), 128)))


def _triton_sum(shape: Shape, data: Data, queries: int, parts: int, card: Device) -> Launch:
    m, ordered = _references(shape), queries >= SORTED
    rows, features = (16, 64) if queries <= 32 else (64, 64)
    if queries > 128:  # sizes count as powers of two
        rows, features = (32, 64) if queries <= 256 else (64, 128)
    words = ("fp32", "PRECISION tf32x3", f"ROWS {rows}", f"FEATURES {features}")
    kernel = kernels.triton_variant(
        card, "weighted_sum", *words, f"ORDERED {ordered and queries > 16}"
    )
    blocks = _up(shape.N, features) * _up(queries, rows) * parts
    tiles = _up(m / parts, SUM_TILE)
    how = "sorted" if ordered else "unsorted"
    share = data["sums"][f"tiles of {rows}, {how}"]
    most = data["sums"][f"tiles of {rows}, {how}, most"]
    main = kernels.loop_with_most(kernel, "tensor")
    body = kernel.body(main)
    if not ordered:
        share = most = 1.0
    dead = _until_branch(body)
    phases = (
        _once(kernel, blocks),
        phase("tiles", kernel, body, blocks * tiles * share, tiles * most),
        phase("dead tiles", kernel, dead, blocks * tiles * (1 - share), tiles * (1 - most)),
    )
    moved = _again(shape, card) + 4 * parts * queries * shape.N
    return Launch("weighted_sum", kernel, blocks, phases, moved)


def _triton_merge(shape: Shape, queries: int, parts: int, card: Device) -> Launch:
    one = shape.chunks == 1
    words = (f"FIRST {one}", f"LAST {one}", "GAUSSIAN False", "BLOCK 1024")
    kernel = kernels.triton_variant(card, "merge", *words)
    blocks = queries * _up(shape.N, 1024)
    phases = [_once(kernel, blocks)]
    if kernel.loops:
        main = kernels.loop_with_most(kernel, "global")
        # The number of loads shows how often the loop is unrolled.
        loads = kernels.count_of(kernel.body(main), "LDG") / 2
        phases.append(_loop("stretches", kernel, main, blocks, parts / max(1.0, loads)))
    return Launch("merge", kernel, blocks, tuple(phases), 4 * (parts + 1) * queries * shape.N)


# ---- CUDA -------------------------------------------------------------------------------------

_STAGED = 64  # features that a trip of ``distances`` takes
_CENTER = 256  # features of a block of ``find_center``
_REFINE_TILES = 4  # of a block of ``refine``
_RANKED = 16  # queries of a block of ``order_queries``, 16 threads each
_SUM_ROWS, _SUM_FEATURES = 32, 128  # of a block of ``weighted_sum``
_SUM_MEMORY = 3 * 32 * 136 * 4 + 3 * 32 * 40 * 4 + 2048 * 4 + 64 * 4 + 32 * 4


def _distance_memory(queries: int, references: int) -> int:
    stages = 3 if references == 64 else 2
    return stages * _STAGED * (4 * references + 2 * 2 * queries + 4)


_DIFFERENCE_MEMORY = 4 * (4 * 8 * 36 + 4 * 64 * 36) + 8 * 8 * 8


def cuda(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The launches of the CUDA kernels."""
    centered = not _few_in_cuda(shape)
    if centered:
        yield _cuda_center(shape, card)
    for queries, count in _by_block(shape):
        if centered:
            yield _cuda_split(shape, queries, card)._replace(times=count)
        parts, words = _cuda_stretches(shape, queries, card)
        made = [
            _cuda_distances(shape, queries, card),
            _cuda_limits(shape, queries, card),
            _cuda_refine(shape, data, queries, card),
            _cuda_weigh(shape, queries, card),
            *([_cuda_order(shape, queries, card)] if queries > _SUM_ROWS else []),
            _cuda_sum(shape, data, queries, parts, words, card),
            _cuda_merge(shape, queries, parts, card),
        ]
        for launch in made:
            yield launch._replace(times=count * shape.chunks)


def _few_in_cuda(shape: Shape) -> bool:
    return shape.block < 16 or shape.N < 32


def _strided(
    name: str, kernel: Compiled, blocks: int, work: float, *, base: str, each: int = 1
) -> Phase:
    """The phase of the loop with most instructions ``base``, of which a thread needs ``each`` for
    each of its ``work`` items. It may be unrolled."""
    loop = kernels.loop_with_most(kernel, base)
    return _loop(
        name, kernel, loop, blocks, work * each / kernels.count_of(kernel.body(loop), base)
    )


def _cuda_center(shape: Shape, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "find_center<float32>", 32)
    blocks = _up(_STAGED * _up(shape.N, _STAGED), _CENTER)
    return Launch("find_center", kernel, blocks, (_once(kernel, blocks),), 4 * 16 * shape.N)


def _cuda_split(shape: Shape, queries: int, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "split_rows<true>", 64)
    each = shape.N / kernel.threads
    phases = (
        _once(kernel, queries),
        _strided("norms", kernel, queries, each, base="DFMA"),
        _strided("parts", kernel, queries, each, base="F2FP"),
    )
    return Launch("split_rows", kernel, queries, phases, 8 * queries * shape.N)


def _cuda_distances(shape: Shape, queries: int, card: Device) -> Launch:
    m = _references(shape)
    if _few_in_cuda(shape):
        rows, references = 8, 64
        kernel = kernels.cuda_kernel(card, "differences<float32, false>", _DIFFERENCE_MEMORY)
        main, trips = kernels.loop_with_most(kernel, "fp32"), _up(shape.N, PANEL)
    else:
        rows, references = _cuda_tile(m, queries, card)
        name = f"distances<float32, {rows}, {references}, false>"
        kernel = kernels.cuda_kernel(card, name, _distance_memory(rows, references))
        main = kernels.loop_with_most(kernel, "tensor")
        trips = _up(shape.N, _STAGED)
    blocks = _up(m, references) * _up(queries, rows)
    phases = (_once(kernel, blocks), _loop("features", kernel, main, blocks, trips))
    moved = 4 * m * shape.N + 4 * queries * shape.N + 8 * queries * m
    return Launch("distances", kernel, blocks, phases, moved)


def _cuda_tile(m: float, queries: int, card: Device) -> tuple[int, int]:
    """Queries and references of a block of ``distances``."""

    def rounds(rows: int, references: int) -> int:
        return _up(_up(m, references) * _up(queries, rows), card.sms)

    small, medium, large = 5 * rounds(32, 64), 8 * rounds(64, 64), 12 * rounds(64, 128)
    if queries <= 32 or small < min(medium, large):
        return 32, 64
    return (64, 64) if medium < large else (64, 128)


def _cuda_limits(shape: Shape, queries: int, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "find_limits", 64)
    tiles = _up(_references(shape), TILE)
    trips = _up(tiles, kernel.threads)
    loops = [_loop("minima", kernel, loop, queries, trips) for loop in kernel.loops]
    phases = (_once(kernel, queries), *loops)
    return Launch("find_limits", kernel, queries, phases, 8 * queries * tiles)


def _cuda_refine(shape: Shape, data: Data, queries: int, card: Device) -> Launch:
    m, refined = _references(shape), data["refine"]
    kernel = kernels.cuda_kernel(card, "refine<float32>", 1312)
    tiles = _up(m, TILE)
    blocks = queries * _up(tiles, _REFINE_TILES)
    inner = kernels.loop_with_most(kernel, "fp32")
    (of_pair,) = kernels.loops_around(kernel, inner)
    # Two loads, of a query's and of a reference's value, for each step of a lane.
    steps = shape.N / 32 * 2 / kernels.count_of(kernel.body(inner), "LDG")
    pairs, most = _part(refined, shape, queries, "pairs"), float(refined["pairs of 4, most"])
    # A trip is that of all warps, which take turns with the pairs.
    by_warp, slowest = pairs / kernel.warps, _up(most, kernel.warps)
    alive = min(float(blocks), _part(refined, shape, queries, "groups of 4"))
    straight = kernel.straight()
    phases = (
        phase(ONCE, kernel, _until_exit(straight), blocks - alive, 0),
        phase(ONCE, kernel, straight, alive, 1),
        phase("pairs", kernel, kernel.body(of_pair), by_warp, slowest),
        phase("features", kernel, kernel.body(inner), steps * by_warp, steps * slowest),
    )
    return Launch("refine", kernel, blocks, phases, 8 * queries * tiles)


def _until_exit(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """What a block runs that leaves at once."""
    end = next((i for i, one in enumerate(code) if one.base == "EXIT"), len(code) - 1)
    return code[: end + 1]


def _cuda_weigh(shape: Shape, queries: int, card: Device) -> Launch:
    m = _references(shape)
    kernel = kernels.cuda_kernel(card, "weigh", 128)
    blocks, pairs = queries * _up(m, PIECE), queries * m
    minima = _up(_up(m, TILE), kernel.threads)
    phases = (
        _once(kernel, blocks),
        _strided("minima", kernel, blocks, minima, base="LDG"),
    )
    moved = 12 * pairs if 12 * pairs > KEPT * card.rate("l2_size") else 0
    return Launch("weigh", kernel, blocks, phases, moved)


def _cuda_order(shape: Shape, queries: int, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "order_queries", 4 * queries)
    blocks, pieces = _up(queries, _RANKED), _up(_references(shape), PIECE)
    mine = _up(queries, kernel.threads)  # queries that a thread counts
    phases = (
        _once(kernel, blocks),
        _strided("counts", kernel, blocks, mine * pieces, base="LDG"),
        _strided("ranks", kernel, blocks, _up(queries, 16), base="LDS"),
    )
    return Launch("order_queries", kernel, blocks, phases, 4 * queries * pieces)


def _cuda_stretches(shape: Shape, queries: int, card: Device) -> tuple[int, int]:
    """Parts of a chunk's sum, and groups of 32 references in each."""
    block, words = shape.block, _up(shape.chunk, 32)
    tiles = _up(shape.N, _SUM_FEATURES) * _up(block, _SUM_ROWS)
    wanted = min(_up(4 * card.sms, tiles), max(1, (1 << 22) // (block * shape.N)))
    parts = max(min(wanted, _up(words, 4)), _up(words, 64))
    each = _up(words, parts)
    return _up(words, each), each


def _cuda_sum(
    shape: Shape, data: Data, queries: int, parts: int, words: int, card: Device
) -> Launch:
    kernel = kernels.cuda_kernel(card, "weighted_sum<float32>", _SUM_MEMORY)
    blocks = _up(shape.N, _SUM_FEATURES) * _up(queries, _SUM_ROWS) * parts
    main = kernels.loop_with_most(kernel, "tensor")
    how = "listed of 32, sorted" if queries > _SUM_ROWS else "listed of 32, unsorted"
    mean, most = (data["sums"][name] for name in (how, f"{how}, most"))
    body = kernel.body(main)
    phases = (
        _once(kernel, blocks),
        _strided("lists", kernel, blocks, min(queries, _SUM_ROWS), base="LDG"),
        phase("panels", kernel, body, blocks * words * mean, words * most),
    )
    moved = _again(shape, card) + 4 * parts * queries * shape.N
    return Launch("weighted_sum", kernel, blocks, phases, moved)


def _cuda_merge(shape: Shape, queries: int, parts: int, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "merge", 0)
    blocks = queries * _up(shape.N, kernel.threads)
    # One thread of each query finds the log-sum-exp in float64; another block hides its time.
    phases = (
        phase(ONCE, kernel, kernel.straight(without="fp64"), blocks, 1),
        _strided("stretches", kernel, blocks, parts, base="LDG"),
    )
    return Launch("merge", kernel, blocks, phases, 4 * (parts + 1) * queries * shape.N)
