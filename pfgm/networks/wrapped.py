"""Networks of other libraries as networks of the flows: their inputs and their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.tensors import over_samples, per_row
from .fields import Center, FieldNetwork, MeanParts, root_mean_square
from .level_encodings import LevelFunction
from .preconditioned import Preconditioned

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Meaning(NamedTuple):
    """What the level and the output of a wrapped network mean: settings of a module."""

    encode: LevelFunction
    predicts: str
    data_std: float | None
    variance_preserving: bool


class WrappedModule(nn.Module):
    """Calls the wrapped network with its own names of the conditions; returns one tensor."""

    def __init__(
        self, net: nn.Module, names: Mapping[str, str] | None, no_label: int | None
    ) -> None:
        super().__init__()
        self.net = net
        self._names = dict(names or {})
        self._no_label = no_label
        parameters = list(inspect.signature(net.forward).parameters.values())
        self._accepted = [p.name for p in parameters[2:] if p.kind not in _VARIADIC]
        self._accepts_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
        for own_name in self._names.values():
            self._check_name(own_name, "conditions")

    def forward(self, x: Tensor, level: Tensor, **condition: Any) -> Tensor:
        """The output of the network at x (B, *S) and an encoded level (B,)."""
        if self._no_label is not None:
            labels = condition.get("labels")
            none = torch.full(x.shape[:1], self._no_label, device=x.device)
            condition["labels"] = none if labels is None else torch.where(labels < 0, none, labels)
        named = {self._names.get(name, name): value for name, value in condition.items()}
        for name in named:
            self._check_name(name, "condition")
        return _first_tensor(self.net(x, level, **named))

    def _check_name(self, name: str, argument: str) -> None:
        if name not in self._accepted and not self._accepts_any:
            raise ValueError(
                f"{argument} has {name!r}, which {type(self.net).__name__} does not take; its "
                f"conditions are {', '.join(self._accepted) or 'none'}."
            )


def _first_tensor(result: Any) -> Tensor:
    """The tensor in the result of a network."""
    if isinstance(result, (tuple, list)) and result:
        tensor = result[0]
    else:
        tensor = result if isinstance(result, Tensor) else getattr(result, "sample", None)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            "net must return a tensor, a tuple or list that begins with one, or an object whose "
            f"sample is one, got {type(result).__name__}."
        )
    return tensor


def _prediction(x: Tensor, output: Tensor) -> Tensor:
    """The part of an output that has the shape of x.

    Networks that learn a variance, as in improved DDPM (arXiv 2102.09672) and DiT, return twice the
    channels: the first half is the prediction, the second half the variance.
    """
    if output.shape == x.shape:
        return output
    if x.ndim > 1 and output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        return output[:, : x.shape[1]]
    raise ValueError(
        f"net must return the shape of x, {tuple(x.shape)}, or twice its channels, of which the "
        f"first half is used, got {tuple(output.shape)}."
    )


def _coefficients(predicts: str, sigma: Tensor) -> tuple[float, float, Tensor | float]:
    """Factors with which mean = kept x + factor F and x − mean = dropped x − factor F."""
    if predicts == "mean":
        return 0.0, 1.0, 1.0
    return 1.0, 0.0, -sigma if predicts == "noise" else sigma.square()


class WrappedDenoiser(Preconditioned):
    """A wrapped network as a denoiser net(x, sigma, **condition) of PFGM++."""

    def __init__(
        self,
        backbone: WrappedModule,
        encode: LevelFunction,
        predicts: str,
        sigma_data: float,
        variance_preserving: bool,
    ) -> None:
        super().__init__(backbone, sigma_data)
        # The name "told" is in checkpoints if the function is a module with parameters.
        self.told, self._predicts = encode, predicts
        self._variance_preserving = variance_preserving

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the wrapped network at x (B, *S) and sigma (B,)."""
        scaled = x
        if self._predicts == "residual":
            scaled = self.scaled(x, sigma)
        elif self._variance_preserving:
            scaled = x * (over_samples(sigma, x).to(x.dtype).square() + 1).rsqrt()
        return scaled, self.told(sigma.to(x.dtype))

    def interpret(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """The posterior mean (B, *S) that the output of the wrapped network implies."""
        return self.mean(x, sigma, _prediction(x, output))

    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """The factors of x in mean and in x − mean, and that of the output in the mean."""
        if self._predicts == "residual":
            return super().coefficients(sigma)
        return _coefficients(self._predicts, sigma)

    def forward(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """The posterior mean (B, *S) at x (B, *S) and sigma (B,)."""
        sigma = per_row(sigma, x, "sigma")
        return self.interpret(x, sigma, self.backbone(*self.inputs(x, sigma), **condition))


class WrappedMeanField(FieldNetwork):
    """A wrapped network of the posterior mean as a network net(x, z, **condition) of PFGM.

    At D = 1 the noise is heavy-tailed: x may hold much more noise than z suggests, as its norm then
    shows. The network takes a single level, so its input is the apparent level

        ν² = z² + max(0, ‖x‖²/N − (2 data_std)²)

    The scaling of x and the weight of x in the mean are those of EDM at ν. The weight of the
    network's output is that of :class:`pfgm.networks.FieldNetwork`, which allows for noise well
    above ν.
    """

    def __init__(
        self,
        net: WrappedModule,
        encode: LevelFunction,
        predicts: str,
        shape: tuple[int, ...],
        *,
        data_std: float,
        gamma: float,
        center: Center,
    ) -> None:
        super().__init__(shape, data_std=data_std, gamma=gamma, center=center)
        self.net, self.told, self._predicts = net, encode, predicts

    def inputs(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the wrapped network at x (B, *S) and z (B,)."""
        x, z = self._to_unit(x, z)
        apparent = self._apparent_level(x, z)
        scaled = x * over_samples(self._c_in(apparent), x) if self._predicts == "residual" else x
        return scaled, self.told(apparent)

    def interpret(self, x: Tensor, z: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), (B, *S) and (B,), that the network's output implies."""
        return self._field(self._parts_of(x, z, output), x, z)

    def mean(self, x: Tensor, z: Tensor, **condition: Any) -> Tensor:  # type: ignore[override]
        """The posterior mean (B, *S) at x (B, *S) and z (B,)."""
        z = self._checked_level(x, z)
        output = self.net(*self.inputs(x, z), **condition)
        return self._from_unit(self._parts_of(x, z, output).mean())

    def forward(  # type: ignore[override]
        self, x: Tensor, z: Tensor, **condition: Any
    ) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), of shapes (B, *S) and (B,), at x (B, *S) and z (B,)."""
        z = self._checked_level(x, z)
        return self.interpret(x, z, self.net(*self.inputs(x, z), **condition))

    def _parts_of(self, x: Tensor, z: Tensor, output: Tensor) -> MeanParts:
        output, (x, z) = _prediction(x, output), self._to_unit(x, z)
        apparent = self._apparent_level(x, z)
        if self._predicts != "residual":
            kept, dropped, factor = _coefficients(self._predicts, over_samples(apparent, x))
            return MeanParts(x, kept, dropped, factor * output)
        skip, rest = (over_samples(s, x) for s in self._skip_and_rest(root_mean_square(x), z))
        factor = self._unit_std * over_samples(self._c_change(apparent), x)
        return MeanParts(x, skip, rest, factor * output)

    def _apparent_level(self, x: Tensor, z: Tensor) -> Tensor:
        return (z.square() + self._excess_noise(root_mean_square(x))).sqrt()


class WrappedField(nn.Module):
    """A wrapped network of the field itself as a network net(x, z, **condition) of PFGM.

    Its output has one channel more than x. The mean of this channel is field_z (arXiv 2209.11178).
    """

    def __init__(self, net: WrappedModule, encode: LevelFunction) -> None:
        super().__init__()
        self.net, self.told = net, encode

    def inputs(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the wrapped network at x (B, *S) and z (B,)."""
        return x, self.told(z)

    def interpret(self, x: Tensor, z: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), (B, *S) and (B,), in the network's output."""
        if x.ndim < 2 or output.shape != (x.shape[0], x.shape[1] + 1, *x.shape[2:]):
            raise ValueError(
                f"net must return the shape of x, {tuple(x.shape)}, with one channel more for "
                f"field_z, got {tuple(output.shape)}."
            )
        return output[:, :-1], output[:, -1:].flatten(1).mean(1)

    def forward(self, x: Tensor, z: Tensor, **condition: Any) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), of shapes (B, *S) and (B,), at x (B, *S) and z (B,)."""
        z = per_row(z, x, "z")
        return self.interpret(x, z, self.net(*self.inputs(x, z), **condition))


Wrapped = WrappedDenoiser | WrappedMeanField | WrappedField
"""What :meth:`pfgm.Flow.network` makes of a module."""
