"""csrc/nvcc.py: which nvcc the build takes, and when pip brings one."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH", "PFGM_CUDA", "PFGM_NATIVE")


def executable(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def gpus(path, answer):
    """A stand-in for the driver."""
    executable(path / "nvidia-smi", f"printf '{answer}'")


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """The module, on a machine without a toolkit and without a driver."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    module = importlib.import_module("nvcc")
    monkeypatch.setattr(module, "USUAL_HOME", str(tmp_path / "usual"))
    yield module
    for name in ("nvcc", "build_backend"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("answer", "wanted", "why"),
    [
        ("580.65.06, 9.0\\n", True, "--no-build-isolation"),
        ("610.10, 7.5\\n610.10, 12.0\\n", True, "--no-build-isolation"),
        ("575.57.08, 9.0\\n", False, "NVIDIA drivers from 580 on, not for 575"),
        ("580.65.06, 7.5\\n", False, "no GPU of compute capability 8.0"),
        ("No devices were found\\n", False, "no GPU of compute capability 8.0"),
        (None, False, "no GPU of compute capability 8.0"),
    ],
)
def test_pip_brings_nvcc_where_the_driver_can_use_it(nvcc, tmp_path, answer, wanted, why):
    if answer is not None:
        gpus(tmp_path, answer)
    assert nvcc.requirements() == (list(nvcc.PACKAGES) if wanted else [])
    assert nvcc.settings() == {}
    assert nvcc.why_none().startswith("no nvcc was found")
    assert why in nvcc.why_none()
    assert ";" not in nvcc.why_none()  # which separates a list of CMake


@pytest.mark.parametrize("place", ["CUDACXX", "PATH", "CUDA_HOME", "CUDA_PATH", "usual"])
def test_an_installed_toolkit_compiles(nvcc, tmp_path, monkeypatch, place):
    gpus(tmp_path, "580.65.06, 9.0\\n")
    homes = {"PATH": tmp_path, "usual": tmp_path / "usual" / "bin"}
    path = executable(homes.get(place, tmp_path / "some" / "bin") / "nvcc")
    if place not in homes:
        monkeypatch.setenv(place, path if place == "CUDACXX" else str(tmp_path / "some"))
    assert nvcc.requirements() == []
    assert nvcc.settings() == {"CUDACXX": path}


@pytest.mark.parametrize("name", ["PFGM_CUDA", "PFGM_NATIVE"])
def test_pip_brings_nothing_that_was_turned_off(nvcc, tmp_path, monkeypatch, name):
    gpus(tmp_path, "580.65.06, 9.0\\n")
    monkeypatch.setenv(name, "0")
    assert nvcc.requirements() == []


def test_the_packages_compile_where_they_are_installed(nvcc, tmp_path, monkeypatch):
    home = tmp_path / "site" / "nvidia" / "cu13"
    path = executable(home / "bin" / "nvcc")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LIBRARY_PATH", "/other")
    assert nvcc.settings() == {"CUDACXX": path, "LIBRARY_PATH": f"{home / 'lib'}:/other"}
    assert nvcc.toolkit() is None


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_build_backend_asks_for_the_packages(nvcc, tmp_path, monkeypatch, kind):
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'build-backend = "build_backend"\nbackend-path = ["csrc"]\n' in settings
    gpus(tmp_path, "580.65.06, 9.0\\n")
    backend = importlib.import_module("build_backend")
    hook = f"get_requires_for_build_{kind}"
    monkeypatch.setattr(backend.build_meta, hook, lambda settings: ["wheel"])
    assert getattr(backend, hook)() == ["wheel", *nvcc.PACKAGES]
    assert callable(getattr(backend, f"build_{kind}"))
