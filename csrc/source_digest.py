"""The digest of what the extension is built from. setup.py and tests/conftest.py load this file."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Not tests: only builds for tests hold them.
FOLDERS = ("api", "bindings", "cpu", "cuda")


def source_digest() -> str:
    sources = [ROOT / "CMakeLists.txt"]
    for folder in FOLDERS:
        sources += sorted(p for p in (ROOT / "csrc" / folder).rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
