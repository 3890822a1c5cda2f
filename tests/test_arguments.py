"""Which argument has which check.

Each kind of check is tested once. The table then gives every argument with such a check the values
that its kind refuses: it must raise the error of the kind, with its own name.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import pfgm
from pfgm import PoissonFlow, PoissonFlowPP, metrics, plotting
from pfgm.backends import requested
from pfgm.common import checks, numbers, values
from pfgm.networks import MLP, Denoiser, UNet, build
from pfgm.networks.config import MAX_DEPTH, MAX_WIDTH
from pfgm.networks.published.edm_unets import EDMDenoiser
from pfgm.networks.published.pfgm_unets import DDPMpp
from pfgm.networks.registry import NETWORKS
from pfgm.solvers import rk45
from pfgm.training import TrainConfig
from pfgm.training.run_config import RunConfig


class Kind(NamedTuple):
    """A check(name, value), and values that it refuses."""

    check: Any
    bad: tuple[Any, ...]


def whole(least=1, most=2**63 - 1):
    beyond = () if most == 2**63 - 1 else (most + 1,)
    check = partial(numbers.whole, least=least, most=most)
    return Kind(check, (least - 1, least + 0.5, True, str(least + 1), *beyond, 2**63))


def one_of(*names):
    return Kind(
        lambda name, value: checks.check_choice(name, value, names), ("other", 5, ["other"])
    )


NO_NUMBERS = (math.nan, math.inf, True, "2", torch.ones(2), torch.tensor(True), np.array("2"))
COUNT, FROM_0 = whole(), whole(0)
STEPS = whole(1, 10**6)
ABOVE_0 = Kind(numbers.positive, (0.0, -1.0, 1e-308, 1e308, 10**400, *NO_NUMBERS))
AT_LEAST_0 = Kind(numbers.non_negative, (-1.0, 1e308, *NO_NUMBERS))
GAMMA = Kind(
    numbers.check_at_least_0,
    (
        -1.0,
        math.nan,
        math.inf,
        True,
        "5",
        10**400,
        torch.ones(2),
        torch.ones((), requires_grad=True),
    ),
)


def sizes(most=2**63 - 1):
    return Kind(partial(numbers.int_tuple, most=most), ((), 2, "8", (3, 0), (3, 1.5), (1,) * 65))


SIZES = sizes()
SEED = Kind(lambda name, value: numbers.check_seed(value), ("a", 1.5, True, -(2**63) - 1, 2**64))
POINT = Kind(numbers.finite_values, ("x", 1j, [math.nan], math.inf, 10**400))
TRUTH = Kind(checks.check_bool, ("false", 1, None))
POINTS = torch.zeros(3, 2)
FLOATING = Kind(checks.check_floating, (POINTS.long(), POINTS.byte(), [0.0], 1.0))
FLOATS = Kind(checks.check_floating, (POINTS.long(), POINTS.byte()))  # of tensors
REAL = Kind(checks.check_dtype, (POINTS.long(), POINTS.bool()))
BACKEND = Kind(lambda name, value: requested(value), (3, True, [], 1.5))
OBJECTS = Kind(checks.check_tensor, (POINTS.numpy(), [1.0], 3))
FINITE = Kind(values.check_finite, (POINTS / 0, POINTS - math.inf))
ZEROS = torch.zeros(5, dtype=torch.long)

SENTENCES = [
    (COUNT, 0, "n must be an integer of at least 1, got 0."),
    (COUNT, 1.5, "n must be an integer of at least 1, got 1.5."),
    (COUNT, True, "n must be an integer of at least 1, got True."),
    (COUNT, "3", "n must be an integer of at least 1, got '3'."),
    (COUNT, 2**63, f"n must be an integer of at least 1 and at most {2**63 - 1}, got {2**63}."),
    (COUNT, torch.nn.Identity(), "n must be an integer of at least 1, got Identity."),
    (whole(0, 9), 10, "n must be an integer of at least 0 and at most 9, got 10."),
    (
        ABOVE_0,
        0.0,
        "n must be a number above 0 that float32 can hold, 1.2e-38 to 3.4e+38, got 0.0.",
    ),
    (
        AT_LEAST_0,
        -1,
        "n must be a number of at least 0 that float32 can hold, up to 3.4e+38, got -1.",
    ),
    (GAMMA, math.nan, "n must be a finite number of at least 0, got nan."),
    (GAMMA, torch.ones(2), "n must be a number, got a tensor of torch.float32 and shape (2,)."),
    (GAMMA, GAMMA.bad[-1], "TypeError: n must be a number, got a tensor that requires grad."),
    (SIZES, (), "n must be a non-empty list or tuple, got ()."),
    (SIZES, (3, 0), "n[1] must be an integer of at least 1, got 0."),
    (SIZES, (1,) * 65, "n must have at most 64 values, got 65."),
    (SEED, 2**64, f"seed must be an integer from -2^63 to below 2^64, got {2**64}."),
    (POINT, "x", "TypeError: n must hold real numbers, got 'x'."),
    (POINT, [math.nan], "n must be finite, got NaN or infinity."),
    (TRUTH, "false", "n must be True or False, got 'false'."),
    (one_of("a", "b"), "c", "n must be one of a, b, got 'c'."),
    (one_of("a", "b"), 5, "n must be one of a, b, got 5."),
    (FLOATING, POINTS.byte(), "TypeError: n must be a floating-point tensor, got torch.uint8."),
    (FLOATING, [0.0], "TypeError: n must be a floating-point tensor, got list."),
    (
        REAL,
        POINTS.long(),
        "TypeError: n must be uint8 or floating point, got torch.int64; use n.float().",
    ),
    (OBJECTS, [1.0], "TypeError: n must be a torch.Tensor, got list; use torch.as_tensor(n)."),
    (OBJECTS, None, "TypeError: n must be a torch.Tensor, got NoneType."),
    (
        FINITE,
        torch.tensor([[0.0], [math.inf]]),
        "n must be finite, got NaN or infinity (first in row 1).",
    ),
    (FINITE, torch.tensor([0, math.nan]), "n must be finite, got NaN or infinity."),
]


@pytest.mark.parametrize(("kind", "value", "sentence"), SENTENCES)
def test_the_sentence_of_each_kind(refused, kind, value, sentence):
    refused(lambda: kind.check("n", value), sentence)


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (COUNT, (1, np.int64(7), 2**63 - 1)),
        (whole(0, 9), (0, 9)),
        (ABOVE_0, (1e-37, 3, np.float32(2), torch.tensor(2.5), np.array([0.5]))),
        (AT_LEAST_0, (0, 3e38, torch.zeros(1))),
        (GAMMA, (0, 1e300, torch.tensor(5.0))),
        (SIZES, ([3], (1, 2), [1] * 64)),
        (SEED, (0, -(2**63), 2**64 - 1, np.int64(3))),
        (POINT, (1, [1.0, 2], torch.ones(2), np.ones(3, np.int8))),
        (TRUTH, (True, False)),
        (one_of("a", "b"), ("a", "b")),
        (FLOATING, (POINTS, POINTS.half())),
        (REAL, (POINTS, POINTS.byte())),
        (FINITE, (POINTS, POINTS.long(), torch.zeros(0, 2), torch.tensor(1.0))),
    ],
)
def test_what_each_kind_takes(kind, good):
    for value in good:
        kind.check("n", value)
    for value in kind.bad:
        with pytest.raises((ValueError, TypeError)):
            kind.check("n", value)


DATA = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
X, V = DATA[:3], torch.ones(3, 2)
FIELD = pfgm.Field(V, torch.ones(3))
FLOW = PoissonFlow((2,), data_norm=1.5)
NET = FLOW.empirical(DATA)
PLUS = PoissonFlowPP((2,), D=16)
DENOISER = PLUS.empirical(DATA)
IMAGES = torch.zeros(5, 1, 8, 8)
SOLVERS = one_of("euler", "heun", "multistep", "rk45", "consistency")
CHOICES = {
    "solver": SOLVERS,
    "schedule": Kind(one_of("log", "rho", "fitted").check, ("none",)),
}
SAMPLING = CHOICES | {"steps": STEPS}
WIDTH, DEPTH = whole(1, MAX_WIDTH), whole(1, MAX_DEPTH)
MLP_2, UNET = partial(MLP, (2,)), partial(UNet, (1, 8, 8))
ESTIMATORS = one_of("rademacher", "gaussian", "exact")
EMBEDDING = one_of("positional", "fourier")
DENOISERS_PREDICT = ("residual", "mean", "noise", "score")
PREDICTS = one_of(*DENOISERS_PREDICT, "field")
LEVELS = Kind(one_of("timestep", "log", "sigma").check, ("other",))
MASK = torch.ones(2, dtype=torch.bool)


def sampled(**options):
    return FLOW.sample(NET, 2, **options)


TABLE = [
    (partial(PoissonFlow, (2,)), {"M": ABOVE_0, "data_norm": ABOVE_0, "spread": ABOVE_0}),
    (
        partial(PoissonFlow, (2,), M=200),
        dict.fromkeys(("noise_std", "tau", "z_max", "z_min", "upper_norm"), ABOVE_0)
        | dict.fromkeys(("gamma", "z_exp"), AT_LEAST_0)
        | {"substitution": one_of("exact", "published")},
    ),
    (partial(PoissonFlow, (2,), spread=1.0), {"center": POINT}),
    (
        partial(PoissonFlowPP, (2,), D=2),
        dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "rho", "P_std"), ABOVE_0),
    ),
    (FLOW.prior, {"n": FROM_0}),
    (PLUS.prior, {"n": FROM_0}),
    (partial(FLOW.sample, NET), {"n": FROM_0}),
    (sampled, SAMPLING),
    (partial(PLUS.sample, DENOISER, 2), SAMPLING),
    (partial(sampled, solver="rk45"), {"rtol": AT_LEAST_0, "atol": AT_LEAST_0}),
    (partial(FLOW.encode, NET, X), SAMPLING),
    (partial(FLOW.encode, NET), {"x": REAL}),
    (partial(FLOW.decode, NET, X), SAMPLING),
    (partial(FLOW.fit_levels, DATA, 2), {"points": COUNT, "seed": SEED}),
    (partial(FLOW.fit_levels, DATA), {"steps": STEPS}),
    (partial(FLOW.inpaint, NET, X, MASK), SAMPLING | {"resample": whole(0, 10**6)}),
    (
        partial(FLOW.log_likelihood, NET, X),
        {"steps": STEPS, "rtol": ABOVE_0, "atol": ABOVE_0, "grey_levels": whole(2)},
    ),
    (partial(FLOW.log_likelihood, NET, X), {"estimator": ESTIMATORS}),
    (pfgm.data.to_unit, {"images": REAL}),
    (partial(pfgm.data.open, DATA), {"layout": one_of("auto", "images", "as-is")}),
    (partial(FLOW.denoise, NET, level=1.0), {"x": FLOATING}),
    (partial(FLOW.solve, NET, grid=[1.0, 0.5]), {"x": FLOATS}),
    (partial(FLOW.decode, NET), {"latent": FLOATS}),
    (partial(FLOW.rescale, temperature=2.0), {"latent": FLOATS}),
    (partial(FLOW.rescale, X), {"temperature": ABOVE_0}),
    (partial(FLOW.interpolate, NET, X, X), {"count": whole(2)}),
    (partial(FLOW.loss, NET, DATA), {"weighting": one_of("balanced", "published")}),
    *((partial(flow.loss, net), {"x": OBJECTS}) for flow, net in ((FLOW, NET), (PLUS, DENOISER))),
    (partial(FLOW.network, nn.Identity()), {"predicts": PREDICTS, "level": LEVELS}),
    (partial(PLUS.network, nn.Identity()), {"predicts": one_of(*DENOISERS_PREDICT)}),
    (partial(FLOW.network, nn.Identity()), {"data_std": ABOVE_0}),
    (partial(pfgm.interpolate, X, X), {"weights": POINT}),
    (partial(pfgm.interpolate, b=X, weights=[0.5]), {"a": FLOATING}),
    (partial(pfgm.field_fn, X, 1.0, DATA), {"gamma": GAMMA, "backend": BACKEND}),
    (partial(pfgm.posterior_mean, X, pfgm.ReferenceSet(DATA), r=1.0), {"backend": BACKEND}),
    *(
        (partial(call, X, DATA, sigma=1.0), {"backend": BACKEND})
        for call in (pfgm.posterior_mean, pfgm.log_density)
    ),
    (partial(pfgm.euler_step, X, FIELD, 2.0, 1.0), {"out": OBJECTS, "backend": BACKEND}),
    (partial(pfgm.euler_step, X, X, 2.0, 1.0, out=X.clone()), {"backend": BACKEND}),
    (partial(rk45, NET, X, [9.0, 1.0]), {"rtol": AT_LEAST_0, "atol": AT_LEAST_0}),
    (MLP_2, {"width": WIDTH, "depth": DEPTH, "classes": FROM_0, "center": POINT}),
    (MLP_2, {"data_std": ABOVE_0, "gamma": ABOVE_0, "scale": ABOVE_0}),
    (MLP, {"shape": SIZES}),
    (UNET, {"width": WIDTH, "blocks": DEPTH, "patch": COUNT, "classes": FROM_0}),
    (UNET, {"multipliers": sizes(MAX_WIDTH)}),
    (
        partial(EDMDenoiser, 3, 32),
        {"num_blocks": DEPTH, "model_channels": WIDTH, "classes": FROM_0},
    ),
    (
        partial(EDMDenoiser, 3, 32),
        {"embedding_type": EMBEDDING, "encoder_type": one_of("standard", "residual")},
    ),
    (partial(DDPMpp, 3, 32), {"embedding": EMBEDDING}),
    (partial(build, config={}), {"name": one_of(*NETWORKS)}),
    (partial(Denoiser, config={}), {"network": one_of("ddpmpp", "mlp", "ncsnpp", "unet")}),
    (partial(Denoiser, "mlp", {"shape": (2,)}), {"sigma_data": ABOVE_0}),
    (
        partial(EDMDenoiser, 1, 8, model_channels=8, channel_mult=[1], num_blocks=1),
        {"sigma_data": ABOVE_0},
    ),
    (partial(DDPMpp, 3, 32), {"nf": WIDTH, "num_res_blocks": DEPTH, "ch_mult": sizes(MAX_WIDTH)}),
    (partial(metrics.precision_recall, DATA, DATA), {"k": COUNT}),
    (partial(metrics.density_coverage, DATA, DATA), {"k": COUNT}),
    (partial(metrics.neighbour_distances, DATA), {"k": COUNT}),
    (
        partial(metrics.kernel_distance, DATA, DATA),
        {"degree": COUNT, "subsets": COUNT, "subset_size": whole(2, 20)},
    ),
    *(
        (partial(call, b=DATA), {"a": OBJECTS})
        for call in (metrics.frechet_distance, metrics.kernel_distance)
    ),
    (partial(metrics.frechet_distance, b=POINTS), {"a": FINITE}),
    (partial(metrics.frechet_distance, POINTS), {"b": FINITE}),
    (partial(metrics.precision_recall, samples=POINTS, k=1), {"real": FINITE}),
    (partial(metrics.precision_recall, real=POINTS, k=1), {"samples": FINITE}),
    (
        partial(metrics.inception_metrics, IMAGES, real=IMAGES),
        {"splits": COUNT, "batch_size": COUNT, "real": Kind(REAL.check, (IMAGES.long(),))},
    ),
    (partial(metrics.train_classifier, IMAGES, ZEROS), {"epochs": COUNT}),
    (partial(metrics.train_classifier, labels=ZEROS), {"images": FLOATING}),
    (partial(metrics.Classifier, (1, 8, 8), 3), {"width": whole(1, 2**16)}),
    *(
        (partial(TrainConfig), {name: kind})
        for kind, names in (
            (COUNT, "steps batch_size accumulate checkpoint_every log_every"),
            (FROM_0, "warmup evaluate_every"),
            (TRUTH, "compile"),
            (SEED, "seed"),
            (ABOVE_0, "learning_rate"),
            (one_of("none", "cosine"), "decay"),
        )
        for name in names.split()
    ),
    (
        RunConfig,
        {"width": COUNT, "blocks": COUNT, "multipliers": SIZES, "flips": TRUTH}
        | {"samples": whole(4, 10**7), "student_levels": whole(2, 10**6)},
    ),
    (partial(plotting.image_grid, IMAGES), {"columns": COUNT, "scale": COUNT}),
    (plotting.image_grid, {"images": OBJECTS}),
    (plotting.image_grid, {"images": REAL}),
    (plotting.image_grid, {"images": Kind(FINITE.check, (IMAGES / 0, IMAGES + math.inf))}),
    (partial(plotting.trajectory_grid, IMAGES[None], [1.0]), {"scale": COUNT}),
    (
        partial(plotting.animation, IMAGES[None], "a", "x.gif"),
        {"frames": whole(2, 10_000), "seconds": ABOVE_0},
    ),
    (partial(plotting.flow_lines, FLOW, NET), {"n": COUNT}),
    *((call, {"data": FLOATING}) for call in (plotting.field_lines, plotting.equipotentials)),
    *((call, {"data": FINITE}) for call in (plotting.field_lines, plotting.equipotentials)),
    (partial(plotting.trajectory_plot, levels=[1.0] * 3), {"paths": FLOATING}),
]


def rows():
    for call, arguments in TABLE:
        for name, kind in arguments.items():
            function = getattr(call, "func", call)
            yield pytest.param(call, name, kind, id=f"{function.__qualname__} {name}")


@pytest.mark.parametrize(("call", "name", "kind"), [*rows()])
def test_an_argument_has_its_check(call, name, kind):
    for value in kind.bad:
        with pytest.raises((ValueError, TypeError)) as expected:
            kind.check(name, value)
        with pytest.raises(expected.type) as raised:
            call(**{name: value})
        assert str(raised.value) == str(expected.value), value
