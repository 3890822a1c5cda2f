"""Few-step models: the loss against closed forms, and students that arrive in one evaluation."""

import copy
import dataclasses
import json
import math
from functools import partial

import pytest
import torch
from torch import nn

import pfgm
from benchmarks.common.problems import seeded
from pfgm.distillation import Consistency
from pfgm.training import TrainConfig, Trainer
from pfgm.training.runs import RunConfig, start


class GaussianMean(nn.Module):
    """The posterior mean of data N(0, s² I) in diffusion: x s²/(s² + σ²)."""

    def __init__(self, s=0.7):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def forward(self, x, sigma):
        return x * (self.s**2 / (self.s**2 + sigma**2))[:, None]


class GaussianEnd(GaussianMean):
    """The end of the ODE of these data, started from x at σ: x s/√(s² + σ²)."""

    def forward(self, x, sigma):
        return x * (self.s / (self.s**2 + sigma**2).sqrt())[:, None]


def diffusion(N=3):
    return pfgm.PoissonFlowPP((N,), D=math.inf, sigma_min=1e-4, sigma_max=20.0)


@pytest.mark.parametrize("ahead", [None, 1, 3])
def test_the_loss_of_the_exact_student_falls_as_the_teacher_converges(ahead):
    x = 0.7 * torch.randn(4000, 3, generator=seeded(), dtype=torch.float64)
    losses = []
    for steps in (20, 40, 80):
        consistency = Consistency(diffusion(), GaussianMean(), steps=steps, ahead=ahead)
        losses.append(float(consistency.loss(GaussianEnd(), x, generator=seeded(1)).detach()))
    assert losses[0] < 2e-2
    assert losses[1] < losses[0] / 2.8
    assert losses[2] < losses[1] / 2.8


def test_another_student_has_a_loss_and_the_teacher_gets_no_gradient():
    flow, teacher = diffusion(), GaussianMean()
    x = 0.7 * torch.randn(500, 3, generator=seeded(), dtype=torch.float64)
    consistency = Consistency(flow, teacher, steps=60)
    exact = float(consistency.loss(GaussianEnd(), x, generator=seeded(1)).detach())
    student = GaussianEnd(0.5)
    loss = consistency.loss(student, x, generator=seeded(1))
    assert float(loss.detach()) > 20 * exact
    loss.backward()
    assert student.s.grad is not None
    assert teacher.s.grad is None
    with torch.no_grad():
        teacher.s.fill_(3.0)  # the loss has a copy
    assert float(consistency.loss(GaussianEnd(), x, generator=seeded(1)).detach()) == exact


def test_rows_move_as_the_solver_moves_them():
    """Each row moves from its own level, as the multistep solver would move it."""
    data = torch.randn(40, 2, generator=seeded(), dtype=torch.float64)
    flow = pfgm.PoissonFlowPP((2,), D=64)
    teacher = flow.empirical(data)
    consistency = Consistency(flow, teacher, steps=7)
    x = torch.randn(6, 2, generator=seeded(1), dtype=torch.float64)
    places = torch.tensor([0, 0, 2, 3, 3, 6])
    expected = [
        flow.solve(
            teacher,
            row[None],
            consistency.levels[place:][: consistency.ahead + 1],
            solver="multistep",
        )[0]
        for row, place in zip(x, places.tolist(), strict=True)
    ]
    consistency._follow_teacher(x, places, {})
    torch.testing.assert_close(x, torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_the_last_step_ends_where_the_teacher_ends():
    """With one level below the first the target is the end of the teacher's Euler step."""
    flow = diffusion()
    x = torch.randn(50, 3, generator=seeded(), dtype=torch.float64)
    consistency = Consistency(flow, GaussianMean(), steps=1)
    assert consistency.levels == [flow.sigma_max, 0.0]
    loss = consistency.loss(GaussianMean(), x, generator=seeded(1))
    assert float(loss.detach()) < 1e-12


class Labelled(GaussianMean):
    """Data of label k is N(0, (k + 1)² s² I)."""

    def forward(self, x, sigma, labels):
        assert labels.shape == sigma.shape
        s = (labels + 1) * self.s
        return x * (s**2 / (s**2 + sigma**2))[:, None]


class LabelledEnd(Labelled):
    def forward(self, x, sigma, labels):
        s = (labels + 1) * self.s
        return x * (s / (s**2 + sigma**2).sqrt())[:, None]


def test_data_in_half_precision():
    """The empirical denoiser returns float32 for them."""
    data = torch.randn(50, 3, generator=seeded())
    flow = diffusion()
    net = flow.empirical(data)
    consistency = Consistency(flow, net, steps=6, ahead=3)
    narrow, wide = (consistency.loss(net, x, generator=seeded(1)) for x in (data.half(), data))
    assert narrow.dtype == torch.float32
    assert float(narrow) == pytest.approx(float(wide), rel=0.5)


@pytest.mark.parametrize("ahead", [None, 1])
def test_conditions_go_with_their_rows(ahead):
    labels = torch.randint(3, (500,), generator=seeded(2))
    x = torch.randn(500, 3, generator=seeded(), dtype=torch.float64)
    loss = Consistency(diffusion(), Labelled(), steps=60, ahead=ahead).loss
    right = loss(LabelledEnd(), x, generator=seeded(1), condition={"labels": labels})
    wrong = loss(
        lambda x, sigma, labels: LabelledEnd()(x, sigma, 0 * labels),
        x,
        generator=seeded(1),
        condition={"labels": labels},
    )
    assert float(right.detach()) < 2e-3
    assert float(wrong.detach()) > 3 * float(right.detach())


def test_a_teacher_may_return_a_view_of_its_points():
    flow = pfgm.PoissonFlowPP((2, 2), D=math.inf)
    x = torch.randn(20, 2, 2, generator=seeded(), dtype=torch.float64)
    view, copied = (
        Consistency(flow, teacher).loss(lambda x, sigma: 0 * x, x, generator=seeded(1))
        for teacher in (lambda x, sigma: x.mT, lambda x, sigma: x.mT.clone())
    )
    assert torch.equal(view, copied)


CORNERS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])


@pytest.mark.parametrize("D", [None, 64.0])
def test_a_student_arrives_in_one_evaluation(D):
    """The teacher is exact; alone, one evaluation of it gives the average of the corners."""
    data = CORNERS.repeat(16, 1)
    plain, plus = pfgm.PoissonFlow, pfgm.PoissonFlowPP
    flow = plain.from_data(data) if D is None else plus.from_data(data, D=D)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = flow.network("mlp", width=64, depth=2)
    teacher = flow.empirical(CORNERS)
    config = TrainConfig(
        steps=150, batch_size=64, learning_rate=3e-3, warmup=20, decay="cosine", ema=0.95
    )
    loss = Consistency(flow, teacher).loss
    student = Trainer(flow, network, data, config, progress=False, loss=loss).train()
    start = flow.prior(200, generator=seeded())

    def distance(net, steps, **options):
        x = flow.sample(
            net,
            200,
            solver="consistency",
            steps=steps,
            x_init=start,
            generator=seeded(1),
            **options,
        )
        return float(torch.cdist(x, CORNERS).min(1).values.mean())

    assert distance(teacher, 1) > 1.2
    assert distance(student, 1) < 0.2
    assert distance(student, 2, last=0.2) < 0.4


def test_the_solver_adds_the_noise_of_the_level_and_ends_with_a_mean():
    flow = pfgm.PoissonFlowPP((2,), D=8)
    seen = []

    def net(x, sigma):
        seen.append((x.clone(), float(sigma[0])))
        return torch.full_like(x, 0.25)

    x, nfe = flow.sample(
        net, 20_000, solver="consistency", steps=3, last=0.5, generator=seeded(), return_nfe=True
    )
    assert nfe == 3
    assert (x == 0.25).all()
    levels = flow.grid(3, last=0.5)
    assert [level for _, level in seen] == pytest.approx(levels[:-1])
    for points, level in seen[1:]:
        noise = (points - 0.25) / level
        # Of the Student distribution with 8 degrees of freedom: variance 8/6, P(|n| < 1) known.
        assert float(noise.square().mean()) == pytest.approx(8 / 6, rel=0.05)
        assert float((noise.abs() < 1).float().mean()) == pytest.approx(0.6534, abs=0.01)


def test_the_solver_is_seeded_and_can_be_watched():
    flow = diffusion(2)
    data = CORNERS.double()
    net, options = flow.empirical(data), {"solver": "consistency", "steps": 2, "last": 1.0}
    start = flow.prior(5, generator=seeded()).double()
    first, again, other = (
        flow.sample(net, 5, x_init=start, generator=seeded(seed), **options) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    steps = []
    flow.sample(net, 5, callback=lambda info: steps.append(info["step"]), **options)
    assert steps == [0, 1]
    stopped = flow.sample(net, 5, x_init=start, callback=lambda info: True, **options)
    assert torch.equal(stopped, start)


def test_the_solver_works_only_with_sample():
    flow = diffusion(2)
    with pytest.raises(ValueError, match="the solver consistency needs noise; use it"):
        flow.decode(flow.empirical(CORNERS), torch.ones(2, 2), solver="consistency")


def run_config(teacher, **changes):
    training = TrainConfig(
        precision="float32",
        steps=6,
        batch_size=16,
        warmup=0,
        checkpoint_every=3,
        evaluate_every=6,
        seed=1,
    )
    return RunConfig(
        teacher=str(teacher), student_levels=4, samples=10, training=training, **changes
    )


@pytest.mark.parametrize("D", [None, 128.0])
def test_a_run_makes_a_student_of_a_checkpoint(tmp_path, D):
    data = pfgm.data.digits().train
    plain, plus = pfgm.PoissonFlow, pfgm.PoissonFlowPP
    flow = plain.from_data(data) if D is None else plus.from_data(data, D=D)
    network = flow.network("unet", width=8)
    pfgm.save(tmp_path / "teacher.safetensors", flow, network)
    before = copy.deepcopy(network.state_dict())
    config = run_config(tmp_path / "teacher.safetensors")
    start(config, tmp_path / "run", progress=False, report=lambda line: None)
    loaded = pfgm.load(tmp_path / "run")
    assert loaded.flow == flow
    assert loaded.network.config == network.config
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before.values(), loaded.network.state_dict().values(), strict=True)
    )
    assert (tmp_path / "run" / "samples-00000006.png").exists()
    settled = dataclasses.replace(config, training=config.training.resolved())
    assert RunConfig.load(tmp_path / "run") == settled
    resumed = run_config(tmp_path / "teacher.safetensors", width=None)
    start(resumed, tmp_path / "run", resume=True, progress=False, report=lambda line: None)


def test_a_resumed_run_keeps_its_teacher(tmp_path):
    pfgm.data.save_array(tmp_path / "corners.npy", CORNERS.repeat(4, 1))
    flow = pfgm.PoissonFlow.from_data(CORNERS)
    teacher, kept = tmp_path / "teacher.safetensors", tmp_path / "kept.safetensors"
    network = flow.network("mlp", width=8)
    pfgm.save(teacher, flow, network, step=5)
    pfgm.save(kept, flow, network)
    training = TrainConfig(steps=1, batch_size=8)
    config = RunConfig(str(tmp_path / "corners.npy"), teacher=str(teacher), training=training)
    with_kept = dataclasses.replace(config, teacher=str(kept))
    begin = partial(start, folder=tmp_path / "run", progress=False, report=lambda line: None)
    begin(config)
    with torch.no_grad():
        next(network.parameters()).add_(1e-3)
    pfgm.save(teacher, flow, network, step=50)
    with pytest.raises(
        ValueError, match=r"teacher must hold the weights .*, got .*/teacher\.safetensors, with"
    ):
        begin(config, resume=True)
    begin(with_kept, resume=True)
    path = tmp_path / "run" / "config.json"
    earlier = json.loads(path.read_text())
    del earlier["teacher_checksum"]
    path.write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="which a resumed run keeps"):
        begin(config, resume=True)
    begin(with_kept, resume=True)
    assert "teacher_checksum" in json.loads(path.read_text())


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match=r"ahead must be an integer of .* at most 10, got 11\."):
        Consistency(diffusion(), GaussianMean(), ahead=11)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        start(run_config(tmp_path / "none"), tmp_path / "run", report=lambda line: None)
