"""The network inside wrappers of torch and of other trainers, and inside modules of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType

from torch import fx, jit, nn

_WRAPPERS = ("AveragedModel", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
"""Classes of torch whose attribute ``module`` is the network. By name: importing them all takes a
tenth of a second."""
_NESTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and checkpointing of activations add to the names of parameters."""


def module_of(net: object) -> nn.Module | None:
    """The module that a network calls: itself, or the one behind functools.partial or a method."""
    while isinstance(net, (functools.partial, MethodType)):
        net = net.func if isinstance(net, functools.partial) else net.__self__
    return net if isinstance(net, nn.Module) else None


def network_within(net: object, is_network: Callable[[nn.Module], bool]) -> nn.Module | None:
    """The only module in a network, or the network itself, for which `is_network` holds.

    Modules inside the one that is found are not searched. None if there is none, or several.

    >>> unet, head = nn.Linear(1, 1), nn.ReLU()
    >>> network_within(nn.Sequential(unet, head), lambda each: each is unet) is unet
    True
    """
    module = module_of(net)
    found: dict[int, nn.Module] = {}
    remaining = [] if module is None else [module]
    while remaining:
        module = remaining.pop()
        if is_network(module):
            found[id(module)] = module
        else:
            remaining += module.children()
    return next(iter(found.values())) if len(found) == 1 else None


def hides_its_network(net: object) -> bool:
    """Whether the modules that a network consists of cannot be seen, as in a function.

    A graph that torch.export, torch.fx or torch.jit has recorded holds none of them either.
    """
    module = module_of(net)
    return module is None or isinstance(module, (fx.GraphModule, jit.ScriptModule))


def without_wrappers(network: nn.Module, *, up_to: str = "") -> nn.Module:
    """The network that torch's wrappers hold: of several processes, averages and torch.compile.

    With a name of a class, the outermost wrapper of this class if there is one.
    """
    kinds = {kind.__name__ for kind in type(network).__mro__}
    inner = getattr(network, "module" if kinds & {*_WRAPPERS} else "_orig_mod", None)
    if up_to in kinds or not isinstance(inner, nn.Module):
        return network
    return without_wrappers(inner, up_to=up_to)


def plain_name(name: str) -> str:
    """The name of a parameter without what torch's wrappers of parts of a network add.

    >>> plain_name("_orig_mod.layer._fsdp_wrapped_module.weight")
    'layer.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _NESTED)
