"""Draws the avatars that the network ``avatars`` is trained on: 10 styles, 32 × 32 pixels.

    npm install --prefix benchmarks/avatars
    python -m benchmarks.avatars.render OUT

Writes 6000 avatars of each style to OUT/train/STYLE and 500 others to OUT/held-out/STYLE, as PNG
files. They are drawn at 64 × 64 pixels and reduced by averages of 2 × 2. Of avatars that are then
equal to the byte, one is kept, so that no held-out avatar is in the training data. The same numbers
give the same avatars. The designs and their licences are in ``pfgm/pretrained/CREDITS.md``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pfgm.pretrained import PRETRAINED

STYLES = PRETRAINED["avatars"].classes
SIZE, TRAIN, HELD_OUT = 32, 6000, 500
_LARGEST_SHARE_OF_COPIES = 0.8  # of a style, or drawing would never end
_AT_ONCE = 500


def main() -> None:
    """Draw all styles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    for style in STYLES:
        drawn, avatars = distinct(style, TRAIN + HELD_OUT)
        print(f"{style}: {len(avatars)} different ones of {drawn} drawn", flush=True)
        write(out / "train" / style, avatars[:TRAIN])
        write(out / "held-out" / style, avatars[TRAIN:])


def distinct(style: str, count: int) -> tuple[int, list[NDArray[np.uint8]]]:
    """How many avatars were drawn, and the first ``count`` that differ."""
    avatars: dict[bytes, NDArray[np.uint8]] = {}
    for drawn, avatar in enumerate(draw(style, int(count / (1 - _LARGEST_SHARE_OF_COPIES))), 1):
        avatars.setdefault(avatar.tobytes(), avatar)
        if len(avatars) == count:
            return drawn, list(avatars.values())
    raise SystemExit(
        f"{style} has only {len(avatars)} different avatars of {SIZE} x {SIZE} pixels."
    )


def draw(style: str, most: int) -> Iterator[NDArray[np.uint8]]:
    """At most this number of avatars, each (SIZE, SIZE, 3)."""
    for first in range(0, most, _AT_ONCE):
        count = min(_AT_ONCE, most - first)
        drawn = run_script(style, first, count, 2 * SIZE)
        squares = np.frombuffer(drawn, np.uint8).reshape(count, SIZE, 2, SIZE, 2, 3)
        yield from (squares.sum((2, 4), dtype=np.uint16) / 4).round().astype(np.uint8)


def run_script(style: str, first: int, count: int, *size: int) -> bytes:
    """The output of ``draw.mjs``."""
    node = shutil.which("node")
    if node is None:
        raise SystemExit("node was not found: install Node.js.")
    script = Path(__file__).with_name("draw.mjs")
    arguments = [style, *map(str, (first, count, *size))]
    return subprocess.run([node, script, *arguments], check=True, capture_output=True).stdout


def write(folder: Path, avatars: list[NDArray[np.uint8]]) -> None:
    """Writes avatars as numbered PNG files."""
    folder.mkdir(parents=True)
    for number, avatar in enumerate(avatars):
        Image.fromarray(avatar).save(folder / f"{number:05}.png")


if __name__ == "__main__":
    main()
