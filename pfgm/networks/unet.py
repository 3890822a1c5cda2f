"""A small U-Net for signals, images and volumes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.numbers import int_tuple, whole
from ..common.transforms import forward_mode
from .config import MAX_DEPTH, MAX_WIDTH
from .embedding import NoiseEmbedding
from .fields import Center, FieldNetwork

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _convolution(
    axes: int, inputs: int, outputs: int, size: int = 3
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution over the last 1, 2 or 3 axes that keeps their lengths."""
    return _CONVOLUTIONS[axes](inputs, outputs, size, padding=size // 2)


def _to_channels(x: Tensor, patch: int) -> Tensor:
    """(B, C, *L) to (B, C·patchᵃ, *L/patch) for a axes: the values of each patch as channels."""
    axes = x.ndim - 2
    cut = [size for length in x.shape[2:] for size in (length // patch, patch)]
    whole, inside = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return x.reshape(*x.shape[:2], *cut).permute(0, 1, *inside, *whole).flatten(1, 1 + axes)


def _from_channels(h: Tensor, patch: int) -> Tensor:
    """The inverse of :func:`_to_channels`."""
    axes = h.ndim - 2
    h = h.unflatten(1, (-1, *[patch] * axes))
    pairs = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
    return h.permute(0, 1, *pairs).reshape(*h.shape[:2], *[patch * n for n in h.shape[2 + axes :]])


def _norm(channels: int) -> nn.GroupNorm:
    # At least four channels in a group: a group of one value would be normalised to zero, which
    # happens with one channel at a resolution of one pixel.
    groups = next((g for g in (8, 4, 2) if channels % g == 0 and channels >= 4 * g), 1)
    return nn.GroupNorm(groups, channels)


def _zeroed(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> nn.Module:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _check_heads(heads: int, channels: int) -> int:
    if heads == 0:
        return 0
    heads = whole("heads", heads)
    if channels % heads:
        raise ValueError(
            f"heads must be 0 or a divisor of the {channels} coarsest channels, got {heads}."
        )
    return heads


def takes_shape(shape: Sequence[int]) -> bool:
    """Whether :class:`UNet` takes samples of a shape: channels and 1 to 3 axes of at least 4.

    >>> takes_shape((2, 64)), takes_shape((1, 8, 8)), takes_shape((2,)), takes_shape((3, 2, 2))
    (True, True, False, False)
    """
    return len(shape) - 1 in _CONVOLUTIONS and min(shape[1:]) >= 4


class ConvBlock(nn.Module):
    """Residual block of two convolutions of width 3, with scale and shift from the embedding."""

    def __init__(self, axes: int, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = _convolution(axes, inputs, outputs)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = _norm(outputs)
        self.conv2 = _zeroed(_convolution(axes, outputs, outputs))
        self.skip = _convolution(axes, inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, *L) and (B, embedding) to (B, outputs, *L)."""
        inner = self.conv1(F.silu(self.norm1(h)))
        modulation = self.modulation(embedding)
        modulation = modulation.view(*modulation.shape, *[1] * (h.ndim - 2))
        scale, shift = modulation.chunk(2, 1)
        inner = F.silu(self.norm2(inner) * (1 + scale) + shift)
        outputs: Tensor = self.skip(h) + self.conv2(inner)
        return outputs


class Attention(nn.Module):
    """Residual self-attention over the pixels."""

    def __init__(self, axes: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(channels)
        self.qkv = _convolution(axes, channels, 3 * channels, 1)
        self.projection = _zeroed(_convolution(axes, channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, *L) to (B, C, *L)."""
        b, c = h.shape[:2]
        qkv = self.qkv(self.norm(h)).view(b, 3, self.heads, c // self.heads, math.prod(h.shape[2:]))
        qkv = qkv.transpose(-1, -2)
        if not (torch.is_grad_enabled() or forward_mode()):
            # torch has a kernel for this layout that is 2 to 5 times as fast on CPUs. It has
            # neither second derivatives nor tangents.
            qkv = qkv.contiguous()
        q, k, v = qkv.unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        projected: Tensor = self.projection(mixed.reshape(h.shape))
        return h + projected


class Stage(nn.Module):
    """The blocks of one resolution; the first may change the number of channels."""

    def __init__(
        self, axes: int, inputs: int, outputs: int, embedding: int, *, blocks: int, heads: int
    ) -> None:
        super().__init__()
        sizes = [inputs] + [outputs] * blocks
        self.blocks = nn.ModuleList(
            ConvBlock(axes, a, b, embedding) for a, b in itertools.pairwise(sizes)
        )
        self.attention = Attention(axes, outputs, heads) if heads else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, *L) and (B, embedding) to (B, outputs, *L)."""
        for block in self.blocks:
            h = block(h, embedding)
        attended: Tensor = self.attention(h)
        return attended


class UNet(FieldNetwork):
    """U-Net that predicts the normalised Poisson field of signals, images or volumes.

    The shape says which: (C, L), (C, H, W) or (C, D, H, W), with axes of at least 4 values after
    the channels. The network works on patches of values, of length 1 unless ``patch`` says more.
    With 2, an image costs about as much as one of half the height and width, so the same time pays
    for a wider network. There is one resolution for each multiplier. Each halves the axes of the
    one before, rounding up, so odd sizes work. The coarsest has self-attention. The network
    predicts the posterior mean (:class:`FieldNetwork`).

    Args:
        shape: sample shape (C, L), (C, H, W) or (C, D, H, W).
        width: channels of the finest resolution.
        multipliers: channels of each resolution, finest first, in units of width; (1, 2) suits 8×8,
            (1, 2, 2) suits 28×28 and 32×32.
        blocks: residual blocks of each resolution, in the encoder and again in the decoder.
        patch: length of a patch along each axis, a divisor of the axes that leaves at least 4.
        heads: attention heads at the coarsest resolution; 0 for none.
        classes: number of labels, which forward takes as 0 to classes − 1; 0 for none.
        data_std, gamma, center, scale: as for :class:`FieldNetwork`.

    >>> import torch
    >>> net = UNet((1, 8, 8), width=16)
    >>> field_x, field_z = net(torch.randn(5, 1, 8, 8), torch.rand(5))
    >>> field_x.shape, field_z.shape
    (torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        patch: int = 1,
        heads: int = 2,
        classes: int = 0,
        data_std: float = 1.0,
        gamma: float = 5.0,
        center: Center = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(shape, data_std=data_std, gamma=gamma, center=center, scale=scale)
        self.patch = whole("patch", patch)
        self._check_axes()
        width = whole("width", width, 1, MAX_WIDTH)
        blocks = whole("blocks", blocks, 1, MAX_DEPTH)
        sizes = [width * m for m in int_tuple("multipliers", multipliers, MAX_WIDTH)]
        heads = _check_heads(heads, sizes[-1])
        self._set_config(
            width=width,
            multipliers=int_tuple("multipliers", multipliers),
            blocks=blocks,
            patch=self.patch,
            heads=heads,
            classes=whole("classes", classes, 0),
        )
        self._build(width, sizes, blocks, heads)

    def _check_axes(self) -> None:
        if not takes_shape(self.shape):
            raise ValueError(
                "shape must be (C, L), (C, H, W) or (C, D, H, W) with L, D, H and W of at least 4, "
                f"got {self.shape}."
            )
        if any(n % self.patch or n < 4 * self.patch for n in self.shape[1:]):
            raise ValueError(
                f"patch must divide the axes {self.shape[1:]} and leave at least 4 patches along "
                f"each, got {self.patch}."
            )

    def _build(self, width: int, sizes: list[int], blocks: int, heads: int) -> None:
        axes = len(self.shape) - 1
        embedding = 4 * width
        self.embedding = NoiseEmbedding(embedding, classes=self.config["classes"])
        inside = self.patch**axes
        self.stem = _convolution(axes, (self.shape[0] + 1) * inside, width)
        self.down = nn.ModuleList()
        above = width
        for i, channels in enumerate(sizes):
            attends = heads if i == len(sizes) - 1 else 0
            self.down.append(Stage(axes, above, channels, embedding, blocks=blocks, heads=attends))
            above = channels
        self.middle = ConvBlock(axes, above, above, embedding)
        self.up = nn.ModuleList()
        for channels in reversed(sizes):
            self.up.append(
                Stage(axes, above + channels, channels, embedding, blocks=blocks, heads=0)
            )
            above = channels
        self.norm = _norm(above)
        self.head = _zeroed(_convolution(axes, above, 2 * self.shape[0] * inside))

    def backbone(
        self, x: Tensor, rms: Tensor, z: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps scaled x, (B, C, *L), ‖x‖/√N (B,) and z (B,) to output and gate logits, as x."""
        embedding = self.embedding(rms, z, labels)
        # A channel of ones shows the border to the convolutions, whose padding is zero.
        axes = x.ndim - 2
        x = F.pad(x, (0, 0) * axes + (0, 1), value=1.0)
        h = self.stem(_to_channels(x, self.patch) if self.patch > 1 else x)
        skips = []
        for i, stage in enumerate(self.down):
            if i:  # torch does not pool axes of one value in three dimensions
                h = _POOLS[axes](h, [min(2, n) for n in h.shape[2:]], ceil_mode=True)
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for stage in self.up:
            skip = skips.pop()
            if h.shape[2:] != skip.shape[2:]:
                h = F.interpolate(h, size=skip.shape[2:], mode="nearest")
            h = stage(torch.cat([h, skip], 1), embedding)
        h = self.head(F.silu(self.norm(h)))
        if self.patch > 1:
            h = _from_channels(h, self.patch)
        output, gate = h.chunk(2, 1)
        return output, gate
