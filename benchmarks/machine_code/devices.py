"""Rates of graphics cards, each number with its source.

The numbers were written down before any prediction was compared with a measured time. Rates are
those of instructions. A number without a known source is marked as assumed.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCES = {
    "sheet": "NVIDIA's data sheet or architecture white paper of the card",
    "guide": "CUDA C++ Programming Guide, throughput of native arithmetic instructions, and its "
    "table of technical specifications by compute capability",
    "hopper": "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, "
    "arXiv 2402.13499 and 2501.12084 (A100, H100 and RTX 4090)",
    "ampere": "Sun et al., Dissecting Tensor Cores via Microbenchmarks, arXiv 2206.02874",
    "cheese": "Chips and Cheese, bandwidth tests of the H100 (2023) and the RTX 4090 (2022)",
    "sgemm": "cuBLAS sgemm as reported in github.com/Yinghan-Li/YHs_Sample/issues/4: 18.9 of 19.5 "
    "TFLOP/s on an A100",
    "assumed": "an assumption of the author",
}


class Figure(NamedTuple):
    """A number and its source."""

    value: float
    source: str
    """A key of :data:`SOURCES`."""


class Device(NamedTuple):
    """One card. Rates count results or fused multiply-adds a clock of a multiprocessor."""

    name: str
    architecture: int
    """Architecture of the code that runs on it: 80 for sm_80."""
    multiprocessors: Figure
    clock: Figure
    """Hz under load."""
    memory: Figure
    """Bytes a second that a copy reaches."""
    l2: Figure
    """Bytes a second from the L2 cache to all multiprocessors together."""
    l2_size: Figure
    l2_latency: Figure
    """Clocks of a load that hits the L2 cache."""
    memory_latency: Figure
    shared_latency: Figure
    fp32: Figure
    imad: Figure
    alu: Figure
    fp64: Figure
    mufu: Figure
    convert: Figure
    convert64: Figure
    """Conversions from and to types of 64 bits."""
    mma_f16: Figure
    """``mma.sync`` of float16 or bfloat16 with sums in float32."""
    mma_f16_sums: Figure
    """``mma.sync`` of float16 with sums in float16."""
    mma_tf32: Figure
    wgmma_f16: Figure
    """``wgmma`` or ``tcgen05``; 0 where there is none."""
    wgmma_tf32: Figure
    shared: Figure
    """Bytes of shared memory per clock: 32 banks of 4 bytes."""
    registers: Figure
    warps: Figure
    blocks: Figure
    shared_size: Figure
    """Bytes of shared memory a multiprocessor."""
    launch: Figure
    """Seconds between a kernel's end and the next one's first instruction, in a stream or graph."""
    early_launch: Figure
    """The same if the kernel let the next one start early; 0 where none can."""

    def rate(self, unit: str) -> float:
        """The number of a field."""
        figure: Figure = getattr(self, unit)
        return figure.value

    @property
    def geforce(self) -> bool:
        """Whether it runs the kernels for GeForce cards, which add up small products in float16."""
        return self.rate("mma_f16_sums") > self.rate("mma_f16")

    @property
    def sms(self) -> int:
        """Number of multiprocessors."""
        return int(self.multiprocessors.value)


_KIB = 1024


def _sheet(value: float) -> Figure:
    return Figure(value, "sheet")


def _guide(value: float) -> Figure:
    return Figure(value, "guide")


def _assumed(value: float) -> Figure:
    return Figure(value, "assumed")


# Two empty kernels were reported to follow each other 0.96 µs sooner, which is the most that an
# early start can save (github.com/pegainfer-project/pegainfer/issues/569, card not named). Kernels
# that have written something save less.
_EARLY = _assumed(0.9e-6)
_SAME = {"shared": _guide(128), "registers": _guide(65536), "launch": _assumed(1.5e-6)}
_DATA_CENTRE = {  # from sm_90 on
    **_SAME,
    "early_launch": _EARLY,
    "fp32": _guide(128),
    "imad": _guide(64),
    "alu": _guide(64),
    "fp64": _guide(64),
    "mufu": _guide(16),
    "convert": _guide(64),
    "convert64": _guide(16),
    "warps": _guide(64),
    "blocks": _guide(32),
    "shared_size": _guide(228 * _KIB),
}
_GEFORCE = {
    **_SAME,
    "fp32": _guide(128),
    "imad": _guide(64),
    "fp64": _guide(2),
    "mufu": _guide(16),
    "convert": _guide(16),
    "convert64": _guide(2),
    "mma_f16": _sheet(256),
    "mma_f16_sums": _sheet(512),
    "mma_tf32": _sheet(128),
    "wgmma_f16": _sheet(0),
    "wgmma_tf32": _sheet(0),
    "warps": _guide(48),
    "blocks": _guide(24),
    "shared_size": _guide(100 * _KIB),
}

A100 = Device(
    name="A100 SXM",
    architecture=80,
    multiprocessors=_sheet(108),
    clock=_sheet(1.41e9),
    memory=Figure(1.75e12, "cheese"),  # of 2.04e12, the card with 80 GB
    l2=Figure(4.5e12, "cheese"),
    l2_size=_sheet(40 << 20),
    l2_latency=Figure(262, "hopper"),
    memory_latency=Figure(466, "hopper"),
    shared_latency=Figure(29, "hopper"),
    fp32=_guide(64),
    imad=_guide(64),
    alu=_guide(64),
    fp64=_guide(32),
    mufu=_guide(16),
    convert=_guide(16),
    convert64=_guide(16),
    mma_f16=Figure(1000, "ampere"),  # of 1024
    mma_f16_sums=_assumed(1000),
    mma_tf32=Figure(495, "ampere"),  # of 512
    wgmma_f16=_sheet(0),
    wgmma_tf32=_sheet(0),
    warps=_guide(64),
    blocks=_guide(32),
    shared_size=_guide(164 * _KIB),
    early_launch=_guide(0),
    **_SAME,
)
H100 = Device(
    name="H100 SXM",
    architecture=90,
    multiprocessors=_sheet(132),
    clock=_assumed(1.7e9),  # up to 1.98 by the sheet; matrix instructions meet the power limit
    memory=Figure(3.0e12, "hopper"),  # of 3.35e12
    l2=Figure(5.7e12, "cheese"),
    l2_size=_sheet(50 << 20),
    l2_latency=Figure(263, "hopper"),
    memory_latency=Figure(479, "hopper"),
    shared_latency=Figure(29, "hopper"),
    mma_f16=Figure(1270, "hopper"),  # 62 % of 2048
    mma_f16_sums=_assumed(1270),
    mma_tf32=Figure(635, "hopper"),
    wgmma_f16=Figure(1970, "hopper"),  # of 2048
    wgmma_tf32=Figure(985, "hopper"),
    **_DATA_CENTRE,
)
B200 = Device(
    name="B200",
    architecture=100,
    multiprocessors=_sheet(148),
    clock=_assumed(1.8e9),
    memory=_assumed(7.2e12),  # of 8e12 by the sheet
    l2=_assumed(1.0e13),
    l2_size=_sheet(126 << 20),
    l2_latency=_assumed(300),
    memory_latency=_assumed(600),
    shared_latency=_assumed(29),
    mma_f16=_assumed(1024),
    mma_f16_sums=_assumed(1024),
    mma_tf32=_assumed(512),
    wgmma_f16=_sheet(4096),
    wgmma_tf32=_sheet(2048),
    **_DATA_CENTRE,
)
RTX4090 = Device(
    name="RTX 4090",
    architecture=80,  # the wheel has no code for sm_89
    multiprocessors=_sheet(128),
    clock=_sheet(2.52e9),
    memory=Figure(9.2e11, "cheese"),  # of 1.008e12
    l2=Figure(5.0e12, "cheese"),
    l2_size=_sheet(72 << 20),
    l2_latency=Figure(273, "hopper"),
    memory_latency=Figure(542, "hopper"),
    shared_latency=Figure(30, "hopper"),
    alu=_guide(64),
    early_launch=_guide(0),
    **_GEFORCE,
)
RTX5090 = Device(
    name="RTX 5090",
    architecture=120,
    multiprocessors=_sheet(170),
    clock=_sheet(2.41e9),
    memory=_assumed(1.6e12),  # of 1.79e12
    l2=_assumed(7.0e12),
    l2_size=_sheet(96 << 20),
    l2_latency=_assumed(300),
    memory_latency=_assumed(600),
    shared_latency=_assumed(30),
    alu=_sheet(128),
    early_launch=_EARLY,
    **_GEFORCE,
)
DEVICES = (A100, H100, B200, RTX4090, RTX5090)


def device(name: str) -> Device:
    """The card of that name.

    Raises:
        ValueError: no card has this name.
    """
    for one in DEVICES:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in DEVICES)
    raise ValueError(f"device is {name!r}; allowed is one of {known}.")


# ---- blocks of a multiprocessor ----------------------------------------------------------------


def resident(card: Device, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once, at least 1.

    Args:
        threads: of a block. Registers are given to warps in units of 256.
        registers: of a thread.
        shared: bytes of a block. The system takes 1 KiB more of each.
    """
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    limits = (
        card.rate("registers") // (of_warp * warps),
        card.rate("warps") // warps,
        card.rate("blocks"),
        card.rate("shared_size") // (shared + _KIB),
    )
    return max(1, int(min(limits)))
