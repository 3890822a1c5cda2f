"""The networks published with PFGM, DDPM++ and NCSN++, with the parameter names of its checkpoints.

They are the U-Nets of score-based models (arXiv 2011.13456, appendix H) with one more output
channel, whose mean over the pixels is field_z (PFGM, arXiv 2209.11178, appendix B.1). One list
holds all modules in the order in which the forward pass uses them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.checks import check_choice, check_sample_shape
from ...common.numbers import int_tuple, whole
from ...common.tensors import is_wider, per_row
from ..config import MAX_DEPTH, MAX_WIDTH, as_json
from .layers import FOURIER_STD, HALF_SUM, add_attention, checked_resolution, positional_features

_ZERO_SCALE = 1e-10  # initial scale of layers whose output starts at almost zero


def _initialised(layer: Any, scale: float = 1.0) -> Any:
    """The layer with uniform weights of variance scale/fan_avg, and zero biases."""
    weight, bias = (layer.W, layer.b) if isinstance(layer, NIN) else (layer.weight, layer.bias)
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    bound = math.sqrt(6 * scale / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
    nn.init.zeros_(bias)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def _conv(inputs: int, outputs: int, size: int = 3, scale: float = 1.0) -> Any:
    return _initialised(nn.Conv2d(inputs, outputs, size, padding=size // 2), scale)


class NIN(nn.Module):
    """Network in network: the same linear map of the channels at each pixel."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(channels, channels))
        self.b = nn.Parameter(torch.empty(channels))
        _initialised(self, scale)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return F.conv2d(h, self.W.T[:, :, None, None], self.b)


class PublishedAttention(nn.Module):
    """Residual self-attention over the pixels, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = _norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2 = (NIN(channels, 0.1) for _ in range(3))
        self.NIN_3 = NIN(channels, _ZERO_SCALE)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        normed = self.GroupNorm_0(h)
        q, k, v = (
            layer(normed).flatten(2).transpose(1, 2)
            for layer in (self.NIN_0, self.NIN_1, self.NIN_2)
        )
        return add_attention(h, q, k, v, self.NIN_3)


class Resampling(nn.Module):
    """Resampling by two: repeats and averages pixels, or filters them with (1, 3, 3, 1)."""

    kernel: Tensor

    def __init__(self, smooth: bool) -> None:
        super().__init__()
        self.smooth = smooth
        line = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(line, line)
        self.register_buffer("kernel", kernel / kernel.sum(), persistent=False)

    def _filtered(self, h: Tensor, gain: float, stride: int) -> Tensor:
        # A replica of nn.DataParallel shares the module, and so the kernel, of the first GPU.
        kernel = (gain * self.kernel).to(h).expand(h.shape[1], 1, 4, 4)
        return F.conv2d(h, kernel, stride=stride, groups=h.shape[1])

    def down(self, h: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        if not self.smooth:
            return F.avg_pool2d(h, 2)
        return self._filtered(F.pad(h, (1, 1, 1, 1)), 1.0, 2)

    def up(self, h: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        if not self.smooth:
            return F.interpolate(h, scale_factor=2.0, mode="nearest")
        b, c, height, width = h.shape
        spread = h.new_zeros(b, c, height, 2, width, 2)
        spread[:, :, :, 0, :, 0] = h
        spread = spread.view(b, c, 2 * height, 2 * width)
        return self._filtered(F.pad(spread, (2, 1, 2, 1)), 4.0, 1)

    def before_stride(self, h: Tensor) -> Tensor:
        """Filters (B, C, H, W) to (B, C, H + 1, W + 1), for a 3×3 convolution of stride 2."""
        return self._filtered(F.pad(h, (2, 2, 2, 2)), 1.0, 1)


class PublishedBlock(nn.Module):
    """Residual block as in BigGAN; it may resample by two."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        resampling: Resampling,
        direction: str | None = None,
    ) -> None:
        super().__init__()
        # In a list, resampling is not registered as a child and adds no names to checkpoints.
        self.direction, self._resampling = direction, [resampling]
        self.GroupNorm_0 = _norm(inputs)
        self.Conv_0 = _conv(inputs, outputs)
        self.Dense_0 = _initialised(nn.Linear(embedding, outputs))
        self.GroupNorm_1 = _norm(outputs)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = _conv(outputs, outputs, scale=_ZERO_SCALE)
        if inputs != outputs or direction is not None:
            self.Conv_2 = _conv(inputs, outputs, size=1)
        else:
            self.Conv_2 = None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W) and (B, embedding) to (B, outputs, H', W')."""
        h = F.silu(self.GroupNorm_0(x))
        if self.direction is not None:
            resample = getattr(self._resampling[0], self.direction)
            h, x = resample(h), resample(x)
        h = self.Conv_0(h) + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(F.silu(self.GroupNorm_1(h))))
        if self.Conv_2 is not None:
            x = self.Conv_2(x)
        result: Tensor = (x + h) * HALF_SUM
        return result


class PyramidStep(nn.Module):
    """Downsamples the input image, or the previous step's result, to the next level."""

    def __init__(self, inputs: int, outputs: int, resampling: Resampling) -> None:
        super().__init__()
        self._resampling = [resampling]
        self.Conv2d_0 = _initialised(nn.Conv2d(inputs, outputs, 3, stride=2))

    def forward(self, image: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H/2, W/2)."""
        filtered = self._resampling[0].before_stride(image)
        result: Tensor = self.Conv2d_0(filtered)
        return result


class FourierFeatures(nn.Module):
    """sin and cos of 2π W log z, with fixed random frequencies W."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.W = nn.Parameter(FOURIER_STD * torch.randn(count), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """(B,) to (B, 2 count)."""
        angles = 2 * math.pi * z.log()[:, None] * self.W
        return torch.cat([angles.sin(), angles.cos()], 1)


class Published(nn.Module):
    """Base of DDPM++ and NCSN++, which differ in their settings.

    Args:
        channels, resolution: channels of the images, and their height and width.
        nf: channels of the finest level.
        ch_mult: channels of each level, finest first, in units of nf.
        num_res_blocks: residual blocks of each level of the encoder; the decoder has one more.
        attn_resolutions: widths of the feature maps with attention.
        dropout: dropout probability in each residual block.
        embedding: of z, "positional" or "fourier".
        fir: whether to resample with the kernel (1, 3, 3, 1).
        progressive_input: "residual" adds the downsampled image at each level of the encoder;
            "none" does not.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        *,
        nf: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding: str = "positional",
        fir: bool = False,
        progressive_input: str = "none",
    ) -> None:
        super().__init__()
        channels = whole("channels", channels)
        levels = int_tuple("ch_mult", ch_mult, MAX_WIDTH)
        attention = tuple(whole("attn_resolutions", width) for width in attn_resolutions)
        check_choice("embedding", embedding, ("positional", "fourier"))
        check_choice("progressive_input", progressive_input, ("none", "residual"))
        if whole("nf", nf, 1, MAX_WIDTH) % 4:
            raise ValueError(f"nf must be a multiple of 4, got {nf}.")
        resolution = checked_resolution(resolution, len(levels))
        self.shape = (channels, resolution, resolution)
        self.config = as_json(
            {
                "channels": channels,
                "resolution": resolution,
                "nf": nf,
                "ch_mult": levels,
                "num_res_blocks": whole("num_res_blocks", num_res_blocks, 1, MAX_DEPTH),
                "attn_resolutions": attention,
                "dropout": float(dropout),
                "embedding": embedding,
                "fir": bool(fir),
                "progressive_input": progressive_input,
            }
        )
        self._nf, self._levels, self._blocks = nf, levels, num_res_blocks
        self._fourier, self._residual = embedding == "fourier", progressive_input == "residual"
        self._attends = [resolution >> level in attention for level in range(len(levels))]
        self.resampling = Resampling(bool(fir))
        self.all_modules = nn.ModuleList(self._modules_in_order(channels, dropout))

    def _modules_in_order(self, channels: int, dropout: float) -> Iterator[nn.Module]:
        nf, embedding = self._nf, 4 * self._nf

        def block(inputs: int, outputs: int, direction: str | None = None) -> PublishedBlock:
            return PublishedBlock(inputs, outputs, embedding, dropout, self.resampling, direction)

        if self._fourier:
            yield FourierFeatures(nf)
        yield _initialised(nn.Linear(2 * nf if self._fourier else nf, embedding))
        yield _initialised(nn.Linear(embedding, embedding))
        yield _conv(channels, nf)
        skips, inputs, image = [nf], nf, channels
        for level, multiple in enumerate(self._levels):
            for _ in range(self._blocks):
                yield block(inputs, nf * multiple)
                inputs = nf * multiple
                if self._attends[level]:
                    yield PublishedAttention(inputs)
                skips.append(inputs)
            if level + 1 < len(self._levels):
                yield block(inputs, inputs, "down")
                if self._residual:
                    yield PyramidStep(image, inputs, self.resampling)
                    image = inputs
                skips.append(inputs)
        yield block(inputs, inputs)
        yield PublishedAttention(inputs)
        yield block(inputs, inputs)
        for level in reversed(range(len(self._levels))):
            outputs = nf * self._levels[level]
            for _ in range(self._blocks + 1):
                yield block(inputs + skips.pop(), outputs)
                inputs = outputs
            if self._attends[level]:
                yield PublishedAttention(inputs)
            if level > 0:
                yield block(inputs, inputs, "up")
        yield _norm(inputs)
        yield _conv(inputs, channels + 1, scale=_ZERO_SCALE)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The field (field_x, field_z), of shapes (B, C, H, W) and (B,), at x and z (B,).

        A network in float64 takes narrower x too; the field has the dtype of x.
        """
        check_sample_shape(x, self.shape)
        z = per_row(z, x, "z")
        if is_wider(self, x):
            field_x, field_z = self(x.double(), z.double())
            return field_x.to(x.dtype), field_z.to(x.dtype)
        modules = iter(self.all_modules)
        features = next(modules)(z) if self._fourier else positional_features(z, self._nf)
        first, second = next(modules), next(modules)
        embedding = second(F.silu(first(features)))
        skips = self._down(x, embedding, modules)
        h = next(modules)(skips[-1], embedding)
        h = next(modules)(h)
        h = next(modules)(h, embedding)
        for level in reversed(range(len(self._levels))):
            for _ in range(self._blocks + 1):
                h = next(modules)(torch.cat([h, skips.pop()], 1), embedding)
            if self._attends[level]:
                h = next(modules)(h)
            if level > 0:
                h = next(modules)(h, embedding)
        norm, last = modules
        field = last(F.silu(norm(h)))
        return field[:, :-1], field[:, -1].flatten(1).mean(1)

    def _down(self, x: Tensor, embedding: Tensor, modules: Iterator[nn.Module]) -> list[Tensor]:
        """The skip connections of the encoder; the last one is its output."""
        h, image = next(modules)(x), x
        skips = [h]
        for level in range(len(self._levels)):
            for _ in range(self._blocks):
                h = next(modules)(h, embedding)
                if self._attends[level]:
                    h = next(modules)(h)
                skips.append(h)
            if level + 1 < len(self._levels):
                h = next(modules)(h, embedding)
                if self._residual:
                    h = image = (next(modules)(image) + h) * HALF_SUM
                skips.append(h)
        return skips


class DDPMpp(Published):
    """DDPM++ as published with PFGM for CIFAR-10; the deep variant has num_res_blocks=8.

    The arguments are those of :class:`pfgm.networks.Published`. It predicts the field itself.

    >>> net = DDPMpp(3, 16, nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,))
    >>> field_x, field_z = net(torch.randn(2, 3, 16, 16), torch.rand(2))
    >>> field_x.shape, field_z.shape
    (torch.Size([2, 3, 16, 16]), torch.Size([2]))
    """


class NCSNpp(Published):
    """NCSN++ as published with PFGM: Fourier features, smooth resampling, progressive input.

    The arguments are those of :class:`pfgm.networks.Published`. It predicts the field itself.

    >>> NCSNpp(3, 16, nf=16, ch_mult=(1, 2)).config["embedding"]
    'fourier'
    """

    def __init__(self, channels: int, resolution: int, **options: Any) -> None:
        published = {"embedding": "fourier", "fir": True, "progressive_input": "residual"}
        super().__init__(channels, resolution, **{**published, **options})
