"""Evaluation against closed forms and the metrics; the command against both."""

import csv
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pfgm
from pfgm import cli, evaluation, metrics
from pfgm.cli.evaluate import _data_of, _renumbered
from pfgm.evaluation import (
    Labels,
    bits_per_dim,
    curve,
    draw_samples,
    evaluate_labels,
    evaluate_samples,
)
from pfgm.plotting.curves import COLOURS
from pfgm.training.rehearsal import compute_of
from pfgm.training.runs import RunConfig

PNG = b"\x89PNG\r\n\x1a\n"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(figures: dict[str, float], samples: Tensor, real: Tensor, of: str) -> None:
    """The figures of one set are those of the metrics."""
    inside = metrics.precision_recall(samples, real, k=3)
    balls = metrics.density_coverage(samples, real, k=5)
    assert {name: figures[name][of] for name in ("precision", "recall")} == inside._asdict()
    assert {name: figures[name][of] for name in ("density", "coverage")} == balls._asdict()
    assert figures["frechet_distance"][of] == metrics.frechet_distance(samples, real)
    scale = float(real.double().square().mean().sqrt())
    kernel = metrics.kernel_distance(samples / scale, real / scale, subsets=None).mean
    assert figures["kernel_distance"][of] == kernel


def test_figures_are_those_of_the_metrics() -> None:
    samples, held_out, train = normal(20, 3), normal(15, 3, seed=1), normal(50, 3, seed=2)
    figures = evaluate_samples(samples, held_out, train)
    same(figures, samples, held_out, "samples")
    beside = train[[0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37, 40, 42, 45, 47]]
    same(figures, beside, held_out, "train")
    assert figures["against"] == "held_out"
    assert figures["counts"] == {"samples": 20, "against": 15, "train": 20, "searched": 50}
    for name, rows in (("samples", samples), ("held_out", held_out)):
        nearest = torch.cdist(rows.double(), train.double()).amin(1).median()
        assert figures["median_distance_to_train"][name] == pytest.approx(float(nearest))


def test_without_held_out_data_every_other_row_takes_their_place() -> None:
    samples, train = normal(20, 3), normal(31, 3, seed=1)
    figures = evaluate_samples(samples, None, train)
    draw = torch.Generator().manual_seed(0)  # as many samples as training rows
    few = samples[torch.randperm(20, generator=draw)[:15].sort().values]
    same(figures, few, train[::2], "samples")
    same(figures, train[1::2], train[::2], "train")
    assert figures["against"] == "train"
    assert figures["counts"] == {"samples": 15, "against": 16, "train": 15, "searched": 31}
    nearest_other = metrics.neighbour_distances(train, 1)[::2].median()
    assert figures["median_distance_to_train"]["train"] == float(nearest_other)
    # Copies of any row are found, though each row stands on one side only.
    copies = evaluate_samples(train[:20], None, train)["median_distance_to_train"]
    assert copies["samples"] == 0
    assert copies["train"] > 0.3


def test_training_rows_have_the_labels_of_the_samples() -> None:
    """Ten of each label, as the samples, although label 0 is as frequent as all others together."""
    labels = Labels(
        torch.arange(30) % 3,
        torch.arange(60) % 3,
        torch.cat([torch.zeros(150), 1 + torch.arange(150) % 2]).long(),
    )
    samples, held_out, train = (
        normal(len(each), 2, seed=k) + 10 * each[:, None] for k, each in enumerate(labels)
    )
    figures = evaluate_samples(samples, held_out, train, labels=labels)
    assert figures["counts"] == {"samples": 30, "against": 60, "train": 30, "searched": 300}
    beside = torch.cat([evaluation.evenly_spaced(train[labels.train == k], 10) for k in range(3)])
    same(figures, beside, held_out, "train")
    blind = evaluate_samples(samples, held_out, train)["frechet_distance"]
    assert figures["frechet_distance"]["train"] < 0.2 * blind["train"]
    each = evaluate_labels(samples, held_out, train, labels)
    for k in range(3):
        parts = (samples[labels.samples == k], held_out[labels.held_out == k])
        assert each[k] == evaluate_samples(*parts, train[labels.train == k])
    few = labels._replace(held_out=torch.arange(60) // 57)
    assert [*evaluate_labels(samples, held_out, train, few)] == [0]  # 57, 3 and no held-out rows
    assert not evaluate_labels(samples[:15], None, train, few._replace(samples=few.samples[:15]))


def test_kernel_distances_have_no_unit() -> None:
    sets = normal(30, 4), normal(30, 4, seed=1), normal(40, 4, seed=2)
    figures, larger = (evaluate_samples(*(s * x for x in sets))["kernel_distance"] for s in (1, 64))
    assert figures == pytest.approx(larger)


def test_bytes_are_compared_in_the_unit() -> None:
    sets = [
        torch.randint(0, 256, (count, 1, 3, 3), generator=torch.Generator().manual_seed(count))
        for count in (10, 20, 30)
    ]
    bytes_, floats = ([s.to(t) for s in sets] for t in (torch.uint8, torch.float32))
    floats = [values / 127.5 - 1 for values in floats]
    assert evaluate_samples(*bytes_) == evaluate_samples(*floats)


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        ((5, 6, 6), "samples"),
        ((6, 5, 6), "held_out"),
        ((6, 6, 5), "train"),
        ((6, None, 11), "half of train"),
    ],
)
def test_too_few_rows(
    refused: Callable[..., None], counts: tuple[int, int | None, int], rows: str
) -> None:
    sets = [None if count is None else normal(count, 2) for count in counts]
    refused(lambda: evaluate_samples(*sets), f"{rows} must have at least 6 rows, got 5.")
    evaluate_samples(normal(6, 2), normal(6, 2, seed=1), normal(6, 2, seed=2))
    evaluate_samples(normal(6, 2), None, normal(12, 2))


def test_drawing_depends_on_the_seed_and_not_on_the_batches() -> None:
    data = normal(50, 2)
    flow = pfgm.PoissonFlow.from_data(data)
    net = flow.empirical(data)
    whole, nfe = draw_samples(flow, net, 7, seed=3, solver="heun", steps=4)
    assert nfe == 7  # two evaluations a step, one for the last
    parts, _ = draw_samples(flow, net, 7, seed=3, solver="heun", steps=4, batch_size=3)
    torch.testing.assert_close(parts, whole)
    other, _ = draw_samples(flow, net, 7, seed=4, solver="heun", steps=4)
    assert not torch.allclose(other, whole)
    prior = flow.prior(7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(flow.sample(net, 7, x_init=prior, solver="heun", steps=4), whole)
    for options in ({"n": 0}, {"n": 7, "batch_size": 0}):
        with pytest.raises(ValueError, match=rf"{list(options)[-1]} must be an.*got 0\."):
            draw_samples(flow, net, **options)


@pytest.mark.parametrize("kind", ["mlp", "denoiser"])
def test_labels_are_drawn_evenly(kind: str) -> None:
    """Also if the network that takes them is inside another module."""
    flow: Any = pfgm.PoissonFlow((2,), data_norm=1.0)
    if kind == "denoiser":
        flow = pfgm.PoissonFlowPP((2,), D=16)
    net = flow.network("mlp", width=8, classes=3)
    seen: list[Tensor] = []
    net.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(named["labels"]), with_kwargs=True
    )
    draw_samples(flow, net, 7, solver="euler", steps=1, batch_size=4)
    assert [labels.tolist() for labels in seen] == [[0, 1, 2, 0], [1, 2, 0]]
    assert evaluation.label_count(net) == 3
    assert evaluation.label_count(pfgm.networks.MLP((2,), width=8)) == 0
    assert evaluation.label_count(lambda x, z: (x, z)) == 0


def gaussian(width: float, N: int) -> tuple[pfgm.PoissonFlowPP, Any]:
    """A flow whose density is N(0, width²) in each of N dimensions."""
    flow = pfgm.PoissonFlowPP((N,), D=math.inf, sigma_min=width)
    return flow, flow.empirical(torch.zeros(1, N))


def gaussian_bits(x: Tensor, width: float) -> Tensor:
    nats = 0.5 * (x.double() / width) ** 2 + math.log(width * math.sqrt(2 * math.pi))
    return nats.mean(1) / math.log(2)


@pytest.mark.parametrize("kind", [pfgm.PoissonFlow, pfgm.PoissonFlowPP])
@pytest.mark.parametrize("solver", ["multistep", "rk45"])
def test_only_the_network_computes_in_bfloat16(kind: Any, solver: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {} if kind is pfgm.PoissonFlow else {"D": 64}
    flow = kind.from_data(pfgm.data.digits().train, **options)
    net = flow.network("unet", width=16, classes=10).train()
    for parameter in net.parameters():  # the last layer is 0 in an untrained network
        torch.nn.init.normal_(parameter, std=0.05)
    seen: set[Any] = set()
    inner = next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    inner.register_forward_hook(lambda module, x, y: seen.add((y.dtype, module.training)))
    points: list[Tensor] = []
    options = {"solver": solver, "steps": 3, "batch_size": 4}

    def callback(info: Any) -> None:
        points.append(info["x"])

    samples, _ = draw_samples(flow, net, 6, compute="bfloat16", callback=callback, **options)
    assert seen == {(torch.bfloat16, False)}
    assert net.training
    assert {samples.dtype, *(x.dtype for x in points)} == {torch.float32}
    # Whatever holds the network.
    again, _ = draw_samples(flow, functools.partial(net), 6, compute="bfloat16", **options)
    exact, _ = draw_samples(flow, net, 6, **options)
    assert seen == {(torch.bfloat16, False), (torch.float32, False)}
    assert not torch.equal(samples, exact)
    assert (samples - exact).square().mean().sqrt() < 0.05 * exact.std()
    assert again.dtype == torch.float32
    with pytest.raises(ValueError, match=r"compute must be .*float32.*bfloat16.*got 'half'"):
        draw_samples(flow, net, 2, compute="half")


@pytest.mark.parametrize(
    ("seconds", "evaluations", "chosen"),
    [
        ((1.3, 1.0), 1600, "bfloat16"),
        ((1.1, 1.0), 1600, "float32"),
        ((0.013, 0.01), 1600, "float32"),  # soon done
        (None, 1599, "float32"),  # timing would cost what it saves
    ],
)
def test_the_precision_of_sampling_is_chosen_as_in_training(
    seconds: tuple[float, float] | None, evaluations: int, chosen: str
) -> None:
    flow, cpu = pfgm.PoissonFlow((1, 8, 8), data_norm=1.0), torch.device("cpu")
    net = flow.network("unet", width=16)
    times = itertools.cycle(seconds or ())
    ends = itertools.accumulate(value for s in times for value in (0.0, s))
    choice, reason = compute_of(flow, net, evaluations, cpu, clock=lambda: next(ends))
    assert choice == chosen
    assert reason == (
        f"bfloat16 is {seconds[0] / seconds[1]:.1f} times as fast as float32" if seconds else ""
    )


def test_rows_of_numbers_are_sampled_in_float32() -> None:
    flow = pfgm.PoissonFlow((5,), data_norm=1.0)
    net = flow.network("mlp", width=16)
    assert compute_of(flow, net, 10**9, torch.device("cpu"))[0] == "float32"


def test_bits_per_dim_of_a_gaussian() -> None:
    flow, net = gaussian(0.7, 2)
    x = normal(9, 2)
    figures = bits_per_dim(flow, net, x, grey_levels=0, estimator="exact", batch_size=4)
    exact = gaussian_bits(x, 0.7)
    assert figures.mean == pytest.approx(float(exact.mean()), abs=1e-4)
    assert figures.standard_error == pytest.approx(float(exact.std()) / 3, abs=1e-4)
    assert figures.samples == 9
    assert figures.nfe > 10
    assert math.isnan(bits_per_dim(flow, net, x[:1], grey_levels=0).standard_error)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_bits_per_dim_of_grey_levels(dtype: torch.dtype) -> None:
    """Averaged over the noise, they are the integral over each level's own interval."""
    flow, net = gaussian(0.5, 50)
    levels = 256 if dtype == torch.uint8 else 5
    draw = torch.Generator().manual_seed(0)
    k = torch.randint(0, levels, (40, 50), generator=draw)
    x = k.to(torch.uint8) if dtype == torch.uint8 else 2 * k / (levels - 1) - 1
    figures = bits_per_dim(flow, net, x, grey_levels=levels, seed=1, rtol=1e-3, atol=1e-3)
    low, high = 2 * k.double() / levels - 1, 2 * (k.double() + 1) / levels - 1
    squares = (high**3 - low**3) / (3 * (high - low))  # the mean of x² within a level
    nats = squares / (2 * 0.25) + math.log(0.5 * math.sqrt(2 * math.pi))
    expected = float(nats.mean()) / math.log(2) + math.log2(levels / 2)
    assert figures.mean == pytest.approx(expected, abs=0.03)
    again = bits_per_dim(flow, net, x, grey_levels=levels, seed=1, rtol=1e-3, atol=1e-3)
    assert again == figures


def test_bits_per_dim_refuses_data_without_a_density(refused: Callable[..., None]) -> None:
    flow, net = gaussian(1.0, 2)
    one, bytes_ = torch.ones(1, 2), torch.arange(256, dtype=torch.uint8).view(128, 2)
    for x, levels, sentence in (
        (one[:0], 0, "x must have at least one row…"),
        (one, 1, "grey_levels must be at least 2, or 0 for…got 1."),
        (-1.5 * one, 17, "x must have 17 levels in…, got 1.5;…"),
        (bytes_, 17, "x must have 17 levels in…, got values between them…"),
        (bytes_, 255, "x must have 255 levels in…, got values between them…"),
        (0.1 * one, 2, "x must have 2 levels in…, got values between them…"),
    ):
        refused(lambda x=x, n=levels: bits_per_dim(flow, net, x, grey_levels=n), sentence)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_rounded_grey_levels_are_still_levels(dtype: torch.dtype) -> None:
    for levels in (256, 17):
        k = torch.arange(levels)
        x = 2 * k / (levels - 1) - 1
        x = (k * 255 / (levels - 1)).round().byte() if dtype == torch.uint8 else x.to(dtype)
        noisy = evaluation.dequantised(x, levels, torch.Generator().manual_seed(0))
        assert torch.equal(((noisy + 1) / 2 * levels).floor().long(), k)
    assert float(((noisy + 1) / 2 * levels - k).std()) == pytest.approx(12**-0.5, abs=0.1)


def test_curve() -> None:
    data, held_out = normal(60, 2), normal(40, 2, seed=1)
    flow = pfgm.PoissonFlow.from_data(data)
    net = flow.empirical(data)
    options = {"n": 60, "steps": [2, 5], "tolerances": [1e-2], "seed": 3}
    points = curve(flow, net, held_out, **options)
    assert curve(flow, net, held_out, **options) == points
    assert [(p.run, p.setting, p.nfe) for p in points[:-1]] == [
        ("euler, log", 2, 2),
        ("euler, log", 5, 5),
        ("euler, rho", 2, 2),
        ("euler, rho", 5, 5),
        ("heun, rho", 1, 1),
        ("heun, rho", 3, 5),
        ("multistep, log", 2, 2),
        ("multistep, log", 5, 5),
        ("multistep, rho", 2, 2),
        ("multistep, rho", 5, 5),
    ]
    assert (points[-1].run, points[-1].setting) == ("rk45", 1e-2)
    prior = flow.prior(60, generator=torch.Generator().manual_seed(3))
    samples = flow.sample(net, 60, x_init=prior, solver="euler", schedule="log", steps=5)
    assert points[1].frechet_distance == metrics.frechet_distance(samples, held_out)
    assert len(evaluation.RUNS) < len(COLOURS)  # rk45 is one more curve of the picture
    curves = evaluation.as_curves(points)
    assert list(curves) == list(dict.fromkeys(p.run for p in points))
    assert curves["euler, rho"] == ([2, 5], [p.frechet_distance for p in points[2:4]])


def test_curve_clamps_images_that_lie_within_the_unit() -> None:
    def net(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return pfgm.networks.field_from_mean(x, z, torch.full_like(x, 3.0))  # all samples are 3

    flow = pfgm.PoissonFlow((1, 2, 2), data_norm=1.0)
    for size, expected in ((1.0, 0.0), (2.0, 4.0)):
        held_out = torch.full((5, 1, 2, 2), size)
        (point,) = curve(flow, net, held_out, n=4, steps=[], tolerances=[1e-3])
        assert point.frechet_distance == pytest.approx(expected, abs=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of the digits, hardly trained."""
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    digits = pfgm.data.digits().train
    flow = pfgm.PoissonFlow.from_data(digits)
    torch.manual_seed(0)
    pfgm.save(path, flow, pfgm.networks.MLP(flow.shape, width=16, depth=1))
    return path


def evaluate(out: Path, *arguments: object) -> dict[str, Any]:
    assert cli.main(["evaluate", "--out", str(out), *map(str, arguments)]) == 0
    figures: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return figures


@pytest.fixture
def fails(refusal: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: object, notices: int = 0) -> str:
        sentence = refusal("evaluate", "--out", tmp_path / "out", *arguments, notices=notices)
        assert not (tmp_path / "out" / "metrics.json").exists()
        return sentence

    return run


def test_a_checkpoint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [model, "--n", 30, "--steps", 3, "--likelihood", 2]
    options += ["--curve", "--curve-steps", 2, 3]
    figures = evaluate(tmp_path / "a", *options)
    flow, net = pfgm.load(model)
    digits = pfgm.data.digits()
    prior = flow.prior(30, generator=torch.Generator().manual_seed(0))
    samples = flow.sample(net, 30, x_init=prior, steps=3).clamp(-1, 1)
    inside = metrics.precision_recall(samples, digits.held_out)
    assert figures["precision"]["samples"] == inside.precision
    distance = metrics.frechet_distance(samples, digits.held_out)
    assert figures["frechet_distance"]["samples"] == pytest.approx(distance)
    assert figures["against"] == "held_out"
    assert figures["counts"] == {"samples": 30, "against": 399, "train": 30, "searched": 1398}
    assert (figures["nfe"], figures["seed"], figures["data"]) == (3, 0, "digits")
    assert figures["source"] == str(model)
    assert figures["sampling"]["labels"] is None
    assert figures["versions"]["torch"] == torch.__version__
    bits = figures["likelihood"]
    assert (bits["of"], bits["count"], bits["grey_levels"]) == ("held_out", 2, 17)
    assert 1 < bits["bits_per_dim"] < 100
    assert bits["standard_error"] >= 0

    rows = list(csv.DictReader((tmp_path / "a" / "curve.csv").read_text().splitlines()))
    assert len(rows) == 5 * 2 + 3
    (row,) = (r for r in rows if (r["run"], r["setting"]) == ("multistep, rho", "3"))
    assert float(row["frechet_distance"]) == figures["frechet_distance"]["samples"]
    for picture in ("samples.png", "curve.png"):
        assert (tmp_path / "a" / picture).read_bytes()[:8] == PNG
    shown = capsys.readouterr().out
    for part in ("against 399 held-out rows", "frechet distance", "bits per dimension of 2"):
        assert part in shown

    again = evaluate(tmp_path / "b", *options[:7])  # the same seed, the same figures
    assert again == figures
    assert not (tmp_path / "b" / "curve.csv").exists()


def test_samples_in_files_and_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    digits = pfgm.data.digits()
    grey = ((digits.held_out[:20, 0] + 1) * 127.5).round().to(torch.uint8)
    unit = grey[:, None].float() / 127.5 - 1
    np.save(tmp_path / "bytes.npy", grey.numpy())
    np.save(tmp_path / "floats.npy", unit.numpy())
    (tmp_path / "images").mkdir()
    for number, each in enumerate(grey):
        image.fromarray(each.numpy()).save(tmp_path / "images" / f"{number:02}.png")
    expected = evaluate_samples(unit, digits.held_out, digits.train)
    for name in ("bytes.npy", "floats.npy", "images"):
        figures = evaluate(tmp_path / "out", "--samples", tmp_path / name)
        assert figures["source"] == str(tmp_path / name)
        assert figures["counts"] == expected["counts"]
        for figure in ("precision", "recall", "density", "coverage"):
            assert figures[figure]["samples"] == expected[figure]["samples"]
        distance = expected["frechet_distance"]["samples"]
        assert figures["frechet_distance"]["samples"] == pytest.approx(distance)
        assert "nfe" not in figures
        assert (tmp_path / "out" / "samples.png").read_bytes()[:8] == PNG
    figures = evaluate(
        tmp_path / "out", "--samples", tmp_path / "images", "--n", 8, "--against", 50
    )
    assert figures["counts"] == {"samples": 8, "against": 50, "train": 8, "searched": 50}


def test_a_run_on_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Points in the plane: no held-out rows, no grey levels, no picture."""
    data = normal(60, 2)
    np.save(tmp_path / "points.npy", data.numpy())
    flow = pfgm.PoissonFlow.from_data(data, z_min=0.3)
    run = tmp_path / "run"
    run.mkdir()
    net = flow.network("mlp", width=16, depth=1)
    files = {"weights": "step-00000000.safetensors", "state": "step-00000000.state.pt"}
    pfgm.save(run / files["weights"], flow, net)
    (run / "latest.json").write_text(json.dumps({"step": 0, **files}))
    RunConfig(data=str(tmp_path / "points.npy")).save(run / "config.json")
    figures = evaluate(tmp_path / "out", run, "--n", 25, "--likelihood", 1)
    assert figures["data"] == str(tmp_path / "points.npy")  # what the run was trained on
    assert figures["against"] == "train"
    assert figures["counts"] == {"samples": 25, "against": 30, "train": 25, "searched": 60}
    assert set(figures["median_distance_to_train"]) == {"samples", "train"}
    bits = figures["likelihood"]
    assert (bits["of"], bits["grey_levels"], bits["standard_error"]) == ("train", 0, None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json"]
    shown = capsys.readouterr().out
    assert "against 30 train rows" in shown
    assert "of 1 train rows, no grey levels" in shown


def test_models_beside_each_other(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    options = ["--n", 30, "--steps", 2, "--seed", 3]
    alone = {name: evaluate(tmp_path / "one", name, *options) for name in (str(model), "digits")}
    capsys.readouterr()
    both = evaluate(tmp_path / "both", model, "digits", *options)
    lines = capsys.readouterr().out.splitlines()
    assert (both["data"], both["seed"], len(both["models"])) == ("digits", 3, 2)
    for figures in both["models"]:
        same = alone[figures["source"]]
        assert figures == {name: same[name] for name in figures}
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        *("metrics.json", "samples-1.png", "samples-2.png")
    }
    # A network with labels is compared with training rows of them, so each has its own column.
    at = next(place for place, line in enumerate(lines) if line.startswith("against 399"))
    columns = ["1", "2", "train, 1", "train, 2", "in features: 1", "2", "train, 1", "train, 2"]
    assert re.split(" {2,}", lines[at])[1:] == columns
    row = next(line for line in lines if line.startswith("frechet distance"))
    values = [
        space["frechet_distance"][of]
        for spaces in (both["models"], [each["features"] for each in both["models"]])
        for of in ("samples", "train")
        for space in spaces
    ]
    assert row.split()[5:] == [f"{value:.4g}" for value in values]
    assert f"1: {model}" in lines
    assert "2: digits" in lines
    assert lines.count("2 evaluations of the network a sample") == 2
    evaluate(tmp_path / "alike", model, model, *options)
    lines = capsys.readouterr().out.splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("against 399"))
    assert re.split(" {2,}", lines[at])[1:] == ["1", "2", "train", "in features: 1", "2", "train"]
    message = fails(model, "fashion-mnist", *options)
    assert (
        "models must have been trained on the same data, read in the same way, got digits, fa"
        in message
    )
    assert message.endswith("give the data with --data.")
    assert "samples must have the shape" in fails(model, "fashion-mnist", "--data", "digits")
    evaluate(tmp_path / "curves", model, model, *options[:4], "--curve", "--curve-steps", 2)
    assert (tmp_path / "curves" / "curve-2.csv").read_text().startswith("run,setting,nfe")
    assert (tmp_path / "curves" / "curve-1.png").read_bytes()[:8] == PNG


def test_models_of_other_tables_or_readings_are_refused(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Their samples would mean other rows."""
    pytest.importorskip("pandas")
    flow = pfgm.PoissonFlow((1,), data_norm=1.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = (f"{value}.5" for value in range(30 if name == "a" else 60))
        (tmp_path / f"{name}.csv").write_text("\n".join(["x", *rows]))
        table = pfgm.data.open(str(tmp_path / f"{name}.csv")).table
        net = flow.network("mlp", width=16)
        pfgm.save(tmp_path / name / "net.safetensors", flow, net, table=table)
        RunConfig(data=f"{tmp_path}/{name}.csv").save(tmp_path / name / "config.json")
    models = [tmp_path / name / "net.safetensors" for name in ("a", "b")]
    assert "models must have been trained on the same data" in fails(*models)
    message = fails(*models, "--data", tmp_path / "a.csv")
    assert "models must be of one table, got some with other columns or scales." in message
    RunConfig(data="digits", labels=True).save(tmp_path / "a" / "config.json")
    assert _data_of(str(tmp_path / "a")) == _data_of("digits")
    RunConfig(data="digits", resize=9).save(tmp_path / "a" / "config.json")
    assert _data_of(str(tmp_path / "a")) != _data_of("digits")


def test_the_precision_of_samples_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["digits", "--n", 20, "--steps", 2]
    assert evaluate(tmp_path / "a", *options)["sampling"]["compute"] == "float32"
    half = evaluate(tmp_path / "b", *options, "--compute", "bfloat16")
    assert half["sampling"]["compute"] == "bfloat16"
    out = tmp_path / "x.npy"
    sample = ["sample", *map(str, options), "--out", str(out)]
    assert cli.main([*sample, "--compute", "bfloat16"]) == 0
    expected, _ = draw_samples(*pfgm.load("digits"), 20, steps=2, compute="bfloat16")
    assert torch.equal(torch.from_numpy(np.load(out)), expected)
    chosen = ("bfloat16", "bfloat16 is 1.9 times as fast as float32")
    monkeypatch.setattr(cli.options, "compute_of", lambda *given: chosen)
    capsys.readouterr()
    assert cli.main(sample) == 0
    assert torch.equal(torch.from_numpy(np.load(out)), expected)
    notice = "pfgm: the network computes in bfloat16 (--compute): bfloat16 is 1.9 times as fast"
    assert notice in capsys.readouterr().err


def test_a_network_with_labels(tmp_path: Path) -> None:
    digits = pfgm.data.digits()
    flow = pfgm.PoissonFlow.from_data(digits.train)
    torch.manual_seed(0)
    net = pfgm.networks.MLP(flow.shape, width=16, depth=1, classes=10)
    pfgm.save(tmp_path / "net.safetensors", flow, net)
    options = [tmp_path / "net.safetensors", "--n", 20, "--likelihood", 2]
    figures = evaluate(tmp_path / "out", *options, "--guidance", 2)
    assert figures["sampling"]["labels"] == "i mod 10"
    assert figures["sampling"]["guidance"] == 2
    assert figures["nfe"] == 20  # with the label and without
    assert figures["likelihood"]["labels"] is True


def test_figures_of_each_label(
    tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["digits", "--n", 100, "--steps", 2, "--per-label"]
    figures = evaluate(tmp_path / "a", *options)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("100 samples and 399 held-out rows are few")
    digits, classifier = pfgm.data.digits(), metrics.load_classifier("digits")
    flow, net = pfgm.load("digits")
    samples = draw_samples(flow, net, 100, steps=2)[0].clamp(-1, 1)
    sevens = digits.held_out_labels == 7
    distance = metrics.frechet_distance(
        classifier.rows(samples[7::10]), classifier.rows(digits.held_out[sevens])
    )
    assert list(figures["labels"]) == list("0123456789")
    assert figures["labels"]["7"]["counts"]["against"] == sevens.sum()
    assert figures["labels"]["7"]["frechet_distance"]["samples"] == pytest.approx(distance, 1e-3)
    start = shown.index(next(line for line in shown if line.startswith("of each label, in feat")))
    assert [line.split()[0] for line in shown[start + 1 : start + 11]] == list("0123456789")
    np.save(tmp_path / "digits.npy", samples.numpy())
    assert "got samples without labels" in fails(
        "--samples", tmp_path / "digits.npy", "--per-label"
    )
    # In a file with labels, only sevens and a single one.
    few, kept = torch.arange(100) % 10, torch.tensor([1, *range(7, 100, 10)])
    np.savez(tmp_path / "digits.npz", images=samples[kept].numpy(), labels=few[kept].numpy())
    again = evaluate(tmp_path / "b", "--samples", tmp_path / "digits.npz", "--per-label")
    assert [name for name, values in again["labels"].items() if values is not None] == ["7"]
    assert again["labels"]["7"]["frechet_distance"]["samples"] == pytest.approx(distance, 1e-3)
    line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("1 "))
    assert line.split(maxsplit=1)[1] == "too few samples or rows of the data to compare"


def test_labels_with_names_are_compared_by_their_names(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Classes that only one folder holds do not move the numbers of the others."""
    image, classes = pytest.importorskip("PIL.Image"), ("cat", "dog", "eel")
    for place, shades in (("data", (20, 120, 220)), ("some", (None, 120, 220))):
        for name, shade in zip(classes, shades, strict=True):
            for number in range(12 if shade is not None else 0):
                (tmp_path / place / name).mkdir(parents=True, exist_ok=True)
                grey = np.full((4, 4), shade + number, np.uint8)
                image.fromarray(grey).save(tmp_path / place / name / f"{number}.png")
    flow = pfgm.PoissonFlow((1, 4, 4), data_norm=1.0)
    net = flow.network("mlp", width=8, classes=2)  # of dogs and eels
    pfgm.save(tmp_path / "net.safetensors", flow, net, label_names=classes[1:])
    data = ["--data", f"folder:{tmp_path / 'data'}", "--per-label"]
    figures = evaluate(tmp_path / "a", "--samples", tmp_path / "some", *data)["labels"]
    assert figures["cat"] is None
    assert [figures[name]["median_distance_to_train"]["samples"] for name in classes[1:]] == [0, 0]
    model = [tmp_path / "net.safetensors", "--n", 24]
    figures = evaluate(tmp_path / "a", *model, *data)
    assert [figures["labels"][name] is None for name in classes] == [True, False, False]
    less = fails("--samples", tmp_path / "data", "--data", f"folder:{tmp_path / 'some'}")
    assert "labels must be among dog, eel, got cat." in less


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        ((), (), [0, 1, 1]),
        (("b", "c"), ("a", "b", "c"), [1, 2, 2]),
        (("7", "12"), (), [7, 12, 12]),  # folders of digits, against data with numbers
        ((), ("0", "1", "10"), [0, 1, 1]),
        (("b", "c"), (), [0, 1, 1]),
    ],
)
def test_labels_of_the_same_name_have_one_number(
    names: tuple[str, ...], known: tuple[str, ...], expected: list[int]
) -> None:
    assert _renumbered(torch.tensor([0, 1, 1]), names, known).tolist() == expected


def test_fid(
    model: Path, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples and the training rows reach torch-fidelity, with weights that were checked."""
    options = [model, "--n", 12, "--steps", 2, "--against", 20]
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "need torch-fidelity; in a checkout: pip install" in fails(*options, "--fid")
    fake, seen = types.ModuleType("torch_fidelity"), {}

    def calculate_metrics(**options: Any) -> dict[str, float]:
        seen.update(options)
        return {"fid": 3.5, "score": 2.5, "deviation": 0.5}

    names = {"FID": "fid", "ISC_MEAN": "score", "ISC_STD": "deviation"}
    fake.__dict__.update({f"KEY_METRIC_{key}": name for key, name in names.items()})
    fake.__dict__["calculate_metrics"] = calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = "weights-inception-2015-12-05-6726825d.pth"
    weights = tmp_path / "hub" / "checkpoints" / name
    message = fails(*options, "--fid")
    assert f"there is no file {weights}; copy {name} from github.com/toshas" in message
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"other weights")
    assert "must be torch-fidelity's file of weights, with a SHA-256" in fails(*options, "--fid")
    assert "fid-weights needs --fid" in fails(*options, "--fid-weights", weights)
    assert not seen
    checksum = hashlib.sha256(b"other weights").hexdigest()[:8]
    monkeypatch.setattr("pfgm.metrics.inception._CHECKSUM", checksum)
    for extra in ([], ["--fid-weights", weights]):
        figures = evaluate(tmp_path / f"fid{len(extra)}", *options, "--fid", *extra)["inception"]
        assert (figures["fid"], figures["score"], figures["score_deviation"]) == (3.5, 2.5, 0.5)
        assert figures["counts"] == {"samples": 12, "train": 20}
        assert seen["feature_extractor_weights_path"] == str(weights)
        assert (len(seen["input1"]), len(seen["input2"]), seen["isc_splits"]) == (12, 20, 10)
    digits = ((pfgm.data.digits().train + 1) * 127.5).round().byte()
    known = {image.numpy().tobytes() for image in digits}
    assert all(seen["input2"].images[row].numpy().tobytes() in known for row in range(20))
    np.save(tmp_path / "rows.npy", np.zeros((9, 2), np.float32))
    rows = ["--samples", tmp_path / "rows.npy", "--data", tmp_path / "rows.npy"]
    assert "samples must be images (C, H, W) with C = 1 or 3 for --fid, got shape (2,)" in fails(
        *rows, "--fid"
    )


def test_one_sentence_for_bad_input(model: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((9, 4, 4), np.float32))
    np.save(tmp_path / "few.npy", np.zeros((5, 8, 8), np.float32))
    least_1 = "must be an integer of at least 1"
    assert "n must be an integer of at least 6" in fails(model, "--n", 5)
    assert f"curve-steps {least_1} and at" in fails(model, "--curve-steps", 0)
    assert f"number of curve-steps {least_1}, got 0." in fails(model, "--curve-steps")
    assert "samples alone have no likelihood" in fails("--samples", tmp_path, "--likelihood", 1)
    for option, value in (("guidance", 2.0), ("solver", "heun"), ("batch-size", 7)):
        message = fails("--samples", tmp_path, f"--{option}", value)
        assert f"{option} is {value}, but {tmp_path} holds samples that" in message
    assert "grey-levels needs --likelihood N" in fails(model, "--grey-levels", 17)
    assert "likelihood must be at most 399" in fails(model, "--likelihood", 400)
    grey = ["--n", 10, "--steps", 1, "--likelihood", 1, "--grey-levels", 1]
    assert "levels must be at least 2" in fails(model, *grey)
    assert "no.npy does not exist" in fails("--samples", tmp_path / "no.npy")
    shape = fails("--samples", tmp_path / "wide.npy")
    assert (
        "samples must have the shape of the data digits, (1, 8, 8), got (4, 4); give the data with "
        "--data." in shape
    )
    assert "give --layout images" in fails("--samples", tmp_path / "few.npy", notices=1)
    few = fails("--samples", tmp_path / "few.npy", "--layout", "images")
    assert "samples must have at least 6 rows, got 5" in few
    np.save(tmp_path / "nan.npy", np.full((9, 1, 8, 8), np.nan, np.float32))
    assert "NaN or infinity" in fails("--samples", tmp_path / "nan.npy")
