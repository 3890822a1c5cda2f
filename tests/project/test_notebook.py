"""The notebook runs, and the stored one shows its pictures."""

import copy
import importlib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parents[2] / "examples" / "ten_minutes.ipynb"
FEWEST_PICTURES = 9


def pictures(notebook):
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def printed(notebook):
    """The number of lines that each cell prints: they may arrive in several outputs."""
    cells = (
        [o for o in cell.get("outputs", ()) if o.get("name") == "stdout"] for cell in notebook.cells
    )
    return ["".join(output.text for output in outputs).count("\n") for outputs in cells]


@pytest.mark.slow
def test_the_notebook_runs_without_warnings(tmp_path):
    importlib.import_module("matplotlib.font_manager")  # says so when it builds its cache
    stored = nbformat.read(PATH, as_version=4)
    fresh = copy.deepcopy(stored)
    NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert len(pictures(fresh)) == len(pictures(stored))
    assert printed(fresh) == printed(stored)
    for cell in fresh.cells:
        assert not [o.text for o in cell.get("outputs", ()) if o.get("name") == "stderr"]


def test_the_stored_notebook_shows_its_pictures():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert len(pictures(notebook)) >= FEWEST_PICTURES
    assert "/home/" not in PATH.read_text()
