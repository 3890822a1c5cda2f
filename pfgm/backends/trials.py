"""The fixed problems of :func:`pfgm.backends.check`.

A trial computes with one backend on one device. The same trial with the backend ``reference`` in
float64 on the CPU gives the exact results.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.tensors import dequantise, wide_dtype
from ..core.problems import OdeStep, PosteriorMean, State, Upstream
from . import native, native_calls
from .backend import BACKENDS, Backend
from .verdicts import SIZES

ALLOWED = {
    "mean": 2e-5,
    "log-sum-exp": 2e-5,
    "difference": 1e-4,
    "gradient": 1e-4,
    "field": 2e-5,
    "step": 1e-5,
}
"""The largest error by the first word of a result's name. That of a mean or field is relative to
√N, which no reference exceeds. All others are relative to their rows."""

# Points, references and features. They decide which kernels a GPU runs, and with how many blocks
# in which tiles. No size is a multiple of a tile's.
SHAPES = {
    "few points": (5, 70, 37),
    "32 points a tile": (20, 70, 100),
    "64 points a tile": (590, 1030, 100),
    "128 references a tile": (300, 4100, 484),  # more panels than one float adds up
    "128 references and points a tile": (1020, 2040, 100),
    "128 references, 256 points a tile": (1020, 4100, 36),
    "slices, 32 points a tile": (66, 33, 3070),
    "slices, 64 points a tile": (40, 1500, 2070),
    "slices, 128 points a tile": (97, 2100, 3076),
}
# Sizes at which an A100, an H100, an RTX 3090 and an RTX 4090 take all kernels that they can choose
# for a type of references (tests/kernels/launched.py).
_MANY_SIZES = (
    (20, 40, 2070),
    (3, 2100, 31),
    (40, 300, 36),
    (300, 1100, 36),
    (300, 2100, 36),
    (300, 4100, 36),
    (590, 1200, 36),
    (590, 4100, 36),
    (590, 5000, 36),
    (300, 4100, 484),
    (1020, 2100, 484),
    (66, 4100, 1030),
    (40, 4100, 2070),
    (97, 4100, 2070),
    (130, 1100, 2070),
    (300, 1100, 2070),
    (40, 1100, 3076),
    (66, 300, 3076),
    (97, 2100, 3076),
    (130, 2100, 3076),
    (300, 300, 3076),
    (1020, 300, 3076),
    (590, 40, 3076),
    (590, 1100, 3076),
)
_TYPES = {
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "bytes": torch.uint8,
}
# Rows for part of a warp, a block, and longer ones. Odd lengths are read value by value.
_WIDTHS = (36, 37, 1041, 6150, 8200)
_ROWS = 5
_GAMMA = 5.0
_IN_A_ROW = 20
_MOST_VALUES = 1 << 21  # of a gradient of references that are compared
_ROWS_OF_SIZES = 8  # points of the timed problems that are compared

Results = dict[str, Tensor]


class Place(NamedTuple):
    """What computes a trial."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    """Of the points."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


EXACT = Place(BACKENDS["reference"], torch.device("cpu"), torch.float64)


class Trial(NamedTuple):
    """One problem."""

    compute: Callable[[Place], Results]
    quick: bool = False
    """Whether a quick check has it, too."""
    references: torch.dtype | None = None
    """The type of references, which not all backends read."""
    only: str | None = None
    """The one backend that it is for."""
    gpus: int = 0
    """How many GPUs it needs."""
    large: bool = False
    """Whether the backend ``reference`` is left out: it would take too long."""

    def applies(self, backend: str, device: torch.device) -> bool:
        """Whether a backend computes it on a device."""
        if self.gpus and (device.type != "cuda" or torch.cuda.device_count() < self.gpus):
            return False
        able = BACKENDS[backend].supports(device, torch.float32, self.references) is None
        fits = not (self.large and backend == "reference")
        return able and fits and self.only in (None, backend)

    def allowed(self, result: str) -> float:
        """The largest error of a result."""
        return ALLOWED[result.split()[0]]


def name_of(sizes: tuple[int, int, int]) -> str:
    """The sizes in words."""
    return "{} × {} × {}".format(*sizes)


# ---- data --------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Points between references at all levels, on the CPU."""

    x: Tensor
    """(B, N) in float32."""
    references: Tensor
    """(M, N)."""
    radius: Tensor
    """(B,) in float64."""
    upstream: Upstream

    def to(self, place: Place) -> Data:
        x, references, radius, (G, g) = self
        device, wide = place.device, wide_dtype(place.device)
        upstream = Upstream(G.to(device, place.dtype), g.to(device, wide))
        points = x.to(device, place.dtype, copy=True)
        return Data(points, references.to(device), radius.to(device, wide), upstream)


def _data(
    B: int,
    M: int,
    N: int,
    D: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    near: int | None = None,
) -> Data:
    """``near`` is the number of references, the first ones, that points are close to."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cpu")

    # Images are smooth: few directions have most of their variance.
    y = torch.tanh(normal(M, 12) @ normal(12, N) / 3 + 0.1 * normal(M, N))
    references = ((y + 1) * 127.5).round().to(dtype) if dtype == torch.uint8 else y.to(dtype)
    y = dequantise(references, torch.float32)
    sigma = 10 ** (2.5 * uniform(B) - 1.5)
    first, second = (
        torch.randint(near or M, (B,), generator=generator, device="cpu") for _ in range(2)
    )
    x = y[first] + 0.5 * uniform(B, 1) * (y[second] - y[first]) + sigma[:, None] * normal(B, N)
    radius = sigma.double() * (1.0 if math.isinf(D) else math.sqrt(D))
    upstream = Upstream(normal(B, N), sigma.double().square().clamp(max=1) * normal(B).double())
    return Data(x, references, radius, upstream)


# ---- what a trial computes ---------------------------------------------------------------------


def _mean_and_gradients(
    place: Place,
    data: Data,
    D: float = 1.0,
    *,
    needs_references: bool = True,
) -> Results:
    x, references, radius, upstream = data
    problem = PosteriorMean(x, references, radius, D)
    mean, logsumexp, nearest, total = place.backend.posterior_mean(problem)
    state = State(mean, nearest, total)
    needs_references &= references.dtype == torch.float32  # other gradients are rounded
    grad_x, grad_references, grad_radius = place.backend.posterior_mean_backward(
        problem, state, upstream, (True, needs_references, True)
    )
    results = {"mean": mean / math.sqrt(x.shape[1]), "log-sum-exp": logsumexp}
    results |= {"gradient of x": grad_x, "gradient of r": grad_radius}  # type: ignore[dict-item]
    if grad_references is not None:
        step = -(-grad_references.numel() // _MOST_VALUES)
        results["gradient of references"] = grad_references[::step]
    return results


def _shape(
    place: Place,
    sizes: tuple[int, int, int],
    D: float,
    dtype: torch.dtype = torch.float32,
) -> Results:
    data = _data(*sizes, D, dtype, seed=sum(sizes))
    return _mean_and_gradients(place, data.to(place), D)


def _limits(place: Place) -> Results:
    """Points on references, also of r = 0, in the middle of two, and beside equal references."""
    x, references, radius, _ = _data(20, 61, 40)
    references[40:50] = references[:10]
    x[:10], radius[:5] = references[:10], 0
    x[10:15] = (references[20:25] + references[30:35]) / 2
    radius[10:15] = 1e-3
    data = Data(x, references, radius, Upstream(x, radius)).to(place)
    mean, logsumexp, _, _ = place.backend.posterior_mean(PosteriorMean(*data[:3], 1.0))
    return {"mean": mean / math.sqrt(x.shape[1]), "log-sum-exp": logsumexp}


def _difference(place: Place) -> Results:
    """x − mean, which is small beside its terms."""
    x, references, radius, _ = _data(40, 300, 96)
    references = references[:1] + 1e-2 * references
    x = references[:40] + 1e-3 * x
    data = Data(x, references, radius.clamp(0.03, 0.3), Upstream(x, radius)).to(place)
    problem = PosteriorMean(*data[:3], math.inf, difference=True)
    return {"difference x − mean": place.backend.posterior_mean(problem)[0]}


def _field(place: Place, sizes: tuple[int, int, int] = (40, 300, 97)) -> Results:
    """PFGM's field, by the native kernels in the one call that they have for it."""
    x, references, z, _ = _data(*sizes).to(place)
    fields = None
    if place.backend is BACKENDS["native"]:
        gpu = place.device if place.on_gpu else None
        fields = native_calls.field(gpu, x, references, z, _GAMMA, None)
    if fields is None:
        problem = PosteriorMean(x, references, z, 1.0, difference=True)
        difference = place.backend.posterior_mean(problem)[0]
        fields = place.backend.normalised_field(difference, z, _GAMMA)
    root = math.sqrt(x.shape[1])
    return {"field in x": fields[0] / root, "field in z": fields[1][:, None] / root}


def _normalised(place: Place, features: int) -> Results:
    x, _, z, (G, g) = _data(_ROWS, 9, features).to(place)
    field_x, field_z = place.backend.normalised_field(x, z, _GAMMA)
    grad_x, grad_z = place.backend.normalised_field_backward(G, g.to(x.dtype), x, z, _GAMMA)
    root = math.sqrt(features)
    fields = {"field in x": field_x / root, "field in z": field_z[:, None] / root}
    return fields | {"gradient of x": grad_x, "gradient of z": grad_z[:, None]}


def _steps(place: Place, features: int) -> Results:
    """Steps from a field and from a mean, with history and without, also into their points."""
    x, _, z, (history, _) = _data(_ROWS, 9, features).to(place)
    slope = 0.3 * history / history.norm(dim=1, keepdim=True) * math.sqrt(features)
    field_z = -(z.to(x.dtype) + 1)
    rows = torch.stack([z, torch.full_like(z, 0.4), torch.full_like(z, -0.2)])
    levels = [(0.5, 0.1, 0.0, None), (20.0, 0.9, 0.3, None), (0.0, 0.0, 0.0, rows)]
    results: dict[str, Tensor | None] = {}
    for k, (level, exact) in enumerate(itertools.product(levels, (True, False))):
        step = OdeStep(x, slope, field_z, history, *level, _GAMMA, 7.0, exact)
        result, mean = place.backend.ode_step(step, True)
        results[f"step {k}"], results[f"step {k}, mean"] = result, mean
        own = step._replace(x=x.clone(), slope=slope, field_z=None)
        results[f"step {k} from a mean"], _ = place.backend.ode_step(own, False, own.x)
    results["step in one call"], results["step in one call, mean"] = _step(place, step, z)
    return results  # type: ignore[return-value]


def _step(place: Place, step: OdeStep, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Euler's step to z/2, by the native kernels in the one call that they have for it."""
    x, slope, field_z, *_ = step
    if place.backend is BACKENDS["native"]:
        gpu, law = place.device if place.on_gpu else None, (_GAMMA, 7.0, "exact")
        levels = z, 0.5 * z, 1.0
        call = (gpu, x, slope, field_z, None, None, None, *levels, native_calls.EULER, law, True)
        if (results := native_calls.step(*call)) is not None:
            return results
    rows = torch.stack([z, torch.full_like(z, 0.5), torch.zeros_like(z)])
    return place.backend.ode_step(step._replace(history=None, row_levels=rows, exact=True), True)


def _everything(place: Place, data: Data) -> Results:
    """A mean, its gradients, and a step towards it."""
    results = _mean_and_gradients(place, data)
    slope = results["mean"]
    step = OdeStep(data.x, slope, None, None, 1.0, 0.5, 0.0, None, _GAMMA, 0.0, True)
    results["step"] = place.backend.ode_step(step, False)[0]
    return results


# ---- how a GPU is told to compute it -----------------------------------------------------------

_BATCH = (70, 300, 97)


def _stacked(batches: Iterable[Results]) -> Results:
    listed = list(batches)
    return {name: torch.cat([each[name] for each in listed]) for name in listed[0]}


def _in_a_row(place: Place) -> Results:
    """Launches of different problems that nothing waits for."""
    batches = [_data(*_BATCH, seed=seed).to(place) for seed in range(_IN_A_ROW)]
    return _stacked([_everything(place, batch) for batch in batches])


def _in_chunks(place: Place) -> Results:
    """Blocks of points and chunks of references that are smaller than they would be."""
    limited = place.backend is BACKENDS["native"] and place.on_gpu
    limit = native.extension().limit_cuda if limited else None
    if limit is not None:
        limit(pairs=600, parts=1, queries=17, references=128)
    try:
        return _shape(place, (40, 700, 68), 1.0)
    finally:
        if limit is not None:
            limit()


def _in_each_tile(place: Place) -> Results:
    """Each of the tiles that a measurement may choose in Triton's kernels."""
    batches = []
    for index in range(2):
        forced: AbstractContextManager[object] = nullcontext()
        if place.backend is not EXACT.backend:
            forced = importlib.import_module("pfgm.kernels.tuning").forced(index)
        with forced:
            batches += [_shape(place, sizes, 1.0) for sizes in ((130, 500, 100), (590, 500, 100))]
    return _stacked(batches)


@functools.lru_cache(1)
def _pool(dtype: torch.dtype) -> Data:
    """What all sizes are cut from: to make data takes longer than to compute."""
    B, M, N = (max(sizes) for sizes in zip(*_MANY_SIZES, strict=True))
    return _data(B, M, N, dtype=dtype, near=40)


def _corner(pool: Data, sizes: tuple[int, int, int]) -> Data:
    """The first values of the first rows."""
    B, M, N = sizes
    x, references, radius, (G, g) = pool
    upstream = Upstream(G[:B, :N].contiguous(), g[:B])
    return Data(x[:B, :N].contiguous(), references[:M, :N].contiguous(), radius[:B], upstream)


def _at_many_sizes(place: Place, dtype: torch.dtype = torch.float32) -> Results:
    """From few blocks to many, so that a GPU takes each kernel that is best somewhere. Some points
    are compared."""
    results: Results = {}
    for k, sizes in enumerate(_MANY_SIZES):
        B, D = sizes[0], (1.0, math.inf)[k % 2]
        x, references, radius, (G, g) = _corner(_pool(dtype), sizes)
        step = max(B // _ROWS_OF_SIZES, 1)
        if place is EXACT:
            x, radius, G, g, step = x[::step], radius[::step], G[::step], g[::step], 1
        data = Data(x, references, radius, Upstream(G, g)).to(place)
        values = _mean_and_gradients(place, data, D, needs_references=False)
        if k == 0:
            apart = PosteriorMean(*data[:3], D, difference=True)
            values["difference x − mean"] = place.backend.posterior_mean(apart)[0]
        results |= {f"{name} at {name_of(sizes)}": rows[::step] for name, rows in values.items()}
    return results


def _on_another_stream(place: Place) -> Results:
    """The points arrive on another stream than the current one, and late."""
    if not place.on_gpu:
        return _everything(place, _data(*_BATCH).to(place))
    late = _data(*_BATCH).to(place)
    data = late._replace(x=torch.full_like(late.x, math.nan))
    stream = torch.cuda.Stream(place.device)
    stream.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        data.x.copy_(late.x)
        results = _everything(place, data)
    stream.synchronize()
    return results


def _in_a_graph(place: Place) -> Results:
    """The replays of a graph on other values than those of its capture."""
    batches = [_data(*_BATCH, seed=seed).to(place) for seed in range(3)]
    if not place.on_gpu:
        return _stacked([_everything(place, batch) for batch in batches])
    held = _data(*_BATCH, seed=9).to(place)
    with torch.cuda.stream(torch.cuda.Stream(place.device)):
        _everything(place, held)
    torch.cuda.synchronize(place.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _everything(place, held)

    def replayed(batch: Data) -> Results:
        pairs = zip((*held[:3], *held.upstream), (*batch[:3], *batch.upstream), strict=True)
        for own, other in pairs:
            own.copy_(other)
        graph.replay()
        return {name: result.clone() for name, result in results.items()}

    return _stacked([replayed(batch) for batch in batches])


def _on_the_second_gpu(place: Place) -> Results:
    """Another GPU than the current one."""
    if place.on_gpu:
        other = 1 if (place.device.index or 0) == 0 else 0
        place = place._replace(device=torch.device("cuda", other))
    return _everything(place, _data(*_BATCH).to(place))


def _rows_of_size(place: Place, sizes: tuple[int, int, int]) -> Results:
    """Some points of a problem that is timed."""
    x, references, radius = _timed(sizes)
    step = len(x) // _ROWS_OF_SIZES
    if place is EXACT:
        x, radius, step = x[::step], radius[::step], 1
    data = Data(x, references, radius, Upstream(x, radius)).to(place)
    mean, logsumexp, _, _ = place.backend.posterior_mean(PosteriorMean(*data[:3], 1.0))
    return {"mean": mean[::step] / math.sqrt(sizes[2]), "log-sum-exp": logsumexp[::step]}


# ---- all trials --------------------------------------------------------------------------------


def _trials() -> Iterator[tuple[str, Trial]]:
    part = functools.partial
    for k, (name, sizes) in enumerate(SHAPES.items()):
        D = (1.0, math.inf, 128.0)[k % 3]
        yield f"{name}, {name_of(sizes)}", Trial(part(_shape, sizes=sizes, D=D), quick=k < 3)
    for name, dtype in _TYPES.items():
        for sizes in ((5, 70, 37), (66, 500, 100)):
            compute = part(_shape, sizes=sizes, D=1.0, dtype=dtype)
            yield f"{name}, {name_of(sizes)}", Trial(compute, sizes[0] == 66, references=dtype)
    yield "ties and limits", Trial(_limits, quick=True)
    yield "x − mean", Trial(_difference, quick=True)
    yield "field", Trial(_field, quick=True)
    for features in _WIDTHS:
        quick = features == 37
        yield f"normalised field, {features}", Trial(part(_normalised, features=features), quick)
        yield f"steps, {features}", Trial(part(_steps, features=features), quick)
    yield f"{_IN_A_ROW} launches in a row", Trial(_in_a_row, quick=True)
    yield "in small chunks", Trial(_in_chunks, quick=True)
    yield "in each tile", Trial(_in_each_tile, only="triton")
    yield "many sizes", Trial(_at_many_sizes, large=True)
    for name, dtype in _TYPES.items():
        if dtype != torch.float64:
            compute = part(_at_many_sizes, dtype=dtype)
            yield f"many sizes, {name}", Trial(compute, references=dtype, large=True, gpus=1)
    yield "another stream", Trial(_on_another_stream, quick=True, gpus=1)
    # Nothing promises that a graph can capture the backend reference.
    yield "a CUDA graph", Trial(_in_a_graph, quick=True, gpus=1, large=True)
    yield "the second GPU", Trial(_on_the_second_gpu, quick=True, gpus=2)
    for name, sizes in SIZES.items():
        compute = part(_rows_of_size, sizes=sizes)
        small = name == "digits"
        yield f"{name}, {name_of(sizes)}", Trial(compute, quick=small, large=not small)


TRIALS = dict(_trials())


# ---- errors ------------------------------------------------------------------------------------


@functools.cache
def _exact(name: str) -> Results:
    return TRIALS[name].compute(EXACT)


def errors(name: str, backend: str, device: torch.device) -> dict[str, float]:
    """The error of each result of a trial; NaN where a result is not a number."""
    exact = _exact(name)
    place = Place(BACKENDS[backend], device, torch.float32)
    results = TRIALS[name].compute(place)
    return {
        result: _error(result, results[result].cpu().double(), wanted.double())
        for result, wanted in exact.items()
    }


def _error(name: str, result: Tensor, exact: Tensor) -> float:
    """The largest error of a row."""
    if result.shape != exact.shape:
        return math.nan
    difference, exact = (t.reshape(len(t), -1) for t in (result - exact, exact))
    difference = torch.where(result.reshape(exact.shape) == exact, 0.0, difference)  # of infinities
    size = exact.new_ones(len(exact))
    if name.startswith("log-sum-exp"):
        size = exact.abs().amax(1).clamp(min=1)
    elif not name.startswith(("mean", "field")):
        rows = exact.norm(dim=1)
        size = rows.clamp(min=float(exact.norm()) / len(rows) ** 0.5)  # large terms may cancel
    return float((difference.norm(dim=1) / size).max())


# ---- times -------------------------------------------------------------------------------------


@functools.lru_cache(1)
def _timed(sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Points as in training (PFGM, algorithm 2), references (M, N), and z (B,) in float64."""
    B, M, _ = sizes
    _, references, _, (noise, g) = _data(*sizes)
    generator = torch.Generator().manual_seed(1)
    level = 0.01 * 5000 ** torch.rand(B, generator=generator, device="cpu")
    x = references[torch.linspace(0, M - 1, B, device="cpu").long()] + level[:, None] * noise
    return x, references, level.double() * (1 + g.abs())


def _plain(x: Tensor, references: Tensor, z: Tensor) -> Tensor:
    """The mean in plain torch: matrix product, softmax, matrix product."""
    squared = x.square().sum(1)[:, None] + references.square().sum(1) - 2 * x @ references.T
    scores = -(x.shape[1] + 1) / 2 * torch.log(squared + z[:, None] ** 2)
    return scores.softmax(1) @ references


def seconds_in_turns(
    sizes: tuple[int, int, int], backend: str, device: torch.device, budget: float
) -> tuple[float, float]:
    """Seconds of a call of a backend and of plain torch, which take turns for some seconds."""
    x, references, z = _timed(sizes)
    x, references, z = x.to(device), references.to(device), z.to(device, wide_dtype(device))
    problem = PosteriorMean(x, references, z, 1.0)
    narrow = z.to(x.dtype)
    calls = (
        lambda: BACKENDS[backend].posterior_mean(problem),
        lambda: _plain(x, references, narrow),
    )

    def timed(call: Callable[[], object], count: int) -> float:
        _wait(device)
        started = time.perf_counter()
        for _ in range(count):
            call()
        _wait(device)
        return (time.perf_counter() - started) / count

    counts = [1, 1]
    if sum(timed(call, 1) for call in calls) < budget:  # with kernels that had to be compiled
        counts = [1 + int(0.02 / timed(call, 1)) for call in calls]
    ends = time.perf_counter() + budget
    turns: list[list[float]] = []
    while not turns or (time.perf_counter() < ends and len(turns) < 50):
        turns.append([timed(call, count) for call, count in zip(calls, counts, strict=True)])
    own, plain = (statistics.median(times) for times in zip(*turns, strict=True))
    return own, plain


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
