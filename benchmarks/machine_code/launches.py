"""The launches for a shape, by Triton and by CUDA, and how often each loop runs in them.

Those of the CUDA kernels are counted in work.py and get their machine code here.

If a kernel has several configurations, the first is taken, as in deterministic mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.machine_code import kernels, sass, work
from benchmarks.machine_code.data import (
    PARTS,
    PIECE,
    SORTED,
    SUM_ROWS,
    SUM_TILE,
    TILE,
    Shape,
    segment_of,
    up,
)
from benchmarks.machine_code.devices import Device
from benchmarks.machine_code.kernels import Compiled
from benchmarks.machine_code.model import ONCE, Launch, Phase, phase
from benchmarks.machine_code.sass import Instruction, Loop, access_bytes
from benchmarks.machine_code.work import KEPT, Data, Work, by_size, read_again

PANEL = 32  # features that a trip of Triton's ``distances`` takes


def _once(kernel: Compiled, blocks: int) -> Phase:
    return phase(ONCE, kernel, kernel.straight(), blocks, 1)


def _loop(name: str, kernel: Compiled, loop: Loop, blocks: int, trips: float) -> Phase:
    """The phase of a loop that every block runs equally often."""
    return phase(name, kernel, kernel.body(loop), blocks * trips, trips)


def _part(refined: Data, shape: Shape, queries: int, m: int, name: str) -> float:
    """The share of one launch in the work of ``refine``."""
    return float(refined[name]) * queries / shape.B * m / shape.M


# ---- Triton -----------------------------------------------------------------------------------


def triton(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The launches of the Triton kernels.

    Raises:
        ValueError: there are so many features that Triton's blocks have fewer queries than CUDA's.
    """
    most = PARTS // 3 // SUM_ROWS
    if most < shape.N:
        raise ValueError(f"N is {shape.N}; allowed is at most {most}.")
    for queries, blocks in by_size(shape.blocks()):
        for launch in _centered(shape, queries, card):
            yield launch._replace(times=blocks)
        for m, chunks in by_size(shape.chunk_sizes()):
            for launch in _triton_chunk(shape, data, queries, m, card):
                yield launch._replace(times=blocks * chunks)


def _triton_chunk(shape: Shape, data: Data, queries: int, m: int, card: Device) -> Iterator[Launch]:
    """The launches for a block of queries and a chunk of m references."""
    yield _triton_distances(shape, queries, m, card)
    yield _triton_limits(shape, queries, m, card)
    yield _triton_refine(shape, data, queries, m, card)
    yield _triton_weigh(shape, queries, m, card)
    parts = _stretches(shape, queries, m, card)
    yield _triton_sum(shape, data, queries, m, parts, card)
    yield _triton_merge(shape, queries, parts, card)


def _centered(shape: Shape, queries: int, card: Device) -> Iterator[Launch]:
    """The launches that centre and split a block of queries."""
    if _few(shape, queries):
        return
    width, portion = 16 * up(shape.N, 16), 64 * up(up(shape.N, 64), 64)
    kernel = kernels.triton_variant(card, "find_center", "fp32")
    programs = up(width, portion)
    loop = kernels.loop_with_most(kernel, "global")
    phases = (_once(kernel, programs), _loop("features", kernel, loop, programs, portion / 64))
    yield Launch("find_center", kernel, programs, phases, 4 * 16 * shape.N)

    kernel = kernels.triton_variant(card, "split_rows", "CENTERED True")
    turns = up(width, 1024)
    loops = [_loop("features", kernel, loop, queries, turns) for loop in kernel.loops]
    moved = 8 * queries * shape.N
    yield Launch("split_rows", kernel, queries, (_once(kernel, queries), *loops), moved)


def _few(shape: Shape, queries: int) -> bool:
    """Whether distances are computed from differences."""
    return queries < 16 or shape.N < 32


def _tiles(shape: Shape, queries: int, m: int) -> int:
    """Tiles of a chunk's references."""
    return up(m, 16 if _few(shape, queries) else TILE)


def _triton_distances(shape: Shape, queries: int, m: int, card: Device) -> Launch:
    words = ("fp32", "PROJECT False")
    if _few(shape, queries):
        kernel, rows, tile = kernels.triton_variant(card, "differences", *words), 4, 16
        panel = 64 if shape.N >= 64 else 16
        main = kernels.loop_with_most(kernel, "fp32")
    else:
        rows, tile, panel = 32, TILE, PANEL
        kernel = kernels.triton_variant(card, "distances", *words, "HIGH True")
        main = kernels.loop_with_most(kernel, "tensor")
    blocks = up(queries, rows) * up(m, tile)
    moved = 4 * m * shape.N + 4 * queries * shape.N + 8 * queries * m
    phases = (
        _once(kernel, blocks),
        _loop("features", kernel, main, blocks, up(shape.N, panel)),
    )
    return Launch("distances", kernel, blocks, phases, moved)


def _triton_limits(shape: Shape, queries: int, m: int, card: Device) -> Launch:
    first, products = shape.chunks == 1, not _few(shape, queries)
    words = (f"FIRST {first}", f"PRODUCTS {products}", "GAUSSIAN False")
    kernel = kernels.triton_variant(card, "find_limits", *words)
    tiles = _tiles(shape, queries, m)
    trips = up(tiles, 256)
    loops = [_loop("minima", kernel, loop, queries, trips) for loop in kernel.loops]
    phases = (_once(kernel, queries), *loops)
    return Launch("find_limits", kernel, queries, phases, 8 * queries * tiles)


def _triton_refine(shape: Shape, data: Data, queries: int, m: int, card: Device) -> Launch:
    refined = data["refine"]
    panel = min(4096, max(32, 1 << (shape.N - 1).bit_length()))
    tile = 16 if _few(shape, queries) else TILE
    words = ("PROJECT False", f"TILE {tile}", f"PANEL {panel}")
    kernel = kernels.triton_variant(card, "refine", "fp32", *words)
    tiles = up(m, TILE)
    segment = segment_of(tiles)
    blocks = queries * up(tiles, segment)
    inner = _inner_loop_of_refine(kernel)
    pairs, around = kernels.loops_around(kernel, inner)
    turns = up(shape.N, panel)
    mean, most = _part(refined, shape, queries, m, "pairs"), float(refined["pairs, most"])
    looked, looked_most = _part(refined, shape, queries, m, "tiles"), float(refined["tiles, most"])
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


def _triton_weigh(shape: Shape, queries: int, m: int, card: Device) -> Launch:
    minima = next(size for size in (256, 1024, 4096) if size >= _tiles(shape, queries, m))
    words = (f"FIRST {shape.chunks == 1}", "GAUSSIAN False", f"MINIMA {minima}", f"BLOCK {PIECE}")
    kernel = kernels.triton_variant(card, "weigh", *words)
    pairs, blocks = queries * m, queries * up(m, PIECE)
    moved = 12 * pairs if 12 * pairs > KEPT * card.rate("l2_size") else 0
    return Launch("weigh", kernel, blocks, (_once(kernel, blocks),), moved)


def _stretches(shape: Shape, queries: int, m: int, card: Device) -> int:
    """Parts that a chunk's sum is split into."""
    tiles = up(queries, 64) * up(shape.N, 128)
    fitting = (1 << 22) // (queries * shape.N)
    return max(1, min(up(2 * card.sms, tiles), fitting, up(m, 128)))


def _triton_sum(shape: Shape, data: Data, queries: int, m: int, parts: int, card: Device) -> Launch:
    ordered = queries >= SORTED
    rows, features = (16, 64) if queries <= 32 else (64, 64)
    if queries > 128:  # sizes count as powers of two
        rows, features = (32, 64) if queries <= 256 else (64, 128)
    words = ("fp32", "PRECISION tf32x3", f"ROWS {rows}", f"FEATURES {features}")
    kernel = kernels.triton_variant(
        card, "weighted_sum", *words, f"ORDERED {ordered and queries > 16}"
    )
    blocks = up(shape.N, features) * up(queries, rows) * parts
    tiles = up(m / parts, SUM_TILE)
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
    moved = read_again(shape, m, card) + 4 * parts * queries * shape.N
    return Launch("weighted_sum", kernel, blocks, phases, moved)


def _triton_merge(shape: Shape, queries: int, parts: int, card: Device) -> Launch:
    one = shape.chunks == 1
    words = (f"FIRST {one}", f"LAST {one}", "GAUSSIAN False", "BLOCK 1024")
    kernel = kernels.triton_variant(card, "merge", *words)
    blocks = queries * up(shape.N, 1024)
    phases = [_once(kernel, blocks)]
    if kernel.loops:
        main = kernels.loop_with_most(kernel, "global")
        # The number of loads shows how often the loop is unrolled.
        loads = kernels.count_of(kernel.body(main), "LDG") / 2
        phases.append(_loop("stretches", kernel, main, blocks, parts / max(1.0, loads)))
    return Launch("merge", kernel, blocks, tuple(phases), 4 * (parts + 1) * queries * shape.N)


# ---- CUDA -------------------------------------------------------------------------------------


def cuda(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The launches of the CUDA kernels."""
    found = work.of_chunks(data["cuda"], shape, card)
    return _of_work(work.counts(shape, found, card), shape, card)


def cuda_medium(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The same in precision "medium"."""
    shape = shape._replace(type="Rounded")
    found = work.of_chunks(data["medium"], shape, card)
    return _of_work(work.counts(shape, found, card), shape, card)


def cuda_backward(shape: Shape, data: Data, card: Device) -> Iterator[Launch]:
    """The launches of the CUDA kernels for the gradient of the queries."""
    found = work.of_chunks(data["gradient"], shape._replace(backward=True), card)
    every = work.gradient_counts(shape, found, card, references=False, kept=shape.keeps)
    return _of_work(every, shape, card)


# The most threads of a grid that lets the next launch start (let_next_launch_start in
# cuda/intrinsics.h).
MOST_EARLY = 1 << 17


def _of_work(works: Iterator[Work], shape: Shape, card: Device) -> Iterator[Launch]:
    every = list(works)
    for i, one in enumerate(every):
        rounded = shape.type == "Rounded" and not shape.few
        kernel = kernels.cuda_kernel(card, one.kernel, one.shared, rounded=rounded)
        phases = _cuda_phases(one, kernel, shape)
        # What follows the last launch is none of these kernels and does not start early.
        followed = one.times - (i == len(every) - 1)
        early = followed if lets_next_start(kernel, one.blocks) else 0
        yield Launch(one.name, kernel, one.blocks, phases, one.moved, one.times, early)


def lets_next_start(kernel: Compiled, blocks: int) -> bool:
    """Whether a launch lets the next one start before it has ended."""
    small = blocks * kernel.threads <= MOST_EARLY
    return small and any(one.base == "PREEXIT" for one in kernel.code)


# Kernel → its loops that are counted → the loop of the machine code with most of these instructions
# or with most work of this unit, of those that are left. A loop may be unrolled: a trip that is
# counted takes one of these instructions.
_LOOPS = {
    "find_center": {},
    "split_rows": {"parts": "F2FP", "rest": "F2FP", "norms": "FMNMX", "scaled": "STG"},
    "distances": {"features": "tensor", "turns": "fp64", "totals": "fp32"},
    "differences": {"features": "fp32"},
    "weigh": {"turns": "fp32", "rounds": "fp32", "zeros": "STG", "minima": "LDG"},
    "order_queries": {"counts": "LDG", "ranks": "LDS"},
    "list_references": {
        "panels": "STG",
        "rest": "STG",
        "words": "LDG",
        "places": "STS",
        "bits": "POPC",
        "sums": "STS",
        "counts": "LDG",
        "ranks": "LDS",
    },
    "weighted_sum": {"panels": "tensor", "segments": "STG"},
    "merge": {"parts": "LDG", "pieces": "LDG"},
    "pull": {"pairs": "fp32"},
    "find_coefficients": {"pairs": "fp32"},
    "finish_moments": {},
    "merge_gradient": {"parts": "LDG"},
}


def _cuda_phases(one: Work, kernel: Compiled, shape: Shape) -> tuple[Phase, ...]:
    if one.name == "refine":
        return _refine_phases(one, kernel, shape.N)
    if one.name == "find_limits":
        return _limits_phases(one, kernel)
    if one.name == "finish_distances":
        return _finish_phases(one, kernel)
    # One thread of each query of ``merge`` finds the log-sum-exp in float64; another block hides
    # its time.
    straight = kernel.straight(without="fp64" if one.name == "merge" else None)
    if "alive" in one.loops:
        phases = _once_if_alive(one, kernel, straight)
    elif one.name in _BY_ONE_WARP:
        phases = _once_by_few(one, kernel, straight)
    else:
        once = phase(ONCE, kernel, straight, one.blocks, 1)
        phases = [_with_stored(once, one.stored, kernel.threads)]
    if one.name == "split_rows":  # threads without a pair load the last one again
        share = min(1.0, shape.N / (2 * work.HELD * kernel.threads))
        phases = [_with_shares(part, {"LDG": share}) for part in phases]
    left = list(kernel.loops)
    for name, what in _LOOPS[one.name].items():
        if name not in one.loops:
            continue
        loop = kernels.loop_with_most(kernel._replace(loops=left), what)
        left.remove(loop)
        body = kernel.body(loop, _without_loads(kernel, loop) if name == "pairs" else frozenset())
        trips, most, _, stored, spread = one.loops[name]
        each = _trips_at_once(one.kernel, name, what, kernels.count_of(body, what))
        threads, parts = kernel.threads, [phase(name, kernel, body, trips / each, most / each)]
        if (one.name, name) == ("weigh", "turns"):  # of single warps
            threads, parts = 32, _by_warps(name, kernel, body, one.loops[name], one.blocks)
        of_trip = None if stored is None else each * stored
        for part in parts:
            found = _with_shares(part, {"LDG": spread}) if spread != 1 else part
            phases.append(_with_stored(found, of_trip, threads))
    return with_copied(phases, one, kernel)


def _trips_at_once(kernel: str, loop: str, what: str, found: int) -> float:
    """Trips that are counted of a loop in one of the machine code."""
    if not what.isupper():
        return 1
    for_warpgroups = kernel.startswith("list_references") and kernel.endswith("true>")
    stores = 4 if for_warpgroups else 2
    known = {"places": found / 32, "panels": found / stores, "segments": 1}
    return known.get(loop, found)


def _without_loads(kernel: Compiled, loop: Loop) -> frozenset[int]:
    """The way past the loads of a loop over pairs.

    A query at a limit takes it, where all weights are zero. Such queries are rare.
    """
    return frozenset().union(
        *(
            less
            for both in kernel.arms(loop)
            for less, more in (both, both[::-1])
            if kernel.has(more, "LDG") and not kernel.has(less, "LDG")
        )
    )


_STORES = ("STG", "RED", "REDG", "ATOMG")


def _with_stored(part: Phase, stored: float | None, threads: int) -> Phase:
    """The phase, whose stores write so many bytes in a trip of so many threads."""
    coded = threads * sum(access_bytes(one) for one in part.code if one.base in _STORES)
    if stored is None or coded == 0:
        return part
    return _with_shares(part, dict.fromkeys(_STORES, stored / coded))


# Kernel → which parts of the code that runs once, each up to a barrier, a single warp runs: the
# arithmetic in float64 for all, and the end.
_BY_ONE_WARP = {"weigh": (1, 3), "pull": (0, 2), "find_coefficients": (0, 2)}


def _once_by_few(one: Work, kernel: Compiled, straight: Sequence[Instruction]) -> list[Phase]:
    """What blocks run once, if a single warp runs some parts of it."""
    code: dict[bool, list[Instruction]] = {False: [], True: []}
    for i, part in enumerate(_between_barriers(straight)):
        code[i in _BY_ONE_WARP[one.name]] += part
    by_one = phase(ONCE, kernel, code[True], one.blocks, 1)._replace(warps=1)
    return [
        phase(ONCE, kernel, code[False], one.blocks, 1),
        _with_stored(by_one, one.stored, 32),
    ]


def with_copied(phases: Sequence[Phase], one: Work, kernel: Compiled) -> tuple[Phase, ...]:
    """The phases, whose asynchronous copies read as many bytes as are counted.

    The machine code has more: copies of some threads only, and of panels after the last one.
    """
    coded = sum(part.trips * copied_bytes(part.code, kernel.threads) for part in phases)
    if coded == 0:
        return tuple(phases)
    share = one.total.copied / coded
    return tuple(_with_shares(part, {"LDGSTS": share}) for part in phases)


def copied_bytes(code: Sequence[Instruction], threads: int) -> int:
    """Bytes that the asynchronous copies of the code read if all threads run all of them."""
    return threads * sum(access_bytes(one) for one in code if one.base == "LDGSTS")


def _with_shares(part: Phase, shares: Mapping[str, float]) -> Phase:
    """The phase, with accesses to global memory that move these shares of their bytes."""
    found = {i: shares[one.base] for i, one in enumerate(part.code) if one.base in shares}
    return _with_factors(part, found)


def _with_factors(part: Phase, found: dict[int, float]) -> Phase:
    return part._replace(factors=tuple(sorted((dict(part.factors) | found).items())))


def _finish_phases(one: Work, kernel: Compiled) -> tuple[Phase, ...]:
    loop = kernels.loop_with_most(kernel, "global")
    body = kernel.body(loop)
    loads = kernels.count_of(body, "LDG")
    # One is of squares, in the forward pass. All warps of a block load the same ones, which come
    # from the L1 cache then.
    squares = loads - work.FINISH_QUERIES
    share = (loads - squares + squares / work.FINISH_WARPS) / loads
    # Elsewhere all lanes load the same number, in 32 of 256 bytes.
    once = phase(ONCE, kernel, kernel.straight(), one.blocks, 1)
    slices = _loop("slices", kernel, loop, one.blocks, one.loops["slices"].most)
    return _with_shares(once, {"LDG": 1 / 8}), _with_shares(slices, {"LDG": share})


def _limits_phases(one: Work, kernel: Compiled) -> tuple[Phase, ...]:
    turn = kernels.loop_with_most(kernel, "ATOMG")
    minima, turns = one.loops["minima"].most, one.loops["turns"]
    others = [loop for loop in kernel.loops if loop != turn]
    # Between the first two barriers, and between the last two, one warp works for all.
    parts = _between_barriers(kernel.straight())
    for_all = phase(ONCE, kernel, parts[1] + parts[3], one.blocks, 1)._replace(warps=1)
    body = kernel.body(turn, _stores_left_out(kernel, turn, one))
    return (
        phase(ONCE, kernel, parts[0] + parts[2] + parts[4], one.blocks, 1),
        for_all,
        *(_loop("minima", kernel, loop, one.blocks, minima) for loop in others),
        *(
            _with_stored(part, turns.stored, 32)
            for part in _by_warps("turns", kernel, body, turns, one.blocks)
        ),
    )


def _stores_left_out(kernel: Compiled, turn: Loop, one: Work) -> frozenset[int]:
    """The stores to the list that a turn does not make, because no lane has a pair for them."""
    made = one.loops["stores"].trips / max(1.0, one.loops["turns"].trips)
    stores = [
        places
        for both in kernel.arms(turn)
        for places in both
        if any(_stores_one(kernel.code[i]) for i in places)
    ]
    return frozenset().union(*stores[round(made) :])


def _stores_one(one: Instruction) -> bool:
    return one.base == "STG" and access_bytes(one) == 4


def _between_barriers(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The code in parts, each of which ends with a barrier of the block or with the code."""
    found: list[list[Instruction]] = [[]]
    for one in code:
        found[-1].append(one)
        if one.base == "BAR":
            found.append([])
    return found


def _by_warps(
    name: str, kernel: Compiled, code: Sequence[Instruction], loop: work.Loop, blocks: int
) -> list[Phase]:
    """The phases of a loop whose trips are those of single warps, which share them out.

    In the last round of a block a part of its warps has one.
    """
    rounds, left = divmod(up(loop.most, 1), kernel.warps)
    share = loop.trips / (blocks * loop.most) if loop.most else 0.0
    found = [phase(name, kernel, code, blocks * rounds * share, rounds)]
    if left:
        last = phase(name, kernel, code, blocks * share, 1)
        found.append(last._replace(warps=left))
    return found


def _refine_phases(one: Work, kernel: Compiled, features: int) -> tuple[Phase, ...]:
    inner = kernels.loop_with_most(kernel, "fp32")
    (around,) = kernels.loops_around(kernel, inner)
    pairs, rows = one.loops["pairs"], one.loops["rows"]
    whole, last = _trips_of_refine(kernel, inner)
    # Two loads, of a query's and of a reference's value, for each step of a lane.
    ahead = 32 * kernels.count_of(whole, "LDG") // 2  # features of a trip
    turns, left = divmod(features, ahead)
    # Other rows of queries come from the L1 cache.
    read = (1 + rows.trips / max(1.0, pairs.trips)) / 2
    found = [phase(ONCE, kernel, kernel.straight(), one.blocks, 1)]
    for name, code, times, share in (
        ("pairs", kernel.body(around, _far_from(kernel, around, inner)), 1, 1.0),
        ("features", whole, turns, read),
        ("features", last, int(left > 0), read * left / ahead),
    ):
        for part in _by_warps(name, kernel, code, pairs, one.blocks):
            longer = part._replace(trips=times * part.trips, most=times * part.most)
            reading = _with_shares(longer, {"LDG": share})
            found.append(_with_stored(reading, pairs.stored, 32))
    return tuple(found)


def _far_from(kernel: Compiled, around: Loop, inner: Loop) -> frozenset[int]:
    """Ways through a loop that hold other inner loops than one.

    These repeat the sum of squares for far references, which are rare.
    """
    others = [
        loop.body - inner.body for loop in kernel.loops if around.holds(loop) and loop != inner
    ]
    return frozenset().union(
        *(
            places
            for both in kernel.arms(around)
            for places in both
            if not places & inner.body and any(places & other for other in others)
        )
    )


def _trips_of_refine(
    kernel: Compiled, inner: Loop
) -> tuple[Sequence[Instruction], Sequence[Instruction]]:
    """A trip through whole steps, and the last one, whose loads are checked. Each has its loads."""
    places = sass.basic_blocks(kernel.code, sass.own(inner, kernel.loops))
    stretches = [[kernel.code[i] for i in part] for part in places]
    loading = [part for part in stretches if kernels.count_of(part, "LDG")]
    unchecked = max(
        loading, key=lambda part: sum(one.base == "LDG" and not one.predicate for one in part)
    )
    whole = [one for part in stretches if part == unchecked or part not in loading for one in part]
    last = [one for part in stretches if part != unchecked for one in part]
    return whole, last


def _once_if_alive(one: Work, kernel: Compiled, straight: Sequence[Instruction]) -> list[Phase]:
    """What blocks run once, if those without work leave early."""
    alive = one.loops["alive"]
    return [
        phase(ONCE, kernel, _until_exit(straight), one.blocks - alive.trips, 0),
        phase(ONCE, kernel, straight, alive.trips, alive.most),
    ]


def _until_exit(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """What a block runs that leaves at once."""
    end = next((i for i, one in enumerate(code) if one.base == "EXIT"), len(code) - 1)
    return code[: end + 1]
