"""Shared code of the commands."""

from __future__ import annotations

import argparse


def new_parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser described by the first line of a module's docstring."""
    return argparse.ArgumentParser(prog=prog, description=(doc or "").partition("\n")[0])
