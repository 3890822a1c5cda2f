"""Trains a Poisson flow in a loop with accelerate; pfgm.field_fn computes the target.

    python examples/accelerate_loop.py --out accelerate [--quick]

Each process computes the targets of its own part of the batch, with all references.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid


def train(accelerator: Accelerator, flow: pfgm.PoissonFlow, data: Tensor, epochs: int) -> nn.Module:
    net = flow.network("unet")
    batches = DataLoader(TensorDataset(data), batch_size=64, shuffle=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    net, optimizer, schedule, batches = accelerator.prepare(net, optimizer, schedule, batches)
    references = data.to(accelerator.device)
    for epoch in range(epochs):
        losses = []
        for (x,) in batches:
            x_perturbed, z = flow.perturb(x)
            field_x, field_z = pfgm.field_fn(x_perturbed, z, references, gamma=flow.gamma)
            predicted_x, predicted_z = net(x_perturbed, z)
            error_x = (predicted_x - field_x).square().flatten(1).sum(1)
            loss = (error_x + (predicted_z - field_z).square()).mean() / 2
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if epoch % max(epochs // 10, 1) == 0:
            accelerator.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
    unwrapped: nn.Module = accelerator.unwrap_model(net)
    return unwrapped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few steps, a few seconds")
    options = parser.parse_args()
    accelerator = Accelerator()
    set_seed(0)
    data = pfgm.data.digits().train
    flow = pfgm.PoissonFlow.from_data(data)
    net = train(accelerator, flow, data, epochs=2 if options.quick else 180)
    if accelerator.is_main_process:
        image_grid(flow.sample(net, 100), check_folder(options.out) / "accelerate_loop.png")
