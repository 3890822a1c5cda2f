"""A model of one multiprocessor that runs a piece of machine code with some warps.

Instructions of a warp start in order. One starts when the stall of its predecessor is over, the
scoreboards that it waits for are free, and its scheduler and its unit accept it. Barriers wait for
all warps of a block. Asynchronous copies and matrix instructions of a warp group go on in the
background until something waits for them. With a single warp the model shows the cost of latencies.
With as many warps as a multiprocessor holds, it gives the predicted time and how busy each unit is.

The model leaves out misses of the instruction cache and the L2 cache, conflicts of register banks,
the limits of queues, and the direction of branches: it runs the whole piece.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.machine_code.devices import Device
from benchmarks.machine_code.sass import (
    NO_SCOREBOARD,
    Instruction,
    access_bytes,
    jump_target,
    unit_of,
)

SCHEDULERS = 4
BACKLOG = 48  # clocks of work in a unit's queue beyond which instructions must wait
IN_FLIGHT = 32 << 10  # the most bytes that a multiprocessor requests from the L2 cache; assumed
LATENCY = {
    "mufu": 24,
    "convert": 20,
    "fp64": 16,
    "constant": 24,
    "tensor": 33,
    "alu": 6,
    "fp32": 4,
    "imad": 5,
    "uniform": 8,
    "tensor_memory": 30,
}  # unit → clocks to its result, where a scoreboard waits for it; assumed
BARRIER = 20  # clocks between the last warp's arrival and the first warp's start; assumed
RUN_IN = 1  # trips before those that are counted
OPERANDS = 12  # clocks until a unit has read its operands; assumed
_POLL = 8  # clocks until a warp looks again whether a signal was sent
JUMP = 8  # clocks of a jump back; assumed
_SHARED_BY_ALL = ("shared", "global", "convert64")  # units that the four schedulers share
_MATRIX = re.compile(r"(\d+)x(\d+)x(\d+)")
_TENSOR_MEMORY = 128  # bytes a clock of tensor memory for the warps of one scheduler; assumed
_OLD_MATRIX = {"1688": (16, 8, 8), "16816": (16, 8, 16), "1684": (16, 8, 4), "16832": (16, 8, 32)}


class Run(NamedTuple):
    """One trip through the code by all warps at once."""

    clocks: float
    busy: dict[str, float]
    """Unit → clocks of a trip during which it is busy, the mean over the schedulers."""
    waits: dict[str, float]
    """Name of an instruction → clocks of a warp's trip that it waited to start."""

    @property
    def bound(self) -> str:
        """The unit that is busy most of the time ("issue": the schedulers), or "latency"."""
        unit = max(self.busy, key=lambda name: self.busy[name] * (0.98 if name == "issue" else 1))
        return unit if self.busy[unit] >= 0.7 * self.clocks else "latency"


# ---- work of an instruction --------------------------------------------------------------------


class Need(NamedTuple):
    """The unit that an instruction uses."""

    unit: str
    occupancy: float
    """Clocks that the instruction occupies the unit."""
    latency: float
    """Clocks from there to the result."""
    in_shared: float = 0.0
    """Clocks of shared memory besides: to read operands, or to write what is copied when it
    arrives."""


def matrix_shape(instruction: Instruction) -> tuple[int, int, int]:
    """M, N and K of a matrix instruction.

    Raises:
        ValueError: its name has no shape, as that of ``tcgen05`` if its descriptor is no constant.
    """
    if found := _MATRIX.search(instruction.name):
        m, n, k = (int(size) for size in found.groups())
        return m, n, k
    for part in instruction.name.split(".")[1:]:
        if part in _OLD_MATRIX:
            return _OLD_MATRIX[part]
    raise ValueError(f"{instruction.name} has no shape in its name.")


def _matrix(instruction: Instruction, card: Device) -> Need:
    m, n, k = matrix_shape(instruction)
    wide = instruction.base.startswith(("HGMMA", "UTC"))
    kind = "tf32" if ".TF32" in instruction.name else "f16"
    if instruction.name.endswith(".16816.F16"):
        kind = "f16_sums"
    rate = card.rate(f"{'wgmma' if wide else 'mma'}_{kind}")
    if wide and rate == 0:
        raise ValueError(f"{card.name} has no {instruction.name}.")
    clocks = m * n * k / rate
    if instruction.base == "HGMMA":
        # Each of the four warps issues its quarter to the unit of its own scheduler. Operands come
        # from shared memory: all of B, and all of A unless that is in registers.
        size = 4 if kind == "tf32" else 2
        in_shared = n * k * size + (0 if _first_in_registers(instruction) else m * k * size)
        reading = in_shared / card.rate("shared")
        return Need("tensor", max(clocks, reading), LATENCY["tensor"], reading / SCHEDULERS)
    if wide:
        return _in_tensor_memory(instruction, clocks, card)
    return Need("tensor", clocks * SCHEDULERS, LATENCY["tensor"])


def _in_tensor_memory(instruction: Instruction, clocks: float, card: Device) -> Need:
    """Of ``tcgen05.mma``. 64 rows take as long as 128. Operands come from shared memory, but for
    the first one if it is in tensor memory.

    Measured were 48.6, 64.6 and 128.6 clocks with 128 × 64, 128 × 128 and 128 × 256 sums and both
    operands in shared memory (SemiAnalysis, microbench-blackwell, 2026); this gives 48, 64 and 128.
    """
    m, n, k = matrix_shape(instruction)
    size = 4 if ".TF32" in instruction.name else 2
    in_shared = n * k * size + (0 if instruction.operands.startswith("tmem") else m * k * size)
    reading = in_shared / card.rate("shared")
    clocks *= max(1.0, 128 / m)
    return Need("tensor", max(clocks, reading), LATENCY["tensor"], reading)


def _first_in_registers(instruction: Instruction) -> bool:
    operands = [part.strip() for part in instruction.operands.split(",")]
    return len(operands) > 1 and operands[1].startswith("R")


def _shared(instruction: Instruction, card: Device, factor: float) -> Need:
    if instruction.base == "SHFL":
        return Need("shared", 1, card.rate("shared_latency") - 5)
    if instruction.base in ("REDUX", "CREDUX"):  # half the rate of a shuffle; latency assumed
        return Need("shared", 2, card.rate("shared_latency") - 5)
    if instruction.base in ("LDSM", "STSM"):
        found = re.search(r"\.M88(?:\.(\d))?", instruction.name)
        lines = float(found[1] or 1) if found else 4.0
    else:
        lines = max(1.0, 32 * access_bytes(instruction) / card.rate("shared"))
    return Need("shared", lines * factor, card.rate("shared_latency"))


def _registers_of(instruction: Instruction) -> int:
    """Registers that a lane loads from tensor memory, or stores: 32 of "LDTM.16dp256bit.x8"."""
    shape, times = 1, 1
    for part in instruction.name.split("."):
        if found := re.search(r"dp(\d+)bit", part):
            shape = max(1, int(found[1]) // 64)
        elif found := re.fullmatch(r"x(\d+)", part):
            times = int(found[1])
    return shape * times


def l2_port(card: Device) -> float:
    """Bytes a clock from the L2 cache to one multiprocessor while all of them read."""
    return min(64.0, card.rate("l2") / card.sms / card.rate("clock"))


def _global(instruction: Instruction, card: Device, factor: float) -> Need:
    moved = 32 * access_bytes(instruction)
    if instruction.base in ("LDL", "STL"):  # spilled registers hit the L1 cache
        return Need("shared", moved / card.rate("shared"), card.rate("shared_latency"))
    written = factor * moved / card.rate("shared") if instruction.base == "LDGSTS" else 0.0
    return Need("global", factor * moved / l2_port(card), card.rate("l2_latency"), written)


def need_of(instruction: Instruction, card: Device, factor: float = 1.0) -> Need:
    """The unit of an instruction.

    Args:
        factor: wavefronts over the ideal of an access to shared memory, share of the bytes of an
            access to global memory that are moved.
    """
    unit = unit_of(instruction)
    if unit == "tensor":
        return _matrix(instruction, card)
    if unit == "shared":
        return _shared(instruction, card, factor)
    if unit == "tensor_memory":
        moved = 32 * 4 * _registers_of(instruction)
        return Need(unit, moved / _TENSOR_MEMORY, LATENCY[unit])
    if unit == "global":
        return _global(instruction, card, factor)
    if unit in ("branch", "barrier", "constant", "uniform"):
        return Need(unit, 1, LATENCY.get(unit, 0))
    if unit == "convert" and "64" in instruction.name:
        return Need("convert64", 32 / card.rate("convert64"), LATENCY["convert"])
    if unit == "fp64" or unit in ("fp32", "imad", "alu", "mufu", "convert"):
        lanes = card.rate(unit) / SCHEDULERS
        double = 2 if instruction.base in ("FFMA2", "FADD2", "FMUL2") else 1
        return Need(unit, double * 32 / lanes, LATENCY[unit])
    raise ValueError(f"{instruction.name} uses the unit {unit!r}, which has no rate.")


# ---- warps ------------------------------------------------------------------------------------


@dataclass
class _Warp:
    block: int
    scheduler: int
    leader: bool
    """Whether it issues the instructions that one thread of a block executes."""
    at: int = 0
    trip: int = 0
    ready: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: float = 0.0
    """When the copies of the open group arrive."""
    groups: list[float] = field(default_factory=list)
    matrix: float = 0.0
    matrix_groups: list[float] = field(default_factory=list)
    signals: int = 0
    """For how many signals of products in tensor memory it has waited."""


class _Step(NamedTuple):
    """An instruction with everything that is the same in every trip."""

    instruction: Instruction
    need: Need
    wait: tuple[int, ...]
    stall: int
    places: tuple[int, ...]
    """Index of its unit among all units, by scheduler."""
    backlog: float
    waits_for: str
    """The background work that it waits for: "copies", "group", "block" or ""."""
    pause: float
    """Clocks that the warp pauses after it, for a fence of the device."""
    by_leader: bool
    """Whether one warp of a block runs it, and the others jump over it."""


class _Multiprocessor:
    def __init__(
        self, code: Sequence[Instruction], card: Device, warps: int, blocks: int, trips: int,
        factors: Mapping[int, float],
    ) -> None:  # fmt: skip
        self.trips, self.per_block = trips, warps
        self.places: dict[tuple[str, int], int] = {}
        by_leader = _run_by_leader(code)
        self.steps = [
            self.step_of(one, need_of(one, card, factors.get(i, 1.0)), card, i in by_leader)
            for i, one in enumerate(code)
        ]
        self.shared = self.places.setdefault(("shared", -1), len(self.places))
        self.warps = [
            _Warp(block, (block * warps + w) % SCHEDULERS, w == 0)
            for block in range(blocks)
            for w in range(warps)
        ]
        self.free = [0.0] * len(self.places)
        self.issue = [0.0] * SCHEDULERS
        self.busy: dict[str, float] = defaultdict(float)
        self.waits: dict[str, float] = defaultdict(float)
        self.arrived: dict[int, list[int]] = defaultdict(list)
        self.block_matrix: dict[int, float] = defaultdict(float)
        self.signals: dict[int, list[float]] = defaultdict(list)  # when products are done
        sent = sum(one.base == "UTCBAR" for one in code)
        # Whether each wait is for the signal that is sent in its place.
        self.waits_for_each = sent > 0 and sent == sum(_waits_for(one) == "block" for one in code)
        # Times and clocks of shared memory: to write copies that arrive, and to read operands of
        # products in tensor memory that begin.
        self.later: list[tuple[float, float]] = []
        self.end = 0.0
        self.queue: list[tuple[float, int]] = []

    def step_of(self, instruction: Instruction, need: Need, card: Device, by_leader: bool) -> _Step:
        shared = need.unit in _SHARED_BY_ALL or instruction.base.startswith("UTC")
        keys = [(need.unit, -1 if shared else scheduler) for scheduler in range(SCHEDULERS)]
        places = tuple(self.places.setdefault(key, len(self.places)) for key in keys)
        backlog = IN_FLIGHT / l2_port(card) if need.unit == "global" else BACKLOG
        control = instruction.control
        waits_for = _waits_for(instruction)
        stall, pause = max(1, control.stall), _pause(instruction, card)
        return _Step(
            instruction, need, control.wait, stall, places, backlog, waits_for, pause, by_leader
        )

    def run(self) -> None:
        self.queue = [(0.0, i) for i in range(len(self.warps))]
        while self.queue:
            time, i = heapq.heappop(self.queue)
            warp = self.warps[i]
            step = self.steps[warp.at]
            earliest = self.earliest(warp, step)
            if earliest > time:  # not known: looks again
                again = earliest if earliest < math.inf else time + _POLL
                heapq.heappush(self.queue, (again, i))
            elif self.start(warp, i, step, time):
                heapq.heappush(self.queue, (warp.ready, i))

    def earliest(self, warp: _Warp, step: _Step) -> float:
        """The earliest time at which its next instruction can start."""
        time = warp.ready
        for board in step.wait:
            if warp.boards[board] > time:
                time = warp.boards[board]
        if step.waits_for:
            time = max(time, self.background_done(warp, step))
        unit = self.free[step.places[warp.scheduler]] - step.backlog
        return max(time, unit, self.issue[warp.scheduler])

    def background_done(self, warp: _Warp, step: _Step) -> float:
        """When the background work that it waits for is done."""
        if step.waits_for == "copies":
            return _groups_done(warp.groups, step.instruction)
        if step.waits_for == "group":
            return _groups_done(warp.matrix_groups, step.instruction)
        if not self.waits_for_each:
            return self.block_matrix[warp.block]
        sent = self.signals[warp.block]
        return sent[warp.signals] if warp.signals < len(sent) else math.inf

    def start(self, warp: _Warp, i: int, step: _Step, time: float) -> bool:
        """Starts an instruction. Returns whether the warp can continue."""
        if time > warp.ready:
            self.waits[step.instruction.base] += time - warp.ready
        self.issue[warp.scheduler] = time + 1
        self.busy["issue"] += 1
        done = self.use_unit(warp, step, time)
        warp.signals += step.waits_for == "block"
        control = step.instruction.control
        if control.write != NO_SCOREBOARD:
            warp.boards[control.write] = max(warp.boards[control.write], done)
        if control.read != NO_SCOREBOARD:
            end = min(done, time + step.need.occupancy + OPERANDS)
            warp.boards[control.read] = max(warp.boards[control.read], end)
        warp.ready = time + step.stall + step.pause
        self.advance(warp)
        if step.instruction.base == "BAR":
            return self.reach_barrier(warp, i, step.instruction, time)
        return warp.trip < self.trips

    def use_unit(self, warp: _Warp, step: _Step, time: float) -> float:
        """Gives an instruction to its unit, and returns the time of its result."""
        instruction, need = step.instruction, step.need
        base = instruction.base
        if instruction.never:
            return time
        place = step.places[warp.scheduler]
        if need.unit == "shared":
            self.catch_up(time)
        begin = max(time, self.free[place])
        self.free[place] = begin + need.occupancy
        self.busy[need.unit] += need.occupancy
        done = self.free[place] + need.latency
        if need.in_shared:
            self.busy["shared"] += need.in_shared
            if base == "LDGSTS":
                heapq.heappush(self.later, (done, need.in_shared))
            elif base.startswith("UTC"):
                heapq.heappush(self.later, (begin, need.in_shared))
            else:
                done = max(done, self.take_shared(time, need.in_shared))
        if base == "LDGSTS":
            warp.copies = max(warp.copies, done)
        elif base == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        elif base == "HGMMA":
            warp.matrix = max(warp.matrix, done)
            if "gsb0" in instruction.operands:
                warp.matrix_groups.append(warp.matrix)
        elif base == "UTCBAR":
            self.signals[warp.block].append(self.block_matrix[warp.block])
        elif base.startswith("UTC"):
            self.block_matrix[warp.block] = max(self.block_matrix[warp.block], done)
        return done

    def take_shared(self, time: float, clocks: float) -> float:
        """Gives work to shared memory, and returns when it is done."""
        self.catch_up(time)
        self.free[self.shared] = max(time, self.free[self.shared]) + clocks
        return self.free[self.shared]

    def catch_up(self, time: float) -> None:
        """Gives shared memory the work that has come until then."""
        while self.later and self.later[0][0] <= time:
            came, clocks = heapq.heappop(self.later)
            self.free[self.shared] = max(came, self.free[self.shared]) + clocks

    def advance(self, warp: _Warp) -> None:
        """Goes on to the next instruction, over those that only the leader runs."""
        self.step_on(warp)
        while not warp.leader and self.steps[warp.at].by_leader:
            self.step_on(warp)

    def step_on(self, warp: _Warp) -> None:
        warp.at += 1
        if warp.at == len(self.steps):
            self.end = max(self.end, warp.ready)
            warp.at, warp.trip = 0, warp.trip + 1
            warp.ready += JUMP

    def reach_barrier(self, warp: _Warp, i: int, instruction: Instruction, time: float) -> bool:
        """Arrives at a barrier. The last warp releases all warps of its block."""
        if instruction.name.startswith("BAR.ARV"):
            return warp.trip < self.trips
        waiting = self.arrived[warp.block]
        waiting.append(i)
        if len(waiting) < self.per_block:
            return False
        for other in waiting:
            one = self.warps[other]
            one.ready = max(one.ready, time + BARRIER)
            if other != i and one.trip < self.trips:
                heapq.heappush(self.queue, (one.ready, other))
        waiting.clear()
        return warp.trip < self.trips


def _run_by_leader(code: Sequence[Instruction]) -> frozenset[int]:
    """Places that one warp of a block runs: matrix instructions of tensor memory, and what stands
    between the branch of the other warps and its target."""
    found: set[int] = set()
    for i, one in enumerate(code):
        if not one.base.startswith("UTC") or i in found:
            continue
        found.add(i)
        for j in range(i - 1, -1, -1):
            target = jump_target(code[j])
            if not code[j].predicate or target is None or target <= one.address:
                continue
            places = [k for k in range(j + 1, len(code)) if code[k].address < target]
            if not any(code[k].base == "BAR" for k in places):
                found.update(places)
            break
    return frozenset(found if len(found) < len(code) else ())


def _pause(instruction: Instruction, card: Device) -> float:
    if instruction.base == "MEMBAR" and instruction.name.endswith((".GPU", ".SYS")):
        return card.rate("l2_latency")
    return 0.0


def _waits_for(instruction: Instruction) -> str:
    if instruction.base == "DEPBAR" and "SB0" in instruction.operands:
        return "copies"
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        return "group"
    return "block" if instruction.name.startswith("SYNCS.PHASECHK") else ""


def _groups_done(groups: list[float], instruction: Instruction) -> float:
    """When all groups are done except the newest ones, whose number the instruction gives."""
    found = re.search(r"0x([0-9a-f]+)", instruction.operands)
    newest = int(found[1], 16) if found else 0
    done = groups[: max(0, len(groups) - newest)]
    return max(done, default=0.0)


def run(
    code: Sequence[Instruction],
    card: Device,
    warps: int,
    blocks: int = 1,
    trips: int = 3,
    factors: Mapping[int, float] | None = None,
    once: bool = False,
) -> Run:
    """Runs the code again and again with ``blocks`` blocks of ``warps`` warps.

    Args:
        trips: number of trips over which the mean is taken, after one to run in.
        factors: place in the code → factor of :func:`need_of`; by default 1.
        once: whether the code runs one time only, from the start.

    Returns:
        The clocks of a trip of all blocks.
    """
    if not code:
        return Run(0.0, {"issue": 0.0}, {})
    trips = 0 if once else trips
    machine = _Multiprocessor(code, card, warps, blocks, RUN_IN + trips, factors or {})
    machine.run()
    clocks = machine.end
    if not once:  # without the first trip, in which units are not busy yet
        short = _Multiprocessor(code, card, warps, blocks, RUN_IN, factors or {})
        short.run()
        clocks = (machine.end - short.end) / trips
    trips += RUN_IN
    units = {unit: 1 if unit in _SHARED_BY_ALL else SCHEDULERS for unit in machine.busy}
    if any(one.base.startswith("UTC") for one in code):
        units["tensor"] = 1
    busy = {unit: total / trips / units[unit] for unit, total in machine.busy.items()}
    if not once:  # copies that a few trips leave to later ones take their time in every trip
        clocks = max(clocks, *busy.values())
    many = trips * len(machine.warps)
    longest = sorted(machine.waits.items(), key=lambda item: -item[1])[:6]
    waits = {name: total / many for name, total in longest if total > many}
    return Run(clocks, busy, waits)
