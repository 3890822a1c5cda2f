"""The model card of a folder that :func:`pfgm.save` writes: its ``README.md`` and its picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..common.images import is_image
from ..data.named import NAMED
from ..data.tables import Table
from ..flows.flow import Flow
from ..networks.registry import label_count
from .run_config import RunConfig
from .weights_file import describe_network

CARD = "README.md"
PICTURE = "samples.png"
_PAPERS = {"PoissonFlow": "2209.11178", "PoissonFlowPP": "2302.04265"}  # hubs tag what cards link
_SAMPLES = 16
_TEXT = """\
---
library_name: pfgm
license: unknown
{task}tags:
- pfgm
- poisson-flow
---

# {name}

A Poisson flow generative model of {samples}: {flow}, and a network {network}.

{picture}{training} The model's licence is not stated yet: replace `unknown` at the top of this file
by [the name of one](https://huggingface.co/docs/hub/repositories-licenses).

Download this folder, install pfgm, and sample:

```python
{code}
```
"""
_COMMAND = "\nOn the command line, in this folder: `pfgm sample . --n 100 --out {}`\n"


class Origin(NamedTuple):
    """Where a network comes from, as far as a card tells it."""

    step: int
    """Steps of training; 0 if unknown."""
    data: str = ""
    """What it was trained on, in words."""
    figures: str = ""
    """The figures of the newest evaluation of its run, in a sentence."""
    picture: bytes | None = None
    """The picture of that evaluation, as a PNG file holds it."""

    @classmethod
    def of(cls, run: Path, step: int) -> Origin:
        """What the files of a run tell of its checkpoint of a step."""
        data, figures, picture = "", "", None
        with suppress(FileNotFoundError):
            name, _, place = RunConfig.load(run).data.partition(":")
            data = name if name in NAMED else Path(place or name).name  # not where it lies
        rows: list[dict[str, str]] = []
        with suppress(FileNotFoundError), (run / "evaluations.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        if rows:
            evaluated = int(rows[-1].pop("step"))
            rows[-1].pop("seconds", None)
            shown = (
                f"{key.replace('_', ' ')} {float(value):.4g}" for key, value in rows[-1].items()
            )
            figures = (
                f" Samples after {evaluated} steps, against the data that were held out, or all if "
                f"none were: {', '.join(shown)}."
            )
            with suppress(FileNotFoundError):
                picture = (run / f"samples-{evaluated:08d}.png").read_bytes()
        return cls(step, data, figures, picture)


def model_card(
    name: str,
    flow: Flow,
    network: nn.Module,
    table: Table | None,
    label_names: Sequence[object],
    origin: Origin,
) -> str:
    """A header in YAML, what the model is and comes from, and how to sample it."""
    images, classes = is_image(flow.shape), label_count(network)
    samples = f"{'images' if images else 'samples'} of shape {flow.shape}"
    if table is not None:
        samples = f"rows of a table ({', '.join(column.name for column in table.columns)})"
    names = f" ({', '.join(map(str, label_names))})" if label_names else ""
    kind, parameters = type(flow).__name__, sum(each.numel() for each in network.parameters())
    steps = f" for {origin.step} steps" if origin.step else ""
    unknown = "data that are not stated yet: say here what they are, and under which licence"
    described = describe_network(network) is not None
    code = [
        "import pfgm, torch\n" if classes else "import pfgm\n",
        f"model = pfgm.load({json.dumps(f'./{name}')}{'' if described else ', network'})",
    ]
    condition = own = ""
    if classes:
        by_name = f"  # or by name: [{json.dumps(str(label_names[0]))}]" if label_names else ""
        code.append(f"labels = torch.arange({_SAMPLES}) % {classes}{by_name}")
        condition, own = ', condition={"labels": labels}', ", labels"
    code.append(f"samples = model.flow.sample(model.network, {_SAMPLES}{condition})")
    if table is not None:
        code.append(f"rows = model.table.decode(samples{own})  # its columns, by their names")
    if images:
        code.append('pfgm.plotting.image_grid(samples, "drawn.png")')
    out = "drawn.png" if images else "rows.csv" if len(flow.shape) == 1 else "samples.npy"
    text = _TEXT.format(
        task="pipeline_tag: unconditional-image-generation\n" if images else "",
        name=name,
        samples=samples + (f" with the labels 0 to {classes - 1}{names}" if classes else ""),
        flow=f"{kind} ([paper](https://arxiv.org/abs/{_PAPERS[kind]})) with D = {flow.D:g}",
        network=f"{type(network).__name__} with {parameters:,} parameters",
        picture=f"![samples]({PICTURE})\n\n" if origin.picture else "",
        training=f"Trained{steps} on {origin.data or unknown}.{origin.figures}",
        code="\n".join(code),
    )
    return text + (_COMMAND.format(out) if described else "")
