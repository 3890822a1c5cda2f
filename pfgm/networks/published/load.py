"""Published checkpoints: the network that they hold, read without executing anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...common.files import StrPath
from .edm import EDMDenoiser
from .edm_files import architecture, holds_modules, module_in, trained_with, weights_of
from .pfgm_unets import DDPMpp, NCSNpp, Published
from .safe_pickle import BROKEN, StoredTensor, opened

__all__ = ["load_published"]

_Network = TypeVar("_Network", Published, EDMDenoiser)
_ATTENTION = 16  # width of the feature maps with attention in all published configurations


def load_published(
    path: StrPath, *, ema: bool = True, resolution: int | None = None
) -> Published | EDMDenoiser:
    """The network of a published checkpoint of PFGM or PFGM++, in evaluation mode.

    A PFGM checkpoint (``checkpoint_*.pth``) gives :class:`DDPMpp` or :class:`NCSNpp`, networks of
    :class:`pfgm.PoissonFlow`. What the trainer of PFGM++, or of EDM, writes
    (``training-state-*.pt`` and ``.pkl``, ``network-snapshot-*.pkl``) gives an
    :class:`EDMDenoiser` with what the file says of ``D``, ``sigma_data`` and ``classes``:

        net = pfgm.networks.load_published("training-state-100000.pt")
        flow = pfgm.PoissonFlowPP(net.shape, D=net.D, sigma_data=net.sigma_data)
        samples = flow.sample(net, 16)

    ``D`` is None where the file does not say it: then take the one that it was published under,
    infinity for EDM's own.

    The architecture follows from the names and shapes of the parameters: DDPM++ or NCSN++ of any
    width, depth and number of levels.

    Args:
        path: the file.
        ema: take the averaged weights, with which samples are drawn.
        resolution: of the images. PFGM++ files say it; of PFGM's it is, unless given, such that
            attention is at width 16, as published.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, pickles more than tensors, plain values and the modules of such
            a network, or does not hold one; the message names the first difference.

    >>> import tempfile
    >>> net = DDPMpp(1, 32, nf=8, ch_mult=(1, 2), num_res_blocks=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": net.state_dict()}, f"{folder}/checkpoint_7.pth")
    ...     load_published(f"{folder}/checkpoint_7.pth", ema=False).config == net.config
    True
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    with opened(path) as content:
        try:
            if holds_modules(content):
                return _training_state(content, ema, resolution).eval()
            network = _checkpoint(content, resolution)
            if ema:
                _take_averages(network, content.get("ema"))
        except BROKEN as error:
            raise ValueError(f"{path} holds no published network: {error}") from error
        return network.eval()


def _checkpoint(content: Any, resolution: int | None) -> Published:
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(t, StoredTensor) for t in model.values()):
        raise ValueError(
            "it has no 'model' that maps names to tensors, and no 'ema' or 'net' that is a module."
        )
    weights = {
        name.removeprefix("module."): stored.tensor()
        for name, stored in model.items()
        if name.removeprefix("module.") != "sigmas"
    }
    kind, config = _architecture(weights, resolution)
    return _filled(kind, config, weights)


def _training_state(content: Mapping[str, Any], ema: bool, resolution: int | None) -> EDMDenoiser:
    module = module_in(content, ema=ema)
    weights = weights_of(module)
    network = _filled(EDMDenoiser, architecture(module, weights, resolution), weights)
    network.D = trained_with(module)
    return network


def _filled(
    kind: type[_Network], config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> _Network:
    """The network of a config, with the weights, whose names and shapes are compared first."""
    with torch.device("meta"):
        expected = kind(**config).state_dict()
    _compare(weights, expected)
    network = kind(**config)
    network.load_state_dict(weights)
    return network


class _Module(NamedTuple):
    """What the parameters of one module say of it."""

    kind: str
    inputs: int
    outputs: int
    resamples: bool


def _architecture(
    weights: Mapping[str, Tensor], resolution: int | None
) -> tuple[type[Published], dict[str, Any]]:
    fourier = "all_modules.0.W" in weights
    first = f"all_modules.{3 if fourier else 2}.weight"
    if first not in weights or weights[first].ndim != 4:
        raise ValueError(f"it has no {first}, the first convolution.")
    nf, channels = weights[first].shape[:2]
    modules = _modules(weights, 4 if fourier else 3)
    pyramid = any(module.kind == "pyramid" for module in modules)
    blocks = _blocks(modules)
    ch_mult, attended = _levels(modules, blocks, nf)
    if resolution is None:
        if not attended:
            raise ValueError(
                "no level has attention, so that the resolution cannot be told; give it."
            )
        resolution = _ATTENTION << attended[0]
    config = {
        "channels": channels,
        "resolution": resolution,
        "nf": nf,
        "ch_mult": ch_mult,
        "num_res_blocks": blocks,
        "attn_resolutions": tuple(resolution >> level for level in attended),
    }
    if fourier != pyramid:
        # Of neither published kind, but the same family.
        config |= {
            "embedding": "fourier" if fourier else "positional",
            "progressive_input": "residual" if pyramid else "none",
            "fir": pyramid,
        }
    return NCSNpp if fourier and pyramid else DDPMpp, config


def _modules(weights: Mapping[str, Tensor], start: int) -> list[_Module]:
    """The modules from a place on that are blocks, attention or steps of the pyramid, in order."""
    found = []
    for place in range(start, len(weights)):
        name = f"all_modules.{place}."
        if (conv := weights.get(f"{name}Conv_0.weight")) is not None and conv.ndim == 4:
            same = conv.shape[0] == conv.shape[1]
            resamples = same and f"{name}Conv_2.weight" in weights
            found.append(_Module("block", conv.shape[1], conv.shape[0], resamples))
        elif (nin := weights.get(f"{name}NIN_0.W")) is not None:
            found.append(_Module("attention", len(nin), len(nin), False))
        elif (conv := weights.get(f"{name}Conv2d_0.weight")) is not None and conv.ndim == 4:
            found.append(_Module("pyramid", conv.shape[1], conv.shape[0], False))
    return found


def _blocks(modules: list[_Module]) -> int:
    """Residual blocks of a level: with L levels there are (2 blocks + 3) L of all kinds."""
    total = sum(module.kind == "block" for module in modules)
    levels = 1 + sum(module.resamples for module in modules) // 2
    # blocks and one down on the way down, 2 in the middle, blocks + 1 and one up on the way up.
    blocks = (total - 2 * (levels - 1) - 2 - levels) / (2 * levels)
    if blocks < 1 or blocks != math.floor(blocks):
        raise ValueError(f"its {total} residual blocks are not those of {levels} levels.")
    return int(blocks)


def _levels(modules: list[_Module], blocks: int, nf: int) -> tuple[tuple[int, ...], list[int]]:
    """Multiples of nf of each level, and which levels have attention."""
    multiples, attended, seen = [], [], 0
    levels = 1 + sum(module.resamples for module in modules) // 2
    for module in modules:
        if module.kind == "attention" and seen % blocks == 0 and seen // blocks - 1 not in attended:
            attended.append(seen // blocks - 1)
        elif module.kind == "block" and not module.resamples:
            if seen == levels * blocks:
                break  # the middle
            seen += 1
            if seen % blocks == 0:
                multiples.append(module.outputs // nf)
    return tuple(multiples), attended


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"it has no {name}.")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"its {name} has shape {tuple(found[name].shape)}; needed is {tuple(tensor.shape)}."
            )
    if surplus := [name for name in found if name not in expected]:
        raise ValueError(f"it has {surplus[0]}, which such a network has not.")


def _take_averages(network: Published, ema: Any) -> None:
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    if not isinstance(averages, list) or len(averages) != len(trained):
        count = len(averages) if isinstance(averages, list) else "no"
        raise ValueError(
            f"it has {count} averaged weights (ema, shadow_params); needed are {len(trained)}. "
            "Take the others with ema=False."
        )
    with torch.no_grad():
        for (name, parameter), average in zip(trained, averages, strict=True):
            if not isinstance(average, StoredTensor) or average.shape != parameter.shape:
                raise ValueError(
                    f"it has another shape for the average of {name}; needed is "
                    f"{tuple(parameter.shape)}."
                )
            parameter.copy_(average.tensor())
