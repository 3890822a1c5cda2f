"""The choice of the backend on a GPU by one fact, with stand-ins for two GPUs."""

import ctypes
import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch

import pfgm
from pfgm.backends import choose, native, passes, preferred, products, reference, triton
from pfgm.ops import eager

FIRST, SECOND = (torch.device("cuda", index) for index in range(2))
pytestmark = pytest.mark.skipif(os.environ.get("PFGM_NATIVE") == "0", reason="PFGM_NATIVE=0")
driver = passes.driver


def chosen(device=FIRST, dtype=torch.float32, references=None):
    return choose(None, device, dtype, references)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("gpus")
def test_without_a_pass_torch_computes_and_says_so_once():
    with pytest.warns(RuntimeWarning, match=r"pfgm check.*PFGM_BACKEND=native") as seen:
        assert [chosen(device) for device in (FIRST, SECOND, FIRST)] == [products] * 3
    assert len(seen) == 1
    assert preferred(FIRST) == ("torch", "as native has not passed pfgm check here")


@pytest.mark.parametrize("name", [None, "torch"])
@pytest.mark.filterwarnings("ignore:the backend torch computes")
def test_kernels_that_do_not_compute_are_not_loaded(gpus, monkeypatch, name):
    """A driver that compiles them takes long."""
    monkeypatch.setattr(native._native, "cuda_problem", lambda number: pytest.fail("loaded"))
    if name:
        monkeypatch.setenv("PFGM_BACKEND", name)
    else:
        assert preferred(FIRST)[0] == "torch"
    assert chosen() is products
    assert not eager._takes_native(FIRST)


@pytest.mark.usefixtures("gpus", "silent")
def test_what_is_named_computes_without_a_pass(monkeypatch):
    for name, module in (("native", native), ("triton", triton), ("reference", reference)):
        assert choose(name, FIRST, torch.float32) is module
    monkeypatch.setenv("PFGM_BACKEND", "native")
    assert chosen() is native
    assert eager._takes_native(FIRST)


@pytest.mark.usefixtures("silent")
def test_a_pass_is_that_of_a_kind_of_gpu(gpus):
    passes.store("H100")
    assert chosen(FIRST) is native
    assert eager._takes_native(FIRST)
    assert preferred(FIRST) == ("native", "which has passed pfgm check")
    assert chosen(FIRST, torch.float64) is products
    assert chosen(FIRST, references=torch.float64) is products
    with pytest.warns(RuntimeWarning, match="pfgm check"):
        assert chosen(SECOND) is products
    assert not eager._takes_native(SECOND)
    gpus.kinds[1] = "H100"
    passes._known.clear()
    assert chosen(SECOND) is native


@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.filterwarnings("ignore:the backend torch computes")
def test_ranks_agree_and_each_asks_for_its_own_gpu(gpus, monkeypatch, passed):
    """Processes of torchrun, whose current device is their own. None makes a context on another."""
    gpus.kinds[1] = gpus.kinds[0]
    if passed:
        passes.store(gpus.kinds[0])
    asked = []
    problem, name = native._native.cuda_problem, torch.cuda.get_device_name

    def watched(function):
        return lambda device: asked.append(getattr(device, "index", device)) or function(device)

    monkeypatch.setattr(native._native, "cuda_problem", watched(problem))
    monkeypatch.setattr(torch.cuda, "get_device_name", watched(name))
    for rank, device in enumerate((FIRST, SECOND)):
        gpus.current = rank
        native._able.clear()
        passes._known.clear()
        asked.clear()
        assert chosen(device) is (native if passed else products)
        assert set(asked) == {rank}


@pytest.mark.parametrize("change", ["torch", "driver", "source_digest", "nvcc"])
def test_a_pass_holds_for_one_driver_torch_and_build(gpus, monkeypatch, change):
    passes.store("H100")
    assert change in ("torch", "driver") or change in gpus.info
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif change == "driver":
        gpus.driver += 1
    else:
        gpus.info[change] = "another"
    with pytest.warns(RuntimeWarning, match="pfgm check"):
        assert chosen() is products


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"backend": "native"}'])
def test_a_damaged_file_is_no_pass(content):
    passes.store("H100")
    (file,) = passes._path("H100")[0].parent.iterdir()
    assert json.loads(file.read_text())["gpu"] == "H100"
    file.write_text(content)
    assert not passes.has("H100")
    passes.store("H100")
    assert passes.has("H100")
    passes.take_away("H100")
    passes.take_away("H100")
    assert not passes.has("H100")


@pytest.mark.usefixtures("gpus", "silent")
def test_amd_computes_with_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    passes.store("H100")
    assert chosen() is products
    assert preferred(FIRST) == ("torch", "the first that can run")


def test_a_busy_gpu_is_asked_again(gpus):
    passes.store("H100")
    gpus.problems[0] = "all devices are busy"
    with pytest.warns(RuntimeWarning, match="all devices are busy"):
        assert chosen() is products
    assert preferred(FIRST) == ("torch", "as native cannot run")
    gpus.problems[0] = ""
    assert chosen() is native


@pytest.mark.usefixtures("gpus")
def test_triton_is_by_name_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "_native", None)
    assert chosen(torch.device("cpu")) is products
    assert chosen(FIRST) is products


@pytest.mark.parametrize("found", [True, False])
def test_the_driver_is_known_where_proc_does_not_have_it(gpus, monkeypatch, found):
    """As on WSL2."""

    def version(text, size):
        text.value = b"580.65.06"
        return 0

    def load(name):
        if not found:
            raise OSError(name)
        return SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlSystemGetDriverVersion=version)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(passes, "driver", driver)
    driver.cache_clear()
    assert passes.driver() == ("580.65.06" if found else f"CUDA {gpus.driver}")
    driver.cache_clear()


@pytest.mark.usefixtures("gpus")
def test_a_second_choice_reads_no_file_and_a_cpu_none(monkeypatch):
    passes.store("H100")
    assert chosen() is native
    monkeypatch.setattr(passes, "has", None)
    assert chosen() is native
    monkeypatch.undo()
    monkeypatch.setattr(passes, "native_computes", None)
    monkeypatch.setattr(eager, "enabled", False)
    pfgm.posterior_mean(torch.zeros(2, 3), torch.ones(4, 3), r=1.0)
