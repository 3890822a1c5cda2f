"""The stored results as Markdown tables.

python -m benchmarks.report           prints them
python -m benchmarks.report --write   puts the main table into docs/benchmarks.md
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common.commands import new_parser
from benchmarks.common.folders import DOCS, RESULTS
from benchmarks.common.posterior_paths import ONE_THREAD
from benchmarks.common.rows import markdown
from benchmarks.common.tables import format_seconds, table

PAGE = DOCS / "benchmarks.md"
PEERS = {
    "torch path": "torch path",
    "torch path, compiled": "compiled",
    "published formula": "published formula",
    "native, uint8": "native, uint8",
    "native, in a set": "native, in a set",
}
"""Path → its column in the main table."""
Row = dict[str, Any]


def load(module: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{module}.json").read_text())
    return content


def rows_of(module: str) -> dict[str, dict[str, Row]]:
    """Subject → path → row."""
    subjects: dict[str, dict[str, Row]] = {}
    for row in load(module)["result"]:
        subjects.setdefault(row["subject"], {})[row["path"]] = row
    return subjects


def times_as_long(paths: dict[str, Row], path: str) -> str:
    ratio = paths["native"]["times as long"].get(path)
    return "" if ratio is None else f"{ratio:.3g} ×"


def forward_table() -> str:
    """Time of the library, how many times as long its peers take, and its rate relative to sgemm's.

    The rate counts what a dense computation needs: 4 B M N operations, and 6 more for a gradient.
    """
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
                format_seconds(native["median seconds"]),
                *(times_as_long(paths, peer) for peer in PEERS),
                f"{rate:.2f}",
                f"{max(native['errors'].values()):.0e}",
            ]
        )
    header = ["", "B × M × N", "native", *PEERS.values(), "rate / sgemm", "worst error"]
    return table(header, rows)


def one_thread_table() -> str:
    """The same on one thread: the library's time, and how many times as long its peers take."""
    rows = []
    for subject, paths in rows_of("posterior_mean").items():
        native = paths.get("native" + ONE_THREAD)
        if native is None:
            continue
        peers = (native["times as long"][peer + ONE_THREAD] for peer in list(PEERS)[:2])
        time = format_seconds(native["median seconds"])
        rows.append([subject, time, *(f"{ratio:.3g} ×" for ratio in peers)])
    return table(["one thread", "native", *list(PEERS.values())[:2]], rows)


def rows_table(module: str) -> str:
    """The rows of a module, and how many times as long its peers take."""
    rows = [
        {**row, **{f"× {peer}": ratio for peer, ratio in row.get("times as long", {}).items()}}
        for row in load(module)["result"]
    ]
    return markdown(rows)


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
    return f"{forward_table()}\n\n{one_thread_table()}\n\n{circumstances('posterior_mean')}"


def report() -> str:
    parts = {
        "Posterior mean": main_report(),
        "Euler step": f"{rows_table('ode_step')}\n\n{circumstances('ode_step')}",
        "Calls on tiny tensors, one thread": f"{rows_table('calls')}\n\n{circumstances('calls')}",
        "Memory": rows_table("memory"),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def page() -> str:
    """The page with the main tables between its marks."""
    marks = "<!-- benchmarks: begin -->\n", "\n<!-- benchmarks: end -->"
    before, rest = PAGE.read_text().split(marks[0])
    _, after = rest.split(marks[1])
    return main_report().join((before + marks[0], marks[1] + after))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(report())


if __name__ == "__main__":
    main()
