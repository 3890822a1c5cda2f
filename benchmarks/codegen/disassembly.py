"""Machine code of many kernels as text, by one run of nvdisasm.

nvdisasm takes a quarter of a second to start and next to nothing for a kernel. So all kernels of an
architecture are disassembled together.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_INSTRUCTION_BYTES = 16
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/.*$", re.MULTILINE)
# Of a 64-bit ELF file: the places of its fields, and the fields of a section's header.
_SECTION_TABLE, _SECTION_COUNTS = 40, 58
_SECTION_HEADER = struct.Struct("<2I4Q2I2Q")


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file with one kernel.

    Raises:
        ValueError: the file holds no kernel, or several.
    """
    (table,) = struct.unpack_from("<Q", cubin, _SECTION_TABLE)
    size, count, names = struct.unpack_from("<3H", cubin, _SECTION_COUNTS)
    headers = [_SECTION_HEADER.unpack_from(cubin, table + i * size) for i in range(count)]
    texts = headers[names][4]  # where the names of the sections begin
    kernels = [
        cubin[place : place + length]
        for name, _, _, _, place, length, *_ in headers
        if cubin.startswith(b".text.", texts + name)
    ]
    if len(kernels) != 1:
        raise ValueError(f"the cubin holds {len(kernels)} kernels; allowed is one.")
    return kernels[0]


def disassemble(codes: Sequence[bytes], architecture: str) -> list[str]:
    """The text of each kernel's instructions, a line each, without their encodings.

    Args:
        codes: machine code of kernels.
        architecture: as in "90a".

    Raises:
        RuntimeError: nvdisasm prints more or fewer instructions than there are.
    """
    from triton import knobs

    if not codes:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.bin"
        file.write_bytes(b"".join(codes))
        command = [knobs.nvidia.nvdisasm.path, "--binary", f"SM{architecture}", str(file)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines, texts, start = _LINE.findall(shown), [], 0
    for code in codes:
        end = start + len(code) // _INSTRUCTION_BYTES
        texts.append("\n".join(lines[start:end]))
        start = end
    if start != len(lines):
        raise RuntimeError(f"nvdisasm prints {len(lines)} instructions of {start}.")
    return texts
