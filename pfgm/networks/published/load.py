"""Loads published checkpoints without executing anything in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...common.files import MALFORMED, StrPath
from .edm_unets import EDMDenoiser
from .pfgm_unets import Published

_Network = TypeVar("_Network", Published, EDMDenoiser)


def load_published(
    path: StrPath, *, ema: bool = True, resolution: int | None = None
) -> Published | EDMDenoiser:
    """The network of a published checkpoint of PFGM, PFGM++ or EDM, in evaluation mode.

    A PFGM checkpoint (``checkpoint_*.pth``) gives a :class:`DDPMpp` or :class:`NCSNpp`, networks
    for :class:`pfgm.PoissonFlow`. A file of the trainer of PFGM++ or EDM
    (``training-state-*.pt`` and ``.pkl``, ``network-snapshot-*.pkl``) gives an
    :class:`EDMDenoiser`, with the ``D``, ``sigma_data`` and ``classes`` of the file:

        net = pfgm.networks.load_published("training-state-100000.pt")
        flow = pfgm.PoissonFlowPP(net.shape, D=net.D, sigma_data=net.sigma_data)
        samples = flow.sample(net, 16)

    ``D`` is None where the file does not say it. Then take the D that the checkpoint was published
    under, or infinity for EDM.

    The architecture is inferred from the names and shapes of the parameters: DDPM++ or NCSN++ of
    any width, depth and number of levels.

    Args:
        path: the file.
        ema: whether to take the averaged weights, which are the ones to sample with.
        resolution: height and width of the images. Files of PFGM++ contain it. For a file of PFGM,
            None means that attention is at width 16, as in all published configurations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, pickles more than tensors, plain values and the modules
            of such a network, or holds another network; the message names the first difference.

    >>> import tempfile
    >>> from pfgm.networks import DDPMpp
    >>> net = DDPMpp(1, 32, nf=8, ch_mult=(1, 2), num_res_blocks=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": net.state_dict()}, f"{folder}/checkpoint_7.pth")
    ...     load_published(f"{folder}/checkpoint_7.pth", ema=False).config == net.config
    True
    """
    # Late here and below, because only files need it.
    from .edm_files import holds_modules
    from .safe_pickle import open_pickle

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    with open_pickle(path) as content:
        try:
            if holds_modules(content):
                return _load_edm(content, ema, resolution).eval()
            return _load_pfgm(content, ema, resolution).eval()
        except MALFORMED as error:
            raise ValueError(f"{path} is not a published network: {error}") from error


def _load_pfgm(content: Any, ema: bool, resolution: int | None) -> Published:
    from . import pfgm_files

    weights = pfgm_files.weights_in(content)
    network = _build(*pfgm_files.infer_architecture(weights, resolution), weights)
    if ema:
        pfgm_files.load_averages(network, content.get("ema"))
    return network


def _load_edm(content: Mapping[str, Any], ema: bool, resolution: int | None) -> EDMDenoiser:
    from . import edm_files

    module = edm_files.module_in(content, ema=ema)
    weights = edm_files.weights_of(module)
    config = edm_files.infer_config(module, weights, resolution)
    network = _build(EDMDenoiser, config, weights)
    network.D = edm_files.dimensions_of(module)
    return network


def _build(
    kind: type[_Network], config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> _Network:
    """The network of a config with these weights, whose names and shapes are checked first."""
    with torch.device("meta"):
        expected = kind(**config).state_dict()
    _check_weights(weights, expected)
    with torch.device("cpu"):  # as the weights, whatever the default device
        network = kind(**config)
    network.load_state_dict(weights)
    return network


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"it has no {name}.")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"its {name} must have shape {tuple(tensor.shape)}, got "
                f"{tuple(weights[name].shape)}."
            )
    if surplus := [name for name in weights if name not in expected]:
        raise ValueError(f"it has {surplus[0]}, which such a network does not have.")
