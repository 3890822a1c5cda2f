"""The three published losses beside those with this library, as docs/drop-in.md prints both.

    python -m benchmarks.studies.published_losses [--store]

Both run on the same seed, with B = 32, M = 512, N = 784 (Fashion-MNIST) and a network that costs
nothing, on one thread. They take turns. The time is that of the processor, of which other programs
take no part: the least of all turns. The difference of the two losses is relative, the largest of
all turns. Whole training steps with PFGM's loss follow: loss, gradient and Adam, with the MLP and
the U-Net of pfgm.networks. ``--store`` writes results/published_losses.json.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pfgm
from benchmarks.common.commands import name_backend, new_parser
from benchmarks.common.folders import DOCS
from benchmarks.common.machine import store
from benchmarks.common.subjects import fashion_mnist
from benchmarks.common.tables import table
from benchmarks.common.turns import take_turns
from pfgm.data import to_unit

B, M, TURNS, STEP_TURNS = 32, 512, 15, 7
Loss = Callable[..., Tensor]


def printed_losses() -> dict[str, tuple[str, str]]:
    """The sections of the page that replace a loss: the code before and after."""
    sections = {}
    for section in re.split(r"^## ", (DOCS / "drop-in.md").read_text(), flags=re.MULTILINE)[1:]:
        codes = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
        if sum("def loss(" in code for code in codes) == 2:
            sections[section.splitlines()[0]] = (codes[0], codes[1])
    return sections


def as_loss(code: str) -> Loss:
    """The function of a block of the page."""
    names: dict[str, Any] = {}
    exec(compile(code, "drop-in.md", "exec"), names)
    loss: Loss = names["loss"]
    return loss


def target_lines(code: str) -> int:
    """The lines that compute the target before: the paragraph with the (B, M, N) values."""
    paragraphs = re.split(r"\n\s*\n", code)
    return next(len(each.strip().splitlines()) for each in paragraphs if ".flatten(2)" in each)


def field_network(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return x / (1 + z.view(-1, 1, 1, 1)), -z / (1 + z)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.view(-1, 1, 1, 1))


def seconds_of_processor(call: Callable[[], Any]) -> float:
    """Seconds that the processor spent on one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(title: str, before: str, after: str, images: Tensor) -> dict[str, Any]:
    """Times and difference of a loss before and after."""
    network = field_network if "field_fn" in after else denoiser
    values: dict[str, list[float]] = {"before": [], "after": []}

    def call(name: str, loss: Loss) -> None:
        torch.manual_seed(len(values[name]))
        values[name].append(float(loss(network, images[:B], images)))

    pair = {"before": as_loss(before), "after": as_loss(after)}
    calls = {name: [functools.partial(call, name, loss)] for name, loss in pair.items()}
    for each in calls.values():
        each[0]()
    seconds = take_turns(calls, seconds_of_processor, TURNS)
    losses_before, losses_after = (
        torch.tensor(values[name], dtype=torch.float64) for name in calls
    )
    return {
        "loss": title,
        "seconds before": min(seconds["before"]),
        "seconds after": min(seconds["after"]),
        "times as long": min(seconds["before"]) / min(seconds["after"]),
        "relative difference": float(((losses_before - losses_after) / losses_after).abs().max()),
        "lines of the target before": target_lines(before),
    }


def training_step(network: nn.Module, loss: Loss, images: Tensor) -> Callable[[], None]:
    """One step of Adam on the loss of the first B images."""
    adam = torch.optim.Adam(network.parameters())

    def step() -> None:
        adam.zero_grad()
        loss(network, images[:B], images).backward()
        adam.step()

    return step


def measure_steps(before: str, after: str, images: Tensor) -> list[dict[str, Any]]:
    """Times of whole training steps with a loss before and after, for each network."""
    flow = pfgm.PoissonFlow(images.shape[1:], M=291, noise_std=0.01, tau=0.03)
    networks = {"MLP": "mlp", "U-Net": "unet"}
    rows = []
    for name, kind in networks.items():
        steps = {
            when: [training_step(flow.network(kind), as_loss(code), images)]
            for when, code in {"before": before, "after": after}.items()
        }
        for each in steps.values():
            each[0]()
        seconds = {
            when: min(turns)
            for when, turns in take_turns(steps, seconds_of_processor, STEP_TURNS).items()
        }
        rows.append(
            {
                "network": name,
                "parameters": sum(p.numel() for p in flow.network(kind).parameters()),
                "seconds before": seconds["before"],
                "seconds after": seconds["after"],
                "times as long": seconds["before"] / seconds["after"],
            }
        )
    return rows


def main() -> None:
    name_backend()
    parser = new_parser(__doc__)
    parser.add_argument("--store", action="store_true", help="write the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = to_unit(fashion_mnist()[:M]).view(M, 1, 28, 28)
    losses = printed_losses()
    rows = [measure(title, *codes, images) for title, codes in losses.items()]
    cells = [
        [row["loss"], f"{row['times as long']:.0f} ×", f"{row['relative difference']:.1g}"]
        for row in rows
    ]
    print(table(["loss", "published takes", "relative difference"], cells))
    steps = measure_steps(*losses["PFGM's loss"], images)
    cells = [[row["network"], f"{row['times as long']:.2f} ×"] for row in steps]
    print(table(["training step with PFGM's loss", "published takes"], cells))
    if options.store:
        command = "python -m benchmarks.studies.published_losses --store"
        facts = {"command": command, "B, M, N": [B, M, 784], "rows": rows, "steps": steps}
        print(store("published_losses", facts))


if __name__ == "__main__":
    main()
