import copy
import math
import os
from functools import partial

import numpy as np
import pytest
import torch

import pfgm
from benchmarks.common.problems import seeded
from pfgm.references import ReferenceSet
from pfgm.references import part as module
from pfgm.training import TrainConfig, Trainer

SHAPE = (2, 3, 5)
native_only = pytest.mark.skipif(os.environ.get("PFGM_NATIVE") == "0", reason="PFGM_NATIVE=0")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows of uint8, so that small sets come in many."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * math.prod(SHAPE))


def images(count=50, seed=0):
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=seeded(seed))


def points(count=7, dtype=torch.float32, spread=0.3):
    noise = torch.randn(count, *SHAPE, generator=seeded(1), dtype=torch.float64)
    return (pfgm.data.to_unit(images())[:count].double() + spread * noise).to(dtype)


def on_disk(rows, folder, **options):
    np.save(folder / "rows.npy", rows.numpy())
    return ReferenceSet(folder / "rows.npy", **options)


@pytest.mark.parametrize("D", [128.0, 1e6])
def test_gradient_in_sigma_at_a_large_r_in_parts(small_chunks, backend, D):
    """It is 1e-6 of the parts that cancel between the chunks."""
    rows, G = images(), torch.randn(7, *SHAPE, generator=seeded(2))

    def gradient(x, references, name):
        sigma = torch.full((7,), 30.0, dtype=torch.float64, requires_grad=True)
        mean = pfgm.posterior_mean(x, references, sigma=sigma, D=D, backend=name)
        return torch.autograd.grad((mean * G).sum(), sigma)[0]

    result = gradient(points(spread=30.0), ReferenceSet(rows), backend)
    expected = gradient(points(spread=30.0).double(), rows, "reference")
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


class Counted:
    """Records the calls of native.sketch."""

    def __init__(self, monkeypatch):
        self.seen = []
        original = pfgm.backends.native.sketch
        monkeypatch.setattr(pfgm.backends.native, "sketch", self)
        self.original = original

    def __call__(self, references, dtype):
        self.seen.append((len(references), dtype))
        return self.original(references, dtype)


def wide_images(count=40):
    return torch.randint(0, 256, (count, 1, 24, 24), dtype=torch.uint8, generator=seeded(0))


@pytest.fixture
def wide_chunks(monkeypatch):
    """Chunks of 16 rows of wide images."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 16 * 24 * 24)


@native_only
def test_sketches_are_made_once_and_change_no_bit(wide_chunks, monkeypatch):
    rows = wide_images()
    counted = Counted(monkeypatch)
    held = ReferenceSet(rows, flips=True)
    x = (pfgm.data.to_unit(rows[:6]) + 0.1).requires_grad_()
    results = []
    part = held.part
    for sketch in (part.sketch, lambda *_: None, part.sketch):
        monkeypatch.setattr(part, "sketch", sketch)
        mean, lse = pfgm.posterior_mean(x, held, r=2.0, return_logsumexp=True)
        (gradient,) = torch.autograd.grad(mean.sum() + lse.sum(), x)
        results.append((mean, lse, gradient))
    first, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    sizes = [16, 16, 8]  # chunks, whose mirror images need no sketches of their own
    assert counted.seen == [(size, torch.float32) for size in sizes]


@native_only
def test_sketches_follow_their_rows(wide_chunks, monkeypatch):
    rows = pfgm.data.to_unit(wide_images())
    counted = Counted(monkeypatch)
    held, x = ReferenceSet(rows), rows[:3] + 0.01
    before = pfgm.posterior_mean(x, held, sigma=0.05)
    assert counted.seen == []
    assert torch.equal(pfgm.posterior_mean(x, held, sigma=0.05), before)
    assert len(counted.seen) > 0
    rows.mul_(-1)
    after = pfgm.posterior_mean(x, held, sigma=0.05)
    assert torch.equal(after, pfgm.posterior_mean(x, ReferenceSet(rows.clone()), sigma=0.05))
    assert not torch.equal(before, after)
    seen = len(counted.seen)
    for other in (held.flipped(), held.to(dtype=torch.float16)):
        once, twice = (pfgm.posterior_mean(x, other, sigma=0.05) for _ in range(2))
        assert torch.equal(once, twice)
        assert len(counted.seen) > seen
        seen = len(counted.seen)


UNCOUNTED = {
    "data": lambda rows, values: rows.data.copy_(values),
    "storage": lambda rows, values: rows.untyped_storage().copy_(values.untyped_storage()),
    "dlpack": lambda rows, values: torch.from_dlpack(rows).copy_(values),
    "NumPy": lambda rows, values: np.copyto(rows.numpy(), values.numpy()),
}


def test_bytes_in_float64_are_not_rounded():
    rows = torch.arange(256, dtype=torch.uint8)[:, None]
    held = torch.cat(list(ReferenceSet(rows).to(dtype=torch.float64).chunks()))
    assert torch.equal(held, rows.double() / 127.5 - 1)


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("way", UNCOUNTED)
def test_sketches_and_measures_follow_changes_that_torch_does_not_count(way, dtype):
    """Of 1000 rows; a backward pass raises an error."""
    rows = wide_images(1000)
    rows = rows if dtype == torch.uint8 else pfgm.data.to_unit(rows)
    rows = torch.from_numpy(rows.numpy().copy()) if way == "NumPy" else rows
    held, x = ReferenceSet(rows), pfgm.data.to_unit(rows[:3]) + 0.01
    for _ in range(3):
        pfgm.posterior_mean(x, held, sigma=0.05)
    assert any(kept is not None for _, kept in held.part._sketches.values())
    before, version = held.norm, rows._version
    late = pfgm.posterior_mean(x.requires_grad_(), held, sigma=0.05)
    changed = rows.clone()
    changed[:200] = 100 if dtype == torch.uint8 else 0.25  # a fifth of the rows
    UNCOUNTED[way](rows, changed)
    assert rows._version == version
    assert torch.equal(rows, changed)
    with pytest.raises(RuntimeError, match="changed in place"):
        late.sum().backward()
    fresh = ReferenceSet(changed)
    for _ in range(3):
        assert torch.equal(
            pfgm.posterior_mean(x, held, sigma=0.05), pfgm.posterior_mean(x, fresh, sigma=0.05)
        )
    assert held.norm == fresh.norm != before


@native_only
def test_the_set_is_told_of_a_change_that_nothing_notices():
    rows = pfgm.data.to_unit(wide_images(1000))
    held, x = ReferenceSet(rows), rows[500:501].clone()
    for _ in range(3):
        pfgm.posterior_mean(x, held, sigma=0.05)
    rows.data[500] = -rows[500]
    torch.autograd.graph.increment_version(rows)
    expected = pfgm.posterior_mean(x, ReferenceSet(rows.clone()), sigma=0.05)
    for _ in range(3):
        assert torch.equal(pfgm.posterior_mean(x, held, sigma=0.05), expected)


@native_only
@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("shape", [(30, 512), (50, 600), (130, 512), (1000, 600)])
def test_a_sample_changes_with_a_tenth_of_the_rows(shape, share):
    generator = seeded(0)
    rows = torch.randn(shape, generator=generator)
    before = pfgm.backends.native_calls.sample(rows)
    for _ in range(200):
        changed = torch.randperm(len(rows), generator=generator)[: int(share * len(rows))]
        kept = rows[changed].clone()
        rows[changed] = kept + 1
        assert pfgm.backends.native_calls.sample(rows) != before
        rows[changed] = kept


@native_only
@pytest.mark.parametrize("count", [1, 7, 64, 1031, 1 << 14, (1 << 14) + 1, 100_003, 3_000_000])
def test_a_sample_changes_with_all_bytes_of_few_and_with_many_of_others(count):
    sample, rows = pfgm.backends.native_calls.sample, torch.zeros(count, dtype=torch.uint8)
    seen, few = {sample(rows)}, count <= 1 << 14
    width, step = (1, 1 + count // 1500) if few else (count // 10, count // 100)
    places = [*range(0, count - width + 1, step), count - width]
    for place in places:
        changed = rows.clone()
        changed[place : place + width] = 1
        assert sample(changed) != sample(rows)
        seen.add(sample(changed))
    assert not few or len(seen) == len({*places}) + 1
    strided = torch.zeros(2, count, dtype=torch.uint8).t()
    assert sample(strided) == 0 or count == 1
    assert sample(rows) == sample(torch.zeros_like(rows))


@native_only
def test_a_copy_makes_its_own_sketches(wide_chunks):
    rows = pfgm.data.to_unit(wide_images())
    rows.mul_(1)  # a version other than that of a new tensor
    held, x = ReferenceSet(rows), rows[:3] + 0.01
    for _ in range(2):
        pfgm.posterior_mean(x, held, sigma=0.05)
    rows.neg_()
    copied = copy.deepcopy(held)
    expected = pfgm.posterior_mean(x, ReferenceSet(rows.clone()), sigma=0.05)
    assert torch.equal(pfgm.posterior_mean(x, copied, sigma=0.05), expected)


@native_only
def test_no_sketches_of_files_few_features_float64_or_inference_tensors(tmp_path, monkeypatch):
    np.save(tmp_path / "rows.npy", wide_images().numpy())
    counted = Counted(monkeypatch)
    zeros, file, held = torch.zeros(2, 1, 24, 24), tmp_path / "rows.npy", wide_images()
    with torch.inference_mode():
        made = torch.rand(40, 1, 24, 24)  # its changes are not counted
    for x, references, options in (
        (zeros, ReferenceSet(file), {}),
        (zeros.double(), ReferenceSet(held), {}),
        (zeros, ReferenceSet(held), {"backend": "reference"}),
        (zeros, held, {}),
        (zeros, ReferenceSet(made), {}),
    ):
        for _ in range(3):
            pfgm.posterior_mean(x, references, r=1.0, **options)
    assert counted.seen == []
    few = ReferenceSet(images())
    for _ in range(3):
        pfgm.posterior_mean(points(), few, r=1.0)
    assert all(kept is None for _, kept in few.part._sketches.values())


@pytest.mark.parametrize("where", ["whole", "row", "view", "flips"])
def test_rows_changed_before_the_gradient_are_refused(small_chunks, where):
    rows = pfgm.data.to_unit(images())
    references = ReferenceSet(rows, flips=where == "flips")
    x = points().requires_grad_()
    means = [pfgm.posterior_mean(x, references, r=1.0) for _ in range(3)]
    torch.autograd.grad(means[0].sum(), x)  # nothing has changed
    (rows[4] if where == "row" else rows.view(-1) if where == "view" else rows).mul_(2)
    for mean in means[1:]:
        with pytest.raises(
            RuntimeError, match="references is a ReferenceSet whose rows were changed in place"
        ):
            torch.autograd.grad(mean.sum(), x)
    torch.autograd.grad(pfgm.posterior_mean(x, references, r=1.0).sum(), x)


@pytest.mark.parametrize(
    ("backend", "compiled"), [("reference", False), (None, False), (None, True)]
)
def test_rows_have_no_gradient(small_chunks, backend, compiled):
    """Chunks would give them a part of it, or none."""
    rows = pfgm.data.to_unit(images()).requires_grad_()
    references = ReferenceSet(rows)

    def function(x):
        return pfgm.posterior_mean(x, references, r=1.0, backend=backend)

    call = torch.compile(function, backend="eager") if compiled else function
    assert not call(points()).requires_grad
    x = points().requires_grad_()
    assert torch.autograd.grad(call(x).sum(), rows, allow_unused=True) == (None,)


def test_a_file_written_to_before_the_gradient_is_refused(small_chunks, tmp_path):
    references = on_disk(images(), tmp_path)
    x = points().requires_grad_()
    mean = pfgm.posterior_mean(x, references, r=1.0)
    torch.autograd.grad(mean.sum(), x, retain_graph=True)
    path = tmp_path / "rows.npy"
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"7")
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # clocks of some systems tick
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(mean.sum(), x)


def test_sets_under_inference_mode(small_chunks):
    """Tensors made in inference mode have no version counter. Others have one, even here."""
    rows, x = pfgm.data.to_unit(images()), points()
    expected = pfgm.posterior_mean(x, rows, r=1.0)
    outside = ReferenceSet(rows)
    with torch.inference_mode():
        inside = ReferenceSet(rows.clone())
        for references in (inside, outside):
            torch.testing.assert_close(pfgm.posterior_mean(x, references, r=1.0), expected)
    x = x.clone().requires_grad_()
    gradients = [
        torch.autograd.grad(pfgm.posterior_mean(x, held, r=1.0).sum(), x)[0]
        for held in (inside, outside)
    ]
    assert torch.equal(*gradients)
    mean = pfgm.posterior_mean(x, outside, r=1.0)
    with torch.inference_mode():
        rows.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        mean.sum().backward()


def test_a_second_derivative_is_refused(small_chunks):
    x = points(2).requires_grad_()
    mean = pfgm.posterior_mean(x, ReferenceSet(images(20)), r=1.0)
    (gradient,) = torch.autograd.grad(mean.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.sum().backward()


class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, and sizes that depend on
    values."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in arguments[1]), name
        return function(*arguments, **(named or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors on the CPU are treated like those on a GPU."""
    monkeypatch.setattr(pfgm.references.merged, "may_wait", lambda device: False)
    monkeypatch.setattr(pfgm.common.values, "_on_cpu", lambda device: False)


@pytest.mark.parametrize(
    ("D", "sigma", "flips"),
    [
        (1.0, 0.5, True), (16.0, 0.0, False), (16.0, 2.0, False), (math.inf, 0.0, True),
        (math.inf, 0.05, False),
    ],
)  # fmt: skip
def test_gradients_on_a_gpu_wait_for_nothing(small_chunks, as_on_a_gpu, D, sigma, flips):
    """Some points lie on references, where the mean is flat at sigma = 0."""
    rows = pfgm.data.to_unit(images()).double()
    references = ReferenceSet(rows, flips=flips)
    x, level = points(dtype=torch.float64), torch.full((7,), sigma, dtype=torch.float64)
    x[2] = rows[5]
    x.requires_grad_()
    level.requires_grad_()
    mean = pfgm.posterior_mean(x, references, sigma=level, D=D, backend="reference")
    G = torch.randn(mean.shape, generator=seeded(2), dtype=mean.dtype)
    with NoWaiting():
        gradients = torch.autograd.grad(mean, (x, level), G)
    mean = pfgm.posterior_mean(x, references[:], sigma=level, D=D, backend="reference")
    expected = torch.autograd.grad(mean, (x, level), G)
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


def test_tangents_on_a_gpu(small_chunks, as_on_a_gpu):
    references = ReferenceSet(images(), flips=True)
    x = points(dtype=torch.float64)

    def tangent(references, D):
        def mean(x, sigma):
            return pfgm.posterior_mean(x, references, sigma=sigma, D=D, backend="reference")

        sigma = torch.full((7,), 0.3, dtype=torch.float64)
        return torch.func.jvp(mean, (x, sigma), (x.cos(), sigma))[1]

    whole = references[:]
    for D in (1.0, math.inf):
        torch.testing.assert_close(tangent(references, D), tangent(whole, D))


class LateCopies(torch.overrides.TorchFunctionMode):
    """Copies to "meta", which stands for a GPU. Those that do not wait read their memory later."""

    def __init__(self):
        super().__init__()
        self.read, self.late = [], []

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is torch.Tensor.to and str(arguments[1]) == "meta":
            (self.late if named.get("non_blocking") else self.read).append(arguments[0])
            if not named.get("non_blocking"):
                self.read[-1] = arguments[0].clone()
        return function(*arguments, **named)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_chunk_is_not_overwritten_while_it_is_copied_to_a_gpu(small_chunks, tmp_path, where):
    rows = images()
    references = on_disk(rows, tmp_path) if where == "file" else ReferenceSet(rows.clone())
    with LateCopies() as copies:
        count = sum(len(chunk) for chunk in references.part.chunks("meta"))
    assert count == len(rows)
    if where == "memory":
        references.part.source.tensor.zero_()  # by the caller, when chunks have been asked for
    assert torch.equal(torch.cat(copies.read + copies.late), rows)


def test_mirror_images_count_as_references(small_chunks, tmp_path):
    rows = images(20)
    both = torch.cat([rows, rows.flip(-1)])
    for references in (ReferenceSet(rows, flips=True), on_disk(rows, tmp_path, flips=True)):
        assert references.shape == both.shape
        assert torch.equal(references[torch.arange(40)], both)
        assert references.norm == pytest.approx(ReferenceSet(both).norm, rel=1e-12)
        for call in (
            lambda y: pfgm.posterior_mean(points(), y, r=2.0),
            lambda y: pfgm.log_density(points(), y, sigma=0.5, D=64),
        ):
            torch.testing.assert_close(call(references), call(both), rtol=1e-6, atol=1e-6)
    labels = ReferenceSet(rows, flips=True, labels=torch.arange(20)).labels
    assert labels.tolist() == [*range(20)] * 2


def test_half_precision_is_computed_in_float32(small_chunks):
    mean = pfgm.posterior_mean(points(3).bfloat16(), ReferenceSet(images()), r=1.0)
    assert mean.dtype == torch.float32


def test_the_chosen_backend_also_computes_gradients(small_chunks):
    x, references = points().requires_grad_(), ReferenceSet(images())
    with pfgm.use_backend("reference"):
        mean = pfgm.posterior_mean(x, references, r=1.0)
    (gradient,) = torch.autograd.grad(mean.sum(), x)
    mean = pfgm.posterior_mean(x, references, r=1.0, backend="reference")
    assert torch.equal(torch.autograd.grad(mean.sum(), x)[0], gradient)


def test_a_graph_of_the_whole_caller_reads_no_file(small_chunks, tmp_path):
    references = on_disk(images(), tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(pfgm.posterior_mean, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        compiled(points(), references, r=1.0)


@pytest.mark.parametrize("where", ["memory", "flips", "file"])
def test_gradients_of_a_compiled_caller(small_chunks, tmp_path, where):
    """Also where its graph breaks, a change of the rows is seen, and only then."""
    rows = pfgm.data.to_unit(images())
    references = on_disk(rows, tmp_path) if where == "file" else ReferenceSet(rows)
    references = references.flipped() if where == "flips" else references
    options = {"r": 1.0, "backend": "reference" if where == "flips" else None}

    def function(x):
        return 2 * pfgm.posterior_mean(x + 1, references, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    x = points().requires_grad_()
    for _ in range(2):
        mean = compiled(x)
        assert torch.equal(mean, function(x))
        (gradient,) = torch.autograd.grad(mean.square().sum(), x, retain_graph=True)
        (expected,) = torch.autograd.grad(function(x).square().sum(), x)
        torch.testing.assert_close(gradient, expected)
        if where != "file":
            rows.mul_(0.5)
            with pytest.raises(RuntimeError, match="changed in place"):
                torch.autograd.grad(mean.square().sum(), x)


def test_rows_by_number_slice_and_mask(tmp_path):
    rows = images(30)
    for references in (ReferenceSet(rows), on_disk(rows, tmp_path)):
        numbers = torch.tensor([7, 0, 7, 29])
        assert torch.equal(references[numbers], rows[numbers])
        assert torch.equal(references[5:9], rows[5:9])
        assert references[5:3].shape == (0, *SHAPE)
        assert torch.equal(references[torch.arange(30) % 2 == 0], rows[::2])
        with pytest.raises(IndexError, match=r"rows must be from 0 to 29, got 30\."):
            references[torch.tensor([30])]
        with pytest.raises(TypeError, match=r"rows must be a slice such as.*got int\."):
            references[3]
        with pytest.raises(IndexError, match="30"):
            references[torch.ones(5, dtype=torch.bool)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"a tensor of torch.float32 of shape \(2,\)"),
        (torch.tensor([1j]), "a tensor of torch.complex64"),
        (torch.zeros(2, dtype=torch.uint8), "a tensor of torch.uint8 .* takes uint8 for a mask"),
        (torch.tensor(3), r"a tensor of torch.int64 of shape \(\)"),
        ([0, 1], "list"),
    ],
)
def test_other_indices_are_refused(rows, message):
    references = ReferenceSet(torch.rand(5, 2))
    with pytest.raises(
        TypeError, match=rf"rows must be a slice such as \[2:3\], a mask .*, got {message}"
    ):
        references[rows]
    with pytest.raises(
        TypeError, match=rf"containing must be a tensor \(k,\) of row .*, got {message}"
    ):
        references.draw(3, containing=rows)


def test_a_draw_containing_no_rows():
    rows = ReferenceSet(torch.rand(5, 2)).draw(5, containing=torch.tensor([]))
    assert rows.sort().values.tolist() == [0, 1, 2, 3, 4]


def test_rows_without_dimensions(oracle, tmp_path):
    numbers = torch.randn(30)
    references, x = ReferenceSet(numbers), torch.randn(4, requires_grad=True)
    assert references.shape == (30,)
    assert torch.equal(references[torch.tensor([3])], numbers[3:4])
    mean = pfgm.posterior_mean(x, references, r=1.0)
    expected = oracle(x.detach(), numbers, 1.0, 1.0)[0][:, 0]
    np.testing.assert_allclose(mean.detach(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(mean.sum(), x)
    (expected,) = torch.autograd.grad(pfgm.posterior_mean(x, numbers, r=1.0).sum(), x)
    assert torch.equal(gradient, expected)
    for flows in (pfgm.PoissonFlow.from_data, partial(pfgm.PoissonFlowPP.from_data, D=4)):
        for data in (numbers, numbers.numpy(), references):
            flow = flows(data)
            assert flow.shape == ()
            assert flow.loss(flow.empirical(numbers), x.detach(), references).isfinite()
    with pytest.raises(ValueError, match=r"flips must be False for rows of shape \(\),"):
        references.flipped()
    with pytest.raises(ValueError, match=r"only rows \(k, …\).*got ReferenceSet\(\(30,\), "):
        references.save(tmp_path / "numbers.npy")


@pytest.mark.parametrize(("rows", "count"), [(1000, 64), (1000, 900), (70, 70)])
@pytest.mark.parametrize("flips", [False, True])
def test_draws(rows, count, flips):
    references = ReferenceSet(torch.rand(rows, 2), flips=flips)
    chosen = torch.tensor([5, 69, 0] + ([rows + 3] if flips else []))

    def draw(seed):
        return references.draw(count, containing=chosen, generator=seeded(seed))

    drawn = draw(0)
    assert drawn[: len(chosen)].tolist() == chosen.tolist()
    assert len(drawn.unique()) == count
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < len(references)
    assert torch.equal(draw(0), drawn)
    assert count == len(references) or not torch.equal(draw(1), drawn)


def test_draws_are_uniform():
    references, generator = ReferenceSet(torch.rand(40, 1)), seeded(0)
    for count in (10, 30):
        drawn = torch.cat([references.draw(count, generator=generator) for _ in range(1000)])
        seen = torch.bincount(drawn, minlength=40)
        expected = 1000 * count / 40
        assert float((seen - expected).square().sum() / expected) < 75  # χ² of 39: 1 in 2500


@pytest.mark.parametrize(
    ("count", "containing", "sentence"),
    [
        (11, [], "count must be an integer of at least 0 and at most 10, got 11."),
        (1, [1, 2], "count must be an integer of at least 2 and at most 10, got 1."),
        (5, [1, 1], "containing must hold each row once, got 1 twice."),
        (5, [999], "IndexError: containing must be from 0 to 9, got 999."),
    ],
)
def test_bad_draws(refused, count, containing, sentence):
    references, rows = ReferenceSet(torch.rand(10, 1)), torch.tensor(containing)
    refused(lambda: references.draw(count, containing=rows), sentence)


def test_storage_types():
    rows = images(20)
    references = ReferenceSet(rows)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        other = references.to(dtype=dtype)
        assert other.dtype == dtype
        torch.testing.assert_close(other[:].float(), pfgm.data.to_unit(rows), atol=4e-3, rtol=0)
    floats = references.to(dtype=torch.float32)
    assert torch.equal(floats.to(dtype=torch.uint8)[:], rows)
    with pytest.raises(ValueError, match=r"references must be in \[-1, 1\] for.*got 2\.5\."):
        ReferenceSet(2 * floats[:] + 0.5).to(dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        references.to(dtype=torch.int32)
    with pytest.raises(ValueError, match=r"dtype must be one that holds values up to 1e\+06, got"):
        ReferenceSet(torch.full((3, 2), 1e6)).to(dtype=torch.float16)


def test_saved_sets_are_read_again(small_chunks, tmp_path):
    rows = images(33)
    for saved in (rows, pfgm.data.to_unit(rows)):
        ReferenceSet(saved).save(tmp_path / "set.npy")
        assert np.array_equal(np.load(tmp_path / "set.npy"), saved.numpy())
        assert torch.equal(ReferenceSet(tmp_path / "set.npy")[:], saved)
    with pytest.raises(ValueError, match="bfloat16"):
        ReferenceSet(saved.bfloat16()).save(tmp_path / "set.npy")


def test_labels():
    rows, labels = images(20), torch.arange(20) % 2
    references = ReferenceSet(rows, labels=labels)
    flow = pfgm.PoissonFlow.from_data(rows)
    x = pfgm.data.to_unit(rows[:6])

    def loss(references, **options):
        generator = seeded(0)
        net = flow.empirical(rows)
        return flow.loss(
            lambda x, z, labels: net(x, z),
            x,
            references,
            generator,
            condition={"labels": torch.tensor([0, 1, 0, 1, -1, 1])},
            **options,
        )

    torch.testing.assert_close(loss(references), loss(rows, reference_labels=labels))
    with pytest.raises(ValueError, match=r"labels must be.*got torch\.int64 of shape"):
        ReferenceSet(rows, labels=torch.arange(3))


def test_values_that_are_not_finite(small_chunks, tmp_path):
    rows = pfgm.data.to_unit(images(40))
    rows[31, 0, 1, 2] = math.nan
    message = r"data must be finite, got NaN or infinity \(first in row 31\)"
    with pytest.raises(ValueError, match=message):
        ReferenceSet(rows)
    with pytest.raises(ValueError, match=message):
        pfgm.posterior_mean(points(), on_disk(rows, tmp_path), r=1.0)
    for references in (ReferenceSet(images()), on_disk(images(), tmp_path)):
        with pytest.raises(ValueError, match="x must be finite, got NaN or infinity"):
            pfgm.posterior_mean(points() / 0, references, r=1.0)
        with pytest.raises(ValueError, match=r"must be finite and at least 0, got -1\.0 in row 2"):
            pfgm.posterior_mean(points(3), references, r=torch.tensor([1.0, 1.0, -1.0]))


def test_an_interrupted_pass_can_be_repeated(small_chunks, tmp_path):
    references = on_disk(images(40), tmp_path)
    for chunk in references.chunks():
        assert len(chunk) == 8
        break
    assert torch.equal(torch.cat([c.clone() for c in references.chunks()]), images(40))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64])
def test_unsigned_labels(dtype):
    labels = torch.arange(20).to(dtype)
    rows = torch.randn(20, 3)
    references = ReferenceSet(rows, labels=labels)
    assert references.labels.equal(torch.arange(20))
    flow = pfgm.PoissonFlow.from_data(references)
    net = flow.network("mlp", width=8, classes=20)
    config = TrainConfig(steps=1, batch_size=4)
    Trainer(flow, net, rows, config, labels=labels, progress=False).train()
    z = torch.ones(20)
    own, wide = (net(rows, z, labels=each)[0] for each in (labels, labels.long()))
    assert torch.equal(own, wide)
    flow.sample(net, 20, steps=1, condition={"labels": labels})


def test_labels_that_int64_cannot_hold_are_refused(tmp_path):
    large = np.full(20, 2**63 + 5, np.uint64)
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 3)), labels=large)
    items = [(torch.zeros(3), label) for label in large]
    for read in (
        lambda: ReferenceSet(torch.zeros(20, 3), labels=torch.from_numpy(large)),
        lambda: pfgm.data.open(str(tmp_path / "a.npz")),
        lambda: ReferenceSet(items),
        lambda: pfgm.metrics.train_classifier(torch.zeros(20, 1, 8, 8), torch.from_numpy(large)),
    ):
        with pytest.raises(ValueError, match=r"below 2\^63, got 9223372036854775813\."):
            read()
