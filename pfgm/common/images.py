"""Images: which data are some, and warnings where they are laid out or scaled otherwise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

_SLACK = 0.01  # by which images may lie outside of [−1, 1]; enlarging can overshoot


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are images (C, H, W), grey or RGB.

    >>> is_image((3, 32, 32)), is_image((32, 32, 3)), is_image((2,))
    (True, False, False)
    """
    return len(shape) == 3 and shape[0] in (1, 3)


def channels_last(shape: Sequence[int]) -> bool:
    """Whether samples of this shape look like images with channels last."""
    return len(shape) == 3 and shape[2] in (1, 3) and not is_image(shape)


def warn_channels_last(shape: Sequence[int]) -> None:
    """Warns the caller of the caller if samples of data look like images with channels last."""
    if channels_last(shape):
        warnings.warn(
            f"data has samples of shape {tuple(shape)}, as images with channels last; networks "
            'take (n, C, H, W): data.movedim(-1, 1), or pfgm.data.open(data, layout="images").',
            stacklevel=3,
        )


def warn_image_range(low: float, high: float, *, stacklevel: int = 3) -> bool:
    """Warns of images whose values, low to high, do not look like [−1, 1].

    Flows train on any values. But pictures and figures take images to lie in [−1, 1]. By default
    the caller of the caller is warned. Returns whether there was a warning.
    """
    if not math.isfinite(low + high):  # an error elsewhere
        return False
    if low >= -1 - _SLACK and high <= 1 + _SLACK and (low < 0 or low == high):
        return False
    option, formula = f"{low:g} {high:g}", "2 * (data - low) / (high - low) - 1"
    if low >= 0 and high <= 255:
        option, formula = ("0 1", "2 * data - 1") if high <= 1 else ("0 255", "data / 127.5 - 1")
    warnings.warn(
        f"data holds images with values from {low:.4g} to {high:.4g}, but images should be in "
        f"[-1, 1], or samples will look washed out or cut off: convert them, by --range {option} "
        f"on the command line, or by {formula} in Python.",
        stacklevel=stacklevel,
    )
    return True
