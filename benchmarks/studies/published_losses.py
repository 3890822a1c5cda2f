"""The three published losses beside those with this library, as docs/drop-in.md prints both.

    python -m benchmarks.studies.published_losses

Both run on the same seed, with B = 32, M = 512, N = 784 (Fashion-MNIST) and a network that costs
nothing, on one thread. They take turns. The time is that of the processor, of which other programs
take no part: the least of all turns. The difference of the two losses is relative, the largest of
all turns. Whole training steps with PFGM's loss follow: loss, gradient and Adam, with the MLP and
the U-Net of pfgm.networks.
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import pfgm
from benchmarks.common.folders import DOCS
from benchmarks.common.rows import Row
from benchmarks.common.study import Study, run
from benchmarks.common.subjects import fashion_mnist
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


NETWORKS = {"MLP": "mlp", "U-Net": "unet"}


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The losses alone, and whole steps of the networks."""
    yield from ({"loss": title} for title in printed_losses())
    yield from ({"network": name} for name in NETWORKS)


def measure(options: argparse.Namespace, loss: str = "PFGM's loss", network: str = "") -> Row:
    """Times of a loss, or of a whole training step with it, before and after."""
    images = to_unit(fashion_mnist()[:M]).view(M, 1, 28, 28)
    codes = printed_losses()[loss]
    return measure_step(network, *codes, images) if network else measure_loss(*codes, images)


def compared(seconds: dict[str, list[float]]) -> Row:
    """The least times, and their ratio."""
    before, after = min(seconds["before"]), min(seconds["after"])
    return {"seconds before": before, "seconds after": after, "times as long": before / after}


def measure_loss(before: str, after: str, images: Tensor) -> Row:
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
        **compared(seconds),
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


def measure_step(name: str, before: str, after: str, images: Tensor) -> Row:
    """Times of whole training steps of a network with a loss before and after."""
    flow = pfgm.PoissonFlow(images.shape[1:], M=291, noise_std=0.01, tau=0.03)
    steps = {}
    for when, code in {"before": before, "after": after}.items():
        network = flow.network(NETWORKS[name])
        steps[when] = [training_step(network, as_loss(code), images)]
        steps[when][0]()
    parameters = sum(p.numel() for p in network.parameters())
    seconds = take_turns(steps, seconds_of_processor, STEP_TURNS)
    return {"parameters": parameters, **compared(seconds)}


STUDY = Study("published_losses", settings, measure, threads=1)

if __name__ == "__main__":
    run(STUDY, __doc__)
