"""Networks of other libraries as networks of the flows: flow.network(module)."""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pfgm
from pfgm.networks import Preconditioned, field_from_mean
from pfgm.networks.level_encodings import level_encoding
from pfgm.training import TrainConfig, Trainer

IMAGES = pfgm.PoissonFlow((1, 8, 8), data_norm=5.0)
PLUSPLUS = pfgm.PoissonFlowPP((1, 8, 8), D=128, sigma_data=0.6)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


class Probe(nn.Module):
    """Records its inputs and returns a fixed output, or a multiple of x."""

    def __init__(self, output=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.output = output

    def forward(self, x, time, y=None):
        self.x, self.time, self.y = x, time, y
        return self.weight * x if self.output is None else self.output


class Sines(nn.Module):
    """A small convolutional network with sinusoidal embeddings of time."""

    def __init__(self, channels=1, outputs=1, width=16):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.embedding = nn.Linear(width, width)
        self.last = nn.Conv2d(width, outputs, 3, padding=1)
        self.frequencies = 10_000 ** -torch.linspace(0, 1, width // 2)

    def forward(self, x, time):
        angles = time[:, None] * self.frequencies
        embedded = self.embedding(torch.cat([angles.sin(), angles.cos()], 1))
        return self.last(nn.functional.silu(self.first(x) + embedded[:, :, None, None]))


def points(generator, dtype=torch.float64):
    """Points at many levels, some of them far out at small levels."""
    level = torch.tensor([1e-10, 0.01, 0.5, 3.0, 40.0], dtype=dtype)
    x = torch.randn(5, 1, 8, 8, generator=generator, dtype=dtype)
    return x * torch.tensor([0.6, 30.0, 0.8, 5.0, 60.0]).view(-1, 1, 1, 1), level


def test_residual_is_edms_preconditioning(generator):
    """EDM, table 1, in plain numbers."""
    x, sigma = points(generator)
    probe = Probe().double()
    mean = PLUSPLUS.network(probe, level="log")(x, sigma)
    for row, s in enumerate(sigma.tolist()):
        total, d = s**2 + 0.6**2, 0.6
        assert float(probe.time[row]) == pytest.approx(math.log(s) / 4)
        torch.testing.assert_close(probe.x[row], x[row] / math.sqrt(total))
        expected = d**2 / total * x[row] + s * d / math.sqrt(total) * 0.3 * probe.x[row]
        torch.testing.assert_close(mean[row], expected.detach(), check_dtype=False)
    same = Preconditioned(probe, PLUSPLUS.sigma_data)(x, sigma, y=sigma)
    assert torch.equal(mean, same)
    torch.testing.assert_close(probe.time, sigma.log() / 4)
    assert probe.y is sigma


def test_residual_of_the_field_is_at_the_apparent_level(generator):
    """c_skip x + c_out F at the apparent level ν, in plain numbers."""
    x, z = points(generator)
    probe = Probe().double()
    net = IMAGES.network(probe, level="sigma", data_std=0.6)
    mean, field = net.mean(x, z), net(x, z)
    apparent = []
    for row, level in enumerate(z.tolist()):
        ms = float(x[row].square().mean())
        nu2 = level**2 + max(0.0, ms - 4 * 0.6**2)
        apparent.append(math.sqrt(nu2))
        torch.testing.assert_close(probe.x[row], x[row] / math.sqrt(nu2 + 0.36))
        c_out = 0.6 * 10 / math.sqrt(100 + 0.36 / nu2)
        expected = 0.36 / (0.36 + nu2) * x[row] + c_out * 0.3 * probe.x[row]
        torch.testing.assert_close(mean[row], expected.detach(), check_dtype=False)
    torch.testing.assert_close(probe.time, torch.tensor(apparent, dtype=torch.float64))
    assert apparent[1] > 10  # far out at a level of 0.01
    torch.testing.assert_close(mean[0], x[0])  # on the data nothing is changed
    torch.testing.assert_close(field, field_from_mean(x, z, mean, gamma=IMAGES.gamma))


@pytest.mark.parametrize("predicts", ["residual", "noise", "score"])
def test_the_field_has_the_digits_of_x_minus_mean(generator, predicts):
    """Far from the origin and close to the data, where a rounded mean has lost them."""
    center = 1e4 if predicts == "residual" else 0.0
    data = center + torch.randn(50, 1, 4, 4, generator=generator)
    flow = pfgm.PoissonFlow((1, 4, 4), spread=1.0, center=center)
    net = flow.network(Sines(), predicts=predicts, level="log", data_std=1.0)
    z = torch.logspace(-4, 0, 50)
    result = net(data, z)[0].double()
    net.double()
    net.net.net.frequencies = net.net.net.frequencies.double()
    expected = net(data.double(), z.double())[0]
    error = (result - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 2e-5


@pytest.mark.parametrize(
    ("predicts", "output"),
    [
        ("mean", lambda x, mean, sigma: mean),
        ("noise", lambda x, mean, sigma: (x - mean) / sigma),
        ("score", lambda x, mean, sigma: (mean - x) / sigma**2),
    ],
)
def test_trained_networks_are_read_as_what_they_predict(generator, predicts, output):
    """A network that returns the exact mean at every level, for inputs that are not scaled."""
    data = torch.rand(30, 1, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    flow = pfgm.PoissonFlowPP((1, 8, 8), D=math.inf)

    class Trained(nn.Module):
        def forward(self, x, sigma):
            mean = pfgm.posterior_mean(x, data, sigma=sigma, D=math.inf)
            return output(x, mean, sigma.view(-1, 1, 1, 1))

    x, sigma = flow.perturb(data, generator)
    net = flow.network(Trained(), predicts=predicts, level="sigma")
    torch.testing.assert_close(net(x, sigma), flow.empirical(data)(x, sigma), rtol=0, atol=1e-9)


@pytest.mark.parametrize("predicts", ["mean", "noise", "score"])
def test_trained_networks_give_the_field(generator, predicts):
    """The field of a single charge is known; the network is given the apparent level."""
    charge = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    told = []

    class Trained(nn.Module):
        def forward(self, x, sigma):
            told.append(sigma)
            away, rows = x - charge, sigma.view(-1, 1, 1, 1)
            return {"mean": charge.expand_as(x), "noise": away / rows, "score": -away / rows**2}[
                predicts
            ]

    x, z = points(generator)
    net = IMAGES.network(Trained(), predicts=predicts, level="sigma", data_std=0.6)
    correct = pfgm.field_fn(x[1:], z[1:], charge, gamma=IMAGES.gamma)
    torch.testing.assert_close(net(x[1:], z[1:]), correct, rtol=1e-9, atol=1e-9)
    excess = (x[1:].square().flatten(1).mean(1) - 4 * 0.36).clamp(min=0)
    torch.testing.assert_close(told[0].square(), z[1:].square() + excess)


def test_the_field_itself_as_published(generator):
    """C + 1 channels: field_x, and field_z as a mean over the pixels; the inputs are x and z."""
    x, z = points(generator)
    output = torch.randn(5, 2, 8, 8, generator=generator, dtype=torch.float64)
    probe = Probe(output)
    field_x, field_z = IMAGES.network(probe, predicts="field", level="sigma")(x, z)
    assert torch.equal(field_x, output[:, :1])
    torch.testing.assert_close(field_z, output[:, 1].mean((1, 2)))
    assert probe.x is x
    assert torch.equal(probe.time, z)
    flat = pfgm.PoissonFlow((64,), M=200).network(Probe(torch.randn(5, 65)), predicts="field")
    assert [part.shape for part in flat(x.flatten(1), z)] == [(5, 64), (5,)]


def test_data_std_comes_from_the_flow():
    data = pfgm.data.digits().train
    flow = pfgm.PoissonFlow.from_data(data)
    result = flow.network(Probe()).data_std
    assert result == pytest.approx(float(data.square().mean().sqrt()), rel=0.02)
    norm = 10 * float(data.flatten(1).norm(dim=1).mean())
    scaled = pfgm.PoissonFlow((1, 8, 8), data_norm=norm, noise_std=0.1, tau=0.05)
    assert scaled.network(Probe()).data_std == pytest.approx(10 * result, rel=0.04)
    moved = 10 * data + 3
    flow = pfgm.PoissonFlow.from_data(moved)
    assert flow.network(Probe()).data_std == flow.spread
    noise = flow.network(Probe(), predicts="noise")
    assert noise.data_std == pytest.approx(float(moved.double().square().mean().sqrt()))
    assert float(noise.center) == 0
    assert PLUSPLUS.network(Probe()).sigma_data == 0.6
    assert PLUSPLUS.network(Probe(), data_std=0.9).sigma_data == 0.9


@pytest.mark.parametrize("flow", [IMAGES, PLUSPLUS], ids=["field", "denoiser"])
@pytest.mark.parametrize("name", ["timestep", "log", "sigma"])
def test_levels_are_encoded_and_decoded(flow, name):
    encoding = level_encoding(name, flow.first_level, flow.last_level)
    levels = torch.logspace(
        math.log10(flow.last_level), math.log10(flow.first_level), 50, dtype=torch.float64
    )
    values = encoding(levels)
    assert bool((values.diff() > 0).all())
    torch.testing.assert_close(encoding.decode(values), levels)
    ends = {
        "timestep": [0.0, 1000.0],
        "log": [math.log(flow.last_level) / 4, math.log(flow.first_level) / 4],
        "sigma": [flow.last_level, flow.first_level],
    }[name]
    assert values[[0, -1]].tolist() == pytest.approx(ends, abs=1e-9)
    assert torch.isfinite(encoding(torch.tensor([1e-10]))).all()  # the smallest z in training


def test_a_level_may_be_any_function(generator):
    x, sigma = points(generator)
    probe = Probe().double()
    PLUSPLUS.network(probe, level=lambda level: 7 * level)(x, sigma)
    assert torch.equal(probe.time, 7 * sigma)


def test_every_form_of_result(generator):
    x, sigma = points(generator)
    correct = PLUSPLUS.network(Probe(x))(x, sigma)
    twice = torch.cat([x, torch.full_like(x, math.nan)], 1)  # with a learned variance
    for output in ((x, "more"), [x], SimpleNamespace(sample=x), twice, (twice,)):
        assert torch.equal(PLUSPLUS.network(Probe(output))(x, sigma), correct)


@pytest.mark.parametrize(
    ("flow", "options", "output", "sentence"),
    [
        (PLUSPLUS, {}, "x", "net must return a tensor, a tuple or…whose sample is one, got str."),
        (PLUSPLUS, {}, (), "net must return a tensor, a tuple or…sample is one, got tuple."),
        (PLUSPLUS, {}, {"sample": 1}, "net must return a tensor, a tuple…is one, got dict."),
        (PLUSPLUS, {}, torch.zeros(5, 3, 8, 8), "net must return the shape…got (5, 3, 8, 8)."),
        (IMAGES, {}, torch.zeros(5, 1, 4, 4), "net must return the shape of…got (5, 1, 4, 4)."),
        (
            IMAGES,
            {"predicts": "field"},
            torch.zeros(5, 1, 8, 8),
            "net must…with one channel more…(5, 1, 8, 8).",
        ),
    ],
)
def test_wrong_results(generator, refused, flow, options, output, sentence):
    net = flow.network(Probe(output), **options)
    refused(lambda: net(*points(generator)), sentence)


def test_a_condition_that_the_module_does_not_take(refused):
    refused(
        lambda: PLUSPLUS.network(Probe(), conditions={"labels": "class_labels"}),
        "conditions has 'class_labels', which Probe does not take; its conditions are y.",
    )


def test_conditions_by_their_own_names_and_others(generator):
    x, sigma = points(generator)
    labels = torch.tensor([3, -1, 0, 2, -1])
    probe = Probe().double()
    PLUSPLUS.network(probe)(x, sigma, y=labels)
    assert probe.y is labels
    PLUSPLUS.network(probe, conditions={"labels": "y"})(x, sigma, labels=labels)
    assert probe.y is labels
    renamed = IMAGES.network(probe, conditions={"labels": "y"}, no_label=10)
    renamed(x, sigma, labels=labels)
    assert probe.y.tolist() == [3, 10, 0, 2, 10]
    with pytest.raises(ValueError, match="has 'text', which Probe does not take"):
        renamed(x, sigma, text=labels)


@pytest.mark.parametrize(
    ("flow", "predicts"),
    [(IMAGES, "residual"), (IMAGES, "field"), (PLUSPLUS, "residual"), (PLUSPLUS, "mean")],
)
def test_it_trains_in_three_lines(flow, predicts, losses_in_training):
    torch.manual_seed(0)
    data = pfgm.data.digits().train[:64]
    net = flow.network(Sines(outputs=2 if predicts == "field" else 1), predicts=predicts)
    losses = losses_in_training(
        net, partial(flow.loss, net, data, data), steps=40, learning_rate=1e-2, seeds=4
    )
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert flow.sample(net, 2, steps=3).isfinite().all()


class Labelled(nn.Module):
    """A network with an embedding of ten labels and of no label, and of times."""

    def __init__(self):
        super().__init__()
        self.inner = Sines()
        self.table = nn.Embedding(11, 64)

    def forward(self, x, time, class_labels):
        return self.inner(x, time) + self.table(class_labels).view_as(x)


@pytest.mark.parametrize("flow", [IMAGES, PLUSPLUS], ids=["field", "denoiser"])
def test_the_trainer_and_guidance_give_labels(flow):
    data = pfgm.data.digits()
    net = flow.network(Labelled(), conditions={"labels": "class_labels"}, no_label=10)
    config = TrainConfig(steps=3, warmup=1, batch_size=16, reference_batch=200, label_dropout=0.5)
    trained = Trainer(
        flow, net, data.train, config, labels=data.train_labels, progress=False
    ).train()
    labels = torch.arange(4)
    options = {
        "steps": 2,
        "condition": {"labels": labels},
        "guidance": 2.0,
        "x_init": flow.prior(4, generator=torch.Generator().manual_seed(0)),
    }
    samples = flow.sample(trained, 4, **options)
    none = {"labels": torch.full_like(labels, -1)}
    assert torch.equal(samples, flow.sample(trained, 4, unconditional=none, **options))
    assert samples.isfinite().all()
    with pytest.raises(ValueError, match="has 'text'"):
        flow.sample(trained, 4, condition={"text": labels})


@pytest.mark.parametrize("flow", [IMAGES, PLUSPLUS], ids=["field", "denoiser"])
def test_copies_are_the_same(flow, generator):
    net = flow.network(Sines())
    x, level = points(generator, torch.float32)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(again(x, level), net(x, level), rtol=0, atol=0)
