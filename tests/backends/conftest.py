"""Stand-ins for GPUs: torch and the extension find two, of two kinds."""

from types import SimpleNamespace

import platformdirs
import pytest
import torch

from pfgm.backends import native, passes

KINDS = ("H100", "A100")


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two GPUs that run the kernels, without a pass, and their state: what is wrong with each, the
    driver and the current device. The cache folder is a temporary one."""
    state = SimpleNamespace(problems=["", ""], driver=13000, current=0, kinds=list(KINDS))

    def index(device):
        number = torch.device(device).index if isinstance(device, (str, torch.device)) else device
        return state.current if number is None else number

    extension = native._native
    info = {**extension.build_info(), "cuda_architectures": "80"} if extension else {}
    stand_in = SimpleNamespace(
        build_info=lambda: info,
        cpu_isa=lambda: "stand-in",
        cuda_problem=lambda number: state.problems[number],
        cuda_versions=lambda: (13000, state.driver),
    )
    for name, function in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: state.current,
        "get_device_name": lambda device=None: state.kinds[index(device)],
        "get_device_capability": lambda device=None: (8, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(native, "_native", stand_in)
    monkeypatch.setattr(native, "_able", set())
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(passes, "_known", {})
    monkeypatch.setattr(passes, "driver", lambda: f"{state.driver}")
    monkeypatch.delenv("PFGM_BACKEND", raising=False)
    passes._warn_once.cache_clear()
    native._warn_of_unused_gpu.cache_clear()
    state.info = info
    return state


@pytest.fixture
def proven(monkeypatch):
    """Native has passed on every GPU."""
    monkeypatch.setattr(passes, "has", lambda kind: True)
    monkeypatch.setattr(passes, "_known", {})
    monkeypatch.setattr(passes, "kind_of", lambda device: "Stand-in")
