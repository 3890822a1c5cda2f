"""Launches of kernels, prepared once a class of arguments.

Triton's own launch looks at each argument, at the options and at the environment in Python, which
takes longer than most kernels here run. What it finds depends on a few facts about the arguments.
So the first launch with these facts is Triton's own, the compiled kernel is kept, and later ones
launch that kernel at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from .tuning import Config
from .variant import FP_FUSION

NO_SIZES = Config({})
KEPT = 1 << 10
"""Launches of each kind that are kept, so that their arguments are not put together again."""

_LARGEST_INT32 = 2**31 - 1
# What a launcher of Triton is called with. Triton 3.6 to 3.9 agree, and hide the second part from
# the launcher's signature in 3.6.
_FRONT = ["gridX", "gridY", "gridZ", "stream", "function"]
_HOOKS = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]


class _Prepared(NamedTuple):
    """A compiled kernel on one device."""

    run: Callable[..., None]
    function: int
    metadata: Any
    kernel: CompiledKernel
    """Kept because its end unloads the function."""


def _can_be_prepared(compiled: Any) -> bool:
    # Triton may leave the compilation to another thread, or a hook may refuse it. On AMD's GPUs it
    # also looks at the size of a tensor's memory.
    return (
        isinstance(compiled, CompiledKernel)
        and compiled.metadata.target.backend == "cuda"
        and _known_launcher(compiled.run.__class__)
    )


@functools.lru_cache(1 << 14)
def size_class(size: int) -> int:
    """A number that is the same for sizes that Triton does not tell apart.

    Triton asks whether a size is 1, whether it is a multiple of 16, and whether it fits in 32 bits.
    """
    if size < 16:
        return size
    return 16 + size % 16 + (32 if size > _LARGEST_INT32 else 0)


@functools.cache
def _known_launcher(launcher: Any) -> bool:
    """Whether a launcher takes the arguments that Triton's own launch gives it in these versions.

    Those of other versions may differ. Their kernels are left to Triton.
    """
    _, *parameters = inspect.signature(launcher.__call__).parameters.values()
    names = [one.name for one in parameters if one.kind is not inspect.Parameter.VAR_POSITIONAL]
    ends_openly = len(names) == len(parameters) - 1
    return ends_openly and names in (_FRONT, _FRONT + _HOOKS)


def _watched() -> bool:
    """Whether Triton must see a launch: hooks are set, or code is compiled in another way."""
    runtime = knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


class Launcher:
    """Launches a kernel whose parameters are tensors, then integers, then other numbers, then
    constants, of which the last are those of a :class:`Config`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._prepared: dict[Hashable, _Prepared] = {}
        self._compiles = isinstance(kernel, JITFunction)  # and does not interpret

    def __call__(
        self,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...] = (),
        numbers: tuple[float, ...] = (),
        flags: tuple[bool | int | str, ...] = (),
        config: Config = NO_SIZES,
    ) -> Launch:
        """A launch with these arguments. Flags are the constants before those of the config."""
        return Launch(self, grid, sizes, numbers, flags, config)


class Launch:
    """A launch of a kernel, complete but for its tensors. It may be kept and repeated."""

    def __init__(
        self,
        launcher: Launcher,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...],
        numbers: tuple[float, ...],
        flags: tuple[bool | int | str, ...],
        config: Config,
    ) -> None:
        self.launcher, self.grid, self.config = launcher, grid, config
        self.arguments = (*sizes, *numbers, *flags, *config.values)
        self._class = (*map(size_class, sizes), flags, config.key)

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launches on the current device and stream. None stands for a tensor that the kernel does
        without."""
        launcher = self.launcher
        if not launcher._compiles or launcher.kernel.pre_run_hooks or _watched():
            self._by_triton(tensors)
            return
        active = driver.active
        device = active.get_current_device()
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        kinds: list[Any] = [None if tensor is None else tensor.dtype for tensor in tensors]
        if reduce(or_, filter(None, addresses), 0) & 15:
            kinds += [address is not None and address & 15 for address in addresses]
        key = (device, self._class, *kinds)
        prepared = launcher._prepared.get(key)
        if prepared is None:
            found = self._by_triton(tensors)
            if _can_be_prepared(found):
                launcher._prepared[key] = _Prepared(
                    found.run, found.function, found.packed_metadata, found
                )
            return
        run, function, metadata, _ = prepared
        stream = active.get_current_stream(device)
        run(
            *self.grid,
            stream,
            function,
            metadata,
            None,
            None,
            None,
            *addresses,
            *self.arguments,
        )

    def _by_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """Triton's own launch. Returns the compiled kernel."""
        return self.launcher.kernel[self.grid](
            *tensors, *self.arguments, **self.config.compiled, enable_fp_fusion=FP_FUSION
        )
