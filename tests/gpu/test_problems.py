"""Problems of all kinds: every result and gradient beside float64, and the same bits in each order
in which the executor runs warps and blocks. The CUDA kernels compute them on every kind of GPU, as
all of them run the same PTX."""

import math
from dataclasses import dataclass
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

from pfgm.backends import native, triton
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean, State, Upstream
from tests.gpu.ptx_changes import Change, Changes

pytestmark = pytest.mark.skipif(triton.interpreted(), reason="the executor runs what is compiled")

INF = math.inf
SINGLE, BFLOAT, HALF, BYTE = torch.float32, torch.bfloat16, torch.float16, torch.uint8
TYPES = (SINGLE, BFLOAT, HALF, BYTE)
# Compute capability, which Triton's kernels are not told here, and order: ascending, descending,
# random. Bits are the same on the first three, and on the last two, whose matrix units are alike.
DEVICES = ((80, 0), (86, 1), (89, 7), (90, 0), (120, 7))
ORDERS = ((80, 0), (80, 1), (80, 7))
TOLERANCE = 5e-6
LIMITS = {  # of the CUDA kernels' blocks and chunks
    "parts": {"pairs": 600, "parts": 1, "queries": 17, "references": 128},
    "chunks": {"references": 128},
    "halved": {"halved": 10},
}


@dataclass(frozen=True)
class Case:
    B: int
    M: int
    N: int
    D: float
    dtype: torch.dtype = SINGLE
    gap: int = 0  # values between rows, which then start off boundaries
    sigma: float | None = None  # None: another one for each query
    shift: float = 0.0  # of all values
    exact: bool = False  # queries are references
    kind: str = ""  # of values and gradients
    times: float = 1.0  # all values
    limits: str = ""
    multiprocessors: int = 108

    @property
    def for_all(self) -> bool:
        """Not for the CUDA kernels alone."""
        return not self.limits and self.multiprocessors == 108

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        words = [f"{self.B}x{self.M}x{self.N}", f"D={self.D:g}", dtype, self.kind, self.limits]
        words += ["exact"] * self.exact
        words += [f"sigma={self.sigma:g}"] if self.sigma else []
        words += [f"times={self.times:g}"] if self.times != 1 else []
        return " ".join(filter(None, words))


def laid_out(values: Tensor, dtype: torch.dtype, gap: int) -> Tensor:
    rows, columns = values.shape
    stride = columns + gap
    memory = torch.empty(gap + (rows - 1) * stride + columns, dtype=dtype)
    return torch.as_strided(memory, (rows, columns), (stride, 1), gap).copy_(values)


class Problem:
    """A case with its results in float64."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0):
        self.case = case
        B, M, N, D = case.B, case.M, case.N, case.D
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        size = 0.4 if case.dtype == BYTE else 1.0
        features = torch.full((1, N), case.times, dtype=torch.float64)
        if case.kind == "scaled":
            features = features * torch.logspace(-5, 2, N, dtype=torch.float64)
        y = (size * normal(M, N) + case.shift) * features
        if case.kind == "outlier":
            y[M // 2] *= 1e5
        if case.kind == "constant":
            y[:] = y[0]
        if case.kind == "twice":
            y[M // 2 : 2 * (M // 2)] = y[: M // 2]
        if case.dtype == BYTE:
            y = ((y + 1) * 127.5).round().clamp(0, 255)
            if case.kind == "near":  # one value in each row differs from those of the other rows
                y[:] = y[0]
                y[torch.arange(M), torch.arange(M) % N] += 1
                y.clamp_(max=255)
        self.references = laid_out(y, case.dtype, case.gap).to(device)
        self.y = dequantise(self.references.cpu(), torch.float64)
        # From one reference that counts to many.
        most = max(1.5, 0.5 * math.sqrt(N))
        sigma = 0.2 * (most / 0.2) ** torch.rand(B, 1, generator=generator, dtype=torch.float64)
        sigma = size * sigma if case.sigma is None else torch.full_like(sigma, case.sigma)
        noise = 0.0 if case.exact else sigma * features * normal(B, N)
        x = self.y[torch.randint(M, (B,), generator=generator)] + noise
        self.x = laid_out(x, SINGLE, case.gap).to(device)
        self.radius = (sigma * case.times * (1 if math.isinf(D) else math.sqrt(D))).squeeze(1)
        if case.kind == "scaled":
            self.radius *= 20
        self.radius = self.radius.to(device)
        self.G, self.g = normal(B, N).float().to(device), normal(B).to(device)
        if case.kind == "mean alone":
            self.g.zero_()
        self.problem = PosteriorMean(self.x, self.references, self.radius, D)
        self._find_truth()

    def _find_truth(self) -> None:
        N, D, y = self.case.N, self.case.D, self.y
        x, r = self.x.double().cpu(), self.radius.cpu()[:, None]
        squared = torch.stack([(row - y).square().sum(1) for row in x])
        if math.isinf(D):
            score, slope, by_r = -squared / (2 * r**2), -1 / r**2, squared / r**3
        else:
            s = squared + r**2
            score, slope, by_r = -(N + D) / 2 * s.log(), -(N + D) / s, -(N + D) * r / s
        lse = score.logsumexp(1)
        p = (score - lse[:, None]).exp()
        mean = p @ y
        nearest, index = squared.min(1)
        G, g = self.G.double().cpu(), self.g.cpu()
        q = p * (G @ y.T - (G * mean).sum(1, keepdim=True) + g[:, None])
        by_distance = q * slope
        self.truth = {
            "mean": mean,
            "lse": lse,
            "nearest": nearest,
            "total": (lse - score.gather(1, index[:, None]).squeeze(1)).exp(),
            "grad_x": by_distance.sum(1, keepdim=True) * x - by_distance @ y,
            "grad_references": p.T @ G - by_distance.T @ x + by_distance.sum(0)[:, None] * y,
            "grad_radius": (q * by_r).sum(1),
        }

    def run(self, module, keeps: bool) -> dict[str, Tensor]:
        kept = (native.room_for_distances(self.problem),) if keeps else ()
        mean, lse, nearest, total = module.posterior_mean(self.problem, *kept)
        results = {"mean": mean, "lse": lse, "nearest": nearest, "total": total}
        needs = (True, self.case.dtype != BYTE, True)  # bytes have no gradient
        gradients = module.posterior_mean_backward(
            self.problem, State(mean, nearest, total), Upstream(self.G, self.g), needs, *kept
        )
        names = "grad_x", "grad_references", "grad_radius"
        return results | {n: g for n, g in zip(names, gradients, strict=True) if g is not None}

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """Relative to the values: the mean's to references and to itself, a gradient's to its
        largest."""
        size = self.y.abs().max()
        if self.case.kind == "scaled":
            size = self.y.abs().amax(0)
        if self.case.kind == "outlier":
            size = self.y.abs().sort(0)[0][-2].max()
        errors = {}
        for name, value in results.items():
            truth = self.truth[name]
            scale = {
                "mean": self.truth["mean"].abs().clamp(min=size),  # that of an outlier is rounded
                "lse": truth.abs().clamp(min=1),
                "nearest": truth.clamp(min=1e-30),
                "total": truth,
            }.get(name, truth.abs().max())
            error = ((value.double().cpu() - truth).abs() / scale).max().item()
            errors[name] = error
        return errors

    def tolerances(self) -> dict[str, float]:
        """Of the results by name, as docs/backends.md states them."""
        case = self.case
        tolerances = dict.fromkeys(self.truth, TOLERANCE)
        if case.dtype in (BFLOAT, HALF):  # to which the gradient is rounded
            tolerances["grad_references"] = torch.finfo(case.dtype).eps
        if case.kind == "scaled":  # scores are hundreds of nats
            score = (self.truth["nearest"] / (2 * self.radius.cpu() ** 2)).max().item()
            tolerances["total"] = max(tolerances["total"], 2**-24 * score)
        return tolerances


def slow(*cases: Case) -> list:
    return [pytest.param(case, marks=pytest.mark.slow, id=str(case)) for case in cases]


def fast(*cases: Case) -> list:
    return [pytest.param(case, id=str(case)) for case in cases]


def kinds() -> list[Case]:
    sizes = [(40, 130, 96), (258, 130, 260), (9, 70, 33)]
    cases = [
        Case(*s, INF, sigma=2.0, kind=k)
        for s in sizes
        for k in ("scaled", "outlier", "constant", "twice")
    ]
    cases += [Case(70, 140, 97, INF, BFLOAT, sigma=2.0, kind=k) for k in ("outlier", "constant")]
    cases += [
        Case(40, 130, 96, INF, BYTE, sigma=s, kind=k)
        for k in ("constant", "near")
        for s in (1e-3, 1e-2, 0.1)
    ]
    return cases


# At the edges of tiles, panels and stages: queries 8, 32, 64, 128; references 32, 64, 128; features
# 32, 64, 128. Products take over from differences at 16 queries and 32 features.
SMALL = [
    (1, 1, 1), (4, 16, 64), (8, 63, 4), (9, 65, 31), (15, 33, 257), (16, 64, 32), (17, 65, 33),
    (32, 31, 127), (33, 129, 20), (40, 150, 97), (64, 70, 128), (65, 130, 129),
]  # fmt: skip
LARGE = [
    (100, 65, 32), (100, 127, 33), (100, 129, 63), (128, 128, 65), (241, 129, 97), (97, 300, 161),
    (100, 129, 36), (241, 129, 100), (97, 300, 164), (100, 127, 900),
]  # fmt: skip
# With numbers of multiprocessors at which blocks share the features: parts of tiles, odd numbers of
# panels, and last panels that are not whole.
SLICED = [(17, 65, 1040, 6), (40, 129, 1040, 9), (97, 127, 1552, 3)]
EDGES = [
    *fast(*(Case(*sizes, (1.0, INF, 64.0)[i % 3]) for i, sizes in enumerate(SMALL))),
    *fast(*(Case(*SMALL[i], 1.0, dtype) for i in (3, 4, 6, 11) for dtype in TYPES[1:])),
    *slow(
        *(Case(*s, (1.0, INF)[i % 2], multiprocessors=1) for i, s in enumerate(LARGE)),
        *(Case(*LARGE[i], INF, dtype, multiprocessors=1) for i in (1, 8) for dtype in TYPES[1:]),
        *(Case(100, 129, 66, 1.0, gap=gap, multiprocessors=1) for gap in (1, 2, 3)),
        *(Case(*sizes, 1.0, multiprocessors=count) for *sizes, count in SLICED),
        *(Case(40, 129, 1040, INF, dtype, multiprocessors=9) for dtype in TYPES[1:]),
        Case(17, 65, 1040, 1.0, gap=1, multiprocessors=6),
        Case(97, 127, 1552, INF, gap=1, multiprocessors=3),
        *(Case(40, 129, 1040, INF, times=times, multiprocessors=9) for times in (1e-17, 1e15)),
    ),
]
CASES = [
    # differences
    *fast(
        Case(1, 1, 1, 1.0), Case(9, 65, 97, 128.0, BYTE), Case(40, 300, 2, INF, sigma=0.3),
        Case(3, 1100, 8, INF, HALF), Case(9, 64, 40, INF, HALF, sigma=0.05, kind="twice"),
    ),
    *slow(
        Case(8, 31, 32, INF), Case(15, 130, 31, INF, BFLOAT, gap=1), Case(1, 1000, 96, 2048.0),
        Case(3, 70, 33, 1.0, HALF, gap=2), Case(20, 2300, 40, 128.0), Case(3, 2300, 7, INF, BYTE),
    ),
    # tiles of products
    *fast(
        Case(16, 63, 33, 1.0, gap=1), Case(40, 300, 96, INF, BYTE),
        Case(17, 200, 36, 128.0, BFLOAT),
        Case(65, 130, 129, 1.0, gap=2),
    ),
    *slow(
        Case(40, 300, 96, 2048.0), Case(17, 1000, 33, INF, HALF, gap=1), Case(129, 257, 100, 128.0),
        Case(129, 257, 100, INF, BFLOAT, gap=3), Case(129, 257, 100, 128.0, BYTE),
        Case(20, 60, 1028, 128.0), Case(20, 60, 1028, INF, BYTE),
    ),
    # numbers of queries, references and features that tiles, groups and pieces do not divide
    *slow(*(
        Case(32 + i, 64 + 2 * i, 33 + i // 4 * (2 if i % 4 == 3 else 1), 128.0, TYPES[i % 4])
        for i in range(1, 32)
    )),
    # large tiles, sums that blocks share
    *fast(Case(70, 100, 97, 128.0, multiprocessors=1), Case(100, 130, 100, INF, multiprocessors=1)),
    *slow(
        Case(130, 200, 484, INF, sigma=1.0, multiprocessors=1),
        Case(128, 200, 97, INF, BYTE, multiprocessors=2),
        Case(128, 140, 97, 1.0, HALF, multiprocessors=2),
        Case(128, 140, 96, 1.0, BFLOAT, multiprocessors=2),
        Case(258, 130, 260, 128.0, multiprocessors=1),
        Case(513, 97, 256, INF, sigma=1.5, multiprocessors=1),
        Case(600, 300, 64, INF, sigma=4.0, multiprocessors=1),
    ),
    # blocks and chunks
    *fast(Case(36, 300, 40, INF, HALF, limits="parts")),
    *slow(
        Case(36, 300, 40, 128.0, limits="parts"), Case(9, 140, 5, 1.0, limits="parts"),
        Case(40, 300, 64, INF, sigma=6.0, limits="chunks"),
        Case(258, 300, 260, INF, sigma=8.0, limits="chunks", multiprocessors=1),
        Case(40, 90, 40, 128.0, limits="halved"), Case(40, 90, 40, INF, BYTE, limits="halved"),
    ),
    # near and broad
    *fast(Case(40, 100, 64, INF, sigma=0.001), Case(48, 100, 96, INF, sigma=6.0)),
    *slow(
        Case(40, 300, 64, 1.0, sigma=0.0001, shift=1000.0),
        Case(40, 300, 64, 2048.0, sigma=20.0),
        Case(9, 300, 64, 2048.0, sigma=20.0), Case(258, 130, 260, INF, sigma=10.0),
        Case(40, 300, 96, 128.0, BYTE, sigma=8.0), Case(70, 140, 97, INF, HALF, sigma=6.0, gap=1),
    ),
    # tiny and huge values
    *slow(*(
        Case(*size, INF, sigma=2.0, times=times, multiprocessors=multiprocessors)
        for *size, multiprocessors in ((40, 130, 96, 108), (258, 130, 260, 1), (9, 130, 33, 108))
        for times in (1e-17, 1e-15, 1e15)
    )),
    # a gradient of the mean alone, whose coefficients add up to 0, far from the origin
    *fast(Case(40, 65, 36, 128.0, HALF, sigma=1.0, shift=100.0, kind="mean alone")),
    *slow(Case(9, 70, 36, 128.0, sigma=3.0, shift=100.0, kind="mean alone")),
    # references of unusual values; queries at references
    *fast(
        Case(40, 100, 96, INF, sigma=2.0, kind="outlier"),
        Case(40, 60, 96, INF, BYTE, sigma=1e-2, kind="near"),
    ),
    *slow(*kinds()),
    *fast(Case(40, 130, 40, INF, BYTE, exact=True)),
    *slow(
        Case(40, 130, 40, 128.0, exact=True),
        Case(5, 130, 3, 1.0, exact=True),
    ),
]  # fmt: skip


# Small ones: all that are fast, more than half of a block's references, nearly all queries of two
# tiles, four pieces of references, an odd number of queries of a group; in float16 a gradient far
# from the origin, and pairs of which every warp refines several.
SENSITIVE = [
    *(each.values[0] for each in CASES if not each.marks),
    Case(9, 1100, 1, 1.0), Case(60, 65, 100, 128.0, HALF), Case(60, 130, 40, INF, BYTE, exact=True),
    Case(256, 60, 256, 1.0, multiprocessors=1),
    Case(1, 3100, 3, INF, BYTE, multiprocessors=1), Case(45, 65, 37, 1.0, multiprocessors=1),
    Case(45, 65, 100, 128.0, HALF, sigma=5.0, multiprocessors=1),
    Case(45, 65, 100, 128.0, HALF, sigma=2.0, multiprocessors=1),
    Case(9, 65, 36, 128.0, HALF, sigma=1.0, shift=100.0, kind="mean alone", multiprocessors=1),
]  # fmt: skip
# Changes without effect, and why. They were read in the PTX of nvcc 13.0 and of Triton 3.9.
CUDA_MISSED = {
    "one copy more may be under way, weighted_sum, sm_80: cp.async.wait_group 0;": (
        "After the last panel, when only empty groups are left."
    ),
    "one copy more may be under way, distances, sm_80: cp.async.wait_group 0;": (
        "After the last panel, when only empty groups are left."
    ),
    "mma: operands a1, a2, distances, sm_80: mma.sync.aligned.m16n8k16.row.col.f32.f16.f16"
    ".f32 {%f, %f, %f, %f}, {%r, %r, %r, %r}, {%r, %r}, {%f, %f, %f, %f};": (
        "A product of a low part. Distances that decide are computed again; others like it change "
        "the mean by 8e-7 at most."
    ),
    "mma: operands a1, a2, reference_gradient, sm_80: mma.sync.aligned.m16n8k8.row.col.f32.tf32"
    ".tf32.f32 {%f, %f, %f, %f}, {%r, %r, %r, %r}, {%r, %r}, {%f, %f, %f, %f};": (
        "A product of a low part, 2^-11 of the sum at most, which is rounded to bfloat16."
    ),
    "a shuffle that stays in its lane, reference_gradient, sm_80: "
    "shfl.sync.bfly.b32 %r|%p, %r, %r, %r, %r;": (
        "Twice: sizes that move the bound below which differences are summed."
    ),
    "a shuffle that stays in its lane, merge_gradient, sm_80: "
    "shfl.sync.bfly.b32 %r|%p, %r, %r, %r, %r;": (
        "A size that moves the bound below which differences are summed."
    ),
    "a load 16 bytes on, merge_gradient, sm_80: ld.shared.v4.f32 {%f, %f, %f, %f}, "
    "[_ZN4pfgm6memoryE+5120];": ("A size that moves the bound below which differences are summed."),
    "≤ for <, distances, sm_80: setp.lt.s32 %p, %r, 49;": (
        "A last tile of 49 to 63 references, which these problems do not have. "
        "Case(60, 120, 40, 128.0) notices it."
    ),
    "> for ≥, pull, sm_80: setp.ge.s32 %p, %r, %r;": (
        "Where a piece has no references, a round of the loop that reads none."
    ),
    "a store 16 bytes on, find_limits, sm_80: st.shared.u64 [_ZN4pfgm6memoryE+96], %rd;": (
        "The limit of differences, of which none must be computed again in these problems. "
        "test_refinement.py notices it."
    ),
}
TRITON_MISSED = {
    "a copy of 0 bytes, multiply, sm_80: cp.async.ca.shared.global [%r+0], [%rd+0], 0x4, %r;": (
        "Rows of a tile after the last of nine queries."
    ),
    "mma: operands a1, a2, weighted_sum, sm_80: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16"
    ".f32 {%r, %r, %r, %r}, {%r, %r, %r, %r}, {%r, %r}, {%r, %r, %r, %r};": (
        "Bytes are one part of bfloat16, so that the other parts are 0."
    ),
    "mma: operands b0, b1, weighted_sum, sm_80: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16"
    ".f32 {%r, %r, %r, %r}, {%r, %r, %r, %r}, {%r, %r}, {%r, %r, %r, %r};": (
        "Bytes are one part of bfloat16, so that the other parts are 0."
    ),
    "mma: operands b0, b1, multiply, sm_80: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16"
    ".f32 {%r, %r, %r, %r}, {%r, %r, %r, %r}, {%r, %r}, {%r, %r, %r, %r};": (
        "Products of low parts: at most 8e-11 of a result changes."
    ),
    "mma: operands a1, a2, reference_gradient, sm_80: mma.sync.aligned.m16n8k16.row.col.f32.bf16"
    ".bf16.f32 {%r, %r, %r, %r}, {%r, %r, %r, %r}, {%r, %r}, {%r, %r, %r, %r};": (
        "Features after the first, which are 0."
    ),
    "a load 16 bytes on, merge_gradient, sm_80: ld.shared.b32 %r, [%r+2048];": (
        "Features after the second, which are not stored."
    ),
    "≤ for <, multiply, sm_80: setp.lt.s32 %p, %r, %r;": (
        "A panel after the last, which is loaded early and not used."
    ),
    "> for ≥, subtract, sm_80: setp.ge.s32 %p, %r, %r;": (
        "Whether a segment of references is empty. None is."
    ),
    "fma: factor and addend, merge_gradient, sm_80: fma.rn.f32 %r, %r, %r, %r;": (
        "It moves the bound below which differences are summed. No bit of a result changes."
    ),
    "a shuffle that stays in its lane, center_rows, sm_80: "
    "shfl.sync.bfly.b32 %r, %r, 16, 31, -1;": (
        "Another power of two brings values to about 1."
    ),
    "≤ for <, weigh, sm_80: setp.lt.u32 %p, %r, 2139095040;": (
        "Whether the argument of a logarithm is infinite. None is."
    ),
    "fma: factor and addend, refine, sm_80: fma.rn.f32 %r, %r, %r, %r;": (
        "Features after the last, whose differences are set to 0."
    ),
    "a shuffle that stays in its lane, merge_gradient, sm_80: "
    "shfl.sync.bfly.b32 %r, %r, 4, 31, -1;": (
        "It moves the bound below which differences are summed. 5e-7 of a gradient changes."
    ),
}  # fmt: skip


def check(problem: Problem, op, executor, runs=ORDERS) -> None:
    """Each result is accurate, and has the same bits in each order. Nothing else is wrong."""
    first = {}
    for capability, order in runs if executor else ORDERS[:1]:
        if executor:
            executor.order(order)
            if op.module is native:
                executor.device(capability, problem.case.multiprocessors)
        results = problem.run(op.module, op.module is native and problem.case.B % 2 == 0)
        assert executor is None or executor.errors() == []
        errors, tolerances = problem.errors(results), problem.tolerances()
        assert {name: e for name, e in errors.items() if not e <= tolerances[name]} == {}
        bits = {name: value.contiguous().view(torch.uint8) for name, value in results.items()}
        expected = first.setdefault(capability < 90, bits)
        assert all(torch.equal(bits[name], expected[name]) for name in bits), (capability, order)


@pytest.fixture
def prepared(request, backend, device):
    """prepared(case) → its problem, with the limits of its kernels."""

    def prepare(case: Case) -> Problem:
        if backend == "native":
            request.getfixturevalue("limits")(**LIMITS.get(case.limits, {}))
        return Problem(case, device, seed=sum(str(case).encode()))

    return prepare


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [*EDGES, *CASES])
def test_problem(op, backend, request, prepared, case):
    if backend == "triton" and not case.for_all:
        pytest.skip("of the CUDA kernels alone")
    on_gpu = request.getfixturevalue("session_executor") is None
    slow = request.node.get_closest_marker("slow")
    runs = DEVICES if backend == "native" else ORDERS[::2] if slow else ORDERS
    check(prepared(case), op, None if on_gpu else request.getfixturevalue("executor"), runs)


@pytest.mark.slow
def test_single_changes_of_ptx_are_noticed(op, backend, executor, prepared):
    """By a wrong result or by the executor, in a problem that executes the changed instruction.
    What is not noticed is in CUDA_MISSED and TRITON_MISSED."""
    by_triton = backend == "triton"
    if by_triton:
        known = version("triton") == "3.9.0"
    else:
        known = executor.modules()[0].startswith(".version 9.0")
    if not known:
        pytest.skip("what is missed was read in the PTX of nvcc 13.0 and of Triton 3.9 alone")
    executed = {}
    for case in sorted(SENSITIVE, key=lambda case: case.B * case.M * case.N):
        if case.for_all or not by_triton:
            executor.reload()
            check(prepared(case), op, executor, ORDERS[:1])
            executed[case] = executor.executed()
    changes = Changes(executor, set().union(*executed.values()))

    def verdict(change: Change) -> str:
        with changes.made(change):
            for case, places in executed.items():
                if change.where in places:
                    try:
                        check(prepared(case), op, executor)
                    except (AssertionError, RuntimeError):
                        return f"noticed by {case}"
        return "missed"

    missed = []
    for change in changes.draw(40):  # at least one of each kind
        result = verdict(change)
        print(f"{change}\n    line {change.place}, {change.before}: {result}", flush=True)
        if result == "missed":
            missed.append(str(change))
    assert set(missed) == set(TRITON_MISSED if by_triton else CUDA_MISSED)
