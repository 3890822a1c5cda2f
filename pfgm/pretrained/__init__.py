"""Small networks that come with the package: :func:`pfgm.load` reads them by name.

Each is a weights file beside this module, with the licence of its data and the command that trained
it in :data:`PRETRAINED`. ``CREDITS.md`` beside it names the authors of all data.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..data.named import FASHION_MNIST_CLASSES

__all__ = ["PRETRAINED", "Pretrained"]

FOLDER = Path(__file__).resolve().parent  # of the weights files


class Pretrained(NamedTuple):
    """What a network was trained on, and how."""

    data: str
    """The data, with their source and licence."""
    command: str
    """The command that trains it again."""
    classes: tuple[str, ...]
    """What its labels mean, from 0."""


PRETRAINED = {
    "avatars": Pretrained(
        "60 000 generated avatars of 32 × 32 pixels (DiceBear 9.4.3, designs by Ashley Seo, "
        "DiceBear, Draftbit, Johan Melin, Lisa Wischofsky, Micah Lanier, Pablo Stanley, The Visual "
        "Team and Zoish, CC BY 4.0 or CC0 1.0; see pfgm/pretrained/CREDITS.md)",
        "pfgm train --config recipes/avatars.json --out runs/avatars",
        (
            "adventurer",
            "big-ears",
            "big-smile",
            "lorelei",
            "micah",
            "notionists",
            "open-peeps",
            "personas",
            "pixel-art",
            "toon-head",
        ),
    ),
    "digits": Pretrained(
        "1398 handwritten digits of 8 × 8 pixels (UCI, Optical Recognition of Handwritten Digits, "
        "E. Alpaydin and C. Kaynak 1998, CC BY 4.0)",
        "pfgm train --config recipes/digits.json --out runs/digits",
        tuple("0123456789"),
    ),
    "fashion-mnist": Pretrained(
        "60 000 images of clothes of 28 × 28 pixels (Fashion-MNIST, Zalando SE 2017, MIT licence)",
        "pfgm train --config recipes/fashion-mnist.json --out runs/fashion",
        FASHION_MNIST_CLASSES,
    ),
}
"""The networks by name."""
