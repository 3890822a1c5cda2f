"""Gradients from kept distances, against those of the operator and the oracle."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pfgm
from benchmarks.common import problems
from pfgm.backends import native
from pfgm.common.tensors import dequantise
from pfgm.core.problems import PosteriorMean, State, Upstream
from pfgm.ops import eager

if not native.has_extension():
    pytest.skip("the C++ kernels were not built", allow_module_level=True)

INF = math.inf


problem = partial(problems.problem, B=50, M=1500, shape=600)


def gradients(x, references, sigma, D, with_references=False, **options):
    x, sigma = x.detach().requires_grad_(), sigma.detach().requires_grad_()
    inputs = [x, sigma]
    if with_references:
        references = references.detach().requires_grad_()
        inputs.append(references)
    mean, lse = pfgm.posterior_mean(
        x, references, sigma=sigma, D=D, return_logsumexp=True, **options
    )
    return torch.autograd.grad((mean * x.detach().cos()).sum() + (lse * 0.1).sum(), inputs)


def assert_close(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        other = other.double().reshape(len(other), -1)
        error = (one.double().reshape(len(one), -1) - other).norm(dim=1)
        scale = other.norm(dim=1)
        assert (error <= tolerance * scale.clamp(min=float(scale.median()))).all()


@pytest.mark.parametrize(
    ("dtype", "reference_dtype", "D"),
    [
        (torch.float32, None, 1.0),
        (torch.float32, None, INF),
        (torch.float64, None, 128.0),
        (torch.float64, None, INF),
        (torch.float32, torch.uint8, 1.0),
        (torch.float32, torch.bfloat16, 128.0),
    ],
)
def test_gradients_are_those_of_the_operator_and_the_oracle(
    kept, monkeypatch, dtype, reference_dtype, D
):
    inputs = problem(dtype=dtype, reference_dtype=reference_dtype)
    results = gradients(*inputs, D)
    assert kept["backward"][-1] > 0
    monkeypatch.setattr(eager, "enabled", False)
    by_operator = gradients(*inputs, D)
    assert kept["backward"][-1] == 0
    assert_close(results, by_operator, 1e-6 if dtype == torch.float32 else 1e-12)
    x, references, sigma = inputs
    wide = dequantise(references, torch.float64)
    true = gradients(x.double(), wide, sigma, D, backend="reference")
    assert_close(results, true, 1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("M", [1, 2, 63, 65, 1500, 4500])  # the last takes three chunks
def test_gradients_of_references(kept, monkeypatch, M):
    inputs = problem(B=min(M, 50), M=M, shape=1030)
    results = gradients(*inputs, 1.0, with_references=True)
    assert kept["backward"][-1] > 0
    monkeypatch.setattr(eager, "enabled", False)
    assert_close(results, gradients(*inputs, 1.0, with_references=True), 1e-6)


def test_forward_passes_are_the_same_to_the_bit():
    x, references, sigma = problem()
    for D in (1.0, INF):
        plain = pfgm.posterior_mean(x, references, sigma=sigma, D=D)
        assert torch.equal(
            pfgm.posterior_mean(x.requires_grad_(), references, sigma=sigma, D=D), plain
        )
        x = x.detach()


@pytest.mark.parametrize("room", [0, 8, 32, 5000, 30000])
def test_too_little_memory_keeps_nothing(kept, monkeypatch, room):
    inputs = problem()
    monkeypatch.setattr(
        native, "room_for_distances", lambda _: torch.empty(max(room, 8), dtype=torch.uint8)
    )
    results = gradients(*inputs, 1.0)
    assert kept["backward"] == [0]
    monkeypatch.setattr(eager, "enabled", False)
    assert all(map(torch.equal, results, gradients(*inputs, 1.0)))


def test_few_features_keep_nothing(kept):
    gradients(*problem(shape=511), 1.0)
    assert kept["backward"] == [0]


def test_the_number_of_threads_changes_no_bit(threads):
    inputs, each = problem(B=100, M=3000), []
    for count in (1, 2, 3):
        threads(count)
        each.append(gradients(*inputs, 1.0, with_references=True))
    for other in each[1:]:
        assert all(map(torch.equal, each[0], other))


def test_a_graph_can_be_kept_and_used_twice(kept):
    x, references, sigma = problem()
    x.requires_grad_()
    total = pfgm.posterior_mean(x, references, sigma=sigma, D=1.0).sum()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x)
    assert torch.equal(first, second)
    assert kept["backward"][0] == kept["backward"][1] > 0


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changes_in_place_are_noticed(changed):
    tensors = [value.requires_grad_() * 1 for value in problem()]
    x, references, sigma = tensors
    mean = pfgm.posterior_mean(x, references, r=sigma, D=1.0)
    tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mean.sum().backward()


def test_nothing_is_kept_where_no_gradient_is_wanted(kept, monkeypatch):
    monkeypatch.setattr(eager, "one_call", lambda *_, **__: None)  # which has no gradient
    x, references, sigma = problem()
    pfgm.posterior_mean(x, references, sigma=sigma, D=INF)
    with torch.no_grad():
        pfgm.posterior_mean(x.requires_grad_(), references, sigma=sigma, D=INF)
    with torch.inference_mode():
        pfgm.posterior_mean(x, references, sigma=sigma, D=INF)
    assert kept["forward"] == [0, 0, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(kept, reentrant):
    x, references, sigma = problem()
    x.requires_grad_()

    def mean(x):
        return pfgm.posterior_mean(x, references, sigma=sigma, D=1.0).square().sum()

    (expected,) = torch.autograd.grad(mean(x), x)
    checkpoint(mean, x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)
    # The first pass of a reentrant checkpoint is without gradients, and keeps nothing.
    assert len([size for size in kept["forward"] if size > 0]) == (2 if reentrant else 3)
    assert len(set(kept["backward"])) == 1


def compiled(gradient):
    return torch.compile(gradient, backend="aot_eager", fullgraph=True)


def under_autocast(gradient):
    def run(x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return gradient(x)

    return run


@pytest.mark.parametrize("way", ["compiled", "torch.func", "autocast"])
def test_with_more_than_autograd_at_work_nothing_is_kept(kept, way):
    x, references, sigma = problem()

    def total(x):
        return pfgm.posterior_mean(x, references, sigma=sigma, D=1.0).square().sum()

    def gradient(total):
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(total(leaf), leaf)[0]

    expected = gradient(total)
    assert kept["forward"].pop() >= kept["backward"].pop() > 0
    if way == "torch.func":
        actual = torch.func.grad(total)(x)
    else:
        actual = gradient({"compiled": compiled, "autocast": under_autocast}[way](total))
    assert kept["backward"] == kept["forward"] == [0]
    assert_close([actual], [expected], 1e-6)


def test_batched_gradients_compute_the_distances_again(kept):
    x, references, sigma = problem(B=4)
    x.requires_grad_()
    mean = pfgm.posterior_mean(x, references, sigma=sigma, D=1.0)
    upstream = torch.randn(3, *mean.shape, generator=torch.Generator().manual_seed(0))
    (batched,) = torch.autograd.grad(mean, x, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(mean, x, one, retain_graph=True)[0] for one in upstream]
    assert_close(batched.flatten(0, 1)[:, None], torch.cat(each)[:, None], 1e-5)


def test_hooks_may_move_what_is_kept(kept):
    x, references, sigma = problem()
    plain = gradients(x, references, sigma, 1.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        moved = gradients(x, references, sigma, 1.0)
    assert all(map(torch.equal, plain, moved))
    assert kept["backward"][0] == kept["backward"][1] > 0


def test_what_another_problem_kept_is_refused():
    x, references, sigma = problem()
    whole = PosteriorMean(x, references, sigma, 1.0)
    memory = native.room_for_distances(whole)
    mean, lse, nearest, total = native.posterior_mean(whole, memory)
    used = int(memory[:8].view(torch.int64))
    upstream = Upstream(torch.ones_like(mean), torch.zeros_like(lse))
    state = State(mean, nearest, total)
    for wrong in (memory[: used - 8], memory[:16], memory):
        with pytest.raises(ValueError, match="the forward pass kept"):
            native.posterior_mean_backward(whole, state, upstream, (True, False, False), wrong)
    fewer = whole._replace(references=references[:-1])
    with pytest.raises(ValueError, match="the forward pass kept"):
        native.posterior_mean_backward(fewer, state, upstream, (True, False, False), memory[:used])


@pytest.mark.parametrize("kind", ["tensor", "set", "mirrored set", "file"])
def test_negated_views_are_not_read_as_their_memory(tmp_path, kind):
    """A view may stand for negated memory, as the imaginary part of a conjugate does."""
    x, rows, sigma = problem(B=9, M=70)
    G = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    if kind == "file":
        np.save(tmp_path / "rows.npy", rows.numpy())

    def negated(values):
        return torch._neg_view(-values)

    def references_of(rows):
        if kind == "tensor":
            return rows
        if kind == "file":
            return pfgm.ReferenceSet(tmp_path / "rows.npy")
        return pfgm.ReferenceSet(rows, flips=kind == "mirrored set")

    def results(x, rows, G, sigma):
        x, sigma = x.detach().requires_grad_(), sigma.detach().requires_grad_()
        mean = pfgm.posterior_mean(x, references_of(rows), sigma=sigma, D=1.0)
        return mean, *torch.autograd.grad(mean, (x, sigma), G)

    expected = results(x, rows, G, sigma)
    for arguments in (
        (negated(x), rows, G, sigma),
        (x, negated(rows), G, sigma),
        (x, rows, negated(G), sigma),
        (x, rows, G, negated(sigma)),
    ):
        assert all(map(torch.equal, results(*arguments), expected))
