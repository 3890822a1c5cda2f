"""Networks of other libraries as networks of this one: what they are given, what they return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import positive
from ..common.tensors import over_samples
from ..flows.flow import Flow
from ..flows.plusplus import PoissonFlowPP, Preconditioned
from ..flows.poisson import PoissonFlow
from .embedding import FieldNetwork, field_from_mean

__all__ = ["Foreign", "ForeignDenoiser", "ForeignField", "ForeignMeanField", "from_module"]

Telling = Callable[[Tensor], Tensor]
"""From levels (B,), z or sigma, to what a network is told of them."""

_PREDICTIONS: dict[type[Flow], tuple[str, ...]] = {
    PoissonFlow: ("residual", "mean", "noise", "score", "field"),
    PoissonFlowPP: ("residual", "mean", "noise", "score"),
}
_LARGEST_LOG = 700.0  # of a float64
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


# ---- how a level is told ----------------------------------------------------------------------


class Timestep:
    """t = 1000 ln(σ/σ_last)/ln(σ_first/σ_last): 0 at a flow's last level, 1000 at its first.

    The range of DDPM's timesteps (arXiv 2006.11239), for which the sinusoidal embeddings of
    diffusers and others are made: frequencies from 1 down to 1e-4. Below the last level, where
    nothing is left to tell apart, it stays 0.
    """

    def __init__(self, flow: Flow) -> None:
        self._last = flow.last_level
        self._scale = 1000 / math.log(flow.first_level / flow.last_level)

    def __call__(self, level: Tensor) -> Tensor:
        return self._scale * (level.clamp_min(self._last) / self._last).log()

    def level(self, told: Tensor) -> Tensor:
        """The level of which this was told."""
        return self._last * (told / self._scale).exp()


class LogLevel:
    """ln(σ)/4, EDM's c_noise (arXiv 2206.00364, table 1)."""

    def __call__(self, level: Tensor) -> Tensor:
        return level.log() / 4

    def level(self, told: Tensor) -> Tensor:
        """The level of which this was told."""
        return (4 * told).exp()


class LevelItself:
    """σ, or PFGM's z."""

    def __call__(self, level: Tensor) -> Tensor:
        return level

    def level(self, told: Tensor) -> Tensor:
        """The level of which this was told."""
        return told


def telling(name: str, flow: Flow) -> Timestep | LogLevel | LevelItself:
    """The way of telling a level that goes by a name.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "timestep":
        return Timestep(flow)
    if name == "log":
        return LogLevel()
    if name == "sigma":
        return LevelItself()
    raise ValueError(f"level is {name!r}; allowed names are 'timestep', 'log' and 'sigma'.")


# ---- the network, called in its own way -------------------------------------------------------


class ForeignModule(nn.Module):
    """The foreign network itself: conditions under its own names, its result as one tensor."""

    def __init__(
        self, net: nn.Module, names: Mapping[str, str] | None, no_label: int | None
    ) -> None:
        super().__init__()
        self.net = net
        self._names = dict(names or {})
        self._no_label = no_label
        parameters = list(inspect.signature(net.forward).parameters.values())
        self._taken = [p.name for p in parameters[2:] if p.kind not in _VARIADIC]
        self._takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
        for theirs in self._names.values():
            self._check_name(theirs, "conditions")

    def forward(self, x: Tensor, told: Tensor, **condition: Any) -> Tensor:
        """What the network returns for x (B, *S) and what it is told of the level (B,)."""
        if self._no_label is not None:
            labels = condition.get("labels")
            none = torch.full((len(x),), self._no_label, device=x.device)
            condition["labels"] = none if labels is None else torch.where(labels < 0, none, labels)
        theirs = {self._names.get(name, name): value for name, value in condition.items()}
        for name in theirs:
            self._check_name(name, "condition")
        return _tensor(self.net(x, told, **theirs))

    def _check_name(self, name: str, argument: str) -> None:
        if name not in self._taken and not self._takes_any:
            raise ValueError(
                f"{argument} leads to {name!r}, which {type(self.net).__name__} does not take; its "
                f"conditions are {', '.join(self._taken) or 'none'}."
            )


def _tensor(found: Any) -> Tensor:
    """The tensor in what a network returned."""
    if isinstance(found, (tuple, list)) and found:
        tensor = found[0]
    else:
        tensor = found if isinstance(found, Tensor) else getattr(found, "sample", None)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"net returned a {type(found).__name__}; allowed are a tensor, a tuple or list that "
            "begins with one, and an object whose sample is one."
        )
    return tensor


def _like(x: Tensor, output: Tensor) -> Tensor:
    """The output in the shape of x: of twice its channels, the others being variances, the first.

    A learned variance stands behind the prediction in improved DDPM (arXiv 2102.09672) and DiT.
    """
    if output.shape == x.shape:
        return output
    if x.ndim > 1 and output.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
        return output[:, : x.shape[1]]
    raise ValueError(
        f"net returned shape {tuple(output.shape)}; needed is that of x, {tuple(x.shape)}, or "
        "twice its channels, of which the first half counts."
    )


def _mean(predicts: str, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
    """The posterior mean that an output means at levels sigma, which multiply x."""
    if predicts == "mean":
        return output
    if predicts == "noise":
        return x - sigma * output
    return x + sigma.square() * output


# ---- networks of the flows --------------------------------------------------------------------


class ForeignDenoiser(Preconditioned):
    """A foreign network as a denoiser net(x, sigma, **condition) of PFGM++."""

    def __init__(
        self, backbone: ForeignModule, told: Telling, predicts: str, sigma_data: float
    ) -> None:
        super().__init__(backbone, sigma_data)
        self.told, self._predicts = told, predicts

    def given(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given at x (B, *S) and sigma (B,)."""
        scaled = self.scaled(x, sigma) if self._predicts == "residual" else x
        return scaled, self.told(sigma.to(x.dtype))

    def read(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """The posterior mean (B, *S) that its output there means."""
        output = _like(x, output)
        if self._predicts == "residual":
            return self.mean(x, sigma, output)
        return _mean(self._predicts, x, over_samples(sigma, x).to(x.dtype), output)

    def forward(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """The posterior mean (B, *S) at x (B, *S) and sigma (B,)."""
        return self.read(x, sigma, self.backbone(*self.given(x, sigma), **condition))


class ForeignMeanField(FieldNetwork):
    """A foreign network of the posterior mean as a network net(x, z, **condition) of PFGM.

    At D = 1 noise is heavy-tailed: x may lie much farther out than z says, and where it does its
    norm shows it. A network that is told a single level is told that apparent one:

        ν² = z² + max(0, ‖x‖²/N − (2 data_std)²)

    Its input and the weight of x in the mean are EDM's at ν, the weight of its output is that of
    :class:`pfgm.networks.FieldNetwork`, for noise well above ν.
    """

    def __init__(
        self, net: ForeignModule, told: Telling, predicts: str, flow: PoissonFlow, data_std: float
    ) -> None:
        # A network that predicts anything else was trained on samples as they are.
        center = flow.center if predicts == "residual" else 0.0
        super().__init__(flow.shape, data_std=data_std, gamma=flow.gamma, center=center)
        self.net, self.told, self._predicts = net, told, predicts

    def given(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given at x (B, *S) and z (B,)."""
        x, z = self._to_unit(x, z)
        apparent = self._apparent(x, z)
        scaled = x * self._rows(self._c_in(apparent)) if self._predicts == "residual" else x
        return scaled, self.told(apparent)

    def read(self, x: Tensor, z: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), (B, *S) and (B,), that its output there means."""
        return field_from_mean(x, z, self._read_mean(x, z, output), gamma=self.gamma)

    def mean(self, x: Tensor, z: Tensor, **condition: Any) -> Tensor:  # type: ignore[override]
        """The posterior mean (B, *S) at x (B, *S) and z (B,)."""
        self._check(x, z)
        return self._read_mean(x, z, self.net(*self.given(x, z), **condition))

    def forward(  # type: ignore[override]
        self, x: Tensor, z: Tensor, **condition: Any
    ) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), of shapes (B, *S) and (B,), at x (B, *S) and z (B,)."""
        return field_from_mean(x, z, self.mean(x, z, **condition), gamma=self.gamma)

    def _read_mean(self, x: Tensor, z: Tensor, output: Tensor) -> Tensor:
        output, (x, z) = _like(x, output), self._to_unit(x, z)
        apparent = self._apparent(x, z)
        if self._predicts != "residual":
            return self._from_unit(_mean(self._predicts, x, self._rows(apparent), output))
        skip = (self._unit_std * self._c_in(apparent)).square()
        added = self._unit_std * self._rows(self._c_change(apparent)) * output
        return self._from_unit(self._rows(skip) * x + added)

    def _apparent(self, x: Tensor, z: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(x.flatten(1), dim=1) / math.sqrt(math.prod(self.shape))
        return (z.square() + self._excess(rms)).sqrt()


class ForeignField(nn.Module):
    """A foreign network of the field itself as a network net(x, z, **condition) of PFGM.

    As published (arXiv 2209.11178): one channel more than x, whose mean is field_z.
    """

    def __init__(self, net: ForeignModule, told: Telling) -> None:
        super().__init__()
        self.net, self.told = net, told

    def given(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given at x (B, *S) and z (B,)."""
        return x, self.told(z)

    def read(self, x: Tensor, z: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), (B, *S) and (B,), in its output there."""
        if x.ndim < 2 or output.shape != (len(x), x.shape[1] + 1, *x.shape[2:]):
            raise ValueError(
                f"net returned shape {tuple(output.shape)}; needed is that of x, {tuple(x.shape)}, "
                "with a channel more, that of field_z."
            )
        return output[:, :-1], output[:, -1:].flatten(1).mean(1)

    def forward(self, x: Tensor, z: Tensor, **condition: Any) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), of shapes (B, *S) and (B,), at x (B, *S) and z (B,)."""
        return self.read(x, z, self.net(*self.given(x, z), **condition))


Foreign = ForeignDenoiser | ForeignMeanField | ForeignField
"""What :func:`from_module` returns."""


def from_module(
    net: nn.Module,
    flow: Flow,
    *,
    predicts: str = "residual",
    level: str | Telling = "timestep",
    data_std: float | None = None,
    conditions: Mapping[str, str] | None = None,
    no_label: int | None = None,
) -> Foreign:
    """A network of a flow from one of any library, such as a U-Net or a DiT of diffusers.

    The network is called ``net(x, told, **condition)`` with x (B, *S) and what it is told of the
    noise level (B,). It returns a tensor, a tuple or list that begins with one, or an object whose
    ``sample`` is one: (B, *S), or with twice the channels, of which the first half counts.

    With predicts="residual" it sees x scaled to order one, and the posterior mean is
    c_skip x + c_out F: for PFGM++ and diffusion by EDM's preconditioning
    (:class:`pfgm.flows.plusplus.Preconditioned`), for PFGM by that of the networks of this library
    (:class:`pfgm.networks.FieldNetwork`), at the level that the norm of x shows where it shows more
    noise than z does. Otherwise it sees x as it is.

    Args:
        net: the network. It becomes a part of the one returned.
        flow: :class:`pfgm.PoissonFlow` or :class:`pfgm.PoissonFlowPP`.
        predicts: what its output F means. For one to be trained: "residual". For one that is
            trained already, on normal noise of level σ added to data: "mean", a denoiser;
            "noise", mean = x − σ F; "score", mean = x + σ² F. The last two are exact at D = ∞; at
            other D the noise in x is not normal, and they are what they are called on the average.
            "field", with PoissonFlow alone: a channel more than x has, field_x first and then
            field_z as its mean over the pixels, as published with PFGM.
        level: what it is told of a level σ or z. "timestep": 1000 ln(σ/σ_last)/ln(σ_first/σ_last),
            for networks that embed timesteps of 0 to 1000 as sines, as those of diffusers and most
            others do; "log": ln(σ)/4, EDM's; "sigma": the level itself; or a function of levels
            (B,).
        data_std: root mean square of the data's values, for "residual" and, with PoissonFlow, the
            apparent level. None takes sigma_data of PoissonFlowPP, and of PoissonFlow its spread
            (with "residual" x is centred) or, without one, what its M was chosen for: appendix
            B.1.1 of PFGM, arXiv 2209.11178, gives M from the norm of the data.
        conditions: the network's names for conditions, such as {"labels": "class_labels"} for those
            of diffusers; others go by their own.
        no_label: what the network takes for no label: in place of one below 0, and where the
            condition has no "labels".

    Returns:
        For PoissonFlowPP a denoiser ``(x, sigma, **condition) -> mean``, for PoissonFlow
        ``(x, z, **condition) -> (field_x, field_z)``. As it is none of ``NETWORKS``,
        :func:`pfgm.load` must be given one to load it into.

    Raises:
        TypeError: flow is of another kind.
        ValueError: predicts, level or data_std is not allowed, or conditions leads to an argument
            that net does not have; when called, a condition does, or the result has another shape.

    >>> import pfgm
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(3, 2)
    ...     def forward(self, x, time):
    ...         return self.layer(torch.cat([x, time[:, None]], 1))
    >>> data = torch.randn(64, 2)
    >>> flow = pfgm.PoissonFlowPP.from_data(data, D=128)
    >>> net = from_module(Net(), flow)
    >>> flow.loss(net, data[:16], references=data).isfinite()
    tensor(True)
    """
    if not isinstance(flow, (PoissonFlow, PoissonFlowPP)):
        raise TypeError(
            f"flow is a {type(flow).__name__}; allowed are PoissonFlow and PoissonFlowPP."
        )
    allowed = _PREDICTIONS[type(flow)]
    if predicts not in allowed:
        raise ValueError(
            f"predicts is {predicts!r}; with {type(flow).__name__} allowed are "
            f"{', '.join(allowed)}."
        )
    told = telling(level, flow) if isinstance(level, str) else level
    module = ForeignModule(net, conditions, no_label)
    if predicts == "field":
        return ForeignField(module, told)
    if data_std is None:
        data_std = flow.sigma_data if isinstance(flow, PoissonFlowPP) else _data_std(flow, predicts)
    positive("data_std", data_std)
    if isinstance(flow, PoissonFlowPP):
        return ForeignDenoiser(module, told, predicts, data_std)
    return ForeignMeanField(module, told, predicts, flow, data_std)


def _data_std(flow: PoissonFlow, predicts: str) -> float:
    """Root mean square of the data's values, less their center where the network sees them so.

    By published rules it is ‖x‖/√N of the data for which
    M = int(¾ ln(‖x‖²/(2 √N σ²))/ln(1 + τ)) + 1 was chosen.
    """
    if flow.spread is not None:
        square = 0.0 if predicts == "residual" else float(flow.center.square().mean())
        return math.sqrt(flow.spread**2 + square)
    log_ratio = (flow.M - 0.5) / 0.75 * math.log1p(flow.tau)
    if log_ratio > _LARGEST_LOG:
        raise ValueError(
            f"data_std is None, but no data have the norm that M = {flow.M} is for; give it."
        )
    return flow.sigma * math.sqrt(2 * math.exp(log_ratio) / math.sqrt(flow.N))
