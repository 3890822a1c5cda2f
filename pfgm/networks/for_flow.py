"""The networks that fit a flow, behind :meth:`pfgm.Flow.network`."""

from __future__ import annotations

import math
from typing import Any

from ..common.checks import check_choice
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP
from ..flows.poisson import PoissonFlow
from .denoiser import Denoiser
from .fields import FieldNetwork
from .published.edm_unets import EDMDenoiser
from .published.pfgm_unets import Published
from .registry import build
from .unet import takes_shape

_PUBLISHED = ("ddpmpp", "ncsnpp")  # of PFGM
_KINDS = ("auto", "unet", "mlp", *_PUBLISHED)  # of both flows


def network_for(
    flow: Flow, kind: str | type[FieldNetwork], settings: dict[str, Any]
) -> FieldNetwork | Denoiser | EDMDenoiser | Published:
    """As :meth:`pfgm.Flow.network`."""
    if isinstance(kind, type) and issubclass(kind, FieldNetwork):
        if not isinstance(flow, PoissonFlow):
            raise TypeError(
                f"kind must be a name for a {type(flow).__name__}, got the class {kind.__name__}; "
                "pfgm.networks.from_module fits a module of your own to it."
            )
        return kind(flow.shape, **{**_scaling(flow), **settings})
    check_choice("kind", kind, _KINDS if isinstance(flow, PoissonFlow) else (*_KINDS, "edm"))
    name = str(kind)
    if name == "auto":
        name = "unet" if takes_shape(flow.shape) else "mlp"
    settings = {**_size(name, flow.shape), **settings}
    if isinstance(flow, PoissonFlow):
        return build(name, settings if name in _PUBLISHED else _scaling(flow) | settings)
    assert isinstance(flow, PoissonFlowPP)
    if name == "edm":
        return build(name, {"sigma_data": flow.sigma_data, **settings})
    return build("denoiser", {"network": name, "config": settings, "sigma_data": flow.sigma_data})


def _size(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of a network that tell the shape of a sample."""
    if name not in (*_PUBLISHED, "edm"):
        return {"shape": shape}
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"the network {name!r} takes square images (C, H, H), got samples of shape {shape}."
        )
    return {"channels": shape[0], "resolution": shape[1]}


def _scaling(flow: PoissonFlow) -> dict[str, Any]:
    """The arguments of a network that fit it to the values of the data."""
    if flow.spread is None:
        return {"gamma": flow.gamma, "data_std": data_std_of(flow)}
    scale = {"data_std": flow.spread, "center": flow.center.tolist(), "scale": flow.spread}
    return {"gamma": flow.gamma, **scale}


def data_std_of(flow: PoissonFlow) -> float:
    """Root mean square ‖x‖/√N of data for which the published rule gives the M of a flow.

    The rule is M = int(¾ ln(‖x‖²/(2 √N σ²))/ln(1 + τ)) + 1 (PFGM, appendix B.1.1).
    """
    log_ratio = (flow.M - 0.5) / 0.75 * math.log1p(flow.tau)
    return flow.noise_std * math.sqrt(2 * math.exp(log_ratio) / math.sqrt(flow.N))
