"""Runs every CUDA kernel once on small inputs, for compute-sanitizer, and to see that each one
ends.

python -m benchmarks.gpu.smoke [--backend native] [--device cuda]

Prints a line after each part, which shows the part that did not end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pfgm
from benchmarks.common.commands import new_parser
from pfgm.backends.trials import SHAPES

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# Rows for part of a warp, a block, and longer ones. Odd lengths are read value by value.
WIDTHS = (36, 37, 1040, 1041, 6150, 8200)
ROWS = 3


class Small:
    """Small tensors on a device, the same in every run."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)

    def images(self, count: int, features: int, dtype: torch.dtype) -> Tensor:
        values = torch.randint(0, 256, (count, features), generator=self._generator)
        if dtype == torch.uint8:
            return values.to(self._device, dtype)
        return (values / 127.5 - 1).to(self._device, dtype)

    def levels(self, count: int, z: float = 3.0) -> Tensor:
        return torch.linspace(0.5 * z, z, count, dtype=torch.float64).to(self._device)


def forward(small: Small, backend: str, shape: tuple[int, int, int]) -> None:
    """A posterior mean with each type of references."""
    queries, references, features = shape
    x = small.normal(queries, features)
    for dtype in TYPES:
        images = small.images(references, features, dtype)
        pfgm.posterior_mean(x, images, r=small.levels(queries), backend=backend)
    pfgm.posterior_mean(
        x, images.float(), r=small.levels(queries), backend=backend, precision="medium"
    )


def backward(small: Small, backend: str, shape: tuple[int, int, int]) -> None:
    """Gradients in x, references and radius."""
    queries, references, features = shape
    x = small.normal(queries, features).requires_grad_()
    radius = small.levels(queries).requires_grad_()
    images = small.images(references, features, torch.float32)
    for dtype in TYPES:
        rows = images.to(dtype) if dtype.is_floating_point else (images > 0).to(dtype)
        rows.requires_grad_(dtype.is_floating_point)
        mean, logsumexp = pfgm.posterior_mean(
            x, rows, r=radius, return_logsumexp=True, backend=backend
        )
        wanted = [x, radius, *[rows] * rows.requires_grad]
        torch.autograd.grad(mean.square().sum() + logsumexp.sum(), wanted)


def field(small: Small, backend: str, features: int) -> None:
    """PFGM's field."""
    x, images = small.normal(ROWS, features), small.images(9, features, torch.float32)
    pfgm.field_fn(x, small.levels(ROWS), images, backend=backend)


def steps(small: Small, backend: str, features: int) -> None:
    """A step of each solver: with field_z substituted, without, and with a level for each row."""
    x, history = small.normal(2, ROWS, features)
    field = pfgm.Field(0.3 * small.normal(ROWS, features), -small.normal(ROWS).abs() - 1)
    for z in (1.0, 20.0, small.levels(ROWS, 8.0)):
        then, before = 0.9 * z, 1.1 * z
        pfgm.euler_step(x, field, z, then, backend=backend)
        pfgm.heun_step(history, x, field, before, z, backend=backend)
        pfgm.multistep_step(x, field, z, then, history, before, backend=backend)


def parts(small: Small, backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All parts by name."""
    for name, shape in SHAPES.items():
        yield f"forward, {name}", functools.partial(forward, small, backend, shape)
        yield f"backward, {name}", functools.partial(backward, small, backend, shape)
    for features in WIDTHS:
        yield f"field, {features}", functools.partial(field, small, backend, features)
        yield f"steps, {features}", functools.partial(steps, small, backend, features)


def run(backend: str = "native", device: str = "cuda") -> None:
    """Runs all parts."""
    for name, part in parts(Small(device), backend):
        part()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"done: {name}", flush=True)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    run(options.backend, options.device)


if __name__ == "__main__":
    main()
