"""Saves and loads networks in wrappers of several processes: python wrapped.py FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pfgm
from pfgm.training.processes import joined


def flow_and_network():
    torch.manual_seed(0)
    flow = pfgm.PoissonFlow((2,), data_norm=1.0)
    return flow, flow.network("mlp", width=16, depth=1)


def sharded_in_place(network):
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    return fully_shard(network)


def fsdp1(network, **options):
    return FullyShardedDataParallel(network, device_id=torch.device("cpu"), **options)


def holding(network):
    """A module of one's own around a wrapped network."""
    return torch.nn.ModuleDict({"net": network})


class Own(torch.nn.Module):
    """A network of a user, whose parts have the names of torch's wrappers."""

    def __init__(self):
        super().__init__()
        self.module, self.last = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp1": fsdp1,
    "fsdp1-names": lambda net: fsdp1(net, use_orig_params=True),
    "fsdp2": sharded_in_place,
    "held-fsdp1": lambda net: holding(fsdp1(net)),
    "held-fsdp2": lambda net: holding(sharded_in_place(net)),
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joined(torch.device("cpu"), timeout=60):
        flow, plain = flow_and_network()
        for name, wrap in WRAPPERS.items():
            path = folder / f"{name}.safetensors"
            for to in (path, folder / name):
                network = wrap(flow_and_network()[1])
                if "fsdp" in name or dist.get_rank() == 0:
                    pfgm.save(to, flow, network)
            dist.barrier()
            for source in (path, folder / name):
                loaded = pfgm.load(source).network
                for key, value in plain.state_dict().items():
                    assert torch.equal(loaded.state_dict()[key], value), (name, key)
            other = flow.network("mlp", width=16, depth=1)  # with other weights
            pfgm.load(path, network := wrap(other))
            dist.barrier()
            if "fsdp" in name or dist.get_rank() == 0:
                pfgm.save(path, flow, network)
            dist.barrier()
            again = pfgm.load(path).network
            for key, value in plain.state_dict().items():
                assert torch.equal(again.state_dict()[key], value), (name, key)
            print(f"rank {dist.get_rank()}: {name} is content")
        torch.manual_seed(0)
        own = Own()
        state = {key: value.clone() for key, value in own.state_dict().items()}
        pfgm.save(folder / "own.safetensors", flow, fully_shard(own))
        dist.barrier()
        loaded = pfgm.load(folder / "own.safetensors", Own()).network.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
