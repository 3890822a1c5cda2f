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
    words = (f"PRODUCTS {not _few(shape, queries)}", "GAUSSIAN False")
    kernel = kernels.triton_variant(card, "find_limits", *words)
    tiles = _tiles(shape, queries)
    trips = _up(tiles, 256)
    loops = [_loop("minima", kernel, loop, queries, trips) for loop in kernel.loops]
    phases = (_once(kernel, queries), *loops)
    return Launch("find_limits", kernel, queries, phases, 8 * queries * tiles)


def _triton_refine(shape: Shape, data: Data, queries: int, card: Device) -> Launch:
    m, refined = _references(shape), data["refine"]["triton"]
    panel = min(4096, max(32, 1 << (shape.N - 1).bit_length()))
    words = (f"TILE {16 if _few(shape, queries) else TILE}", f"PANEL {panel}")
    kernel = kernels.triton_variant(card, "refine", "fp32", *words)
    tiles = _up(m, TILE)
    segment = segment_of(tiles, "triton")
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


# ---- CUDA: the five kernels, not the single pass -----------------------------------------------

_SUM_MEMORY = 3 * 32 * 136 * 4 + 3 * 32 * 40 * 4 + 2048 * 4 + 64 * 4
_SUM_COPIES = 8  # asynchronous copies of a thread for a panel


def _tile_memory(queries: int) -> int:
    return 4 * (4 * queries * 36 + 4 * 64 * 36 + queries + 8 * queries)


def cuda(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The launches of the five CUDA kernels."""
    for queries, count in _by_block(shape):
        parts, words = _cuda_stretches(shape, queries, card)
        made = [
            _cuda_distances(shape, queries, card),
            _cuda_refine(shape, data, queries, card),
            _cuda_weigh(shape, queries, card),
            _cuda_sum(shape, data, queries, parts, words, card),
            _cuda_merge(shape, queries, parts, card),
        ]
        for launch in made:
            yield launch._replace(times=count * shape.chunks)


def _cuda_distances(shape: Shape, queries: int, card: Device) -> Launch:
    m = _references(shape)
    tiles = _up(m, TILE)
    if shape.block < 16 or (queries < 16 and len(shape.blocks()) == 1):
        rows, name = 8, "differences<float32, false>"
        kernel = kernels.cuda_kernel(card, name, _tile_memory(8))
        main = kernels.loop_with_most(kernel, "fp32")
    else:
        few = queries <= 32 or tiles * _up(queries, 64) < 2 * card.sms
        rows = 32 if few else 64
        name = f"distances<float32, {rows}, false>"
        kernel = kernels.cuda_kernel(card, name, _tile_memory(rows))
        main = kernels.loop_with_most(kernel, "tensor")
    blocks = tiles * _up(queries, rows)
    trips = _up(shape.N, PANEL)
    phases = (_once(kernel, blocks), _loop("features", kernel, main, blocks, trips))
    moved = 4 * m * shape.N + 4 * queries * shape.N + 8 * queries * m
    return Launch("distances", kernel, blocks, phases, moved)


def _cuda_refine(shape: Shape, data: Data, queries: int, card: Device) -> Launch:
    m, refined = _references(shape), data["refine"]["cuda"]
    kernel = kernels.cuda_kernel(card, "refine<float32>", 32)
    tiles = _up(m, TILE)
    segment = segment_of(tiles, "cuda")
    blocks = queries * _up(tiles, segment)
    # Two loops go over features; that of the differences has a DADD for every DFMA.
    inner = next(loop for loop in kernel.loops if _finds_differences(kernel.body(loop)))
    around = kernels.loops_around(kernel, inner)
    unrolled = kernels.count_of(kernel.body(inner), "DFMA")
    by_warp = _part(refined, shape, queries, "pairs") / kernel.warps
    most = float(refined["pairs, most"]) / kernel.warps
    turns = shape.N / 32 / unrolled
    phases = (
        _once(kernel, blocks),
        _loop("tiles", kernel, around[-1], blocks, segment),
        phase("pairs", kernel, kernel.body(around[0]), by_warp, most),
        phase("features", kernel, kernel.body(inner), by_warp * turns, most * turns),
    )
    return Launch("refine", kernel, blocks, phases, 4 * queries * tiles)


def _finds_differences(code: Sequence[Instruction]) -> bool:
    return kernels.count_of(code, "DADD") == kernels.count_of(code, "DFMA") > 0


def _cuda_weigh(shape: Shape, queries: int, card: Device) -> Launch:
    m = _references(shape)
    kernel = kernels.cuda_kernel(card, "weigh", 64)
    main = kernels.loop_with_most(kernel, "mufu")
    minima = kernels.loop_with_most(kernel, "LDG")
    unrolled = kernels.count_of(kernel.body(minima), "LDG")
    phases = (
        _once(kernel, queries),
        _loop("minima", kernel, minima, queries, m / kernel.threads / unrolled),
        _loop("pairs", kernel, main, queries, _up(m, kernel.threads)),
    )
    pairs = queries * m
    moved = 12 * pairs if 12 * pairs > KEPT * card.rate("l2_size") else 0
    return Launch("weigh", kernel, queries, phases, moved)


def _cuda_stretches(shape: Shape, queries: int, card: Device) -> tuple[int, int]:
    """Parts of a chunk's sum, and groups of 32 references in each."""
    block, words = shape.block, _up(shape.chunk, 32)
    tiles = _up(shape.N, 128) * _up(block, 32)
    wanted = min(_up(2 * card.sms, tiles), max(1, (1 << 22) // (block * shape.N)))
    parts = max(min(wanted, _up(words, 4)), _up(words, 64))
    each = _up(words, parts)
    return _up(words, each), each


def _cuda_sum(
    shape: Shape, data: Data, queries: int, parts: int, words: int, card: Device
) -> Launch:
    kernel = kernels.cuda_kernel(card, "weighted_sum<float32>", _SUM_MEMORY)
    blocks = _up(shape.N, 128) * _up(queries, 32) * parts
    main = kernels.loop_with_most(kernel, "tensor")
    share = data["sums"]["listed of 32, unsorted"]
    panels = _up(words * share, 1)
    phases = [_once(kernel, blocks), _loop("panels", kernel, main, blocks, panels)]
    for loop in kernel.loops:
        if main.holds(loop):
            copies = kernels.count_of(kernel.body(loop), "LDGSTS")
            if copies:
                trips = panels * _SUM_COPIES / copies
                phases.append(_loop("copies", kernel, loop, blocks, trips))
    moved = _again(shape, card) + 4 * parts * queries * shape.N
    return Launch("weighted_sum", kernel, blocks, tuple(phases), moved)


def _cuda_merge(shape: Shape, queries: int, parts: int, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "merge", 0)
    blocks = queries * _up(shape.N, kernel.threads)
    main = kernels.loop_with_most(kernel, "LDG")
    trips = parts / kernels.count_of(kernel.body(main), "LDG")
    phases = (_once(kernel, blocks), _loop("stretches", kernel, main, blocks, trips))
    return Launch("merge", kernel, blocks, phases, 4 * (parts + 1) * queries * shape.N)


# ---- CUDA: the single pass in clusters ---------------------------------------------------------

_SLICE, _CLUSTER, _STRETCHES = 192, 16, 8  # features of a block; blocks; clusters at once
_PASS_TILE, _PASS_WARPS = 16, 8


def _pass_memory(queries: int) -> int:
    pairs = queries * _PASS_TILE
    rows = 4 * (queries + 3 * _PASS_TILE) * (_SLICE + 4)
    return rows + (2 * 4 + 8 + 8) * pairs + 4 * queries * (_PASS_TILE + 4 + 3)


def single_pass(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The launches of the single pass, where the library uses it.

    That is for 65 to 128 queries and 512 to 3072 features on sm_90 and sm_100. Eight clusters are
    assumed to work at once.
    """
    fits = 512 <= shape.N <= _SLICE * _CLUSTER and 64 < shape.B <= 128
    if not fits or card.architecture not in (90, 100):
        return
    yield _single_pass(shape, data, card)
    yield _merge_passes(shape, card)


def _single_pass(shape: Shape, data: Data, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "single_pass<float32, 128>", _pass_memory(128))
    cluster = _up(shape.N, _SLICE)
    blocks, tiles = cluster * _STRETCHES, _up(shape.M / _STRETCHES, _PASS_TILE)
    main = max(kernel.loops, key=lambda loop: len(loop.body))
    pairs = float(data["single pass"]["pairs of the slowest warp"])
    phases = [_once(kernel, blocks), _loop("tiles", kernel, main, blocks, tiles)]
    for loop in kernel.loops:
        part = _part_of_pass(kernel, loop, cluster, pairs) if main.holds(loop) else None
        if part is not None:
            phases.append(_loop(part[0], kernel, loop, blocks, tiles * part[1]))
    missing = set(_PASS_PARTS).difference(phase.name for phase in phases)
    if missing:
        raise ValueError(f"{kernel.name} has no loop for {', '.join(missing)}.")
    moved = 4 * shape.M * shape.N + 4 * _STRETCHES * shape.B * shape.N
    return Launch("single_pass", kernel, blocks, tuple(phases), moved)


_PASS_PARTS = ("copies", "products", "pairs", "features of a pair", "over all blocks")


def _part_of_pass(
    kernel: Compiled, loop: Loop, cluster: int, pairs: float
) -> tuple[str, float] | None:
    """What a loop within a tile does, judged by its instructions, and its number of trips.

    None for a loop that is there for clusters of other sizes.
    """
    code = kernel.body(loop)
    loads, stores, doubles, fused = (
        kernels.count_of(code, name) for name in ("LD", "ST", "DADD", "DFMA")
    )
    holds = any(loop.holds(other) for other in kernel.loops)
    if copies := kernels.count_of(code, "LDGSTS"):  # copies the next references
        return "copies", _PASS_TILE * _SLICE / 4 / (32 * _PASS_WARPS) / copies
    if kernels.count_of(code, "tensor"):  # each warp takes half of the slice
        return "products", _SLICE / 2 / PANEL
    if fused and kernels.count_of(code, "LDS") and not loads:
        inner = ("features of a pair", pairs * _SLICE / 32 / fused)
        return ("pairs", pairs) if holds else inner
    if loads == 0 and stores:  # writes the sums
        return "to all blocks", cluster / stores
    if (loads and holds) or loads == doubles == 2 * cluster or loads == doubles == cluster:
        return "over all blocks", 1.0
    return None


def _merge_passes(shape: Shape, card: Device) -> Launch:
    kernel = kernels.cuda_kernel(card, "merge_passes", 8 * 264)
    blocks = shape.B * _up(shape.N, 256)
    main = kernels.loop_with_most(kernel, "LDG")
    trips = _STRETCHES / kernels.count_of(kernel.body(main), "LDG")
    phases = (_once(kernel, blocks), _loop("stretches", kernel, main, blocks, trips))
    return Launch("merge_passes", kernel, blocks, phases, 4 * _STRETCHES * shape.B * shape.N)
