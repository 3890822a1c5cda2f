"""Trains a PFGM++ flow in the loop of torchcfm, with its network and a matcher of pfgm.

    python examples/torchcfm_loop.py --out torchcfm [--quick]

Both halves of the picture start from the same noise. The upper half is integrated by torchdiffeq in
100 evaluations, as in torchcfm, the lower half by the multistep solver of pfgm in 12.
"""

import argparse

import torch
from torch import Tensor, nn
from torchcfm.models.unet import UNetModel
from torchdiffeq import odeint

import pfgm
from pfgm.common.files import check_folder
from pfgm.integrations.flow_matching import PoissonFlowMatcher, as_denoiser
from pfgm.plotting import image_grid


def train(net: nn.Module, matcher: PoissonFlowMatcher, data: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x1 = data[torch.randint(len(data), (64,))]
        t, xt, ut = matcher.sample_location_and_conditional_flow(None, x1)
        loss = (net(t, xt) - ut).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def sample(net: nn.Module, matcher: PoissonFlowMatcher, shape: torch.Size) -> Tensor:
    noise = matcher.noise((50, *shape))
    integrated = odeint(net, noise, torch.linspace(0, 1, 101), method="euler")[-1]
    flow = pfgm.PoissonFlowPP(shape, D=matcher.D)
    start = flow.sigma_max * noise
    options = {"solver": "multistep", "steps": 12, "x_init": start}
    return torch.cat([integrated, flow.sample(as_denoiser(net), len(noise), **options)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few steps, a few seconds")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = pfgm.data.digits().train
    matcher = PoissonFlowMatcher(D=128, references=data)
    net = UNetModel(data.shape[1:], num_channels=32, num_res_blocks=1, channel_mult=(1, 2))
    train(net, matcher, data, steps=30 if options.quick else 2000)
    samples = sample(net.eval(), matcher, data.shape[1:])
    image_grid(samples, check_folder(options.out) / "torchcfm_loop.png")
