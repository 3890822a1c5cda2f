"""Trains a Poisson flow in a plain PyTorch loop; pfgm.field_fn computes the target.

    python examples/plain_trainer.py --out plain [--quick]

The optimiser, the schedule and the averaging of the weights are those of PyTorch.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid


def parse_options(docstring: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few steps, a few seconds")
    return parser.parse_args()


def train(net: nn.Module, adam: Adam, batch_loss: Callable[[], Tensor], steps: int) -> nn.Module:
    """Trains on new batches, whose loss batch_loss() gives; returns the averaged weights."""
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    schedule = lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        loss = batch_loss()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        averaged.update_parameters(net)
        if step % (steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    return averaged


if __name__ == "__main__":
    options = parse_options(__doc__)
    torch.manual_seed(0)
    data = pfgm.data.digits().train
    flow = pfgm.PoissonFlow.from_data(data)
    net = flow.network("unet")

    def batch_loss() -> Tensor:
        x_perturbed, z = flow.perturb(data[torch.randint(len(data), (64,))])
        field_x, field_z = pfgm.field_fn(x_perturbed, z, data, gamma=flow.gamma)
        predicted_x, predicted_z = net(x_perturbed, z)
        error_x = (predicted_x - field_x).square().flatten(1).sum(1)
        return torch.mean(error_x + (predicted_z - field_z).square()) / 2

    adam = Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    averaged = train(net, adam, batch_loss, steps=30 if options.quick else 4000)
    image_grid(flow.sample(averaged, 100), check_folder(options.out) / "plain_trainer.png")
