"""Small networks that come with the package, to start from at once.

Each is a weights file beside this module, with the licence of its data and the command that trained
it in :data:`PRETRAINED`. ``CREDITS.md`` beside it names the authors of all data.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ..common.checks import check_choice
from ..data.named import FASHION_MNIST_CLASSES
from ..training.checkpoint import Loaded, load

__all__ = ["PRETRAINED", "Pretrained", "load_pretrained", "pretrained_path"]

_FOLDER = Path(__file__).resolve().parent


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
        "pfgm demo --conditional --out runs/digits",
        tuple("0123456789"),
    ),
    "fashion-mnist": Pretrained(
        "60 000 images of clothes of 28 × 28 pixels (Fashion-MNIST, Zalando SE 2017, MIT licence)",
        "pfgm train --config recipes/fashion-mnist.json --out runs/fashion",
        FASHION_MNIST_CLASSES,
    ),
}
"""The networks by name."""


def load_pretrained(name: str, *, device: torch.device | str = "cpu") -> Loaded:
    """The flow and the network (in evaluation mode) of a small trained model.

    All models have labels: ``flow.sample(net, n)`` draws from all labels, and
    ``condition={"labels": labels}`` from these, also with ``guidance``.

    Args:
        name: "avatars", PFGM++ (D = 128) of 32 × 32 pixels in colour; "digits", PFGM of 8 × 8; or
            "fashion-mnist", PFGM++ (D = 128) of 28 × 28. Images are (C, H, W) in [-1, 1].
            :data:`PRETRAINED` has data, licence and training of each.
        device: device of the network.

    Raises:
        ValueError: there is no such model.

    >>> flow, net = load_pretrained("digits")
    >>> flow.sample(net, 4, condition={"labels": torch.tensor([1, 9, 9, 8])}).shape
    torch.Size([4, 1, 8, 8])
    """
    loaded = load(pretrained_path(name), device=device)
    loaded.label_names = PRETRAINED[name].classes
    return loaded


def pretrained_path(name: str) -> Path:
    """The weights file of a model."""
    check_choice("name", name, PRETRAINED)
    return _FOLDER / f"{name}.safetensors"
