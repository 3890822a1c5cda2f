"""Interpolates digits, changes their temperature and completes them from their upper half.

    python examples/editing.py [digits] --out editing

Without a model the network is the exact field of the training digits. Its results are then
training digits, and interpolations jump from one to the next.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import pfgm
from pfgm.common.files import check_folder
from pfgm.flows import Flow, Network
from pfgm.plotting import image_grid

TEMPERATURES = (0.25, 0.5, 1.0, 2.0)


def interpolations(flow: Flow, net: Network, path: Path, rows: int, count: int) -> None:
    """A row for each pair of digits, from the first to the second."""
    data = pfgm.data.digits().train
    between = flow.interpolate(net, data[:rows], data[rows : 2 * rows], count=count)
    title = "between two digits, through their latents"
    image_grid(between.transpose(0, 1).flatten(0, 1), path, columns=count, title=title, scale=4)


def temperatures(flow: Flow, net: Network, path: Path, count: int) -> None:
    """A row for each temperature, a column for each latent."""
    latents = flow.prior(count, generator=torch.Generator().manual_seed(0))
    rows = [flow.decode(net, flow.rescale(latents, t)) for t in TEMPERATURES]
    side = [f"temperature {t}" for t in TEMPERATURES]
    image_grid(torch.cat(rows), path, columns=count, side=side, scale=4)


def completions(flow: Flow, net: Network, path: Path, rows: int, count: int) -> None:
    """A row for each held-out digit: the digit, its upper half, and completions."""
    images = pfgm.data.digits().held_out[:rows]
    height = images.shape[-2]
    mask = torch.arange(height)[:, None] < height // 2  # (8, 1), True for the upper rows
    known = images.repeat_interleave(count, 0)
    completed = flow.inpaint(
        net, known, mask, steps=20, resample=8, generator=torch.Generator().manual_seed(0)
    )
    shown = torch.cat(
        [
            images[:, None],
            torch.where(mask, images, 0.0)[:, None],  # grey where unknown
            completed.unflatten(0, (rows, count)),
        ],
        dim=1,
    )
    header = ["digit", "known", *["drawn"] * count]
    image_grid(shown.flatten(0, 1), path, columns=count + 2, header=header, scale=4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="of digits, a path or name for pfgm.load")
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--quick", action="store_true", help="few digits, a few seconds")
    options = parser.parse_args()
    folder = check_folder(options.out)
    if options.model:
        flow, net = pfgm.load(options.model)
    else:
        flow = pfgm.PoissonFlow.from_data(pfgm.data.digits().train)
        net = flow.empirical(pfgm.data.digits().train)
    rows, count = (2, 4) if options.quick else (5, 8)
    interpolations(flow, net, folder / "editing-between.png", rows, count)
    temperatures(flow, net, folder / "editing-temperature.png", count)
    completions(flow, net, folder / "editing.png", rows, count)
