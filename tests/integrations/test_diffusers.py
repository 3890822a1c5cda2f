"""Schedulers and networks of diffusers, with the package itself."""

import importlib
import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import pfgm
from pfgm import solvers

DATA = pfgm.data.digits().train[:100]
FIELD = pfgm.PoissonFlow.from_data(DATA)
DENOISERS = {D: pfgm.PoissonFlowPP.from_data(DATA, D=D) for D in (1.0, 128.0, math.inf)}


def name(flow):
    return f"{type(flow).__name__}-{flow.D}"


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("diffusers", reason="diffusers is not installed: '.[diffusers]'")
    import diffusers

    return diffusers


@pytest.fixture(scope="module")
def schedulers(diffusers):
    from pfgm.integrations import diffusers as module

    return SimpleNamespace(
        field=module.PoissonFlowScheduler,
        plus=module.PoissonFlowPPScheduler,
        pipeline=module.PoissonFlowPipeline,
    )


@pytest.fixture(scope="module")
def unets(diffusers):
    """build(channels): a UNet2DModel for digits with so many output channels."""

    def build(channels):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return diffusers.UNet2DModel(
                sample_size=8,
                in_channels=1,
                out_channels=channels,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4,
            ).eval()

    return build


PREDICTIONS = [
    (FIELD, "field"),
    *((DENOISERS[D], "residual") for D in (128.0, math.inf)),
    *((DENOISERS[128.0], predicts) for predicts in ("mean", "noise", "score")),
]


def predictions(value):
    return value if isinstance(value, str) else name(value)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def transformer(diffusers, channels):
    """A small DiT for digits with ten labels."""
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=channels,
        num_layers=1, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip


def scheduler_of(schedulers, flow, **options):
    kind = schedulers.field if flow is FIELD else schedulers.plus
    return kind.from_flow(flow, **options)


def diffusers_loop(scheduler, unet, x):
    """The loop of diffusers' own documentation; points before each call, and means."""
    points, means = [], []
    with torch.no_grad():
        for t in scheduler.timesteps:
            points.append(x)
            output = unet(scheduler.scale_model_input(x, t), t).sample
            step = scheduler.step(output, t, x)
            x = step.prev_sample
            means.append(step.pred_original_sample)
    return x, points, means


STEPS = tuple(solvers.GRID_SOLVERS)


@pytest.mark.parametrize(
    ("flow", "predicts", "solver", "level"),
    [
        *((*each, solver, "timestep") for each in PREDICTIONS[:2] for solver in STEPS),
        *((*each, "heun", "timestep") for each in PREDICTIONS[2:]),
        *((*each, "multistep", "log") for each in PREDICTIONS[:2]),
    ],
    ids=predictions,
)
def test_a_scheduler_takes_the_steps_of_the_flow(
    schedulers, unets, flow, predicts, solver, level, same
):
    unet = unets(2 if predicts == "field" else 1)
    scheduler = scheduler_of(schedulers, flow, solver=solver, prediction_type=predicts, level=level)
    scheduler.set_timesteps(5)
    evaluations = solvers.SOLVERS[solver].evaluations
    assert scheduler.order == evaluations
    assert 4 * evaluations < len(scheduler.timesteps) <= 5 * evaluations
    x = scheduler.prior(3, seeded())
    end, points, means = diffusers_loop(scheduler, unet, x)

    steps = []
    correct = flow.sample(
        flow.network(unet, predicts=predicts, level=level),
        3,
        x_init=x,
        steps=5,
        solver=solver,
        callback=steps.append,
    )
    same(end, correct, 1e-5)
    begins = range(0, len(points), evaluations)
    for call, step in zip(begins, steps, strict=True):
        assert float(scheduler.sigmas[call]) == pytest.approx(step["z"])
        same(points[call], step["x"], 1e-5)
        same(means[call], step["mean"], 1e-5)


def test_a_function_is_no_solver(schedulers, refused):
    create = partial(schedulers.plus.from_flow, DENOISERS[128.0])
    sentence = "TypeError: solver must be one of euler,…got a function; flow.sample…"
    for solver in (solvers.heun, solvers.SAMPLERS["heun"], lambda denoise, x, grid: (x, 0)):
        for call in (create, create().register_to_config):
            refused(partial(call, solver=solver), sentence)


def test_a_run_of_heun_starts_with_a_step(schedulers, refused):
    """Its second evaluation alone, or of other points than the first, is refused."""
    scheduler = schedulers.plus.from_flow(DENOISERS[128.0], solver="heun", prediction_type="mean")
    x, mean = scheduler.prior(2, seeded()), torch.zeros(2, 1, 8, 8)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(1)
    refused(
        lambda: scheduler.step(mean, scheduler.timesteps[1], x),
        "a run must start at a timestep at which a step of heun begins, got its second …",
    )
    scheduler.set_timesteps(5)
    moved = scheduler.step(mean, scheduler.timesteps[0], x).prev_sample
    refused(
        lambda: scheduler.step(mean[:1], scheduler.timesteps[1], moved[:1]),
        "sample must keep its shape within a step of heun, (2, 1, 8, 8), got (1, 1, 8, 8).",
    )


@pytest.mark.parametrize("solver", STEPS)
def test_a_loop_may_change_its_points(schedulers, solver):
    """A constant mean at one point: a move of all points and of the point moves the end as much."""
    scheduler = schedulers.plus.from_flow(DENOISERS[128.0], solver=solver, prediction_type="mean")

    def end(moved_at):
        scheduler.set_timesteps(6)
        x, mean = scheduler.prior(2, seeded()), torch.zeros(2, 1, 8, 8)
        for call, t in enumerate(scheduler.timesteps):
            shift = 0.25 * (call >= moved_at)
            if call == moved_at:
                x = x + 0.25
            x = scheduler.step(mean + shift, t, x, return_dict=False)[0]
        return x

    still = end(moved_at=100)
    for moved_at in (scheduler.order, 2 * scheduler.order):
        torch.testing.assert_close(end(moved_at), still + 0.25, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", STEPS)
@pytest.mark.parametrize("predicts", ["mean", "residual"])
def test_a_loop_may_change_outputs_and_predictions_in_place(schedulers, solver, predicts):
    flow = DENOISERS[128.0]
    scheduler = scheduler_of(schedulers, flow, solver=solver, prediction_type=predicts)

    def sample(change):
        scheduler.set_timesteps(6)
        x, memory = scheduler.prior(3, seeded()), torch.empty(3, *flow.shape)
        for t in scheduler.timesteps:
            output = memory.copy_(torch.tanh(scheduler.scale_model_input(x, t)))
            step = scheduler.step(output if change else output.clone(), t, x)
            if change:
                step.pred_original_sample.clamp_(-0.1, 0.1)
            x = step.prev_sample
        return x

    assert torch.equal(sample(change=True), sample(change=False))


@pytest.mark.parametrize(
    ("flow", "predicts", "solver"),
    [
        (*each, solver)
        for each, solver in zip(PREDICTIONS, ("heun", "multistep", "heun"), strict=False)
    ],
    ids=predictions,
)
def test_saved_and_loaded(schedulers, unets, tmp_path, flow, predicts, solver):
    first = scheduler_of(schedulers, flow, solver=solver, schedule="log", level="log")
    first.save_pretrained(tmp_path)
    config = json.loads(
        (tmp_path / "scheduler_config.json").read_text(), parse_constant=pytest.fail
    )
    assert config["flow"] == flow.config
    again = type(first).from_pretrained(tmp_path)
    names = ("flow", "solver", "schedule", "prediction_type", "level")
    assert {n: again.config[n] for n in names} == {n: first.config[n] for n in names}
    assert again.config["prediction_type"] == predicts
    assert again.flow == flow
    assert type(first).from_config(first.config).flow == flow
    unet = unets(2 if predicts == "field" else 1)
    x, ends = first.prior(2, seeded()), []
    for scheduler in (first, again):
        scheduler.set_timesteps(5)
        ends.append(diffusers_loop(scheduler, unet, x)[0])
    assert torch.equal(*ends)


def test_a_scheduler_that_version_0_2_saved_is_loaded(schedulers, tmp_path):
    schedulers.field.from_flow(FIELD).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(path.read_text().replace('"noise_std"', '"sigma"'))
    assert schedulers.field.from_pretrained(tmp_path).flow == FIELD


def test_defaults_are_those_of_the_flow(schedulers):
    for flow in (FIELD, DENOISERS[128.0]):
        scheduler = scheduler_of(schedulers, flow)
        assert scheduler.config["solver"] == flow.defaults.solver
        assert scheduler.config["schedule"] == flow.defaults.schedule
        assert scheduler.num_inference_steps == flow.defaults.steps
        assert scheduler.order == (2 if flow.defaults.solver == "heun" else 1)
        assert torch.equal(scheduler.prior(2, seeded()), flow.prior(2, generator=seeded()))


def test_timesteps(schedulers):
    scheduler = schedulers.plus.from_flow(DENOISERS[128.0], solver="heun")
    scheduler.set_timesteps(sigmas=[8.0, 2.0, 0.5, 0.0])
    assert scheduler.sigmas.tolist() == [8, 2, 2, 0.5, 0.5, 0]
    assert scheduler.num_inference_steps == 3
    told = [scheduler.scale_model_input(torch.ones(1, 1, 8, 8), t) for t in scheduler.timesteps]
    std = DENOISERS[128.0].sigma_data
    for value, sigma in zip(told, [8, 2, 2, 0.5, 0.5], strict=True):
        assert float(value.mean()) == pytest.approx(1 / math.hypot(sigma, std), rel=1e-5)


@pytest.mark.parametrize("solver", STEPS)
def test_a_run_may_start_at_a_later_timestep(schedulers, unets, solver, same):
    """Starts from a noisy image at a later timestep, given itself or by its index."""
    flow, unet = DENOISERS[math.inf], unets(1)
    scheduler = schedulers.plus.from_flow(flow, solver=solver)
    scheduler.set_timesteps(6)
    begin = 4 * scheduler.order
    later = scheduler.timesteps[begin:]
    x = scheduler.add_noise(DATA[:2], torch.randn(2, 1, 8, 8, generator=seeded()), later[:1])
    grid = flow.grid(6)[4:]
    correct = flow.sample(flow.network(unet), 2, x_init=x, schedule=grid, solver=solver)
    for index in (None, begin):
        scheduler.set_timesteps(6)
        if index is not None:
            scheduler.set_begin_index(index)
        points = x
        with torch.no_grad():
            for t in later:
                output = unet(scheduler.scale_model_input(points, t), t).sample
                points = scheduler.step(output, t, points, return_dict=False)[0]
        same(points, correct, 1e-5)
        assert scheduler.begin_index == index


def test_wrong_calls(schedulers, refused):
    field, plus = schedulers.field.from_flow, schedulers.plus.from_flow
    scheduler, infinite = plus(DENOISERS[128.0], solver="euler"), DENOISERS[math.inf]
    scheduler.set_timesteps(2)
    x, first, step = scheduler.prior(2), scheduler.timesteps[0], scheduler.step
    integers, preserving = torch.tensor([3, 500]), {"variance_preserving": True}
    unpreserved = "variance_preserving must be False unless D is infinite and…got D = "
    for call, sentence in (
        (partial(field, DENOISERS[1.0]), "TypeError: flow must be a PoissonFlow for…FlowPP."),
        (partial(schedulers.field, FIELD), "TypeError: flow must be a flow's config,…flow itself."),
        (partial(field, FIELD, solver="rk45"), "solver must be one of euler,…got 'rk45'."),
        (partial(field, FIELD, prediction_type="mean"), "prediction_type must be…got 'mean'."),
        (partial(field, FIELD, level="karras"), "level must be one of timestep,…got 'karras'."),
        (partial(field, FIELD, num_train_timesteps=0), "num_train_timesteps must be an…got 0."),
        (
            partial(field, FIELD, prediction_type="field", **preserving),
            unpreserved + "1 and prediction_type 'field'.",
        ),
        (
            partial(plus, DENOISERS[128.0], prediction_type="noise", **preserving),
            unpreserved + "128 and prediction_type 'noise'.",
        ),
        (
            partial(plus, infinite, prediction_type="residual", **preserving),
            unpreserved + "inf and prediction_type 'residual'.",
        ),
        (
            partial(FIELD.network, torch.nn.Identity(), **preserving),
            "variance_preserving must be False unless flow is a…got PoissonFlow and 'residual'.",
        ),
        (partial(step, x, 7, x), "timestep must be one of timesteps, got 7.0."),
        (partial(step, x.expand(2, 3, 8, 8), first, x), "net must return the…got (2, 3, 8, 8)."),
        (
            lambda: [step(x, t, x) for t in (*scheduler.timesteps, first)],
            "step is called after the last of 2 timesteps; set_timesteps starts a new run.",
        ),
        (
            partial(scheduler.set_timesteps, 3, sigmas=[8.0, 0.0]),
            "num_inference_steps and sigmas must not both be given.",
        ),
        (
            partial(scheduler.set_timesteps, sigmas=[8.0, 9.0]),
            "schedule is not decreasing: 9.0 at index 1 follows 8.0.",
        ),
        (partial(scheduler.set_timesteps, 0), "steps must be an integer of…1000000, got 0."),
        (
            partial(plus(infinite, level="log").add_noise, DATA[:2], DATA[:2], integers),
            "timesteps must be floating point with level 'log',…got torch.int64.",
        ),
        (
            lambda: plus(infinite, level="log").alphas_cumprod,
            "AttributeError: alphas_cumprod exists with level 'timestep' only",
        ),
        (lambda: scheduler.gamma, "AttributeError: 'PoissonFlow…' object has no attribute 'gamma'"),
    ):
        refused(call, sentence)


@pytest.mark.parametrize("references", [None, DATA], ids=["clean", "references"])
@pytest.mark.parametrize("D", [128.0, math.inf])
def test_squared_error_of_the_residual_is_the_loss(schedulers, unets, D, references):
    flow, unet = DENOISERS[D], unets(1)
    scheduler = schedulers.plus.from_flow(flow)
    noisy, t = scheduler.perturb(DATA[:16], seeded())
    with torch.no_grad():
        output = unet(scheduler.scale_model_input(noisy, t), t).sample
        error = output - scheduler.target(noisy, t, DATA[:16], references)
        correct = flow.loss(flow.network(unet), DATA[:16], references, seeded())
    assert float(error.square().sum((1, 2, 3)).mean()) == pytest.approx(float(correct), rel=1e-4)


@pytest.mark.parametrize("predicts", ["residual", "mean", "noise", "score"])
def test_the_target_of_a_denoiser_means_the_posterior_mean(schedulers, predicts, same):
    flow = DENOISERS[128.0]
    scheduler = schedulers.plus.from_flow(flow, prediction_type=predicts)
    scheduler.set_timesteps(6)
    t = scheduler.timesteps[3]
    noise = flow.noise(torch.ones(5), seeded())
    noisy = scheduler.add_noise(DATA[:5], noise, t)
    torch.testing.assert_close(noisy, DATA[:5] + scheduler.sigmas[3] * noise)
    correct = flow.empirical(DATA)(noisy, scheduler.sigmas[3].expand(5))
    target = scheduler.target(noisy, t, DATA[:5], DATA)
    same(scheduler.step(target, t, noisy).pred_original_sample, correct, 1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("predicts", ["residual", "noise", "score"])
def test_targets_have_the_digits_of_x_minus_mean(schedulers, predicts, offset):
    """Far from the origin and close to the data, where a rounded mean has lost them."""
    flow = pfgm.PoissonFlowPP((1, 2, 2), D=1, sigma_min=1e-4)
    scheduler = schedulers.plus.from_flow(flow, prediction_type=predicts, level="sigma")
    data = offset + torch.randn(300, 1, 2, 2, generator=seeded())
    sigma = torch.logspace(-3, 1.9, 200)
    noisy = scheduler.add_noise(data[:200], flow.noise(torch.ones(200), seeded(1)), sigma)
    for references in (None, data):
        target = scheduler.target(noisy, sigma, data[:200], references).flatten(1).double()
        sets = (None if each is None else each.double() for each in (data[:200], references))
        expected = scheduler.target(noisy.double(), sigma.double(), *sets).flatten(1)
        error = (target - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 2e-5


def test_the_target_of_a_field_is_the_field(schedulers):
    scheduler = schedulers.field.from_flow(FIELD)
    noisy, t = scheduler.perturb(DATA[:8], seeded())
    x, z = FIELD.perturb(DATA[:8], seeded())
    assert torch.equal(noisy, x)
    field_x, field_z = pfgm.field_fn(x, z.clamp(min=FIELD.z_min), DATA)
    target = scheduler.target(noisy, t, DATA[:8], DATA)
    torch.testing.assert_close(target[:, :1], field_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target[:, 1].mean((1, 2)), field_z, rtol=1e-4, atol=1e-4)
    alone = scheduler.target(noisy, t, DATA[:8])
    assert torch.equal(alone, scheduler.target(noisy, t, DATA[:8], DATA[:8]))


@pytest.mark.parametrize("flow", [FIELD, *DENOISERS.values()], ids=name)
def test_targets_by_label(schedulers, flow):
    """Each row is the target over the references of its label."""
    scheduler = scheduler_of(schedulers, flow)
    labels, seen = torch.tensor([1, -1, 0, 2, 1, 0]), torch.arange(len(DATA)) % 3
    original = DATA[[1, 0, 3, 2, 4, 6]]
    noisy, t = scheduler.perturb(original, seeded())
    target = scheduler.target(noisy, t, original, DATA, labels=labels, reference_labels=seen)
    for label in (-1, 0, 1, 2):
        rows, own = labels == label, DATA if label < 0 else DATA[seen == label]
        alone = scheduler.target(noisy[rows], t[rows], original[rows], own)
        torch.testing.assert_close(target[rows], alone, rtol=1e-4, atol=1e-4)
    labelled = pfgm.ReferenceSet(DATA, labels=seen)
    by_set = scheduler.target(noisy, t, original, labelled, labels=labels)
    torch.testing.assert_close(by_set, target, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="labels must be given with reference_labels"):
        scheduler.target(noisy, t, original, DATA, reference_labels=seen)
    # Without references they are the original samples, which have these labels.
    if flow is FIELD:
        given = {"references": original, "reference_labels": labels}
        torch.testing.assert_close(
            scheduler.target(noisy, t, original, labels=labels),
            scheduler.target(noisy, t, original, labels=labels, **given),
        )


def test_networks_of_diffusers_are_networks_of_the_flows(diffusers):
    """A DiT with labels, which returns a learned variance beside the mean, in the flow's loss."""
    data, dit = pfgm.data.digits(), transformer(diffusers, 2)
    for flow in (FIELD, DENOISERS[128.0]):
        net = flow.network(dit, conditions={"labels": "class_labels"}, no_label=10)
        labels = torch.tensor([3, -1, 5, 1])
        references = {"references": data.train, "reference_labels": data.train_labels}
        loss = flow.loss(net, data.train[:4], condition={"labels": labels}, **references)
        loss.backward()
        assert loss.isfinite()
        assert dit.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.grad.any()
        samples = flow.sample(net, 4, steps=2, condition={"labels": labels})
        assert samples.shape == (4, 1, 8, 8)
        with pytest.raises(ValueError, match="has 'labels', which DiTTransformer2DModel"):
            flow.sample(flow.network(dit), 4, steps=2, condition={"labels": labels})


@pytest.mark.parametrize("predicts", ["noise", "mean"])
@pytest.mark.parametrize("solver", STEPS)
def test_variance_preserving_samples_are_the_points_scaled(
    schedulers, unets, predicts, solver, same
):
    """A loop over x/√(1 + σ²) ends where the flow's own sampling ends."""
    flow, unet = DENOISERS[math.inf], unets(1)
    options = {"solver": solver, "variance_preserving": True}
    name = {"noise": None, "mean": "sample"}[predicts]
    scheduler = schedulers.plus.from_flow(flow, prediction_type=name, **options)
    scheduler.set_timesteps(9)
    x = scheduler.prior(3, seeded())
    same(x * math.hypot(1, flow.first_level), flow.prior(3, generator=seeded()), 1e-5)
    assert scheduler.init_noise_sigma == 1
    end, points, _ = diffusers_loop(scheduler, unet, x)
    net = flow.network(unet, predicts=predicts, variance_preserving=True)
    steps = []
    start = flow.prior(3, generator=seeded())
    correct = flow.sample(net, 3, x_init=start, steps=9, solver=solver, callback=steps.append)
    same(end, correct, 5e-5)  # scaling the points rounds them twice more in each step
    for call in (0, 2, 4):
        step = steps[call // scheduler.order]
        same(points[call] * math.hypot(1, step["z"]), step["x"], 5e-5)
    # The network sees the samples of the loop as they are.
    same(scheduler.scale_model_input(x, scheduler.timesteps[0]), x, 1e-6)
    half = scheduler.scale_model_input(x.half(), scheduler.timesteps[0])
    assert half.dtype == torch.float16
    same(half.float(), x, 1e-2)


def test_variance_preserving_training_is_that_of_ddpm(schedulers, same):
    """√ᾱ x + √(1 − ᾱ) n, with ᾱ = alphas_cumprod (arXiv 2006.11239, equation 4)."""
    flow = DENOISERS[math.inf]
    scheduler = schedulers.plus.from_flow(flow, prediction_type="epsilon", variance_preserving=True)
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000
    t = torch.tensor([0, 250, 999])
    noise = torch.randn(3, 1, 8, 8, generator=seeded())
    kept = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(DATA[:3], noise, t)
    same(noisy, kept.sqrt() * DATA[:3] + (1 - kept).sqrt() * noise, 1e-5)
    same(scheduler.target(noisy, t, DATA[:3]), noise, 2e-3)  # rounded at the lowest level
    assert float(1 / kept[0] - 1) == pytest.approx(flow.sigma_min**2, rel=0.01)
    short = schedulers.plus.from_flow(flow, num_train_timesteps=10)
    assert len(short) == 10
    short.set_timesteps(3)
    assert float(short.timesteps[0]) == pytest.approx(10)
    middle = 1 / (1 + flow.sigma_max * flow.sigma_min)
    assert float(short.alphas_cumprod[5]) == pytest.approx(middle)


def script_loop(diffusers, unet, scheduler, predicts, folder):
    """Trains and samples with the calls of diffusers' train_unconditional.py, in their order."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True)
    averages = EMAModel(unet.parameters(), use_ema_warmup=True, model_cls=type(unet))
    optimiser = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    rates = get_scheduler("cosine", optimiser, num_warmup_steps=2, num_training_steps=60)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA), batch_size=50)
    unet, optimiser, loader, rates = accelerator.prepare(unet, optimiser, loader, rates)
    losses = []
    for _ in range(15):
        for (clean,) in loader:
            noise = torch.randn(clean.shape)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),)).long()
            output = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            if predicts == "epsilon":
                loss = torch.nn.functional.mse_loss(output, noise)
            else:
                kept = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
                loss = (kept / (1 - kept)).clamp(max=5) * (output - clean).square()
                loss = loss.mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimiser.step()
            rates.step()
            optimiser.zero_grad()
            averages.step(unet.parameters())
            losses.append(float(loss.detach()))
    pipeline = quiet(diffusers.DDPMPipeline(accelerator.unwrap_model(unet), scheduler))
    options = {"batch_size": 3, "num_inference_steps": 4, "output_type": "np"}
    images = pipeline(generator=seeded(), **options).images
    pipeline.save_pretrained(folder)
    again = quiet(diffusers.DDPMPipeline.from_pretrained(folder))
    return losses, images, again(generator=seeded(), **options).images


@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
def test_the_training_script_of_diffusers_runs_at_infinite_D(
    diffusers, schedulers, unets, threads, tmp_path, predicts
):
    pytest.importorskip("accelerate")
    threads(1)  # sums that several compute may differ in the last bit from call to call
    flow, unet = DENOISERS[math.inf], unets(1)
    scheduler = schedulers.plus.from_flow(
        flow, prediction_type=predicts, solver="multistep", variance_preserving=True
    )
    torch.manual_seed(0)
    losses, images, again = script_loop(diffusers, unet.train(), scheduler, predicts, tmp_path)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert images.shape == (3, 8, 8, 1)
    assert (images == again).all()
    # The stock pipeline ends where flow.sample ends, from the same noise.
    noise = torch.randn(3, 1, 8, 8, generator=seeded())
    predicts = {"epsilon": "noise", "sample": "mean"}[predicts]
    net = flow.network(unet, predicts=predicts, variance_preserving=True)
    start = noise * math.hypot(1, flow.first_level)
    correct = flow.sample(net, 3, x_init=start, steps=4, solver="multistep")
    correct = (correct / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), correct, rtol=0, atol=1e-4)


@pytest.mark.parametrize("flow", [FIELD, *DENOISERS.values()], ids=name)
def test_standard_normal_noise_is_refused_as_the_prior(diffusers, schedulers, unets, flow):
    """The stock pipeline starts from N(0, I), whatever the scheduler."""
    scheduler = scheduler_of(schedulers, flow)
    unet = unets(2 if flow is FIELD else 1)
    pipeline = quiet(diffusers.DDPMPipeline(unet, scheduler))
    for batch_size in (1, 7):
        with pytest.raises(ValueError, match=r"start from scheduler\.prior\(n\), as Poisson") as e:
            pipeline(batch_size=batch_size, num_inference_steps=3, generator=seeded())
        assert ("variance_preserving=True" in str(e.value)) == (math.inf == flow.D)
    if math.inf > flow.D:
        with pytest.raises(AttributeError, match="init_noise_sigma exists at D = ∞ only"):
            _ = scheduler.init_noise_sigma
        assert not hasattr(scheduler, "init_noise_sigma")
        n = 40 if flow.D == 1 else 1000
        noise = torch.randn(n, 1, 8, 8, generator=seeded())
        with pytest.raises(ValueError, match=", got standard normal noise;"):
            scheduler.add_noise(DATA[:1].expand(n, 1, 8, 8), noise, scheduler.timesteps[:1])
    else:
        assert scheduler.init_noise_sigma == flow.sigma_max


@pytest.mark.parametrize("flow", [FIELD, *DENOISERS.values()], ids=name)
@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 8, 8), (3, 16, 16)])
def test_the_prior_itself_is_never_refused(flow, shape):
    """500 batches of each size; also data with noise of the first level."""
    from pfgm.integrations.diffusers.normal_noise import looks_normal

    config = {key: v for key, v in flow.config.items() if key not in ("shape", "upper_norm")}
    sized = type(flow)(shape=shape, **config)
    prior = sized.prior(500, generator=seeded())
    noise = sized.noise(torch.full((500,), sized.first_level), seeded(1))
    for x in (prior, noise, noise + 0.5 * torch.randn(noise.shape, generator=seeded(2))):
        for batch in (*x[:250].split(1), *x.split(16), x):
            assert not looks_normal(batch, sized.D, sized.first_level, largest=sized._largest_norm)


def test_noise_of_level_one_is_never_refused(schedulers):
    for flow in (FIELD, DENOISERS[1.0], DENOISERS[128.0]):
        scheduler = scheduler_of(schedulers, flow)
        for seed in range(50):
            noise = flow.noise(torch.ones(16), seeded(seed))
            scheduler.add_noise(DATA[:16], noise, scheduler.timesteps[1])


@pytest.mark.parametrize(("flow", "predicts"), PREDICTIONS[:4], ids=predictions)
def test_the_pipeline_draws_the_samples_of_the_flow(
    diffusers, schedulers, unets, tmp_path, flow, predicts, same
):
    unet = unets(2 if predicts == "field" else 1)
    scheduler = scheduler_of(schedulers, flow, solver="multistep", prediction_type=predicts)
    pipeline = quiet(schedulers.pipeline(unet, scheduler))
    options = {"batch_size": 3, "num_inference_steps": 5}
    images = pipeline(generator=seeded(), output_type="pt", **options).images
    start = flow.prior(3, generator=seeded())
    net = flow.network(unet, predicts=predicts)
    correct = flow.sample(net, 3, x_init=start, steps=5, solver="multistep")
    same(images, (correct / 2 + 0.5).clamp(0, 1), 1e-5)
    pipeline.save_pretrained(tmp_path)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    again = quiet(schedulers.pipeline.from_pretrained(tmp_path))
    assert again.scheduler.flow == flow
    (repeated,) = again(generator=seeded(), output_type="pt", return_dict=False, **options)
    assert torch.equal(images, repeated)
    call = r"pfgm\.integrations\.diffusers\.PoissonFlowPipeline\.from_pretrained reads it"
    with pytest.raises(AttributeError, match=call):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)


def test_what_the_pipeline_returns(schedulers, unets):
    flow = DENOISERS[128.0]
    scheduler = schedulers.plus.from_flow(flow, solver="euler")
    pipeline = quiet(schedulers.pipeline(unets(1), scheduler))
    options = {"batch_size": 2, "num_inference_steps": 2}
    images = pipeline(generator=seeded(), **options).images
    assert [(image.size, image.mode) for image in images] == 2 * [((8, 8), "L")]
    array = pipeline(generator=seeded(), output_type="np", **options).images
    assert array.shape == (2, 8, 8, 1)
    assert 0 <= array.min() <= array.max() <= 1
    one_each = [seeded(3), seeded(4)]
    several = pipeline(generator=one_each, output_type="np", **options).images
    alone = pipeline(generator=seeded(4), output_type="np", num_inference_steps=2).images
    assert abs(several[1] - alone[0]).max() < 1e-5
    pipeline(num_inference_steps=None)
    assert scheduler.num_inference_steps == flow.defaults.steps


def test_a_pipeline_with_labels_and_half_precision(diffusers, schedulers):
    dit = transformer(diffusers, 1)
    torch.nn.init.normal_(dit.proj_out_2.weight)
    pipeline = quiet(schedulers.pipeline(dit.eval(), schedulers.plus.from_flow(DENOISERS[128.0])))

    def draw(labels):
        options = {"num_inference_steps": 2, "output_type": "np", "class_labels": labels}
        return pipeline(2, seeded(), **options).images

    assert (draw(3) == draw([3, 3])).all()
    assert (draw(3) != draw(torch.tensor([3, 4])))[1].any()
    with pytest.raises(ValueError, match=r"class_labels must.*got shape \(3,\) and dtype"):
        draw([1, 2, 3])
    single = draw(3)
    pipeline.to(dtype=torch.bfloat16)
    assert abs(draw(3) - single).max() < 0.1


def test_a_pipeline_from_another_one(diffusers, schedulers, unets):
    unet, flow = unets(1), DENOISERS[128.0]
    ddpm = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match=r"scheduler must be a.*got DDPMScheduler\."):
        schedulers.pipeline.from_pipe(ddpm)
    first = schedulers.pipeline.from_pipe(ddpm, scheduler=schedulers.plus.from_flow(flow))
    again = schedulers.pipeline.from_pipe(first)
    assert again.unet is first.unet is unet
    assert again.scheduler is first.scheduler
    again.set_progress_bar_config(disable=True)
    assert again(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_wrong_calls_of_the_pipeline(diffusers, schedulers, unets, refused):
    vectors = schedulers.plus.from_flow(pfgm.PoissonFlowPP((2,), D=1))
    pipeline = schedulers.pipeline(unets(1), schedulers.plus.from_flow(DENOISERS[128.0]))
    create, unet = schedulers.pipeline, unets(1)
    for call, sentence in (
        (
            partial(create, unet, diffusers.DDPMScheduler()),
            "TypeError: scheduler must be a PoissonFlowScheduler or a…got DDPMScheduler.",
        ),
        (partial(create, unet, vectors), "the scheduler's flow must have images…of shape (2,)."),
        (partial(pipeline, output_type="jpg"), "output_type must be one of pil,…got 'jpg'."),
        (partial(pipeline, batch_size=0), "batch_size must be an integer of at least 1, got 0."),
        (
            partial(pipeline, batch_size=2, generator=[seeded()]),
            "generator must be one for each of the 2 images, got a list of 1.",
        ),
    ):
        refused(call, sentence)


def test_a_missing_package_is_named(monkeypatch):
    for module in [*sys.modules]:
        if module.startswith("pfgm.integrations."):
            monkeypatch.delitem(sys.modules, module)
    for module in ("diffusers", "diffusers.schedulers.scheduling_utils"):
        monkeypatch.setitem(sys.modules, module, None)
    importlib.import_module("pfgm.integrations.k_diffusion")
    message = r"needs diffusers; in a checkout: pip install '\.\[diffusers\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("pfgm.integrations.diffusers")


def test_settings_may_change_after_creation_as_in_training_scripts(schedulers, refused):
    flow = DENOISERS[math.inf]
    scheduler, x = schedulers.plus.from_flow(flow, solver="euler"), torch.randn(2, *flow.shape)
    output = torch.randn_like(x)
    for kind in ("sample", "epsilon", "score"):
        scheduler.register_to_config(prediction_type=kind)
        created = schedulers.plus.from_flow(flow, solver="euler", prediction_type=kind)
        moved = []
        for each in (scheduler, created):
            each.set_timesteps(5)
            moved.append(each.step(output, each.timesteps[1], x).prev_sample)
        assert torch.equal(*moved)
        assert scheduler.config.prediction_type == kind
    other = type(scheduler).from_config(scheduler.config)
    assert other.config.prediction_type == "score"
    refused(
        lambda: scheduler.register_to_config(prediction_type="v_prediction"),
        "prediction_type must be one of …got 'v_prediction'.",
    )
    refused(
        lambda: scheduler.register_to_config(level="sigma"),
        "level must stay 'timestep', got 'sigma'; …level=…).",
    )
    assert scheduler.config.prediction_type == "score"
    assert scheduler.config.level == "timestep"
