"""Trains the UNet2DModel of diffusers as the network of a Poisson flow.

    python examples/diffusers_unet.py --out unet [--quick]

pfgm.networks.from_module puts the preconditioning of the flow around the network.
"""

import argparse

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid


def train(flow: pfgm.PoissonFlowPP, data: Tensor, steps: int) -> AveragedModel:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    net = pfgm.networks.from_module(unet, flow)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = data[torch.randint(len(data), (64,))]
        loss = flow.loss(net, x, references=data)
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
    flow = pfgm.PoissonFlowPP.from_data(data, D=128)
    net = train(flow, data, steps=20 if options.quick else 2000)
    image_grid(flow.sample(net, 100), check_folder(options.out) / "diffusers_unet.png")
