"""Draws the fields of two moons, spirals and a heart, and the paths of samples to them.

    python examples/gallery.py --out gallery

The field is the exact field of the points, so nothing is trained.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pfgm
from pfgm import plotting
from pfgm.common.files import check_folder


def moons(n: int, generator: torch.Generator) -> Tensor:
    """Two interleaved half circles."""
    angle = torch.rand(n, generator=generator) * math.pi
    side = torch.arange(n) % 2 * 2.0 - 1
    x = side.unsqueeze(1) * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return x + 0.05 * torch.randn(n, 2, generator=generator)


def spirals(n: int, generator: torch.Generator) -> Tensor:
    """Two arms of one and a half turns."""
    turn = torch.rand(n, generator=generator).sqrt()
    angle = turn * 3 * math.pi + torch.arange(n) % 2 * math.pi
    x = torch.stack([angle.cos(), angle.sin()], 1) * (1.4 * turn + 0.1).unsqueeze(1)
    return x + 0.03 * torch.randn(n, 2, generator=generator)


def heart(n: int, generator: torch.Generator) -> Tensor:
    """The outline of a heart."""
    angle = torch.rand(n, generator=generator) * math.tau
    across = 16 * angle.sin() ** 3
    up = 13 * angle.cos() - 5 * (2 * angle).cos() - 2 * (3 * angle).cos() - (4 * angle).cos()
    return torch.stack([across, up + 2], 1) / 12 + 0.03 * torch.randn(n, 2, generator=generator)


DataSets = dict[str, Callable[[int, torch.Generator], Tensor]]
DATA_SETS: DataSets = {"moons": moons, "spirals": spirals, "heart": heart}


def draw(name: str, out: Path, n: int, lines: int) -> None:
    """Draws field, density, paths and field lines in space of one data set."""
    generator = torch.Generator().manual_seed(0)
    data = DATA_SETS[name](n, generator)
    plotting.field_lines(data, out / f"gallery-{name}-field.png")
    plotting.equipotentials(data, out / f"gallery-{name}-levels.png")

    flow = pfgm.PoissonFlow.from_data(data)
    net = flow.empirical(data)
    seen: list[tuple[float, Tensor]] = []
    samples = flow.sample(
        net,
        lines,
        steps=60,
        generator=generator,
        callback=lambda info: seen.append((info["z"], info["x"])),
    )
    levels, paths = zip(*seen, (flow.z_min, samples), strict=True)
    plotting.trajectory_plot(
        torch.stack(paths), levels, out / f"gallery-{name}-paths.png", data=data
    )
    path = out / f"gallery-{name}-space.png"
    plotting.flow_lines(flow, net, lines, path, data=data, generator=generator, z_top=1.0)


def compare_solvers(out: Path, n: int) -> None:
    """Draws the distance of samples from the exact ends against the number of evaluations."""
    generator = torch.Generator().manual_seed(0)
    data = moons(n, generator)
    flow = pfgm.PoissonFlow.from_data(data)
    net, start = flow.empirical(data), flow.prior(n, generator=generator)
    exact = flow.sample(net, n, solver="heun", steps=300, x_init=start)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for solver in ("euler", "heun", "multistep"):
        points = []
        for steps in (4, 6, 10, 16, 25, 40):
            x, nfe = flow.sample(net, n, solver=solver, steps=steps, x_init=start, return_nfe=True)
            points.append((nfe, float((x - exact).norm(dim=1).median())))
        curves[solver] = [nfe for nfe, _ in points], [distance for _, distance in points]
    path = out / "gallery-solvers.png"
    plotting.quality_curve(curves, path, ylabel="median distance to the exact end", log_y=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--quick", action="store_true", help="few points, a few seconds")
    options = parser.parse_args()
    folder = check_folder(options.out)
    n, lines = (100, 20) if options.quick else (800, 150)
    for name in DATA_SETS:
        print(f"drawing {name}")
        draw(name, folder, n, lines)
    print("drawing the paths of the solvers")
    compare_solvers(folder, n)
