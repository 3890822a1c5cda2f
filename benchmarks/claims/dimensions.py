"""Claim 4: a finite D beats D = ∞, and small D tolerates errors of the network better.

(PFGM++, arXiv 2302.04265, section 6.2 on robustness.) Measures quality for D from 1 to ∞: without
errors, with normal noise of standard deviation α on the network's output in every evaluation, and
with weights quantised to a few bits by torch, channel by channel.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import methods
from benchmarks.claims.claim import Claim
from benchmarks.claims.jobs import Job, Tables
from benchmarks.claims.measures import FIGURES, figures_of
from benchmarks.claims.methods import Spec, plusplus
from benchmarks.claims.pictures import curves
from benchmarks.claims.presets import Preset
from benchmarks.common.rows import Row, grouped, over_seeds, relative, select
from pfgm.evaluation import noise_generator

NONE = "none"
_BY = ("D", "error", "size")


def jobs(preset: Preset) -> list[Job]:
    errors = [
        (NONE, 0.0),
        *(("noise", size) for size in preset.noises),
        *(("bits", bits) for bits in preset.bits),
    ]
    return [
        Job(
            "dimensions-seeds",
            with_error,
            {"D": "inf" if math.isinf(D) else D, "error": error, "size": size, "seed": seed},
            methods.spec_of(preset, plusplus(D), seed),
            35,
        )
        for seed in preset.seeds
        for D in preset.dimensions
        for error, size in errors
    ]


class Noisy(nn.Module):
    """A backbone with normal noise of standard deviation ``size`` on its output."""

    def __init__(self, backbone: nn.Module, size: float, generator: torch.Generator) -> None:
        super().__init__()
        self.backbone, self.size, self.generator = backbone, size, generator

    def forward(self, x: Tensor, noise: Tensor, **condition: Any) -> Tensor:
        output: Tensor = self.backbone(x, noise, **condition)
        normal = torch.randn(output.shape, generator=self.generator, device=output.device)
        return output + self.size * normal


@torch.no_grad()
def quantise(network: nn.Module, bits: int) -> None:
    """Rounds weights to 2^bits − 1 values, symmetric around 0, with one scale per channel."""
    largest = 2 ** (bits - 1) - 1
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            scale = layer.weight.abs().flatten(1).amax(1).clamp(min=1e-12) / largest
            zero = torch.zeros_like(scale, dtype=torch.int32)
            rounded = torch.fake_quantize_per_channel_affine(
                layer.weight, scale, zero, 0, -largest, largest
            )
            layer.weight.copy_(rounded)


def with_error(
    preset: Preset, folder: Path, spec: Spec, D: float, error: str, size: float, seed: int
) -> Row:
    flow, network = methods.load(spec, preset, folder)
    if error == "noise":
        generator = noise_generator(seed, torch.device("cpu"))
        network.backbone = Noisy(network.get_submodule("backbone"), size, generator)
    elif error == "bits":
        quantise(network, int(size))
    samples, _ = methods.draw(flow, network, preset, seed)
    return figures_of(samples, preset, folder)


def derive(tables: Tables, preset: Preset) -> Tables:
    """Means, figures relative to the same network without errors, and the best D."""
    figures = ["frechet_pixels", "frechet_features"]
    rows = tables["dimensions-seeds"]
    ratios = relative(rows, figures, ["D", "seed"], lambda row: row["error"] == NONE)
    means = over_seeds(rows, _BY, FIGURES)
    return {
        "dimensions-means": means,
        "dimensions-relative": over_seeds(ratios, _BY, figures),
        "dimensions-best": [
            _best(part, figure)
            for part in grouped(means, ["error", "size"]).values()
            for figure in figures
        ],
    }


def _best(rows: list[Row], figure: str) -> Row:
    """The D with the least distance, beside D = ∞."""
    least = min(rows, key=lambda row: row[figure])
    (limit,) = select(rows, D="inf")
    return {
        "error": least["error"],
        "size": least["size"],
        "figure": figure,
        "best_D": least["D"],
        "value": least[figure],
        "spread": least[f"{figure}_spread"],
        "value_at_infinity": limit[figure],
        "spread_at_infinity": limit[f"{figure}_spread"],
    }


def draw(tables: Tables, folder: Path) -> None:
    for error, words in (("noise", "noise α"), ("bits", "bits")):
        rows = [
            {
                **row,
                "D": float(row["D"]),
                "series": "none" if row["error"] == NONE else f"{words} {row['size']:g}",
            }
            for row in tables["dimensions-means"]
            if row["error"] in (NONE, error)
        ]
        curves(
            rows,
            "series",
            "D",
            "frechet_pixels",
            folder / f"dimensions-{error}.png",
            xlabel="augmented dimensions D",
            ylabel="Fréchet distance, pixels",
            title=f"D and errors of the network: {error}",
        )


CLAIM = Claim("D, and errors of the network", jobs, derive, draw)
