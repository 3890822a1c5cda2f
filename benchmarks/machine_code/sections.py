"""Computes the sections of the stored results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.common import subjects
from benchmarks.machine_code import data, launches, model, sass, work
from benchmarks.machine_code.data import SHAPES, Shape
from benchmarks.machine_code.devices import DEVICES, Device
from benchmarks.machine_code.model import Launch, Predicted

BACKENDS: dict[str, Callable[[Shape, work.Data, Device], Iterator[Launch]]] = {
    "triton": launches.triton,
    "cuda": launches.cuda,
    "cuda, medium": launches.cuda_medium,
}
TORCH = {
    "torch, float32": ("fp32", False),
    "torch, TF32": ("tf32", False),
    "compiled, float32": ("fp32", True),
    "compiled, TF32": ("tf32", True),
}
LOOPS_SHAPE = data.C
Row = list[Any]


def count_data(stored: dict[str, Any]) -> dict[str, Any]:
    """The section "data". Keeps the stored counts of Fashion-MNIST if its files are missing."""
    found = {}
    for shape in SHAPES:
        there = (subjects.FASHION_FOLDER / subjects.FASHION).exists()
        if shape == data.F and not there:
            print(f"Fashion-MNIST is not counted: no {subjects.FASHION} in its folder.")
            found[shape.name] = stored[shape.name]
        else:
            found[shape.name] = data.count(shape, cards=()) | {
                "cuda": by_chunk(shape, data.count),
                "gradient": by_chunk(shape._replace(backward=True), data.count_gradient),
                "medium": by_chunk(shape._replace(type="Rounded"), data.count),
            }
    return found


def by_chunk(shape: Shape, count: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The counts for the chunks of each card, by their keys."""
    cards: dict[Shape, list[Device]] = {}
    for card in DEVICES:
        cards.setdefault(work.on_card(shape, card), []).append(card)
    return {on_cards.key: count(on_cards, cards=those) for on_cards, those in cards.items()}


def predictions(counts: dict[str, Any], paths: Sequence[str]) -> Iterator[Row]:
    """The section "predicted": shape, card, path, kernel, seconds, launches and bound."""
    for shape in SHAPES:
        for card in DEVICES:
            for path, made in BACKENDS.items():
                if path not in paths:
                    continue
                found = [model.predict(one, card) for one in made(shape, counts[shape.name], card)]
                for part in model.merge_by_name(found):
                    yield _row(shape, card, path, part)
            for path, (kind, compiled) in TORCH.items():
                if path not in paths:
                    continue
                parts = model.torch_path(card, shape.B, shape.M, shape.N, kind, compiled)
                for name, seconds in parts.items():
                    yield _row(shape, card, path, Predicted(name, seconds, 0, ""))


def backward(counts: dict[str, Any]) -> Iterator[Row]:
    """The section "backward": rows as in "predicted", of the gradient of the queries."""
    for shape in SHAPES:
        for card in DEVICES:
            made = launches.cuda_backward(shape, counts[shape.name], card)
            for part in model.merge_by_name([model.predict(one, card) for one in made]):
                yield _row(shape, card, "cuda", part)
            if shape.keeps:
                yield _row(shape, card, "cuda", _more_refined(shape, counts[shape.name], card))
            for path, (kind, compiled) in TORCH.items():
                parts = model.torch_backward(card, shape.B, shape.M, shape.N, kind, compiled)
                for name, seconds in parts.items():
                    yield _row(shape, card, path, Predicted(name, seconds, 0, ""))


def _more_refined(shape: Shape, found: dict[str, Any], card: Device) -> Predicted:
    """By how much the forward pass takes longer if it keeps its distances for the gradient, which
    needs more of them refined."""
    key = work.on_card(shape, card).key
    of_gradient = found["gradient"][key]["refine"]
    kept = {"cuda": {key: found["cuda"][key] | {"refine": of_gradient}}}
    with_and_without = (kept, found)
    longer, usual = (
        model.total([model.predict(one, card) for one in launches.cuda(shape, each, card)])
        for each in with_and_without
    )
    return Predicted("forward, more refined", max(0.0, longer - usual), 0, "refine")


def _row(shape: Shape, card: Device, path: str, part: Predicted) -> Row:
    seconds = float(f"{part.seconds:.4g}")
    return [shape.name, card.name, path, part.name, seconds, part.launches, part.bound]


def variants() -> Iterator[Row]:
    """The section "variants": rows as in "predicted", of the forward pass. Torch takes float32."""
    for shape in data.VARIANTS:
        counts = {"cuda": by_chunk(shape, data.count)}
        for card in DEVICES:
            found = [model.predict(one, card) for one in launches.cuda(shape, counts, card)]
            for part in model.merge_by_name(found):
                yield _row(shape, card, "cuda", part)
            parts = model.torch_path(card, shape.B, shape.M, shape.N, "fp32", False)
            if shape.type == "uint8":
                parts["conversion"] = model.pass_over(card, 5.0 * shape.M * shape.N)
            for name, seconds in parts.items():
                yield _row(shape, card, "torch, float32", Predicted(name, seconds, 0, ""))


def replaced(section: str, stored: Iterable[Row], found: Iterable[Row]) -> list[Row]:
    """Stored rows with those of the found paths replaced, in the order of a full count."""
    place = {"predicted": 2, "loops": 0}[section]
    new = list(found)
    paths = {row[place] for row in new}
    kept = [row for row in stored if row[place] not in paths]
    shapes, cards = [shape.name for shape in SHAPES], [card.name for card in DEVICES]
    order = [*BACKENDS, *TORCH]

    def key(row: Row) -> tuple[int, ...]:
        if section == "predicted":
            return shapes.index(row[0]), cards.index(row[1]), order.index(row[2])
        return cards.index(row[1]), order.index(row[0])

    return sorted(kept + new, key=key)


def main_loops(counts: dict[str, Any], paths: Sequence[str]) -> Iterator[Row]:
    """The section "loops": the longest phase of each kernel, at one shape.

    Path, card, kernel, phase, instructions, matrix instructions, ideal and actual wavefronts,
    clocks of a trip of one block alone and of as many as a multiprocessor holds, their number, and
    bound.
    """
    for card in DEVICES:
        for path, made in BACKENDS.items():
            if path not in paths:
                continue
            for launch in made(LOOPS_SHAPE, counts[LOOPS_SHAPE.name], card):
                yield [path, card.name, launch.name, *_longest(launch, card)]


def _longest(launch: Launch, card: Device) -> Row:
    beside = model.blocks_at_once(launch, card)

    def clocks_of(phase: model.Phase) -> float:
        return phase.trips * model.run_of(phase, launch, card, beside).clocks

    phase = max(launch.phases, key=clocks_of)
    alone, full = (model.run_of(phase, launch, card, blocks) for blocks in (1, beside))
    mix = sass.mix(phase.code)
    matrix = {name: n for name, n in mix.items() if "MMA" in name}
    waves: Row = [None, None]
    conflicts = launch.kernel.conflicts
    if matrix and conflicts is not None and not conflicts.whole:
        waves = [conflicts.ideal, conflicts.wavefronts]
    clocks = [round(alone.clocks), round(full.clocks)]
    return [phase.name, len(phase.code), matrix, *waves, *clocks, beside, full.bound]
