"""Prepared launches of Triton's kernels: the code and the arguments are those of Triton's own
launch.

The driver is replaced, so that no GPU is needed: kernels compile, and launches are recorded.
"""

import ctypes
import functools
import importlib
import importlib.util
import inspect
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl
    from pfgm.kernels import (
        launching,
        loading,
        memory,
        normalised_field,
        ode_step,
        posterior_mean,
        posterior_mean_backward,
        problem,
        tuning,
    )
    from pfgm.kernels.launching import Launch, Launcher, size_class
    from pfgm.kernels.tuning import Config
    from triton.backends.compiler import GPUTarget

    import pfgm
    from benchmarks.codegen import triton as codegen
    from pfgm.backends import triton as triton_backend
    from pfgm.core.problems import OdeStep
    from pfgm.ops import normalised_field as normalised_field_op
    from pfgm.ops import posterior_mean as posterior_mean_op

    pytestmark = pytest.mark.skipif(
        tuning.interpreted(), reason="the interpreter does not compile kernels"
    )

    @triton.jit(do_not_specialize=["count"])
    def kernel(
        x,
        extra,
        out,
        count,
        stride,
        factor,
        exact: tl.float64,
        SQUARE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + place * stride, mask=place < count).to(tl.float32) * factor
        if extra is not None:
            values += tl.load(extra + place, mask=place < count)
        if SQUARE:
            values *= values
        tl.store(out + place, values + exact.to(tl.float32), mask=place < count)

    find_exchange_mode = loading._exchange_mode.__wrapped__  # without what it found before

SMALL, LARGE = ({"BLOCK": 32}, {"BLOCK": 64})


class Recorder:
    """The launches that reached the driver, as (code, grid, stream, arguments)."""

    def __init__(self):
        self.launches = []
        self.device, self.stream = 0, 7
        recorder = self

        class Launcher:
            def __init__(self, source, metadata):
                self.code = metadata.hash, metadata.num_warps
                recorder.fusion = metadata.enable_fp_fusion

            def __call__(self, gridX, gridY, gridZ, stream, function, *arguments):
                _metadata, _launch, _enter, _exit, *values = arguments
                addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in values]
                grid = gridX, gridY, gridZ
                recorder.launches.append((self.code, grid, stream, function, addresses))

        self.launcher = Launcher

    def load_binary(self, name, *rest):
        """A different number for each load, as a driver gives."""
        self.loaded = getattr(self, "loaded", 0) + 1
        return self.loaded, 1000 * self.device + self.loaded, 32, 0, 1024


@pytest.fixture
def recorder(monkeypatch):
    from triton.runtime import driver

    result = Recorder()
    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    active = SimpleNamespace(
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=result.load_binary,
            unload_module=lambda module: None,
        ),
        launcher_cls=result.launcher,
        get_current_device=lambda: result.device + 5000,  # no GPU has such a number
        get_current_stream=lambda device: result.stream + device,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(loading, "_exchange_mode", lambda: None)
    kernel.device_caches.clear()
    return result


@pytest.fixture
def by_triton(recorder, monkeypatch):
    """Calls of Triton's own launch."""
    calls = []
    original = Launch.by_triton

    def counted(self, *arguments):
        calls.append(self.launcher.kernel)
        original(self, *arguments)

    monkeypatch.setattr(Launch, "by_triton", counted)
    return calls


def view(offset=0, dtype=torch.float32, length=64):
    """A vector ``offset`` elements after an address that is a multiple of 64."""
    memory = torch.zeros(length + 128, dtype=dtype)
    start = -memory.data_ptr() // memory.element_size() % 64
    return memory[start + offset : start + offset + length]


def launch_arguments(**changes):
    """The arguments of a launch."""
    made = {
        "x": view(), "extra": None, "out": view(), "count": 40, "stride": 16, "factor": 2.0,
        "exact": 1.0, "SQUARE": True, "config": Config(SMALL),
    } | changes  # fmt: skip
    tensors = made["x"], made["extra"], made["out"]
    sizes, numbers = (made["count"], made["stride"]), (made["factor"], made["exact"])
    return tensors, (2, 3, 1), sizes, numbers, (made["SQUARE"],), made["config"]


def launch(launcher, tensors, *rest):
    launcher(*rest)(*tensors)


def arguments_by_position(arguments):
    tensors, _, sizes, numbers, flags, _ = arguments
    return *tensors, *sizes, *numbers, *flags


def launch_by_triton(tensors, grid, sizes, numbers, flags, config):
    kernel[grid](
        *tensors, *sizes, *numbers, *flags, **config.options, enable_fp_fusion=launching.FP_FUSION
    )


CLASSES = {
    "as it is": {},
    "misaligned x": {"x": lambda: view(1)},
    "x aligned to 8 bytes": {"x": lambda: view(2)},
    "misaligned out": {"out": lambda: view(3)},
    "both misaligned": {"x": lambda: view(1), "out": lambda: view(1)},
    "half precision": {"x": lambda: view(dtype=torch.float16)},
    "bytes": {"x": lambda: view(dtype=torch.uint8)},
    "misaligned bytes": {"x": lambda: view(9, dtype=torch.uint8)},
    "with extra": {"extra": lambda: view()},
    "with misaligned extra": {"extra": lambda: view(1)},
    "stride of 1": {"stride": 1},
    "stride of 17": {"stride": 17},
    "stride of 8": {"stride": 8},
    "stride of 2^31": {"stride": 2**31},
    "stride of 2^31 + 1": {"stride": 2**31 + 1},
    "count of 1": {"count": 1},
    "count of 2^31": {"count": 2**31},
    "not squared": {"SQUARE": False},
    "larger blocks": {"config": Config(LARGE)},
    "more warps": {"config": Config(SMALL, num_warps=8)},
}


def arguments_of(name):
    changes = CLASSES[name]
    return launch_arguments(
        **{key: value() if callable(value) else value for key, value in changes.items()}
    )


def test_each_class_launches_what_triton_would(recorder, by_triton):
    """Every class, before and after the others are prepared."""
    launcher = Launcher(kernel)
    for turn in range(3):
        before = len(by_triton)
        for name in CLASSES:
            arguments = arguments_of(name)
            recorder.launches.clear()
            launch(launcher, *arguments)
            launch_by_triton(*arguments)
            prepared, own = recorder.launches
            assert prepared == own, name
        assert len(by_triton) - before == (len(CLASSES) if turn == 0 else 0)
    codes = {launch_of(recorder, launcher, name)[0] for name in CLASSES}
    # Triton itself does not tell apart: alignments below 16 bytes, and sizes beside 1 and 16.
    assert len(codes) >= 14


def launch_of(recorder, launcher, name):
    recorder.launches.clear()
    launch(launcher, *arguments_of(name))
    return recorder.launches[-1]


def test_other_sizes_of_a_class_are_prepared(recorder, by_triton):
    launcher = Launcher(kernel)
    for stride, count in ((32, 48), (160, 4800), (4096, 64)):
        launch(launcher, *launch_arguments(stride=stride, count=count))
        assert recorder.launches[-1][-1][3:5] == [count, stride]
    assert len(by_triton) == 1


def test_numbers_are_not_part_of_a_class(recorder, by_triton):
    launcher = Launcher(kernel)
    for factor, exact in ((2.0, 1.0), (1.0, 16.0), (0.0, -1e300)):
        launch(launcher, *launch_arguments(factor=factor, exact=exact))
        assert recorder.launches[-1][-1][5:7] == [factor, exact]
    assert len(by_triton) == 1


def test_fusion_does_not_depend_on_the_version_of_triton(recorder, monkeypatch):
    """Its default is another from 3.10 on, which this setting stands for."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    kernel[(1,)](*arguments_by_position(launch_arguments()), **Config(SMALL).options)
    assert not recorder.fusion
    launch(Launcher(kernel), *launch_arguments())
    assert recorder.fusion


def test_devices_and_streams(recorder, by_triton):
    launcher = Launcher(kernel)
    seen = []
    for device in (0, 1, 0, 1):
        recorder.device = device
        recorder.launches.clear()
        launch(launcher, *(arguments := launch_arguments()))
        launch_by_triton(*arguments)
        assert recorder.launches[0] == recorder.launches[1]
        seen.append(recorder.launches[0][3])
    assert seen[0] == seen[2] != seen[1] == seen[3]
    assert len(by_triton) == 2
    recorder.stream = 11
    launch(launcher, *launch_arguments())
    assert recorder.launches[-1][2] == 11 + 5001


def test_hooks_see_every_launch(recorder, by_triton):
    launcher = Launcher(kernel)
    launch(launcher, *launch_arguments())
    seen = []
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        hook.add(seen.append)
        try:
            launch(launcher, *launch_arguments())
        finally:
            hook.remove(seen.append)
    kernel.add_pre_run_hook(lambda *_, **__: seen.append("before"))
    try:
        launch(launcher, *launch_arguments())
    finally:
        kernel.pre_run_hooks.clear()
    assert "before" in seen
    assert len(by_triton) == 4
    launch(launcher, *launch_arguments())
    assert len(by_triton) == 4


@pytest.mark.parametrize(
    ("knobs", "name", "value"),
    [
        ("runtime", "debug", True),
        ("compilation", "instrumentation_mode", "fpsan"),
        ("runtime", "add_stages_inspection_hook", lambda *_: ("key", "hash")),
    ],
)
def test_other_ways_to_compile_are_left_to_triton(monkeypatch, by_triton, knobs, name, value):
    launcher = Launcher(kernel)
    launch(launcher, *launch_arguments())
    monkeypatch.setattr(Launch, "by_triton", lambda *_: by_triton.append("again"))
    monkeypatch.setattr(getattr(triton.knobs, knobs), name, value)
    launch(launcher, *launch_arguments())
    assert by_triton == [kernel, "again"]


def test_other_launchers_are_left_to_triton(recorder, by_triton, monkeypatch):
    def call(self, gridX, gridY, gridZ, function, stream, *arguments):
        recorder.launches.append(None)

    monkeypatch.setattr(recorder.launcher, "__call__", call)
    launcher = Launcher(kernel)
    for _ in range(3):
        launch(launcher, *launch_arguments())
    assert len(by_triton) == len(recorder.launches) == 3


def test_other_gpus_are_left_to_triton(by_triton, monkeypatch):
    """Triton's rules for a class are others there."""
    target = SimpleNamespace(backend="hip")
    monkeypatch.setattr(launching, "CompiledKernel", SimpleNamespace)
    compiled = SimpleNamespace(metadata=SimpleNamespace(target=target), run=None)
    launcher = Launcher(defaultdict(lambda: lambda *_, **__: compiled))
    for _ in range(2):
        launch(launcher, *launch_arguments())
    assert len(by_triton) == 2
    assert not launcher.prepared


def test_the_launcher_of_this_version_is_known():
    """Otherwise every launch would take Triton's own way."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    assert launching._known_launcher(nvidia.CudaLauncher)


def test_sizes_of_one_class_are_alike():
    sizes = [*range(1, 70), 2**31 - 1, 2**31, 2**31 + 16, 2**32, 2**40 + 1]
    for a in sizes:
        for b in sizes:
            if size_class(a) == size_class(b):
                assert (a == 1, a % 16 == 0, a < 2**31) == (b == 1, b % 16 == 0, b < 2**31)
    assert len({size_class(size) for size in range(1, 10_000)}) <= 32


def test_tensors_by_name(recorder, by_triton):
    """Two spaces whose tensors are alike but for their names: the first is misaligned."""
    layout = memory.Layout({"weights": 64, "squared": 7, "center": 64})
    made = Launcher(kernel)(*launch_arguments()[1:])
    for _ in range(2):
        for names in (("x", "mean"), ("mean", "x")):
            tensors = dict(zip(names, (view(1), view()), strict=True))
            space = memory.Space(layout, **tensors)
            for order in (("x", memory.NOTHING, "mean"), ("x", "center", "weights")):
                space.run(memory.Step(made, order))
                arguments = [
                    tensors[name] if name in tensors else space.temporary(name)
                    for name in order
                    if name != memory.NOTHING
                ]
                if len(arguments) == 2:
                    arguments.insert(1, None)
                made.by_triton(None, None, arguments)
                *_, prepared, own = recorder.launches
                assert prepared == own
    assert len(by_triton) == 4 + 8


@pytest.mark.usefixtures("recorder")
def test_temporary_tensors_lie_apart():
    layout = memory.Layout({"weights": 65, "squared": 7, "live": 3, "high": 1, "center": 64})
    space = memory.Space(layout, x=view())
    for value, name in enumerate(layout.counts):
        space.temporary(name).fill_(value)
    for value, name in enumerate(layout.counts):
        tensor = space.temporary(name)
        assert len(tensor) == layout.counts[name]
        assert tensor.eq(value).all()
        assert (tensor.data_ptr() - space.temporary("weights").data_ptr()) % 256 == 0


GLOBAL, RELAXED = 0, 2  # CUDA's capture modes of a thread; the first is the default


class CapturingDriver:
    """NVIDIA's driver while a CUDA graph is captured, as far as the loading of kernels goes."""

    def __init__(self, recorder):
        self.mode, self.exchanges, self.code = GLOBAL, 0, 0
        self.loaded_in = []
        self.load_binary = recorder.load_binary

    def exchange(self, mode):
        self.exchanges += 1
        self.mode, mode[0] = mode[0], self.mode
        return self.code

    def load(self, *arguments):
        self.loaded_in.append(self.mode)
        if self.mode != RELAXED:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.load_binary(*arguments)


@pytest.fixture
def capturing(recorder, monkeypatch):
    """Kernels are loaded by a driver that captures, which is called as a library is."""
    driver = CapturingDriver(recorder)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))
    library = SimpleNamespace(cuThreadExchangeStreamCaptureMode=prototype(driver.exchange))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": library}[name])
    monkeypatch.setattr(loading, "_exchange_mode", find_exchange_mode)
    monkeypatch.setattr(triton.runtime.driver.active.utils, "load_binary", driver.load)
    return driver


def test_kernels_are_loaded_while_a_graph_is_captured(recorder, capturing):
    launcher = Launcher(kernel)
    launch(launcher, *launch_arguments())
    assert capturing.loaded_in == [RELAXED]
    assert len(recorder.launches) == 1
    assert (capturing.mode, capturing.exchanges) == (GLOBAL, 2)
    launch(launcher, *launch_arguments())
    assert len(recorder.launches) == 2
    assert capturing.exchanges == 2  # a prepared launch loads nothing


def test_a_thread_gets_its_capture_mode_back(capturing, monkeypatch):
    launcher = Launcher(kernel)
    capturing.mode = 1
    launch(launcher, *launch_arguments())
    assert capturing.mode == 1
    monkeypatch.setattr(capturing, "load_binary", None)
    with pytest.raises(TypeError):
        launch(launcher, *arguments_of("misaligned x"))
    assert capturing.loaded_in == [RELAXED] * 2
    assert capturing.mode == 1


def test_a_driver_that_keeps_the_capture_mode_loads_nothing(capturing):
    capturing.code = 4
    with pytest.raises(RuntimeError, match="StreamCaptureMode failed with error 4 of the CUDA"):
        launch(Launcher(kernel), *launch_arguments())
    assert not capturing.loaded_in


def test_without_nvidias_driver_triton_loads_as_it_does(recorder, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(loading, "_exchange_mode", find_exchange_mode)
    launch(Launcher(kernel), *launch_arguments())
    assert recorder.loaded == 1


def launchers():
    """All launchers of the package."""
    modules = [importlib.import_module(name) for name in codegen.MODULES]
    values = [value for module in modules for value in vars(module).values()]
    return {value for value in values if isinstance(value, Launcher)}


def every_call(B):
    """The arguments of the launches of all operations for B queries, in both kinds of D."""
    x, references, radius = torch.zeros(B, 64), torch.zeros(40, 64), torch.zeros(B).double()
    for D in (1.0, math.inf):
        mean, lse, nearest, total = posterior_mean.posterior_mean(x, references, radius, D)
        posterior_mean.posterior_mean(x, references, radius, D, True)
        posterior_mean_backward.posterior_mean_backward(
            mean, lse, x, references, radius, mean, nearest, total, D, (True, True, True)
        )
    normalised_field.launch(x, radius, 5.0, x, torch.zeros(B))
    for levels in ((1.0, 0.5, 0.0, None), (0.0, 0.0, 0.0, torch.zeros(3, B).double())):
        for history in (None, x):
            step = OdeStep(x, x, torch.zeros(B), history, *levels, 5.0, 2.0, True)
            ode_step.launch(step, x, None)


TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16",
         torch.int32: "*i32", torch.int64: "*i64", int: "i32"}  # fmt: skip


@pytest.mark.parametrize("B", [3, 20, 300])
def test_launches_have_the_types_of_the_variants_that_are_checked(monkeypatch, B):
    monkeypatch.setenv("PFGM_TUNE", "0")
    called = []
    monkeypatch.setattr(launching, "current_place", lambda: None)
    monkeypatch.setattr(memory, "current_place", lambda: None)
    monkeypatch.setattr(
        Launch, "by_triton", lambda self, place, kinds, tensors: called.append((self, tensors))
    )
    every_call(B)
    for launch, tensors in called:
        assert len(launch.grid) == 3
        kernel = launch.launcher.kernel
        name, sizes = kernel.__name__, launch.config.sizes
        types, constants, options = listed_types(kernel)
        assert launch.config.compiled | {"enable_fp_fusion": launching.FP_FUSION} in options, name
        for parameter, value in zip(kernel.params, [*tensors, *launch.arguments], strict=True):
            where = (name, parameter.name)
            if parameter.is_constexpr:
                assert type(value) in constants[parameter.name], where
            elif isinstance(value, float):
                assert types[parameter.name] in ({"fp32"}, {"fp64"}), where
            elif value is not None:
                kind = TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
                assert kind in types[parameter.name], where
        names = [parameter.name for parameter in kernel.params]
        assert names[len(names) - len(sizes) :] == list(sizes), name
    few = {"differences"} if B < 16 else {"find_center", "split_rows", "distances"}
    assert {launch.launcher.kernel.__name__ for launch, _ in called} == few | {
        "find_limits", "refine", "weigh", "weighted_sum", "merge", "pull", "find_coefficients",
        "merge_gradient", "reference_gradient", "normalised_field_kernel", "ode_step_kernel",
    }  # fmt: skip


@functools.cache
def listed_types(kernel):
    """The types of a kernel's arguments, those of its constants, and the compiler's options, in the
    variants that are listed."""
    types, constants, options = defaultdict(set), defaultdict(set), []
    for name in codegen.MODULES:
        for variant in importlib.import_module(name).variants():
            if variant.kernel is kernel:
                options.append(variant.options)
                for argument, kind in variant.types.items():
                    types[argument].add(kind)
                for argument, value in variant.constants.items():
                    constants[argument].add(type(value))
    return types, constants, options


@pytest.fixture
def twice(recorder, monkeypatch):
    """Every launch is made twice, the second time by Triton. Returns the codes of both, by kernel,
    and whether the first was prepared."""
    for launcher in launchers():
        monkeypatch.setattr(launcher, "prepared", {})
        launcher.kernel.device_caches.clear()
    made = []
    run, call = memory.Space.run, Launch.__call__

    def compare(launch, repeat, tensors):
        before = dict(launch.launcher.prepared)
        repeat()
        launch.by_triton(None, None, tensors)
        *_, first, own = recorder.launches
        assert first == own
        prepared = launch.launcher.prepared == before
        made.append((launch.launcher.kernel.__name__, own[0], prepared))

    def run_twice(self, step):
        tensors = [
            self._arguments[name] if name in self._arguments else self.temporary(name)
            for name in step.names
        ]
        compare(step.launch, lambda: run(self, step), tensors)

    monkeypatch.setattr(memory.Space, "run", run_twice)
    monkeypatch.setattr(
        Launch,
        "__call__",
        lambda self, *tensors: compare(self, lambda: call(self, *tensors), tensors),
    )
    return made


def operations(B=20, x_at=0, y_at=0, radius_at=0, dtype=torch.float32):
    """The posterior mean, the field and a step; the tensors start so many values after an
    alignment."""
    x, y = view(x_at, length=B * 64).view(B, 64), view(y_at, dtype, 40 * 64).view(40, 64)
    radius = view(radius_at, torch.float64, B)
    mean, *_ = posterior_mean.posterior_mean(x, y, radius, 1.0)
    field_z = view(length=B)
    normalised_field.launch(mean, radius, 5.0, mean, field_z)
    step = OdeStep(x, mean, field_z, None, 1.0, 0.5, 0.0, None, 5.0, 2.0, True)
    ode_step.launch(step, x, None)


def test_the_package_launches_what_triton_would(twice):
    """With other alignments, prepared before and after each other."""
    places = [{}, {"x_at": 1}, {"y_at": 1}, {"x_at": 2, "y_at": 3}, {"radius_at": 1}]
    codes = []
    for turn in range(2):
        for each in places:
            twice.clear()
            operations(**each)
            assert len(twice) == 10
            assert turn == 0 or all(prepared for _, _, prepared in twice)
            codes.append(tuple(code for _, code, _ in twice))
    assert codes[: len(places)] == codes[len(places) :]
    assert len(set(codes)) == len(places)


@pytest.mark.parametrize("B", [3, 300])
def test_few_and_many_queries(monkeypatch, twice, B):
    monkeypatch.setenv("PFGM_TUNE", "0")
    for _ in range(2):
        twice.clear()
        operations(B, dtype=torch.uint8)
    assert all(prepared for _, _, prepared in twice)


def test_chunks_blocks_and_gradients(monkeypatch, twice):
    monkeypatch.setattr(problem, "MAX_PAIRS", 600)
    monkeypatch.setattr(problem, "MAX_QUERIES", 17)
    x, y, radius = torch.zeros(34, 33), torch.zeros(300, 33), torch.zeros(34).double()
    for _ in range(2):
        twice.clear()
        mean, lse, nearest, total = posterior_mean.posterior_mean(x, y, radius, 1.0)
        posterior_mean_backward.posterior_mean_backward(
            mean, lse, x, y, radius, mean, nearest, total, 1.0, (True, True, True)
        )
    assert all(prepared for _, _, prepared in twice)


@pytest.mark.usefixtures("recorder")
def test_a_second_call_needs_neither_triton_nor_the_operators(monkeypatch):
    """On tensors in CPU memory, which pass for tensors on a GPU."""
    monkeypatch.setattr(triton_backend, "supports", lambda *_: None)
    monkeypatch.setattr(triton_backend, "check_distances", lambda *_: None)
    monkeypatch.setenv("PFGM_TUNE", "0")
    x, z, references = torch.zeros(32, 64), torch.ones(32), torch.zeros(256, 64)
    with torch.no_grad():
        pfgm.field_fn(x, z, references, backend="triton")
        monkeypatch.setattr(Launch, "by_triton", None)
        monkeypatch.setattr(posterior_mean_op, "compute", None)
        monkeypatch.setattr(normalised_field_op, "compute", None)
        field_x, field_z = pfgm.field_fn(x, z, references, backend="triton")
        assert field_x.shape == x.shape
        assert field_z.shape == z.shape


def test_prepared_launches_take_no_arguments_by_name():
    """The driver takes them by position."""
    for launcher in launchers():
        kinds = {p.kind for p in inspect.signature(launcher.kernel.fn).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
