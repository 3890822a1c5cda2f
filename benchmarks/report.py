"""The stored results as Markdown tables.

python benchmarks/report.py           prints them
python benchmarks/report.py --write   puts the main one between the marks in README.md
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from machine import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
Row = dict[str, Any]


def load(module: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{module}.json").read_text())
    return content


def rows_of(module: str) -> dict[str, dict[str, Row]]:
    """subject → path → row."""
    subjects: dict[str, dict[str, Row]] = {}
    for row in load(module)["result"]:
        subjects.setdefault(row["subject"], {})[row["path"]] = row
    return subjects


def seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.1e} s"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times_as_long(paths: dict[str, Row], path: str) -> str:
    ratio = paths["native"]["times as long"].get(path)
    return "" if ratio is None else f"{ratio:.3g} ×"


def forward_table() -> str:
    """Time of the library, how many times as long its peers take, and the rate against sgemm: of
    the 4 B M N operations (6 for the gradient) that a dense computation needs."""
    rows = []
    for subject, paths in rows_of("posterior_mean").items():
        native = paths.get("native")
        if native is None:
            continue
        B, M, N = native["B, M, N"]
        operations = (10 if "backward" in subject else 4) * B * M * N
        rate = operations / native["median seconds"] * 1e-9 / native["sgemm GFLOP/s"]
        rows.append(
            [
                subject,
                f"{B} × {M} × {N}",
                seconds(native["median seconds"]),
                *(times_as_long(paths, peer) for peer in PEERS),
                f"{rate:.2f}",
                f"{max(native['errors'].values()):.0e}",
            ]
        )
    header = ["", "B × M × N", "native", *PEERS.values(), "rate / sgemm", "worst error"]
    return table(header, rows)


PEERS = {
    "torch path": "torch path",
    "torch path, compiled": "compiled",
    "published formula": "published formula",
    "KeOps": "KeOps",
    "native, uint8": "native, uint8",
    "native, 1 thread": "native, 1 thread",
}


def step_table() -> str:
    """Euler steps: B N numbers are read twice and written once."""
    rows = []
    for subject, paths in rows_of("ode_step").items():
        native = paths["native"]
        B, N = native["B, N"]
        share = 12e-9 * B * N / native["median seconds"] / native["copy GB/s"]
        rows.append(
            [
                subject,
                seconds(native["median seconds"]),
                *(times_as_long(paths, peer) for peer in ("published", "compiled", "add", "copy")),
                f"{share:.2f}",
            ]
        )
    peers = ["published", "compiled", "x += field_x", "copy of as much"]
    return table(["", "native", *peers, "bandwidth / copy"], rows)


def other_table(module: str) -> str:
    """Subjects with a few paths of their own each."""
    rows = []
    for subject, paths in rows_of(module).items():
        for path, row in paths.items():
            against = row["times as long"]
            others = (f"{name} {ratio:.3g} ×" for name, ratio in against.items() if name != path)
            rows.append([subject, path, seconds(row["median seconds"]), ", ".join(others)])
    return table(["", "path", "time", "times as long"], rows)


def size_table() -> str:
    rows = [
        [path, seconds(row["median seconds"]), f"{row['nanoseconds a reference']:.0f} ns"]
        for path, row in rows_of("posterior_mean")["number of references"].items()
    ]
    return table(["B = 128, N = 192", "time", "a reference"], rows)


def memory_table() -> str:
    rows = [
        [
            row["subject"],
            " × ".join(map(str, row["B, M, N"])),
            row["path"],
            row["references"],
            f"{row['megabytes of references']:.0f} MiB",
            f"{row['megabytes']:.0f} MiB",
        ]
        for row in load("memory")["result"]
    ]
    return table(["", "B × M × N", "path", "references", "they take", "extra at the peak"], rows)


def codegen_table() -> str:
    """What the Triton kernels compile to: the most of a kernel's variants, of loads the fewest."""
    kernels: dict[tuple[str, int], list[Row]] = {}
    for row in load("codegen")["result"]["rows"]:
        kernels.setdefault((row["kernel"].split(",")[0], row["capability"]), []).append(
            row["figures"]
        )
    rows = []
    for (kernel, capability), figures in kernels.items():
        matrix = [figure["matrix_instructions"] for figure in figures]
        rows.append(
            [
                kernel,
                f"sm_{capability}",
                str(len(figures)),
                *(str(max(figure[key] for figure in figures)) for key in CODEGEN),
                ", ".join(sorted({name for found in matrix for name in found})),
                str(min(figure["wide_loads"] for figure in figures)),
            ]
        )
    header = ["kernel", "architecture", "variants", "registers", "spilled bytes", "shared bytes"]
    return table([*header, "matrix instructions", "16-byte loads"], rows)


CODEGEN = ("registers", "spills", "shared")


def circumstances(module: str) -> str:
    content = load(module)
    machine = content["machine"]
    limits = content["result"][0]
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['backends']['native']}; "
        f"torch {machine['versions']['torch']}, Python {machine['python']}; sgemm "
        f"{limits['sgemm GFLOP/s']:.0f} GFLOP/s, copy {limits['copy GB/s']:.0f} GB/s; commit "
        f"{machine['commit']}, {content['date']}."
    )


def main_report() -> str:
    return f"{forward_table()}\n\n{circumstances('posterior_mean')}"


def report() -> str:
    parts = {
        "Posterior mean": main_report(),
        "Number of references": size_table(),
        "Euler step": f"{step_table()}\n\n{circumstances('ode_step')}",
        "Training step": other_table("training_step"),
        "Sampling": other_table("sampling"),
        "Memory": memory_table(),
        "Triton kernels as compiled": codegen_table(),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def with_report(text: str) -> str:
    """README's text with the main table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{main_report()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the main table into README.md")
    if parser.parse_args().write:
        README.write_text(with_report(README.read_text()))
    else:
        print(report())


if __name__ == "__main__":
    main()
