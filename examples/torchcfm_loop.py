"""Trains a PFGM++ flow as in torchcfm, with its network and a matcher of pfgm.

    python examples/torchcfm_loop.py --out torchcfm [--quick]

Both halves of the picture start from the same noise. The upper half is integrated by torchdiffeq in
100 evaluations, as in torchcfm, the lower half by the multistep solver of pfgm in 12.
The training loop is that of plain_trainer.py, without its average of the weights.
"""

import torch
from plain_trainer import parse_options, train
from torch import Tensor, nn
from torchcfm.models.unet import UNetModel
from torchdiffeq import odeint

import pfgm
from pfgm.common.files import check_folder
from pfgm.integrations.flow_matching import PoissonFlowMatcher, as_denoiser
from pfgm.plotting import image_grid


@torch.no_grad()
def sample(net: nn.Module, matcher: PoissonFlowMatcher, shape: torch.Size) -> Tensor:
    noise = matcher.noise((50, *shape))
    integrated = odeint(net, noise, torch.linspace(0, 1, 101), method="euler")[-1]
    flow = pfgm.PoissonFlowPP(shape, D=matcher.D)
    start = flow.sigma_max * noise
    samples = flow.sample(as_denoiser(net), len(noise), solver="multistep", steps=12, x_init=start)
    return torch.cat([integrated, samples])


if __name__ == "__main__":
    options = parse_options(__doc__)
    torch.manual_seed(0)
    data = pfgm.data.digits().train
    matcher = PoissonFlowMatcher(D=128, references=data)
    net = UNetModel(data.shape[1:], num_channels=32, num_res_blocks=1, channel_mult=(1, 2))

    def batch_loss() -> Tensor:
        x1 = data[torch.randint(len(data), (64,))]
        t, xt, ut = matcher.sample_location_and_conditional_flow(None, x1)
        return torch.mean((net(t, xt) - ut).square())

    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    train(net, adam, batch_loss, steps=30 if options.quick else 2000)
    samples = sample(net.eval(), matcher, data.shape[1:])
    image_grid(samples, check_folder(options.out) / "torchcfm_loop.png")
