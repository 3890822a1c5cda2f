import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pfgm

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pfgm.__path__, "pfgm.")
    if not module.name.endswith("_native")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    if name == "pfgm.integrations.diffusers":
        pytest.importorskip("diffusers")
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_public_names_exist_and_are_documented():
    for name in pfgm.__all__:
        assert getattr(pfgm, name).__doc__, name


def test_importing_needs_no_optional_package():
    """Neither Triton nor what the extras bring, and no compiler."""
    code = "import sys, pfgm, pfgm.kernels; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    optional = {"triton", "sklearn", "matplotlib", "PIL", "tyro", "pytest"}
    optional |= {"diffusers", "k_diffusion", "torchcfm", "lightning", "accelerate"}
    assert optional & set(shown.stdout.split()) == set()


def test_one_openmp_runtime():
    """The extension must share torch's thread pool, whichever is imported first."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    for imports in ("torch, pfgm._native", "pfgm._native, torch"):
        code = (
            f"import {imports}\n"
            "maps = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
            "print(len([m for m in maps if 'libgomp' in m or 'libomp' in m or 'libiomp' in m]))"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert int(shown.stdout) == 1


def test_no_torch_header_in_the_extension():
    for source in (ROOT / "csrc").rglob("*"):
        if source.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


def test_readme_commands_are_those_that_are_tested():
    text = (ROOT / "README.md").read_text()
    install = "    python3 -m venv .venv && .venv/bin/pip install "
    assert f"{install}'.[demo]' && .venv/bin/pfgm demo\n" in text
    assert f"{install}-e '.[test]' && .venv/bin/pytest -n auto\n" in text


def test_the_readme_shows_the_stored_benchmarks():
    import report  # benchmarks/ is on the path (pyproject.toml)

    text = report.README.read_text()
    assert report.with_report(text) == text, "run python benchmarks/report.py --write"
