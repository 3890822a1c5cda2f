"""Runs scripts of this folder in the same processes, which then start once: together.py CALL ...

A call is a script and its arguments, separated as in a shell.
"""

import runpy
import shlex
import sys
from pathlib import Path

import torch

from pfgm.training.processes import joined

if __name__ == "__main__":
    calls = sys.argv[1:]
    with joined(torch.device("cpu"), timeout=60):
        for call in calls:
            sys.argv = shlex.split(call)
            runpy.run_path(str(Path(__file__).with_name(sys.argv[0])), run_name="__main__")
