"""The network inside wrappers: for the weights of the loss, gamma, and files."""

import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import pfgm
from benchmarks.common.problems import seeded

FLOW = pfgm.PoissonFlow((2,), data_norm=1.0)
POINTS = torch.randn(16, 2, generator=seeded(0))


class Own(nn.Module):
    """A module of a user around a network, perhaps with values of its own."""

    def __init__(self, net, **tensors):
        super().__init__()
        self.net = net
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x, z):
        return self.net(x, z)


def lightning(net):
    import lightning

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, z):
            return self.net(x, z)

    return Training()


def compiled(net):
    return torch.compile(net, backend="eager")


MODULES = {
    "compile": compiled,
    "average": AveragedModel,
    "parallel": nn.DataParallel,
    "own": Own,
    "lightning": lightning,
    "nested": lambda net: Own(compiled(AveragedModel(net))),
}
WRAPPERS = {
    **MODULES,
    "partial": functools.partial,
    "method": lambda net: net.forward,
}


def network(seed=0, flow=FLOW):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return flow.network("mlp", width=8, depth=1)


def loss(net, **options):
    return FLOW.loss(net, POINTS, generator=seeded(1), **options).detach()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_loss_weighs_a_wrapped_network_as_the_plain_one(wrap):
    net = network()
    balanced, published = (loss(net, weighting=each) for each in ("balanced", "published"))
    assert balanced != published
    torch.testing.assert_close(loss(wrap(net)), balanced)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_gamma_is_checked_inside(wrap, refused):
    other = network(flow=pfgm.PoissonFlow((2,), data_norm=1.0, gamma=2.0))
    refused(lambda: loss(wrap(other)), "net must have the gamma of the flow…fits.")


def test_a_network_that_cannot_be_seen_warns_once_of_its_weights():
    net = network()
    exported = torch.export.export(net, (POINTS, torch.rand(16))).module()
    for hidden in (lambda x, z: net(x, z), exported):
        with pytest.warns(UserWarning, match="hides its network.*weighting='balanced'") as warned:
            assert loss(hidden) == loss(net, weighting="published")
        assert len(warned) == 1
    assert loss(lambda x, z: net(x, z), weighting="balanced") == loss(net)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_network_of_ones_own_predicts_the_field_and_does_not_warn():
    class Direct(nn.Module):
        def forward(self, x, z):
            return 0 * x, 0 * z

    assert loss(Direct()) == loss(Direct(), weighting="published")
    loss(lambda x, z: (0 * x, 0 * z), weighting="published")


@pytest.mark.parametrize("wrap", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_a_wrapped_network_is_saved_as_the_plain_one(tmp_path, wrap, name):
    net, path = network(), tmp_path / name
    pfgm.save(path, FLOW, wrap(net))
    for loaded in (pfgm.load(path).network, pfgm.load(path, other := wrap(network(1))).network):
        assert loaded is other or type(loaded) is type(net)
        for ours, theirs in zip(loaded.parameters(), net.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_module_with_values_of_its_own_is_saved_whole(tmp_path, refused):
    path = tmp_path / "own.safetensors"
    pfgm.save(path, FLOW, Own(network(), shift=torch.ones(2)))
    refused(lambda: pfgm.load(path), "…give the network to load them into.")
    loaded = pfgm.load(path, Own(network(1), shift=torch.zeros(2))).network
    assert torch.equal(loaded.shift, torch.ones(2))
    assert torch.equal(next(loaded.net.parameters()), next(network().parameters()))


def test_of_two_networks_inside_none_is_taken(tmp_path, refused):
    two = nn.ModuleList([network(), network(1)])
    pfgm.save(tmp_path / "two.safetensors", FLOW, two)
    path = tmp_path / "two.safetensors"
    refused(lambda: pfgm.load(path), "…give the network to load them into.")


def test_what_does_not_fit_is_said_by_name(tmp_path):
    pfgm.save(tmp_path / "net.safetensors", FLOW, network())
    with pytest.raises(ValueError, match="cannot be loaded into network"):
        pfgm.load(tmp_path / "net.safetensors", Own(nn.Linear(2, 2)))


@pytest.mark.parametrize("wrap", [functools.partial, lambda net: net.forward])
def test_a_network_behind_a_call_is_in_evaluation_mode_while_it_samples(wrap):
    net, modes = network().train(), []
    net.register_forward_hook(lambda module, *_: modes.append(module.training))
    call = wrap(net) if wrap is functools.partial else net.__call__
    FLOW.sample(call, 3, steps=2)
    assert modes
    assert not any(modes)
    assert net.training


def test_the_trainer_refuses_a_network_that_is_sharded(refused):
    class FSDPModule:
        """As torch.distributed.fsdp adds it to the class of a network."""

    class FSDPMLP(FSDPModule, pfgm.networks.MLP):
        pass

    sharded = FSDPMLP((2,), gamma=FLOW.gamma)
    refused(
        lambda: pfgm.training.Trainer(FLOW, sharded, POINTS),
        "TypeError: network must be whole in each process, got one …with flow.loss.",
    )


def test_the_loss_of_a_function_compiles_as_one_graph():
    net = network()

    def compute():
        return FLOW.loss(lambda x, z: net(x, z), POINTS)

    assert torch.compile(compute, fullgraph=True, backend="eager")().isfinite()
