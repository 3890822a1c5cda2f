"""Tables of the measurements: the library's times beside those of its competitors."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.build import nvidia_smi
from benchmarks.common.tables import format_seconds, table
from benchmarks.gpu.clock import Device
from benchmarks.gpu.measure import Row, implementation, lost
from benchmarks.gpu.subjects import BACKENDS, CONTENDER, PLAIN_COPY
from pfgm.backends import triton

OURS = tuple(BACKENDS)
TORCH = ("torch", "torch, tf32", "compiled", "compiled, tf32", "published")
KINDS = ("seconds", "graph")  # the fields of a row that are times
TARGET = 1.5  # time over memory floor, for the CIFAR-10 shape on sm_90


# ---- one row beside others --------------------------------------------------------------------


def best(rows: list[Row], names: tuple[str, ...], kind: str) -> float | None:
    """The smallest median among paths."""
    medians = [getattr(row, kind).get("median") for row in rows if row.path in names]
    return min((value for value in medians if value is not None), default=None)


def ratio(other: float | None, ours: float | None) -> str:
    """How many times as long another path takes."""
    return "" if other is None or ours is None else f"{other / ours:.3g} ×"


def by_subject(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each subject."""
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        subjects.setdefault(row.subject, []).append(row)
    return subjects


# ---- the tables -------------------------------------------------------------------------------


OTHERS = {"best torch": TORCH, CONTENDER: (CONTENDER,), "copy": ("copy",)}
HEADER = ["", *OURS, *OTHERS]
GRAPH_HEADER = [*(f"{name} in a graph" for name in OURS), *OTHERS]


def summary(rows: list[Row]) -> str:
    """One row a subject: times, then the same within graphs, then the errors.

    Times of competitors also say how many times as long they take as the faster of the library's
    paths.
    """
    lines = []
    for name, part in by_subject(rows).items():
        if not any(row.path in (*OURS, "all") for row in part):
            continue
        line = [name]
        for kind in KINDS:
            line += [_own(part, own, kind) for own in OURS]
            least = best(part, OURS, kind)
            line += [ratio(best(part, names, kind), least) for names in OTHERS.values()]
        as_published = best(part, ("published formula",), "seconds")
        line.append(ratio(as_published, best(part, OURS, "seconds")))
        lines.append([*line, *(_worst(part, own) for own in OURS)])
    errors = [f"error, {name}" for name in OURS]
    return table([*HEADER, *GRAPH_HEADER, "published formula", *errors], lines)


def _own(rows: list[Row], path: str, kind: str) -> str:
    time = best(rows, (path,), kind)
    failed = kind == "seconds" and any(row.path in (path, "all") for row in rows)
    if time is None:
        return "failed" if failed else ""
    return format_seconds(time)


def _worst(rows: list[Row], path: str) -> str:
    worst = [value for row in rows if row.path == path for value in row.errors.values()]
    return f"{max(worst):.0e}" if worst else ""


def bandwidth(rows: list[Row]) -> float | None:
    """Bytes a second that the large copy reads and writes."""
    for row in rows:
        if row.subject == PLAIN_COPY and row.seconds:
            return row.moved / row.seconds["median"]
    return None


def floors(rows: list[Row]) -> str:
    """Forward passes of the CIFAR-10 shape over their memory floor: the references read once."""
    rate = bandwidth(rows)
    wanted = [row for row in rows if row.subject.startswith("forward, CIFAR-10") and row.moved]
    lines = []
    for row in wanted:
        if rate is None or row.path == "copy":
            continue
        floor = row.moved / rate
        times = [best([row], (row.path,), kind) for kind in KINDS]
        over = [ratio(time, floor) for time in times]
        lines.append([row.subject, row.path, format_seconds(floor), *over])
    if not lines or rate is None:
        return ""
    title = (
        f"Over the memory floor, which is the bytes of the references at {rate * 1e-12:.3g} TB/s "
        f"(a large copy); the target on sm_90 is {TARGET} ×:"
    )
    return f"{title}\n\n{table(['', 'path', 'floor', 'time', 'in a graph'], lines)}"


# ---- the page ---------------------------------------------------------------------------------


def failures_of(rows: list[Row]) -> list[str]:
    """A line for each path that failed."""
    return [f"{row.subject}: {row.path}: {row.failure}" for row in rows if row.failure]


def failed(rows: list[Row]) -> bool:
    """Whether one of the library's paths failed."""
    return any(row.failure for row in rows if implementation(row.path) in (*OURS, "all"))


def report(rows: list[Row], left_out: list[str], device: Device) -> str:
    """The whole page."""
    parts = [summary(rows)]
    parts.append(floors(rows))
    if not device.real:
        parts.append("A dry run with a few digits: the times mean nothing.")
    if left_out:
        why = "the device was lost" if lost(device) else "the time was up"
        parts.append(f"Left out, {why}: {'; '.join(left_out)}.")
    return "\n\n".join([*filter(None, parts), *failures_of(rows)])


def circumstances(device: Device) -> dict[str, Any]:
    """The machine, the device and the versions."""
    return {
        **machine.describe(),
        "device": torch.cuda.get_device_name() if device.real else "none (dry run)",
        "driver": nvidia_smi("driver_version") if device.real else "",
        "triton": triton.installed(),
    }
