"""``pfgm check``: a report on the backends."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .. import backends
from ..common.files import write_json
from ..common.messages import print_result


@dataclass
class Check:
    """Compare the backends with exact results and time them."""

    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""
    json: Path | None = None
    """File for the report, as JSON."""

    def run(self) -> int:
        report = backends.check(
            self.device, report=lambda line: print(f"pfgm check: {line}", file=sys.stderr)
        )
        if self.json is not None:
            write_json(self.json, report.as_dict(), allow_nan=False)
        print_result(str(report))
        return int(bool(report.failures))
