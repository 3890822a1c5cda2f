"""The least work of each kernel, in operations and bytes, and the least time of an H100 for it.

    python -m benchmarks.machine_code.roofline            prints the tables
    python -m benchmarks.machine_code.roofline --write    puts them into docs/roofline.md

Rates are those of the data sheet (H100 SXM); nothing here is measured. The command ``python -m
benchmarks.machine_code`` predicts the time that a kernel would take.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from benchmarks.common.folders import DOCS, RESULTS
from benchmarks.common.tables import Section, print_or_write, table, with_headings

SECTION = Section(DOCS / "roofline.md", "roofline")

RATES = {"tensor cores": 495e12, "float32": 67e12, "float64": 34e12, "memory": 3.35e12}
MULTIPROCESSORS = 132

TF32X3 = 3  # products in TF32 for one of float32 accuracy
WEIGHT_OPERATIONS = 40  # in float32: a logarithm and an exponential; assumed
DIFFERENCE_OPERATIONS = 14  # in float32: a squared difference in two floats, and its sum
STRETCHES = 4  # parts that the references of a weighted sum are split into
LIVE = 0.2  # share of tiles with a weight above zero, on real images
TILE = 64


class Shape(NamedTuple):
    """B queries, M references, N features."""

    name: str
    B: int
    M: int
    N: int


SHAPES = (
    Shape("CIFAR-10", 128, 4096, 3072),
    Shape("Fashion-MNIST", 256, 60000, 784),
    Shape("Fashion-MNIST", 4096, 60000, 784),
    Shape("digits", 128, 1437, 64),
)
STEPS = (128, 512, 1024)
STEP_FEATURES = 3072


@functools.cache
def counted() -> dict[str, Any]:
    """Counts on real data, by "M × N" (data.py)."""
    found = json.loads((RESULTS / "machine_code.json").read_text())["data"]
    return {" × ".join(map(str, one["B, M, N"][1:])): one for one in found.values()}


def refined(shape: Shape) -> float:
    """References of a query that are refined, as counted on real data, otherwise 0."""
    found = counted().get(f"{shape.M} × {shape.N}")
    return 0.0 if found is None else float(found["refined a query"]["mean"])


class Work(NamedTuple):
    """Operations and bytes of memory. A multiplication and an addition are two operations."""

    tensor: float = 0
    single: float = 0
    double: float = 0
    moved: float = 0

    def times(self) -> dict[str, float]:
        """Seconds that each unit needs by itself."""
        return {name: amount / RATES[name] for name, amount in zip(RATES, self, strict=True)}

    def floor(self) -> float:
        """Seconds of the slowest unit."""
        return max(self.times().values())

    def bound(self) -> str:
        """The slowest unit."""
        times = self.times()
        return max(times, key=lambda name: times[name])


# ---- forward ----------------------------------------------------------------------------------


def distances(shape: Shape, products: int = TF32X3, reference_bytes: int = 4) -> Work:
    """|x|² + |y|² − 2 x·y. Reads x and y, and writes a float64 per pair."""
    _, B, M, N = shape
    return Work(
        tensor=products * 2 * B * M * N,
        single=2 * (B + M) * N + 3 * B * M,
        moved=4 * B * N + reference_bytes * M * N + 8 * B * M,
    )


def refine(shape: Shape, reference_bytes: int = 4) -> Work:
    """Σ (x − y)² in two floats for the references that matter."""
    _, B, M, N = shape
    near = refined(shape)
    return Work(
        single=DIFFERENCE_OPERATIONS * B * near * N,
        moved=4 * B * N + reference_bytes * min(B * near, M) * N + 8 * B * near,
    )


def weights(shape: Shape) -> Work:
    """The weight of each pair. Reads its squared distance and writes a float32 weight."""
    pairs = shape.B * shape.M
    # The excess over the nearest and its product with a rate are in float64.
    return Work(single=WEIGHT_OPERATIONS * pairs, double=2 * pairs, moved=(8 + 4) * pairs)


def weighted_sum(
    shape: Shape, products: int = TF32X3, reference_bytes: int = 4, live: float = 1.0
) -> Work:
    """Σ_j w_j y_j in STRETCHES parts, over the share ``live`` of the tiles."""
    _, B, M, N = shape
    return Work(
        tensor=products * 2 * live * B * M * N,
        moved=4 * B * M + reference_bytes * live * M * N + 4 * STRETCHES * B * N,
    )


def merge(shape: Shape) -> Work:
    """Adds the parts of the sum."""
    values = shape.B * shape.N
    return Work(single=STRETCHES * values, moved=4 * (STRETCHES + 1) * values)


def forward(
    shape: Shape, products: int = TF32X3, reference_bytes: int = 4, live: float = 1.0
) -> dict[str, Work]:
    """The kernels of a posterior mean."""
    return {
        "distances": distances(shape, products, reference_bytes),
        "refine": refine(shape, reference_bytes),
        "weights": weights(shape),
        "weighted_sum": weighted_sum(shape, products, reference_bytes, live),
        "merge": merge(shape),
    }


# ---- backward ---------------------------------------------------------------------------------


def distances_and_projections(shape: Shape, products: int = TF32X3) -> Work:
    """x·y and G·y in one pass over y: two products for one, and a float32 more a pair."""
    _, B, M, N = shape
    once = distances(shape, products)
    return once._replace(tensor=2 * once.tensor, moved=once.moved + 4 * B * N + 4 * B * M)


def coefficients(shape: Shape) -> Work:
    """p_j and c_j = −(N + D) p_j t_j / s_j. Writes two float32 per pair."""
    pairs = shape.B * shape.M
    return Work(double=(WEIGHT_OPERATIONS + 6) * pairs, moved=(8 + 4 + 2 * 4) * pairs)


def gradient_of_references(shape: Shape, products: int = TF32X3) -> Work:
    """Σ_b p_bj G_b − c_bj (x_b − y_j): two products of (M, B) and (B, N)."""
    _, B, M, N = shape
    return Work(
        tensor=products * 2 * 2 * B * M * N,
        single=2 * M * N,
        moved=2 * 4 * B * M + 2 * 4 * B * N + 2 * 4 * M * N,
    )


def backward(shape: Shape) -> dict[str, Work]:
    """The kernels of the gradients."""
    return {
        "distances and G·y": distances_and_projections(shape),
        "refine": refine(shape),
        "coefficients": coefficients(shape),
        "weighted_sum of c": weighted_sum(shape),
        "merge": merge(shape),
        "gradient of references": gradient_of_references(shape),
    }


# ---- passes over points -----------------------------------------------------------------------


def normalised_field(shape: Shape) -> Work:
    """Reads x and mean, writes v."""
    values = shape.B * shape.N
    return Work(single=4 * values, moved=3 * 4 * values)


# Solver → float32 tensors (B, N) that its step reads, and that it writes.
STEP_TENSORS = {
    "euler": (("x", "v_x"), ("x",)),
    "heun": (("predicted", "v_x", "x"), ("x",)),
    "multistep": (("x", "v_x", "previous mean"), ("x", "mean")),
}


def ode_step(solver: str, B: int, N: int = STEP_FEATURES) -> Work:
    """The norm of v_x and the update. Each tensor is read or written once."""
    read, written = STEP_TENSORS[solver]
    return Work(single=2 * (len(read) + 1) * B * N, moved=4 * B * N * (len(read) + len(written)))


# ---- the page ---------------------------------------------------------------------------------


def total(kernels: dict[str, Work]) -> float:
    """Least seconds of kernels that run one after another."""
    return sum(work.floor() for work in kernels.values())


def amount(value: float) -> str:
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f}"


def microseconds(value: float) -> str:
    value *= 1e6
    return f"{value:,.0f} µs" if value >= 100 else f"{value:.2g} µs"


def dimensions(shape: Shape) -> str:
    return f"{shape.name}, {shape.B} × {shape.M} × {shape.N}"


def work_row(name: str, work: Work) -> list[str]:
    return [name, *(amount(value) for value in work), microseconds(work.floor()), work.bound()]


HEADER = ["", "tensor cores", "float32", "float64", "bytes", "floor", "bound"]


def kernel_tables() -> str:
    parts = []
    for shape in SHAPES:
        kernels = forward(shape) | {"normalised_field": normalised_field(shape)}
        behind = {f"backward: {name}": work for name, work in backward(shape).items()}
        rows = [work_row(name, work) for name, work in (kernels | behind).items()]
        parts.append(f"#### {dimensions(shape)}\n\n{table(HEADER, rows)}")
    return "\n\n".join(parts)


def total_table() -> str:
    rows = []
    for shape in SHAPES:
        behind = backward(shape)
        in_x = {name: work for name, work in behind.items() if name != "gradient of references"}
        tiles = -(-shape.B // TILE) * -(-shape.M // TILE)
        rows.append(
            [
                dimensions(shape),
                microseconds(total(forward(shape))),
                microseconds(total(forward(shape, products=1))),
                microseconds(total(forward(shape, reference_bytes=1))),
                microseconds(total(forward(shape, live=LIVE))),
                microseconds(total(in_x)),
                microseconds(total(behind)),
                f"{tiles / MULTIPROCESSORS:,.2f}",
            ]
        )
    header = ["", "forward", "medium", "uint8", f"{LIVE:.0%} of tiles", "backward in x"]
    return table([*header, "and in references", "tiles a multiprocessor"], rows)


def step_table() -> str:
    rows = []
    for solver in STEP_TENSORS:
        for B in STEPS:
            work = ode_step(solver, B)
            rows.append(work_row(f"{solver}, {B} × {STEP_FEATURES}", work))
    return table(HEADER, rows)


def report() -> str:
    parts = {
        "Sums": total_table(),
        "Kernel by kernel": kernel_tables(),
        "Steps of the ODE": step_table(),
    }
    return with_headings(parts, 3)


if __name__ == "__main__":
    print_or_write(__doc__, SECTION, report, report)
