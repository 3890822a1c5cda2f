"""The fixed problems of :func:`pfgm.backends.check`.

A trial computes with one backend on one device. The same trial with the backend ``reference`` in
float64 on the CPU gives the exact results.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dtypes import REFERENCES
from ..common.tensors import dequantise, wide_dtype
from ..core.problems import OdeStep, PosteriorMean, State, Upstream
from ..core.weights import unit_radius
from . import native, native_calls
from .backend import BACKENDS, Backend

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
SIZES = {
    "digits": (128, 1437, 64),
    "CIFAR-10": (128, 4096, 3072),
    "Fashion-MNIST": (256, 60000, 784),
}
"""Points, references and features of the problems that are timed, the smallest first."""
# Points, references and features, from few blocks to many: of differences, of small and large tiles
# of products, and of features that blocks share. No size is a multiple of a tile's.
SHAPES = (
    *((3, 2100, 31), (5, 70, 37), (20, 70, 100), (66, 500, 100), (590, 1030, 100)),
    *((300, 4100, 484), (1020, 4100, 36), (66, 33, 3070), (40, 1500, 2070), (97, 2100, 3076)),
)
_WIDTHS = (36, 37, 1041, 6150, 8200)  # for part of a warp, a block, and longer; odd, by values
_ROWS = 5
_GAMMA = 5.0
_IN_A_ROW = 20
_COMPARED = 8  # points of large problems that are compared
_LARGE = 1 << 24  # B·M·N from which on a problem is large
_BATCH = (70, 300, 97)

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
    references: torch.dtype | None = None
    """The type of references, which not all backends read."""
    on_gpu: bool = False
    """Whether it is for GPUs alone."""
    large: bool = False
    """Whether the backend ``reference`` is left out: it would take too long."""

    def applies(self, backend: str, device: torch.device) -> bool:
        """Whether a backend computes it on a device."""
        able = BACKENDS[backend].supports(device, torch.float32, self.references) is None
        here = device.type == "cuda" or not self.on_gpu
        return able and here and not (self.large and backend == "reference")

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
    B: int, M: int, N: int, D: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Data:
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
    first, second = (torch.randint(M, (B,), generator=generator, device="cpu") for _ in range(2))
    x = y[first] + 0.5 * uniform(B, 1) * (y[second] - y[first]) + sigma[:, None] * normal(B, N)
    radius = sigma.double() * unit_radius(D)
    upstream = Upstream(normal(B, N), sigma.double().square().clamp(max=1) * normal(B).double())
    return Data(x, references, radius, upstream)


# ---- what a trial computes ---------------------------------------------------------------------


def _mean_and_gradients(
    place: Place, data: Data, D: float = 1.0, *, needs_references: bool = True
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
        results["gradient of references"] = grad_references
    return results


def _shape(place: Place, sizes: tuple[int, int, int], D: float, dtype: torch.dtype) -> Results:
    """Of a large problem some points are compared, and no gradient of references."""
    data, large = _data(*sizes, D, dtype, seed=sum(sizes)), math.prod(sizes) >= _LARGE
    step = max(sizes[0] // _COMPARED, 1) if large else 1
    if place is EXACT:
        x, references, radius, (G, g) = data
        data = Data(x[::step], references, radius[::step], Upstream(G[::step], g[::step]))
        step = 1
    results = _mean_and_gradients(place, data.to(place), D, needs_references=not large)
    return {name: rows[::step] for name, rows in results.items()}


def _half_way(place: Place, D: float, dtype: torch.dtype) -> Results:
    """Points half-way between two references, at small levels."""
    _, references, _, upstream = _data(30, 96, 1536, D, dtype)
    y = dequantise(references, torch.float32)
    sigma = torch.tensor([0.1, 0.02, 0.005], dtype=torch.float64, device="cpu").repeat(10)
    radius = sigma * unit_radius(D)
    data = Data((y[:30] + y[30:60]) / 2, references, radius, upstream).to(place)
    mean, logsumexp, _, _ = place.backend.posterior_mean(PosteriorMean(*data[:3], D))
    return {"mean": mean / math.sqrt(1536), "log-sum-exp": logsumexp}


def _far(place: Place, D: float, dtype: torch.dtype, away: float) -> Results:
    """Points and levels far beyond all references."""
    x, references, radius, upstream = _data(30, 96, 520, D, dtype)
    data = Data(away * x, references, away * radius, upstream).to(place)
    return _mean_and_gradients(place, data, D)


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


def _difference(place: Place, dtype: torch.dtype) -> Results:
    """x − mean, which is small beside its terms where references are in float32."""
    x, references, radius, _ = _data(40, 300, 96, dtype=dtype)
    if dtype == torch.float32:
        references = references[:1] + 1e-2 * references
        x = references[:40] + 1e-3 * x
    data = Data(x, references, radius.clamp(0.03, 0.3), Upstream(x, radius)).to(place)
    problem = PosteriorMean(*data[:3], math.inf, difference=True)
    return {"difference x − mean": place.backend.posterior_mean(problem)[0]}


def _field(place: Place) -> Results:
    """PFGM's field, by the native kernels in the one call that they have for it."""
    x, references, z, _ = _data(40, 300, 97).to(place)
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
        return _shape(place, (40, 700, 68), 1.0, torch.float32)
    finally:
        if limit is not None:
            limit()


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
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(place.device)
    with torch.cuda.stream(stream):
        _everything(place, held)
    torch.cuda.synchronize(place.device)
    with torch.cuda.graph(graph, stream=stream):  # which is on the device of the trial
        results = _everything(place, held)

    def replayed(batch: Data) -> Results:
        pairs = zip((*held[:3], *held.upstream), (*batch[:3], *batch.upstream), strict=True)
        for own, other in pairs:
            own.copy_(other)
        graph.replay()
        return {name: result.clone() for name, result in results.items()}

    return _stacked([replayed(batch) for batch in batches])


# ---- all trials --------------------------------------------------------------------------------


def _trials() -> Iterator[tuple[str, Trial]]:
    part, half = functools.partial, (torch.bfloat16, torch.float16)
    cases = [*itertools.product(SHAPES, REFERENCES), *((s, torch.float32) for s in SIZES.values())]
    for k, (sizes, dtype) in enumerate(cases):
        large = math.prod(sizes) >= _LARGE
        compute = part(_shape, sizes=sizes, D=(1.0, math.inf, 128.0)[k % 3], dtype=dtype)
        if dtype != torch.float64 or not large:
            name = f"{name_of(sizes)}, {str(dtype).removeprefix('torch.')}"
            yield name, Trial(compute, dtype, large=large)
    for dtype, D in itertools.product((torch.float32, *half), (math.inf, 1.0)):
        name = f"half-way between {str(dtype).removeprefix('torch.')}, D = {D:g}"
        yield name, Trial(part(_half_way, D=D, dtype=dtype), dtype)
    for dtype, D in ((torch.float32, 1e6), (torch.float32, math.inf), (torch.uint8, 1.0)):
        name = f"far from {str(dtype).removeprefix('torch.')}, D = {D:g}"
        yield name, Trial(part(_far, D=D, dtype=dtype, away=300.0), dtype)
    yield "ties and limits", Trial(_limits)
    for dtype in (torch.float32, *half, torch.uint8):
        name = f"x − mean of {str(dtype).removeprefix('torch.')}"
        yield name, Trial(part(_difference, dtype=dtype), dtype)
    yield "field", Trial(_field)
    for features in _WIDTHS:
        yield f"normalised field, {features}", Trial(part(_normalised, features=features))
        yield f"steps, {features}", Trial(part(_steps, features=features))
    yield f"{_IN_A_ROW} launches in a row", Trial(_in_a_row)
    yield "in small chunks", Trial(_in_chunks)
    yield "another stream", Trial(_on_another_stream, on_gpu=True)
    # Nothing promises that a graph can capture the backend reference.
    yield "a CUDA graph", Trial(_in_a_graph, on_gpu=True, large=True)


TRIALS = dict(_trials())


def error_of(name: str, result: Tensor, exact: Tensor) -> float:
    """The largest error of a row; NaN where a result is not a number."""
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


def timed_data(sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Points as in training (PFGM, algorithm 2), references (M, N), and z (B,) in float64."""
    B, M, _ = sizes
    _, references, _, (noise, g) = _data(*sizes)
    generator = torch.Generator().manual_seed(1)
    level = 0.01 * 5000 ** torch.rand(B, generator=generator, device="cpu")
    x = references[torch.linspace(0, M - 1, B, device="cpu").long()] + level[:, None] * noise
    return x, references, level.double() * (1 + g.abs())


def plain_mean(x: Tensor, references: Tensor, z: Tensor) -> Tensor:
    """The mean in plain torch: matrix product, softmax, matrix product."""
    squared = x.square().sum(1)[:, None] + references.square().sum(1) - 2 * x @ references.T
    scores = -(x.shape[1] + 1) / 2 * torch.log(squared + z[:, None] ** 2)
    return scores.softmax(1) @ references


def seconds_of(
    sizes: tuple[int, int, int], name: str, device: torch.device, budget: float
) -> tuple[float, float]:
    """Seconds of a call of a backend or contender, and of torch, in turns for some seconds."""
    x, references, z = timed_data(sizes)
    x, references, z = x.to(device), references.to(device), z.to(device, wide_dtype(device))
    problem, narrow = PosteriorMean(x, references, z, 1.0), z.to(x.dtype)
    plain = plain_mean
    if name == "compiled TF32":  # in a process of its own
        torch.backends.cuda.matmul.allow_tf32 = True
        plain = torch.compile(plain_mean)

    def call_of(name: str) -> tuple[Tensor, ...]:
        if name in BACKENDS:
            return BACKENDS[name].posterior_mean(problem)
        return (plain(x, references, narrow),)

    def timed(name: str, count: int = 1) -> float:
        started = time.perf_counter()
        for _ in range(count):
            mean, *_ = call_of(name)
        mean[0, 0].item()  # waits for the device
        return (time.perf_counter() - started) / count

    names = name, "torch"
    counts = [1 + int(0.02 / min(timed(each), timed(each))) for each in names]
    ends = time.perf_counter() + budget
    turns: list[list[float]] = []
    while not turns or (time.perf_counter() < ends and len(turns) < 50):
        turns.append([timed(each, count) for each, count in zip(names, counts, strict=True)])
    own, other = (statistics.median(times) for times in zip(*turns, strict=True))
    return own, other
