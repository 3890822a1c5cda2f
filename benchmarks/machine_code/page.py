"""The tables of docs/roofline.md from the stored results."""

from __future__ import annotations

from typing import Any

from benchmarks.common.folders import DOCS
from benchmarks.common.tables import Section, format_seconds, table, with_headings
from benchmarks.machine_code import accesses, devices, host, work
from benchmarks.machine_code.data import SHAPES
from benchmarks.machine_code.devices import DEVICES, Figure

SECTION = Section(DOCS / "roofline.md", "machine code")
OURS = ("triton", "cuda", "cuda, medium")
FORWARD_ALONE = ("triton", "cuda, medium")
"""Paths whose backward pass is not predicted."""
PATHS = (*OURS, "torch, float32", "torch, TF32", "compiled, float32", "compiled, TF32")
WITHIN = 0.25  # relative error of a prediction that counts as good
Results = dict[str, Any]


def predicted(results: Results, section: str = "predicted") -> dict[tuple[str, str, str], float]:
    """Shape, card and path → predicted seconds of all kernels together."""
    found: dict[tuple[str, str, str], float] = {}
    for shape, card, path, _, seconds, _, _ in results[section]:
        found[shape, card, path] = found.get((shape, card, path), 0.0) + seconds
    return found


def total_table(results: Results) -> str:
    totals = predicted(results)
    keys = dict.fromkeys((shape, card) for shape, card, _ in totals)
    paths = [path for path in PATHS if any(path == key[2] for key in totals)]
    rows = [
        [shape, card, *(_text(totals.get((shape, card, path))) for path in paths)]
        for shape, card in keys
    ]
    return table(["predicted", "", *paths], rows)


RATIOS = {
    "torch, float32": ("torch, float32", "cuda"),
    "compiled TF32": ("compiled, TF32", "cuda"),
    "compiled TF32, in precision medium": ("compiled, TF32", "cuda, medium"),
}


def ratio_table(results: Results) -> str:
    """How many times as fast as torch the CUDA kernels are: forward, and with the gradient."""
    forward, backward = predicted(results), predicted(results, "backward")
    shapes = list(dict.fromkeys(shape for shape, _, _ in forward))
    cards = list(dict.fromkeys(card for _, card, _ in forward))

    def ratio(shape: str, card: str, paths: tuple[str, str], gradient: bool) -> str:
        theirs, ours = (
            forward[shape, card, path] + (backward[shape, card, path] if gradient else 0)
            for path in paths
        )
        return f"{theirs / ours:.2f}"

    rows = []
    for name, paths in RATIOS.items():
        for card in cards:
            of_shapes = [ratio(shape, card, paths, False) for shape in shapes]
            alone = paths[1] in FORWARD_ALONE
            rows.append(
                [name, card, *of_shapes, "" if alone else ratio(shapes[0], card, paths, True)]
            )
    header = [*(shape.split(":")[0] for shape in shapes), "C, with the gradient"]
    return table(["times as fast as", "", *header], rows)


def variant_table(results: Results) -> str:
    """References in bytes and few queries, beside torch in float32. Its time has the conversion of
    bytes, and stands without it in brackets."""
    totals, rival = predicted(results, "variants"), "torch, float32"
    converted = {
        (shape, card): seconds
        for shape, card, _, kernel, seconds, *_ in results["variants"]
        if kernel == "conversion"
    }
    rows = []
    for shape, card in dict.fromkeys((shape, card) for shape, card, _ in totals):
        ours, theirs = (totals[shape, card, path] for path in ("cuda", rival))
        times = f"{theirs / ours:.2f}"
        if (shape, card) in converted:
            times += f" ({(theirs - converted[shape, card]) / ours:.2f})"
        rows.append([shape, card, format_seconds(ours), format_seconds(theirs), times])
    return table(["predicted", "", "cuda", rival, "times as fast"], rows)


def gradient_table(results: Results) -> str:
    """The backward pass, and both passes together."""
    forward, backward = predicted(results), predicted(results, "backward")
    paths = [path for path in PATHS if path not in FORWARD_ALONE]
    keys = dict.fromkeys((shape, card) for shape, card, _ in backward)
    rows = []
    for shape, card in keys:
        both = [forward[shape, card, path] + backward[shape, card, path] for path in paths]
        times = [backward[shape, card, "cuda"], *both]
        rows.append([shape, card, *map(format_seconds, times)])
    return table(["predicted", "", "cuda, backward", *(f"{path}, both" for path in paths)], rows)


def medium_table(results: Results) -> str:
    """Precision "medium" beside what trainers run: torch in TF32, compiled."""
    totals, rival = predicted(results), "compiled, TF32"
    rows = []
    for shape, card, path in totals:
        if path != "cuda, medium":
            continue
        ours, theirs = (totals[shape, card, name] for name in (path, rival))
        refined = _medium_counts(results, shape, card)["refined a query"]["mean"]
        times = [format_seconds(ours), format_seconds(theirs), f"{theirs / ours:.2f}"]
        rows.append([shape, card, *times, f"{refined:.3g}"])
    header = ["predicted", "", "cuda, medium", rival, "times as fast", "pairs refined per query"]
    return table(header, rows)


def _medium_counts(results: Results, shape: str, card: str) -> work.Data:
    (of_shape,) = (one._replace(type="Rounded") for one in SHAPES if one.name == shape)
    (on_card,) = (one for one in DEVICES if one.name == card)
    return work.of_chunks(results["data"][shape]["medium"], of_shape, on_card)


def _text(seconds: float | None) -> str:
    return "" if seconds is None else format_seconds(seconds)


def kernel_table(results: Results, shape: str, section: str = "predicted") -> str:
    """Predicted time and bound of each of the library's kernels, one column a card."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, card, path, kernel, seconds, launches, bound in results[section]:
        if name == shape and path in OURS:
            times = f", {launches} launches" if launches > 1 else ""
            cells.setdefault((path, kernel), {})[card] = (
                f"{format_seconds(seconds)}, {bound}{times}"
            )
    cards = [card.name for card in DEVICES]
    rows = [[*key, *(by_card.get(card, "") for card in cards)] for key, by_card in cells.items()]
    return table(["predicted", "", *cards], rows)


def loop_table(results: Results) -> str:
    rows = []
    for path, card, kernel, name, count, matrix, ideal, actual, *rest in results["loops"]:
        alone, full, beside, bound = rest
        waves = "" if ideal is None else f"{actual} ({ideal})"
        products = ", ".join(f"{n} {instruction}" for instruction, n in matrix.items())
        numbers = [count, products, waves, alone, f"{full} for {beside}", bound]
        rows.append([path, card, kernel, name, *map(str, numbers)])
    header = ["", "", "kernel", "stretch", "instructions", "matrix instructions"]
    header += ["wavefronts (ideal)", "clocks, one block", "clocks, all blocks", "bound"]
    return table(header, rows)


_EVEN = 1.005  # of what the bytes need: taken without a remark


def access_table(results: Results) -> str:
    """What the CUDA kernels take of shared and global memory over what their bytes need."""
    kinds = (*accesses.SHARED, *accesses.GLOBAL)
    rows = []
    for kernel, counts in results["accesses"].items():
        taken = [counts[kind][1] / counts[kind][0] if kind in counts else 0.0 for kind in kinds]
        if max(taken) > _EVEN:
            rows.append([kernel, *(f"{one:.2f}" if one > _EVEN else "" for one in taken)])
    free = len(results["accesses"]) - len(rows)
    text = (
        "Wavefronts of shared memory (load, store, copy) and transfers of 32 bytes of global "
        "memory, on small problems. There, what a block does once has a larger share than in the "
        f"shapes above. {free} other kernels take at most half a percent more than they need."
    )
    return f"{table(['times what the bytes need', *kinds], rows)}\n\n{text}"


_SUMS = {
    "live": "live weights",
    "tiles of 32, unsorted": "live tiles of 32 × 32",
    "tiles of 32, sorted": "the same, queries sorted",
    "listed of 32, unsorted": "references live for any of 32 queries",
    "listed of 32, sorted": "the same, queries sorted",
}


_REFINED = ("mean", "median", "most")


def data_table(results: Results) -> str:
    rows = []
    for shape, found in results["data"].items():
        each = found["refined a query"]
        counts = [f"{each[name]:.4g}" for name in _REFINED]
        shares = [f"{found['sums'][name]:.0%}" for name in _SUMS]
        cut = f"{len(found['blocks'])} × {found['chunks']}"
        sizes = " × ".join(map(str, found["B, M, N"]))
        rows.append([shape, sizes, str(found["queries looked at"]), cut, *counts, *shares])
    header = ["", "B × M × N", "queries counted", "blocks × chunks, Triton"]
    header += [f"pairs refined per query, {name}" for name in _REFINED]
    return table([*header, *_SUMS.values()], rows)


def device_table() -> str:
    """The rates of the cards, each with the letter of its source."""
    letters = {source: chr(ord("a") + i) for i, source in enumerate(devices.SOURCES)}

    def cell(figure: Figure) -> str:
        return f"{figure.value:,.5g} ({letters[figure.source]})"

    names = [name for name in devices.Device._fields if name not in ("name", "architecture")]
    rows = [
        [name.replace("_", " "), *(cell(getattr(card, name)) for card in DEVICES)] for name in names
    ]
    rows.insert(0, ["code for", *(f"sm_{card.architecture}" for card in DEVICES)])
    sources = "; ".join(f"{letters[key]}: {text}" for key, text in devices.SOURCES.items())
    return f"{table(['', *(card.name for card in DEVICES)], rows)}\n\n{sources}."


def published_table(results: Results) -> str:
    rows = []
    for section in ("published", "held out"):
        for name, card, published, found, configuration, bound, source in results[section]:
            off = found / published - 1
            verdict = "within" if abs(off) <= WITHIN else "outside"
            held = " (held out)" if section == "held out" else ""
            figures = [f"{published:.4g}", f"{found:.4g}", f"{off:+.0%}, {verdict}"]
            rows.append([name + held, card, *figures, configuration, bound, source])
    header = ["", "", "published TFLOP/s", "predicted TFLOP/s", "off", "fastest configuration"]
    return table([*header, "bound", "source"], rows)


_HOST = (
    "Nothing of it ran on a GPU. Triton: launches into a driver that does nothing. Native: the way "
    "to a GPU in the extension built with csrc/host_shim, where launches do nothing, on tensors in "
    "CPU memory; so torch's allocator is that of the CPU, and the calls of the CUDA runtime around "
    "the launches are missing. torch: the same calls on the CPU, with one query and one reference."
)


def host_table(results: Results) -> str:
    rows = [[path, format_seconds(seconds)] for path, seconds in results["host"].items()]
    made = results["made"]["host"]
    how = (
        f"Measured on {made['processor']}, {made['date']}, as processor time of the thread, the "
        f"least of {host.ROUNDS} rounds of {host.CALLS} calls."
    )
    driver = f"The driver is assumed to take {format_seconds(host.DRIVER)} more per launch."
    return f"{table(['', 'a call'], rows)}\n\n{how} {_HOST} {driver}"


def _has_medium(results: Results) -> bool:
    return any(path == "cuda, medium" for _, _, path, *_ in results["predicted"])


def report(results: Results) -> str:
    parts = {
        "Times as fast as torch": ratio_table(results),
        "Predicted times of the forward pass": total_table(results),
        **({"Precision medium": medium_table(results)} if _has_medium(results) else {}),
        **(
            {"References in bytes, and few queries": variant_table(results)}
            if "variants" in results
            else {}
        ),
        **{
            f"Predicted kernel by kernel, {shape}": kernel_table(results, shape)
            for shape in results["data"]
        },
        "Predicted times of the gradient of the queries": gradient_table(results),
        f"Predicted kernel by kernel, backward, {SHAPES[0].name}": kernel_table(
            results, SHAPES[0].name, "backward"
        ),
        "The stretch of each kernel that takes longest, at C": loop_table(results),
        "Accesses of memory by the CUDA kernels": access_table(results),
        "Work of the kernels on real data": data_table(results),
        "Compared with published kernels": published_table(results),
        "The host": host_table(results),
        "Rates": device_table(),
    }
    return with_headings(parts, 2)
