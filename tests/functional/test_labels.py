"""posterior_mean, field_fn and log_density over the references of each point's own label."""

import math

import numpy as np
import pytest
import torch

from benchmarks.common.problems import seeded
from pfgm import ReferenceSet, field_fn, log_density, posterior_mean
from pfgm.references.labels import targets_by_label

B, M, SHAPE = 12, 40, (1, 2, 3)
LABELS = torch.tensor([2, 0, -1, 1, 0, 7, -5, 2, 1, 0, 7, 2])
SEEN = torch.arange(M) % 3
SEEN[5] = 7  # the label of one reference alone
SEEN[6] = -1  # seen by points without a label
BOTH = {"labels": LABELS, "reference_labels": SEEN}


def problem(dtype=torch.float64):
    generator = seeded(0)
    references = torch.rand(M, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    x = references[:B] + 0.3 * torch.randn(B, *SHAPE, generator=generator, dtype=torch.float64)
    sigma = torch.rand(B, generator=generator, dtype=torch.float64) + 0.1
    return x.to(dtype), references.to(dtype), sigma


def own(label):
    """The rows that a point of a label sees."""
    return label == SEEN if label >= 0 else torch.ones(M, dtype=torch.bool)


def by_point(x, references, r, D, oracle):
    """Mean and log-sum-exp of each point alone, over the references that it sees."""
    of_points = [
        oracle(x[i : i + 1], references[own(label)], r[i : i + 1], D)
        for i, label in enumerate(LABELS.tolist())
    ]
    means, sums = (torch.cat(each) for each in zip(*of_points, strict=True))
    return means.view(B, *SHAPE), sums


@pytest.mark.parametrize("D", [1.0, 16.0, math.inf])
@pytest.mark.parametrize("kind", ["tensor", "set", "flips", "file", "bytes"])
def test_each_point_sees_the_references_of_its_label(backend, oracle, tmp_path, kind, D):
    x, references, sigma = problem()
    both, given = BOTH, references
    if kind == "bytes":
        given = ((references + 1) * 127.5).round().byte()
        references = given.double() / 127.5 - 1
    elif kind == "flips":  # rows M to 2M − 1 are equal to the others if the rows are palindromes
        references[..., 2] = references[..., 0]
        given = ReferenceSet(references, flips=True, labels=SEEN)
    elif kind == "set":
        given = ReferenceSet(references, labels=SEEN)
    elif kind == "file":
        np.save(tmp_path / "rows.npy", references.numpy())
        given = ReferenceSet(tmp_path / "rows.npy", labels=SEEN)
    if isinstance(given, ReferenceSet):
        both = {"labels": LABELS}
    twice = math.log(2) if kind == "flips" else 0.0
    r = sigma if math.isinf(D) else sigma * math.sqrt(D)
    mean, lse = by_point(x, references, r, D, oracle)

    options = {"sigma": sigma, "D": D, "backend": backend, **both}
    got, got_lse = posterior_mean(x, given, return_logsumexp=True, **options)
    torch.testing.assert_close(got, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_lse, lse + twice, rtol=1e-10, atol=1e-10)
    assert torch.equal(posterior_mean(x, given, **options), got)
    # Normalised by the references that a point sees.
    counts = torch.tensor([int(own(label).sum()) for label in LABELS.tolist()])
    one = log_density(x, references[:1], sigma=sigma, D=D)
    kernel = one - posterior_mean(x, references[:1], sigma=sigma, D=D, return_logsumexp=True)[1]
    density = log_density(x, given, **options)
    torch.testing.assert_close(density, lse - counts.double().log() + kernel, rtol=1e-9, atol=1e-9)
    if D == 1:
        charge = torch.cat([(x - mean).flatten(1), r[:, None]], 1)
        field = -math.sqrt(6) * charge / (charge.norm(dim=1, keepdim=True) + 2)
        got_x, got_z = field_fn(x, r, given, gamma=2.0, backend=backend, **both)
        torch.testing.assert_close(torch.cat([got_x.flatten(1), got_z[:, None]], 1), field)


def test_without_labels_a_set_with_labels_gives_the_mean_over_all():
    x, references, sigma = problem()
    labelled = ReferenceSet(references, labels=SEEN)
    for mean in (
        posterior_mean(x, labelled, sigma=sigma),
        posterior_mean(x, labelled, sigma=sigma, labels=torch.full((B,), -1)),
    ):
        torch.testing.assert_close(mean, posterior_mean(x, references, sigma=sigma))
    # Other labels may be given than those of the set.
    other = {"labels": LABELS.clamp(max=1), "reference_labels": torch.arange(M) % 2}
    assert torch.equal(
        posterior_mean(x, labelled, sigma=sigma, **other),
        posterior_mean(x, references, sigma=sigma, **other),
    )


def test_gradients():
    """In points, levels and references, in backward and forward mode."""
    x, references, sigma = (each.requires_grad_() for each in problem())
    for function in (
        lambda x, y, r: field_fn(x, r, y, **BOTH),
        lambda x, y, r: posterior_mean(x, y, sigma=r, D=16, return_logsumexp=True, **BOTH),
        lambda x, y, r: log_density(x, y, sigma=r, D=math.inf, **BOTH),
    ):
        assert torch.autograd.gradcheck(
            function, (x, references, sigma), check_forward_ad=True, fast_mode=True
        )
    labelled = ReferenceSet(references.detach(), labels=SEEN)
    (got,) = torch.autograd.grad(
        log_density(x, labelled, sigma=sigma, labels=LABELS).sum(), x, retain_graph=True
    )
    (expected,) = torch.autograd.grad(log_density(x, references, sigma=sigma, **BOTH).sum(), x)
    torch.testing.assert_close(got, expected)


def test_transforms_and_compiled_functions():
    x, references, sigma = problem()

    def mean(x):
        return posterior_mean(x, references, sigma=sigma, **BOTH)

    (expected,) = torch.autograd.grad(mean(x.requires_grad_()).square().sum(), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: mean(x).square().sum())(x), expected)
    batches = torch.stack([x, x + 1])
    torch.testing.assert_close(
        torch.func.vmap(mean)(batches), torch.stack([mean(x), mean(x + 1)]), rtol=0, atol=0
    )

    def density(x, labels):
        both = {"labels": labels, "reference_labels": SEEN}
        return log_density(2 * x, references, r=1.0, **both).exp()

    compiled = torch.compile(density, backend="eager")
    for labels in (LABELS, LABELS.flip(0), LABELS.clamp(max=0)):
        assert torch.equal(compiled(x, labels), density(x, labels))


def test_one_call_for_each_label():
    """Not for each point; points without a label share one."""
    called = []

    def target(x, references):
        called.append((len(x), len(references)))
        return x + references.mean()

    x, references = torch.arange(3000.0), torch.tensor([0.0, 10.0, 20.0, 10.0])
    labels = torch.arange(3000) % 4 - 2
    results = targets_by_label(target, (x,), references, labels, torch.tensor([0, 1, 2, 1]))
    assert called == [(1500, 4), (750, 1), (750, 2)]
    assert torch.equal(results, x + torch.tensor([10.0, 10.0, 0.0, 10.0])[labels + 2])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.uint64])
def test_labels_of_every_dtype_and_half_precision(dtype):
    x, references, sigma = problem(torch.float32)
    labels, seen = (torch.arange(count) % 2 for count in (B, M))
    expected = posterior_mean(x, references, sigma=sigma, labels=labels, reference_labels=seen)
    narrow = {"labels": labels.to(dtype), "reference_labels": seen.to(dtype)}
    assert torch.equal(posterior_mean(x, references, sigma=sigma, **narrow), expected)
    half = posterior_mean(x.bfloat16(), references, sigma=sigma, **narrow)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.1)


def test_no_points():
    x, references, _ = problem()
    none = {"labels": LABELS[:0], "reference_labels": SEEN}
    assert posterior_mean(x[:0], references, sigma=1.0, **none).shape == (0, *SHAPE)
    field_x, field_z = field_fn(x[:0], 1.0, references, **none)
    assert (field_x.shape, field_z.shape) == ((0, *SHAPE), (0,))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": None}, "labels must be given with reference_labels,…for no label, got None."),
        ({"reference_labels": None}, "reference_labels must have shape (40,) with…got None."),
        ({"labels": LABELS + 1}, "labels must be in reference_labels, or negative…got 3."),
        ({"labels": LABELS[:3]}, "labels must be integers of shape (12,),…of shape (3,)."),
        ({"labels": LABELS.double()}, "labels must be integers of…got torch.float64 of…(12,)."),
        ({"labels": LABELS[:, None]}, "labels must be integers of…shape (12, 1)."),
        ({"labels": [0] * B}, "TypeError: labels must be a torch.Tensor of integers,…got list."),
        ({"reference_labels": SEEN[1:]}, "reference_labels must be integers of…shape (39,)."),
        ({"reference_labels": SEEN / 2}, "reference_labels must be…got torch.float32 of…(40,)."),
        ({"r": torch.arange(B) - 4.0}, "r, sigma or z must be…in row 0. Rows are…within label -1."),
        ({"sigma": 1.0}, "exactly one of r and sigma must be given, got both."),
        ({"r": torch.ones(3)}, "r must be a number or a tensor of shape (12,),…got shape (3,)."),
        ({"references": torch.zeros(M, 5)}, "x and references must have shapes…(40, 5)."),
    ],
)  # fmt: skip
def test_refusals(refused, change, sentence):
    x, references, _ = problem()
    arguments = {"x": x, "references": references, "r": 1.0, **BOTH, **change}
    for function in (posterior_mean, log_density):
        refused(lambda function=function: function(**arguments), sentence)
    if "labels" in sentence:
        level = arguments.pop("r")
        refused(lambda: field_fn(z=level, **arguments), sentence)
