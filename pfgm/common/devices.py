"""Devices by name."""

from __future__ import annotations

import warnings

import torch

_MAX_REASON = 200  # characters of torch's own message


def usable_device(name: str) -> torch.device:
    """The device of this name; "auto" is cuda if there is a GPU, else cpu.

    Raises ValueError if there is no such device, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about deprecated device names
        device = known_device(name, "auto")
    try:
        # Reading a value fails on "meta", which holds no values.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(_device_message(name, _device_reason(error), "auto")) from error
    return device


def known_device(device: object, *others: str) -> torch.device:
    """The device, of itself or its name, if torch knows it and this machine has it.

    Raises ValueError if there is no such device. The error lists ``others`` beside the devices.
    """
    try:
        result: torch.device = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        reason = "torch has no such device."
        raise ValueError(_device_message(device, reason, *others)) from error
    if (missing := _missing(result)) is not None:
        raise ValueError(_device_message(device, missing, *others))
    return result


def _missing(device: torch.device) -> str | None:
    """What this machine lacks for a device; None if torch finds it or cannot tell."""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "torch finds no GPU of Apple."
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU that it can use."
    if device.type == "cuda" and (device.index or 0) >= (gpus := torch.cuda.device_count()):
        return f"torch finds {gpus} of these, numbered from 0."
    return None


def _device_message(device: object, reason: str, *others: str) -> str:
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names += ["mps"] if torch.backends.mps.is_available() else []
    names += others
    one_of = "one of " if len(names) > 1 else ""
    shown = str(device) if isinstance(device, torch.device) else device
    return f"device must be {one_of}{', '.join(names)}, got {shown!r}: {reason}"


def _device_reason(error: Exception) -> str:
    """Torch's reason why a device cannot be used, in one sentence."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return reason if len(reason) <= _MAX_REASON else f"{reason.partition('. ')[0][:_MAX_REASON]}."
