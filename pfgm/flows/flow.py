"""The class that joins what all flows can do."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from .editing import Editing
from .fitting import Fitting
from .inpainting import Inpainting
from .likelihood import Likelihood


class Flow(Fitting, Likelihood, Editing, Inpainting):
    """Base of :class:`pfgm.PoissonFlow` and :class:`pfgm.PoissonFlowPP`.

    A flow carries a prior at its first level to data at its last level along the ODE
    dx/dσ = (x − mean(x, σ))/σ. Its methods are in classes by subject: parametrisation, sampling,
    training targets, fitted levels, likelihood, editing and inpainting.
    """

    def network(self, kind: str | type[nn.Module] = "auto", **settings: Any) -> nn.Module:
        """Makes an untrained network that fits the flow: its samples, scale and parametrisation.

        Args:
            kind: "unet" or "mlp"; "auto" is unet for signals, images and volumes with axes of at
                least 4 values, else mlp. For square images also "ddpmpp" or "ncsnpp" as published
                with PFGM, and with :class:`pfgm.PoissonFlowPP` "edm", the network of EDM. With
                :class:`pfgm.PoissonFlow` also a subclass of :class:`pfgm.networks.FieldNetwork`.
            **settings: the size, such as width, and classes for labels: arguments of
                :class:`pfgm.networks.UNet`, :class:`pfgm.networks.MLP` and so on. With the
                published rules of PoissonFlow, data_std, the root mean square of the data's values,
                follows from M unless it is given.

        Returns:
            For PoissonFlow a network of the field, or a published one; for PoissonFlowPP a
            :class:`pfgm.networks.Denoiser` around such a network, or the EDMDenoiser. A network of
            another library becomes one of the flow by :func:`pfgm.networks.from_module`.

        Raises:
            ValueError: there is no such network for the flow, or a setting is out of range.
            TypeError: the network has no such setting, or kind is a class and the flow a
                PoissonFlowPP.

        >>> import pfgm, torch
        >>> data = torch.randn(50, 1, 8, 8)
        >>> field, mean = pfgm.PoissonFlow.from_data(data), pfgm.PoissonFlowPP.from_data(data, D=64)
        >>> for flow in (field, mean):
        ...     net = flow.network("unet", width=16)
        ...     print(type(net).__name__, tuple(flow.sample(net, 2, steps=2).shape))
        UNet (2, 1, 8, 8)
        Denoiser (2, 1, 8, 8)
        """
        # pfgm.networks stands above the flows, and is not imported before it is asked for.
        made = importlib.import_module("pfgm.networks.for_flow").network_for(self, kind, settings)
        assert isinstance(made, nn.Module)
        return made
