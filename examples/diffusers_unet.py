"""Trains the UNet2DModel of diffusers as the network of a Poisson flow.

    python examples/diffusers_unet.py --out unet [--quick]

flow.network puts the preconditioning of the flow around the network.
The training loop is that of plain_trainer.py.
"""

import torch
from diffusers import UNet2DModel
from plain_trainer import parse_options, train
from torch import Tensor

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid


def digits_unet(**options: object) -> UNet2DModel:
    """A small U-Net for 8 × 8 grey images."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


if __name__ == "__main__":
    options = parse_options(__doc__)
    torch.manual_seed(0)
    data = pfgm.data.digits().train
    flow = pfgm.PoissonFlowPP.from_data(data, D=128)
    net = flow.network(digits_unet(norm_num_groups=8))

    def batch_loss() -> Tensor:
        return flow.loss(net, data[torch.randint(len(data), (64,))], references=data)

    adam = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    averaged = train(net, adam, batch_loss, steps=20 if options.quick else 2000)
    image_grid(flow.sample(averaged, 100), check_folder(options.out) / "diffusers_unet.png")
