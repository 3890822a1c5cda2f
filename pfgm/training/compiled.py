"""The state of networks that torch.compile wraps, with the names of the plain network.

A compiled module holds the plain one as ``_orig_mod``, which its names in ``state_dict`` begin
with. Files hold plain names, so they load into both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")
_WRAPPED = "_orig_mod"


def without_compile(network: nn.Module) -> nn.Module:
    """The network itself, if torch.compile wraps it."""
    inner = getattr(network, _WRAPPED, None)
    return without_compile(inner) if isinstance(inner, nn.Module) else network


def plain_state(network: nn.Module) -> Mapping[str, Tensor]:
    """The state of a network with plain names."""
    return plain_names(network.state_dict())


def plain_names(state: Mapping[str, T]) -> Mapping[str, T]:
    """The state with plain names, or as it is if two names would become one.

    >>> plain_names({"_orig_mod.layer.weight": 1, "layer._orig_mod.bias": 2})
    {'layer.weight': 1, 'layer.bias': 2}
    """
    plain = {_plain(name): value for name, value in state.items()}
    return state if plain.keys() == state.keys() or len(plain) < len(state) else plain


def load_plain_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state, with names of a plain or of a compiled network, into either."""
    own_names = plain_names({name: name for name in network.state_dict()})
    state_names = plain_names(state)
    if own_names.keys() == state_names.keys():
        state = {own_names[name]: value for name, value in state_names.items()}
    network.load_state_dict(state)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _WRAPPED)
