"""The state of a network, whatever wraps it, with the names of the plain network.

Wrappers of torch add parts to the names in ``state_dict``, and FSDP gives each process a part of
the values. Files hold plain names and whole values, so they load with and without the wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..common.wrappers import network_within, plain_name, without_wrappers
from ..networks import NETWORKS

T = TypeVar("T")
_FSDP1 = "FullyShardedDataParallel"


def name_of(network: nn.Module) -> str | None:
    """The name in NETWORKS of a network or of one in torch's wrappers; None for any other."""
    kind = type(without_wrappers(network))
    if kind.__name__.startswith("FSDP") and len(kind.__bases__) == 2:
        kind = kind.__bases__[1]  # the class of the network, beside FSDPModule of fully_shard
    return next((name for name, known in NETWORKS.items() if kind is known), None)


def network_to_save(network: nn.Module) -> nn.Module:
    """The network whose weights a file holds, in the wrappers of torch that hold nothing else.

    For a module of one's own it is the only network of :mod:`pfgm.networks` inside, if all
    parameters and buffers are in that one; else the module itself.
    """
    inner = network_within(network, lambda each: name_of(each) is not None)
    if inner is None or _tensors(network) != _tensors(inner):
        return network
    return inner


def _tensors(network: nn.Module) -> set[int]:
    parts = [part for part in network.modules() if not isinstance(part, AveragedModel)]
    buffers = (buffer for part in parts for buffer in part.buffers(recurse=False))
    return {id(tensor) for tensor in (*network.parameters(), *buffers)}


def plain_state(network: nn.Module) -> Mapping[str, Tensor]:
    """The state of a network with plain names.

    Of a network that FSDP shards, all processes must ask for the state; the first one gets it, and
    the others get an empty one.
    """
    if is_sharded(network):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        # FSDP1 loses parameters that are on the CPU already if they are offloaded to it.
        offload = any(not parameter.is_cpu for parameter in network.parameters())
        whole = StateDictOptions(full_state_dict=True, cpu_offload=offload)
        sharded = without_wrappers(network, up_to=_FSDP1)
        state: dict[str, Any] = get_model_state_dict(sharded, options=whole)
        return plain_names(state) if dist.get_rank() == 0 else {}
    return plain_names(without_wrappers(network).state_dict())


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP has split the parameters among processes."""
    kinds = {kind.__name__ for part in network.modules() for kind in type(part).__mro__}
    return bool(kinds & {_FSDP1, "FSDPModule"})


def plain_names(state: Mapping[str, T]) -> Mapping[str, T]:
    """The state with plain names, or as it is if two names would become one.

    >>> plain_names({"_orig_mod.layer.weight": 1, "layer._orig_mod.bias": 2})
    {'layer.weight': 1, 'layer.bias': 2}
    """
    plain = {plain_name(name): value for name, value in state.items()}
    return state if plain.keys() == state.keys() or len(plain) < len(state) else plain


def load_plain_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state, with plain names or those of a compiled network, into a network in wrappers.

    A state that fits a module of one's own as a whole goes into the whole. Into a network that FSDP
    shards, all processes must load.
    """
    if is_sharded(network):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        inner = without_wrappers(network_to_save(network), up_to=_FSDP1)
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(inner, dict(plain_names(state)), options=whole)
        return
    state_names = plain_names(state)
    for target in (network, without_wrappers(network), without_wrappers(network_to_save(network))):
        own_names = plain_names({name: name for name in target.state_dict()})
        if own_names.keys() == state_names.keys():
            named = {own_names[name]: value for name, value in state_names.items()}
            target.load_state_dict(named)
            return
    without_wrappers(network_to_save(network)).load_state_dict(state)  # raises what is missing


@torch.no_grad()
def update_average(averaged: nn.Module, network: nn.Module, ema: float, step: int) -> None:
    """A moving average with warm-up: the decay at step t is min(ema, (1 + t)/(10 + t)).

    At step 0 it is the network. Tensors that are not trained may hold infinity, as the masks of
    attention do. Values that have not changed stay, as the average of two infinities is NaN.
    """
    weight = 1 - min(ema, (1 + step) / (10 + step))
    # By name, as the network may have made buffers for itself since.
    current = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, mean in chain(averaged.named_parameters(), averaged.named_buffers()):
        value = current[name]
        if step == 0 or not (mean.is_floating_point() or mean.is_complex()):
            mean.copy_(value)
        elif value.requires_grad:
            mean.lerp_(value, weight)
        else:
            mean.copy_(torch.where(mean == value, mean, mean.lerp(value, weight)))
