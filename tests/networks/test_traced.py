"""Networks outside of plain calls: exported, traced, in replicas and sharded."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import replicate

import pfgm
from pfgm.integrations.flow_matching import as_denoiser
from pfgm.integrations.k_diffusion import as_k_diffusion
from pfgm.networks import MLP, DDPMpp, Denoiser, EDMDenoiser, NCSNpp, Preconditioned, UNet

S = (1, 8, 8)
FIELD, PLUS = pfgm.PoissonFlow(S, data_norm=4.0), pfgm.PoissonFlowPP(S, D=64)
PFGM = {"channels": 1, "resolution": 8, "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1}
PFGM |= {"attn_resolutions": (4,)}
EDM = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
LABELS = {"classes": 3}


class Foreign(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.layer = nn.Conv2d(2, channels, 3, padding=1)

    def forward(self, x, level, labels=None):
        h = self.layer(torch.cat([x, level.view(-1, 1, 1, 1).expand_as(x)], 1))
        return h if labels is None else h + labels.view(-1, 1, 1, 1)


# A network, and whether it takes labels.
NETWORKS = {
    "mlp": (lambda: MLP(S, width=8, depth=1, **LABELS), True),
    "unet": (lambda: UNet((1, 9, 7), width=8, blocks=1), False),
    "unet-patches": (lambda: UNet(S, width=8, blocks=1, patch=2, **LABELS), True),
    "ddpmpp": (lambda: DDPMpp(**PFGM), False),
    "ncsnpp": (lambda: NCSNpp(**PFGM), False),
    "edm": (lambda: EDMDenoiser(1, 8, **EDM, **LABELS), True),
    "edm-unlabelled": (lambda: EDMDenoiser.ncsnpp(1, 8, **EDM, **LABELS), False),
    "denoiser": (lambda: Denoiser("unet", {"shape": S, "width": 8, "blocks": 1, **LABELS}), True),
    "denoiser-ncsnpp": (lambda: Denoiser("ncsnpp", PFGM), False),
    "preconditioned": (lambda: Preconditioned(Foreign()), False),
    "wrapped-denoiser": (lambda: PLUS.network(Foreign(2), no_label=3), False),
    "wrapped-noise": (lambda: PLUS.network(Foreign(), predicts="noise"), False),
    "wrapped-mean-field": (lambda: FIELD.network(Foreign()), False),
    "wrapped-field": (lambda: FIELD.network(Foreign(2), predicts="field"), False),
    "k-diffusion": (lambda: as_k_diffusion(MLP(S, width=8, depth=1), FIELD), False),
    "velocities": (lambda: as_denoiser(lambda t, x: x * t.view(-1, 1, 1, 1)), False),
    "exact": (lambda: FIELD.empirical(torch.randn(9, *S)), False),
}


def prepared(name, batches=(3, 5)):
    """The network with no layer of zeros, and its arguments for each batch."""
    torch.manual_seed(0)
    build, labelled = NETWORKS[name]
    net = build().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    shape = (1, 9, 7) if name == "unet" else S
    arguments = [(torch.randn(b, *shape), torch.rand(b) + 0.1) for b in batches]
    if labelled:
        arguments = [(*each, torch.arange(len(each[0])) % 4 - 1) for each in arguments]
    return net, *arguments


# Others are made of these. Two of them take 3 seconds each; the denoiser has a U-Net too, and EDM's
# network most layers of NCSN++.
MADE = {"ddpmpp", "denoiser-ncsnpp", "edm-unlabelled", "exact", "unet-patches", "wrapped-noise"}
LONG = {"ncsnpp", "unet"}


@pytest.mark.parametrize(
    "name",
    [
        *sorted(NETWORKS.keys() - MADE - LONG),
        *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(LONG)),
    ],
)
def test_an_exported_network_takes_other_batches(name):
    net, few, more = prepared(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in few)
    exported = torch.export.export(net, few, dynamic_shapes=shapes, strict=False).module()
    for arguments in (few, more):
        torch.testing.assert_close(exported(*arguments), net(*arguments))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_takes_other_batches(name):
    net, few, more = prepared(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each check of a shape
        traced = torch.jit.trace(net, few, check_trace=False)
    torch.testing.assert_close(traced(*more), net(*more))


def test_one_hot_labels_are_compiled_without_looking_at_them():
    net, few, _ = prepared("denoiser")
    one_hot = torch.eye(3)[few[2].clamp(min=0)]
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*few[:2], one_hot), net(*few[:2], one_hot))


INNER = {name: NETWORKS[name][0] for name in ("mlp", "unet-patches", "ncsnpp", "edm", "denoiser")}
INNER["denoiser-ncsnpp"] = NETWORKS["denoiser-ncsnpp"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INNER)
def test_a_replica_of_data_parallel_is_the_network(name, dtype, monkeypatch):
    """torch's own replicas, which have no parameters; only the copies between GPUs are replaced."""
    net, few, _ = prepared(name)
    net, (x, level) = net.to(dtype), few[:2]

    def copies(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    # torch.nn.parallel.replicate is the function; its module has the same name.
    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", copies)
    for replica in replicate(net, [0, 1], detach=True):
        assert list(replica.parameters()) == []
        torch.testing.assert_close(replica(x, level), net(x, level), rtol=0, atol=0)


@pytest.fixture
def one_process(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no processes")
@pytest.mark.parametrize("name", INNER)
def test_a_sharded_network_is_the_network(name, one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net, few, _ = prepared(name)
    net, (x, level) = net.double(), few[:2]
    expected = net(x, level)
    sharded = FullyShardedDataParallel(
        net.requires_grad_(), use_orig_params=False, device_id=torch.device("cpu")
    )
    torch.testing.assert_close(sharded(x, level), expected, rtol=0, atol=0)


def test_the_kernel_of_a_published_network_goes_where_the_points_are():
    """Replicas share the module, whose kernel lies on the first GPU."""
    net = NCSNpp(**PFGM)
    moved = {"device": torch.device("meta")}
    assert net.resampling.down(torch.empty(2, 8, 8, 8, **moved)).shape == (2, 8, 4, 4)
