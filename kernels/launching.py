"""Launches of kernels, prepared once a class of arguments.

Triton's own launch looks at each argument, at the options and at the environment in Python, which
takes longer than most kernels here run. What it finds depends on a few facts about the arguments.
So the first launch with these facts is Triton's own, the compiled kernel is kept, and later ones
launch that kernel at once. Triton also checks that globals of the kernels have not changed; those
of these kernels are constants.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .loading import loading_permitted
from .tuning import Config, interpreted
from .variant import FP_FUSION

NO_SIZES = Config({})
KEPT = 1 << 10
"""Launches of each kind that are kept, so that their arguments are not put together again."""

_INTERPRETED = interpreted()
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


Place = tuple[int, int]
"""A device and a stream."""


def current_place() -> Place | None:
    """The current device and stream; None where Triton must see every launch."""
    if _INTERPRETED or _watched():
        return None
    active = driver.active
    device = active.get_current_device()
    return device, active.get_current_stream(device)


def _watched() -> bool:
    """Whether hooks are set, or code is compiled in another way."""
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
        self.prepared: dict[Hashable, _Prepared] = {}

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
        """Launches at the current place. None stands for a tensor that the kernel does without."""
        place = current_place()
        addresses, kinds = look_at(tensors)
        if place is None or not self.repeat(place, kinds, addresses):
            self.by_triton(place, kinds, tensors)

    def repeat(self, place: Place, kinds: Hashable, addresses: Sequence[int | None]) -> bool:
        """Launches if such a launch was prepared, and says whether it was.

        Kinds are all that Triton may look at in the tensors at these addresses.
        """
        launcher = self.launcher
        device, stream = place
        prepared = launcher.prepared.get((device, self._class, kinds))
        if prepared is None or launcher.kernel.pre_run_hooks:
            return False
        run, function, metadata, _ = prepared
        run(*self.grid, stream, function, metadata, None, None, None, *addresses, *self.arguments)
        return True

    def by_triton(
        self, place: Place | None, kinds: Hashable, tensors: Sequence[Tensor | None]
    ) -> None:
        """Triton's own launch, at the current place. It prepares later ones unless that is None.

        It may compile and load the kernel, also while a CUDA graph is captured.
        """
        with loading_permitted():
            compiled = self.launcher.kernel[self.grid](
                *tensors, *self.arguments, **self.config.compiled, enable_fp_fusion=FP_FUSION
            )
        if place is not None and _can_be_prepared(compiled):
            key = place[0], self._class, kinds
            self.launcher.prepared[key] = _Prepared(
                compiled.run, compiled.function, compiled.packed_metadata, compiled
            )


def look_at(tensors: Iterable[Tensor | None]) -> tuple[list[int | None], tuple[Any, ...]]:
    """The addresses of tensors, and all that Triton may look at: their types and alignments."""
    tensors = tuple(tensors)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    kinds: list[Any] = [None if tensor is None else tensor.dtype for tensor in tensors]
    if reduce(or_, filter(None, addresses), 0) & 15:
        kinds += [address is not None and address & 15 for address in addresses]
    return addresses, tuple(kinds)
