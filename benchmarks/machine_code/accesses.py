"""Accesses of memory by the CUDA kernels, counted while they run on the host.

The addresses of the CUDA kernels are not read from their machine code. Here the kernels run on the
CPU, in an extension built with csrc/host_shim and ``PFGM_SHIM_ACCESSES``, which sees each access
(csrc/host_shim/accesses.h). Counted are wavefronts of shared memory, of which bank conflicts need
more, and transfers of 32 bytes of global memory, of which scattered accesses need more. The
problems are small, and together use each kernel that is predicted. Where values decide which lanes
take part, or which places they access, the counts are those of these problems.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import pfgm
from benchmarks.codegen.cuda import short_name
from benchmarks.common import cuda_shim
from benchmarks.machine_code.banks import Kind

SHARED: tuple[Kind, ...] = ("load", "store", "copy")
GLOBAL: tuple[Kind, ...] = ("global load", "global store", "global copy")
_KINDS = SHARED + GLOBAL


class Problem(NamedTuple):
    """A call, and the device that the host shim stands for."""

    capability: int
    multiprocessors: int
    B: int
    M: int
    N: int
    precision: str = "high"
    backward: bool = False
    type: torch.dtype = torch.float32
    chunk: int | None = None
    """The most references of a chunk."""


_A100, _H100, _B200, _GEFORCE = 80, 90, 100, 89
# Capability, multiprocessors, B, M and N of the problems that have the same options.
_SIZES: tuple[tuple[dict[str, Any], tuple[tuple[int, int, int, int, int], ...]], ...] = (
    (
        {"backward": True},
        (
            (_A100, 4, 2, 190, 128),
            (_A100, 4, 24, 190, 96),
            (_A100, 1, 128, 129, 64),
            (_A100, 3, 97, 127, 1552),
            (_H100, 1, 128, 129, 64),
            (_B200, 1, 128, 129, 64),
            (_GEFORCE, 4, 24, 190, 96),
            (_GEFORCE, 7, 70, 190, 128),
            (_GEFORCE, 1, 130, 384, 256),
            (_GEFORCE, 1, 97, 2100, 64),
            (_GEFORCE, 6, 97, 127, 3072),
        ),
    ),
    (
        {},
        (
            (_A100, 4, 2, 2100, 64),
            (_A100, 12, 24, 190, 1024),
            (_A100, 4, 40, 129, 1552),
            (_GEFORCE, 24, 16, 128, 3072),
            (_H100, 6, 97, 127, 1552),
            (_B200, 3, 97, 127, 1552),
            (_H100, 1, 97, 2100, 64),
            (_H100, 1, 256, 192, 256),
            (_H100, 1, 512, 192, 256),
            (_B200, 1, 256, 192, 256),
            (_B200, 1, 512, 192, 256),
            (_GEFORCE, 1, 128, 384, 96),
            (_GEFORCE, 6, 200, 250, 3072),
        ),
    ),
    (
        {"precision": "medium"},
        (
            (_A100, 4, 24, 190, 96),
            (_A100, 1, 256, 192, 64),
            (_A100, 3, 97, 127, 1552),
            (_A100, 1, 520, 600, 256),
            (_H100, 5, 97, 127, 1552),
            (_H100, 6, 250, 130, 1552),
            (_H100, 1, 256, 192, 256),
            (_H100, 1, 520, 600, 256),
            (_B200, 1, 128, 129, 64),
            (_B200, 3, 97, 127, 1552),
            (_B200, 1, 256, 192, 256),
            (_B200, 1, 520, 600, 256),
            (_GEFORCE, 4, 24, 190, 96),
            (_GEFORCE, 7, 70, 190, 128),
            (_GEFORCE, 1, 128, 129, 64),
            (_GEFORCE, 3, 97, 127, 1552),
        ),
    ),
    *(
        (
            {"type": type},
            ((_A100, 4, 40, 129, 1552), (_A100, 3, 97, 127, 1552), (_GEFORCE, 7, 70, 190, 128)),
        )
        for type in (torch.uint8, torch.bfloat16)
    ),
    ({"chunk": 128}, ((_GEFORCE, 1, 64, 256, 128),)),
)
PROBLEMS = tuple(Problem(*sizes, **options) for options, found in _SIZES for sizes in found)


class Count(NamedTuple):
    """What one place of a kernel accesses."""

    kernel: str
    """As in "merge<4>"."""
    place: str
    """File and line."""
    kind: Kind
    """Of SHARED or GLOBAL. A "copy" is what an asynchronous copy writes, a "global copy" what it
    reads."""
    least: int
    """The wavefronts or transfers that the bytes need."""
    taken: int
    """All of them."""


def build() -> Path:
    """The extension that counts accesses."""
    return cuda_shim.build("cuda_shim_accesses", "-DPFGM_SHIM_ACCESSES=ON")


def count(library: Path, problems: Iterable[Problem] = PROBLEMS) -> list[Count]:
    """The accesses of all kernels that run, by place."""
    extension = cuda_shim.load(str(library))
    sums: dict[tuple[int, int, Kind], list[int]] = {}
    for problem in problems:
        for kernel, accesses in _run(extension, problem):
            for place, kind, _, least, taken in accesses:
                found = sums.setdefault((kernel, place, _KINDS[kind]), [0, 0])
                found[0] += least
                found[1] += taken
    # An access returns to the instruction after the call of its hook.
    named = _symbols(library, {place for key in sums for place in (key[0], key[1] - 1)})
    return sorted(
        Count(short_name(named[kernel][0]), named[place - 1][1], kind, *found)
        for (kernel, place, kind), found in sums.items()
    )


def _run(extension: ModuleType, problem: Problem) -> Iterator[tuple[int, list[Any]]]:
    """Launches, each with the place of its kernel and the accesses."""
    generator = torch.Generator().manual_seed(0)
    B, M, N = problem.B, problem.M, problem.N
    centres = 1.6 * torch.rand(20, N, generator=generator) - 0.8
    y = centres[torch.arange(M) % 20] + 2**-6 * torch.randn(M, N, generator=generator)
    z = torch.logspace(-2.5, 0.5, B)
    noise = torch.randn(B, N, generator=generator)
    x = y[torch.randint(0, M, (B,), generator=generator)] + 0.3 * z[:, None] * noise
    if problem.type == torch.uint8:
        y = ((y + 1) * 127.5).round().clamp(0, 255)
    shared = (163 if problem.capability < 90 else 227) << 10
    with cuda_shim.in_place_of_a_gpu(extension):
        extension.shim_device(problem.multiprocessors, problem.capability, shared)
        extension.shim_limits(**({"references": problem.chunk} if problem.chunk else {}))
        extension.shim_accesses(True)
        mean = pfgm.posterior_mean(
            x.requires_grad_(problem.backward),
            y.to(problem.type),
            r=z,
            precision=problem.precision,
            backend="native",
        )
        if problem.backward:
            mean.sum().backward()
        yield from extension.shim_accesses(False)


def _symbols(library: Path, places: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Place of code → mangled name of its function, file and line."""
    asked = sorted(places)
    command = ["addr2line", "-f", "-e", str(library), *(hex(place) for place in asked)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [line.split(" ")[0].rpartition("/csrc/")[2] for line in lines[1::2]]
    return dict(zip(asked, zip(lines[::2], files, strict=True), strict=True))


def by_kernel(counts: Iterable[Count]) -> dict[str, dict[Kind, list[int]]]:
    """Kernel → kind → what the bytes need, and what is taken."""
    found: dict[str, dict[Kind, list[int]]] = {}
    for one in counts:
        sums = found.setdefault(one.kernel, {}).setdefault(one.kind, [0, 0])
        sums[0] += one.least
        sums[1] += one.taken
    return dict(sorted(found.items()))


_REMARKABLE = 0.02  # of what a kernel takes of one memory


def measure() -> dict[str, dict[Kind, list[int]]]:
    """The section "accesses" of the results. Prints places that take much more than they need."""
    counts = count(build())
    found = by_kernel(counts)
    for one in counts:
        memory = SHARED if one.kind in SHARED else GLOBAL
        of_kernel = sum(found[one.kernel][kind][1] for kind in memory if kind in found[one.kernel])
        if one.taken - one.least > _REMARKABLE * of_kernel:
            print(f"{one.kernel}, {one.place}: {one.kind}, {one.taken} in place of {one.least}")
    return found
