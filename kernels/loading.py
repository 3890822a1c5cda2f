"""Loading of compiled kernels while a CUDA graph is captured.

CUDA prohibits calls that a graph would not hold, such as the loading of a module, in a thread that
captures a graph, and by default in all others too. Such a call also ends the capture. A loaded
kernel is needed at every replay and stays loaded, so the graph need not hold its loading. CUDA
permits it in a thread whose capture mode is relaxed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .tuning import interpreted

_DRIVER = "libcuda.so.1"
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _exchange_mode() -> Callable[[Any], int] | None:
    """The driver's function that swaps the calling thread's capture mode with a given one.

    None without NVIDIA's driver.
    """
    if interpreted() or torch.version.hip is not None:
        return None
    try:
        library = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    function = library.cuThreadExchangeStreamCaptureMode
    function.argtypes, function.restype = [ctypes.POINTER(ctypes.c_int)], ctypes.c_int
    result: Callable[[Any], int] = function
    return result


@contextmanager
def loading_permitted() -> Iterator[None]:
    """This thread may load kernels, also while a CUDA graph is captured."""
    exchange = _exchange_mode()
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    if code := exchange(ctypes.byref(mode)):
        raise RuntimeError(
            f"cuThreadExchangeStreamCaptureMode failed with error {code} of the CUDA driver"
        )
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))
