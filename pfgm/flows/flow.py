"""The class that joins what all flows can do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from ..common.checks import check_choice
from ..common.numbers import positive
from ..networks.fields import FieldNetwork
from ..networks.level_encodings import LevelFunction, level_encoding
from ..networks.published.pfgm_unets import Published
from ..networks.unet import takes_shape
from ..networks.wrapped import Meaning, Wrapped, WrappedModule
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

    _predictions: tuple[str, ...]
    """What the output of a module may mean."""
    _preserving: tuple[str, ...] = ()
    """Those of them that allow variance_preserving."""

    def network(
        self, net: str | type[FieldNetwork] | nn.Module = "auto", **settings: Any
    ) -> nn.Module:
        """Makes a network of the flow: an untrained one by name, or one around your own module.

        Args:
            net: a name, a class or a module.

                - "unet" or "mlp"; "auto" is unet for signals, images and volumes with axes of at
                  least 4 values, else mlp. For square images also "ddpmpp" or "ncsnpp" as published
                  with PFGM, and with :class:`pfgm.PoissonFlowPP` "edm", the network of EDM.
                - With :class:`pfgm.PoissonFlow`, a subclass of :class:`pfgm.networks.FieldNetwork`.
                - A module of any library, such as diffusers' U-Net or DiT, that is called
                  ``net(x, level, **condition)`` with x (B, *S) and an encoded noise level (B,). It
                  becomes a submodule of the result. It returns a tensor, a tuple or list that
                  begins with one, or an object whose ``sample`` is one. The tensor is (B, *S), or
                  has twice the channels, of which the first half is used.
            **settings: of a named network its size, such as width, and classes for labels:
                arguments of :class:`pfgm.networks.UNet`, :class:`pfgm.networks.MLP` and so on. With
                the published rules of PoissonFlow, data_std, the root mean square of the data's
                values, follows from M unless it is given.

        Settings of a module:

        - predicts: the meaning of its output F. For a module that is to be trained: "residual". It
          sees x scaled to order one, and the posterior mean is c_skip x + c_out F. For PFGM++ and
          diffusion the factors are those of EDM (:class:`pfgm.networks.Preconditioned`). For PFGM
          they are those of :class:`pfgm.networks.FieldNetwork`, at a level that is above z where
          the norm of x shows more noise. A module that was trained elsewhere, on data with normal
          noise of level σ, sees x itself: "mean", a denoiser; "noise", mean = x − σ F; "score",
          mean = x + σ² F. Noise and score are exact at D = ∞; at other D the noise is not normal,
          and they hold on average. With PoissonFlow also "field": one channel more than x, first
          field_x, then field_z as the mean over the pixels of the last channel, as published.
        - level: how a level, σ or z, is encoded. "timestep", the default:
          1000 ln(σ/σ_last)/ln(σ_first/σ_last), for sinusoidal embeddings of timesteps from 0 to
          1000, as in diffusers. "log": ln(σ)/4, as in EDM. "sigma": the level itself. Or a function
          of levels (B,).
        - data_std: root mean square of the data's values. "residual" uses it, and with PoissonFlow
          the apparent level. By default it is sigma_data of a PoissonFlowPP, or the spread of a
          PoissonFlow, around 0 unless predicts is "residual". Without a spread it is the norm of
          data for which the published rule gives this M (PFGM, arXiv 2209.11178, appendix B.1.1).
        - conditions: the module's own names of conditions, such as {"labels": "class_labels"} for
          diffusers; other conditions keep their names.
        - no_label: the module's label for "no label". It replaces labels below 0, and is given
          where the condition has no "labels".
        - variance_preserving: whether the module sees x/√(1 + σ²), the points of DDPM
          (arXiv 2006.11239), in place of x. With PoissonFlowPP and "mean" or "noise" only.

        Returns:
            For PoissonFlow a network ``(x, z, **condition) -> (field_x, field_z)``; for
            PoissonFlowPP a denoiser ``(x, sigma, **condition) -> mean``, such as
            :class:`pfgm.networks.Denoiser`. One around a module is none of ``NETWORKS``, so
            :func:`pfgm.load` needs a network of the same structure to load it into.

        Raises:
            ValueError: there is no such network for the flow, a setting is out of range, or
                conditions has a name that the module does not take. When called: a condition has
                such a name, or the output of the module has a wrong shape.
            TypeError: the network has no such setting; net is none of the above, or a class where
                the flow is a PoissonFlowPP; or net is a network of the field of this library.

        >>> import pfgm, torch
        >>> data = torch.randn(50, 1, 8, 8)
        >>> field, mean = pfgm.PoissonFlow.from_data(data), pfgm.PoissonFlowPP.from_data(data, D=64)
        >>> for flow in (field, mean):
        ...     net = flow.network("unet", width=16)
        ...     print(type(net).__name__, tuple(flow.sample(net, 2, steps=2).shape))
        UNet (2, 1, 8, 8)
        Denoiser (2, 1, 8, 8)
        >>> class Own(torch.nn.Conv2d):
        ...     def forward(self, x, time):
        ...         return super().forward(x)
        >>> net = mean.network(Own(1, 1, 3, padding=1), level="log")
        >>> mean.loss(net, data[:16], references=data).isfinite()
        tensor(True)
        """
        if isinstance(net, nn.Module):
            known = [*signature(self._around).parameters][1:]
            for name in settings.keys() - set(known):
                raise TypeError(
                    f"a module of your own has no setting {name!r}; its settings are "
                    f"{', '.join(known)}."
                )
            return self._around(net, **settings)
        is_field = isinstance(net, type) and issubclass(net, FieldNetwork)
        if not isinstance(net, str) and not is_field:
            raise TypeError(
                "net must be the name of a network, a module of your own or a subclass of "
                f"FieldNetwork, got {net!r}."
            )
        if net == "auto":
            net = "unet" if takes_shape(self.shape) else "mlp"
        return self._build(net, settings)

    @abstractmethod
    def _build(self, net: str | type[FieldNetwork], settings: dict[str, Any]) -> nn.Module:
        """The network of a name or a class."""

    def _around(
        self,
        net: nn.Module,
        *,
        predicts: str = "residual",
        level: str | LevelFunction = "timestep",
        data_std: float | None = None,
        conditions: Mapping[str, str] | None = None,
        no_label: int | None = None,
        variance_preserving: bool = False,
    ) -> Wrapped:
        if isinstance(net, (FieldNetwork, Published)):
            raise TypeError(
                f"net must be a name or a module of your own, got a {type(net).__name__}, which is "
                "a network of PoissonFlow already; a name makes a denoiser of its kind."
            )
        check_choice("predicts", predicts, self._predictions)
        if variance_preserving and predicts not in self._preserving:
            raise ValueError(
                "variance_preserving must be False unless flow is a PoissonFlowPP and predicts is "
                f"'mean' or 'noise', got {type(self).__name__} and {predicts!r}."
            )
        if data_std is not None:
            positive("data_std", data_std)
        if isinstance(level, str):
            level = level_encoding(level, self.first_level, self.last_level)
        module = WrappedModule(net, conditions, no_label)
        return self._wrap(module, Meaning(level, predicts, data_std, variance_preserving))

    @abstractmethod
    def _wrap(self, module: WrappedModule, meaning: Meaning) -> Wrapped:
        """The network around a module."""
