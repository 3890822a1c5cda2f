"""Trains a Poisson flow in a plain PyTorch loop; pfgm.field_fn computes the target.

    python examples/plain_trainer.py --out plain [--quick]

The optimiser, the schedule and the averaging of the weights are those of PyTorch.
"""

import argparse

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid


def train(flow: pfgm.PoissonFlow, data: Tensor, steps: int) -> AveragedModel:
    net = pfgm.networks.UNet(flow.shape)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = data[torch.randint(len(data), (64,))]
        x_perturbed, z = flow.perturb(x)
        field_x, field_z = pfgm.field_fn(x_perturbed, z, references=data)
        predicted_x, predicted_z = net(x_perturbed, z)
        error_x = (predicted_x - field_x).square().flatten(1).sum(1)
        error_z = (predicted_z - field_z).square()
        loss = (error_x + error_z).mean() / 2
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
    data = pfgm.data.digits().train
    flow = pfgm.PoissonFlow.from_data(data)
    net = train(flow, data, steps=30 if options.quick else 4000)
    image_grid(flow.sample(net, 100), check_folder(options.out) / "plain_trainer.png")
