"""Tensors lie where their arguments say, whatever torch's default device is.

Here it is "meta", whose tensors have no memory: one of them in a result is no silent difference.
"""

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

import pfgm
from pfgm.references import ReferenceSet
from pfgm.training import TrainConfig, Trainer

ROOT = Path(__file__).resolve().parents[2]
# Networks are built on the default device, as layers of torch are.
LAYERS = {
    ROOT / "pfgm/networks" / name
    for name in ("embedding.py", "registry.py", "published/edm_unets.py", "published/pfgm_unets.py")
}
FILES = {path for folder in ("pfgm", "kernels") for path in (ROOT / folder).rglob("*.py")} - LAYERS


def test_every_allocation_names_its_device():
    names = {function.__name__ for function in _device_constructors()}
    assert {"empty", "tensor", "linspace", "as_tensor"} <= names
    assert all(path.exists() for path in LAYERS)
    nameless = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(FILES)
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in names
        and "device" not in {keyword.arg for keyword in call.keywords}
    ]
    assert nameless == []


def rows(count=40, side=24, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(count, 1, side, side, generator=draw, device="cpu") * 2 - 1
    return values.to(dtype)


def flows(data):
    return pfgm.PoissonFlow.from_data(data), pfgm.PoissonFlowPP(data.shape[1:], D=128)


def operations(references):
    """Results and gradients of each operation, three times: a set has summaries by then."""
    for _ in range(3):
        x = (rows(5) + 0.1).requires_grad_()
        mean, lse = pfgm.posterior_mean(x, references, r=0.5, return_logsumexp=True)
        field_x, field_z = pfgm.field_fn(x, 0.5, references)
        density = pfgm.log_density(x, references, sigma=0.5, D=math.inf)
        (mean.sum() + lse.sum() + field_x.sum() + field_z.sum() + density.sum()).backward()
        yield from (mean, lse, field_x, field_z, density, x.grad)
        field = pfgm.Field(field_x.detach(), field_z.detach())
        yield pfgm.euler_step(x.detach(), field, 2.0, 1.0)
        yield pfgm.euler_step(x.detach(), mean.detach(), 1.0, 0.5)


def a_set(folder):
    path = folder / "rows.npy"
    np.save(path, rows().numpy())
    for references in (
        rows(),
        ReferenceSet(rows()),
        ReferenceSet(rows(dtype=torch.bfloat16)),
        ReferenceSet(rows(), flips=True),
        ReferenceSet(path),
    ):
        yield from operations(references)
    references = ReferenceSet(path, flips=True)
    draw = torch.Generator().manual_seed(1)
    numbers = references.draw(9, generator=draw)
    yield from (numbers, references.rows, references[numbers], references[2:5])
    yield from (references.measures.mean, references.measures.least)
    yield from (references.to(dtype=torch.uint8)[:3], next(references.chunks()))


def sampling(folder):
    data, fast = rows(side=4), {"solver": "heun", "steps": 3}
    for flow in flows(data):
        net, draw = flow.empirical(data), torch.Generator().manual_seed(2)
        samples = flow.sample(net, 3, steps=4, generator=draw)
        latents = flow.encode(net, samples[:1], rtol=0.1)
        yield from (samples, latents, flow.decode(net, latents, **fast))
        yield from flow.perturb(data, generator=draw)
        yield flow.interpolate(net, samples[:1], samples[1:2], count=3, **fast)
        mask = torch.ones_like(samples, dtype=torch.bool)
        yield flow.inpaint(net, samples, mask, generator=draw, **fast)
        yield flow.log_likelihood(net, samples, generator=draw, **fast).nats


def training(folder):
    """The weights after two steps, with data in memory and in a set, and samples."""
    data = rows(side=4)
    plain, plusplus = flows(data)
    with torch.device("cpu"):
        torch.manual_seed(3)
        mlp, denoiser = (flow.network("mlp", width=8, depth=1) for flow in (plain, plusplus))
    for flow, net, references in ((plain, mlp, data), (plusplus, denoiser, ReferenceSet(data))):
        config = TrainConfig(steps=2, batch_size=4, reference_batch=8, seed=4, precision="float32")
        trained = Trainer(flow, net, references, config).train()
        yield from trained.state_dict().values()
        yield flow.sample(trained, 2, steps=2, generator=torch.Generator().manual_seed(5))


def measuring(folder):
    a, b = rows(12), rows(24)[12:]
    draw = torch.Generator().manual_seed(6)
    distance = pfgm.metrics.kernel_distance(a, b, subsets=2, generator=draw)
    figures = pfgm.metrics.frechet_distance(a, b), *pfgm.metrics.precision_recall(a, b, k=2)
    yield torch.tensor([*figures, *distance], device="cpu")
    yield from pfgm.data.digits()[:2]


def test_what_is_loaded_lies_on_its_device(tmp_path):
    with torch.device("meta"):
        flow, net = pfgm.load("digits")
        labels = torch.arange(3, device="cpu")
        samples = flow.sample(net, 3, condition={"labels": labels}, steps=2)
    assert {each.device.type for each in (*net.parameters(), *net.buffers(), samples)} == {"cpu"}


def test_the_first_use_of_rk45_keeps_its_constants():
    """In a process of its own: torchdiffeq makes constants when it is imported."""
    program = """
import torch, pfgm
flow, x = pfgm.PoissonFlow((2,), data_norm=1.0), torch.ones(1, 2)
net = flow.empirical(torch.ones(1, 2))
for device in ("meta", None):
    torch.set_default_device(device)
    assert flow.encode(net, x, solver="rk45", rtol=0.1).isfinite().all()
    assert flow.log_likelihood(net, x, rtol=0.1).nats.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("results", [a_set, sampling, training, measuring])
def test_results_do_not_depend_on_the_default_device(results, tmp_path):
    expected = [each.detach() for each in results(tmp_path)]
    with torch.device("meta"):
        actual = [each.detach() for each in results(tmp_path)]
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
