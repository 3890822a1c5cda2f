"""The files of the trainer of EDM and PFGM++: their weights, and the config that they imply.

``training-state-*.pt`` and ``network-snapshot-*.pkl`` pickle whole modules together with their
source text. They are read as :class:`StandIn` objects, which hold the tensors
(:mod:`pfgm.networks.published.safe_pickle`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .safe_pickle import StandIn, StoredTensor

_FIRST_CONV = re.compile(r"model\.enc\.(\d+)x\1_conv\.weight")


def holds_modules(content: Any) -> bool:
    """Whether the content of a file was written by EDM's trainer."""
    return isinstance(content, dict) and any(
        isinstance(content.get(name), StandIn) for name in ("ema", "net")
    )


def module_in(content: Mapping[str, Any], *, ema: bool) -> StandIn:
    """The averaged network (ema), which is the one to sample with, or the trained one."""
    name, other = ("ema", False) if ema else ("net", True)
    module = content.get(name)
    if not isinstance(module, StandIn):
        option = "--ema" if other else "--no-ema"
        raise ValueError(f"it has no {name!r}; ema={other} ({option}) takes the other weights.")
    inner = _parts(module)["_modules"].get("model")
    kinds = [part.name if isinstance(part, StandIn) else "none" for part in (module, inner)]
    if kinds != ["EDMPrecond", "SongUNet"]:
        raise ValueError(
            f"it must be EDMPrecond around SongUNet, got {kinds[0]} around {kinds[1]}."
        )
    return module


def weights_of(module: StandIn) -> dict[str, Tensor]:
    """The parameters and buffers of a module and of its submodules, by name."""
    weights: dict[str, Tensor] = {}
    seen, pending = set(), [("", module)]
    while pending:
        prefix, module = pending.pop()
        if id(module) in seen:  # a module that contains itself would never end
            raise ValueError(f"it has {prefix.rstrip('.')} twice.")
        seen.add(id(module))
        parts = _parts(module)
        for name, tensor in {**parts["_parameters"], **parts["_buffers"]}.items():
            if isinstance(tensor, StoredTensor):
                weights[f"{prefix}{name}"] = tensor.tensor()
        children = [(f"{prefix}{name}.", child) for name, child in parts["_modules"].items()]
        pending += [(name, child) for name, child in reversed(children) if child is not None]
    return weights


def _parts(module: Any) -> dict[str, dict[str, Any]]:
    state = module.state if isinstance(module, StandIn) else None
    names = ("_parameters", "_buffers", "_modules")
    if not isinstance(state, dict) or not all(isinstance(state.get(n), dict) for n in names):
        raise ValueError("it does not hold a module where one must be.")
    return state


def dimensions_of(module: StandIn) -> float | None:
    """D of the module, infinity for EDM; None where the file is too old to contain it."""
    if module.state.get("pfgmpp") is False:
        return math.inf
    D = module.state.get("D") if module.state.get("pfgmpp") else None
    return float(D) if isinstance(D, (int, float)) else None


def infer_config(
    module: StandIn, weights: Mapping[str, Tensor], resolution: int | None
) -> dict[str, Any]:
    """The config of the :class:`pfgm.networks.EDMDenoiser` that has these weights."""
    first = next(filter(None, map(_FIRST_CONV.fullmatch, weights)), None)
    if first is None:
        raise ValueError("it has no model.enc.…_conv.weight, the first convolution.")
    finest = int(first[1])
    if resolution not in (None, finest):
        raise ValueError(f"its resolution is {finest}; resolution is {resolution}.")
    width, channels = _shape(weights, first[0], 4)[:2]
    sides = _sides(weights, finest)
    embedding, noise = _shape(weights, "model.map_layer0.weight", 2)
    config = {
        "channels": channels,
        "resolution": finest,
        "classes": _columns(weights, "model.map_label.weight"),
        "augment_dim": _columns(weights, "model.map_augment.weight"),
        "model_channels": width,
        "channel_mult": tuple(
            _shape(weights, f"model.enc.{side}x{side}_block0.conv0.weight", 4)[0] // width
            for side in sides
        ),
        "channel_mult_emb": embedding // width,
        "channel_mult_noise": noise // width,
        "num_blocks": sum(
            name.startswith(f"model.enc.{finest}x{finest}_block") and name.endswith("conv0.weight")
            for name in weights
        ),
        "attn_resolutions": tuple(
            side for side in sides if f"model.enc.{side}x{side}_block0.norm2.weight" in weights
        ),
        "embedding_type": "fourier" if "model.map_noise.freqs" in weights else "positional",
        "encoder_type": "residual" if any("_aux_residual." in n for n in weights) else "standard",
        "resample_filter": _resample_filter(weights),
        "sigma_data": _number(module.state, "sigma_data"),
    }
    arguments = module.state.get("_init_kwargs")
    if isinstance(arguments, dict) and "dropout" in arguments:
        config["dropout"] = _number(arguments, "dropout")
    return config


def _number(state: Mapping[str, Any], name: str) -> float:
    if not isinstance(value := state.get(name), (int, float)):
        raise ValueError(f"its {name} is not a number.")
    return value


def _sides(weights: Mapping[str, Tensor], finest: int) -> list[int]:
    """The resolutions of the levels, finest first."""
    sides = [finest]
    while (half := sides[-1] // 2) and f"model.enc.{half}x{half}_block0.conv0.weight" in weights:
        sides.append(half)
    return sides


def _shape(weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"it has no {name}.")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"its {name} must have {dimensions} dimensions, got shape {shape}.")
    return shape


def _columns(weights: Mapping[str, Tensor], name: str) -> int:
    return _shape(weights, name, 2)[1] if name in weights else 0


def _resample_filter(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """One row of the resampling kernel, in integers of which the smallest is 1."""
    name = next((name for name in weights if name.endswith(".resample_filter")), None)
    if name is None:
        return (1, 1)
    _shape(weights, name, 4)
    row = weights[name].flatten(0, 2).sum(0)
    return tuple((row / row.min()).round().int().tolist())
