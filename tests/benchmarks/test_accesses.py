"""benchmarks/machine_code/accesses.py: what the CUDA kernels access, counted on the host."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from benchmarks.codegen import cuda as codegen_cuda
from benchmarks.common import cuda_shim
from benchmarks.machine_code import accesses, banks, data, launches, page, results, sections
from benchmarks.machine_code.accesses import Problem
from benchmarks.machine_code.devices import DEVICES
from pfgm.backends import native

if native._native is None or sys.platform != "linux":
    pytest.skip("the host shim needs the extension and Linux", allow_module_level=True)
if reason := cuda_shim.why_unbuilt():
    pytest.skip(f"accesses of CUDA kernels are NOT COUNTED: {reason}", allow_module_level=True)

SCATTERED = ("list_references", "order_queries")
"""Kernels that access places that depend on values."""
LOOPS = ("load", "copy", "global copy")
"""What loops access that multiply."""
builds = pytest.mark.slow  # the extension, in half a minute


@pytest.fixture(scope="module")
def library():
    return accesses.build()


@pytest.fixture(scope="module")
def extension(library):
    return cuda_shim.load(str(library))


def lanes(addresses):
    return [*addresses, *[-1] * (32 - len(addresses))]


@builds
@pytest.mark.parametrize(
    ("addresses", "size", "least", "found"),
    [
        (range(0, 128, 4), 4, 1, 1),
        (range(0, 32 * 128, 128), 4, 1, 32),
        ([12] * 32, 4, 1, 1),
        (range(32), 1, 1, 1),
        (range(0, 32 * 8, 8), 8, 2, 2),
        (range(0, 32 * 16, 16), 16, 4, 4),
        (range(0, 32 * 64, 64), 16, 4, 16),
        ([0, 128], 4, 1, 2),
        ([0], 16, 1, 1),
    ],
)
def test_wavefronts_by_hand(extension, addresses, size, least, found):
    assert extension.shim_wavefronts(lanes(addresses), size) == (least, found)


@builds
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_wavefronts_are_those_of_banks(extension, size):
    generator = random.Random(0)
    for _ in range(50):
        addresses = [size * generator.randrange(512) for _ in range(32)]
        _, found = extension.shim_wavefronts(addresses, size)
        assert found == banks.wavefronts(addresses, size)


@builds
@pytest.mark.parametrize(
    ("addresses", "size", "least", "found"),
    [
        (range(0, 128, 4), 4, 4, 4),
        (range(16, 144, 4), 4, 4, 5),
        (range(0, 32 * 64, 64), 8, 8, 32),
        ([96] * 32, 16, 1, 1),
        ([31], 2, 1, 2),
        (range(0, 32 * 16, 16), 16, 16, 16),
    ],
)
def test_transfers_by_hand(extension, addresses, size, least, found):
    assert extension.shim_transfers(lanes(addresses), size) == (least, found)


def uneven(counts, *kinds):
    """Kernels and files that take more than they need, if their places do not depend on values."""
    return {
        (one.kernel.split("<")[0], one.place.split(":")[0])
        for one in counts
        if one.taken > one.least and one.kind in kinds and not one.kernel.startswith(SCATTERED)
    }


@builds
@pytest.mark.parametrize("type", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_loops_of_tiles_are_free_of_conflicts(library, type):
    """What each trip of a loop accesses: references and queries as they are copied and read. Sums
    of the other half of the warps, which a tile reads once, have conflicts."""
    problems = [
        Problem(80, multiprocessors, B, M, N, type=type)
        for multiprocessors, B, M, N in ((4, 24, 190, 96), (7, 70, 190, 128), (1, 128, 129, 64))
    ]
    counts = accesses.count(library, problems)
    kernels = {one.kernel.rsplit(", ", 3)[0] for one in counts if one.kernel.startswith("dist")}
    tiles = {kernel.split(", ", 1)[1] for kernel in kernels}
    assert tiles >= {"32, 64", "128, 128"}
    assert tiles & {"64, 64", "64, 128"}
    once = ("distances", "cuda/squared_distances.h")
    assert uneven(counts, *LOOPS) <= {once}


def test_stored_counts_of_large_tiles_and_sums_are_even():
    """What they load, and what asynchronous copies write. Smaller tiles also load sums once."""
    large = (
        "distances<float32, 128",
        "distances<Rounded, 128",
        "warpgroup_",
        "weighted_sum",
        "tensor_memory",
    )
    found = 0
    for kernel, counts in results.load()["accesses"].items():
        if kernel.startswith((*large, "refine")):
            for kind in {"load", "copy"} & set(counts):
                assert counts[kind][0] == counts[kind][1], (kernel, kind)
                found += 1
    assert found > 20


@builds
def test_a_conflict_is_found(library):
    """Rows that are not aligned are stored value by value, 16 bytes apart."""
    (count,) = (
        one
        for one in accesses.count(library, [Problem(80, 1, 128, 129, 65)])
        if one.kernel.startswith("distances") and one.kind == "store" and one.taken > one.least
    )
    assert count.place.startswith("cuda/distances.h:")
    assert count.taken == 4 * count.least


@pytest.mark.slow
def test_every_predicted_kernel_is_counted():
    if codegen_cuda.why_unchecked() is not None:
        pytest.skip("the extension has no CUDA code")
    stored = results.load()
    counts = {shape: stored["data"][shape.name] for shape in data.SHAPES}
    paths = [launches.cuda, launches.cuda_medium, launches.cuda_backward]
    made = [(path, shape, counts[shape]) for path in paths for shape in data.SHAPES]
    for shape in data.VARIANTS:
        made.append((launches.cuda, shape, {"cuda": sections.by_chunk(shape, data.count)}))
    names = {
        launch.kernel.name
        for path, shape, found in made
        for card in DEVICES
        for launch in path(shape, found, card)
    }
    assert names <= set(stored["accesses"])


def test_sums_by_kernel():
    counts = [
        accesses.Count("merge<4>", "a.h:1", "global load", 8, 8),
        accesses.Count("weigh", "a.h:1", "load", 10, 20),
        accesses.Count("weigh", "a.h:2", "load", 30, 30),
        accesses.Count("weigh", "a.h:2", "global store", 8, 10),
    ]
    found = accesses.by_kernel(counts)
    weigh = {"load": [40, 50], "global store": [8, 10]}
    assert found == {"merge<4>": {"global load": [8, 8]}, "weigh": weigh}
    made = banks.of_counts(found["weigh"])
    assert (made.ideal, made.wavefronts, made.ratio) == (40, 50, {"load": 1.25})
    table = page.access_table({"accesses": found})
    assert "| weigh | 1.25 |  |  |  | 1.25 |  |" in table
    assert "1 other kernels" in table


@builds
def test_stored_counts_are_those_of_the_kernels(library):
    assert accesses.by_kernel(accesses.count(library)) == results.load()["accesses"]
