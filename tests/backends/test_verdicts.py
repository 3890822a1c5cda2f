"""The choice of the backend on a GPU, by verdicts of all kinds, with a stand-in for the GPU."""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

import pfgm
from pfgm.backends import (
    Unavailable,
    choose,
    choose_for,
    native,
    preferred,
    products,
    reference,
    triton,
    verdicts,
)
from pfgm.backends.verdicts import SIZES
from pfgm.ops import eager

CUDA = torch.device("cuda", 0)
DIGITS, CIFAR, FASHION = (math.prod(sizes) for sizes in SIZES.values())
pytestmark = pytest.mark.skipif(os.environ.get("PFGM_NATIVE") == "0", reason="PFGM_NATIVE=0")


@pytest.fixture(autouse=True)
def _with_cuda(monkeypatch):
    """The extension is one with kernels for a GPU."""
    monkeypatch.delenv("PFGM_BACKEND", raising=False)
    extension = native._native
    info = {**extension.build_info(), "cuda_architectures": "90a-real"}
    stand_in = SimpleNamespace(build_info=lambda: info, cpu_isa=extension.cpu_isa)
    monkeypatch.setattr(native, "_native", stand_in)


def chosen(work=DIGITS, dtype=torch.float32, references=None):
    return choose(None, CUDA, dtype, references, work)


# ---- without a verdict -------------------------------------------------------------------------


def test_without_a_verdict_torch_computes_and_says_so_once(gpu):
    with pytest.warns(RuntimeWarning, match=r"backend torch.* pfgm check --device cuda:0") as seen:
        assert all(chosen(work) is products for work in (1, DIGITS, CIFAR, FASHION))
    assert len(seen) == 1
    gpu(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(None, torch.device("cpu"), torch.float32) is not products
        for name, module in (("native", native), ("triton", triton), ("reference", reference)):
            assert choose(name, CUDA, torch.float32) is module


@pytest.mark.usefixtures("gpu")
def test_the_environment_is_obeyed_without_a_verdict(monkeypatch):
    monkeypatch.setenv("PFGM_BACKEND", "native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() is native
        assert eager._takes_native(CUDA, "step", (torch.zeros(2, 3), None))


@pytest.mark.usefixtures("gpu")
def test_nothing_is_said_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(verdicts, "_has_kernels", lambda device: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() is products
    assert not verdicts.needed(CUDA)


# ---- verdicts of all kinds ---------------------------------------------------------------------


def test_each_class_of_shapes_has_the_fastest_backend(gpu, verdict):
    gpu(verdict(digits=(1, 2, 3, 0), CIFAR_10=(1, 3, 2, 0), Fashion_MNIST=(3, 2, 1, 0)))
    assert [chosen(work) for work in (DIGITS, CIFAR, FASHION)] == [products, triton, native]
    assert chosen(0) is products
    assert chosen(10**15) is native
    between = math.sqrt(DIGITS * CIFAR)  # as far from both
    assert chosen(int(between) - 1) is products
    assert chosen(int(between) + 1) is triton
    assert preferred(CUDA, FASHION) == ("native", "the fastest of those that passed pfgm check")


def test_the_class_comes_from_points_and_references(gpu, verdict):
    gpu(verdict(digits=(1, 2, 3, 0), CIFAR_10=(1, 3, 2, 0), Fashion_MNIST=(3, 2, 1, 0)))
    for (B, M, N), name, module in zip(
        SIZES.values(), ("torch", "triton", "native"), (products, triton, native), strict=True
    ):
        sizes = {"device": CUDA, "dtype": torch.float32, "is_cuda": True}
        x = SimpleNamespace(numel=lambda B=B, N=N: B * N, **sizes)
        references = SimpleNamespace(shape=(M, N), dtype=torch.float32)
        assert choose_for(None, x, references) is module
        assert choose_for(None, x) is products  # a step
        shapes = torch.empty(B, N, device="meta"), torch.empty(M, N, device="meta")
        assert eager._takes_native(CUDA, "field", (*shapes, 1.0)) == (name == "native")
        assert not eager._takes_native(CUDA, "step", shapes)


def test_a_backend_that_failed_is_left_out(gpu, verdict):
    failures = {"native": "field: the process was ended by SIGSEGV"}
    speeds = dict.fromkeys(("digits", "CIFAR_10", "Fashion_MNIST"), (9, 2, 1, 0))
    partial = verdict(("triton", "torch", "reference"), failures, **speeds)
    gpu(partial)
    assert [chosen(work) for work in (DIGITS, CIFAR, FASHION)] == [triton] * 3
    assert "native failed (field: the process was ended by SIGSEGV)" in str(partial)
    assert choose("native", CUDA, torch.float32) is native


def test_what_the_fastest_cannot_read_is_left_to_the_next(gpu, verdict):
    gpu(verdict(digits=(9, 2, 1, 0.1)))
    assert chosen() is native
    assert chosen(references=torch.float64) is products
    assert chosen(dtype=torch.float64) is products


def test_a_quick_check_decides_for_large_problems_by_smaller_ones(gpu, verdict):
    gpu(verdict(quick=True, digits=(1, 2, 3, 0), CIFAR_10=(1, 3, 2, 0)))
    assert [chosen(work) for work in (DIGITS, CIFAR, FASHION)] == [products, triton, triton]


def test_nothing_computes_that_has_not_passed(gpu, verdict):
    gpu(verdict(("native",), {"torch": "wrong"}))
    assert chosen() is native
    with pytest.raises(Unavailable, match=r"float64 has passed pfgm check on cuda:0.*PFGM_BACKEND"):
        chosen(dtype=torch.float64)
    gpu(verdict((), {"torch": "wrong"}))
    with pytest.raises(Unavailable, match="no backend"):
        chosen()
    assert not eager._takes_native(CUDA, "step", (torch.zeros(2, 3), None))
    assert preferred(CUDA)[0] == "none"
    with pytest.raises(TypeError, match=r"x has dtype torch\.float16"):
        chosen(dtype=torch.float16)


# ---- the file ----------------------------------------------------------------------------------


def test_another_process_reads_what_was_kept(gpu, verdict):
    whole = verdict(("triton", "torch"), {"native": "steps: off"}, digits=(1, 2.5, 1.5, 0))
    file = verdicts._path("Stand-in")
    assert verdicts.keep(CUDA, whole) == f"The verdict is kept in {file}."
    assert json.loads(file.read_text())["conditions"]["device"] == "Stand-in"
    gpu(None)
    assert verdicts.find(CUDA) == whole
    assert chosen() is triton
    assert not verdicts.needed(CUDA)


@pytest.mark.parametrize("change", ["torch", "driver", "sources", "GPU", "extension"])
@pytest.mark.usefixtures("gpu")
def test_a_verdict_holds_for_one_gpu_driver_and_version(gpu, verdict, monkeypatch, change):
    verdicts.keep(CUDA, verdict())
    gpu(None)
    verdicts._conditions.cache_clear()
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif change == "GPU":
        monkeypatch.setattr(verdicts, "_kind", lambda device: "Another")
    elif change == "extension":
        monkeypatch.setattr(native, "_native", SimpleNamespace(build_info=lambda: {"other": 1}))
    else:
        monkeypatch.setattr(verdicts, f"_{change}", lambda: "another")
    assert verdicts.find(CUDA) is None
    monkeypatch.undo()
    verdicts._conditions.cache_clear()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"passed": 3}', '{"speeds": {"digits": 2}}'])
def test_a_damaged_file_is_no_verdict(gpu, verdict, content):
    said = verdicts.keep(CUDA, verdict())
    gpu(None)
    verdicts._path("Stand-in").write_text(content)
    assert verdicts.find(CUDA) is None
    assert verdicts.keep(CUDA, verdict()) == said
    gpu(None)
    assert verdicts.find(CUDA) == verdict()


def test_where_nothing_can_be_kept_this_is_said(gpu, verdict, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setattr(verdicts.platformdirs, "user_cache_dir", lambda name: blocked / name)
    said = verdicts.keep(CUDA, verdict(digits=(9, 2, 1, 0)))
    assert "not kept, and holds for this process alone" in said
    assert str(blocked) in said
    assert chosen() is native
    gpu(None)
    assert verdicts.find(CUDA) is None


def test_a_quick_check_does_not_clear_what_a_whole_one_found(gpu, verdict):
    verdicts.keep(CUDA, verdict(("torch", "reference"), {"native": "slices: off"}))
    verdicts.keep(CUDA, verdict(quick=True, digits=(9, 2, 1, 0)))
    assert verdicts.find(CUDA).passed == ("triton", "torch", "reference")
    assert verdicts.find(CUDA).failures == {"native": "slices: off"}
    verdicts.keep(CUDA, verdict(quick=True))
    assert "native" not in verdicts.find(CUDA).passed
    verdicts.keep(CUDA, verdict(digits=(9, 2, 1, 0)))
    assert chosen() is native


def test_several_processes_write_and_read_one_file(gpu, verdict):
    """Threads that know nothing of each other stand for them."""
    kinds = [verdict(digits=(k, 2, 1, 0)) for k in range(1, 5)]
    verdicts.keep(CUDA, kinds[0])
    wrong = []

    def work(own):
        for _ in range(20):
            verdicts.keep(CUDA, own)
            if verdicts._read("Stand-in") not in kinds:
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [path.suffix for path in verdicts.folder().iterdir()] == [".json"]


# ---- the cost ----------------------------------------------------------------------------------


def test_a_second_choice_reads_no_file(gpu, verdict, monkeypatch):
    gpu(verdict(digits=(9, 2, 1, 0)))
    chosen()
    monkeypatch.setattr(verdicts, "find", None)
    monkeypatch.setattr(verdicts, "_kind", None)
    assert chosen() is native
    assert eager._takes_native(CUDA, "step", (torch.zeros(2, 3), None))


def test_a_cpu_asks_for_no_verdict(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(verdicts, "order", None)
    x, references = torch.zeros(2, 3), torch.ones(4, 3)
    pfgm.posterior_mean(x, references, r=1.0)
    monkeypatch.setattr(eager, "enabled", False)
    pfgm.posterior_mean(x, references, r=1.0)
