"""The networks of EDM and PFGM++, DDPM++ and NCSN++, with the parameter names of their checkpoints.

They have the form of Karras et al. (arXiv 2206.00364, table 7). Two dictionaries hold the encoder
and the decoder; a key is the resolution and the part, such as ``32x32_block0``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.checks import check_choice, check_sample_shape
from ...common.numbers import int_tuple, whole
from ...common.tensors import per_row
from ..config import MAX_DEPTH, MAX_WIDTH, as_json
from ..edm_interface import EDMInterface, label_numbers
from ..embedding import checked_labels
from ..preconditioned import Preconditioned
from .layers import FOURIER_STD, HALF_SUM, add_attention, checked_resolution, positional_features

_ZERO_GAIN = 1e-5  # initial gain of layers whose output starts at almost zero
_ATTENTION_GAIN = math.sqrt(0.2)  # initial gain of the layer of queries, keys and values


def _initialised(layer: Any, gain: float = 1.0) -> Any:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(channels // 4, 32)
    if channels % 4 or channels % groups:
        raise ValueError(
            f"layers must have a multiple of 4 channels up to 128 and of 32 above, got {channels} "
            "from model_channels and channel_mult."
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _kernel(taps: Sequence[int]) -> Tensor:
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum().square())[None, None]


def _resampled(h: Tensor, kernel: Tensor, direction: str, padding: int | None = None) -> Tensor:
    """(B, C, H, W) filtered with a kernel (1, 1, k, k) and resampled by two, "down" or "up".

    By default the padding is such that H and W become exactly H/2 and W/2, or 2H and 2W.
    """
    channels, size = h.shape[1], kernel.shape[-1]
    # A pair, because torch.jit.trace of torch 2.6 takes no size of a tensor for both.
    padded = ((size - 1) // 2,) * 2 if padding is None else (padding, padding)
    kernel = kernel.to(h.dtype).expand(channels, 1, size, size)
    if direction == "down":
        return F.conv2d(h, kernel, stride=2, padding=padded, groups=channels)
    # Upsampling adds three zeros to each pixel; the factor 4 makes up for them.
    return F.conv_transpose2d(h, 4 * kernel, stride=2, padding=padded, groups=channels)


class EDMConv(nn.Conv2d):
    """A convolution that keeps the size; it may resample first."""

    bias: nn.Parameter
    resample_filter: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        gain: float = 1.0,
        direction: str | None = None,
        taps: Sequence[int] = (),
    ) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.direction = direction
        self.register_buffer("resample_filter", None if direction is None else _kernel(taps))
        _initialised(self, gain)

    def forward(self, h: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H', W')."""
        if self.direction is not None:
            h = _resampled(h, self.resample_filter, self.direction)
        return super().forward(h)


class PyramidConv(EDMConv):
    """Downsamples the input image or the previous step's result: convolves, then filters."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H/2, W/2)."""
        # The convolution also pads for the filter, which then needs no padding.
        margin = 1 + (self.resample_filter.shape[-1] - 1) // 2
        wide = F.conv2d(h, self.weight, padding=(margin, margin))
        return _resampled(wide, self.resample_filter, "down", padding=0) + self.bias[:, None, None]


class EDMBlock(nn.Module):
    """Residual block; it may resample by two and end in self-attention with one head."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        dropout: float,
        taps: Sequence[int],
        direction: str | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm0 = _norm(inputs)
        self.conv0 = EDMConv(inputs, outputs, direction=direction, taps=taps)
        self.affine = _initialised(nn.Linear(embedding, outputs))
        self.norm1 = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = EDMConv(outputs, outputs, gain=_ZERO_GAIN)
        self.skip: EDMConv | None = None
        if inputs != outputs or direction is not None:
            self.skip = EDMConv(inputs, outputs, 1, direction=direction, taps=taps)
        self.attention = attention
        if attention:
            self.norm2 = _norm(outputs)
            self.qkv = EDMConv(outputs, 3 * outputs, 1, gain=_ATTENTION_GAIN)
            self.proj = EDMConv(outputs, outputs, 1, gain=_ZERO_GAIN)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W) and (B, embedding) to (B, outputs, H', W')."""
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        h = ((x if self.skip is None else self.skip(x)) + h) * HALF_SUM
        return self._attend(h) if self.attention else h

    def _attend(self, h: Tensor) -> Tensor:
        # Queries, keys and values take every third channel each.
        triples = self.qkv(self.norm2(h)).flatten(2).unflatten(1, (-1, 3))
        q, k, v = triples.permute(2, 0, 3, 1)
        return add_attention(h, q, k, v, self.proj)


class NoiseFrequencies(nn.Module):
    """sin and cos of 2π f c_noise, with fixed random frequencies f."""

    freqs: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", FOURIER_STD * torch.randn(count // 2))

    def forward(self, noise: Tensor) -> Tensor:
        """(B,) to (B, count)."""
        angles = noise[:, None] * (2 * math.pi * self.freqs.to(noise.dtype))
        return torch.cat([angles.sin(), angles.cos()], 1)


def _key(side: int, part: str) -> str:
    return f"{side}x{side}_{part}"


class SongUNet(nn.Module):
    """F(x, c_noise, labels) of EDM: DDPM++ for CIFAR-10 with the defaults, or NCSN++.

    Args:
        channels, resolution: channels of the images, and their height and width.
        classes: number of labels; 0 for none.
        augment_dim: how many numbers describe the augmentation of an image; 0 for none.
        model_channels: channels of the first convolution.
        channel_mult: channels of each level, finest first, in units of model_channels.
        channel_mult_emb: width of the embedding in the same units.
        channel_mult_noise: number of features of the noise level in the same units.
        num_blocks: residual blocks of each level of the encoder; the decoder has one more.
        attn_resolutions: widths of the feature maps with attention.
        dropout: dropout probability in each residual block.
        embedding_type: of the noise level, "positional" or "fourier".
        encoder_type: "residual" adds the downsampled image at each level of the encoder;
            "standard" does not.
        resample_filter: one row of the separable kernel for resampling.

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
        check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", encoder_type, ("standard", "residual"))
        levels = int_tuple("channel_mult", channel_mult, MAX_WIDTH)
        taps = int_tuple("resample_filter", resample_filter)
        if len(taps) % 2:
            raise ValueError(f"resample_filter must have an even number of values, got {taps}.")
        resolution = checked_resolution(resolution, len(levels))
        self.config = as_json(
            {
                "channels": whole("channels", channels),
                "resolution": resolution,
                "classes": whole("classes", classes, 0),
                "augment_dim": whole("augment_dim", augment_dim, 0),
                "model_channels": whole("model_channels", model_channels, 1, MAX_WIDTH),
                "channel_mult": levels,
                "channel_mult_emb": whole("channel_mult_emb", channel_mult_emb, 1, MAX_WIDTH),
                "channel_mult_noise": whole("channel_mult_noise", channel_mult_noise, 1, MAX_WIDTH),
                "num_blocks": whole("num_blocks", num_blocks, 1, MAX_DEPTH),
                "attn_resolutions": tuple(
                    whole("attn_resolutions", width) for width in attn_resolutions
                ),
                "dropout": float(dropout),
                "embedding_type": embedding_type,
                "encoder_type": encoder_type,
                "resample_filter": taps,
            }
        )
        self.classes, self.augment_dim = classes, augment_dim
        self._noise = model_channels * channel_mult_noise
        self._sides = [resolution >> level for level in range(len(levels))]
        width = model_channels * channel_mult_emb
        self.map_noise = NoiseFrequencies(self._noise) if embedding_type == "fourier" else None
        self.map_label = _initialised(nn.Linear(classes, self._noise)) if classes else None
        if augment_dim:
            self.map_augment = _initialised(nn.Linear(augment_dim, self._noise, bias=False))
        self.map_layer0 = _initialised(nn.Linear(self._noise, width))
        self.map_layer1 = _initialised(nn.Linear(width, width))
        block = functools.partial(EDMBlock, embedding=width, dropout=dropout, taps=taps)
        self.enc, skips = self._encoder(block)
        self.dec = self._decoder(block, skips)

    def _encoder(self, block: Any) -> tuple[nn.ModuleDict, list[int]]:
        """The modules of the encoder, and the channels of its skip connections."""
        config, parts, skips = self.config, nn.ModuleDict(), []
        image, taps = config["channels"], config["resample_filter"]
        inputs = config["model_channels"]
        for side, multiple in zip(self._sides, config["channel_mult"], strict=True):
            if side == self._sides[0]:
                parts[_key(side, "conv")] = EDMConv(image, inputs)
            else:
                parts[_key(side, "down")] = block(inputs, inputs, direction="down")
                if config["encoder_type"] == "residual":
                    pyramid = PyramidConv(image, inputs, direction="down", taps=taps)
                    parts[_key(side, "aux_residual")], image = pyramid, inputs
            skips.append(inputs)
            attention = side in config["attn_resolutions"]
            for index in range(config["num_blocks"]):
                outputs = multiple * config["model_channels"]
                parts[_key(side, f"block{index}")] = block(inputs, outputs, attention=attention)
                inputs = outputs
                skips.append(inputs)
        return parts, skips

    def _decoder(self, block: Any, skips: list[int]) -> nn.ModuleDict:
        """The modules of the decoder, for skip connections of these channels."""
        config, parts, inputs = self.config, nn.ModuleDict(), skips[-1]
        levels = zip(self._sides, config["channel_mult"], strict=True)
        for side, multiple in reversed(list(levels)):
            if side == self._sides[-1]:
                parts[_key(side, "in0")] = block(inputs, inputs, attention=True)
                parts[_key(side, "in1")] = block(inputs, inputs)
            else:
                parts[_key(side, "up")] = block(inputs, inputs, direction="up")
            for index in range(config["num_blocks"] + 1):
                outputs = multiple * config["model_channels"]
                last = index == config["num_blocks"]
                parts[_key(side, f"block{index}")] = block(
                    inputs + skips.pop(),
                    outputs,
                    attention=last and side in config["attn_resolutions"],
                )
                inputs = outputs
        parts[_key(self._sides[0], "aux_norm")] = _norm(inputs)
        parts[_key(self._sides[0], "aux_conv")] = EDMConv(
            inputs, config["channels"], gain=_ZERO_GAIN
        )
        return parts

    def forward(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """F (B, C, H, W) at x (B, C, H, W) and c_noise (B,).

        A label below 0, or labels None, is no label. The rows of augment (B, augment_dim) describe
        augmented images; None is for images without augmentation.
        """
        embedding = self._embedding(noise, labels, augment)
        return self._up(self._down(x, embedding), embedding)

    def _embedding(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        if self.map_noise is not None:
            features = self.map_noise(noise)
        else:
            features = positional_features(noise, self._noise)
        if labels is not None:
            labels = checked_labels(labels, noise.shape[0], self.classes)
        if self.map_label is not None:
            one_hot = self._one_hot(labels, noise)
            features = features + self.map_label(one_hot * math.sqrt(self.classes))
        if augment is not None:
            if augment.shape != (noise.shape[0], self.augment_dim) or not self.augment_dim:
                raise ValueError(
                    f"augment must have shape ({noise.shape[0]}, {self.augment_dim}), or be None "
                    f"if augment_dim is 0, got {tuple(augment.shape)}."
                )
            features = features + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(features))))

    def _one_hot(self, labels: Tensor | None, noise: Tensor) -> Tensor:
        """(B, classes), with a row of zeros for no label, and of NaN for one that is too large."""
        if labels is None:
            return noise.new_zeros(noise.shape[0], self.classes)
        numbers = torch.arange(self.classes, device=labels.device)
        one_hot = (labels[:, None] == numbers).to(noise.dtype)
        return torch.where((labels >= self.classes)[:, None], math.nan, one_hot)

    def _down(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """The skip connections of the encoder; the last one is its output."""
        h = image = x
        skips = []
        for side in self._sides:
            if side == self._sides[0]:
                h = self.enc[_key(side, "conv")](h)
            else:
                h = self.enc[_key(side, "down")](h, embedding)
                if self.config["encoder_type"] == "residual":
                    h = image = (h + self.enc[_key(side, "aux_residual")](image)) * HALF_SUM
            skips.append(h)
            for index in range(self.config["num_blocks"]):
                h = self.enc[_key(side, f"block{index}")](h, embedding)
                skips.append(h)
        return skips

    def _up(self, skips: list[Tensor], embedding: Tensor) -> Tensor:
        h = skips[-1]
        for side in reversed(self._sides):
            for part in ("in0", "in1") if side == self._sides[-1] else ("up",):
                h = self.dec[_key(side, part)](h, embedding)
            for index in range(self.config["num_blocks"] + 1):
                h = self.dec[_key(side, f"block{index}")](torch.cat([h, skips.pop()], 1), embedding)
        norm, last = (self.dec[_key(self._sides[0], part)] for part in ("aux_norm", "aux_conv"))
        result: Tensor = last(F.silu(norm(h)))
        return result


class EDMDenoiser(EDMInterface, nn.Module):
    """A denoiser net(x, sigma, labels=None) as published with EDM and PFGM++, for any D.

    It puts EDM's preconditioning (:class:`pfgm.networks.Preconditioned`) around a
    :class:`pfgm.networks.SongUNet`, its attribute ``model``. Its input is σ = r/√D, without D,
    so sample with a flow of the D that it was trained with. The samplers of EDM take it as it is
    (:class:`pfgm.networks.edm_interface.EDMInterface`).

    Args:
        channels, resolution: channels of the images, and their height and width.
        sigma_data: standard deviation of the data's values, as in the flow.
        **settings: of :class:`pfgm.networks.SongUNet`; the defaults are DDPM++ for CIFAR-10.

    Attributes:
        D: the D that it was trained with, where it was read from a published file that says so;
            else None.

    Raises:
        ValueError: a setting is out of range.
        TypeError: there is no such setting.

    >>> net = EDMDenoiser(3, 16, model_channels=16, channel_mult=(1, 2), num_blocks=1, classes=10)
    >>> x, labels = torch.randn(2, 3, 16, 16), torch.tensor([7, -1])  # -1: no label
    >>> net(x, torch.tensor([0.1, 80.0]), labels).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self, channels: int, resolution: int, *, sigma_data: float = 0.5, **settings: Any
    ) -> None:
        super().__init__()
        self.model = SongUNet(channels, resolution, **settings)
        self.preconditioning = Preconditioned(nn.Identity(), sigma_data)  # only its scalings
        self.sigma_data = self.preconditioning.sigma_data
        self.shape = (channels, resolution, resolution)
        self.classes = self.model.classes
        self.config = {**self.model.config, "sigma_data": self.sigma_data}
        self.D: float | None = None

    @classmethod
    def ncsnpp(cls, channels: int, resolution: int, **settings: Any) -> EDMDenoiser:
        """NCSN++: Fourier features, smooth resampling, residual encoder.

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
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """The posterior mean (B, C, H, W) at x and sigma (B,), given labels (B,), below 0 for none.

        As in EDM, sigma may also be a number or (B, 1, 1, 1), and labels one-hot rows (B, classes).
        x may have another dtype than the network; the mean has that of x. augment (B, augment_dim)
        describes the augmentation of training images.
        """
        check_sample_shape(x, self.shape)
        sigma, labels = per_row(sigma, x, "sigma"), label_numbers(labels, self.classes)
        dtype = self.model.map_layer0.weight.dtype  # samplers of EDM have x in float64
        scaled, noise = self.preconditioning.scaled(x, sigma), sigma.log() / 4
        predicted = self.model(scaled.to(dtype), noise.to(dtype), labels=labels, augment=augment)
        return self.preconditioning.mean(x, sigma, predicted.to(x.dtype))
