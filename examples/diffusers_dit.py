"""Trains the DiTTransformer2DModel of diffusers as the network of a Poisson flow, with labels.

    python examples/diffusers_dit.py --out dit [--quick]

The labels of the flow are the class_labels of the DiT, and its label 10 means no label. In training
the DiT drops a tenth of the labels by itself, which guidance needs. Each column of the picture has
one label.
"""

import argparse

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid


def train(flow: pfgm.PoissonFlow, data: Tensor, labels: Tensor, steps: int) -> AveragedModel:
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=1,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    net = pfgm.networks.from_module(dit, flow, conditions={"labels": "class_labels"}, no_label=10)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.randint(len(data), (64,))
        condition = {"labels": labels[rows]}
        loss = flow.loss(net, data[rows], data, condition=condition, reference_labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(net)
        if step % (steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    return averaged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few steps, a few seconds")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = pfgm.data.digits()
    flow = pfgm.PoissonFlow.from_data(data.train)
    net = train(flow, data.train, data.train_labels, steps=20 if options.quick else 3000)
    columns = {"labels": torch.arange(10).repeat(10)}
    samples = flow.sample(net, 100, condition=columns, guidance=1.5)
    image_grid(samples, check_folder(options.out) / "diffusers_dit.png", columns=10)
