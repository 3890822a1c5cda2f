"""The predicted time of a launch, and its bound.

A launch consists of blocks, which run phases: pieces of machine code, each a number of times. One
multiprocessor runs every phase with as many blocks as it holds (pipeline.py). Blocks are dealt out
evenly to the multiprocessors, and each runs them in rounds. A launch takes the longest of three
times: its rounds, its longest block alone, and its bytes at the rate of memory. The gap before the
next launch is added, which is shorter if the next launch starts early.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.machine_code import pipeline
from benchmarks.machine_code.devices import Device, resident
from benchmarks.machine_code.kernels import Compiled
from benchmarks.machine_code.sass import Instruction

ONCE = "once"  # the phase that a block runs one time


class Phase(NamedTuple):
    """A piece of code that blocks run again and again."""

    name: str
    code: tuple[Instruction, ...]
    trips: float
    """Of all blocks together."""
    most: float
    """Trips of the block that makes most."""
    factors: tuple[tuple[int, float], ...] = ()
    """Place in the code → wavefronts of its access over the ideal, or the share of its bytes."""
    warps: int | None = None
    """Warps of a block that run it, by default all."""


class Launch(NamedTuple):
    """One launch, or several equal ones."""

    name: str
    kernel: Compiled
    blocks: int
    phases: tuple[Phase, ...]
    moved: float
    """Bytes that it must read from memory and write to it."""
    times: int = 1
    early: int = 0
    """How many of them let the next launch start early."""


class Predicted(NamedTuple):
    """Prediction for all launches of one kernel together."""

    name: str
    seconds: float
    launches: int
    bound: str
    """A unit of the multiprocessor, "latency", "longest block", "memory" or "launch"."""


@functools.cache
def _run(
    code: tuple[Instruction, ...],
    card: Device,
    warps: int,
    blocks: int,
    factors: tuple[tuple[int, float], ...],
    once: bool,
) -> pipeline.Run:
    return pipeline.run(code, card, warps, blocks, 2, dict(factors), once)


def run_of(phase: Phase, launch: Launch, card: Device, blocks: int) -> pipeline.Run:
    warps = phase.warps or launch.kernel.warps
    return _run(phase.code, card, warps, blocks, phase.factors, phase.name == ONCE)


def blocks_at_once(launch: Launch, card: Device) -> int:
    """Blocks that a multiprocessor runs at the same time."""
    kernel = launch.kernel
    held = resident(card, kernel.threads, kernel.registers, kernel.shared)
    return min(held, -(-launch.blocks // card.sms))


def rounds_seconds(launch: Launch, card: Device) -> float:
    """Seconds of the multiprocessor with most blocks, if all blocks do the same.

    It runs full rounds, with as many blocks as it holds, and one round with the rest.
    """
    together = blocks_at_once(launch, card)
    rounds, rest = divmod(-(-launch.blocks // card.sms), together)
    clocks = 0.0
    for phase in launch.phases:
        each = phase.trips / launch.blocks
        clocks += each * rounds * run_of(phase, launch, card, together).clocks
        if rest:
            clocks += each * run_of(phase, launch, card, rest).clocks
    return clocks / card.rate("clock")


def longest_block_seconds(launch: Launch, card: Device) -> float:
    """Seconds of the block with most work, running alone."""
    clocks = sum(p.most * run_of(p, launch, card, 1).clocks for p in launch.phases)
    return clocks / card.rate("clock")


def bound_of(launch: Launch, card: Device) -> str:
    """The bound of the phase that takes longest."""
    together = blocks_at_once(launch, card)

    def clocks(phase: Phase) -> float:
        return phase.trips * run_of(phase, launch, card, together).clocks

    longest = max(launch.phases, key=clocks)
    return run_of(longest, launch, card, together).bound


def predict(launch: Launch, card: Device) -> Predicted:
    """The predicted time of a launch on a card."""
    times = {
        "turns": rounds_seconds(launch, card),
        "longest block": longest_block_seconds(launch, card),
        "memory": launch.moved / card.rate("memory"),
    }
    late = launch.times - launch.early
    gaps = late * card.rate("launch") + launch.early * card.rate("early_launch")
    most = max(times, key=lambda name: times[name])
    bound = bound_of(launch, card) if most == "turns" else most
    if launch.times * times[most] < gaps:
        bound = "launch"
    return Predicted(launch.name, launch.times * times[most] + gaps, launch.times, bound)


def merge_by_name(parts: Iterable[Predicted]) -> list[Predicted]:
    """Predictions of the same name added up, with the bound of the longest."""
    found: dict[str, list[Predicted]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    return [
        Predicted(
            name,
            sum(p.seconds for p in same),
            sum(p.launches for p in same),
            max(same, key=lambda p: p.seconds).bound,
        )
        for name, same in found.items()
    ]


def total(parts: Sequence[Predicted]) -> float:
    """Seconds of all predictions."""
    return sum(part.seconds for part in parts)


def phase(
    name: str, kernel: Compiled, code: Sequence[Instruction], trips: float, most: float
) -> Phase:
    """A phase with the bank conflicts of its kernel."""
    factors = kernel.factors(code)
    return Phase(name, tuple(code), trips, most, tuple(sorted(factors.items())))


# ---- plain torch, from published rates ---------------------------------------------------------

SGEMM = 0.93  # rate of a large float32 product over that of the instructions ("sgemm")
TF32_GEMM = 0.75  # the same in TF32; assumed
SPLITS = 8
_GEMM_TILE = 128


def product(card: Device, rows: int, columns: int, depth: int, kind: str) -> float:
    """Seconds of a matrix product by cuBLAS, in "fp32" or "tf32".

    In tiles of 128 × 128, with the depth split in the way that fills the device best.
    """
    rate = card.rate("fp32") if kind == "fp32" else max(card.rate("mma_tf32"), _wide(card))
    tiles = -(-rows // _GEMM_TILE) * -(-columns // _GEMM_TILE)
    filled = max(_filled(tiles * split, card.sms) for split in range(1, SPLITS + 1))
    share = filled * (SGEMM if kind == "fp32" else TF32_GEMM)
    padded = tiles * _GEMM_TILE**2
    computed = padded * depth / (rate * card.sms * card.rate("clock") * share)
    moved = 4 * (rows * depth + depth * columns + rows * columns)
    return max(computed, moved / card.rate("memory")) + card.rate("launch")


def _wide(card: Device) -> float:
    return card.rate("wgmma_tf32")


def _filled(blocks: int, sms: int) -> float:
    return blocks / (-(-blocks // sms) * sms)


def pass_over(card: Device, moved: float, kernels: int = 1) -> float:
    """Seconds of elementwise kernels that read and write so many bytes.

    They use the L2 cache if half of it holds the bytes of one kernel.
    """
    fits = moved / kernels < card.rate("l2_size") / 2
    return moved / card.rate("l2" if fits else "memory") + kernels * card.rate("launch")


def torch_path(card: Device, B: int, M: int, N: int, kind: str, compiled: bool) -> dict[str, float]:
    """Seconds of posterior_paths.torch_path: two products, norms, softmax and log-sum-exp.

    Compiled, the elementwise work is one pass for the norms and two over the pairs.
    """
    pairs, references = 4.0 * B * M, 4.0 * M * N
    products = product(card, B, M, N, kind) + product(card, B, N, M, kind)
    if compiled:
        norms = pass_over(card, references) + pass_over(card, 4.0 * B * N)
        rest = pass_over(card, 4 * pairs, 2)
    else:
        norms = pass_over(card, 3 * references, 2) + pass_over(card, 5 * 4.0 * B * N, 3)
        rest = pass_over(card, 20 * pairs, 15)
    return {"products": products, "norms": norms, "pairs": rest}


def torch_backward(
    card: Device, B: int, M: int, N: int, kind: str, compiled: bool
) -> dict[str, float]:
    """Seconds of the gradient of the mean of posterior_paths.torch_path in the queries.

    Two products, and elementwise work on the pairs: the gradients of softmax, a product with a
    number, log, negation and a sum. They read and write eleven arrays. Compiled, it is two passes.
    """
    pairs, queries = 4.0 * B * M, 4.0 * B * N
    products = product(card, B, M, N, kind) + product(card, B, N, M, kind)
    if compiled:
        rest = pass_over(card, 4 * pairs, 2) + pass_over(card, 3 * queries)
    else:
        rest = pass_over(card, 11 * pairs, 6) + pass_over(card, 5 * queries, 3)
    return {"products": products, "rest": rest}
