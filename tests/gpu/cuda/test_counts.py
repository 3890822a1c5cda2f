"""The host shim counts what the kernels do, and the model of benchmarks/machine_code counts the
same from shapes and data alone.

Launches, blocks, shared memory, and what does not depend on values agree exactly. ``find_limits``,
``refine`` and the weighted sums depend on which distances and weights are below a limit; there a
hundredth may differ, because the kernels round their distances. Which tiles ``weigh`` leaves out
depends on values too, but agrees here.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import pytest
import torch

from benchmarks.common import subjects
from benchmarks.common.subjects import Case
from benchmarks.machine_code import data, devices, work
from benchmarks.machine_code.data import Shape
from benchmarks.machine_code.work import Amount
from pfgm.backends import native
from pfgm.common.tensors import dequantise

TYPES = {
    torch.float32: "float32",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
    torch.uint8: "uint8",
}
BY_VALUES = {"find_limits", "refine", "weighted_sum", "reference_gradient"}


@pytest.fixture
def backend():
    return "native"


class Counted(NamedTuple):
    """A launch, as the shim counts it."""

    name: str
    threads: int
    shared: int
    blocks: list[Amount]

    @property
    def total(self) -> Amount:
        return Amount(*(sum(column) for column in zip(*self.blocks, strict=True)))

    @property
    def longest(self) -> Amount:
        return Amount(*(max(column) for column in zip(*self.blocks, strict=True)))


def counted(shim, run) -> list[Counted]:
    """The launches of run()."""
    shim.counts(True)
    run()
    found = []
    for name, grid, threads, shared, of_blocks in shim.counts(False):
        exchanges = [of_blocks[call] for call in of_blocks if re.search("shfl|ballot|reduce", call)]
        columns = zip(
            of_blocks["multiply_add_halves"],
            of_blocks["multiply_add"],
            of_blocks["begin_product"],
            of_blocks["begin_product_in_memory"],
            of_blocks["copied"],
            of_blocks["__syncthreads"],
            map(sum, zip(*exchanges, strict=True)),
            strict=True,
        )
        blocks = [Amount(*column) for column in columns]
        assert len(blocks) == grid[0] * grid[1] * grid[2]
        found.append(Counted(name, threads, shared, blocks))
    return found


def clusters(B: int, M: int, N: int) -> Case:
    """References around 20 centres, and points near them at very different distances."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.6 * torch.rand(20, N, generator=generator) - 0.8
    y = centres[torch.arange(M) % 20] + 2**-6 * torch.randn(M, N, generator=generator)
    z = torch.logspace(-2.5, 0.5, B)
    x = y[torch.randint(0, M, (B,), generator=generator)]
    return Case(x + 0.3 * z[:, None] * torch.randn(B, N, generator=generator), z, y)


class Run(NamedTuple):
    """A forward or backward pass: what the model counts, and what the shim counted."""

    model: list[work.Work]
    shim: list[Counted]

    def of_model(self, name: str) -> Amount:
        total = Amount()
        for one in self.model:
            if one.name == name:
                total = total.plus(one.total.times(one.times))
        return total

    def of_shim(self, name: str) -> Amount:
        total = Amount()
        for one in self.shim:
            if one.name == name:
                total = total.plus(one.total)
        return total


@pytest.fixture
def run(op, shim):
    """run(case, dtype, multiprocessors, backward, kept, like, precision) counts a pass twice."""

    def run(
        case: Case,
        dtype: torch.dtype = torch.float32,
        multiprocessors: int = 4,
        backward: bool = False,
        kept: bool = False,
        like: devices.Device = devices.H100,
        precision: str = "high",
    ) -> Run:
        references = case.references
        if dtype == torch.uint8:
            references = ((references + 1) * 127.5).round()
        references = references.to(dtype)
        case = case._replace(references=dequantise(references, torch.float32))
        (B, N), M = case.x.shape, len(references)
        medium = precision == "medium" and dtype == torch.float32
        shape = Shape("small", B, M, N, "Rounded" if medium else TYPES[dtype])
        figure = devices.Figure(multiprocessors, "assumed")
        card = like._replace(multiprocessors=figure)
        capability = 89 if card.geforce else card.architecture
        shim.device(capability, multiprocessors, l2_cache=int(card.l2_size.value))
        given = case.x, references, case.z.double(), 1.0
        found = counted(shim, lambda: op.compute(*given, precision))
        shape = work.on_card(shape._replace(backward=backward), card)
        if not backward:
            on_data = data.count(shape, lambda shape: case, [card])
            return Run(list(work.counts(shape, on_data, card)), found)
        both = counted(shim, lambda: op.gradients(*given, keeps=kept, precision=precision))
        on_data = data.count_gradient(shape, lambda shape: case, [card])
        return Run(list(work.gradient_counts(shape, on_data, card, kept=kept)), both[len(found) :])

    return run


def check(run: Run) -> None:
    """The model agrees with the shim, in each kernel."""
    expected: Counter[tuple[str, int, int, int]] = Counter()
    for one in run.model:
        expected[one.name, one.blocks, one.threads, one.shared] += one.times
    found = Counter((one.name, len(one.blocks), one.threads, one.shared) for one in run.shim)
    assert found == expected
    for name in {one.name for one in run.shim}:
        tolerance = 0.01 if name in BY_VALUES else 1e-9
        assert run.of_shim(name) == pytest.approx(run.of_model(name), rel=tolerance), name


def check_longest(run: Run) -> None:
    """The block with most work agrees, in each kernel. There is one launch of each.

    The model takes the mean of the bytes of a trip; a trip at the edge of a tile has fewer.
    """
    assert len(run.model) == len(run.shim)
    for model, shim in zip(run.model, run.shim, strict=True):
        assert model.name == shim.name
        found, expected = shim.longest, model.longest
        assert found._replace(copied=0) == pytest.approx(expected._replace(copied=0)), model.name
        assert found.copied == pytest.approx(expected.copied, rel=0.1), model.name


# ---- partitions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "multiprocessors", "kernel"),
    [
        ((24, 190, 96), 4, "distances<float32, 32, 64, false, false, false>"),
        ((70, 190, 128), 7, "distances<float32, 64, 64, false, false, false>"),
        ((70, 600, 256), 4, "distances<float32, 64, 128, false, false, false>"),
        ((100, 300, 96), 1, "distances<float32, 128, 128, false, false, false>"),
        ((241, 129, 72), 1, "distances<float32, 128, 128, false, false, false>"),
        ((24, 190, 1024), 12, "distances<float32, 32, 64, false, false, true>"),
        ((40, 129, 1536), 9, "distances<float32, 64, 64, false, false, true>"),
        ((40, 129, 1536), 4, "distances<float32, 64, 128, false, false, true>"),
        ((97, 127, 1536), 3, "distances<float32, 128, 128, false, false, true>"),
        ((70, 190, 128), 7, "distances<float32, 64, 64, true, false, false>"),
        ((250, 250, 72), 1, "distances<float32, 128, 128, true, false, false>"),
        ((97, 127, 2048), 3, "distances<float32, 128, 128, true, false, true>"),
        ((100, 240, 96), 1, "warpgroup_distances<float32, 128, 128, false, false>"),
        ((241, 129, 72), 1, "warpgroup_distances<float32, 128, 192, false, false>"),
        ((97, 127, 1536), 3, "warpgroup_distances<float32, 128, 128, false, true>"),
        ((97, 190, 1552), 3, "warpgroup_distances<float32, 128, 192, false, true>"),
        ((100, 240, 96), 1, "tensor_memory_distances<float32, false, false>"),
        ((241, 129, 72), 1, "tensor_memory_distances<float32, false, false>"),
        ((97, 127, 1552), 3, "tensor_memory_distances<float32, false, true>"),
        ((8, 320, 128), 4, "differences<float32, false>"),
        ((40, 192, 16), 4, "differences<float32, false>"),
    ],
)
def test_partitions(run, sizes, multiprocessors, kernel):
    card = devices.H100 if kernel.startswith("warpgroup") else devices.A100
    if re.match(r"distances<\w+, \d+, \d+, true", kernel):
        card = devices.RTX4090
    if kernel.startswith("tensor_memory"):
        card = devices.B200
    found = run(clusters(*sizes), multiprocessors=multiprocessors, like=card)
    assert kernel in {one.kernel for one in found.model}
    check(found)
    check_longest(found)


@pytest.mark.parametrize(
    ("card", "precision", "rows"),
    [
        (devices.H100, "high", 64),
        (devices.A100, "medium", 64),
        pytest.param(devices.A100, "high", 32, marks=pytest.mark.slow),
        pytest.param(devices.RTX4090, "medium", 32, marks=pytest.mark.slow),
    ],
)
def test_groups(run, card, precision, rows):
    """The sums of 260 queries, in large or small groups."""
    found = run(clusters(260, 140, 36), multiprocessors=1, like=card, precision=precision)
    (sums,) = (one for one in found.model if one.name == "weighted_sum")
    assert f", {rows}, true>" in sums.kernel
    check(found)


@pytest.mark.parametrize(
    ("card", "kernel"),
    [
        (devices.H100, "warpgroup_sum"),
        pytest.param(devices.B200, "tensor_memory_sum", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(
    ("B", "M", "N", "multiprocessors"),
    [
        (512, 150, 260, 1),  # uneven shares of lists
        (640, 300, 256, 2),
        (256, 600, 512, 4),
        pytest.param(300, 290, 768, 4, marks=pytest.mark.slow),
        pytest.param(513, 700, 512, 3, marks=pytest.mark.slow),
    ],
)
def test_shared_groups(run, card, kernel, precision, B, M, N, multiprocessors):
    """So many distances are refined here that a few more or less are, as the kernels round. So only
    launches and sums are compared."""
    case = clusters(B, M, N)
    found = run(case, multiprocessors=multiprocessors, like=card, precision=precision)
    type_ = "float32" if precision == "high" else "Rounded"
    rows = 128 if B >= 512 else 64
    assert f"{kernel}<{type_}, {rows}>" in {one.kernel for one in found.model}
    names = ("list_references", "weighted_sum", "merge")
    of_sums = Run(*([one for one in part if one.name in names] for part in found))
    check(of_sums)
    for model, shim in zip(of_sums.model, of_sums.shim, strict=True):
        # Of exchanges for segments that blocks leave out the model takes the mean.
        longest = model.longest._replace(copied=0, exchanges=0)
        assert longest in [block._replace(copied=0, exchanges=0) for block in shim.blocks]


@pytest.mark.parametrize(
    ("B", "multiprocessors"),
    [
        (40, 30), (200, 1), (300, 1000),
        *(pytest.param(*each, marks=pytest.mark.slow)
          for each in ((40, 1), (40, 1000), (200, 30), (200, 1000), (300, 1), (300, 30))),
    ],
)  # fmt: skip
def test_shares_of_lists(run, B, multiprocessors):
    """Blocks that share out lists of very different lengths, in uneven shares for up to 256
    queries."""
    found = run(clusters(B, 2300, 40), multiprocessors=multiprocessors)
    check(found)
    check_longest(found)


def test_equal_parts(run):
    """Six blocks on a multiprocessor would have 18 of 106 panels, and a last one of 16. Five have
    equal parts of 22, but for rounding."""
    found = run(clusters(30, 32 * 106 - 5, 40), multiprocessors=1)
    (sums,) = (one for one in found.model if one.name == "weighted_sum")
    assert sums.blocks == 5
    check(found)
    check_longest(found)


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_tiles_without_weights(run, multiprocessors):
    """Blocks have one or two pieces of several rounds. The references of a tile are near each
    other, so most tiles are left out for the first queries, and none for the last ones."""
    case = clusters(8, 20_000, 16)
    cluster = torch.arange(20_000) % 20
    case = case._replace(references=case.references[cluster.argsort(stable=True)])
    found = run(case, multiprocessors=multiprocessors)
    check(found)
    check_longest(found)
    (weigh,) = (one for one in found.model if one.name == "weigh")
    turns, rounds = weigh.loops["turns"], weigh.loops["rounds"]
    assert rounds.most == (3 if multiprocessors == 1 else 2)
    assert turns.most > 1.5 * turns.trips / weigh.blocks


@pytest.mark.parametrize("sizes", [(40, 300, 96), (8, 300, 96)])
def test_types(run, sizes):
    for dtype in TYPES:
        found = run(clusters(*sizes), dtype)
        check(found)
        check_longest(found)


@pytest.fixture
def small_chunks(shim, monkeypatch):
    """256 references and 40 queries at a time."""
    shim.limits(pairs=20_480, queries=40, references=256)
    for name, limit in (("CUDA_PAIRS", 20_480), ("ROWS", 40), ("REFERENCES", 256)):
        monkeypatch.setattr(data, name, limit)


@pytest.mark.parametrize(
    ("card", "held", "chunks"),
    [
        (devices.RTX4090, 12_800, 3),
        (devices.RTX4090, 9_999, 1),  # so few pairs that the cache does not count
        (devices.A100, 12_800, 1),
    ],
)
def test_chunks_that_the_cache_holds(run, shim, monkeypatch, card, held, chunks):
    """On GeForce cards, in the forward pass."""
    shim.limits(pairs=40_960)
    monkeypatch.setattr(data, "CUDA_PAIRS", 40_960)
    card = card._replace(l2_size=devices.Figure(held * 12 / 0.7, "assumed"))
    for backward in (False, True):
        found = run(clusters(40, 700, 64), like=card, backward=backward)
        launches = Counter(one.name for one in found.shim)
        assert launches["refine"] == (1 if backward else chunks)
        check(found)


def test_chunks_and_blocks(run, small_chunks):
    found = run(clusters(100, 700, 64))  # 3 blocks, of which two are sorted, and 3 chunks
    assert Counter(one.name for one in found.shim)["refine"] == 9
    check(found)


def test_chunks_of_whole_rounds(run, shim, monkeypatch):
    """Two chunks of 384 references are a round of 3 tiles each. Those of 512 and 256 would be 3."""
    shim.limits(references=512)
    monkeypatch.setattr(data, "REFERENCES", 512)
    found = run(clusters(40, 768, 512), multiprocessors=3, like=devices.A100)
    (limits,) = (one for one in found.model if one.name == "find_limits")
    assert limits.times == 2
    assert [len(one.blocks) for one in found.shim if one.name == "distances"] == [3, 3]
    check(found)


def test_blocks_of_many_features(run, shim, monkeypatch):
    """So many that their number alone would leave less than a group of queries."""
    shim.limits(parts=4096)
    monkeypatch.setattr(data, "PARTS", 4096)
    found = run(clusters(70, 130, 256))
    assert Counter(one.name for one in found.shim)["refine"] == 3  # blocks of 24, 24 and 22
    check(found)


# ---- values ------------------------------------------------------------------------------------


def test_photographs(run):
    """Some rows have many distances to refine, and lists are of different lengths."""
    found = run(subjects.cifar_shape(60, 300))
    check(found)
    check_longest(found)
    model = {one.name: one for one in found.model}
    turns, pairs = model["find_limits"].loops["turns"], model["refine"].loops["pairs"]
    panels = model["weighted_sum"].loops["panels"]
    assert turns.most > 3 * turns.trips / model["find_limits"].blocks
    assert pairs.trips > 8 * model["refine"].blocks  # which share them out evenly
    assert panels.most > 1.2 * panels.trips / model["weighted_sum"].blocks


def test_digits(run):
    found = run(subjects.digits_shape(70, 500))
    check(found)
    check_longest(found)


def test_errors_without_a_bias(run):
    """On an H100, where one float adds up panels, only these errors are too large for some queries.
    Fewer pairs are refined for them: 364 would be if the errors had a bias."""
    generator = torch.Generator().manual_seed(0)
    B, M, N, apart = 40, 600, 1024, 120 / 1024**0.5
    side = (torch.arange(M) % 2 * 2 - 1)[:, None]  # far from the centre, on both sides of it
    y = torch.randn(M, N, generator=generator) + apart * side
    x = torch.randn(B, N, generator=generator) + apart
    found = run(Case(x, torch.logspace(1.5, 2.5, B), y))
    check(found)
    (refine,) = (one for one in found.model if one.name == "refine")
    assert 200 < refine.loops["pairs"].trips < 300


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(70, 192, 128), (24, 192, 96), (8, 320, 128), (40, 128, 16)])
def test_gradients(run, sizes):
    for dtype in (torch.float32, torch.uint8):
        found = run(clusters(*sizes), dtype, backward=True)
        check(found)
        kernel = re.compile(r"distances<.*, true, false>|differences<.*, true>")
        projects = [one.kernel for one in found.model if kernel.fullmatch(one.kernel)]
        assert len(projects) == 1


@pytest.mark.parametrize("sizes", [(70, 192, 128), (8, 320, 128)])
def test_gradients_from_kept_distances(run, sizes):
    found = run(clusters(*sizes), backward=True, kept=True)
    assert not {"find_limits", "refine"} & {one.name for one in found.shim}
    check(found)


@pytest.mark.parametrize("sizes", [(17, 1 << 16, 64), (100, 20_000, 64), (128, 4096, 3072)])
def test_which_problems_keep_distances(sizes):
    given = {"type": 0, "reference_type": 0}
    given |= dict(zip(("queries", "references", "features"), sizes, strict=True))
    keeps = native.extension().kept_bytes_cuda(**given) > 0
    assert Shape("", *sizes).keeps == keeps


def test_gradients_with_large_tiles(run):
    for dtype in TYPES:
        for card in (devices.A100, devices.H100, devices.B200):
            found = run(clusters(100, 192, 96), dtype, 1, backward=True, like=card)
            name = f"distances<{TYPES[dtype]}, 128, 128, false, "
            if card is devices.H100 and dtype == torch.float32:
                name = "warpgroup_distances<float32, 128, 192, "
            if card is devices.B200 and dtype == torch.float32:
                name = "tensor_memory_distances<float32, "
            kernels = {one.kernel for one in found.model}
            assert {f"{name}{project}, false>" for project in ("false", "true")} <= kernels
            check(found)


def test_gradients_with_slices(run):
    """Both launches of ``distances`` are the same kernel, the ones that finish it are not."""
    for dtype in (torch.float32, torch.bfloat16):
        found = run(clusters(40, 129, 1040), dtype, multiprocessors=9, backward=True)
        kernels = Counter(one.kernel for one in found.model)
        assert kernels[f"distances<{TYPES[dtype]}, 64, 64, false, false, true>"] == 2
        finish = f"finish_distances<{TYPES[dtype]}, false, "
        assert {f"{finish}{last}>" for last in ("false", "true")} <= set(kernels)
        check(found)


def test_gradients_of_chunks_and_blocks(run, small_chunks):
    found = run(clusters(100, 600, 64), backward=True)
    assert Counter(one.name for one in found.shim)["refine"] == 18  # two passes over the chunks
    check(found)


def test_gradients_of_photographs(run):
    check(run(subjects.cifar_shape(17, 130), backward=True))


# ---- precision "medium" -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "multiprocessors"),
    [
        ((24, 190, 96), 4),
        ((70, 190, 128), 7),
        ((70, 600, 256), 4),
        ((100, 300, 96), 1),
        ((8, 320, 128), 4),
        ((40, 192, 16), 4),
    ],
)
def test_medium(run, sizes, multiprocessors):
    """The model's centre is not scattered, so a pair more or less may be refined."""
    check(run(clusters(*sizes), multiprocessors=multiprocessors, precision="medium"))


@pytest.mark.parametrize(
    ("sizes", "multiprocessors", "kernel"),
    [
        ((100, 300, 96), 1, "128, 128, false, false, false"),
        ((97, 127, 1536), 3, "128, 128, false, false, true"),
    ],
)
def test_medium_on_an_a100(run, sizes, multiprocessors, kernel):
    given = clusters(*sizes), torch.float32, multiprocessors
    found = run(*given, precision="medium", like=devices.A100)
    assert f"distances<Rounded, {kernel}>" in {one.kernel for one in found.model}
    check(found)


@pytest.mark.parametrize(
    ("sizes", "multiprocessors", "kernel"),
    [
        ((100, 300, 96), 1, "<Rounded, 128, 128, false, false>"),
        ((129, 40, 36), 1, "<Rounded, 256, 128, false, false>"),
        ((257, 129, 72), 1, "<Rounded, 256, 128, false, false>"),
        ((97, 127, 1536), 3, "<Rounded, 128, 128, false, true>"),
        ((201, 127, 1552), 3, "<Rounded, 256, 128, false, true>"),
    ],
)
def test_medium_on_an_h100(run, sizes, multiprocessors, kernel):
    found = run(clusters(*sizes), multiprocessors=multiprocessors, precision="medium")
    assert f"warpgroup_distances{kernel}" in {one.kernel for one in found.model}
    check(found)
    # Not of refine: a pair more or less may be refined.
    check_longest(Run(*([one for one in each if "distances" in one.name] for each in found)))


@pytest.mark.parametrize(
    ("sizes", "multiprocessors", "kernel"),
    [
        ((100, 300, 96), 1, "<Rounded, false, false>"),
        ((129, 140, 36), 1, "<Rounded, false, false>"),
        ((97, 127, 1552), 3, "<Rounded, false, true>"),
    ],
)
def test_medium_on_a_b200(run, sizes, multiprocessors, kernel):
    given = clusters(*sizes), torch.float32, multiprocessors
    found = run(*given, precision="medium", like=devices.B200)
    assert f"tensor_memory_distances{kernel}" in {one.kernel for one in found.model}
    check(found)
    check_longest(Run(*([one for one in each if "distances" in one.name] for each in found)))


def test_medium_gradients_on_an_h100(run):
    for B in (100, 150):
        found = run(clusters(B, 192, 96), multiprocessors=1, backward=True, precision="medium")
        kernels = {one.kernel for one in found.model}
        name = f"warpgroup_distances<Rounded, {128 if B < 129 else 256}, 128, "
        assert {f"{name}{project}, false>" for project in ("false", "true")} <= kernels
        check(found)


def test_medium_in_chunks_and_blocks(run, small_chunks):
    check(run(clusters(100, 700, 64), precision="medium"))


def test_medium_of_photographs(run):
    """Many distances are refined."""
    found = run(subjects.cifar_shape(40, 200), precision="medium")
    check(found)
    (refine,) = (one for one in found.model if one.name == "refine")
    assert refine.loops["pairs"].trips > 10 * refine.blocks


def test_gradients_in_medium(run):
    for sizes in ((70, 192, 128), (24, 192, 96), (8, 320, 128)):
        check(run(clusters(*sizes), backward=True, precision="medium"))


# ---- by hand -----------------------------------------------------------------------------------


def test_counts_by_hand(run):
    """One block of 64 × 128 pairs with 96 features, and a sum of one part.

    Its 8 warps have 16 references each, 4 panels, the last of which is zero, 8 groups of 8
    queries and 6 products. It reads
    128 rows, and twice 64 of float16 that are padded to 128 features, like the centre.
    """
    found = run(clusters(64, 128, 96), multiprocessors=1, like=devices.A100)
    shim = {one.name: one for one in found.shim}
    (block,) = shim["distances"].blocks
    assert block.halves == 8 * 4 * 8 * 6
    assert block.copied == 128 * 96 * 4 + 64 * 2 * 128 * 2 + 128 * 4
    assert block.barriers == 2 + 3
    assert shim["weigh"].total.barriers == 64 * 3
    for block in shim["weighted_sum"].blocks:
        panels = block.barriers - 4
        # warps, steps, features, queries, products
        assert block.halves == panels * 4 * 2 * 2 * 4 * 3
        # Whole panels of rows and of weights.
        assert block.copied == panels * (32 * 96 * 4 + 32 * 32 * 4)
    check(found)
