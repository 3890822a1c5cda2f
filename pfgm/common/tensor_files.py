"""Files of tensors with a description: safetensors with a checksum. Nothing in them is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .checksums import BLANK, fill_in_checksum, verify_checksum
from .files import StrPath, write_atomic


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Writes tensors and a description that JSON can hold."""
    # The entry distinguishes a file that has lost its checksum from an older one that had none.
    described = {**description, "checksum": "crc32"}
    kept = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    metadata = {"pfgm": json.dumps(described), "checksum": BLANK}
    parts = fill_in_checksum(memoryview(safetensors.torch.save(kept, metadata=metadata)))
    write_atomic(path, lambda file: file.writelines(parts))


def read_tensors(
    path: Path, version: int, kind: str = "checkpoint", of: str = "flow"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a file, verified if it has a checksum.

    The description must have the format ``version``. Errors call the file a ``kind``, and what it
    describes ``of``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} at {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            recorded = metadata.get("checksum")
            if recorded is not None:
                verify_checksum(path, recorded)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}).") from error
    try:
        description = json.loads(metadata.get("pfgm", ""))
        file_format = description["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} was not written by pfgm: it describes no {of}.") from error
    if file_format != version:
        raise ValueError(f"{path} has format {file_format}; this version reads format {version}.")
    if recorded is None and "checksum" in description:
        raise ValueError(f"{path} is damaged: it has lost its checksum.")
    return tensors, description
