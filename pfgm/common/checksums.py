"""Checksums of the files of a checkpoint, and of weights.

They are CRC-32. The checksum of a weights file is stored in the header of the same file, so it is
computed with zeros in its place. CRC-32 detects all changes of one or two bits and all changes
within 32 neighbouring bits, and misses one in 2³² others. It protects against accidents, not
against forgery.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

BLANK = "00000000"
"""Replaces the checksum in a weights file while the checksum is computed."""
_CHUNK_BYTES = 1 << 20


def checksum_of(file: BinaryIO, value: int = 0) -> str:
    """The CRC-32 of the rest of a file; `value` is the CRC-32 of the bytes before."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"


def checksum_of_weights(weights: Mapping[str, Tensor]) -> str:
    """The CRC-32 of the names and values of tensors, in the order of the names.

    >>> checksum_of_weights({"bias": torch.zeros(2), "weight": torch.ones(2)})
    'd58cc22c'
    """
    value = 0
    for name in sorted(weights):
        value = zlib.crc32(name.encode(), value)
        flat = weights[name].detach().cpu().reshape(-1).contiguous()
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def fill_in_checksum(content: memoryview) -> tuple[memoryview, bytes, memoryview]:
    """The content of a weights file in three parts, with the checksum in place of BLANK."""
    header_end = 8 + int.from_bytes(content[:8], "little")
    start = _find_checksum(BLANK, bytes(content[:header_end]))
    assert start is not None
    checksum = f"{zlib.crc32(content):08x}".encode()
    return content[:start], checksum, content[start + len(checksum) :]


def verify_checksum(path: Path, recorded: str) -> None:
    """Raises ValueError unless a weights file has the checksum that its metadata record."""
    with path.open("rb") as file:
        size = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = file.read(size)
        start = _find_checksum(recorded, header)
        computed = None
        if start is not None and len(recorded) == len(BLANK):
            end = start + len(BLANK)
            blanked = header[:start] + BLANK.encode() + header[end:]
            computed = checksum_of(file, zlib.crc32(blanked))
    if computed != recorded:
        raise ValueError(
            f"{path} is damaged, or was changed by another program: its checksum must be "
            f"{recorded}, got {computed or 'none in its place'}."
        )


def _find_checksum(checksum: str, header: bytes) -> int | None:
    """The position of a checksum in a header.

    Only the metadata entry matches: within other names and values quotes have a backslash.
    """
    key = b'"checksum":"'
    start = header.find(key + checksum.encode() + b'"')
    return None if start < 0 else start + len(key)
