"""The Triton kernels compile without spills, and with tensor cores and 16-byte loads where
intended."""

import importlib.util
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from benchmarks.codegen import triton as codegen
from benchmarks.codegen.rows import Figures

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
    pytest.mark.skipif(codegen.interpreted(), reason="the interpreter does not compile kernels"),
]

WITH_PRODUCTS = tuple(
    f"pfgm.kernels.{name}" for name in ("distances", "posterior_mean", "posterior_mean_backward")
)

FLAWED = """
import triton
import triton.language as tl

from pfgm.kernels.variant import Variant


@triton.jit
def normalise(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    rows = tl.load(x + place[:, None] * SIZE + place)
    tl.store(out + place[:, None] * SIZE + place, rows / tl.sum(rows * rows))


@triton.jit
def product(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    rows = tl.load(x + place[:, None] * SIZE + place)
    product = tl.dot(rows, rows, input_precision="ieee")
    tl.store(out + place[:, None] * SIZE + place, product)


def variant(name, kernel, size, aligned=True, result="out", **options):
    types = {"x": "*fp32", result: "*fp32"}
    divisible = frozenset(types) if aligned else frozenset()
    return Variant(name, kernel, types, {"SIZE": size}, divisible, **options)


def variants():
    return [
        variant("good", normalise, 32),
        variant("spilling", normalise, 128, num_warps=1),
        variant("narrow", normalise, 32, aligned=False),
        variant("narrow as intended", normalise, 32, aligned=False, wide_loads=False),
        variant("without products", product, 32, products=True),
        variant("misspelled", normalise, 32, result="outt"),
    ]
"""


def compiled(variants, capability):
    """Their rows. In this process: each other imports torch and Triton."""
    return [codegen.row_of(variant, capability) for variant in variants]


def assert_as_intended(variants, capability):
    rows = compiled(variants, capability)
    problems = [problem for row in rows for problem in row.problems]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("module", codegen.MODULES)
def test_a_variant_of_every_kernel(module):
    """The first that is listed."""
    every = codegen.variants(module)
    assert any(variant.products for variant in every) == (module in WITH_PRODUCTS)
    assert_as_intended({variant.kernel: variant for variant in reversed(every)}.values(), 90)


# Each module takes a minute to compile if Triton has not kept it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "capability"),
    [*product(codegen.MODULES, (80, 90)), *product(WITH_PRODUCTS, (100, 120))],
)
def test_every_variant(module, capability):
    """Of later architectures, those with products, for which Triton has other instructions."""
    every = codegen.variants(module)
    assert_as_intended([v for v in every if v.products or capability <= 90], capability)


def test_every_module_is_listed():
    with_variants = {
        f"pfgm.kernels.{path.stem}"
        for path in (ROOT / "kernels").glob("*.py")
        if "\ndef variants(" in path.read_text()
    }
    assert with_variants == set(codegen.MODULES)


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flawed")
    (folder / "flawed_kernels.py").write_text(FLAWED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return {row.kernel: row for row in compiled(codegen.variants("flawed_kernels"), 90)}


def test_sizes_of_one_are_compiled_too():
    for module in codegen.MODULES:
        names = {variant.name for variant in codegen.variants(module)}
        kernels = {name.split(",")[0] for name in names}
        smallest = {name for name in names if "sizes of 1" in name}
        assert smallest == {f"{kernel}, sizes of 1" for kernel in kernels}


@pytest.mark.parametrize("kernel", ["good", "narrow as intended"])
def test_kernels_as_intended_pass(flawed, kernel):
    assert flawed[kernel].problems == []
    assert flawed[kernel].figures.spills == 0
    assert 0 < flawed[kernel].figures.registers <= 255


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("spilling", "spills"),
        ("narrow", "no 16-byte loads"),
        ("without products", "no matrix instructions"),
        ("misspelled", "does not compile"),
    ],
)
def test_flaws_are_found(flawed, kernel, words):
    (problem,) = flawed[kernel].problems
    assert words in problem
    assert problem.startswith(f"{kernel} on sm_90")


@pytest.mark.parametrize(
    ("capability", "limit"),
    [(80, 101376), (90, 232448), (100, 232448), (120, 101376)],
)
def test_shared_memory_has_a_limit(capability, limit):
    variant, counts = _variant(), Counter(["ld.global.v4.b32"])
    assert codegen.problems(variant, capability, Figures(64, 0, limit, counts)) == []
    (problem,) = codegen.problems(variant, capability, Figures(64, 0, limit + 1, counts))
    assert f"a block has {limit}" in problem


def test_older_matrix_instructions_are_a_problem_on_hopper():
    figures = Figures(64, 0, 0, Counter({"mma.sync": 8, "ld.global.v4.b32": 1}))
    variant = _variant(products=True)
    assert codegen.problems(variant, 80, figures) == []
    assert "it has mma.sync" in codegen.problems(variant, 90, figures)[0]


def _variant(**options):
    from pfgm.kernels.variant import Variant

    return Variant("some kernel", None, {}, {}, **options)


USAGE = """
 Function prod:
  REG:130 STACK:16 SHARED:1088 LOCAL:8 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTX = """
\t@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
\tcp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;
\t@%p2 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
\t@%p2 ld.global.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];
\tld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
\tld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 + 0 ];
\tst.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
\twgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
\twgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
\twgmma.commit_group.sync.aligned;
\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
"""


def test_the_code_is_read():
    figures = codegen.read_figures(USAGE, PTX, 4096, 90)
    assert (figures.registers, figures.spills, figures.shared) == (130, 24, 4160)
    assert figures.matrix_instructions == {"wgmma.mma_async": 2, "mma.sync": 1}
    assert figures.counts.total() - sum(figures.matrix_instructions.values()) == 3


def test_an_absent_kernel_compiles_to_nothing():
    assert codegen.rows_of([90], only="no such kernel") == []


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        codegen.compile_variant(_variant(), 90)
