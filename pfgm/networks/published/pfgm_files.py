"""The checkpoints of PFGM: their weights, and the architecture that the weights imply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pfgm_unets import DDPMpp, NCSNpp, Published
from .safe_pickle import StoredTensor

_ATTENTION_WIDTH = 16  # width of the feature maps with attention in all published configurations


def weights_in(content: Any) -> dict[str, Tensor]:
    """The trained weights in the content of a checkpoint, by name."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(t, StoredTensor) for t in model.values()):
        raise ValueError(
            "it has no 'model' that maps names to tensors, and no 'ema' or 'net' that is a module."
        )
    weights = {name.removeprefix("module."): stored for name, stored in model.items()}
    return {name: stored.tensor() for name, stored in weights.items() if name != "sigmas"}


def load_averages(network: Published, ema: Any) -> None:
    """Replaces the weights of a network by the averaged ones in the "ema" of its checkpoint."""
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    if not isinstance(averages, list) or len(averages) != len(trained):
        count = len(averages) if isinstance(averages, list) else "no"
        raise ValueError(
            f"it must have {len(trained)} averaged weights (ema, shadow_params), got {count}. "
            "ema=False (--no-ema) takes the other weights."
        )
    with torch.no_grad():
        for (name, parameter), average in zip(trained, averages, strict=True):
            if not isinstance(average, StoredTensor) or average.shape != parameter.shape:
                raise ValueError(
                    f"its average of {name} must have shape {tuple(parameter.shape)}, got another "
                    "shape."
                )
            parameter.copy_(average.tensor())


class _Module(NamedTuple):
    """A module of the network, inferred from its parameters."""

    kind: str
    inputs: int
    outputs: int
    resamples: bool


def infer_architecture(
    weights: Mapping[str, Tensor], resolution: int | None
) -> tuple[type[Published], dict[str, Any]]:
    """The class and the config of the network that has these weights."""
    fourier = "all_modules.0.W" in weights
    first = f"all_modules.{3 if fourier else 2}.weight"
    if first not in weights or weights[first].ndim != 4:
        raise ValueError(f"it has no {first}, the first convolution.")
    nf, channels = weights[first].shape[:2]
    modules = _list_modules(weights, 4 if fourier else 3)
    pyramid = any(module.kind == "pyramid" for module in modules)
    blocks = _blocks_per_level(modules)
    ch_mult, attended = _levels(modules, blocks, nf)
    if resolution is None:
        if not attended:
            raise ValueError(
                "resolution is None, and no level has attention to infer it from; give resolution."
            )
        resolution = _ATTENTION_WIDTH << attended[0]
    config = {
        "channels": channels,
        "resolution": resolution,
        "nf": nf,
        "ch_mult": ch_mult,
        "num_res_blocks": blocks,
        "attn_resolutions": tuple(resolution >> level for level in attended),
    }
    if fourier != pyramid:
        # Neither of the two published networks, but of the same family.
        config |= {
            "embedding": "fourier" if fourier else "positional",
            "progressive_input": "residual" if pyramid else "none",
            "fir": pyramid,
        }
    return NCSNpp if fourier and pyramid else DDPMpp, config


def _list_modules(weights: Mapping[str, Tensor], start: int) -> list[_Module]:
    """The blocks, attention modules and pyramid steps from an index on, in their order."""
    modules = []
    for index in range(start, len(weights)):
        name = f"all_modules.{index}."
        if (conv := weights.get(f"{name}Conv_0.weight")) is not None and conv.ndim == 4:
            same = conv.shape[0] == conv.shape[1]
            resamples = same and f"{name}Conv_2.weight" in weights
            modules.append(_Module("block", conv.shape[1], conv.shape[0], resamples))
        elif (nin := weights.get(f"{name}NIN_0.W")) is not None:
            modules.append(_Module("attention", len(nin), len(nin), False))
        elif (conv := weights.get(f"{name}Conv2d_0.weight")) is not None and conv.ndim == 4:
            modules.append(_Module("pyramid", conv.shape[1], conv.shape[0], False))
    return modules


def _count_levels(modules: list[_Module]) -> int:
    return 1 + sum(module.resamples for module in modules) // 2


def _blocks_per_level(modules: list[_Module]) -> int:
    """Residual blocks of each level of the encoder."""
    total = sum(module.kind == "block" for module in modules)
    levels = _count_levels(modules)
    # Each level has `blocks` in the encoder and `blocks + 1` in the decoder. Between two levels,
    # one block downsamples and one upsamples. Two more blocks are in the middle.
    blocks = (total - 2 * (levels - 1) - 2 - levels) / (2 * levels)
    if blocks < 1 or blocks != math.floor(blocks):
        raise ValueError(f"its {total} residual blocks do not fit {levels} levels.")
    return int(blocks)


def _levels(modules: list[_Module], blocks: int, nf: int) -> tuple[tuple[int, ...], list[int]]:
    """The channels of each level, in units of nf, and which levels have attention."""
    multiples, attended, seen = [], [], 0
    levels = _count_levels(modules)
    for module in modules:
        if module.kind == "attention" and seen % blocks == 0 and seen // blocks - 1 not in attended:
            attended.append(seen // blocks - 1)
        elif module.kind == "block" and not module.resamples:
            if seen == levels * blocks:
                break  # the middle begins
            seen += 1
            if seen % blocks == 0:
                multiples.append(module.outputs // nf)
    return tuple(multiples), attended
