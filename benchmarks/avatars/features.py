"""Trains the classifier in whose features ``pfgm evaluate`` judges avatars.

    npm install --prefix benchmarks/avatars
    python -m benchmarks.avatars.features OUT.safetensors

Styles alone are told apart too easily for useful features. The classifier therefore learns all
attributes that an avatar was drawn from, such as its hair and the colour of its skin. It sees 3000
avatars of each style, all of them in the training data of the network, and its first ten logits
are those of the styles.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.avatars.render import STYLES, draw, run_script
from pfgm.data import to_unit
from pfgm.metrics import save_classifier, train_classifier

TRAIN, TEST, EPOCHS = 3000, 500, 8  # avatars of each style, and passes
_FEWEST = 30  # avatars with an attribute that is learned


def main() -> None:
    """Train the classifier and say how well it knows styles and attributes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    out = parser.parse_args().out
    count = TRAIN + TEST
    drawn = [np.stack(list(draw(style, count))) for style in STYLES]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3)
    known = attributes(count).unflatten(0, (len(STYLES), count))
    train, test = (
        (to_unit(images[:, part].flatten(0, 1)), known[:, part].flatten(0, 1))
        for part in (slice(TRAIN), slice(TRAIN, count))
    )
    classifier = train_classifier(*train, epochs=EPOCHS, progress=True)
    with torch.no_grad():
        logits = classifier(test[0])
    right = float((style_of(logits) == style_of(test[1].int())).float().mean())
    found = float(((logits > 0) & test[1]).sum() / test[1].sum())
    print(f"{known.shape[-1]} attributes, of which {found:.1%} are found; right on {right:.2%}")
    save_classifier(out, classifier, data="avatars", accuracy=right)


def style_of(logits: Tensor) -> Tensor:
    """The style (n,) with the largest logit."""
    return logits[:, : len(STYLES)].argmax(1)


def attributes(count: int) -> Tensor:
    """(styles × count, attributes), bool: the styles come first."""
    rows = [
        {style, *(f"{style} {key} {value}" for key, value in json.loads(line).items())}
        for style in STYLES
        for line in run_script(style, 0, count).splitlines()
    ]
    often = collections.Counter(name for row in rows for name in row)
    # What all avatars of a style have is the style again.
    names = [*STYLES, *sorted(n for n, k in often.items() if _FEWEST <= k < count)]
    return torch.tensor([[name in row for name in names] for row in rows])


if __name__ == "__main__":
    main()
