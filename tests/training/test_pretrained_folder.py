import json

import pytest
import torch
from safetensors import safe_open

import pfgm


def test_a_folder_in_the_layout_of_hugging_face(tmp_path):
    flow = pfgm.PoissonFlow.from_data(torch.randn(50, 2, 16))
    net = pfgm.networks.UNet(flow.shape, width=16, **flow.scaling)
    torch.nn.init.normal_(net.head.weight)
    pfgm.save_pretrained(tmp_path / "model", flow, net)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "model_index.json",
    }
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["library_name"] == "pfgm"
    assert pfgm.PoissonFlow(**config["flow"]) == flow
    assert pfgm.networks.build(**config["network"]).config == net.config
    with safe_open(tmp_path / "model/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(net.state_dict())
    loaded_flow, loaded = pfgm.from_pretrained(str(tmp_path / "model"))
    assert loaded_flow == flow
    assert not loaded.training
    x, z = torch.randn(3, 2, 16), torch.rand(3)
    for own, other in zip(net(x, z), loaded(x, z), strict=True):
        assert torch.equal(own, other)


def test_a_network_of_another_library(tmp_path):
    flow = pfgm.PoissonFlowPP((3,), D=16)
    pfgm.save_pretrained(tmp_path, flow, torch.nn.Linear(3, 3))
    assert json.loads((tmp_path / "config.json").read_text())["network"] is None
    with pytest.raises(ValueError, match="give the network to load them into"):
        pfgm.from_pretrained(tmp_path)
    flow_again, net = pfgm.from_pretrained(tmp_path, torch.nn.Linear(3, 3))
    assert flow_again == flow
    assert isinstance(net, torch.nn.Linear)


def test_diffusers_says_what_to_call(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    pfgm.save_pretrained(tmp_path, flow, pfgm.networks.MLP((2,), **flow.scaling))
    with pytest.raises(
        AttributeError, match=r"PoissonFlow; pfgm\.from_pretrained reads this folder"
    ):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert pfgm.from_pretrained(tmp_path)[0] == flow


def test_what_is_no_such_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*snapshot_download"):
        pfgm.from_pretrained(tmp_path / "user/model")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        pfgm.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"PoissonFlowPipeline\.from_pretrained reads it"):
        pfgm.from_pretrained(tmp_path)
