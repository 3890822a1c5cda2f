import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pfgm
import pfgm_command
from benchmarks import report
from pfgm import cli

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "pfgm").rglob("*.py")
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


OF_ALL_FLOWS = """
    D config decode default_steps defaults denoise empirical encode first_level fit_levels from_data
    grid inpaint interpolate last_level log_likelihood loss network noise perturb prior radius
    rescale sample sigma solve
"""


@pytest.mark.parametrize(
    ("kind", "own"),
    [(pfgm.PoissonFlow, {"cifar10", "field"}), (pfgm.PoissonFlowPP, {"D", "with_D"})],
)
def test_a_flow_has_the_methods_that_are_for_users(kind, own):
    """What other modules of the package use of a flow is private."""
    public = {name for name in dir(kind) if name[0] != "_"}
    assert public | {"D"} == {*OF_ALL_FLOWS.split(), *own}


def test_importing_takes_a_fraction_of_torch_and_no_optional_package():
    """0.05 of its time, and 0.17 if Python collects the garbage of all of torch meanwhile, which
    depends on versions. Nor are Triton, packages of the extras and a compiler imported, nor what
    reads files or asks about GPUs. Only drawing imports matplotlib."""
    code = (
        "import sys, time; start = time.process_time()\n"
        "import torch; middle = time.process_time()\n"
        "import pfgm; end = time.process_time()\n"
        "assert torch.ops.pfgm.posterior_mean\n"
        "import pfgm.kernels\n"
        "print((end - middle) / (middle - start), *sys.modules)\n"
        "import pfgm.plotting\n"
        "assert 'matplotlib' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fraction, *modules = shown.stdout.split()
    optional = {"triton", "sklearn", "matplotlib", "PIL", "tyro", "pytest"}
    optional |= {"diffusers", "k_diffusion", "torchcfm", "lightning", "accelerate", "pandas"}
    optional |= {"scipy", "torchdiffeq", "pfgm.plotting", "pfgm.training", "platformdirs"}
    optional |= {"safetensors", "secrets"}
    optional |= {"pfgm.data.images", "pfgm.data.image_files", "pfgm.data.tables"}
    optional |= {"pfgm.data.columns", "pfgm.data.table_files", "pfgm.data.torch_datasets"}
    published = ("edm_files", "pfgm_files", "safe_pickle")
    optional |= {f"pfgm.networks.published.{name}" for name in published}
    assert optional & set(modules) == set()
    assert float(fraction) < 0.3


# The names that the package gives to its lazy modules, the extension and the kernels.
BY_STRING = {
    "__init__.py": ["f'{__name__}.training.model_files'", "f'{__name__}.{name}'"],
    "backends/native.py": ["'pfgm._native'"],
    "backends/triton.py": ["'triton'", "f'..kernels.{name}'"],
    "common/optional.py": ["module"],
}
IMPORTERS = {"import_module", "__import__", "run_module", "exec", "optional"}


def imports_by_string(source):
    """What is imported where the linter of layers does not see it."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    for call in calls:
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        given = ast.unparse(call.args[0]) if call.args else ""
        other_package = name == "optional" and given[0] in "'\"" and given[1:5] != "pfgm"
        if name in IMPORTERS and not other_package:
            yield given


def test_nothing_else_is_imported_by_string():
    for line in ('importlib.import_module("pfgm.flows")', '__import__("pfgm")'):
        assert list(imports_by_string(line)) != []
    found = {}
    for path in sorted((ROOT / "pfgm").rglob("*.py")):
        if names := sorted(imports_by_string(path.read_text())):
            found[path.relative_to(ROOT / "pfgm").as_posix()] = names
    assert found == BY_STRING


def run_command(*arguments):
    """Runs the command as its script does. Returns its output and the imported modules."""
    code = (
        "import importlib.metadata, sys\n"
        "(script,) = importlib.metadata.entry_points(group='console_scripts', name='pfgm')\n"
        "code = script.load()()\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    # Not in the tree, because its metadata may be from an earlier build.
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=sys.prefix,
    )
    return shown.stdout, set(shown.stderr.split())


def test_help_and_version_need_no_torch(capsys):
    for option in ("--help", "--version", "-h"):
        shown, modules = run_command(option)
        assert modules & {"torch", "numpy", "pfgm"} == set()
        with contextlib.suppress(SystemExit):
            cli.main([option])
        # Frames depend on the stream.
        assert re.findall(r"\w[\w.-]*", shown) == re.findall(r"\w[\w.-]*", capsys.readouterr().out)


def test_the_version_is_the_same_everywhere():
    """In the package, as installed too, the citation and the newest section of the changelog, and
    so is its date."""
    assert pfgm.__version__ == importlib.metadata.version("pfgm")
    citation = (ROOT / "CITATION.cff").read_text()
    (version,) = re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE)
    date = re.findall(r'^date-released: "(.*)"$', citation, flags=re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## (\d.*)$", changelog, flags=re.MULTILINE)[0]
    assert version == pfgm.__version__
    assert newest == f"{version} — {date[0] if date else 'unreleased'}"


def test_workflows_pin_actions_and_call_recipes():
    """Actions are named by their commit, and what a workflow runs is what `just` runs."""
    justfile = (ROOT / "justfile").read_text()
    recipes = re.findall(r"^(\w+)(?: \*args.*)?:$", justfile, flags=re.MULTILINE)
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        text = path.read_text()
        for action in re.findall(r"uses: (.*)", text):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), (path.name, action)
        for command in re.findall(r"- run: (.*)", text):
            just = re.fullmatch(r"just (\w+)", command)
            assert just or re.match(r"pipx? install rust-just", command), (path.name, command)
            assert just is None or just[1] in recipes, (path.name, command)


def test_the_command_hands_over_what_is_not_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pfgm", "info"])
    assert pfgm_command.main() == 0
    shown = capsys.readouterr().out
    assert "native: C++ on the CPU" in shown or "PFGM_NATIVE=0" in shown


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_ends_quietly_where_nobody_reads_it(option):
    command = f"{sys.executable} -c 'import sys, pfgm_command; sys.exit(pfgm_command.main())'"
    for reader in ("| true", "| head -1", ">&-"):
        shown = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{command} {option} {reader}"],
            capture_output=True,
            text=True,
        )
        assert (shown.returncode, shown.stderr) == (0, "")


def test_one_openmp_runtime():
    """Also run with the installed wheel and the oldest torch by .ci/run."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    if importlib.util.find_spec("pfgm._native") is None:
        pytest.skip("needs the extension")
    script = ROOT / "tests/project/one_openmp.py"
    shown = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_no_torch_header_in_the_extension():
    for source in (ROOT / "csrc").rglob("*"):
        if source.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


def test_readme_commands_are_those_that_are_tested():
    text = (ROOT / "README.md").read_text()
    install = "    python3 -m venv .venv && .venv/bin/pip install "
    sample = ".venv/bin/pfgm sample avatars --n 100 --guidance 1.2 --out samples.png"
    assert f"{install}'.[demo]' && {sample}\n" in text
    assert f"{install}'.[demo]' && .venv/bin/pfgm demo\n" in text
    assert f"{install}-e '.[test]' && .venv/bin/pytest -n auto\n" in text


def test_the_wheel_has_all_files_of_the_package():
    """Weights, and the credits of what they were trained on."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^\[tool\.setuptools\.package-data\]\npfgm = (\[.*?\])$", text, re.M | re.S)
    package = ROOT / "pfgm"
    packed = {path for pattern in ast.literal_eval(listed[1]) for path in package.glob(pattern)}
    code = (".py", ".pyc", ".so", ".pyd")
    assert packed == {
        path for path in package.rglob("*") if path.is_file() and path.suffix not in code
    }


def test_the_page_shows_the_stored_benchmarks():
    assert report.page() == report.PAGE.read_text(), "run python -m benchmarks.report --write"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout in which nothing is compiled, and a folder with an installed package."""
    if importlib.util.find_spec("pfgm._native") is None:
        pytest.skip("needs the extension")
    sources, site = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site")
    python = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for name in ("pfgm", "csrc", "kernels"):
        shutil.copytree(ROOT / name, sources / name, ignore=python)
    shutil.copy(ROOT / "CMakeLists.txt", sources)
    shutil.copytree(ROOT / "pfgm", site / "pfgm", ignore=python)
    shutil.copytree(ROOT / "kernels", site / "pfgm" / "kernels", ignore=python)
    shutil.copy(importlib.util.find_spec("pfgm._native").origin, site / "pfgm")
    return sources, site


@pytest.mark.parametrize("changed", [False, True])
def test_python_started_in_a_checkout_finds_what_is_installed(checkout, changed):
    """Unless it was compiled from other sources."""
    sources, site = checkout
    (sources / "csrc" / "cpu" / "added.h").unlink(missing_ok=True)
    if changed:
        (sources / "csrc" / "cpu" / "added.h").touch()
    script = (
        "import pfgm; print(pfgm.__file__); print(pfgm.backends.available()['native'].usable);"
        "import pfgm.kernels"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        cwd=sources,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == [str(sources / "pfgm" / "__init__.py"), str(not changed)]
    assert ("other sources than those of this checkout" in shown.stderr) is changed
