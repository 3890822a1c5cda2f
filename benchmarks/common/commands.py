"""Shared code of the commands."""

from __future__ import annotations

import argparse
import os


def new_parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser described by the first line of a module's docstring."""
    return argparse.ArgumentParser(prog=prog, description=(doc or "").partition("\n")[0])


def name_backend(name: str = "native") -> None:
    """Names the backend of this process and of those that it starts, unless PFGM_BACKEND does.

    So neither a pass nor what is installed decides what is measured.
    """
    os.environ["PFGM_BACKEND"] = os.environ.get("PFGM_BACKEND") or name
