"""The fixed problems of :func:`pfgm.backends.check`.

A trial computes with one backend on one device. The same trial with the backend ``reference`` in
float64 on the CPU gives the exact results.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..common.dtypes import REFERENCES
from ..common.tensors import dequantise, wide_dtype
from ..core.problems import Needs, OdeStep, PosteriorMean, State, Upstream
from ..core.weights import unit_radius
from . import native, native_calls
from .backend import BACKENDS, Backend

ALLOWED = {"mean": 2e-5, "field": 2e-5, "difference": 2e-5, "gradient": 5e-5}
ALLOWED |= {"log-sum-exp": 5e-6, "step": 5e-6}
"""The largest error by the first word of a result's name. That of a mean or field is relative to
√N, which no reference exceeds. All others are relative to their rows."""
SIZES = {
    "digits, 128 × 1437 × 64": (128, 1437, 64),
    "CIFAR-10, 128 × 4096 × 3072": (128, 4096, 3072),
    "Fashion-MNIST, 256 × 60000 × 784": (256, 60000, 784),
}
"""Points, references and features of the problems that are timed, the smallest first."""
# Points, references and features, from few blocks to many: of differences, of small and large tiles
# of products, and of features that blocks share. No size is a multiple of a tile's.
SHAPES = (
    *((3, 2100, 31), (13, 70, 37), (20, 70, 100), (66, 500, 100), (590, 1030, 100)),
    *((300, 4100, 484), (1020, 4100, 36), (66, 33, 3070), (40, 1500, 2070), (97, 2100, 3076)),
)
_WIDTHS = (36, 37, 1041, 6150, 8200)  # for part of a warp, a block, and longer; odd, by values
_GAMMA = 5.0
_NATS = (*range(1, 25), *(10.0**k for k in (-1.6, -1.2, -0.8, -0.4, 1.5, 2, 3, 4)))
_LARGE, _COMPARED = 1 << 20, 8  # from 2^20 reference values on, 8 points are compared

Results = dict[str, Tensor]
Pair = TypeVar("Pair", bound=tuple[Tensor, Tensor | None])


class Place(NamedTuple):
    """What computes a trial."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    """Of the points."""

    @property
    def gpu(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None

    @property
    def native(self) -> bool:
        return self.backend is BACKENDS["native"]


EXACT = Place(BACKENDS["reference"], torch.device("cpu"), torch.float64)


class Data(NamedTuple):
    """Points between references at all levels, and gradients of the mean and of log-sum-exp."""

    x: Tensor
    references: Tensor
    sigma: Tensor
    G: Tensor
    g: Tensor
    D: float

    @property
    def problem(self) -> PosteriorMean:
        return PosteriorMean(self.x, self.references, self.sigma * unit_radius(self.D), self.D)

    def to(self, place: Place) -> Data:
        """A copy."""
        x, y, sigma, G, g, D = self
        own, narrow, wide = y.dtype, place.dtype, wide_dtype(place.device)
        types = zip((x, y, sigma, G, g), (narrow, own, wide, narrow, wide), strict=True)
        return Data._make([*(t.to(place.device, dtype, copy=True) for t, dtype in types), D])


def data_of(
    B: int, M: int, N: int, D: float = 1.0, dtype: torch.dtype = torch.float32, away: float = 1.0
) -> Data:
    """On the CPU, in float32 but for the references. ``away`` scales points and levels."""
    generator = torch.Generator().manual_seed(B + M + N)

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
    G, g = normal(B, N), sigma.square().clamp(max=1) * normal(B)
    return Data(away * x, references, away * sigma.double(), G, g.double(), D)


def _shells(N: int, D: float, dtype: torch.dtype, near: int, step: int) -> Data:
    """A point at one distance from 3 references and a little farther from 45. The levels give these
    45 log-weights that are _NATS lower, so each limit, of weights and of what is computed exactly,
    lies between two levels. The other 48 references are on the far side of the origin."""
    data, unit = data_of(len(_NATS), 96, N, D, dtype), max(255, step)
    x, y = 127 * data.G[0].sign(), near * dequantise(data.references, torch.float32).sign()
    x[-1], y[:, -1], y[3:, -1] = 1, 0, step
    y += torch.where(torch.arange(96, device="cpu") < 48, 1, -1)[:, None] * x
    references = ((y + 255) / 2 if dtype == torch.uint8 else y / unit).to(dtype)
    nats = torch.tensor(_NATS, dtype=torch.float64, device="cpu")
    squared = step**2 / (2 * nats)
    if math.isfinite(D):
        squared = (step**2 / torch.expm1(nats / (N + D) * 2) - (N - 1) * near**2) / D
    sigma = squared.clamp(min=0).sqrt() / unit
    return data._replace(x=(x / unit).repeat(len(nats), 1), references=references, sigma=sigma)


def _limits() -> Data:
    """Points on references, also of r = 0, in the middle of two, and beside equal references."""
    data = data_of(20, 61, 40)
    x, references, sigma, _, g, _ = data
    references[40:50] = references[:10]
    x[:10], sigma[:5], g[:5] = references[:10], 0, 0
    x[10:15] = (references[20:25] + references[30:35]) / 2
    sigma[10:15] = 1e-3
    return data


def _own(M: int, N: int) -> Data:
    """Each reference is the mean of a point of its own: none may be missed."""
    data = data_of(M, M, N, math.inf)
    x = data.references + 1e-3 * data.G
    return data._replace(x=x, sigma=torch.full_like(data.sigma, 1e-3))


def _beyond_float16(dtype: torch.dtype) -> Data:
    """Five references are too large for float16 in the scale of the others. Points lie between two
    of them."""
    data = data_of(40, 130, 96, dtype=dtype)
    large = torch.arange(3, 130, 30, device="cpu")  # none is among those that set the scale
    references = data.references * 2.0**-16
    references[large] = data.references[large]
    some = references.float()[large].repeat(9, 1)
    return data._replace(x=some[:40] + 0.4 * (some[1:41] - some[:40]), references=references)


def _mean(
    place: Place, data: Data, needs: Needs = (True, True, True), keeps: bool = False
) -> Results:
    """The mean, and the gradients that are needed, by native from the distances that it keeps."""
    problem = data.problem
    room = native.room_for_distances(problem) if keeps and place.native else None
    kept = () if room is None else (room,)
    mean, logsumexp, nearest, total = place.backend.posterior_mean(problem, *kept)
    results = {"mean": mean / math.sqrt(mean.shape[1]), "log-sum-exp": logsumexp}
    if not any(needs):
        return results
    precise = data.references.dtype == torch.float32  # others' gradient is rounded
    given = State(mean, nearest, total), Upstream(data.G, data.g)
    needs = needs[0], needs[1] and precise, needs[2]
    used = map(native.used_room, kept)
    gradients = place.backend.posterior_mean_backward(problem, *given, needs, *used)
    names = (f"gradient of {name}" for name in ("x", "references", "r"))
    return results | {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def _difference(place: Place, data: Data) -> Results:
    problem = data.problem._replace(difference=True)
    return {"difference x − mean": place.backend.posterior_mean(problem)[0]}


def _both(place: Place, data: Data) -> Results:
    return _mean(place, data) | _difference(place, data)


def _field(place: Place, data: Data) -> Results:
    """PFGM's field and the mean, by native in the one call that it has for each."""
    x, references, z, *_, D = data
    if place.native:
        (level,) = _columns(z)
        given = place.gpu, x, references, level
        fields = _answer(native_calls.field(*given, _GAMMA, None))
        mean, total = _answer(native_calls.posterior_mean(*given, unit_radius(D), D, True, None))
    else:
        difference = _difference(place, data._replace(D=1.0))["difference x − mean"]
        fields = place.backend.normalised_field(difference, z, _GAMMA)
        mean, total, *_ = place.backend.posterior_mean(data.problem)
    means = {"mean": mean / math.sqrt(mean.shape[1]), "log-sum-exp": total}
    return _relative(*fields) | means  # type: ignore[return-value]


def _columns(*levels: Tensor) -> Iterator[Tensor]:
    """Levels in float32, with others between them in memory."""
    return iter(torch.stack([*levels, -levels[0]], 1).float().T[:-1])


def _answer(results: Pair | None) -> Pair:
    """What a call of native gives; it must compute what its trial is made for."""
    if results is None:
        raise RuntimeError("native does not compute in one call")
    return results


def _relative(field_x: Tensor, field_z: Tensor) -> Results:
    root = math.sqrt(field_x.shape[1])
    return {"field in x": field_x / root, "field in z": field_z[:, None] / root}


def _normalised(place: Place, data: Data) -> Results:
    x, _, z, G, g, _ = data
    results = _relative(*place.backend.normalised_field(x, z, _GAMMA))
    grad_x, grad_z = place.backend.normalised_field_backward(G, g.to(x.dtype), x, z, _GAMMA)
    return results | {"gradient of x": grad_x, "gradient of z": grad_z[:, None]}


def _steps(place: Place, data: Data) -> Results:
    """Steps from a field and from a mean, with history and without, also into their points."""
    x, _, z, history, *_ = data
    slope = 0.3 * history / history.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
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
    for k, name in enumerate(("Euler", "Heun", "multistep")):
        pair = _step(place, step, z, k)
        results[f"step by {name}"], results[f"step by {name}, mean"] = pair
    return results  # type: ignore[return-value]


def _step(place: Place, step: OdeStep, z: Tensor, method: int) -> tuple[Tensor, Tensor | None]:
    """A step from z to z/2 after one from 3 z, by native in the one call that it has for it."""
    x, slope, field_z, history, *_ = step
    if method == native_calls.EULER:
        history = None
    if place.native:
        given = place.gpu, x, slope, field_z, history, None, None
        at, after, before = _columns(z, z / 2, 3 * z)
        law = _GAMMA, 7.0, "exact"
        return _answer(native_calls.step(*given, at, after, before, method, law, True))
    w = math.log(2) / math.log(9)
    share, toward, blend = ((1, 0.5, 0), (0.5, 0.5, 0.5), (1, 0.5 + w / 2, -w / 2))[method]
    rows = torch.stack([share * z, torch.full_like(z, toward), torch.full_like(z, blend)])
    return place.backend.ode_step(step._replace(history=history, row_levels=rows, exact=True), True)


Compute = Callable[[Place, Data], Results]


def _in_chunks(compute: Compute, place: Place, data: Data) -> Results:
    """In small blocks of points and chunks of references, whose rows have gaps between them."""
    limit = native.extension().limit_cuda if place.native else lambda **_: None
    limit(pairs=600, parts=1, queries=17, references=128)
    x, references = (torch.nn.functional.pad(rows, (0, 1))[:, :-1] for rows in data[:2])
    try:
        return compute(place, data._replace(x=x, references=references))
    finally:
        limit()


def _in_a_graph(compute: Compute, place: Place, data: Data) -> Results:
    """Captured on another stream than the current one, and replayed on other values."""
    held = Data._make([*(tensor.flip(0) for tensor in data[:5]), data.D])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(place.device)
    stream.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(stream):
        compute(place, held)
    torch.cuda.synchronize(place.device)
    with torch.cuda.graph(graph, stream=stream):  # which is on the device of the trial
        results = compute(place, held)
    graph.replay()
    for own, other in zip(held[:5], data[:5], strict=True):
        own.copy_(other)
    graph.replay()
    return results


class Trial(NamedTuple):
    """A problem: data, and what is computed of them."""

    data: Callable[[], Data]
    compute: Compute = _mean
    references: torch.dtype = torch.float32
    """Their type, which not all backends read."""
    run: Callable[[Compute, Place, Data], Results] | None = None
    """How a GPU runs it; other devices, and all without it, call ``compute``."""
    large: bool = False
    """Whether only some points are compared."""

    def applies(self, backend: str, device: torch.device) -> bool:
        """Whether a backend computes it on a device."""
        if backend == "reference" and (self.large or self.run):
            return False  # it would take too long; nothing promises that a graph can capture it
        here = device.type == "cuda" or self.run is None
        return here and BACKENDS[backend].supports(device, torch.float32, self.references) is None

    def results(self, place: Place) -> Results:
        """What a place computes."""
        data = self.data()
        step = max(len(data.x) // _COMPARED, 1) if self.large else 1
        if place is EXACT:
            rows = (each if each is data.references else each[::step] for each in data[:5])
            data, step = Data._make([*rows, data.D]), 1
        told = functools.partial(self.run, self.compute) if self.run and place.gpu else self.compute
        return {name: rows[::step] for name, rows in told(place, data.to(place)).items()}

    def errors(self, place: Place, exact: Results) -> dict[str, float]:
        """By the name of a result."""
        results = self.results(place)
        return {n: error_of(n, results[n].cpu().double(), exact[n].double()) for n in exact}


def _trials() -> Iterator[tuple[str, Trial]]:
    part, every = functools.partial, (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
    named = {dtype: str(dtype).removeprefix("torch.") for dtype in REFERENCES}
    cases = [*itertools.product(SHAPES, REFERENCES), *((s, torch.float32) for s in SIZES.values())]
    for k, (sizes, dtype) in enumerate(cases):
        large = math.prod(sizes[1:]) >= _LARGE
        data = part(data_of, *sizes, (1.0, math.inf, 128.0)[k % 3], dtype)
        compute = part(_mean, needs=(True, not large, True))
        if dtype != torch.float64 or not large:
            name = " × ".join(map(str, sizes))
            yield f"{name}, {named[dtype]}", Trial(data, compute, dtype, large=large)
    shells = [(520, math.inf, 64, 8, 3), (520, 1.0, 4, 32, 4), (40, 1.0, 1, 32, 1)]
    for N, D, near, step, dtypes in (*shells, (2, 0.5, 1, 6000, 1)):
        for dtype in every[:dtypes]:
            data = part(_shells, N, D, dtype, near, step)
            yield f"shells of {named[dtype]}, {N}, D = {D:g}", Trial(data, _both, dtype)
    for dtype, D in ((torch.float32, 1e6), (torch.float32, math.inf), (torch.uint8, 1.0)):
        data = part(data_of, 30, 96, 520, D, dtype, away=300.0)
        yield f"far from {named[dtype]}, D = {D:g}", Trial(data, references=dtype)
    for M, N in ((130, 20), (130, 40), (1200, 36)):  # in differences, small tiles and large ones
        trial = Trial(part(_own, M, N), part(_mean, needs=(False, True, False)))
        yield f"a point of its own for each of {M} × {N}", trial
    for dtype in every[:2]:
        yield f"beyond float16, {named[dtype]}", Trial(part(_beyond_float16, dtype), _both, dtype)
    for sizes in (*SHAPES[1:5], (2100, 40, 8)):  # the last are more queries than a list has
        data, name = part(data_of, *sizes, math.inf), " × ".join(map(str, sizes))
        yield f"kept distances, {name}", Trial(data, part(_mean, keeps=True))
    yield "ties and limits", Trial(_limits)
    yield "field", Trial(part(data_of, 40, 300, 97, 128.0), _field)
    for features in _WIDTHS:
        yield f"normalised field, {features}", Trial(part(data_of, 5, 9, features), _normalised)
        yield f"steps, {features}", Trial(part(data_of, 5, 9, features), _steps)
    yield "in small chunks", Trial(part(data_of, 40, 700, 68), run=_in_chunks)
    for name, captured in {"mean": _mean, "field": _field, "steps": _steps}.items():
        data = part(data_of, 70, 300, 97)
        yield f"a CUDA graph, {name}", Trial(data, captured, run=_in_a_graph)


TRIALS = dict(_trials())


def allowed(result: str) -> float:
    """The largest error of a result."""
    return ALLOWED[result.split()[0]]


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
        size = exact.norm(dim=1)
        if not name.startswith("difference"):  # large terms may cancel
            size = size.clamp(min=float(exact.norm()) / len(size) ** 0.5)
    return float((difference.norm(dim=1) / size).max())
