"""The U-Nets of EDM, with which PFGM++ was published, with the names that their checkpoints have.

DDPM++ and NCSN++ in the form of Karras et al. (arXiv 2206.00364, table 7). Two dictionaries hold
the way down and the way up; their keys say the resolution and the place, as in ``32x32_block0``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.checks import checks_values, int_tuple, natural, positive_int
from ...flows.plusplus import Preconditioned
from ..embedding import MOST_DEEP, MOST_WIDE, plain
from .pfgm_unets import positional_features

_ROOT = math.sqrt(0.5)  # sums of two branches keep their variance
_NOTHING = 1e-5  # gain of a layer that is to start as zero
_QUERIES = math.sqrt(0.2)  # gain of the layer before attention
_FOURIER = 16.0  # standard deviation of the frequencies in c_noise


def _started(layer: Any, gain: float = 1.0) -> Any:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(channels // 4, 32)
    if channels % 4 or channels % groups:
        raise ValueError(
            f"model_channels and channel_mult make a layer of {channels} channels; allowed are "
            "multiples of 4 up to 128, and of 32 above."
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _kernel(line: Sequence[int]) -> Tensor:
    row = torch.tensor(line, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum().square())[None, None]


def _resampled(h: Tensor, kernel: Tensor, way: str, padding: int | None = None) -> Tensor:
    """(B, C, H, W), filtered with the kernel (1, 1, k, k), at half ("down") or twice ("up") H, W.

    Padding as keeps these sizes, unless given.
    """
    channels, size = h.shape[1], kernel.shape[-1]
    padding = (size - 1) // 2 if padding is None else padding
    kernel = kernel.to(h.dtype).expand(channels, 1, size, size)
    if way == "down":
        return F.conv2d(h, kernel, stride=2, padding=padding, groups=channels)
    # Three zeros come in for each pixel, so that the kernel weighs four times as much.
    return F.conv_transpose2d(h, 4 * kernel, stride=2, padding=padding, groups=channels)


class EDMConv(nn.Conv2d):
    """A convolution that keeps the size, where wished after resampling."""

    bias: nn.Parameter
    resample_filter: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        gain: float = 1.0,
        way: str | None = None,
        line: Sequence[int] = (),
    ) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.way = way
        self.register_buffer("resample_filter", None if way is None else _kernel(line))
        _started(self, gain)

    def forward(self, h: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H', W')."""
        if self.way is not None:
            h = _resampled(h, self.resample_filter, self.way)
        return super().forward(h)


class PyramidConv(EDMConv):
    """Brings the input image, or what has become of it, to the next level: filtered last."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H/2, W/2)."""
        # All padding comes first, so that the filter sees what the convolution makes of it.
        margin = 1 + (self.resample_filter.shape[-1] - 1) // 2
        wide = F.conv2d(h, self.weight, padding=margin)
        return _resampled(wide, self.resample_filter, "down", padding=0) + self.bias[:, None, None]


class EDMBlock(nn.Module):
    """Residual block, which may resample by two, with self-attention of one head after it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        dropout: float,
        line: Sequence[int],
        way: str | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm0 = _norm(inputs)
        self.conv0 = EDMConv(inputs, outputs, way=way, line=line)
        self.affine = _started(nn.Linear(embedding, outputs))
        self.norm1 = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = EDMConv(outputs, outputs, gain=_NOTHING)
        self.skip: EDMConv | None = None
        if inputs != outputs or way is not None:
            self.skip = EDMConv(inputs, outputs, 1, way=way, line=line)
        self.attention = attention
        if attention:
            self.norm2 = _norm(outputs)
            self.qkv = EDMConv(outputs, 3 * outputs, 1, gain=_QUERIES)
            self.proj = EDMConv(outputs, outputs, 1, gain=_NOTHING)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W) and (B, embedding) to (B, outputs, H', W')."""
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        h = ((x if self.skip is None else self.skip(x)) + h) * _ROOT
        return self._attended(h) if self.attention else h

    def _attended(self, h: Tensor) -> Tensor:
        # Of each three channels one is a query's, one a key's, one a value's.
        triples = self.qkv(self.norm2(h)).flatten(2).unflatten(1, (-1, 3))
        q, k, v = triples.permute(2, 0, 3, 1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        result: Tensor = (h + self.proj(mixed)) * _ROOT
        return result


class NoiseFrequencies(nn.Module):
    """sin and cos of 2π f c_noise with fixed random frequencies f."""

    freqs: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", _FOURIER * torch.randn(count // 2))

    def forward(self, noise: Tensor) -> Tensor:
        """(B,) to (B, count)."""
        angles = noise[:, None] * (2 * math.pi * self.freqs.to(noise.dtype))
        return torch.cat([angles.sin(), angles.cos()], 1)


def _at(side: int, part: str) -> str:
    return f"{side}x{side}_{part}"


class SongUNet(nn.Module):
    """F(x, c_noise, labels) of EDM: DDPM++ with the defaults, here those for CIFAR-10, or NCSN++.

    Args:
        channels: of the images.
        resolution: their height and width.
        classes: how many labels there are; 0 for none.
        augment_dim: how many numbers say what augmentation did to the images; 0 for none.
        model_channels: channels of the first convolution.
        channel_mult: channels of each level, finest first, in units of model_channels.
        channel_mult_emb: width of the embedding in the same units.
        channel_mult_noise: width of the features of the noise level in the same units.
        num_blocks: residual blocks a level on the way down; one more on the way up.
        attn_resolutions: widths of the feature maps that get attention.
        dropout: share of the values that is dropped in each block in training.
        embedding_type: of the noise level, "positional" or "fourier".
        encoder_type: "standard", or "residual": the image is carried along on the way down.
        resample_filter: one line of the kernel that images are resampled with.

    Raises:
        ValueError: an argument is out of range.

    >>> net = SongUNet(3, 16, model_channels=16, channel_mult=(1, 2), num_blocks=1)
    >>> net(torch.randn(2, 3, 16, 16), torch.tensor([-1.0, 1.0])).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        *,
        classes: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.13,
        embedding_type: str = "positional",
        encoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "residual")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{name} is {value!r}; allowed are {' and '.join(map(repr, allowed))}."
                )
        levels = int_tuple("channel_mult", channel_mult, MOST_WIDE)
        line = int_tuple("resample_filter", resample_filter)
        if len(line) % 2:
            raise ValueError(f"resample_filter is {line}; allowed is an even number of values.")
        coarsest = 2 ** (len(levels) - 1)
        if positive_int("resolution", resolution) % coarsest:
            raise ValueError(
                f"resolution is {resolution}; allowed are multiples of {coarsest}, as "
                f"{len(levels)} levels halve it."
            )
        self.config = plain(
            {
                "channels": positive_int("channels", channels),
                "resolution": resolution,
                "classes": natural("classes", classes),
                "augment_dim": natural("augment_dim", augment_dim),
                "model_channels": positive_int("model_channels", model_channels, MOST_WIDE),
                "channel_mult": levels,
                "channel_mult_emb": positive_int("channel_mult_emb", channel_mult_emb, MOST_WIDE),
                "channel_mult_noise": positive_int(
                    "channel_mult_noise", channel_mult_noise, MOST_WIDE
                ),
                "num_blocks": positive_int("num_blocks", num_blocks, MOST_DEEP),
                "attn_resolutions": tuple(
                    positive_int("attn_resolutions", width) for width in attn_resolutions
                ),
                "dropout": float(dropout),
                "embedding_type": embedding_type,
                "encoder_type": encoder_type,
                "resample_filter": line,
            }
        )
        self.classes, self.augment_dim = classes, augment_dim
        self._noise = model_channels * channel_mult_noise
        self._sides = [resolution >> level for level in range(len(levels))]
        width = model_channels * channel_mult_emb
        self.map_noise = NoiseFrequencies(self._noise) if embedding_type == "fourier" else None
        self.map_label = _started(nn.Linear(classes, self._noise)) if classes else None
        if augment_dim:
            self.map_augment = _started(nn.Linear(augment_dim, self._noise, bias=False))
        self.map_layer0 = _started(nn.Linear(self._noise, width))
        self.map_layer1 = _started(nn.Linear(width, width))
        block = functools.partial(EDMBlock, embedding=width, dropout=dropout, line=line)
        self.enc, skips = self._encoder(block)
        self.dec = self._decoder(block, skips)

    def _encoder(self, block: Any) -> tuple[nn.ModuleDict, list[int]]:
        """The way down, and the channels of what it leaves to the way up."""
        config, parts, skips = self.config, nn.ModuleDict(), []
        image, line = config["channels"], config["resample_filter"]
        above = config["model_channels"]
        for side, multiple in zip(self._sides, config["channel_mult"], strict=True):
            if side == self._sides[0]:
                parts[_at(side, "conv")] = EDMConv(image, above)
            else:
                parts[_at(side, "down")] = block(above, above, way="down")
                if config["encoder_type"] == "residual":
                    pyramid = PyramidConv(image, above, way="down", line=line)
                    parts[_at(side, "aux_residual")], image = pyramid, above
            skips.append(above)
            attention = side in config["attn_resolutions"]
            for place in range(config["num_blocks"]):
                outputs = multiple * config["model_channels"]
                parts[_at(side, f"block{place}")] = block(above, outputs, attention=attention)
                above = outputs
                skips.append(above)
        return parts, skips

    def _decoder(self, block: Any, skips: list[int]) -> nn.ModuleDict:
        config, parts, above = self.config, nn.ModuleDict(), skips[-1]
        levels = zip(self._sides, config["channel_mult"], strict=True)
        for side, multiple in reversed(list(levels)):
            if side == self._sides[-1]:
                parts[_at(side, "in0")] = block(above, above, attention=True)
                parts[_at(side, "in1")] = block(above, above)
            else:
                parts[_at(side, "up")] = block(above, above, way="up")
            for place in range(config["num_blocks"] + 1):
                outputs = multiple * config["model_channels"]
                last = place == config["num_blocks"]
                parts[_at(side, f"block{place}")] = block(
                    above + skips.pop(),
                    outputs,
                    attention=last and side in config["attn_resolutions"],
                )
                above = outputs
        parts[_at(self._sides[0], "aux_norm")] = _norm(above)
        parts[_at(self._sides[0], "aux_conv")] = EDMConv(above, config["channels"], gain=_NOTHING)
        return parts

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) at c_noise (B,), of labels (B,) and augment (B, augment_dim), to the same.

        Labels below 0, or None, are no label; augment None is for images as they are.
        """
        embedding = self._embedded(noise, labels, augment)
        return self._up(self._down(x, embedding), embedding)

    def _embedded(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        if self.map_noise is not None:
            features = self.map_noise(noise)
        else:
            features = positional_features(noise, self._noise)
        if self.map_label is not None:
            one_hot = self._one_hot(labels, noise)
            features = features + self.map_label(one_hot * math.sqrt(self.classes))
        elif labels is not None:
            raise ValueError("labels given to a network without classes; build it with classes=….")
        if augment is not None:
            if augment.shape != (len(noise), self.augment_dim) or not self.augment_dim:
                raise ValueError(
                    f"augment has shape {tuple(augment.shape)}; allowed is ({len(noise)}, "
                    f"{self.augment_dim}), and none where augment_dim is 0."
                )
            features = features + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(features))))

    def _one_hot(self, labels: Tensor | None, noise: Tensor) -> Tensor:
        """(B, classes): what is below 0, or not there, is a row of zeros."""
        if labels is None:
            return noise.new_zeros(len(noise), self.classes)
        if labels.shape != noise.shape or labels.is_floating_point():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; allowed are "
                f"integers of shape ({len(noise)},)."
            )
        if checks_values(labels.device) and bool((labels >= self.classes).any()):
            raise ValueError(
                f"labels holds {int(labels.max())}; allowed is below {self.classes}, and below 0 "
                "for none."
            )
        numbers = torch.arange(self.classes, device=labels.device)
        return (labels[:, None] == numbers).to(noise.dtype)

    def _down(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """The skips of the way down; the last is where it ends."""
        h = image = x
        skips = []
        for side in self._sides:
            if side == self._sides[0]:
                h = self.enc[_at(side, "conv")](h)
            else:
                h = self.enc[_at(side, "down")](h, embedding)
                if self.config["encoder_type"] == "residual":
                    h = image = (h + self.enc[_at(side, "aux_residual")](image)) * _ROOT
            skips.append(h)
            for place in range(self.config["num_blocks"]):
                h = self.enc[_at(side, f"block{place}")](h, embedding)
                skips.append(h)
        return skips

    def _up(self, skips: list[Tensor], embedding: Tensor) -> Tensor:
        h = skips[-1]
        for side in reversed(self._sides):
            for part in ("in0", "in1") if side == self._sides[-1] else ("up",):
                h = self.dec[_at(side, part)](h, embedding)
            for place in range(self.config["num_blocks"] + 1):
                h = self.dec[_at(side, f"block{place}")](torch.cat([h, skips.pop()], 1), embedding)
        norm, last = (self.dec[_at(self._sides[0], part)] for part in ("aux_norm", "aux_conv"))
        result: Tensor = last(F.silu(norm(h)))
        return result


class EDMDenoiser(nn.Module):
    """A denoiser net(x, sigma, labels=None) of :class:`pfgm.PoissonFlowPP` as published, any D.

    :class:`pfgm.networks.SongUNet`, called ``model``, behind EDM's preconditioning
    (:class:`pfgm.flows.plusplus.Preconditioned`). The published networks of PFGM++ are given
    σ = r/√D, as all denoisers here, and not D: sample with the flow of the D that they were
    trained with.

    Args:
        channels: of the images.
        resolution: their height and width.
        sigma_data: standard deviation of the data's values, that of the flow.
        **settings: those of :class:`pfgm.networks.SongUNet`, by default DDPM++ for CIFAR-10.

    Attributes:
        D: what it was trained with, as the published file says that it came from; else None.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting that it has not.

    >>> net = EDMDenoiser(3, 16, model_channels=16, channel_mult=(1, 2), num_blocks=1, classes=10)
    >>> x, labels = torch.randn(2, 3, 16, 16), torch.tensor([7, -1])  # -1: of no class
    >>> net(x, torch.tensor([0.1, 80.0]), labels).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self, channels: int, resolution: int, *, sigma_data: float = 0.5, **settings: Any
    ) -> None:
        super().__init__()
        self.model = SongUNet(channels, resolution, **settings)
        self.preconditioning = Preconditioned(nn.Identity(), sigma_data)  # its scalings alone
        self.sigma_data = self.preconditioning.sigma_data
        self.shape = (channels, resolution, resolution)
        self.classes = self.model.classes
        self.config = {**self.model.config, "sigma_data": self.sigma_data}
        self.D: float | None = None

    @classmethod
    def ncsnpp(cls, channels: int, resolution: int, **settings: Any) -> EDMDenoiser:
        """NCSN++: Fourier features, smooth resampling, the image carried along on the way down.

        >>> net = EDMDenoiser.ncsnpp(3, 16, model_channels=16, channel_mult=(1, 2), num_blocks=1)
        >>> net.config["encoder_type"], net.config["resample_filter"]
        ('residual', [1, 3, 3, 1])
        """
        published = {
            "embedding_type": "fourier",
            "channel_mult_noise": 2,
            "encoder_type": "residual",
            "resample_filter": (1, 3, 3, 1),
        }
        return cls(channels, resolution, **{**published, **settings})

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """The posterior mean (B, C, H, W) at x and sigma (B,), of labels (B,), below 0 for none.

        Where training augments the images, augment (B, augment_dim) says how.
        """
        if x.shape[1:] != self.shape or sigma.shape != x.shape[:1]:
            raise ValueError(
                f"x and sigma have shapes {tuple(x.shape)} and {tuple(sigma.shape)}; allowed are "
                f"(B, {', '.join(map(str, self.shape))}) and (B,)."
            )
        scaled, noise = self.preconditioning.scaled(x, sigma), sigma.to(x.dtype).log() / 4
        predicted = self.model(scaled, noise, labels=labels, augment=augment)
        return self.preconditioning.mean(x, sigma, predicted)
