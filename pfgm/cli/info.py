"""``pfgm info``: versions, backends, how the library was built, and data of its networks."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from .. import backends
from ..backends import native
from ..common.messages import print_result
from ..pretrained import PRETRAINED

_SHOWN_PACKAGES = ("torch", "numpy", "triton", "torchdiffeq", "safetensors", "tqdm", "tyro")


@dataclass
class Info:
    """Show versions, backends and why the others cannot run, build flags and threads, and what the
    networks of the package were trained on."""

    def run(self) -> None:
        packages = ", ".join(f"{name} {_version(name)}" for name in _SHOWN_PACKAGES)
        lines = [
            f"pfgm {_version('pfgm')}, Python {platform.python_version()}, {platform.machine()}",
            f"packages   {packages}",
            f"threads    {torch.get_num_threads()}",
        ]
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for name, (usable, detail) in backends.available(device).items():
                state = detail if usable else f"cannot run: {detail}"
                lines.append(f"{device:10} {name}: {state}")
            name, reason = backends.preferred(device)
            lines.append(f"{device:10} default: {name}, {reason}")
        if not torch.cuda.is_available():
            lines.append(f"{'cuda':10} torch finds no GPU that it can use; the CPU computes")
        lines += native.build_lines()
        lines += [f"network    {name}: trained on {of.data}" for name, of in PRETRAINED.items()]
        print_result("\n".join(lines))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
